"""One file and back: a fresh process that has not seen the data gets the same posterior."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import guides
import zoo
from guides.guide import ProgramGuide
from guides.inference import SVI, laplace
from guides.recipe import build, describe
from guides.saving import FORMAT, KEY
from tests.programs import PROGRAMS, random_effects

ROOT = Path(__file__).resolve().parents[1]


def two_levels(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """A chain in every row and a positive global: every scheme has something to do."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    with pyro.plate("data", size or len(x), subsample=index):
        top = pyro.sample("top", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(low, scale).to_event(1), obs=x)


def chain(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """The same without a global, and with fixed scales."""
    with pyro.plate("data", size or len(x), subsample=index):
        top = pyro.sample("top", dist.Normal(torch.zeros(2).to(x), 1.0).to_event(1))
        low = pyro.sample("low", dist.Normal(top, 1.0).to_event(1))
        pyro.sample("x", dist.Normal(low, 0.5).to_event(1), obs=x)


def sets(x: Tensor, mask: Tensor) -> None:
    """Positive elements: at the zeros of a rebuilt call their density does not exist."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        with pyro.plate("elements", x.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("x", dist.Gamma(2.0, z), obs=x)


def subsampled(x: Tensor) -> None:
    """Draws its own rows."""
    with pyro.plate("data", len(x), subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])


def grouped(group: Tensor, x: Tensor) -> None:
    """The number of its latents follows from the values of an argument."""
    with pyro.plate("groups", int(group.max()) + 1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(level[group], 1.0), obs=x)


def first_of(x: Tensor, *_: Any) -> Tensor:
    return x[:, :1]


@dataclass(frozen=True)
class Case:
    """A guide to save; everything but the data is at hand in the other process, too."""

    name: Any
    model: Callable[[], Any]
    data: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    overrides: Callable[[], dict[str, Any]] = dict


def rows(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(shape),)


def binary(*shape: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.bernoulli(torch.full(shape, 0.4)),)


def vae(**options: Any) -> Callable[[], Any]:
    return lambda: zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,), **options)


SMALL = {"hidden": (8,)}
MIXED = {"global": "multivariate_normal", "data": ("amortized_normal", SMALL)}
FLOW = {"transforms": 2, "bins": 4, "context": 2, "family_hidden": (8,)}

CASES: dict[str, Case] = {
    "local, globals": Case(
        "normal", lambda: random_effects, lambda: PROGRAMS["random_effects"]().args
    ),
    "local, minibatch": Case(
        "multivariate_normal",
        lambda: chain,
        rows(3, 2),
        kwargs={"size": 9, "index": torch.tensor([7, 1, 4])},
    ),
    "local, own subsample": Case("normal", lambda: subsampled, rows(9)),
    "delta": Case("delta", lambda: two_levels, rows(6, 2), {"jacobian": True}),
    "one group": Case("multivariate_normal", lambda: two_levels, rows(4, 2), {"data_plate": None}),
    "amortized": Case("amortized_normal", vae(), binary(6, 4), SMALL),
    "amortized, globals": Case("amortized_normal", lambda: two_levels, rows(6, 2), SMALL),
    "amortized, minibatch": Case(
        "amortized_normal",
        lambda: two_levels,
        rows(3, 2),
        SMALL,
        {"size": 9, "index": torch.tensor([7, 1, 4])},
    ),
    "images": Case(
        "amortized_normal",
        lambda: zoo.make("conv_vae", x_shape=(1, 8, 8), z_dim=2, channels=(2,)),
        binary(6, 1, 8, 8),
        SMALL,
    ),
    "masked sets": Case(
        "amortized_normal",
        lambda: sets,
        lambda: (1 + torch.rand(6, 4), torch.rand(6, 4) < 0.7),
        SMALL,
    ),
    "refined sets": Case(
        "semi_amortized_normal",
        lambda: sets,
        lambda: (1 + torch.rand(6, 4), torch.rand(6, 4) < 0.7),
        SMALL,
    ),
    "flow": Case("spline_coupling", lambda: chain, rows(6, 2), FLOW),
    "amortized flow": Case("amortized_spline_coupling", lambda: chain, rows(6, 2), SMALL | FLOW),
    "amortized iaf": Case("amortized_iaf", lambda: chain, rows(6, 2), SMALL),
    "composite": Case(MIXED, lambda: two_levels, rows(6, 2)),
    "composite by site": Case(
        {"scale": "normal", "top": ("amortized_normal", SMALL), "l*": "normal"},
        lambda: two_levels,
        rows(6, 2),
    ),
    "own encoder": Case(
        "amortized_normal",
        vae(),
        binary(6, 4),
        {"encoder": nn.Linear(4, 4)},
        overrides=lambda: {"encoder": nn.Linear(4, 4)},
    ),
    "own inputs": Case(
        {"global": "normal", "data": ("amortized_normal", {**SMALL, "inputs": first_of})},
        lambda: two_levels,
        rows(6, 2),
        overrides=lambda: {"data": {"inputs": first_of}},
    ),
    "inputs by name": Case(
        "amortized_normal", lambda: chain, rows(6, 2), {"inputs": ["x"], **SMALL}
    ),
    **{
        scheme: Case(f"{scheme}_normal", lambda: chain, rows(6, 2))
        for scheme in ("iterative", "semi_amortized", "laplace", "bottom_up", "top_down")
    },
    "autoregressive": Case("autoregressive_normal", lambda: chain, rows(6, 2)),
}


def scrambled(guide: ProgramGuide) -> None:
    """No parameter stays where a fresh guide would have it."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))


def answers(
    guide: ProgramGuide, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """What a posterior says: parameters and draws under a seed."""
    found = {}
    pyro.set_rng_seed(6)
    if isinstance(guide, guides.Guide):
        found = {f"parameters {k}": v for k, v in guide.parameters_of(*args, **kwargs).items()}
    pyro.set_rng_seed(7)
    found |= {f"draw {k}": v for k, v in guide(*args, **kwargs).items()}
    return {key: value.detach().clone().contiguous() for key, value in found.items()}


def example(case: Case) -> tuple[Any, ProgramGuide, tuple[Any, ...]]:
    torch.manual_seed(3)
    model, args = case.model(), case.data()
    guide = guides.make(case.name, model, *args, model_kwargs=case.kwargs, **case.options)
    scrambled(guide)
    return model, guide, args


def other_process() -> None:
    """Load every file of the folder, then ask it about the calls that lie beside it."""
    folder = Path(sys.argv[1])
    for i, case in enumerate(CASES.values()):
        model = case.model()
        guide = guides.load(folder / f"{i}.safetensors", model, **case.overrides())
        with open(folder / f"{i}.call", "rb") as file:
            args, kwargs = pickle.load(file)
        save_file(answers(guide, args, kwargs), folder / f"{i}.answers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("saved")
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        for i, case in enumerate(CASES.values()):
            model, guide, args = example(case)
            module = model if isinstance(model, nn.Module) else None
            guides.save(guide, folder / f"{i}.safetensors", model=module)
            with open(folder / f"{i}.call", "wb") as file:
                pickle.dump((args, case.kwargs), file)
            save_file(answers(guide, args, case.kwargs), folder / f"{i}.expected")
    code = "import tests.test_saving; tests.test_saving.other_process()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_another_process_gets_the_same_posterior(folder: Path, name: str) -> None:
    i = list(CASES).index(name)
    expected, found = (load_file(folder / f"{i}.{suffix}") for suffix in ("expected", "answers"))
    assert found
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def description(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()[KEY])


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = description(path)
    change(content)
    save_file(load_file(path), path, {KEY: json.dumps(content)})


def test_what_stands_in_the_file(tmp_path: Path) -> None:
    """Versions, the name, the sites; of the data one row's shape, and nothing of its values."""
    x = torch.full((50, 2), 123.456)
    x[0] = 0.0
    guide = guides.make("amortized_normal", two_levels, x, hidden=(8,))
    path = tmp_path / "guide.safetensors"
    guides.save(guide, path)
    content = description(path)
    assert content["format"] == FORMAT
    assert content["versions"]["torch"] == importlib.metadata.version("torch")
    ((key, name, options),) = content["recipe"]["cells"]
    assert (key, name) == (None, "amortized_normal")
    assert build(options["hidden"]) == (8,)
    assert build(options["features"]) == {"x": "vector"}
    assert content["data_plate"] == "data"
    assert [site["site"] for site in content["latents"]] == ["scale", "top", "low"]
    assert content["recipe"]["args"] == {"tuple": [{"tensor": ["float32", [1, 2]]}]}
    assert {name.partition(".")[0] for name in load_file(path)} == {"guide"}
    assert stat.S_IMODE(os.stat(path).st_mode) & 0o400
    assert os.listdir(tmp_path) == ["guide.safetensors"]
    local = guides.make("normal", two_levels, x)
    guides.save(local, path)
    assert description(path)["recipe"]["args"] == {"tuple": [{"tensor": ["float32", [50, 2]]}]}


def test_the_file_is_no_pickle_and_loading_runs_nothing(tmp_path: Path) -> None:
    guide = guides.make("normal", two_levels, torch.randn(4, 2))
    guides.save(guide, tmp_path / "g")
    with pytest.raises(Exception, match=r"(?s)."):
        pickle.loads((tmp_path / "g").read_bytes())
    with pytest.raises(ValueError, match="Unknown description 'call'"):
        build({"call": "os.system"})


@pytest.mark.parametrize("name", guides.GUIDES)
def test_every_cell_of_the_grid_comes_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 2)
    guide = guides.make(name, chain, x)
    scrambled(guide)
    guides.save(guide, tmp_path / "g")
    loaded = guides.load(tmp_path / "g", chain)
    expected, found = answers(guide, (x,), {}), answers(loaded, (x,), {})
    assert found
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert repr(loaded) == repr(guide)
    # And once more from what was loaded.
    guides.save(loaded, tmp_path / "again")
    assert description(tmp_path / "again")["digest"] == description(tmp_path / "g")["digest"]


def test_trained_models_come_back_with_their_guides(tmp_path: Path) -> None:
    build_model = CASES["amortized"].model
    model = build_model()
    x = torch.bernoulli(torch.full((6, 4), 0.4))
    guide = guides.make("amortized_normal", model, x, hidden=(8,))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    guides.save(guide, tmp_path / "both", model=model)
    guides.save(guide, tmp_path / "guide")
    other = build_model()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    guides.load(tmp_path / "guide", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    loaded = guides.load(tmp_path / "both", other)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in other.state_dict().items())
    pyro.set_rng_seed(1)
    expected = SVI(model, guide, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(x)
    pyro.set_rng_seed(1)
    found = SVI(other, loaded, pyro.optim.Adam({}), Trace_ELBO()).evaluate_loss(x)
    assert found == expected
    # A loaded guide is a guide like any other: it goes on learning, by itself.
    svi = SVI(other, loaded, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    kept = answers(guide, (x,), {})
    svi.step(x)
    assert all(torch.equal(v, answers(guide, (x,), {})[k]) for k, v in kept.items())
    assert not torch.equal(loaded.parameters_of(x)["data"], guide.parameters_of(x)["data"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["normal", "amortized_normal", "amortized_spline_coupling"])
def test_other_dtypes_than_the_default(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    default = torch.float32 if dtype is torch.float64 else torch.float64
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        x = torch.randn(5, 2, dtype=dtype)
        guide = guides.make(name, chain, x)
        scrambled(guide)
        guides.save(guide, tmp_path / "g")
        loaded = guides.load(tmp_path / "g", chain)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        expected, found = answers(guide, (x,), {}), answers(loaded, (x,), {})
        assert all(torch.equal(found[key], value) for key, value in expected.items())
        assert found["draw low"].dtype is dtype
    finally:
        torch.set_default_dtype(before)


def test_converted_guides_and_frozen_parameters(tmp_path: Path) -> None:
    x = torch.randn(5, 2)
    guide = guides.make("amortized_normal", chain, x, hidden=(8,)).double()
    scrambled(guide)
    next(guide.parameters()).requires_grad_(False)
    guides.save(guide.eval(), tmp_path / "g")
    loaded = guides.load(tmp_path / "g", chain).eval()
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert torch.equal(loaded.parameters_of(x)["data"], guide.parameters_of(x)["data"])
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in guide.parameters()
    ]


def test_loading_leaves_the_random_state_and_validation_alone(tmp_path: Path) -> None:
    x = torch.randn(5, 2)
    guides.save(guides.make("amortized_normal", chain, x), tmp_path / "g")
    pyro.set_rng_seed(5)
    expected = torch.randn(3)
    pyro.set_rng_seed(5)
    loaded = guides.load(tmp_path / "g", chain)
    assert torch.equal(torch.randn(3), expected)
    with pytest.raises(ValueError, match="NaN"):
        loaded(x * torch.nan)


def test_tied_weights(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2)
            self.second = nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.out = nn.Linear(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.second(self.first(x)))

    x = torch.randn(5, 2)
    guide = guides.make("amortized_normal", chain, x, encoder=Tied())
    guides.save(guide, tmp_path / "g")
    loaded = guides.load(tmp_path / "g", chain, encoder=Tied())
    assert torch.equal(loaded.parameters_of(x)["data"], guide.parameters_of(x)["data"])


# --- Laplace posteriors ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "globals", "minibatch", "no plate"])
def test_laplace_posteriors(kind: str, tmp_path: Path) -> None:
    x, kwargs = torch.randn(5, 2), {}
    if kind == "minibatch":
        kwargs = {"size": 9, "index": torch.tensor([7, 1, 4, 0, 5])}
    program = chain if kind == "rows" else with_mean
    plate = None if kind == "no plate" else "auto"
    sites = guides.layout.layout(program, (x,), kwargs).sites
    values = {name: torch.zeros(site.shape) for name, site in sites.items()}
    guide = laplace(program, values, (x,), kwargs, data_plate=plate)
    guides.save(guide, tmp_path / "g")
    loaded = guides.load(tmp_path / "g", program)
    expected, found = answers(guide, (x,), kwargs), answers(loaded, (x,), kwargs)
    assert set(found) == {f"draw {name}" for name in sites}
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert repr(loaded) == repr(guide)
    if kind == "minibatch":
        part = {"size": 9, "index": torch.tensor([4, 1])}
        a, b = answers(guide, (x[:2],), part), answers(loaded, (x[:2],), part)
        assert all(torch.equal(b[key], value) for key, value in a.items())
        with pytest.raises(ValueError, match=r"does not cover rows \[2\]"):
            loaded(x[:1], size=9, index=torch.tensor([2]))


def with_mean(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(2)).to_event(1), obs=x)


# --- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    guide = guides.make("amortized_normal", chain, torch.randn(5, 2), hidden=(8,))
    guides.save(guide, tmp_path / "guide.safetensors")
    return tmp_path / "guide.safetensors"


def test_a_newer_format_is_refused(saved: Path) -> None:
    rewrite(saved, lambda content: content.update(format=FORMAT + 1))
    with pytest.raises(ValueError, match=f"format {FORMAT + 1}.*reads up to {FORMAT}.*Upgrade"):
        guides.load(saved, chain)


@pytest.mark.parametrize("program", [two_levels, zoo.VAE(x_dim=2, z_dim=2)])
def test_another_program_is_refused(saved: Path, program: Any) -> None:
    message = (
        r"guide for another program: its latents are top \(Normal, 2 coordinates, data\), low"
    )
    with pytest.raises(ValueError, match=message):
        guides.load(saved, program)


def test_a_model_of_other_sizes_is_refused(tmp_path: Path) -> None:
    model, guide = guides.pair(zoo.VAE(x_dim=4, z_dim=2, hidden=(3,)), torch.zeros(2, 4))
    guides.save(guide, tmp_path / "g", model=model)
    shapes = r"has shape \(4, 3\) in the file and \(4, 5\)"
    with pytest.raises(ValueError, match=rf"The model in .* does not fit.*{shapes}"):
        guides.load(tmp_path / "g", zoo.VAE(x_dim=4, z_dim=2, hidden=(5,)))
    with pytest.raises(ValueError, match=r"parameters of the model, but .* function"):
        guides.load(tmp_path / "g", chain)


def damage(saved: Path, kind: str) -> None:
    content = saved.read_bytes()
    if kind == "truncated":
        saved.write_bytes(content[:-10])
    elif kind == "empty":
        saved.write_bytes(b"")
    elif kind == "a flipped bit":
        saved.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif kind == "text":
        saved.write_text("name: guide")
    elif kind == "no description":
        save_file(load_file(saved), saved)
    else:
        save_file(load_file(saved), saved, {KEY: "{broken"})


DAMAGES = {
    "truncated": "damaged, or no safetensors file",
    "empty": "damaged, or no safetensors file",
    "text": "damaged, or no safetensors file",
    "a flipped bit": r"tensors in .* are damaged \(digest\)",
    "no description": "not written by guides.save",
    "broken description": "description in .* is damaged",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_files_are_refused(saved: Path, kind: str) -> None:
    damage(saved, kind)
    with pytest.raises(ValueError, match=DAMAGES[kind]):
        guides.load(saved, chain)


def test_a_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="There is no file 'nothing'"):
        guides.load("nothing", chain)


def test_guides_that_cannot_be_saved(tmp_path: Path) -> None:
    from pyro.infer.autoguide import AutoNormal

    from guides.families.normal import Normal

    guide = guides.Guide(chain, torch.randn(5, 2), family=Normal)
    for other in (guide, AutoNormal(chain)):
        with pytest.raises(ValueError, match="does not know how it was built"):
            guides.save(other, tmp_path / "g")
    with pytest.raises(TypeError, match=r"model= must be an nn\.Module.*function"):
        guides.save(guides.make("normal", chain, torch.randn(5, 2)), tmp_path / "g", model=chain)
    assert not os.listdir(tmp_path)


def test_options_that_the_file_cannot_hold_are_asked_for(tmp_path: Path) -> None:
    x = torch.randn(5, 2)
    options = {"encoder": nn.Linear(1, 8), "inputs": first_of}
    guides.save(guides.make("amortized_normal", chain, x, **options), tmp_path / "g")
    with pytest.raises(
        ValueError,
        match=r"encoder= \(a torch.*Linear\), inputs= \(a .*first_of\)\. Pass them again",
    ):
        guides.load(tmp_path / "g", chain)
    with pytest.raises(ValueError, match=r"options .*: inputs="):
        guides.load(tmp_path / "g", chain, encoder=nn.Linear(1, 8))
    with pytest.raises(ValueError, match=r"encoder must map|does not fit"):
        guides.load(tmp_path / "g", chain, encoder=nn.Linear(1, 7), inputs=first_of)
    assert guides.load(tmp_path / "g", chain, **options)(x)["low"].shape == (5, 2)
    with pytest.raises(TypeError, match="no option 'depth'"):
        guides.load(tmp_path / "g", chain, depth=3, **options)


def test_programs_whose_structure_depends_on_values_need_an_example_call(tmp_path: Path) -> None:
    group, x = torch.arange(6) % 3, torch.randn(6)
    guide = guides.make("normal", grouped, group, x)
    scrambled(guide)
    guides.save(guide, tmp_path / "g")
    with pytest.raises(ValueError, match=r"level \(Normal, 3 .* level \(Normal, 1 .*pass an exam"):
        guides.load(tmp_path / "g", grouped)
    loaded = guides.load(tmp_path / "g", grouped, group, x)
    assert torch.equal(loaded.parameters_of(group, x)["global"], guide.schemes["global"].table)


class Batch:
    """Data in a class of its own."""

    def __init__(self, x: Tensor) -> None:
        self.x = x


def of_a_batch(batch: Batch) -> None:
    chain(batch.x)


def test_arguments_that_cannot_be_described(tmp_path: Path) -> None:
    batch = Batch(torch.randn(5, 2))
    guide = guides.make("amortized_normal", of_a_batch, batch)
    guides.save(guide, tmp_path / "g")
    with pytest.raises(ValueError, match=r"args\[0\] \(a .*Batch\)\. Pass an example call"):
        guides.load(tmp_path / "g", of_a_batch)
    loaded = guides.load(tmp_path / "g", of_a_batch, Batch(torch.randn(2, 2)))
    expected, found = answers(guide, (batch,), {}), answers(loaded, (batch,), {})
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_descriptions_of_nested_calls() -> None:
    value = (
        torch.randn(2, 3, dtype=torch.float64),
        {"a": [1, 2.5, None, "b"], 3: (True, torch.ones(2, dtype=torch.bool))},
        torch.arange(4),
        torch.float16,
        torch.device("cpu"),
        torch.Size([2]),
    )
    found = build(json.loads(json.dumps(describe(value))))
    assert torch.equal(found[0], torch.zeros(2, 3, dtype=torch.float64))
    assert found[0].dtype is torch.float64
    assert found[1]["a"] == [1, 2.5, None, "b"]
    assert found[1][3][0] is True
    assert found[1][3][1].tolist() == [True, True]
    assert found[2].tolist() == [0] * 4
    assert found[2].dtype is torch.int64
    assert found[3:] == (torch.float16, torch.device("cpu"), (2,))


def test_a_failed_save_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        guides.save(guides.make("normal", chain, torch.randn(5, 2)), saved)
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
