"""One process of ``test_ddp``: half of the rows, gradients averaged by DistributedDataParallel.

Run as ``python -m tests.ddp_worker RANK WORLD_SIZE FOLDER``; writes ``rank<RANK>.pt`` there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import guides
import zoo
from guides.families.family import Family
from guides.families.normal import Normal
from guides.guide import Guide
from guides.objectives import IWELBO, STL, AnalyticELBO, DReG, Objective
from guides.schemes.encoder import Encoder

__all__ = ["CASES", "NUM_ROWS", "FixedNoise", "build", "one_step"]

NUM_ROWS = 8
Z_DIM = 2


class FixedNoise(Normal):
    """The mean-field family with noise that belongs to the rows: equal in every process.

    A process draws for its own rows only, so generators with equal seeds would not do.
    """

    table: Tensor

    def __init__(self, size: int) -> None:
        super().__init__(size)
        generator = torch.Generator().manual_seed(7)
        self.register_buffer("table", torch.randn(3, NUM_ROWS, size, generator=generator))
        self.rows = torch.arange(NUM_ROWS)

    def noise(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """The noise of these rows."""
        return self.table[:, self.rows].expand(*shape, self.noise_size)

    def distribution(self, lam: Tensor) -> TorchDistribution:
        """By :meth:`noise`, not by a generator of torch's."""
        return Family.distribution(self, lam)


CASES: dict[str, tuple[str, Objective]] = {
    # No noise at all: the loss is an energy.
    "delta": ("delta", AnalyticELBO()),
    "analytic_elbo": ("normal", AnalyticELBO(3)),
    "stl": ("normal", STL(3)),
    "iwelbo": ("normal", IWELBO(3)),
    "dreg": ("normal", DReG(3)),
}


def build(case: str) -> tuple[Any, Guide, Tensor]:
    """Model, guide and all rows: the same in every process."""
    torch.manual_seed(0)
    model = zoo.VAE(x_dim=5, z_dim=Z_DIM, hidden=(4,))
    x = model(size=NUM_ROWS).detach()
    if CASES[case][0] == "delta":
        guide = guides.make("amortized_delta", model, x, hidden=(6,))
    else:
        guide = Guide(model, x, family=FixedNoise, scheme=Encoder)
    return model, guide, x


def one_step(
    case: str, rows: Tensor, *, parallel: bool
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients, and parameters after one step of gradient descent."""
    model, guide, x = build(case)
    family = guide.families["data"]
    if isinstance(family, FixedNoise):
        family.rows = rows
    elbo: torch.nn.Module = CASES[case][1](model, guide)
    named = dict(elbo.named_parameters())
    if parallel:
        elbo = DistributedDataParallel(elbo)
    optim = torch.optim.Adam(elbo.parameters(), lr=0.01)
    loss = elbo(x[rows], size=NUM_ROWS, index=rows)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    optim.step()
    return loss.detach(), gradients, {name: p.detach().clone() for name, p in named.items()}


def _main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size
    )
    rows = torch.arange(NUM_ROWS).chunk(world_size)[rank]
    results = {case: one_step(case, rows, parallel=True) for case in CASES}
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
