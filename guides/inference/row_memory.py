"""What a loop remembers of every row between its steps: latents, particles, momenta.

Rows are known by their number in the data plate, so that minibatches in any order find what they
left. Numbers that were never written read as absent. A call without row numbers brings rows that
nobody has named: they are those of the last such call only where its data are the same tensors,
unchanged; otherwise two batches of one size would pass for each other.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from guides.inference.same_data import CallData
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
        self._data: CallData | str | None = None
        self._warned = False

    def read(self, plate: Plate, data: CallData | None = None) -> tuple[dict[str, Tensor], Tensor]:
        """What is remembered of the rows of a call.

        Args:
            plate: The data plate of the call.
            data: What a call without row numbers brings; None takes its rows as 0 to B - 1,
                whatever it brings.

        Returns:
            Tensors by name, rows first, zero where nothing was written; and which rows are
            known, ``(B,)`` of bools.
        """
        if self.known is None or len(self.known) != plate.size or self._are_others(plate, data):
            device = None if plate.index is None else plate.index.device
            return {}, torch.zeros(plate.num_rows, dtype=torch.bool, device=device)
        rows = _rows(plate, self.known.device)
        return {name: value[rows] for name, value in self.tensors.items()}, self.known[rows]

    def write(
        self, plate: Plate, tensors: dict[str, Tensor], data: CallData | None = None
    ) -> None:
        """Remember the rows of a call.

        Args:
            plate: The data plate of the call.
            tensors: By name, shape ``(B, ...)``.
            data: See :meth:`read`.

        Warns:
            UserWarning: Once, where rows without numbers make others forgotten.
        """
        others = self._are_others(plate, data)
        if others and self.known is not None and not self._warned:
            self._warned = True
            warnings.warn(
                "A step without index= remembers its rows for as long as steps bring the same "
                "tensors, unchanged; this one brings others, and starts afresh. With minibatches "
                "pass size= and index= of the rows; where every call brings the same rows in the "
                "same order, in whatever tensors, pass rows_by_position=True to the loop.",
                UserWarning,
                stacklevel=2,
            )
        if plate.index is None:
            self._data = data
        if self.known is None or len(self.known) != plate.size or others:
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

    def _are_others(self, plate: Plate, data: CallData | None) -> bool:
        """Whether a call without row numbers may bring other rows than those remembered."""
        if plate.index is not None or data is None:
            return False
        if isinstance(self._data, str):
            # From a saved state: then values tell, once.
            if self._data != data.digest():
                return True
            self._data = data
        return self._data is None or not self._data.same(data)

    def state(self) -> dict[str, object]:
        """Copies of everything, for a resumable run."""
        return {
            "tensors": {name: value.clone() for name, value in self.tensors.items()},
            "known": None if self.known is None else self.known.clone(),
            "data": self._data.digest() if isinstance(self._data, CallData) else self._data,
        }

    def set_state(self, state: dict[str, object]) -> None:
        """Restore what :meth:`state` returned."""
        self.tensors = {k: v.clone() for k, v in state["tensors"].items()}  # type: ignore
        known = state["known"]
        self.known = None if known is None else known.clone()  # type: ignore
        self._data = state.get("data")  # type: ignore


def _rows(plate: Plate, device: torch.device) -> Tensor:
    if plate.index is not None:
        return plate.index.to(device)
    return torch.arange(plate.num_rows, device=device)
