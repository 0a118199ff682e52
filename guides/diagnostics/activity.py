"""ActiveUnits: which latents the data move, and which a posterior leaves silent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guides.arguments import check_number
from guides.draws import Draws, draw
from guides.inference.switched_off import site_switched_off
from guides.probe import Program
from guides.sites import Site

__all__ = ["ActiveUnits", "active_units"]


@dataclass(frozen=True)
class ActiveUnits:
    """How much of every latent coordinate's variance the data explain.

    Args:
        shares: Part of the variance by site, ``(K,)`` for K unconstrained coordinates of a row,
            from 0 (silent) to 1; NaN where fewer than two rows have the coordinate.
        threshold: Share from which a unit counts as active.
        num_samples: Number of draws S of each row.
    """

    shares: dict[str, Tensor]
    threshold: float
    num_samples: int

    @property
    def active(self) -> dict[str, Tensor]:
        """Which units are active by site, ``(K,)``."""
        return {name: share > self.threshold for name, share in self.shares.items()}

    @property
    def counts(self) -> dict[str, int]:
        """Number of active units by site."""
        return {name: int(active.sum()) for name, active in self.active.items()}

    def __repr__(self) -> str:
        """Active units of all, site by site."""
        parts = [f"{name}: {n} of {len(self.shares[name])}" for name, n in self.counts.items()]
        return f"ActiveUnits({', '.join(parts)} above {self.threshold:g})"


def active_units(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 100,
    threshold: float = 0.01,
    data_plate: str | None = "auto",
) -> ActiveUnits:
    """The latents of the rows that follow the data: a check for posteriors that fell silent.

        between = Var_n E_q[u_n]          over the rows n, unbiased for S draws a row
        within  = E_n Var_q[u_n]
        share   = between / (between + within)

    u are the unconstrained coordinates of a latent. A unit that q leaves at its prior whatever
    the data has share zero: neither model nor guide uses it, and no score warns of it. For a
    standard normal prior that q meets on average, the share is the activity of Burda et al.,
    whose threshold is 0.01. It is resolved to about ``sqrt(2 / rows) / num_samples``.

    Rows whose mask switches a latent off do not count for it. In a guide of sequences the draws
    of a step include what the steps before it were drawn to be.

    References:
        | Importance weighted autoencoders (Burda, Grosse & Salakhutdinov, 2016), section 5.2
        | https://arxiv.org/abs/1509.00519

    Args:
        model: The program.
        guide: Any guide for it with a density.
        *args: Positional arguments of the call, of at least two rows.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws S of each row, at least 2.
        threshold: Share from which a unit counts as active, in [0, 1).
        data_plate: See :func:`guides.layout.layout`.

    Raises:
        ValueError: Where no latent is in the data plate, for fewer than two rows, or a number out
            of its range.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         used = pyro.sample("used", dist.Normal(0.0, 1.0))
        ...         pyro.sample("silent", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(used, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("used", dist.Normal(x / 2, 0.5**0.5))
        ...         pyro.sample("silent", dist.Normal(0.0, 1.0))
        >>> active_units(model, guide, torch.randn(200))
        ActiveUnits(used: 1 of 1, silent: 0 of 1 above 0.01)
    """
    check_number("num_samples", num_samples, integer=True, least=2)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be in [0, 1), got {threshold}.")
    draws = draw(model, guide, args, model_kwargs, num_samples=num_samples, data_plate=data_plate)
    sites = {name: s for name, s in draws.layout.sites.items() if s.row_dim is not None}
    if not sites:
        raise ValueError(
            "Active units compare the posteriors of rows, but no latent of this program is in a "
            "data plate. Name the plate of the rows by data_plate=, if there is one."
        )
    if draws.layout.num_rows < 2:
        raise ValueError(
            f"Active units compare the posteriors of rows, but this call has "
            f"{draws.layout.num_rows}. Call with at least two."
        )
    shares = {name: _share(site, draws) for name, site in sites.items()}
    return ActiveUnits(shares, threshold, num_samples)


def _share(site: Site, draws: Draws) -> Tensor:
    values = draws.values[site.name]
    packed = torch.stack([site.flatten(site.unconstrain(value)) for value in values])  # (S, B, K)
    on = ~site_switched_off(site)  # (B, K)
    rows = on.sum(0)
    zero = torch.zeros_like(packed[0])
    loc = torch.where(on, packed.mean(0), zero)
    within = torch.where(on, packed.var(0), zero).sum(0) / rows
    centered = torch.where(on, loc - loc.sum(0) / rows, zero)
    spread = centered.square().sum(0) / (rows - 1)
    between = (spread - within / len(packed)).clamp(min=0)  # draws of a mean spread it, too
    total = between + within
    share = torch.where(total > 0, between / total, torch.zeros_like(total))
    return torch.where(rows > 1, share, torch.full_like(share, torch.nan))
