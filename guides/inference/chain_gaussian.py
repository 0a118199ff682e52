"""The Gaussian of a chain: a guide with the moments of draws, so that draws can be scored.

    q(u_g)       = Normal(mean u_g, C_gg)
    q(u_n | u_g) = Normal(mean u_n + C_ng C_gg^-1 (u_g - mean u_g), C_nn - C_ng C_gg^-1 C_gn)

A chain has no density; its moment-matched Gaussian in unconstrained space has one, and is a guide
like every other. It is not the chain: where the posterior bends, the draws know and it does not.
Covariances are shrunk towards their diagonal by the share (K + 1) / (K + 1 + T) of what T
effectively independent draws leave open, T from the autocorrelation at lag one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from guides.inference.laplace_guide import Laplace
from guides.layout import Layout

__all__ = ["ChainGaussian"]


class ChainGaussian(Laplace):
    """The Gaussian with the moments of chains; fixed numbers, no parameters.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide in Pyro's store.
    """

    num_draws: int = 0
    """Draws of all chains that the moments were taken of."""

    def fit(self, draws: Mapping[str, Tensor], read: Layout) -> None:
        """Take the moments of draws.

        Args:
            draws: Packed draws by group: ``"data"`` (S, C, B, K), ``"global"`` (S, C, G).
            read: Layout of the call, with the rows of the draws.

        Raises:
            ValueError: Where a coordinate never moved, or there are fewer than two draws.
        """
        first = next(iter(draws.values()))
        self.num_draws = first.shape[0] * first.shape[1]
        if self.num_draws < 2:
            raise ValueError(f"A covariance needs at least two draws, got {self.num_draws}.")
        self.plate = read.data_plate
        self.minibatch_estimate = read.scale != 1.0 and "global" in draws
        centered = {name: value - value.mean((0, 1)) for name, value in draws.items()}
        for group in read.groups:
            value = draws[group.name]
            still = (value[1:] == value[:-1]).all(0).all(0)
            if bool(still.any()):
                raise ValueError(
                    f"The chains of the {group.name} latents never moved"
                    + (f" in {int(still.any(-1).sum())} rows" if group.plate is not None else "")
                    + ": every proposal was rejected. Mix longer (num_mixing), so that the steps "
                    "adapt, or take a smaller step_size."
                )
        residual = dict(centered)
        if "global" in draws and "data" in draws:
            cross = torch.einsum("scbk,scg->bkg", centered["data"], centered["global"])
            own = torch.einsum("scg,sch->gh", centered["global"], centered["global"])
            # The minimum-norm solution: there may be fewer draws than global coordinates.
            gain = cross @ torch.linalg.pinv(own, hermitian=True)  # (B, K, G)
            self.register_buffer("gain", -gain)
            explained = torch.einsum("bkg,scg->scbk", gain, centered["global"])
            residual["data"] = centered["data"] - explained
        for group in read.groups:
            self.register_buffer(f"loc_{group.name}", draws[group.name].mean((0, 1)))
            covariance = _shrunk(residual[group.name])
            self.register_buffer(f"tril_{group.name}", torch.linalg.cholesky(covariance))

    def __repr__(self) -> str:
        """What the guide covers."""
        parts = ", ".join(f"{group.name}: {group.size}" for group in self._example.groups)
        note = "; global moments are those of a minibatch" if self.minibatch_estimate else ""
        return f"ChainGaussian({parts}; moments of {self.num_draws} draws{note})"


def _shrunk(centered: Tensor) -> Tensor:
    """Covariance of centered draws (S, C, ..., K), shrunk towards its diagonal: (..., K, K)."""
    num_draws, num_chains, size = centered.shape[0], centered.shape[1], centered.shape[-1]
    count = num_draws * num_chains
    covariance = torch.einsum("sc...k,sc...l->...kl", centered, centered) / (count - 1)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    lagged = (centered[1:] * centered[:-1]).sum((0, 1)) / (count - 1)
    correlation = (lagged / variance).mean(-1).clamp(0.0, 0.999)
    effective = count * (1 - correlation) / (1 + correlation)
    share = ((size + 1) / (size + 1 + effective)).unsqueeze(-1).unsqueeze(-1)
    return (1 - share) * covariance + share * torch.diag_embed(variance)
