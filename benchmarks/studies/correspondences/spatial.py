"""Filters of natural patches: whitening, sparse coding, and the network of Rao and Ballard."""

from __future__ import annotations

from typing import Any

import pyro.optim as optimizers
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

import zoo
import zoo.data
from benchmarks.studies.correspondences.filters import center_surround, extent, gabor, orientation
from guides.inference import CompiledSVI, PredictiveCoding
from zoo.rao_ballard import modules_of
from zoo.whitening import whitening_matrix

__all__ = ["contrasts", "rao_ballard", "sparse_coding", "whitening"]

Result = tuple[dict[str, Any], dict[str, Tensor]]
"""Numbers for the record, and what the figure draws."""


def whitening(num_steps: int = 1200, side: int = 9, num_rows: int = 20_000) -> Result:
    """ZCA of patches, and the symmetric flow that learns it by stochastic gradients.

    A twentieth of a standard deviation of noise gives the highest frequencies a variance.
    """
    data = zoo.data.load(
        "natural_patches", patch=side, num_train=num_rows, num_test=2000, center=False
    )
    loc, scale = data.train.mean(), data.train.std()
    train, test = ((part - loc) / scale for part in (data.train, data.test))
    train, test = (part + 0.05 * torch.randn_like(part) for part in (train, test))
    train, test = train.double(), test.double()
    _, zca = whitening_matrix(train, "zca", epsilon=0.0)
    _, cholesky = whitening_matrix(train, "cholesky", epsilon=0.0)
    exact = zoo.Whitening(side * side, "symmetric").double().fit(train)
    model = zoo.Whitening(side * side, "symmetric").double()
    optim = optimizers.ClippedAdam({"lr": 0.02, "lrd": 0.02 ** (1 / num_steps), "clip_norm": 1e9})
    svi = CompiledSVI(model, _nothing, optim, Trace_ELBO(), mode="graph")
    for _ in range(num_steps):
        svi.step(train[torch.randint(len(train), (200,))])
    learned = model.covariance.whitening.detach()
    pair = torch.stack([learned.flatten(), zca.flatten()])
    numbers = {
        "correlation_with_zca": float(torch.corrcoef(pair)[0, 1]),
        "largest_difference": float((learned - zca).abs().max() / zca.abs().max()),
        "surround_over_center": float(center_surround(learned, side).mean()),
        "surround_over_center_zca": float(center_surround(zca, side).mean()),
        "test_log_likelihood": float(model.log_evidence(test).detach().mean()),
        "test_log_likelihood_zca": float(exact.log_evidence(test).detach().mean()),
    }
    return numbers, {"zca": zca, "learned": learned, "cholesky": cholesky}


def contrasts(patch: tuple[int, int], num_rows: int) -> Tensor:
    """Whitened patches of equal contrast, flat ones left out, ``(N, height * width)``.

    Whitening is ZCA with 3 % of the mean variance added, which keeps the highest frequencies,
    that is noise and the blocks of JPEG, small. Contrast varies over two orders of magnitude
    within a photograph: without division by it, a few rows decide what is learned.
    """
    data = zoo.data.load("natural_patches", patch=patch, num_train=num_rows, num_test=1)
    epsilon = 0.03 * float(data.train.var(0).mean())
    mean, weight = whitening_matrix(data.train, "zca", epsilon=epsilon)
    white = (data.train - mean) @ weight.mT
    scale = white.std(1, keepdim=True)
    kept = scale.flatten() > 0.3 * white.std()
    return white[kept] / scale[kept]


def sparse_coding(
    num_steps: int = 1200, side: int = 12, z_dim: int = 144, num_rows: int = 20_000
) -> Result:
    """A basis of patches by predictive coding, under sparse priors and under a normal one."""
    rows = contrasts((side, side), num_rows)
    numbers: dict[str, Any] = {"num_rows": len(rows)}
    bases: dict[str, Tensor] = {}
    for prior in ("cauchy", "laplace", "normal"):
        model = zoo.SparseCoding(side * side, z_dim, prior=prior, prior_scale=0.1, noise_scale=0.3)
        loop = PredictiveCoding(
            model, optimizers.PyroOptim(torch.optim.Adam, {"lr": 0.1}), num_steps=10, mode="graph"
        )
        for _ in range(num_steps):
            loop.step(rows[torch.randint(len(rows), (100,))])
        bases[prior] = model.basis.detach().mT
        z = loop.infer(rows[:1000])["z"]
        numbers[f"kurtosis_{prior}"] = float(_kurtosis(z))
        numbers[f"explained_{prior}"] = float(_explained(z @ bases[prior], rows[:1000]))
    return _with_controls(numbers, bases, rows, (side, side))


def rao_ballard(
    num_steps: int = 1200,
    side: int = 12,
    stride: int = 5,
    z_dims: tuple[int, int] = (64, 16),
    num_rows: int = 12_000,
) -> Result:
    """The first level of the two-level network, under Cauchy and under normal activities.

    Columns of both weights are kept at unit length. Steps are plain gradients: Adam's, which are
    of one size for all pixels, follow the sign of a column's growth and end in checkerboards.
    """
    wide = side + 2 * stride
    squares, _ = modules_of(contrasts((side, wide), num_rows), (side, wide), side, stride)
    numbers: dict[str, Any] = {"num_rows": len(squares)}
    bases: dict[str, Tensor] = {}
    for prior in ("cauchy", "normal"):
        model = zoo.RaoBallard(
            side * side, z_dims, activation="tanh", scales=(0.3, 0.1, 0.1), prior=prior
        )
        _unit_columns(model)
        loop = PredictiveCoding(
            model,
            optimizers.PyroOptim(torch.optim.SGD, {"lr": 3e-4}),
            num_steps=10,
            parameterization="noncentered",
            mode="graph",
        )
        for _ in range(num_steps):
            loop.step(squares[torch.randint(len(squares), (50,))])
            _unit_columns(model)
        bases[prior] = model.below.detach()[0].mT
        z = loop.infer(squares[:500])["z1"]
        numbers[f"kurtosis_{prior}"] = float(_kurtosis(z))
        found = torch.tanh(z @ bases[prior])
        numbers[f"explained_{prior}"] = float(_explained(found, squares[:500]))
    return _with_controls(numbers, bases, squares.reshape(-1, side * side), (side, side))


@torch.no_grad()
def _unit_columns(model: zoo.RaoBallard) -> None:
    model.below.div_(model.below.norm(dim=1, keepdim=True))
    model.above.div_(model.above.norm(dim=(0, 1), keepdim=True))


def _with_controls(
    numbers: dict[str, Any], bases: dict[str, Tensor], rows: Tensor, shape: tuple[int, int]
) -> Result:
    """Medians over the filters of every basis, of the rows' principal components, and of noise."""
    number = len(next(iter(bases.values())))
    vectors = torch.linalg.eigh(rows.mT.cov())[1]
    shown = {**bases, "pca": vectors[:, -number:].mT.flip(0)}
    pictures = dict(shown)
    for name, basis in {**shown, "noise": torch.randn(number, rows.shape[1])}.items():
        fits = gabor(basis, shape)
        pictures[f"gabor, {name}"] = fits
        numbers[f"gabor_{name}"] = float(fits.median())
        numbers[f"extent_{name}"] = float(extent(basis).median())
        numbers[f"orientation_{name}"] = float(orientation(basis, shape).median())
    return numbers, pictures


def _kurtosis(z: Tensor) -> Tensor:
    return z.pow(4).mean() / z.square().mean().square()


def _explained(found: Tensor, rows: Tensor) -> Tensor:
    return 1 - (rows - found).square().mean() / rows.square().mean()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The guide of a model without latents."""
