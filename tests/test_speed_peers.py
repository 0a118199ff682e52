"""The peers of the speed comparison: their protocol, and losses that are Pyro's, digit by digit.

Only torch's peer runs here; the others need environments of their own.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.poutine as poutine
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

import guides
import zoo
from benchmarks.speed.peers import environments, floor, problems, programs, torch_peer
from benchmarks.speed.peers.client import Peer, PeerError
from benchmarks.speed.peers.protocol import Server, num_threads
from guides.inference import PredictiveCoding

Tensors = dict[str, Tensor]


def made_arrays(task: str, **options: Any) -> tuple[problems.Arrays, Tensors]:
    made = problems.arrays(task, 3, dtype="float64", **options)
    return made, {name: torch.from_numpy(np.array(value)) for name, value in made.items()}


def peer_program(task: str, folder: Path, made: problems.Arrays, **options: Any) -> Any:
    problems.save(folder / "arrays.npz", made)
    return torch_peer.build(task, 0, {"arrays": str(folder / "arrays.npz"), **options})


def model_of(task: str, given: Tensors) -> tuple[Any, tuple[Tensor, ...], dict[str, slice]]:
    if task == "radon":
        places = {
            "mu_alpha": slice(0, 1),
            "sigma_alpha": slice(1, 2),
            "sigma_y": slice(2, 3),
            "beta": slice(3, 5),
            "alpha_raw": slice(5, 90),
        }
        return programs.radon, tuple(given[k] for k in ("floor", "uranium", "county", "y")), places
    places = {"mu": slice(0, 1), "tau": slice(1, 2), "theta_trans": slice(2, 10)}
    return zoo.make("eight_schools").double(), (given["y"], given["sigma"]), places


def at(guide: Any, draws: Tensors) -> Any:
    """A guide whose sites of these names take these values."""
    trace = poutine.Trace()
    for name, value in draws.items():
        site = {"type": "sample", "value": value, "is_observed": False}
        trace.add_node(name, name=name, infer={"is_auxiliary": True}, **site)
    return poutine.replay(guide, trace=trace)


@pytest.mark.parametrize("task", ["eight_schools", "radon"])
@pytest.mark.usefixtures("float64")
def test_mean_field_losses_are_those_of_pyros_autonormal(task: str, tmp_path: Path) -> None:
    made, given = made_arrays(task)
    model, args, places = model_of(task, given)
    guide = AutoNormal(model)
    guide(*args)
    draws = {}
    u = given["loc"] + given["scale"] * given["noise"]
    for name, place in places.items():
        shape = getattr(guide.locs, name).shape
        setattr(guide.locs, name, given["loc"][place].reshape(shape))
        setattr(guide.scales, name, given["scale"][place].reshape(shape))
        draws[f"{name}_unconstrained"] = u[place].reshape(shape)
    expected = Trace_ELBO().loss(model, at(guide, draws), *args)
    assert peer_program(task, tmp_path, made).check() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("task", ["eight_schools", "radon"])
@pytest.mark.usefixtures("float64")
def test_full_covariance_losses_are_those_of_pyros_autoguide(task: str, tmp_path: Path) -> None:
    made, given = made_arrays(task, guide="multivariate_normal")
    model, args, _ = model_of(task, given)
    guide = AutoMultivariateNormal(model)
    guide(*args)
    tril = given["scale_tril"]
    guide.loc.data.copy_(given["loc"])
    guide.scale = tril.diagonal().clone()
    guide.scale_tril = tril / tril.diagonal()[:, None]
    u = given["loc"] + tril @ given["noise"]
    expected = Trace_ELBO().loss(model, at(guide, {f"_{guide._pyro_name}_latent": u}), *args)
    assert peer_program(task, tmp_path, made).check() == pytest.approx(expected, rel=1e-12)


def decoder(given: Tensors) -> zoo.HierarchicalVAE:
    model = zoo.make("hierarchical_vae", x_dim=784, z_dims=(32, 16), hidden=(256,)).double()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in given.items() if k.startswith("model.")}
    )
    return model


@pytest.mark.usefixtures("float64")
def test_vae_losses_are_those_of_the_zoo_and_its_guide(tmp_path: Path) -> None:
    made, given = made_arrays("vae", batch=6)
    model, x = decoder(given), given["x"]
    guide = guides.make("amortized_normal", model, x, hidden=(256,))
    state = {k: v for k, v in given.items() if k.startswith("guide.")}
    guide.load_state_dict(
        {f"schemes.data.{k.removeprefix('guide.')}": v for k, v in state.items()}
    )
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    expected = trace.log_prob_sum() - replayed.log_prob_sum()
    hidden = (x - given["guide.shift"]) / given["guide.scale"]
    hidden = F.silu(
        F.linear(hidden, given["guide.network.0.weight"], given["guide.network.0.bias"])
    )
    lam = F.linear(hidden, given["guide.network.2.weight"], given["guide.network.2.bias"])
    loc, raw = (lam + given["guide.init"]).split(48, -1)
    u = torch.cat([trace.nodes["z2"]["value"], trace.nodes["z1"]["value"]], -1)
    made["noise"] = ((u - loc) / (F.softplus(raw) + 1e-8)).detach().numpy()
    loss = peer_program("vae", tmp_path, made).check()
    assert loss == pytest.approx(expected.item(), rel=1e-10)


@pytest.mark.usefixtures("float64")
def test_predictive_coding_makes_the_steps_of_the_guides_package(tmp_path: Path) -> None:
    made, given = made_arrays("pc", batch=6)
    coding = PredictiveCoding(
        decoder(given), pyro.optim.Adam({"lr": 0.001}), num_steps=20, step_size=0.02
    )
    program = peer_program("pc", tmp_path, made)
    assert program.check() == pytest.approx(coding.evaluate_loss(given["x"]), rel=1e-12)
    for _ in range(3):
        assert program.advance(1) == pytest.approx(coding.step(given["x"]), rel=1e-9)


@pytest.mark.parametrize("task", problems.TASKS)
def test_every_task_learns(task: str) -> None:
    small = {} if task in ("eight_schools", "radon") else {"batch": 8}
    program = torch_peer.build(task, 0, small)
    first = program.check()
    assert program.check() == first, "a check changes nothing"
    assert program.advance(25) < first


def test_a_server_answers_line_by_line() -> None:
    request = {"task": "eight_schools", "num_steps": 2, "seed": 1, "options": {"guide": "normal"}}
    lines = [json.dumps(request), "", json.dumps(request), '{"task": "none"}', "not json"]
    lines += [json.dumps({**request, "options": {"speed": 1}}), json.dumps({"num_steps": 1})]
    answers = io.StringIO()
    Server(torch_peer.build, ("torch",), 1).loop(io.StringIO("\n".join(lines)), answers)
    first, second, *failed = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert first["seconds"] > 0
    assert first["compile_seconds"] > 0
    assert second["compile_seconds"] == 0.0
    assert first["loss"] == second["loss"]
    assert first["last_loss"] != second["last_loss"], "steps go on from the last ones"
    assert first["versions"]["torch"] == torch.__version__
    assert [set(answer) for answer in failed] == [{"error"}] * 4
    assert "Unknown task 'none'" in failed[0]["error"]
    assert "Unknown option 'speed'" in failed[2]["error"]


def test_a_peer_is_a_process_that_is_told_its_threads() -> None:
    with Peer("torch", threads=1) as peer:
        answer = peer.ask("floor", num_steps=1, of="fabricpc_mnist")
        assert answer["threads"] == 1
        assert answer["seconds"] > 0
        with pytest.raises(PeerError, match="Unknown task 'none'"):
            peer.ask("none")
        assert peer.ask("eight_schools")["loss"] == pytest.approx(
            torch_peer.build("eight_schools", 0, {}).check(), rel=1e-6
        )
    with pytest.raises(PeerError, match="not running"):
        peer.ask("eight_schools")
    with pytest.raises(ValueError, match="Unknown peer 'stan'"):
        Peer("stan")


def test_a_peer_that_ends_says_its_last_words() -> None:
    # This interpreter has no NumPyro.
    with (
        Peer("numpyro", threads=1) as peer,
        pytest.raises(PeerError, match=r"ended at task .* No module named"),
    ):
        peer.ask("eight_schools")


def test_threads_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    with pytest.raises(ValueError, match="OMP_NUM_THREADS must be a positive number"):
        num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert num_threads() >= 1


def test_radon_is_read_as_posteriordb_has_it(tmp_path: Path) -> None:
    file = tmp_path / "radon_mn.json"
    found = {"N": 2, "J": 2, "floor_measure": [1, 0], "county_idx": [1, 2]}
    file.write_text(json.dumps({**found, "log_uppm": [0.5, 1.5], "log_radon": [2.0, 3.0]}))
    data = problems.radon_data(np.random.default_rng(0), file)
    assert {name: value.tolist() for name, value in data.items()} == {
        "floor": [1.0, 0.0],
        "uranium": [0.5, 1.5],
        "county": [0, 1],
        "y": [2.0, 3.0],
    }
    made = problems.radon_data(np.random.default_rng(0))
    assert len(made["y"]) == 919
    assert set(made["county"]) == set(range(85))


def test_the_floor_counts_the_products_of_a_step() -> None:
    layer = floor.Layer(3, 5, forward=2, inputs=0, weights=1)
    assert floor.flops(4, [layer]) == 3 * 2 * 4 * 3 * 5
    products = floor.Products(4, [layer])
    products(1)
    assert [(tuple(product().shape), count) for product, count in products.products] == [
        ((4, 5), 2),
        ((5, 3), 1),
    ]
    left, right = torch.randn(4, 3), torch.randn(5, 3).t()
    torch.testing.assert_close(floor._fastest(left, right)(), left @ right)
    before = torch.get_num_threads()
    assert floor.floor(4, [layer], num_steps=2, repeats=2, threads=1) > 0
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="at least 1"):
        floor.floor(4, [layer], num_steps=0)


def test_an_environment_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    code = 0

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        python = environments.interpreter("pcx", tmp_path)
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        failed = code if "pip" in command else 0
        return subprocess.CompletedProcess(command, failed, "", "ERROR: No network\n")

    monkeypatch.setattr(subprocess, "run", run)
    code = 1
    with pytest.raises(RuntimeError, match=r"pip could not install pcx==0\.6\.3 .* No network\."):
        environments.build("pcx", tmp_path)
    assert environments.main(["--to", str(tmp_path), "--peers", "pcx"]) == 1
    code, calls[:] = 0, []
    assert environments.build("pcx", tmp_path) == environments.interpreter("pcx", tmp_path)
    assert "jax==0.4.38" in calls[1]
    assert calls[0][:3] == [sys.executable, "-m", "venv"]
    environments.build("pcx", tmp_path)
    assert len(calls) == 2, "what is there is left as it is"
    assert environments.interpreter("jax", tmp_path) == environments.interpreter(
        "numpyro", tmp_path
    )
    with pytest.raises(ValueError, match="No environment is known for peer 'stan'"):
        environments.interpreter("stan", tmp_path)
