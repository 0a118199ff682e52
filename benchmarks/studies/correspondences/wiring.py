"""Wiring: error units that inhibit each other, gradients of one level, and two inputs apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import pyro
import pyro.optim as optimizers
import pyro.poutine as poutine
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
import zoo.data
from guides import location_scale
from guides.inference import SVI, PredictiveCoding
from guides.schemes.iterative import Iterative
from zoo.hierarchical_vae import Conditional
from zoo.linear_gaussian import LinearLevel

__all__ = ["INPUTS", "MOVED", "error_units", "level_gradients", "network", "separate_inputs"]

Result = tuple[dict[str, Any], dict[str, Tensor]]

INPUTS = ("z2", "z1", "x")
"""The inputs of an encoder of errors, named after the sites whose errors they are."""

MOVED = {
    "a pixel": ("x",),
    "precision of the pixels": ("x",),
    "estimate of z1": ("z1", "x"),
    "precision of z1": ("z1",),
    "estimate of z2": ("z2", "z1"),
    "precision of z2": ("z2",),
}
"""What is moved, and which errors it should move: an estimate those of its level and below."""


def network(
    weight: Tensor, inhibition: Tensor, x: Tensor, steps: Sequence[int], *, rate: float
) -> list[tuple[Tensor, Tensor]]:
    """Errors e and estimates z of z ~ N(0, I), x ~ N(W z, S) as units of their own.

        e <- e + rate (x - W z - S e)          from below, from above, from each other
        z <- z + rate (W' e - z)               from below, from themselves

    No unit inverts a matrix. At rest e = S^-1 (x - W z), and z is the posterior mean. All steps
    are one linear map of units and data, of which powers are taken.

    Args:
        weight: W ``(D, K)``, the projections down; those up are its transpose.
        inhibition: S ``(D, D)``, by which error units inhibit each other and themselves.
        x: Data ``(B, D)``.
        steps: After how many steps to look; all units start at 0.
        rate: Size of a step, in time constants of a unit.

    Returns:
        Errors ``(B, D)`` and estimates ``(B, K)`` after each of these numbers of steps.

    Example:
        >>> one = torch.ones(1, 1).double()
        >>> ((e, z),) = network(one, one, one, [500], rate=0.1)
        >>> round(e.item(), 4), round(z.item(), 4)
        (0.5, 0.5)
    """
    dim, z_dim = weight.shape
    eye = torch.eye(dim + z_dim).to(x)
    up = torch.cat([-weight.mT, eye[dim:, dim:]], 1)
    wires = torch.cat([torch.cat([inhibition, weight], 1), up])
    moved = torch.cat([eye - rate * wires, rate * eye], 1)
    step = torch.cat([moved, torch.cat([torch.zeros_like(eye), eye], 1)])  # the data stay
    found = []
    for number in steps:
        reach = torch.linalg.matrix_power(step, number)[: dim + z_dim, dim + z_dim :]
        state = x @ reach[:, :dim].mT
        found.append((state[:, :dim], state[:, dim:]))
    return found


def error_units(
    side: int = 8,
    z_dim: int = 8,
    num_rows: int = 20_000,
    rate: float = 0.01,
) -> Result:
    """A network of estimates and error units beside predictive coding on natural patches.

    The model's projections are the leading principal components of the patches, and S is what
    these leave of the covariance, so that the model has the covariance of the patches. A fifth of
    a standard deviation of noise is added, without which the slowest units would take for ever.
    """
    data = zoo.data.load(
        "natural_patches", patch=side, num_train=num_rows, num_test=100, center=False
    )
    loc, scale = data.train.mean(), data.train.std()
    train, x = (((part - loc) / scale).double() for part in (data.train, data.test))
    train, x = (part + 0.2 * torch.randn_like(part) for part in (train, x))
    model = _patches_model(train, z_dim)
    level = cast(LinearLevel, model.levels[1])
    assert level.weight is not None
    weight, tril = level.weight.detach(), level.scale_tril.detach()
    covariance = tril @ tril.mT
    steps = sorted({round(10 ** (k / 40)) for k in range(201)})
    path = network(weight, covariance, x, steps, rate=rate)
    found, weighted = path[-1][1], path[-1][0]
    # Each error unit inhibits itself alone.
    other = network(weight, covariance.diagonal().diag(), x, steps[-1:], rate=rate)[0][1]
    # The package's own: its loop, its errors, and the gradient that its loop descends.
    optim = optimizers.PyroOptim(torch.optim.SGD, {"lr": 0.0})
    loop = PredictiveCoding(model, optim, num_steps=200, solver="conjugate_gradient")
    relaxed = loop.infer(x)["z"].detach()
    errors = location_scale.error(level(relaxed), x)[0].detach()
    exact = model.posterior(x).mean.detach()
    z = torch.randn_like(exact).requires_grad_()
    (update,) = torch.autograd.grad(-len(x) * _energy(model, x, z), z)
    wired = location_scale.error(level(z), x)[0] @ weight - z
    # One pixel brighter than predicted, all estimates held: what every error unit does.
    middle = (side // 2) * side + side // 2
    poke = torch.eye(side * side, dtype=x.dtype)[middle : middle + 1]
    poked = network(weight[:, :0], covariance, poke, steps[-1:], rate=rate)[0][0][0]
    around = [middle - side, middle + side, middle - 1, middle + 1]
    precision = torch.linalg.inv(covariance)
    numbers = {
        "estimates_from_predictive_coding": _relative(found, relaxed),
        "errors_from_predictive_coding": _relative(weighted, errors),
        "predictive_coding_from_posterior_mean": _relative(relaxed, exact),
        "update_from_projections_up": _relative(wired, update),
        "inhibition_from_precision": _relative(poked, precision[middle]),
        "neighbors_over_own": float(precision[middle, around].sum() / precision[middle, middle]),
        "estimates_without_inhibition": float((other - relaxed).norm() / relaxed.norm()),
        "energy_above_least": float(_energy(model, x, other) - _energy(model, x, relaxed)),
    }
    pictures = {
        "time": rate * torch.tensor(steps),
        "errors": torch.stack([e.square().mean().sqrt() for e, _ in path]),
        "estimates": torch.stack([z.square().mean().sqrt() for _, z in path]),
        "errors at rest": errors.square().mean().sqrt(),
        "estimates at rest": relaxed.square().mean().sqrt(),
        "poked": poked,
        "precision": precision[middle],
        "relaxed": relaxed,
        "found": found,
        "cut": other,
        "patch": x,
        "prediction": relaxed @ weight.mT,
        "error": x - relaxed @ weight.mT,
        "weighted error": weighted,
    }
    return numbers, pictures


@torch.no_grad()
def _patches_model(rows: Tensor, z_dim: int) -> zoo.LinearGaussian:
    """A factor model with the covariance of these rows."""
    dim = rows.shape[1]
    model = zoo.LinearGaussian((z_dim, dim), ("unit", "full"), bias=False).to(rows)
    level = cast(LinearLevel, model.levels[1])
    assert level.weight is not None
    assert level.log_scale is not None
    assert level.lower is not None
    values, vectors = torch.linalg.eigh(rows.mT @ rows / len(rows))
    share = (values[-z_dim:] - values[-z_dim - 1]).sqrt()
    weight = (vectors[:, -z_dim:] * share).flip(-1)
    left = (vectors * values) @ vectors.mT - weight @ weight.mT
    tril = torch.linalg.cholesky(left)
    level.weight.copy_(weight)
    level.log_scale.copy_(tril.diagonal().log())
    level.lower.copy_(tril[tuple(torch.tril_indices(dim, dim, -1))])
    model.requires_grad_(False)
    return model


def _energy(model: zoo.LinearGaussian, x: Tensor, z: Tensor) -> Tensor:
    """-log p(x, z), nats a row."""
    trace = poutine.trace(poutine.condition(model, data={"z": z})).get_trace(x)
    return -torch.as_tensor(trace.log_prob_sum()) / len(x)


def _relative(found: Tensor, exact: Tensor) -> float:
    """Largest difference over largest value."""
    found, exact = found.detach(), exact.detach()
    return float((found - exact).abs().max() / exact.abs().max())


def level_gradients(
    num_steps: int = 300, z_dims: tuple[int, int, int] = (12, 8, 4), num_rows: int = 100
) -> Result:
    """Gradients of a hierarchy on digits: of the whole bound, and of every level by itself.

    As a control the same samples are made of noise by the levels above, as a non-centered
    hierarchy makes them: errors then pass from level to level through the samples.
    """
    data = zoo.data.load("digits")
    train, x = data.train.double(), data.test[:num_rows].double()
    model = zoo.HierarchicalVAE(64, z_dims, hidden=(32,), data_mean=train.mean(0)).double()
    guide = _learned(model, train, num_steps)
    model.zero_grad()
    pyro.set_rng_seed(1)
    Trace_ELBO().loss_and_grads(model, guide, x)
    pyro.set_rng_seed(1)
    drawn = poutine.trace(guide).get_trace(x)
    names = ("z3", "z2", "z1", "x")
    values = {name: cast(Tensor, drawn.nodes[name]["value"]).detach() for name in names[:-1]}
    values["x"] = x
    numbers: dict[str, Any] = {}
    pictures: dict[str, Tensor] = {}
    passed = values["z3"]  # as made of noise
    for above, name, (module, density) in zip(names[:-1], names[1:], _levels(model), strict=True):
        own = list(module.parameters())
        term = density(values[above]).log_prob(values[name]).sum()
        alone = _flat(torch.autograd.grad(term, own))
        whole = _flat([cast(Tensor, parameter.grad) for parameter in own])
        numbers[f"num_weights_{name}"] = len(whole)
        numbers[f"difference_{name}"] = _relative(alone, -whole)
        pictures[f"alone, {name}"], pictures[f"whole, {name}"] = alone, -whole
        fn = density(passed)
        if name != "x":
            noise = location_scale.inverse(density(values[above]), values[name]).detach()
            passed = location_scale.shift(fn, noise)
    below = density(passed).log_prob(x).sum()
    for name, (module, _) in zip(names[1:], _levels(model), strict=True):
        through = _flat(torch.autograd.grad(below, list(module.parameters()), retain_graph=True))
        pair = torch.stack([through, pictures[f"whole, {name}"]])
        numbers[f"correlation_through_samples_{name}"] = float(torch.corrcoef(pair)[0, 1])
        pictures[f"through, {name}"] = through
    return numbers, pictures


def _learned(model: zoo.HierarchicalVAE, train: Tensor, num_steps: int) -> Any:
    """The guide of a direct encoder with which the model was learned, in place."""
    guide = guides.make("amortized_normal", model, train, hidden=(64,))
    svi = SVI(model, guide, optimizers.PyroOptim(torch.optim.Adam, {"lr": 3e-3}), Trace_ELBO())
    for _ in range(num_steps):
        rows = torch.randint(len(train), (100,))
        svi.step(train[rows], size=len(train), index=rows)
    return guide


Level = tuple[nn.Module, Callable[[Tensor], Any]]


def _levels(model: zoo.HierarchicalVAE) -> list[Level]:
    """The modules of every level, and its density given the level above, from the top."""
    found: list[Level] = [(level, cast(Conditional, level)) for level in model.levels]
    last = nn.ModuleList([model.network, model.likelihood])
    return [*found, (last, lambda z: model.likelihood(model.network(z)))]


def _flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def separate_inputs(num_steps: int = 300, num_rows: int = 100) -> Result:
    """Which inputs of an iterative encoder move, when one thing of a two-level model is moved.

    The encoder of both levels reads errors alone. Those of z1 are from the own level for z1 and
    from below for z2, those of x from below for z1. The model is learned first, with a direct
    encoder; weights of the iterative one do not decide what it reads.
    """
    data = zoo.data.load("digits", binarize="none")
    train, x = data.train.double(), data.test[:num_rows].double()
    model = zoo.HierarchicalVAE(
        64, (8, 4), hidden=(32,), likelihood="gaussian", data_mean=train.mean(0)
    ).double()
    _learned(model, train, num_steps)
    guide = guides.make(
        "iterative_normal",
        model,
        train,
        encodings=("errors",),
        update="highway",
        num_iterations=1,
        network=(64,),
    )
    scheme = cast(Iterative, guide.schemes["data"])
    seen: list[Tensor] = []
    scheme.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    widths = dict(zip(INPUTS, (4, 8, 64), strict=True))

    @torch.no_grad()
    def inputs(rows: Tensor) -> dict[str, Tensor]:
        seen.clear()
        pyro.set_rng_seed(0)
        guide(rows)
        (found,) = seen
        return dict(zip(INPUTS, found.split(tuple(widths.values()), -1), strict=True))

    pixel = x.clone()
    pixel[:, 27] += 0.5
    # Locations of q come first in its parameters, z2 before z1; an offset moves where it starts.
    # At the prior's mean latents would have no errors, whatever their precision.
    with torch.no_grad():
        scheme.offset[:12] += torch.randn(12, dtype=x.dtype)
    places = {
        "estimate of z1": (scheme.offset, slice(4, 12)),
        "estimate of z2": (scheme.offset, slice(0, 4)),
        "precision of z1": (cast(Conditional, model.levels[0]).raw_scale.bias, ...),
        "precision of z2": (model.prior_scale, ...),
        "precision of the pixels": (cast(Tensor, model.likelihood.raw_scale), ...),
    }
    before = inputs(x)
    changes = []
    for name in MOVED:
        if name == "a pixel":
            after = inputs(pixel)
        else:
            value, where = places[name]
            kept = value.detach().clone()
            with torch.no_grad():
                value[where] = value[where] + 0.5
                after = inputs(x)
                value.copy_(kept)
        changes.append([float((after[i] - before[i]).norm() / before[i].norm()) for i in INPUTS])
    stated = torch.tensor([[name in moves for name in INPUTS] for moves in MOVED.values()])
    moved = torch.tensor(changes)
    numbers: dict[str, Any] = {
        "least_where_it_should": float(moved[stated].min()),
        "most_elsewhere": float(moved[~stated].max()),
    }
    for name, change in zip(MOVED, changes, strict=True):
        numbers[f"moved_{name.replace(' ', '_')}"] = change
    return numbers, {"changes": moved}
