"""What a loop remembers of every row between its steps: latents, particles, momenta.

Rows are known by their number in the data plate, so that minibatches in any order find what they
left. Numbers that were never written read as absent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from guides.sites import Plate

__all__ = ["RowMemory"]


class RowMemory:
    """Tensors by name and row number, detached, on the device of what was written.

    Example:
        >>> plate = Plate("data", -1, num_rows=2, size=5, index=torch.tensor([3, 0]))
        >>> memory = RowMemory()
        >>> memory.write(plate, {"z": torch.tensor([[1.0], [2.0]])})
        >>> found, known = memory.read(Plate("data", -1, 2, 5, index=torch.tensor([0, 1])))
        >>> found["z"].tolist(), known.tolist()
        ([[2.0], [0.0]], [True, False])
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.known: Tensor | None = None

    def read(self, plate: Plate) -> tuple[dict[str, Tensor], Tensor]:
        """What is remembered of the rows of a call.

        Args:
            plate: The data plate of the call.

        Returns:
            Tensors by name, rows first, zero where nothing was written; and which rows are
            known, ``(B,)`` of bools.
        """
        if self.known is None or len(self.known) != plate.size:
            device = None if plate.index is None else plate.index.device
            return {}, torch.zeros(plate.num_rows, dtype=torch.bool, device=device)
        rows = _rows(plate, self.known.device)
        return {name: value[rows] for name, value in self.tensors.items()}, self.known[rows]

    def write(self, plate: Plate, tensors: dict[str, Tensor]) -> None:
        """Remember the rows of a call.

        Args:
            plate: The data plate of the call.
            tensors: By name, shape ``(B, ...)``.
        """
        if self.known is None or len(self.known) != plate.size:
            device = next(iter(tensors.values())).device
            self.known = torch.zeros(plate.size, dtype=torch.bool, device=device)
            self.tensors = {}
        rows = _rows(plate, self.known.device)
        for name, value in tensors.items():
            kept = self.tensors.get(name)
            if kept is None or kept.shape[1:] != value.shape[1:] or kept.dtype != value.dtype:
                kept = value.new_zeros((plate.size, *value.shape[1:]))
                self.tensors[name] = kept
            kept[rows] = value.detach()
        self.known[rows] = True

    def state(self) -> dict[str, object]:
        """Copies of everything, for a resumable run."""
        return {
            "tensors": {name: value.clone() for name, value in self.tensors.items()},
            "known": None if self.known is None else self.known.clone(),
        }

    def set_state(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state` returned."""
        self.tensors = {k: v.clone() for k, v in state["tensors"].items()}  # type: ignore
        known = state["known"]
        self.known = None if known is None else known.clone()  # type: ignore


def _rows(plate: Plate, device: torch.device) -> Tensor:
    if plate.index is not None:
        return plate.index.to(device)
    return torch.arange(plate.num_rows, device=device)
