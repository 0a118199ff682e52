"""What relaxes as one: every row by itself, or everything together where globals move too.

    rows:   x (B, K)       e_n = -rows_n(u_n)                     one unit a row
    joint:  x (1, B K + G) e   = -(N/B sum_n rows_n + global)     one unit

A solver sees units only: flat latents, their energies, gradients and Hessian products. Every
gradient and every product is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.energy import LogJoint

__all__ = ["Counts", "EnergyFunction", "Packed", "Point", "Units", "dot", "energy_function"]

Packed = dict[str, Tensor]
EnergyFunction = Callable[[Packed], tuple[Tensor, tuple[Tensor, Tensor]]]


def energy_function(
    log_joint: LogJoint, *, jacobian: bool, noncentered: Collection[str] = ()
) -> EnergyFunction:
    """The energy of packed latents: its total, and the rows' and global parts beside it."""

    def energy(packed: Packed) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        rows, other = log_joint.packed(packed, jacobian=jacobian, noncentered=noncentered)
        return -log_joint.total(rows, other), (-rows, -other)

    return energy


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of units ``(U, K) -> (U,)``."""
    return (a * b).sum(-1)


@dataclass(frozen=True)
class Point:
    """A state of the units and what was evaluated there.

    Args:
        x: Flat latents ``(U, K)``.
        gradient: Gradient of the units' energies ``(U, K)``.
        energy: Their energies ``(U,)``.
        rows: Energies of the rows ``(B,)``, without N/B.
        other: Energy of everything outside the data plate.
    """

    x: Tensor
    gradient: Tensor
    energy: Tensor
    rows: Tensor
    other: Tensor

    def finite(self) -> Tensor:
        """Which units have a finite energy and gradient ``(U,)``."""
        return torch.isfinite(self.energy) & torch.isfinite(self.gradient).all(-1)

    def where(self, accepted: Tensor, new: Point) -> Point:
        """The new point where accepted ``(U,)``, this one elsewhere."""
        column = accepted.unsqueeze(-1)
        joint = self.energy.shape != self.rows.shape
        return Point(
            torch.where(column, new.x, self.x),
            torch.where(column, new.gradient, self.gradient),
            torch.where(accepted, new.energy, self.energy),
            torch.where(accepted, new.rows, self.rows),
            torch.where(accepted[0], new.other, self.other) if joint else new.other,
        )

    def take(self, rows: Tensor) -> Point:
        """Some of the rows, where every row is a unit."""
        return Point(
            self.x[rows], self.gradient[rows], self.energy[rows], self.rows[rows], self.other
        )


@dataclass
class Counts:
    """Evaluations of a relaxation.

    Args:
        gradients: Gradients of all units at once.
        products: Hessian products of all units at once.
        rows: Gradients of single rows, products counted twice.
    """

    gradients: int = 0
    products: int = 0
    rows: int = 0


class Units:
    """The energy of a call as a function of flat units.

    Args:
        log_joint: The log joint of the call.
        packed: Packed latents, ``{group: (B, K) or (K,)}``; those that do not move stay as here.
        jacobian: Whether the energy is that of unconstrained space.
        noncentered: Sites that are moved in standardized coordinates.
        hold_globals: Move the rows' latents only.
        counts: Where evaluations are written down.
    """

    def __init__(
        self,
        log_joint: LogJoint,
        packed: Mapping[str, Tensor],
        *,
        jacobian: bool,
        noncentered: Collection[str] = (),
        hold_globals: bool = False,
        counts: Counts | None = None,
    ) -> None:
        self.log_joint = log_joint
        self.jacobian = jacobian
        self.noncentered = tuple(noncentered)
        self.scale = float(log_joint.layout.scale)
        self.held = {name: value.detach() for name, value in packed.items()}
        self.moving = [name for name in packed if not (hold_globals and name == "global")]
        self.joint = self.moving != ["data"]
        self.function = energy_function(log_joint, jacobian=jacobian, noncentered=noncentered)
        self.counts = Counts() if counts is None else counts

    def count(self, gradients: int = 0, products: int = 0) -> None:
        """Write down evaluations."""
        num_rows = max(1, self.log_joint.layout.num_rows)
        self.counts.gradients += gradients
        self.counts.products += products
        self.counts.rows += (gradients + 2 * products) * num_rows

    def flatten(self, packed: Mapping[str, Tensor]) -> Tensor:
        """Moving latents, or anything of their shapes, as units ``(U, K)``."""
        if not self.joint:
            return packed["data"]
        return torch.cat([packed[name].reshape(1, -1) for name in self.moving], -1)

    def packed(self, x: Tensor) -> Packed:
        """All latents by group."""
        if not self.joint:
            return {**self.held, "data": x}
        parts = x.squeeze(0).split([self.held[name].numel() for name in self.moving])
        moved = {
            name: part.reshape(self.held[name].shape)
            for name, part in zip(self.moving, parts, strict=True)
        }
        return {**self.held, **moved}

    def per_row(self, values: Packed) -> Packed:
        """Gradients of the total energy as gradients of the rows: local blocks without N/B."""
        return {k: v / self.scale if v.dim() == 2 else v for k, v in values.items()}

    def size(self, gradient: Tensor) -> Tensor:
        """The largest entry of a unit's gradient ``(U,)``, local blocks without N/B."""
        if not self.joint:
            return gradient.abs().amax(-1)
        packed = {name: self.packed(gradient)[name] for name in self.moving}
        return self.flatten(self.per_row(packed)).abs().amax(-1)

    def weights(self, steps: Mapping[str, Tensor]) -> Tensor:
        """Steps by group, ``(B,)`` and ``(1,)``, as factors of flat gradients ``(U, K)``."""
        spread = {}
        for name in self.moving:
            value, step = self.held[name], steps[name]
            if value.dim() == 2:
                step = step.unsqueeze(-1) / (self.scale if self.joint else 1.0)
            spread[name] = step.expand(value.shape)
        return self.flatten(spread)

    def at(self, x: Tensor) -> Point:
        """Evaluate energy and gradient, once for all units."""
        self.count(gradients=1)

        def total(x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            return self.function(self.packed(x))

        gradient, (rows, other) = torch.func.grad(total, has_aux=True)(x)
        if self.joint:
            return Point(x, gradient, (self.scale * rows.sum() + other).reshape(1), rows, other)
        return Point(x, gradient / self.scale, rows, rows, other)

    def product(self, x: Tensor, function: EnergyFunction | None = None) -> Callable[..., Tensor]:
        """The Hessians of the units at ``x`` as a function of directions ``(U, K)``.

        Args:
            x: Where to take them.
            function: Another energy whose Hessian is meant.
        """
        chosen = self.function if function is None else function
        factor = 1.0 if self.joint else 1.0 / self.scale

        def gradient(x: Tensor) -> Tensor:
            return torch.func.grad(lambda u: chosen(self.packed(u))[0])(x)

        pull = torch.func.vjp(gradient, x)[1]

        def times(direction: Tensor) -> Tensor:
            self.count(products=1)
            found: Tensor = pull(direction)[0]
            return found * factor

        return times
