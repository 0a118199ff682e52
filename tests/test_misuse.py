"""What a new user gets wrong: one error that says the requirement, the offender and the fix."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from benchmarks import Budget, compare
from guides.arguments import check_annotated, check_number, did_you_mean
from guides.diagnostics import elbo, log_evidence, pareto_khat, to_arviz
from guides.inference import SVI, PredictiveCoding
from guides.objectives import IWELBO, STL, ForwardKL, RefinementELBO
from guides.pairs import same_program
from guides.schemes.iterative import Iterative

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
SMOKE = Budget().scaled("smoke")


def good(x: Tensor, flag: bool = False, num_features: int = 3) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(loc, torch.ones(num_features)).to_event(1), obs=x)


def wide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, True), torch.ones(3)).to_event(1), obs=x)


class Linear(nn.Module):
    """The program `good` with a weight, so that copies of it part."""

    def __init__(self, name: str = "linear") -> None:
        super().__init__()
        self.name = name
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> None:
        pyro.module(self.name, self)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, True) * self.weight, 1.0).to_event(1), obs=x)


def adam() -> pyro.optim.PyroOptim:
    return pyro.optim.Adam({"lr": 0.01})


def make(name: Any, *args: Any, **options: Any) -> Any:
    return guides.make(name, *(args or (good, X)), **options)


MAKE: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "swapped": (lambda: make(good, "normal"), TypeError, r"order is guides.make\(name, model"),
    "no model": (lambda: make("normal", X), TypeError, "model is a Pyro program.*got tensor"),
    "a class": (lambda: make("normal", zoo.VAE, X), TypeError, "the class VAE.*Build it first"),
    "numpy": (
        lambda: make("normal", good, X.numpy()),
        TypeError,
        r"Observed site 'x' holds a ndarray.*torch.as_tensor\(value\)",
    ),
    "int for widths": (
        lambda: make("amortized_normal", hidden=32),
        TypeError,
        r"hidden of guide 'amortized_normal' must be a sequence of integers, got 32.*\(32,\)",
    ),
    "int for widths, not used": (
        lambda: make("iterative_normal", hidden=32),
        TypeError,
        "hidden of guide 'iterative_normal' must be a sequence",
    ),
    "network": (lambda: make("iterative_normal", network=8), TypeError, "network .*sequence"),
    "text for a number": (
        lambda: make("iterative_normal", num_iterations="3"),
        TypeError,
        "num_iterations of guide 'iterative_normal' must be an integer, got '3'",
    ),
    "half an iteration": (
        lambda: make("semi_amortized_normal", num_iterations=2.5),
        TypeError,
        r"num_iterations .* must be an integer, got 2.5 \(float\)",
    ),
    "truth for a number": (
        lambda: make("semi_amortized_normal", eval_iterations=True),
        TypeError,
        "eval_iterations .* must be an integer or None, got True",
    ),
    "by hand": (
        lambda: guides.Guide(
            good,
            X,
            family=guides.families.normal.Normal,
            scheme=functools.partial(Iterative, num_iterations=2.5),
        ),
        TypeError,
        "num_iterations must be an integer, got 2.5",
    ),
    "option of a family": (
        lambda: make("planar", transforms="2"),
        TypeError,
        "transforms of guide 'planar' must be an integer",
    ),
    "option of the guide": (lambda: make("delta", jacobian="no"), TypeError, "True or False"),
    "data_args": (
        lambda: make("semi_amortized_normal", data_args="x"),
        TypeError,
        "data_args must map names of arguments",
    ),
    "argument of the model": (
        lambda: make("normal", flag=True),
        TypeError,
        r"no option 'flag'. 'flag' is an argument of the model: pass model_kwargs=\{'flag': ...\}",
    ),
    "argument of the model, composite": (
        lambda: make({"data": "normal"}, flag=True),
        TypeError,
        r"no option 'flag'.*pass model_kwargs=\{'flag'",
    ),
    "option misspelt": (
        lambda: make("amortized_normal", hiden=(3,)),
        TypeError,
        "no option 'hiden'. Did you mean 'hidden'",
    ),
    "plate misspelt": (
        lambda: make("normal", data_plate="date"),
        ValueError,
        "no vectorized plate named 'date'. Did you mean 'data'",
    ),
    "input misspelt": (
        lambda: make("amortized_normal", inputs=("flagg", "x")),
        ValueError,
        "does not have: flagg",
    ),
    "features misspelt": (
        lambda: make("amortized_normal", features="vektor"),
        ValueError,
        "Did you mean 'vector'",
    ),
    "a cell that is no pair": (
        lambda: make({"data": ("normal",)}),
        TypeError,
        "Cell 'data' must be the name of a guide, or a pair",
    ),
    "no cells": (lambda: make({}), ValueError, "needs a cell .* mapping is empty"),
    "a cell misspelt": (
        lambda: make({"dat": "normal"}),
        ValueError,
        "Cell 'dat' covers no latent.*Did you mean 'data'",
    ),
    "a latent twice": (
        lambda: make({"data": "normal", "z": "delta"}),
        ValueError,
        "'data' and 'z' both cover latent site 'z'.*exactly one cell: leave out 'data'",
    ),
    "one site only": (
        lambda: make("autoregressive_normal"),
        ValueError,
        "The scheme Autoregressive represents .* one only: z",
    ),
    "model misspelt": (lambda: zoo.make("vea"), ValueError, "'vea'. Did you mean 'vae'"),
    "data misspelt": (
        lambda: zoo.data.load("mnits"),
        ValueError,
        "'mnits'. Did you mean 'mnist'",
    ),
    "module misspelt": (
        lambda: guides.diagnostic,
        AttributeError,
        "no attribute 'diagnostic'. Did you mean 'diagnostics'",
    ),
}


@pytest.mark.parametrize("case", MAKE)
def test_building_a_guide(case: str) -> None:
    run, kind, message = MAKE[case]
    with pytest.raises(kind, match=f"(?s){message}"):
        run()


ENCODERS: dict[str, tuple[Any, type[Exception], str]] = {
    "input": (
        nn.Linear(4, 4),
        ValueError,
        r"must map \(B, 3\) to \(B, 4\).*inputs of shape \(6, 3\)",
    ),
    "output": (nn.Linear(3, 3), ValueError, r"must map \(B, 3\) to \(B, 4\).*Got \(6, 3\)"),
    "dtype": (nn.Linear(3, 4).double(), ValueError, "as torch.float32"),
    "image": (nn.Conv2d(1, 2, 3), ValueError, "nn.Unflatten"),
    "two outputs": (nn.LSTM(3, 4), TypeError, "Got a tuple in place of a tensor"),
    "a class": (nn.Linear, TypeError, "must be a torch.nn.Module.*got the class Linear"),
    "a function": (lambda x: x, TypeError, "must be a torch.nn.Module.*got a function"),
}


@pytest.mark.parametrize("case", ENCODERS)
@pytest.mark.parametrize("name", ["amortized_normal", "semi_amortized_normal"])
def test_an_encoder_of_ones_own(case: str, name: str) -> None:
    encoder, kind, message = ENCODERS[case]
    with pytest.raises(kind, match=message):
        make(name, encoder=encoder)


SCORES = [elbo, log_evidence, pareto_khat, to_arviz]


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.__name__)
def test_scores_of_a_pair_in_the_wrong_order(score: Callable[..., Any]) -> None:
    guide = make("normal")
    for first in (guide, pyro.infer.autoguide.AutoNormal(good)):
        with pytest.raises(TypeError, match=r"model is a program, not a guide; got a .*Swap"):
            score(first, good, X)
    with pytest.raises(TypeError, match=r"guide is something to call; got 'normal'.*guides.make"):
        score(good, "normal", X)
    with pytest.raises(TypeError, match=r"guide is something to call; got a Tensor"):
        score(good, X)
    with pytest.raises(TypeError, match=r"num_samples must be an integer, got 30.5"):
        score(good, guide, X, num_samples=30.5)


SVIS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "class": (lambda g: SVI(good, g, adam(), STL), r"the class STL: pass an instance, STL\(\)"),
    "stock class": (lambda g: SVI(good, g, adam(), Trace_ELBO), r"pass an instance, Trace_ELBO\("),
    "torch's optimizer": (
        lambda g: SVI(good, g, torch.optim.Adam(g.parameters()), STL()),
        r"needs a PyroOptim as optim, got Adam.*pyro.optim.Adam",
    ),
    "optim and loss": (lambda g: SVI(good, g, STL(), adam()), "a PyroOptim as optim, got STL"),
    "model and guide": (lambda g: SVI(g, good, adam(), STL()), "not a guide; got a Guide first"),
    "a name": (lambda g: SVI(good, "normal", adam(), STL()), "got 'normal'. Build one"),
    "objective": (lambda g: STL().loss(g, good, X), "not a guide; got a Guide first"),
    "weighted": (lambda g: IWELBO(2).loss(g, good, X), "not a guide; got a Guide first"),
    "wake": (lambda g: RefinementELBO(ForwardKL()), "ForwardKL is none. Pass ForwardKL itself"),
    "twice": (lambda g: RefinementELBO(RefinementELBO()), "Pass the objective inside it"),
    "class inside": (lambda g: RefinementELBO(STL), r"the class STL: pass an instance, STL\(\)"),
    "predictive coding": (lambda g: PredictiveCoding(g, adam()), "got Guide first"),
    "optim first": (lambda g: PredictiveCoding(adam(), good), "order is PredictiveCoding"),
}


@pytest.mark.parametrize("case", SVIS)
def test_loops_and_objectives(case: str) -> None:
    run, message = SVIS[case]
    with pytest.raises(TypeError, match=message):
        run(make("normal"))


def image(x: Tensor, family: Any = None, channel: bool = True) -> None:
    """Images of shape (1, 8, 8), or (8, 8)."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        loc = z.sum(-1)[:, None, None].expand(-1, 8, 8)
        loc = loc.unsqueeze(1) if channel else loc
        fn = dist.Normal(loc, 1.0) if family is None else family(logits=loc)
        pyro.sample("x", fn.to_event(3 if channel else 2), obs=x)


def entries(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


IMAGES = torch.randint(0, 2, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
PIXELS = IMAGES.float()
EXPANDED: dict[str, tuple[Any, Tensor]] = {
    "an axis too many": (good, X[:, None]),
    "rows by rows": (good, X.expand(6, 6, 3)),
    "leading axis": (good, X[None]),
    "scalars": (entries, X[:, :1]),
    "channel": (functools.partial(image, channel=False), PIXELS),
    "two channels": (image, PIXELS[:, None]),
    "no channel": (image, PIXELS[:, 0]),
}


@pytest.mark.parametrize("case", EXPANDED)
@pytest.mark.parametrize("name", ["normal", "amortized_normal"])
def test_data_that_would_be_broadcast_against_other_rows(case: str, name: str) -> None:
    model, x = EXPANDED[case]
    message = rf"'x' must have the shape of its distribution.*got \({', '.join(map(str, x.shape))}"
    with pytest.raises(ValueError, match=message):
        make(name, model, x)
    with pytest.raises(ValueError, match=message):
        PredictiveCoding(model, adam()).step(x)


def test_data_that_a_program_broadcasts_rightly_pass() -> None:
    def event(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)

    def shared(x: Tensor) -> None:
        with pyro.plate("data", 6):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def outside(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(loc, torch.ones(3)).to_event(1), obs=x)

    for model, x in ((event, X), (shared, X[0, 0]), (shared, X[:1, 0]), (outside, X[0])):
        guide = guides.make("normal", model, x)
        trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(x)))
        assert torch.isfinite(trace.get_trace(x).log_prob_sum())


REFINED = ["amortized_normal", "iterative_normal", "semi_amortized_normal", "laplace_normal"]


@pytest.mark.parametrize("name", REFINED)
def test_bytes_are_read_as_the_numbers_they_are(name: str) -> None:
    """The same guide, bound by bound, whether pixels come as bytes or as floats."""
    options = {"encodings": ("errors", "data")} if name.startswith("iterative") else {}
    found = []
    for x in (IMAGES.to(torch.uint8), IMAGES, PIXELS):
        torch.manual_seed(0)
        guide = guides.make(name, image, x, **options)
        torch.manual_seed(1)
        found.append(elbo(image, guide, x, num_samples=3).rows)
    for rows in found[:-1]:
        torch.testing.assert_close(rows, found[-1])


@pytest.mark.parametrize("name", ["normal", *REFINED])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64])
def test_a_density_that_takes_no_integers_says_so(name: str, dtype: torch.dtype) -> None:
    model = functools.partial(image, family=dist.Bernoulli)
    message = rf"'x' holds values of {dtype}, and Bernoulli scores floating.*pass x.to\("
    with pytest.raises(TypeError, match=message):
        guides.make(name, model, IMAGES.to(dtype))


def test_files(tmp_path: Path) -> None:
    guide = make("amortized_normal", hidden=(4,))
    path = tmp_path / "guide.safetensors"
    guides.save(guide, path)
    for call in (lambda: guides.load(good, path), lambda: guides.load(path, "normal")):
        with pytest.raises(TypeError, match=r"order is guides.load\(path, model, \*args\)"):
            call()
    with pytest.raises(TypeError, match=r"order is guides.save\(guide, path\)"):
        guides.save(path, guide)
    missing = tmp_path / "no" / "such" / "guide.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"folder .* does not exist.*mkdir\(parents=True\)"
    ):
        guides.save(guide, missing)
    assert not missing.parent.exists()
    with pytest.raises(IsADirectoryError, match=r"is a folder. Name a file in it"):
        guides.save(guide, tmp_path)
    with pytest.raises(FileNotFoundError, match="It is a folder"):
        guides.load(tmp_path, good)


def test_a_program_of_other_shapes_names_the_site_and_both_shapes(tmp_path: Path) -> None:
    path = tmp_path / "guide"
    guides.save(make("amortized_normal", hidden=(4,)), path)
    with pytest.raises(ValueError, match=r"site 'z' has 2 coordinates .* file and 4 of group"):
        guides.load(path, wide)
    shapes = r"'shift' of the scheme of group 'data' \(latents 'z'\) has shape \(3,\) in the file "
    with pytest.raises(ValueError, match=shapes + r"and \(5,\) here"):
        guides.load(path, good, torch.randn(6, 5), model_kwargs={"num_features": 5})
    with pytest.raises(ValueError, match=r"shape \(1, 3\).*distribution's \(1, 5\)") as caught:
        guides.load(path, functools.partial(good, num_features=5))
    assert any("tensor(1, 3)" in note for note in caught.value.__notes__)
    with pytest.raises(TypeError, match=r"no option 'hiden'. Did you mean 'hidden'"):
        guides.load(path, good, hiden=(4,))


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    model = zoo.make("vae", x_dim=3, z_dim=2, hidden=(4,))
    guides.save(make("amortized_normal", model, (X > 0).float()), tmp_path / "g", model=model)
    other = zoo.make("vae", x_dim=5, z_dim=2, hidden=(4,))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"The model in .*\(3, 4\) in the file and \(5, 4\) here"):
        guides.load(tmp_path / "g", other)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_settings_and_mode_are_saved(tmp_path: Path) -> None:
    cells = {"semi": "semi_amortized_normal", "iterative": ("iterative_normal", {"network": (4,)})}

    def two(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("semi", dist.Normal(0.0, 1.0))
            second = pyro.sample("iterative", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    for name, model, x in (("semi_amortized_normal", good, X), (cells, two, X[:, 0])):
        guide = guides.make(name, model, x)
        group = next(iter(guide.schemes))
        scheme = guide.schemes[group]
        scheme.eval_iterations, scheme.tolerance, scheme.num_particles = 20, 0.25, 3
        scheme.shared_noise, scheme.num_iterations = True, 2
        guide.eval()
        guide.families[group].train()
        path = tmp_path / "guide"
        guides.save(guide, path)
        loaded = guides.load(path, model)
        assert loaded.schemes[group].settings == scheme.settings
        assert loaded.schemes[group].iterations == 20
        modes = {part: module.training for part, module in loaded.named_modules()}
        assert modes == {part: module.training for part, module in guide.named_modules()}
        torch.manual_seed(2)
        rows = elbo(model, guide, x, num_samples=2).rows
        torch.manual_seed(2)
        torch.testing.assert_close(elbo(model, loaded, x, num_samples=2).rows, rows)
        changed = {"eval_iterations": 5}
        again = guides.load(path, model, **({"semi": changed} if name is cells else changed))
        settings = again.schemes[group].settings
        assert (settings["eval_iterations"], settings["tolerance"]) == (5, 0.25)


def test_misspelt_settings_are_refused() -> None:
    guide = make("semi_amortized_normal")
    scheme = guide.schemes["data"]
    with pytest.raises(AttributeError, match=r"'eval_iteration'.*Did you mean 'eval_iterations'"):
        scheme.eval_iteration = 20
    with pytest.raises(AttributeError, match=r"guide.schemes\['data'\].eval_iterations = 20"):
        guide.eval_iterations = 20
    for name, value, kind in (
        ("eval_iterations", "20", TypeError),
        ("eval_iterations", -1, ValueError),
        ("num_iterations", 0, ValueError),
        ("num_particles", 1.5, TypeError),
        ("tolerance", -0.1, ValueError),
    ):
        with pytest.raises(kind, match=f"{name} must be"):
            setattr(scheme, name, value)
    scheme.eval_iterations = 20
    scheme.eval_iterations = None
    scheme.note = ["lists", "and", "modules", "are", "the user's own"]
    copied = copy.deepcopy(guide)
    with pytest.raises(AttributeError, match="Did you mean 'tolerance'"):
        copied.schemes["data"].tolerence = 0.1


def test_names_of_groups_are_unique() -> None:
    def clash(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("a.b", dist.Normal(0.0, 1.0))
            second = pyro.sample("a_b", dist.Normal(first, 1.0))
            pyro.sample("x", dist.Normal(second, 1.0), obs=x)

    guide = guides.make("autoregressive_normal", clash, X[:, 0])
    assert [tuple(s.name for s in group.sites) for group in guide.layout(X[:, 0]).groups] == [
        ("a.b",),
        ("a_b",),
    ]
    assert set(guide(X[:, 0])) == {"a.b", "a_b"}


FOLLOWING = ["semi_amortized_normal", "iterative_normal"]


@pytest.mark.parametrize("name", FOLLOWING)
def test_a_refined_guide_of_another_program_warns(name: str) -> None:
    model = Linear()
    guide = guides.make(name, model, X)
    twin = Linear("twin")
    with pytest.warns(UserWarning, match="finds q by the program that it was built for"):
        SVI(twin, guide, adam(), RefinementELBO()).step(X)
    # Equal programs score alike, wherever they live.
    with torch.no_grad():
        twin.weight.copy_(model.weight)
    elbo(twin, guide, X, num_samples=2)
    with torch.no_grad():
        twin.weight.mul_(2.0)
    with pytest.warns(UserWarning, match=r"copy.deepcopy\(\(model, guide\)\)"):
        elbo(twin, guide, X, num_samples=2)
    with pytest.warns(UserWarning, match="finds q by the program"):
        STL().loss(twin, guide, X)


def wrapper(model: Callable[..., Any]) -> Callable[..., Any]:
    def scaled(x: Tensor) -> None:
        with poutine.scale(scale=0.5):
            model(x)

    return scaled


@pytest.mark.parametrize("name", [*FOLLOWING, "amortized_normal"])
def test_copies_together_and_wrapped_programs_are_silent(name: str) -> None:
    model = Linear()
    guide = guides.make(name, model, X)
    both = copy.deepcopy((model, guide))
    condition = poutine.condition(model, {})
    programs = [wrapper(model), functools.partial(model), model.forward, condition]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for program, q in (both, (model, guide), *((program, guide) for program in programs)):
            with pyro.get_param_store().scope():
                SVI(program, q, adam(), RefinementELBO()).step(X)
            elbo(program, q, X, num_samples=2)
    assert same_program(nn.Sequential(model), model)
    assert not same_program(Linear(), model)
    assert not same_program(wide, good)


COMPARE: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "guide": ({"guides": ["nromal"]}, ValueError, "'nromal' is not a guide.*mean 'normal'"),
    "argument": ({"guide": ["normal"]}, TypeError, "no argument 'guide'. Did you mean 'guides'"),
    "loop": ({"loops": ["predictive-coding"]}, ValueError, "Did you mean 'predictive_coding'"),
    "regime": ({"regimes": ["frozn"]}, ValueError, "Did you mean 'frozen'"),
    "baseline": ({"baseline": "nromal"}, ValueError, "none of its methods. Did you mean 'normal'"),
    "options": (
        {"guide_options": {"amortised_normal": {}}},
        ValueError,
        "Did you mean 'amortized_normal'",
    ),
    "cell": ({"guides": [{"data": ("normal",)}]}, TypeError, "a pair of a name and its options"),
    "cell's guide": ({"guides": {"data": "nromal"}}, ValueError, "'nromal' is not a guide"),
}


@pytest.mark.parametrize("case", COMPARE)
def test_compare(case: str) -> None:
    options, kind, message = COMPARE[case]
    call: dict[str, Any] = {"guides": ["normal"], "progress": False, "budget": SMOKE}
    with pytest.raises(kind, match=message):
        compare(good, (X,), **{**call, **options})


def test_compare_takes_composite_guides() -> None:
    def model(x: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    cells = {"global": "multivariate_normal", "data": ("amortized_normal", {"hidden": (4,)})}
    x = X[:, 0]
    result = compare(model, x, guides=["normal", cells], budget=SMOKE, progress=False)
    assert [run["status"] for run in result.runs] == ["ok", "ok"]
    name = "global: multivariate_normal + data: amortized_normal(hidden=(4,))"
    assert result.runs[1]["method"] == name
    assert result.runs[1]["family"] == "composite"


def test_the_refusal_of_an_autoguide_names_the_remedy() -> None:
    auto = pyro.infer.autoguide.AutoNormal
    call: dict[str, Any] = {"guides": [auto], "progress": False, "budget": SMOKE}
    (run,) = compare(entries, torch.zeros(9), autoguide_limit=8, **call).runs
    message = run["refusal"]["message"]
    assert re.search("at most 8 latents; this one has 9", message)
    assert "pass autoguide_limit=None to compare or Task" in message
    assert "fewer rows" in message


def test_checks_of_arguments() -> None:
    assert did_you_mean("hiden", ["hidden"]) == "Did you mean 'hidden'? "
    assert did_you_mean("rows", ["hidden"]) == ""
    for value, annotation in ((2, "float"), (None, "int | None"), ([1, 2], "Sequence[int]")):
        check_annotated("option", value, annotation)
    check_annotated("option", object(), "Callable[..., Tensor] | None")
    for value, annotation in ((True, "int"), (torch.ones(()), "float"), ("12", "Sequence[int]")):
        with pytest.raises(TypeError, match="option must be"):
            check_annotated("option", value, annotation)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        check_number("count", 0, integer=True, least=1)
