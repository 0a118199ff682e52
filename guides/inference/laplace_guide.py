"""Laplace posteriors: a Gaussian at given latents with the Hessian of the energy.

Without global latents every row has its own Gaussian,

    q(u_n) = Normal(u_n*, H_ll,n^-1)                H: Hessian of -log p(x, z(u)) |dz/du|

With global latents the precision has arrow form and the posterior is ancestral,

    q(u_g)       = Normal(u_g*, S^-1)               S = H_gg - N/B sum_n H_gl,n H_ll,n^-1 H_lg,n
    q(u_n | u_g) = Normal(u_n* - H_ll,n^-1 H_lg,n (u_g - u_g*), H_ll,n^-1)

so that the covariance between global and local latents is represented exactly. For a linear
Gaussian model at its mode this is the posterior, and its evidence is log p(x).

Latents that a mask switches off (steps that a row lacks, padding of a nested plate) are no part of
it: their mean is the value that was given, a draw is that plus a standard normal, unconstrained
and independent of everything, and their density counts zero, in q as in p
(:mod:`guides.inference.switched_off`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.curvature import check_kinks, own_units
from guides.inference.curvature import hessian as hessian_blocks
from guides.inference.switched_off import (
    CountedNormal,
    check_masks,
    decoupled,
    switched_off,
    unread,
)
from guides.probe import Program
from guides.recipe import Recipe
from guides.schemes.scheme import Call
from guides.sites import Group, Plate

__all__ = ["IndefiniteHessianError", "Laplace", "check_definite", "laplace"]


class IndefiniteHessianError(ValueError):
    """The energy is not convex at the latents, so no Gaussian has its Hessian as precision."""


def laplace(
    model: Program,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    data_plate: str | None = "auto",
    jacobian: bool = True,
    hessian: str = "exact",
    name: str | None = None,
    indices: Mapping[str, Tensor] | None = None,
) -> Laplace:
    """The Laplace posterior at given latents.

    Args:
        model: The program.
        values: Constrained values of all latents by site, at or near the mode.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        data_plate: See :func:`guides.layout.layout`.
        jacobian: Take the Hessian of the log density in unconstrained space, which is what a
            Gaussian in that space approximates.
        hessian: ``"exact"``; ``"gauss_newton"``, positive definite with proper priors and defined
            at kinks, see :mod:`guides.gauss_newton`; or ``"diagonal"``, independent latents with
            the diagonal of the exact one.
        name: Prefix of the guide in Pyro's store.
        indices: Row numbers of ``values``, for a plate that the program subsamples at random.

    Returns:
        A guide for the rows of this call.

    Raises:
        IndefiniteHessianError: Where the Hessian is not positive definite.
        KinkError: Where a site's density has a kink at the latents, and the Hessian is not
            Gauss-Newton.

    Example:
        >>> import pyro
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.tensor([0.0, 2.0])
        >>> guide = laplace(model, {"z": x / 2}, (x,))
        >>> guide.covariance("data").flatten()
        tensor([0.5000, 0.5000])
    """
    kwargs = {} if kwargs is None else kwargs
    guide = Laplace(model, args, kwargs, data_plate=data_plate, name=name)
    guide.set(values, args, kwargs, jacobian=jacobian, hessian=hessian, indices=indices)
    return guide


class Laplace(ProgramGuide):
    """The Gaussian guide of :func:`laplace`; fixed numbers, no parameters.

    Args:
        model: The program.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide in Pyro's store.
    """

    hessian: str = "exact"
    """Which Hessian of the energy is the precision."""

    minibatch_estimate: bool = False
    """Whether the covariance of global latents was estimated from a subsample of the rows."""

    def set(
        self,
        values: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        jacobian: bool = True,
        hessian: str = "exact",
        indices: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Center the guide at ``values`` and take the Hessian there."""
        read = self._layout(args, kwargs, indices)
        packed = read.pack({name: value.detach() for name, value in values.items()})
        log_joint = LogJoint(self.model, args, kwargs, layout=read)
        if jacobian:
            check_masks(read)
        log_joint.check_rows(packed, jacobian=jacobian)
        blocks = hessian_blocks(log_joint, packed, jacobian=jacobian, kind=hessian)
        absent = unread(log_joint, packed, blocks, jacobian=jacobian)
        blocks = decoupled(blocks, absent)
        if hessian != "gauss_newton":
            check_kinks(log_joint, packed, blocks)
        self.plate = read.data_plate
        self.hessian = hessian
        self.recipe = Recipe.of("laplace", None, {}, args, kwargs)
        tril: dict[str, Tensor] = {}
        if "local" in blocks:
            local = _symmetric(blocks["local"])
            check_definite(local, read.group("data"), hessian)
            tril["data"] = _scale_tril(local)
            if "cross" in blocks:
                gain = torch.linalg.solve(local, blocks["cross"])  # (B, K, G)
                self.register_buffer("gain", gain)
                explained = torch.einsum("bkg,bkh->gh", blocks["cross"], gain)
                blocks["global"] = blocks["global"] - read.scale * explained
                self.minibatch_estimate = read.scale != 1.0
        if "global" in blocks:
            schur = _symmetric(blocks["global"])
            check_definite(schur.unsqueeze(0), read.group("global"), hessian)
            tril["global"] = _scale_tril(schur)
        for group in read.groups:
            self.register_buffer(f"loc_{group.name}", packed[group.name])
            # One layout in memory, that of a file: products of others round in another order.
            self.register_buffer(f"tril_{group.name}", tril[group.name].contiguous())
            if (off := switched_off(group)) is not None:
                self.register_buffer(f"off_{group.name}", off)
                unknown = absent.get(group.name, torch.zeros_like(off))
                self.register_buffer(f"absent_{group.name}", unknown)

    def covariance(self, group: str) -> Tensor:
        """Covariance of a group: ``(G, G)``, or ``(B, K, K)`` of the rows given the globals.

        Latents that a mask switches off have variance one and no covariance.
        """
        tril = getattr(self, f"tril_{group}")
        return tril @ tril.mT

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """The Gaussian of a group, given the global draws before it."""
        loc, tril = getattr(self, f"loc_{group.name}"), getattr(self, f"tril_{group.name}")
        rows = slice(None) if group.plate is None else self._rows(group.plate)
        absent = self._absent(group, rows)
        if group.plate is None:
            return _gaussian(loc, tril, absent)
        ones = (1,) * (-group.plate.dim - 1)
        loc, tril = loc[rows], tril[rows]
        num_rows, size = loc.shape
        tril = tril.reshape(num_rows, *ones, size, size)
        loc = loc.reshape(num_rows, *ones, size)
        if "global" in upstream and "gain" in self._buffers:
            gain = self.gain[rows].reshape(num_rows, *ones, size, -1)
            moved = upstream["global"] - self.loc_global
            loc = loc - (gain @ moved.unsqueeze(-1)).squeeze(-1)
        return _gaussian(loc, tril, None if absent is None else group.batch(absent))

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The mode."""
        loc = getattr(self, f"loc_{group.name}")
        return loc if group.plate is None else loc[self._rows(group.plate)]

    def _absent(self, group: Group, rows: Tensor | slice) -> Tensor | None:
        """Which latents of the call no density knows, ``(B, K)`` or ``(G,)``; None for none."""
        built = self._buffers.get(f"off_{group.name}")
        built = None if built is None else built[rows]
        # Guides that mask whole groups follow the masks of the call by themselves.
        if not is_capturing() and self.group_mask(group) is None:
            asked = switched_off(group)
            if not _same(built, asked):
                site = next(s for s, part in group.slices() if not _same(built, asked, part))
                raise ValueError(
                    f"This Laplace posterior was taken where masks switch off other latents than "
                    f"in this call, of site {site.name!r}: what it knows of them is not what the "
                    "call asks for. Build a posterior for the masks (lengths) of this call."
                )
        return None if built is None else self._buffers[f"absent_{group.name}"][rows]

    def _rows(self, plate: Plate) -> Tensor | slice:
        """Positions of the call's rows among the rows of the guide."""
        own = self.plate
        fix = "Build a posterior for these rows."
        if plate.size != own.size:
            raise ValueError(
                f"This Laplace posterior is for {own.num_rows} of {own.size} rows, but plate "
                f"{plate.name!r} has size {plate.size}. {fix}"
            )
        if plate.index is None and own.index is None:
            return slice(None)
        built = torch.arange(own.size) if own.index is None else own.index.cpu()
        asked = torch.arange(plate.size) if plate.index is None else plate.index.cpu()
        position = torch.full((own.size,), -1)
        position[built] = torch.arange(len(built))
        rows = position[asked]
        if (rows < 0).any():
            absent = asked[rows < 0][:5].tolist()
            raise ValueError(f"This Laplace posterior does not cover rows {absent}. {fix}")
        return rows

    def __repr__(self) -> str:
        """What the guide covers."""
        parts = ", ".join(f"{group.name}: {group.size}" for group in self._example.groups)
        note = "; global covariance is a minibatch estimate" if self.minibatch_estimate else ""
        kind = {"gauss_newton": "Gauss-Newton", "diagonal": "diagonal of the"}
        return f"Laplace({parts}; {kind.get(self.hessian, 'exact')} Hessian{note})"


def _gaussian(loc: Tensor, tril: Tensor, absent: Tensor | None) -> dist.TorchDistribution:
    if absent is None:
        return dist.MultivariateNormal(loc, scale_tril=tril)
    return CountedNormal(loc, tril, absent)


def _same(built: Tensor | None, asked: Tensor | None, part: slice = slice(None)) -> bool:
    """Whether two masks switch off the same coordinates; None switches off nothing."""
    masks = [mask[..., part] for mask in (built, asked) if mask is not None]
    if len(masks) == 2:
        return torch.equal(*masks)
    return not any(bool(mask.any()) for mask in masks)


def _symmetric(matrix: Tensor) -> Tensor:
    return 0.5 * (matrix + matrix.mT)


def _scale_tril(precision: Tensor) -> Tensor:
    """Cholesky factor of the inverse, without forming the inverse."""
    flipped = torch.linalg.cholesky(precision.flip(-2, -1))
    upper = flipped.flip(-2, -1).mT  # precision = upper^T upper with upper lower-triangular
    identity = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(upper, identity, upper=False)


def check_definite(matrices: Tensor, group: Group, kind: str) -> None:
    """Raise, naming the site and the way on, unless Hessian blocks are positive definite.

    Args:
        matrices: ``(B, K, K)``, or ``(1, G, G)`` of global latents.
        group: Whose block it is.
        kind: Which Hessian it is.

    Raises:
        IndefiniteHessianError: Where one is not.
    """
    if not bool(torch.isfinite(matrices).all()):
        names = ", ".join(repr(site.name) for site in group.sites)
        raise IndefiniteHessianError(
            f"The Hessian of the energy is not finite at sites {names}: the latents ran to the "
            "edge of what numbers can hold. Where a learned scale lies above its own latents the "
            "joint density has no mode: write them as loc + scale * e in the model, or fit a "
            "family with a density (normal, multivariate_normal)."
        )
    # Signs are those of the matrices themselves; sizes do not depend on how latents are scaled.
    unit = own_units(matrices).unsqueeze(-1)
    values, vectors = torch.linalg.eigh(matrices / unit / unit.mT)
    smallest = values[:, 0]
    # At the level of rounding a direction has no curvature, and its variance means nothing.
    floor = 10 * torch.finfo(values.dtype).eps * values[:, -1].abs()
    bad = ~(smallest > floor)
    if not bool(bad.any()):
        return
    row = int(torch.where(bad, smallest, torch.inf).argmin())
    weight = vectors[row, :, 0].square()
    site, own = max(group.slices(), key=lambda item: float(weight[item[1]].sum()))
    name = site.name
    where = "" if group.plate is None else f" in {int(bad.sum())} of {len(bad)} rows"
    way = (
        "Every latent needs a proper prior with curvature in its unconstrained coordinates."
        if kind == "gauss_newton"
        else 'Relax longer (num_steps), start from a guide, or pass hessian="gauss_newton", which '
        "is positive definite wherever the priors are proper."
    )
    off = switched_off(group)
    if off is not None and bool(off.reshape(len(bad), -1)[row, own].any()):
        way += (
            f" Where its mask is off {name!r} has no prior, and terms that count read it all the "
            "same: mask these as well, or leave its prior on."
        )
    raise IndefiniteHessianError(
        f"The Hessian of the energy is not positive definite at site {name!r}{where} (smallest "
        f"eigenvalue {float(smallest[row]):.3g}, in units of its diagonal): these latents are not "
        f"at a mode with curvature, so there is no Laplace posterior. {way} Where a "
        "learned scale lies above its own latents the joint density has no mode at all: write "
        "them as loc + scale * e in the model, or fit a family with a density (normal, "
        "multivariate_normal)."
    )
