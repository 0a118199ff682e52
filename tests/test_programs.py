"""The reader's own programs under every cell of the grid and predictive coding."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.ops.stats import effective_sample_size

import guides
from guides.diagnostics import elbo, log_evidence
from guides.draws import draw
from guides.families import FAMILIES
from guides.inference import SVI, PredictiveCoding
from guides.objectives import RefinementELBO
from tests.cases import CORE_GUIDES
from tests.programs import PROGRAMS, Program


@pytest.fixture(params=PROGRAMS)
def program(request: pytest.FixtureRequest) -> Program:
    return PROGRAMS[request.param]()


@pytest.mark.parametrize(
    "name", [*CORE_GUIDES, "low_rank_normal", "student_t", "mixture", "sylvester"]
)
def test_every_cell_that_applies_fits(program: Program, name: str) -> None:
    if name not in FAMILIES and not program.local_sites:
        with pytest.raises(
            ValueError, match="amortized guide needs latents inside the data plate"
        ):
            guides.make(name, program.model, *program.args)
        return
    guide = guides.make(name, program.model, *program.args)
    # Networks of an encoder take smaller steps than free parameters.
    optim = pyro.optim.ClippedAdam({"lr": 0.003 if guide.amortized else 0.03})
    svi = SVI(program.model, guide, optim, RefinementELBO())
    losses = svi.run(300, (program.args, {})).losses
    first, last = torch.tensor(losses[:20]), torch.tensor(losses[-20:])
    error = (first.var() / 20 + last.var() / 20).sqrt()
    assert last.mean() < first.mean() - 2 * error
    if not guide.has_density:
        with pytest.raises(ValueError, match="point mass"):
            elbo(program.model, guide, *program.args)
        return
    low = elbo(program.model, guide, *program.args, num_samples=400)
    high = log_evidence(program.model, guide, *program.args, num_samples=400)
    assert low.total <= high.total + 2 * (low.standard_error**2 + high.standard_error**2) ** 0.5
    assert low.joint, "all three programs have global latents"
    assert high.joint


def test_predictive_coding_fits(program: Program) -> None:
    optim = pyro.optim.Adam({"lr": 0.01})
    start = PredictiveCoding(program.model, optim, num_steps=0).evaluate_loss(*program.args)
    pc = PredictiveCoding(program.model, optim, num_steps=50)
    losses = pc.run(20, (program.args, {})).losses
    # Local latents start afresh in every step and global ones go on, so the energy falls far and
    # then wavers by what 50 updates leave unsettled.
    assert max(losses) < start
    assert losses[-1] <= losses[0] + 0.01 * (start - losses[0])
    posterior = pc.posterior(*program.args)
    low = elbo(program.model, posterior, *program.args, num_samples=400)
    high = log_evidence(program.model, posterior, *program.args, num_samples=400)
    assert low.total <= high.total + 2 * (low.standard_error**2 + high.standard_error**2) ** 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_full_covariance_means_agree_with_nuts(program: Program) -> None:
    """Means of the global latents within a quarter of a posterior standard deviation.

    One group holds everything, so that the covariance of global and local latents is represented:
    factorized over the two groups, the loadings of the factor model are off by up to 0.41.
    """
    args = tuple(a.double() if a.is_floating_point() else a for a in program.args)
    guide = guides.make("multivariate_normal", program.model, *args, data_plate=None)
    steps = 3000
    optim = pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.01 ** (1 / steps)})
    SVI(program.model, guide, optim, Trace_ELBO(num_particles=4)).run(steps, (args, {}))
    values = draw(program.model, guide, args, num_samples=4000).values
    kernel = NUTS(program.model, target_accept_prob=0.8)
    mcmc = MCMC(kernel, num_samples=500, warmup_steps=250, disable_progbar=True)
    with pyro.validation_enabled(False):
        mcmc.run(*args)
    reference = mcmc.get_samples()
    for name in program.global_sites:
        mean, scale = reference[name].mean(0), reference[name].std(0)
        z = (values[name].mean(0).reshape(mean.shape) - mean) / scale
        # Two standard errors of the chain's own mean, in the same unit.
        error = 2 / effective_sample_size(reference[name].unsqueeze(0)).sqrt()
        assert (z.abs() < 0.25 + error).all(), f"{name}: {z}"
