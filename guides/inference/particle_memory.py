"""Particles that persist between steps: of every row by its number, of global latents at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from guides.inference.particle_density import ParticleDensity, Particles
from guides.inference.particle_sampler import Cloud
from guides.inference.row_memory import RowMemory
from guides.inference.same_data import CallData

__all__ = ["ParticleMemory", "choose"]

_WEIGHTS = "log weights"


class ParticleMemory:
    """Clouds of rows, written after a step and read before the next one."""

    def __init__(self) -> None:
        self.rows = RowMemory()
        self.shared: dict[str, Tensor] = {}

    def read(
        self, density: ParticleDensity, data: CallData | None = None
    ) -> tuple[Cloud | None, Tensor]:
        """The cloud of a call's rows, and which rows are known.

        Joint particles are known for all rows or for none. For ``data`` see
        :meth:`guides.inference.row_memory.RowMemory.read`.

        Returns:
            The cloud, arbitrary in unknown rows, None where nothing is known; bools ``(B,)``.
        """
        plate = density.layout.data_plate
        found: dict[str, Tensor] = {}
        known = torch.ones(1, dtype=torch.bool)
        if plate is not None and _has_rows(density):
            found, known = self.rows.read(plate, data)
        if density.joint:
            whole = bool(known.all()) and _WEIGHTS in self.shared
            known = torch.full_like(known, whole)
            found = {**found, **self.shared}
        if not bool(known.any()):
            return None, known
        # Rows come first in memory, particles come first in a cloud.
        particles = {
            name: found[name] if site.row_dim is None else found[name].movedim(1, 0)
            for name, site in density.sites.items()
        }
        log_weights = found[_WEIGHTS] if density.joint else found[_WEIGHTS].T
        spread = {name: found[f"spread {name}"] for name in density.sites}
        return Cloud(particles, log_weights, spread, torch.zeros_like(log_weights[0])), known

    def write(self, density: ParticleDensity, cloud: Cloud, data: CallData | None = None) -> None:
        """Remember the cloud of a call's rows."""
        rows: dict[str, Tensor] = {}
        for name, value in cloud.particles.items():
            kept = {name: value.detach(), f"spread {name}": cloud.spread[name].detach()}
            if density.sites[name].row_dim is None:
                self.shared |= kept
            else:
                rows |= {**kept, name: kept[name].movedim(0, 1)}
        log_weights = cloud.log_weights.detach().log_softmax(0)
        if density.joint:
            self.shared[_WEIGHTS] = log_weights
        else:
            rows[_WEIGHTS] = log_weights.T
        plate = density.layout.data_plate
        if plate is not None and _has_rows(density):
            self.rows.write(plate, rows, data)

    def state(self) -> dict[str, Any]:
        """Copies of everything, for a resumable run."""
        shared = {name: value.clone() for name, value in self.shared.items()}
        return {"rows": self.rows.state(), "shared": shared}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.rows.set_state(state["rows"])
        self.shared = {name: value.clone() for name, value in state["shared"].items()}


def _has_rows(density: ParticleDensity) -> bool:
    return any(site.row_dim is not None for site in density.sites.values())


def choose(known: Tensor, first: Cloud, second: Cloud) -> Cloud:
    """The first cloud in the rows that are known, the second one in the others."""

    def rows(one: Particles, other: Particles) -> Particles:
        return {
            name: torch.where(known.unsqueeze(-1), value, other[name])
            for name, value in one.items()
        }

    return Cloud(
        rows(first.particles, second.particles),
        torch.where(known, first.log_weights, second.log_weights),
        rows(first.spread, second.spread),
        torch.where(known, first.log_normalizer, second.log_normalizer),
    )
