"""Steps of predictive coding as captured graphs: relaxation, gradients and optimizer in one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guides.capture.arguments import Arguments, flatten, refuse
from guides.capture.graph import CaptureError
from guides.capture.kind import Compiled, Kind
from guides.capture.kind import Program as Captured
from guides.capture.steps import choose_mode, rng_devices
from guides.energy import LogJoint
from guides.inference.checks import capture

if TYPE_CHECKING:
    import pyro.optim

__all__ = ["CapturedStep"]

_MOST_KINDS = 8


class CapturedStep:
    """What a loop needs to run its ``step`` as one graph of tensor operations.

    A loop gives :meth:`_outcome`, the differentiable part of a step, which its eager step runs
    too; :meth:`_tensors` and :meth:`_put_tensors`, the state that it keeps between steps and that
    a graph takes as inputs and returns as outputs; and :meth:`_settings`, what it depends on.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any] | None
    optim: pyro.optim.PyroOptim
    gradient_evaluations: int
    tolerance: float
    _steps: int

    def _set_mode(self, mode: str) -> None:
        self.mode, self._fallback = choose_mode(mode)
        self._kinds: dict[Any, Kind] = {}
        self._cost: dict[Any, int] = {}

    @property
    def compiled(self) -> list[Compiled]:
        """What became of every kind of call of :meth:`step` so far, unless all are eager."""
        return [kind.report() for kind in self._kinds.values()]

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        raise NotImplementedError

    def _outcome(self, log_joint: LogJoint) -> tuple[Tensor, Tensor]:
        """What a step returns, a scalar, and the loss whose gradient the parameters follow."""
        raise NotImplementedError

    def _tensors(self) -> dict[str, Tensor]:
        """State of the loop that a captured step takes as inputs, by name."""
        raise NotImplementedError

    def _put_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Set the state that :meth:`_tensors` returned."""
        raise NotImplementedError

    def _settings(self) -> tuple[Any, ...]:
        """What a step depends on in this object, and which state it has."""
        raise NotImplementedError

    def _refusal(self) -> str | None:
        """Why no step of this object, as it is set, can be captured; None where it can."""
        return None

    def _touched(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Parameters of the programs whose parameters may learn, by name."""
        return capture(self.model, args, kwargs)

    def _refresh(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Renew, before a captured step, what is not renewed in every step."""

    def _compiled_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
        """The step by a graph; None where no graph stands for it."""
        arguments = flatten(args, kwargs)
        key = (arguments.key, *self._settings())
        kind = self._kinds.get(key)
        if kind is None and len(self._kinds) >= _MOST_KINDS:
            warnings.warn(
                f"{_MOST_KINDS} kinds of calls were captured, and this is another one; it "
                "runs eagerly. Pass numbers that change as tensors, and batches of few sizes.",
                UserWarning,
                stacklevel=3,
            )
            return None
        if kind is None:
            kind = self._kinds[key] = Kind(
                lambda: self._setup(arguments, key),
                self.optim,
                mode=self.mode,
                reason=self._fallback,
            )
        kind.optim = self.optim
        if not kind.is_current():
            kind.renew(lambda: self._setup(arguments, key))
        if kind.graph is None:
            return None
        # The rows and the start that the step itself draws.
        with torch.random.fork_rng(rng_devices()):
            self._refresh(args, kwargs)
        state = self._tensors()
        losses, extras = kind.steps([*arguments.tensors, *state.values()], None)
        self._put_tensors(dict(zip(state, extras, strict=True)))
        self.gradient_evaluations += self._cost[key]
        self._steps += 1
        return float(losses)

    def _setup(self, arguments: Arguments, key: Any) -> Captured:
        refused = refuse(arguments)
        if refused is not None:
            raise CaptureError(refused)
        refused = self._refusal()
        if refused is not None:
            raise CaptureError(refused)
        if self.tolerance:
            raise CaptureError("tolerance ends a relaxation by the values of its gradients")
        args, kwargs = arguments.build(arguments.tensors)
        used = self._touched(args, kwargs)
        parameters = list({id(t): t for t in used.values() if t.requires_grad}.values())
        state = self._tensors()

        def function(*data: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
            count = len(arguments.tensors)
            given, named = arguments.build(data[:count])
            # What the step changes in this object is put back: the graph returns it instead.
            before, steps, spent = self._tensors(), self._steps, self.gradient_evaluations
            self._put_tensors(dict(zip(state, data[count:], strict=True)))
            self._steps = 1  # no refresh inside
            try:
                log_joint = self._log_joint(given, named)
                energy, loss = self._outcome(log_joint)
                with torch.enable_grad():
                    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
                self.gradient_evaluations += max(1, log_joint.layout.num_rows)
                moved = list(self._tensors().values())
                self._cost[key] = self.gradient_evaluations - spent
            finally:
                self._put_tensors(before)
                self._steps, self.gradient_evaluations = steps, spent
            return energy.detach(), list(grads), moved

        data = [*arguments.tensors, *state.values()]
        return Captured(function, data, used, parameters, (self.model, self.guide))
