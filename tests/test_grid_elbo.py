"""The ELBO of every cell of the grid against a value computed by hand, to 1e-10.

The program has a simplex, a Cholesky factor, a positive and a bounded site; global latents, one of
them in a plate of its own; local latents, one of them in a nested plate. The draws of the guide
are taken from its auxiliary sites; the rest is torch: bijections, Jacobians by autodiff, densities
from torch.distributions, and the plate's N/B written out.
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.distributions as td
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor

import guides
from guides.families import FAMILIES

# Every family that scores points; the schemes whose parameters do not depend on noise.
DENSITIES = [
    *(name for name in FAMILIES if name not in ("delta", "auxiliary")),
    *("amortized_normal", "amortized_multivariate_normal", "amortized_spline_coupling"),
    "laplace_normal",
]

N, GROUPS, TESTS = 7, 2, 4


pytestmark = pytest.mark.usefixtures("float64")


def program(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """x: (TESTS, B). Written for extra particle dimensions on the left."""
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("groups", GROUPS, dim=-1):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.5))
    with pyro.plate("data", size or x.shape[-1], subsample=index, dim=-1):
        pull = rate.sum(-1, keepdim=True) + factor[..., 2, 1][..., None].reshape_as(
            rate.sum(-1, keepdim=True)
        )
        theta = pyro.sample("theta", dist.Normal(pull, 0.8))
        mix = pyro.sample("mix", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("tests", TESTS, dim=-2):
            skill = pyro.sample("skill", dist.Beta(2.0, 3.0))
            loc = theta * skill + weights[..., 0][..., None].reshape_as(pull) * mix[..., 1]
            pyro.sample("x", dist.Normal(loc, 0.6), obs=x)


def by_hand(z: dict[str, Tensor], x: Tensor, scale: float) -> Tensor:
    """Log p(x, z) of one draw, rows times N/B."""
    total = td.Dirichlet(torch.tensor([2.0, 1.0, 3.0])).log_prob(z["weights"])
    total = total + td.LKJCholesky(3, 2.0).log_prob(z["factor"])
    total = total + td.Gamma(2.0, 1.5).log_prob(z["rate"]).sum()
    rows = torch.zeros(())
    for n in range(x.shape[1]):
        rows = rows + td.Normal(z["rate"].sum() + z["factor"][2, 1], 0.8).log_prob(z["theta"][n])
        rows = rows + td.Dirichlet(torch.ones(2)).log_prob(z["mix"][n])
        for t in range(TESTS):
            rows = rows + td.Beta(2.0, 3.0).log_prob(z["skill"][t, n])
            loc = z["theta"][n] * z["skill"][t, n] + z["weights"][0] * z["mix"][n, 1]
            rows = rows + td.Normal(loc, 0.6).log_prob(x[t, n])
    return total + scale * rows


SUPPORTS = {
    "weights": (td.constraints.simplex, 2, True),
    "factor": (td.constraints.corr_cholesky, 3, True),
    "rate": (td.constraints.positive, GROUPS, True),
    "theta": (td.constraints.real, 1, False),
    "mix": (td.constraints.simplex, 1, False),
    "skill": (td.constraints.unit_interval, TESTS, False),
}


def to_support(name: str, u: Tensor) -> tuple[Tensor, Tensor]:
    """One site of one row: the value and log |dz/du|, the Jacobian taken by autodiff."""
    support = SUPPORTS[name][0]
    transform = td.biject_to(support)
    value = transform(u)

    def free(v: Tensor) -> Tensor:
        out = transform(v)
        if support is td.constraints.simplex:
            return out[:-1]  # the volume of a simplex is that of its first K - 1 coordinates
        if support is td.constraints.corr_cholesky:
            return out[torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])]
        return out

    jacobian = torch.autograd.functional.jacobian(free, u)
    return value, torch.linalg.slogdet(jacobian.reshape(u.numel(), u.numel()))[1]


def elbo_by_hand(
    guide: guides.Guide, aux: dict[str, Tensor], x: Tensor, index: Tensor, scale: float
) -> Tensor:
    """Log p - log q of one draw of the auxiliary variables."""
    kwargs = {"size": N, "index": index}
    lam = {g: v.detach() for g, v in guide.parameters_of(x, **kwargs).items()}
    log_q = guide.families["global"].log_prob(lam["global"], aux["global"])
    rows_q = sum(
        guide.families["data"].log_prob(lam["data"][n], aux["data"][n]) for n in range(x.shape[1])
    )
    z: dict[str, Tensor] = {}
    start = {"global": 0, "data": 0}
    for name, (_, size, is_global) in SUPPORTS.items():
        group = "global" if is_global else "data"
        part = slice(start[group], start[group] + size)
        start[group] += size
        if is_global:
            z[name], log_det = to_support(name, aux["global"][part])
            log_q = log_q - log_det
        else:
            values, log_dets = zip(
                *(to_support(name, aux["data"][n, part]) for n in range(x.shape[1])), strict=True
            )
            rows_q = rows_q - sum(log_dets)
            stacked = torch.stack(values)
            z[name] = {"theta": stacked[:, 0], "mix": stacked, "skill": stacked.mT}.get(name)
    return by_hand(z, x, scale) - log_q - scale * rows_q


@pytest.mark.parametrize("batch", ["full", "minibatch"])
@pytest.mark.parametrize("particles", [1, 3], ids=["single", "vectorized"])
@pytest.mark.parametrize("name", DENSITIES)
def test_the_elbo_is_the_hand_computed_one(name: str, particles: int, batch: str) -> None:
    everything = torch.randn(TESTS, N)
    index = torch.arange(N) if batch == "full" else torch.tensor([5, 0, 3])
    x = everything[:, index]
    scale = N / len(index)
    guide = guides.make(name, program, everything, init_scale=0.6)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    kwargs: dict[str, Any] = {"size": N, "index": index}

    torch.manual_seed(3)
    objective = Trace_ELBO(
        num_particles=particles, vectorize_particles=particles > 1, max_plate_nesting=2
    )
    loss = objective.loss(program, guide, x, **kwargs)

    torch.manual_seed(3)
    with pyro.plate("particles", particles, dim=-3) if particles > 1 else poutine.block(hide=[]):
        trace = poutine.trace(guide).get_trace(x, **kwargs)
    aux = {
        group: next(
            site["value"] for key, site in trace.nodes.items() if key.endswith(f"_{group}")
        ).detach()
        for group in ("global", "data")
    }
    values = []
    for p in range(particles):
        one = {
            "global": aux["global"].reshape(particles, -1)[p],
            "data": aux["data"].reshape(particles, len(index), -1)[p],
        }
        values.append(elbo_by_hand(guide, one, x, index, scale).detach())
    assert loss == pytest.approx(-float(torch.stack(values).mean()), rel=1e-10, abs=1e-10)


@pytest.mark.parametrize("name", DENSITIES)
def test_draws_have_the_densities_of_the_trace(name: str) -> None:
    """Batched draws and their split into rows agree with one trace of guide and model."""
    x = torch.randn(TESTS, N)
    guide = guides.make(name, program, x, init_scale=0.6)
    draws = guides.draws.draw(program, guide, (x,), num_samples=5)
    assert draws.joint
    assert draws.rows_complete
    for s in range(5):
        z = {site: value[s] for site, value in draws.values.items()}
        expected = by_hand(z, x, 1.0)
        total = draws.log_p_rows[s].sum() + draws.log_p_global[s]
        assert total == pytest.approx(float(expected), rel=1e-10)
        # q at the same point: push back through the bijections with torch's own log-determinants.
        log_joint = guides.energy.LogJoint(program, (x,))
        packed = log_joint.layout.pack(z)
        lam = guide.parameters_of(x)
        log_q = sum(guide.families[g].log_prob(lam[g], packed[g]).sum() for g in packed).detach()
        with_jacobian = log_joint.total(*log_joint.packed(packed, jacobian=True))
        without = log_joint.total(*log_joint.packed(packed, jacobian=False))
        expected_q = log_q - (with_jacobian - without)
        measured = draws.log_q_rows[s].sum() + draws.log_q_global[s]
        assert float(measured) == pytest.approx(float(expected_q), rel=1e-7, abs=1e-7)
