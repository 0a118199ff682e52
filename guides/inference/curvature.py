"""Hessians of the energy, row by row: exact, Gauss-Newton or diagonal; kinks are refused.

    exact          H_n = d2E / du_n2, one Hessian product per coordinate of a row
    gauss_newton   sum_s J_s^T F_s J_s, positive definite with proper priors (guides.gauss_newton)
    diagonal       the diagonal of the exact one: variances of the conditionals

With global latents the blocks have arrow form: rows among themselves, rows with globals, globals.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from guides.energy import LogJoint
from guides.gauss_newton import gauss_newton
from guides.inference.units import EnergyFunction, energy_function

__all__ = ["HESSIANS", "KinkError", "check_kinks", "hessian", "own_units"]

HESSIANS = ("exact", "gauss_newton", "diagonal")
# Distances of second differences, in units of the standard deviation that the curvature implies. A
# smooth density has much the same curvature at both; at a kink it is ten times larger at the
# smaller one. What is small beside the whole curvature hardly bends the Gaussian.
_FAR, _NEAR = 1e-1, 1e-2
_GROWTH = 4.0


class KinkError(ValueError):
    """The energy has a kink at the latents, so it has no Hessian there."""


def hessian(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    *,
    jacobian: bool = True,
    kind: str = "exact",
    energy: EnergyFunction | None = None,
    held: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Hessian blocks of the energy, one product per coordinate of a row.

    Args:
        log_joint: The log joint of the call.
        packed: Where to take it, ``{group: (B, K) or (K,)}``.
        jacobian: Whether the energy is that of unconstrained space.
        kind: ``"exact"``, ``"gauss_newton"`` or ``"diagonal"``.
        energy: Another energy of the packed latents whose Hessian is meant.
        held: Packed latents that are constants, by group.

    Returns:
        ``"local"`` (B, K, K) and ``"cross"`` (B, K, G), both without N/B, and ``"global"``
        (G, G) with it; keys only for the groups that exist, and no ``"cross"`` with
        ``"diagonal"``.

    Raises:
        ValueError: For an unknown kind.
    """
    if kind not in HESSIANS:
        raise ValueError(f"hessian must be one of {', '.join(HESSIANS)}, got {kind!r}.")
    constant = {} if held is None else dict(held)
    packed = {name: value.detach() for name, value in packed.items()}
    if energy is None and kind == "gauss_newton":
        energy = gauss_newton(log_joint, {**constant, **packed}, jacobian=jacobian)
    function = energy_function(log_joint, jacobian=jacobian) if energy is None else energy
    scale = log_joint.layout.scale

    def gradient(point: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(lambda p: function({**constant, **p})[0])(point)

    blocks: dict[str, Tensor] = {}
    with torch.no_grad():
        product: Callable[..., Any] = torch.func.vjp(gradient, packed)[1]
        for name, value in packed.items():
            size = value.shape[-1]
            basis = torch.eye(size, dtype=value.dtype, device=value.device)
            if value.dim() == 2:
                # The energy of a row knows no other row, so one vector probes all rows at once.
                basis = basis.unsqueeze(1).expand(size, *value.shape)
            directions = {
                k: basis if k == name else v.expand(size, *v.shape) * 0 for k, v in packed.items()
            }
            columns = _columns(product, directions, size)
            if value.dim() == 2:
                blocks["local"] = columns[name].movedim(0, -1) / scale  # (B, K, K)
            else:
                blocks["global"] = columns[name].movedim(0, -1)  # (G, G)
                if "data" in packed:
                    blocks["cross"] = columns["data"].movedim(0, -1) / scale  # (B, K, G)
    if kind == "diagonal":
        blocks.pop("cross", None)
        blocks = {
            name: torch.diag_embed(block.diagonal(dim1=-2, dim2=-1))
            for name, block in blocks.items()
        }
    return blocks


def own_units(matrices: Tensor) -> Tensor:
    """Square roots of every coordinate's own curvature: Hessians over them have no units.

    Args:
        matrices: Hessians ``(..., K, K)``.

    Returns:
        The roots ``(..., K)``, positive.
    """
    info = torch.finfo(matrices.dtype)
    own = matrices.diagonal(dim1=-2, dim2=-1).abs()
    most = matrices.abs().amax(-1).clamp_min(info.tiny)
    # Curvatures of either sign may cancel on the diagonal, which says nothing there.
    return torch.where(own > info.eps * most, own, most).sqrt()


def _columns(
    product: Callable[..., Any], directions: dict[str, Tensor], size: int
) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            # A missing batching rule costs time, not correctness.
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(lambda v: product(v)[0])(directions)
    except RuntimeError:
        # Operations without a batching rule still have single products.
        rows = [product({k: v[i] for k, v in directions.items()})[0] for i in range(size)]
        return {k: torch.stack([row[k] for row in rows]) for k in directions}


def check_kinks(
    log_joint: LogJoint, packed: Mapping[str, Tensor], blocks: Mapping[str, Tensor]
) -> None:
    """Raise where a site's density has a kink at the latents: a Laplace site, |z|, a hinge.

    Autodiff returns a finite Hessian there, that of one of the two sides. Second differences of
    every site along every coordinate, over two distances, tell; no gradients are taken.

    Args:
        log_joint: The log joint of the call.
        packed: The latents, at or near the mode.
        blocks: The exact Hessian there, or its diagonal.

    Raises:
        KinkError: Naming the site, and the ways on.
    """
    read = log_joint.layout
    with torch.no_grad():
        middle = _terms(log_joint, packed)
        for name, value in packed.items():
            block = blocks["local" if value.dim() == 2 else "global"]
            curved = block.diagonal(dim1=-2, dim2=-1).abs()  # (B, K) or (G,)
            unit = torch.minimum(curved.rsqrt(), 1.0 + value.abs())
            moves = torch.diag_embed(unit).movedim(-1, 0)  # (K, B, K) or (G, G)
            far = _second_differences(log_joint, packed, name, _FAR * moves, middle)
            near = _second_differences(log_joint, packed, name, _NEAR * moves, middle)
            for site, small in near.items():
                # In units of the whole curvature; (K, B), or (K,) where nothing is a row's.
                small, large = small / _NEAR**2, far[site] / _FAR**2
                noise = torch.finfo(small.dtype).eps * (1.0 + middle[site].abs()) / _NEAR**2
                kink = (small.abs() > _GROWTH * large.abs()) & (small.abs() > 3 + 100 * noise)
                if bool(kink.any()):
                    index = (
                        int(kink.flatten(1).any(-1).nonzero()[0])
                        if kink.dim() > 1
                        else int(kink.nonzero()[0])
                    )
                    _refuse(read, name, index, site, kink[index])


def _terms(log_joint: LogJoint, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return log_joint.run(log_joint.layout.constrain(packed)).terms


def _second_differences(
    log_joint: LogJoint,
    packed: Mapping[str, Tensor],
    name: str,
    moves: Tensor,
    middle: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    def terms(move: Tensor) -> dict[str, Tensor]:
        return _terms(log_joint, {**packed, name: packed[name] + move})

    def both(move: Tensor) -> dict[str, Tensor]:
        up, down = terms(move), terms(-move)
        return {site: up[site] - 2 * value + down[site] for site, value in middle.items()}

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")
            return torch.func.vmap(both)(moves)
    except RuntimeError:
        found = [both(move) for move in moves]
        return {site: torch.stack([item[site] for item in found]) for site in middle}


def _refuse(read: Any, group: str, index: int, site: str, kink: Tensor) -> None:
    rows = "" if kink.dim() == 0 else f" in {int(kink.sum())} of {len(kink)} rows"
    along = next(
        s.name for s, part in read.group(group).slices() if part.start <= index < part.stop
    )
    moved = "" if along == site else f" along latent {along!r}"
    raise KinkError(
        f"The density of site {site!r} has a kink at these latents{moved}{rows}: it has no "
        "Hessian there, and no Gaussian follows from one. Pass "
        'hessian="gauss_newton", which takes the '
        "Fisher information of a Laplace site, 1 / scale**2, in its place. Where the latents sit "
        "exactly on the kink the posterior has a peak, no parabola, and that Gaussian is a "
        "convention: fit a family with a density (normal, multivariate_normal), or give the site "
        "a smooth density (StudentT, Normal)."
    )
