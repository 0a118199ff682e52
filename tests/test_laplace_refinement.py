"""Laplace refinement arrives at the mode of every row, from wherever it starts."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import guides
from guides.guide import Guide
from guides.schemes.bound import RowBound
from guides.schemes.recording import recording
from guides.schemes.scheme import Call
from tests.test_refinement import Table

WEIGHTS = torch.tensor([[1.5, 0.0, 0.5], [0.0, -2.0, 0.3], [0.4, 0.4, 1.0], [1.0, 0.0, -1.0]])


def counts(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
    """Counts with an exponential rate, where the full Newton step goes far beyond the mode."""
    with pyro.plate("data", size or len(x), subsample=index):
        z = pyro.sample("z", dist.Normal(x.new_zeros(3), x.new_ones(())).to_event(1))
        rate = (z @ WEIGHTS.to(x).T).exp()
        pyro.sample("x", dist.Poisson(rate).to_event(1), obs=x)


def hard_counts(dtype: torch.dtype = torch.float64) -> Tensor:
    """From no count to millions, so that rows need steps of very different length."""
    rows = [
        [0, 0, 0, 0],
        [3, 1, 2, 0],
        [400, 0, 30, 5],
        [5_000, 2_000, 7, 800],
        [100_000, 0, 3_000, 0],
        [0, 2_000_000, 0, 4],
        [1, 90, 0, 10_000],
    ]
    return torch.tensor(rows, dtype=dtype)


def mode_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mode and exact Hessian of one row of counts by quasi-Newton steps with a line search."""
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    weights, x = WEIGHTS.double(), x.double()

    def energy(z: Tensor) -> Tensor:
        logits = weights @ z
        return logits.exp().sum() - (x * logits).sum() + 0.5 * z.square().sum()

    optimizer = torch.optim.LBFGS(
        [z], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = energy(z)
        value.backward()
        return value

    optimizer.step(closure)
    (slope,) = torch.autograd.grad(energy(z), [z])
    hessian = weights.T @ torch.diag((weights @ z).exp()) @ weights + torch.eye(3)
    newton = torch.linalg.solve(hessian, slope)
    # What is left to go, in standard deviations.
    assert (newton @ hessian @ newton).sqrt() < 1e-4
    return z.detach(), hessian.detach()


def call_of(guide: Guide, *args: Tensor, **kwargs: Any) -> tuple[Any, Call]:
    read = guide.layout(*args, **kwargs)
    return read.group("data"), Call(guide.model, args, kwargs, read, guide)


def parts(guide: Guide, *args: Tensor) -> tuple[Tensor, Tensor]:
    """Location and Cholesky factor of a Gaussian guide's rows."""
    lam = guide.parameters_of(*args)["data"]
    family = guide.families["data"]
    return family.location(lam), family.scale_tril(lam)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["gauss_newton", "exact"])
@pytest.mark.usefixtures("float64")
def test_rows_of_counts_reach_their_modes_from_the_prior(
    curvature: str, dtype: torch.dtype
) -> None:
    """Counts of thousands in the default number of steps, millions in twice as many."""
    x = hard_counts(dtype)
    torch.set_default_dtype(dtype)
    options: dict[str, Any] = {"start": "prior", "curvature": curvature}
    guide = guides.make("laplace_multivariate_normal", counts, x, **options)
    few = guide.schemes["data"].num_iterations
    soon = parts(guide, x)
    guide = guides.make("laplace_multivariate_normal", counts, x, num_iterations=16, **options)
    late = parts(guide, x)
    assert few <= 8
    for row in range(len(x)):
        loc, tril = late if x[row].max() > 10_000 else soon
        mode, hessian = mode_of(x[row])
        off = loc[row].double() - mode
        # Rates of 1e5 round by as much as that in single precision.
        near = 0.2 if dtype is torch.float32 else 1e-3
        assert (off @ hessian @ off).sqrt() < near, row
        covariance = (tril[row] @ tril[row].T).double()
        torch.testing.assert_close(
            torch.linalg.eigvals(covariance @ hessian).real,
            torch.ones(3).double(),
            atol=near,
            rtol=0,
        )


@pytest.mark.usefixtures("float64")
def test_far_starts_reach_the_modes() -> None:
    """On the flat side of the exponential, and on the steep one, where full steps are short."""
    x = hard_counts()
    modes = torch.stack([mode_of(row)[0] for row in x])
    torch.manual_seed(0)
    for width in (1.0, 5.0):
        start = width * torch.randn(len(x), 3)
        guide = guides.make("laplace_delta", counts, x, encoder=Table(start), num_iterations=25)
        assert (guide.parameters_of(x)["data"] - modes).abs().max() < 1e-4


@pytest.mark.usefixtures("float64")
def test_indefinite_curvature_goes_up_to_a_mode() -> None:
    """The energy of a square has a saddle between its two modes."""

    def squares(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.1), obs=x)

    x = torch.tensor([1.0, 4.0, 9.0, 4.0])
    start = torch.tensor([0.01, -0.1, 0.3, 20.0]).unsqueeze(-1)
    guide = guides.make(
        "laplace_multivariate_normal",
        squares,
        x,
        curvature="exact",
        encoder=Table(torch.cat([start, torch.zeros_like(start)], -1)),
        num_iterations=15,
    )
    loc, tril = parts(guide, x)
    # 0 = d/dz [z^2 / 2 + (z^2 - x)^2 / 0.02] where z is not zero
    expected = (x - 0.005).sqrt() * start[:, 0].sign()
    torch.testing.assert_close(loc[:, 0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(tril[:, 0, 0], (1 + 600 * expected**2 - 200 * x).rsqrt())


def test_one_step_is_exact_whatever_the_units() -> None:
    """In single precision, with precisions that differ by a factor of 1e12."""
    scale = torch.tensor([1e-5, 1e-2, 10.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))
            mixed = torch.stack([z[..., 0] + 1e-4 * z[..., 1], z[..., 1], z[..., 2]], -1)
            pyro.sample("x", dist.Normal(mixed, scale).to_event(1), obs=x)

    x = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.0, -1.0]]) * scale
    guide = guides.make("laplace_multivariate_normal", model, x, num_iterations=1, start="prior")
    loc, tril = parts(guide, x)
    mix = torch.eye(3, dtype=torch.float64)
    mix[0, 1] = 1e-4
    inverse = torch.diag(scale.double() ** -2)
    covariance = torch.linalg.inv(mix.T @ inverse @ mix + inverse)
    mean = x.double() @ inverse @ mix @ covariance
    torch.testing.assert_close((loc / scale).double(), mean / scale, atol=1e-4, rtol=0)
    unit = tril / scale.unsqueeze(-1)
    expected = covariance / scale.double() / scale.double().unsqueeze(-1)
    for row in unit.double():
        torch.testing.assert_close(row @ row.mT, expected, atol=1e-4, rtol=0)


@pytest.mark.usefixtures("float64")
def test_a_row_out_of_the_range_of_numbers_keeps_its_start() -> None:
    """A rate that overflows has neither a gradient nor a curvature; the others go on."""
    x = hard_counts()
    start = torch.zeros(len(x), 9)
    start[:, 3:6] = -1.0
    start[2, 0] = 800.0
    for curvature in ("gauss_newton", "exact"):
        guide = guides.make(
            "laplace_multivariate_normal", counts, x, encoder=Table(start), curvature=curvature
        )
        found = guide.parameters_of(x)["data"]
        assert torch.equal(found[2], start[2])
        assert found.isfinite().all()
        rest = torch.arange(len(x)) != 2
        alone = guides.make(
            "laplace_multivariate_normal",
            counts,
            x[rest],
            encoder=Table(start[rest]),
            curvature=curvature,
        )
        torch.testing.assert_close(found[rest], alone.parameters_of(x[rest])["data"])
        assert guide(x)["z"].isfinite().all()


@pytest.mark.usefixtures("float64")
def test_a_row_that_leaves_the_range_of_numbers_is_held_at_its_last_point_within() -> None:
    """At zero a square root has a value, but no slope."""

    def cut(x: Tensor, loc: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            left = 2.0 - z
            pyro.sample("x", dist.Normal((left * (left > 0)).sqrt(), 1.0), obs=x)

    x, loc = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.0, 9.0, -4.0])
    start = torch.tensor([0.5, 1.0, -1.0]).unsqueeze(-1)
    encoder = Table(torch.cat([start, torch.zeros_like(start)], -1))
    guide = guides.make(
        "laplace_multivariate_normal", cut, x, loc, encoder=encoder, data_args={"x": 0, "loc": 0}
    )
    found, tril = parts(guide, x, loc)
    assert float(found[1, 0]) == 1.0
    # Gauss-Newton: 1 + (d sqrt(2 - z) / dz)^2
    assert float(tril[1, 0, 0]) == pytest.approx((1 + 0.25) ** -0.5)
    for row in (0, 2):
        z = found[row, 0].clone().requires_grad_()
        energy = 0.5 * (z - loc[row]) ** 2 + 0.5 * (x[row] - (2 - z).sqrt()) ** 2
        (slope,) = torch.autograd.grad(energy, [z])
        assert abs(float(slope)) < 1e-6


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("tolerance", [0.0, 1e-8])
def test_a_row_does_not_see_its_batch(tolerance: float) -> None:
    """Rows that stop are dropped, and rows that go on do not notice.

    Kernels round by the size of the batch. Steps are chosen by their energies, sums of terms that
    cancel, so a mode is known up to the points whose energies rounding cannot tell apart.
    """
    x = hard_counts()
    options: dict[str, Any] = {"start": "prior", "num_iterations": 25, "data_args": {"x": 0}}
    guide = guides.make("laplace_multivariate_normal", counts, x, tolerance=tolerance, **options)
    loc, tril = parts(guide, x)
    for row in range(len(x)):
        own_loc, own_tril = parts(guide, x[row : row + 1])
        # 0.5 d^2 = eps * (sum of the sizes of the terms), d in standard deviations
        logits = WEIGHTS.double() @ loc[row]
        terms = logits.exp() + (x[row] * logits).abs() + torch.lgamma(x[row] + 1)
        size = float(terms.sum() + 0.5 * loc[row].square().sum())
        near = (2 * torch.finfo(loc.dtype).eps * size) ** 0.5
        assert near < 1e-7 * max(1.0, float(x[row].sum()) ** 0.75)
        off = torch.linalg.solve_triangular(
            tril[row], (own_loc[0] - loc[row]).unsqueeze(-1), upper=False
        )
        assert off.norm() <= near + tolerance, row
        # Prior deviations are one and weights at most two: curvatures change by 4 d at most.
        ratio = torch.linalg.solve_triangular(tril[row], own_tril[0], upper=False)
        torch.testing.assert_close(ratio, torch.eye(3), atol=4 * near + tolerance, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("data_args", [{"x": 0}, None])
def test_a_step_that_was_too_long_is_no_arrival(data_args: dict[str, int] | None) -> None:
    """Under a wide prior every step that is tried first leaves the range of numbers."""
    seen: list[int] = []

    def wide(x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        seen.append(len(x))
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1000.0))
            pyro.sample("x", dist.Poisson(z.exp()), obs=x)

    x = torch.tensor([1e4, 5.0, 300.0])
    start = torch.tensor([-15.0, 1.6, 5.7]).unsqueeze(-1)
    guide = guides.make(
        "laplace_delta",
        wide,
        x,
        encoder=Table(start),
        tolerance=1e-6,
        num_iterations=60,
        data_args=data_args,
    )
    seen.clear()
    found = guide.parameters_of(x)["data"][:, 0]
    torch.testing.assert_close(found, x.log(), atol=1e-4, rtol=0)
    # They stop: a step is some programs of three rows.
    assert sum(seen) < 60 * 3 * 4


@pytest.mark.usefixtures("float64")
def test_it_runs_inside_other_transforms() -> None:
    x = hard_counts()
    torch.manual_seed(0)
    starts = torch.randn(4, len(x), 3)
    guide = guides.make("laplace_delta", counts, x, encoder=Table(starts[0]), num_iterations=20)
    scheme, (group, call) = guide.schemes["data"], call_of(guide, x)
    (name,) = dict(scheme.named_parameters())

    def refined(rows: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(scheme, {name: rows}, (group, call))
        return found

    expected = torch.stack([refined(start) for start in starts])
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(refined)(starts), expected)
    gradient, value = torch.func.grad_and_value(lambda rows: refined(rows).sum())(starts[0])
    assert (gradient == 0).all(), "the refined parameters are numbers"
    torch.testing.assert_close(value, expected[0].sum())


@pytest.mark.usefixtures("float64")
def test_the_root_of_the_curvature_is_finite_and_regular_in_every_row() -> None:
    x = hard_counts()
    guide = guides.make("laplace_multivariate_normal", counts, x)
    group, call = call_of(guide, x)
    u = torch.zeros(len(x), 3)
    u[1], u[4] = 900.0, torch.nan
    root, finite = guide.schemes["data"].spread(RowBound(group, call), u)
    assert finite.tolist() == [row not in (1, 4) for row in range(len(x))]
    assert root.isfinite().all()
    hessian = WEIGHTS.double().T @ WEIGHTS.double() + torch.eye(3)
    for row in (0, 2, 3, 5, 6):
        torch.testing.assert_close(root[row].T @ hessian @ root[row], torch.eye(3))
    assert (torch.linalg.cond(root[[1, 4]]) == 1).all()


@pytest.mark.usefixtures("float64")
def test_an_encoder_learns_beside_a_row_that_is_held() -> None:
    """The bound of that row says nothing, those of the others what they say without it."""
    x = hard_counts()
    start = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(0))
    start[5] = -800.0
    rest = torch.arange(len(x)) != 5
    slopes = []
    for rows in (torch.arange(len(x)), rest):
        guide = guides.make("laplace_delta", counts, x[rows], encoder=Table(start[rows]))
        with recording() as record:
            found = guide.parameters_of(x[rows])["data"]
        assert found.isfinite().all()
        slopes.append(record[0].iterates[0].gradient)
    assert (slopes[0][5] == 0).all()
    torch.testing.assert_close(slopes[0][rest], slopes[1])
