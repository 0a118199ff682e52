"""One contract for every model of the zoo, and the registry that builds them."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule

import zoo
from tests.model_cases import MODEL_CASES, ModelCase, simulate
from zoo.likelihood import make_likelihood
from zoo.model import Model, latent_names

ROOT = Path(__file__).resolve().parents[1]
BUILDS: dict[str, tuple[ModelCase, Callable[[], Any]]] = {
    name if variant is None else f"{name}: {variant}": (case, build)
    for name, case in MODEL_CASES.items()
    for variant, build in {None: case.build, **case.variants}.items()
}


@pytest.fixture(params=BUILDS)
def case(request) -> ModelCase:
    return BUILDS[request.param][0]


with_latents = pytest.mark.parametrize(
    "case", [name for name, (case, _) in BUILDS.items() if case.latents], indirect=True
)


@pytest.fixture
def model(request, case) -> Any:
    return BUILDS[request.node.callspec.params["case"]][1]()


def prior_trace(model, *args, **kwargs):
    """A trace whose latents come from the prior."""
    with torch.no_grad():
        return poutine.trace(model).get_trace(*args, **kwargs)


def latents_of(trace) -> dict[str, torch.Tensor]:
    sites = {name: trace.nodes[name] for name in trace.stochastic_nodes}
    return {n: site["value"] for n, site in sites.items() if "_Subsample" not in repr(site["fn"])}


def log_joint(model, latents, plate, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Log densities summed to rows and outside the plate, with all scales, from a Pyro trace."""
    trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    rows, other = 0.0, torch.zeros(())
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or name == plate or site["infer"].get("_deterministic"):
            continue
        if any(frame.name == plate for frame in site["cond_indep_stack"]):
            rows = rows + site["log_prob"]
        else:
            other = other + site["log_prob"].sum()
    return rows, other


def select(latents, trace, plate, rows) -> dict[str, torch.Tensor]:
    """Latents of some rows; those outside the plate stay."""
    in_plate = {
        name
        for name in latents
        if any(frame.name == plate for frame in trace.nodes[name]["cond_indep_stack"])
    }
    return {name: v[rows] if name in in_plate else v for name, v in latents.items()}


def test_every_model_has_a_case() -> None:
    missing = set(zoo.MODELS) - set(MODEL_CASES)
    lines = "\n".join(
        f'    "{name}": ModelCase(build=lambda: zoo.make("{name}", ...), args=simulate),'
        for name in sorted(missing)
    )
    assert not missing, f"Add to MODEL_CASES in tests/model_cases.py:\n{lines}"
    assert set(MODEL_CASES) == set(zoo.MODELS), "MODEL_CASES names models that do not exist"


# --- the contract ---------------------------------------------------------------------------


def test_signature_and_attributes(model, case) -> None:
    assert isinstance(model, Model)
    assert type(model).__mro__[1] is Model, "no model inherits from another"
    parameters = inspect.signature(model.forward).parameters
    assert parameters["size"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["index"].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(parameters[name].default is None for name in parameters)
    assert list(model.data_args) == [name for name in parameters if name not in ("size", "index")]


@pytest.mark.usefixtures("float64")
def test_prior_draw_feeds_back_finite(model, case) -> None:
    trace = prior_trace(model, size=8)
    x = trace.nodes["_RETURN"]["value"]
    assert x.dtype is torch.float64
    rows, other = log_joint(model, latents_of(trace), case.plate, x)
    assert rows.shape == (8,)
    assert torch.isfinite(rows).all()
    assert torch.isfinite(other)


def test_simulates_a_minibatch(model, case) -> None:
    index = torch.tensor([5, 2, 3])
    trace = prior_trace(model, size=8, index=index)
    assert len(trace.nodes["_RETURN"]["value"]) == 3
    assert trace.nodes[case.plate]["value"].equal(index)


@pytest.mark.usefixtures("float64")
def test_log_joint_of_a_batch_is_the_sum_over_its_rows(model, case) -> None:
    """Catches leaks between rows, a missing to_event, global terms counted once a row."""
    args = case.args(model)
    trace = prior_trace(model, *args)
    latents = latents_of(trace)
    rows, other = log_joint(model, latents, case.plate, *args)
    singles = []
    for i in range(len(args[0])):
        row = slice(i, i + 1)
        part = select(latents, trace, case.plate, row)
        single, single_other = log_joint(model, part, case.plate, *(arg[row] for arg in args))
        torch.testing.assert_close(single_other, other, rtol=0, atol=1e-12)
        singles.append(single)
    torch.testing.assert_close(torch.cat(singles), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_permuting_rows_permutes_their_terms(model, case) -> None:
    args = case.args(model)
    trace = prior_trace(model, *args)
    latents = latents_of(trace)
    rows, other = log_joint(model, latents, case.plate, *args)
    order = torch.randperm(len(rows))
    permuted = select(latents, trace, case.plate, order)
    shuffled, same = log_joint(model, permuted, case.plate, *(arg[order] for arg in args))
    torch.testing.assert_close(shuffled, rows[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_minibatch_is_scaled_by_n_over_b(model, case) -> None:
    args = case.args(model)
    trace = prior_trace(model, *args)
    latents = latents_of(trace)
    rows, other = log_joint(model, latents, case.plate, *args)
    index = torch.tensor([4, 0, 3])
    part = select(latents, trace, case.plate, index)
    batch = tuple(arg[index] for arg in args)
    scaled, same = log_joint(model, part, case.plate, *batch, size=7, index=index)
    torch.testing.assert_close(scaled, rows[index] * 7 / 3, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(same, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_particles_to_the_left(model, case) -> None:
    """Vectorized particles: each is the log joint of its own latents."""
    args = case.args(model)

    def particles(*args):
        with pyro.plate("particles", 3, dim=-2):
            return model(*args)

    trace = prior_trace(particles, *args)
    latents = latents_of(trace)
    rows, other = log_joint(particles, latents, case.plate, *args)
    assert rows.shape == (3, len(args[0]))
    others = 0.0
    for i in range(3):
        own = {name: value[i] for name, value in latents.items()}
        # the particle plate leaves a dimension of size 1 on the latents outside the data plate
        own = {n: v.squeeze() if n in ("mu", "tau") else v for n, v in own.items()}
        expected, own_other = log_joint(model, own, case.plate, *args)
        others = others + own_other
        torch.testing.assert_close(rows[i], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(other, others, rtol=1e-12, atol=1e-12)


@with_latents
@pytest.mark.usefixtures("float64")
def test_under_vmap_and_hessian(model, case) -> None:
    args = case.args(model)
    draws = [latents_of(prior_trace(model, *args)) for _ in range(3)]
    stacked = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}

    def total(latents):
        rows, other = log_joint(model, latents, case.plate, *args)
        return rows.sum() + other

    expected = torch.stack([total(draw) for draw in draws]).detach()
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.func.vmap(total)(stacked).detach(), expected)
        name = next(iter(draws[0]))
        curvature = torch.func.jacrev(torch.func.grad(lambda v: total({**draws[0], name: v})))
        size = draws[0][name].numel()
        hessian = curvature(draws[0][name]).reshape(size, size)
    assert torch.isfinite(hessian).all()
    torch.testing.assert_close(hessian, hessian.mT)


def test_every_parameter_gets_a_gradient(model, case) -> None:
    args = case.args(model)
    rows, other = log_joint(model, latents_of(prior_trace(model, *args)), case.plate, *args)
    inputs = list(model.parameters())
    if inputs:  # eight_schools has none
        (rows.sum() + other).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert all(torch.isfinite(p.grad).all() for p in inputs)


def test_trainable_parameters_are_registered_with_pyro(model, case) -> None:
    trace = poutine.trace(model, param_only=True).get_trace(size=8)
    values = {site["value"].unconstrained() for site in trace.nodes.values()}
    assert values == set(model.parameters())


def test_state_dict_round_trip_into_a_fresh_model(request, model, case) -> None:
    args = case.args(model)
    latents = latents_of(prior_trace(model, *args))
    fresh = BUILDS[request.node.callspec.params["case"]][1]()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    expected, _ = log_joint(model, latents, case.plate, *args)
    assert log_joint(fresh, latents, case.plate, *args)[0].equal(expected)


def perturb(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called"])
def test_a_copy_shares_nothing_and_the_original_works(model, case, copied, called) -> None:
    args = case.args(model) if called else None
    twin = copied(model)
    args = case.args(model) if args is None else args
    latents = latents_of(prior_trace(model, *args))
    expected, _ = log_joint(model, latents, case.plate, *args)
    assert log_joint(twin, latents, case.plate, *args)[0].equal(expected)
    perturb(twin)
    assert log_joint(model, latents, case.plate, *args)[0].equal(expected)
    assert not {p.data_ptr() for p in twin.parameters()} & {
        p.data_ptr() for p in model.parameters()
    }
    assert log_joint(twin, latents, case.plate, *args)[0].requires_grad == bool(
        list(twin.parameters())
    )
    assert twin._pyro_name != model._pyro_name


@with_latents
def test_two_models_trained_in_one_scope_do_not_share_parameters(request, case) -> None:
    build = BUILDS[request.node.callspec.params["case"]][1]
    first, second = build(), build()
    args = case.args(first)
    before = copy.deepcopy(second.state_dict())
    for trained in (first, second):
        guide = AutoNormal(poutine.block(trained, expose_types=["sample"]))
        guide._pyro_name = f"guide_of_{trained._pyro_name}"
        svi = SVI(trained, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        started = {name: value.detach().clone() for name, value in trained.named_parameters()}
        svi.step(*args)
        moved = dict(trained.named_parameters())
        assert all((moved[name] != value).any() for name, value in started.items())
        if trained is first:
            assert all(second.state_dict()[n].equal(value) for n, value in before.items())
    stored = {value.unconstrained() for value in pyro.get_param_store().values()}
    assert {*first.parameters(), *second.parameters()} <= stored


@pytest.mark.usefixtures("float64")
def test_float64_by_default_dtype(model, case) -> None:
    assert {p.dtype for p in model.parameters()} <= {torch.float64}
    assert model(*case.args(model)).dtype is torch.float64


def test_float64_by_conversion(model, case) -> None:
    model.double()
    args = case.args(model)
    assert all(arg.dtype is torch.float64 for arg in args)
    trace = prior_trace(model, *args)
    assert {v.dtype for v in latents_of(trace).values()} == (
        {torch.float64} if case.latents else set()
    )
    rows, _ = log_joint(model, latents_of(trace), case.plate, *args)
    assert rows.dtype is torch.float64


def test_batch_of_one(model, case) -> None:
    args = tuple(arg[:1] for arg in case.args(model))
    rows, _ = log_joint(model, latents_of(prior_trace(model, *args)), case.plate, *args)
    assert rows.shape == (1,)
    assert torch.isfinite(rows).all()


def test_frozen_parameters_stay_frozen_without_a_warning(model, case) -> None:
    """Pyro itself warns of a frozen submodule, and switches frozen direct parameters on."""
    model.requires_grad_(False)
    assert model.training
    args = case.args(model)
    latents = latents_of(prior_trace(model, *args))
    rows, other = log_joint(model, latents, case.plate, *args)
    assert not any(p.requires_grad for p in model.parameters())
    assert not rows.requires_grad
    assert not other.requires_grad
    assert not list(pyro.get_param_store())


def test_a_part_may_be_frozen() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    model.network.requires_grad_(False)
    trace = poutine.trace(model, param_only=True).get_trace(size=3)
    values = {site["value"].unconstrained() for site in trace.nodes.values()}
    assert values == set(model.likelihood.parameters())


def test_a_part_may_be_replaced_between_calls() -> None:
    """Pyro would go on training the part that is gone."""
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,))
    (x,) = simulate(model)
    model.likelihood = make_likelihood("bernoulli", 3, 4)
    before = model.likelihood.output.bias.detach().clone()
    guide = AutoNormal(poutine.block(model, expose_types=["sample"]))
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(x)
    assert (model.likelihood.output.bias != before).any()


def test_direct_parameters_may_be_frozen() -> None:
    class Shift(Model):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = torch.nn.Parameter(torch.zeros(()), requires_grad=False)
            self.free = torch.nn.Parameter(torch.zeros(()))

        def forward(self):
            return pyro.sample("x", dist.Normal(self.frozen + self.free, 1.0))

    model = Shift()
    trace = poutine.trace(model, param_only=True).get_trace()
    assert not model.frozen.requires_grad
    assert [site["value"].unconstrained() for site in trace.nodes.values()] == [model.free]


def test_inside_another_module(model, case) -> None:
    class Outer(PyroModule):
        def __init__(self, inner) -> None:
            super().__init__("outer")
            self.inner = inner

        def forward(self, *args):
            return self.inner(*args)

    args = case.args(model)
    outer = Outer(copy.deepcopy(model))
    trace = poutine.trace(outer, param_only=True).get_trace(*args)
    assert all(name.startswith("outer.inner") for name in trace.nodes)
    assert len(trace.nodes) == len(list(model.parameters()))
    twin = copy.deepcopy(outer)
    names = poutine.trace(twin, param_only=True).get_trace(*args).nodes
    assert len(names) == len(trace.nodes)
    assert not set(names) & set(trace.nodes)


def test_with_module_local_params(model, case) -> None:
    """The mode in which Pyro keeps parameters in modules and not in its store."""
    with pyro.settings.context(module_local_params=True):
        twin = copy.deepcopy(model)
        args = case.args(twin)
        rows, _ = log_joint(twin, latents_of(prior_trace(twin, *args)), case.plate, *args)
    assert torch.isfinite(rows).all()
    assert rows.requires_grad == bool(list(twin.parameters()))
    assert not list(pyro.get_param_store())


# --- the package ----------------------------------------------------------------------------


def test_names_of_levels() -> None:
    assert latent_names(1) == ("z",)
    assert latent_names(2) == ("z2", "z1")


def test_classes_are_attributes_of_the_package() -> None:
    for name, path in zoo.MODELS.items():
        attribute = path.partition(":")[2]
        assert isinstance(MODEL_CASES[name].build(), getattr(zoo, attribute))
        assert attribute in dir(zoo)
        assert attribute in zoo.__all__
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'GAN'"):
        _ = zoo.GAN


def test_unknown_names_and_options() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown model 'gan'\. Available models: linear_gaussian"
    ):
        zoo.make("gan")
    with pytest.raises(TypeError, match=r"Model 'vae': .* unexpected .* 'depth'. Its options: \("):
        zoo.make("vae", x_dim=4, z_dim=2, depth=3)
    with pytest.raises(TypeError, match=r"Model 'vae': missing .* 'z_dim'"):
        zoo.make("vae", x_dim=4)


def test_importing_the_package_loads_no_torch() -> None:
    heavy = "{'torch', 'pyro', 'numpy', 'sklearn', 'pooch', 'arviz', 'matplotlib'}"
    code = (
        "import sys, zoo, zoo.data; assert 'vae' in zoo.MODELS; "
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
