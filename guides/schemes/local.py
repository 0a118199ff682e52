"""Local: free parameters for every datum, found by the optimizer."""

from __future__ import annotations

from torch import Tensor, nn

from guides.capturing import is_capturing
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group

__all__ = ["Local"]


class Local(Scheme):
    """A table with one row of parameters per datum; one row in all for the global group.

        lam_n = table[n]

    The table has the data plate's full size N, whatever the minibatch that built it. Rows are
    found by the index of the plate.

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
    """

    def __init__(self, init: Tensor, group: Group, call: Call) -> None:
        super().__init__()
        self.plate_name = None if group.plate is None else group.plate.name
        table = init if group.plate is None else init.expand(group.plate.size, -1)
        self.table = nn.Parameter(table.clone())

    def forward(self, group: Group, call: Call) -> Tensor:
        """Rows of the table.

        Raises:
            ValueError: Where the rows of the call are not rows of the table.
        """
        plate = group.plate
        if plate is None:
            return self.table
        num_fitted = self.table.shape[0]
        fix = (
            f"Pass the rows' numbers (plate {plate.name!r} with size={num_fitted} and subsample="
            "index; zoo models take size= and index=), build a new guide for the new rows, or use "
            "an amortized guide."
        )
        if plate.size != num_fitted:
            raise ValueError(
                f"This guide holds free parameters for {num_fitted} rows, but plate "
                f"{plate.name!r} has size {plate.size}: which rows they are is not known. {fix}"
            )
        if plate.index is None:
            return self.table
        index = plate.index.to(self.table.device)
        if is_capturing() or not index.numel():
            return self.table[index]
        if int(index.max()) >= num_fitted or int(index.min()) < 0:
            raise ValueError(
                f"Row numbers must be in 0 .. {num_fitted - 1}, got {int(index.min())} .. "
                f"{int(index.max())}. {fix}"
            )
        return self.table[index]

    def extra_repr(self) -> str:
        """Shape of the table."""
        return f"table={tuple(self.table.shape)}"
