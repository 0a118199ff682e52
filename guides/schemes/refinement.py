"""Refinement: parameters of q that start somewhere and are improved row by row.

    lam_0 = start(x)                              an encoder, or the prior
    lam_t = update(lam_{t-1}, ...)                t = 1 .. T

What the schemes of this kind share: where they start, how many iterations they take in training
and in evaluation, and when a row is done.
"""

from __future__ import annotations

import abc
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from guides.arguments import check_number
from guides.energy import LogJoint
from guides.families.family import Family, inverse_positive, positive
from guides.ripple import ripple
from guides.rows import take_rows
from guides.schemes.bound import RowBound
from guides.schemes.encoder import Encoder
from guides.schemes.scheme import Call, Scheme
from guides.sites import Group

__all__ = ["Refinement", "State"]

# Draws of the prior from which its width is read once.
_NUM_DRAWS = 64

State = dict[str, Tensor]
"""What an update carries from one iteration to the next, all ``(B, ...)``; ``lam`` among it.

Rows where ``refused`` is true have not moved, but will try again.
"""


class Refinement(Scheme):
    """The part that refined schemes share.

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        num_iterations: Updates T.
        eval_iterations: Updates in evaluation mode (``guide.eval()``); by default as many.
        num_particles: Draws of the inner bound.
        shared_noise: Use the same inner noise for every row, which makes the parameters of a row
            independent of the batch that it is in.
        tolerance: A row stops when no parameter moves by more than this; zero for never.
        start: ``"encoder"`` or ``"prior"``: where the model's own predictions put the latents,
            plus a learned offset shared by all rows.
        start_scale: Scale of q at the prior start: ``"family"``, which is ``init_scale``, or
            ``"prior"``, where the offset begins such that q is as wide as the prior around its
            predictions. Families without a scale start as they are.
        data_args: See :func:`guides.rows.data_args_of`. Where the model's attribute or this
            states it, rows that have stopped are dropped from the computation; otherwise they
            are only held.
        inputs: See :class:`guides.schemes.encoder.Encoder`.
        encoder: See there.
        hidden: See there.
        features: See there.
    """

    amortized = True
    reads_model = True

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        num_iterations: int,
        eval_iterations: int | None = None,
        num_particles: int = 1,
        shared_noise: bool = False,
        tolerance: float = 0.0,
        start: str = "encoder",
        start_scale: str = "family",
        data_args: Mapping[str, int] | None = None,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        features: str | Mapping[str, str] = "auto",
    ) -> None:
        super().__init__()
        if start_scale not in ("family", "prior"):
            raise ValueError(f'start_scale must be "family" or "prior", got {start_scale!r}.')
        if start not in ("encoder", "prior"):
            raise ValueError(f'start must be "encoder" or "prior", got {start!r}.')
        for name, count in (
            ("num_iterations", num_iterations),
            ("num_particles", num_particles),
            ("eval_iterations", 0 if eval_iterations is None else eval_iterations),
        ):
            check_number(name, count, integer=True)
        check_number("tolerance", tolerance)
        if data_args is not None and not isinstance(data_args, Mapping):
            raise TypeError(
                "data_args must map names of arguments to the axis of their rows, "
                f'{{"x": 0}}, got {data_args!r}.'
            )
        if num_iterations < 1 or num_particles < 1 or tolerance < 0:
            raise ValueError(
                "num_iterations and num_particles must be at least 1 and tolerance at least 0, "
                f"got {num_iterations}, {num_particles} and {tolerance}."
            )
        if eval_iterations is not None and eval_iterations < 0:
            raise ValueError(f"eval_iterations must be at least 0, got {eval_iterations}.")
        self.num_iterations = num_iterations
        self.eval_iterations = eval_iterations
        self.num_particles = num_particles
        self.shared_noise = shared_noise
        self.tolerance = tolerance
        self.starts_at = start
        self.data_args = data_args
        self.size = group.size
        if start == "encoder":
            self.encoder = Encoder(
                init, group, call, inputs=inputs, encoder=encoder, hidden=hidden, features=features
            )
        else:
            self.offset = nn.Parameter(torch.zeros_like(init))
        log_joint = LogJoint(call.model, call.args, call.kwargs, layout=call.layout)
        if start == "prior" and start_scale == "prior" and call.guide is not None:
            family = cast(Family, call.guide.families[group.name])
            if family.has_scale:
                with torch.no_grad():
                    self.offset.copy_(_to_prior_scale(family, init, group, log_joint))
        jacobian = bool(call.guide and call.guide.jacobian)
        _check_rows(group, log_joint, jacobian)

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of its constructor that are numbers, switches or words, as they are now."""
        names = inspect.signature(type(self).__init__).parameters
        values = {name: vars(self)[name] for name in names if name in vars(self)}
        plain = (bool, int, float, str, type(None))
        return {name: value for name, value in values.items() if type(value) in plain}

    def __setattr__(self, name: str, value: Any) -> None:
        """Check the settings of the iterations, whenever they are set."""
        least = {"num_iterations": 1, "num_particles": 1, "eval_iterations": 0}.get(name)
        if least is not None and not (name == "eval_iterations" and value is None):
            check_number(name, value, integer=True, least=least)
        elif name == "tolerance":
            check_number(name, value, least=0)
        super().__setattr__(name, value)

    @property
    def iterations(self) -> int:
        """Updates that the next call takes."""
        if self.training or self.eval_iterations is None:
            return self.num_iterations
        return self.eval_iterations

    def start(self, group: Group, call: Call) -> Tensor:
        """Parameters before any refinement, ``(B, P)``."""
        if self.starts_at == "encoder":
            return self.encoder(group, call)
        log_joint = LogJoint(call.model, call.args, call.kwargs, layout=call.layout)
        loc = call.layout.pack(log_joint.predictions())[group.name]
        if call.guide is None:
            raise ValueError("A refined guide needs the guide in its call.")
        return cast(Family, call.guide.families[group.name]).init(loc) + self.offset

    def forward(self, group: Group, call: Call) -> Tensor:
        """Refined parameters ``(B, P)``."""
        lam = self.start(group, call)
        if self.iterations == 0:
            return lam
        return self.refine(lam, group, call)

    @abc.abstractmethod
    def refine(self, lam: Tensor, group: Group, call: Call) -> Tensor:
        """Improve parameters ``(B, P)``."""

    def bound(self, group: Group, call: Call) -> RowBound:
        """The bound that is improved."""
        return RowBound(
            group, call, num_particles=self.num_particles, shared_noise=self.shared_noise
        )

    def iterate(
        self,
        state: State,
        update: Callable[[int, State, RowBound, Tensor | None], State],
        group: Group,
        call: Call,
        bound: RowBound,
    ) -> State:
        """Run the updates, row by row until a row stops.

        Args:
            state: State of all rows.
            update: ``(t, state, bound, rows)`` to the next state; ``rows`` are the positions of
                the rows of ``state`` in the call, None for all.
            group: The group.
            call: The call.
            bound: The bound of the call.

        Returns:
            The state at the end.
        """
        if not self.tolerance:
            for t in range(self.iterations):
                state = update(t, state, bound, None)
            return state
        rows: Tensor | None = None
        done = state
        moving = torch.ones(len(state["lam"]), dtype=torch.bool, device=state["lam"].device)
        for t in range(self.iterations):
            new = update(t, state, bound, rows)
            change = (new["lam"] - state["lam"]).detach().abs().amax(-1)
            state = {
                key: torch.where(_column(moving, value), new[key], value)
                for key, value in state.items()
            }
            going = change > self.tolerance
            if "refused" in new:
                # A step that was too long is no sign of having arrived.
                going = going | new["refused"]
            moving = moving & going
            if not bool(moving.any()):
                break
            if self._droppable(call) and int(moving.sum()) <= len(moving) // 2:
                done = _put(done, state, rows)
                keep = moving.nonzero().flatten()
                rows = keep if rows is None else rows[keep]
                state = {key: value[keep] for key, value in state.items()}
                moving = moving[keep]
                bound = self.bound(*self._narrow(call, rows, group))
        return _put(done, state, rows)

    def _droppable(self, call: Call) -> bool:
        stated = self.data_args is not None or getattr(call.model, "data_args", None) is not None
        # A call of fewer rows does not say which rows of a table of free ones they are.
        tables = call.guide is not None and any(
            group.plate is not None and not call.guide.schemes[group.name].amortized
            for group in call.layout.groups
        )
        return stated and not tables and not any(p.random for p in call.layout.plates.values())

    def _narrow(self, call: Call, rows: Tensor, group: Group) -> tuple[Group, Call]:
        """The call for some of its rows only."""
        args, kwargs = take_rows(
            call.model, call.args, call.kwargs, rows, call.layout, self.data_args
        )
        read = call.guide._layout(args, kwargs, None)  # type: ignore[union-attr]
        narrow = Call(call.model, args, kwargs, read, call.guide)
        return read.group(group.name), narrow  # type: ignore[return-value]


def _column(mask: Tensor, value: Tensor) -> Tensor:
    return mask.reshape(-1, *(1,) * (value.dim() - 1))


def _put(done: State, state: State, rows: Tensor | None) -> State:
    if rows is None:
        return state
    return {key: value.index_copy(0, rows, state[key]) for key, value in done.items()}


def _to_prior_scale(family: Family, init: Tensor, group: Group, log_joint: LogJoint) -> Tensor:
    """What to add to the parameters, so that q is as wide as the prior around its predictions."""
    fns = log_joint.run(log_joint.predictions(), density=False).fns
    try:
        draws = torch.stack(
            [
                group.pack({site.name: fns[site.name].sample() for site in group.sites})
                for _ in range(_NUM_DRAWS)
            ]
        )
    except NotImplementedError:
        # An improper prior has no draws, and no width.
        return torch.zeros_like(init)
    prior = _spread(draws).mean(0)
    own, _ = family.push(init, family.noise((8 * _NUM_DRAWS,), init))
    size = family.size
    raw = init[size : 2 * size]
    wanted = inverse_positive(positive(raw) * prior / _spread(own))
    moved = torch.where(wanted.isfinite() & (prior > 0), wanted, raw) - raw
    return torch.cat([torch.zeros_like(moved), moved, torch.zeros_like(init[2 * size :])])


def _spread(draws: Tensor) -> Tensor:
    """Standard deviation over the first dimension, by the median: heavy tails have one, too."""
    return 1.4826 * (draws - draws.median(0).values).abs().median(0).values


def _check_rows(group: Group, log_joint: LogJoint, jacobian: bool) -> None:
    packed: dict[str, Any] = log_joint.layout.pack(log_joint.predictions())

    def others(local: Tensor) -> tuple[Tensor, Tensor]:
        rows, other = log_joint.packed({**packed, group.name: local}, jacobian=jacobian)
        return rows[0], other

    with torch.no_grad():
        # Off the given point, where a coupling may happen to be flat.
        local = packed[group.name]
        point = local + 0.1 * ripple(local)
        first = torch.func.grad(lambda v: others(v)[0])(point)
        outside = torch.func.grad(lambda v: others(v)[1])(point)
    # Where a gradient is out of the range of numbers it says nothing about other rows.
    if any(bool((part.nan_to_num(0.0) != 0).any()) for part in (first[1:], outside)):
        raise ValueError(
            f"Rows of plate {log_joint.layout.data_plate.name!r} are coupled: the latents of one "  # type: ignore[union-attr]
            "row reach another row, or a site outside the plate (batch normalization does so, "
            "too), so they cannot be refined one by one. Use an amortized or a local guide."
        )
