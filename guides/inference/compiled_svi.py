"""CompiledSVI: SVI at the speed of a compiled graph."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Mapping
from typing import Any

import pyro.optim
import torch
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor

from guides.capture.arguments import Arguments, flatten
from guides.capture.arguments import refuse as refuse_arguments
from guides.capture.graph import CaptureError
from guides.capture.kind import Compiled, Kind, Program
from guides.capture.losses import loss_and_grads, refuse
from guides.capture.restarts import Stack
from guides.capture.steps import choose_mode
from guides.inference.checks import capture
from guides.inference.running import Run, Stop, run
from guides.inference.running import _state as saved
from guides.inference.svi import SVI

__all__ = ["Compiled", "CompiledSVI"]

_MOST_KINDS = 8


class CompiledSVI(SVI):
    """Stochastic variational inference in compiled steps, with SVI's interface.

    The first call of a kind runs once as it is, is captured as a graph of tensor operations with
    gradients and optimizer inside, and is compared with the eager program on fresh draws. Later
    calls run the graph: the parameters in Pyro's store and the state of the optimizer change in
    place, so that ``SVI`` can go on from there at any time, and the random stream is that of the
    eager program: with the same seed come the same losses, up to rounding.

    What no graph stands for runs eagerly, and :attr:`compiled` says why: programs that branch on
    values, draws that are not reparameterized, objectives and optimizers that are not known here.
    Another shape of the data, as that of a ragged last batch, gets a graph of its own.

    Python code of the program runs at the capture only. Frozen or replaced parameters, buffers and
    modes of modules, and attributes, closures and globals that the program reads are looked at
    before every call (:mod:`guides.capture.python_state`); after a change it is captured again, a
    few times: pass what moves as a tensor argument.

    Args:
        model: Any Pyro program.
        guide: Any guide for it.
        optim: A ``PyroOptim``; Adam, AdamW, ClippedAdam and SGD become part of the graph, others
            run eagerly on the graph's gradients.
        loss: An objective: ``Trace_ELBO``, ``TraceMeanField_ELBO`` or one of
            ``guides.objectives``.
        mode: ``"inductor"`` compiles, ``"graph"`` captures only and needs no compiler,
            ``"eager"`` is ``SVI``; ``"auto"`` compiles where there is a C++ compiler.
        steps_per_call: Steps in one graph for :meth:`run` on one batch; by default as many, up
            to 16, as keep the time to compile short.
        noise: ``"per_step"`` draws as the program does, from the same random stream;
            ``"per_call"`` draws the normal noise of all steps of a call at once, which is faster
            on small programs and another stream: equal in distribution, not number by number.
        num_restarts: Number of runs R that are made at once, in one graph with one more batch
            dimension. Run 0 starts where the parameters are, the others at perturbations of
            them. The loss is the mean over the runs that are finite; :meth:`run` ends with the
            best run in the parameters; :meth:`chains` draws from all of them.
        jitter: Standard deviation of the perturbations, of unconstrained parameters.
        **options: Passed on to ``pyro.infer.SVI``.

    Attributes:
        compiled: A :class:`Compiled` for every kind of call so far.
        restart_losses: With restarts, the losses of all runs so far, one list of R a step.

    Raises:
        ValueError: For an unknown mode, or fewer than one step a call or run.
        RuntimeError: At the first step, where restarts were asked for and the program has no
            graph.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, guides
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(10)
        >>> guide = guides.make("normal", model, x)
        >>> optim = pyro.optim.Adam({"lr": 0.05})
        >>> svi = CompiledSVI(model, guide, optim, pyro.infer.Trace_ELBO(), mode="graph")
        >>> result = svi.run(20, ((x,), {}))
        >>> len(result.losses), svi.compiled[0].mode
        (20, 'graph')
    """

    def __init__(
        self,
        model: Any,
        guide: Any,
        optim: pyro.optim.PyroOptim,
        loss: Any,
        *,
        mode: str = "auto",
        steps_per_call: int | None = None,
        noise: str = "per_step",
        num_restarts: int | None = None,
        jitter: float = 0.1,
        **options: Any,
    ) -> None:
        counts = {"steps_per_call": steps_per_call, "num_restarts": num_restarts}
        for name, count in counts.items():
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ValueError(f"{name} must be at least 1, an integer; got {count!r}.")
        if noise not in ("per_step", "per_call"):
            raise ValueError(f'noise must be "per_step" or "per_call", got {noise!r}.')
        if jitter < 0:
            raise ValueError(f"jitter must not be negative, got {jitter}.")
        if num_restarts is not None and mode == "eager":
            raise ValueError(
                'Restarts are made in one graph: use mode="auto", "inductor" or "graph".'
            )
        super().__init__(model, guide, optim, loss, **options)
        self.objective = loss
        self.mode, self._fallback = choose_mode(mode)
        self.steps_per_call = steps_per_call
        self.noise = noise
        self._kinds: dict[Any, Kind] = {}
        self._stack = None if num_restarts is None else Stack(num_restarts, jitter)
        self._last: tuple[tuple[Any, ...], Arguments] | None = None
        self._seen: tuple[list[Tensor], list[int]] = ([], [])
        self._programs: tuple[Any, ...] = (model, guide, loss)
        self.restart_losses: list[list[float]] = []

    @property
    def compiled(self) -> list[Compiled]:
        """What became of every kind of call so far."""
        return [kind.report() for kind in self._kinds.values()]

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update; returns the loss before it."""
        if self._is_eager(args, kwargs):
            return super().step(*args, **kwargs)
        loss = self._steps(args, kwargs, None)[0]
        if self._stack is not None:
            self.select(self.best)
        return loss

    def _is_eager(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if self._stack is not None and not self._checked:
            # All runs make the same number of steps, so checks must not cost one.
            self._check({"guide": self.guide, "model": self.model}, args, kwargs)
        if _PYRO_STACK and self._stack is not None:
            raise RuntimeError(
                "Restarts cannot be made inside a handler of Pyro's, which a graph does not see. "
                "Apply the handler to the model or the guide."
            )
        return not self._checked or self.mode == "eager" or bool(_PYRO_STACK)

    def run(
        self,
        num_steps: int,
        batches: Any,
        *,
        stop: Stop | None = None,
        progress: bool = True,
        state: Mapping[str, Any] | None = None,
    ) -> Run:
        """Make many steps; see :func:`guides.inference.running.run`.

        On one batch several steps are made in one call, and ``stop`` is asked after each call.
        """
        if self._stack is None:
            return run(self, num_steps, batches, stop=stop, progress=progress, state=state)
        if state is not None:
            raise ValueError(
                "A run with restarts keeps its runs in this object: call run(...) again with "
                "more steps to go on, and leave state= out."
            )
        result = run(self, num_steps, batches, stop=stop, progress=progress)
        if self.restart_losses:
            self.select(self.best)
            # The state is that of the run in the parameters, for SVI to go on from.
            result.state = saved(self, result.losses)
        return result

    @property
    def best(self) -> int:
        """The restart with the lowest mean loss over the last tenth of its steps."""
        if not self.restart_losses:
            raise ValueError("There are no restarts yet: pass num_restarts= and make steps.")
        window = max(1, len(self.restart_losses) // 10)
        recent = torch.tensor(self.restart_losses[-window:]).mean(0)
        return int(torch.where(torch.isfinite(recent), recent, torch.inf).argmin())

    def select(self, restart: int) -> None:
        """Bring the live parameters and the optimizer to those of one restart."""
        if self._stack is None:
            raise ValueError("There are no restarts: pass num_restarts=.")
        self._stack.select(restart)

    def chains(
        self, num_samples: int, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws from the guide at every restart: a chain each.

        With several starts R-hat says something: runs that ended in other optima disagree. The
        live parameters are left as they are.

        Args:
            num_samples: Draws S of a chain.
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            Constrained values by site, ``(R, S) + site shape``, as ``arviz.from_dict`` takes
            them; and ``{"log_q", "log_p"}``, ``(R, S)``, where the guide has a density.
        """
        from guides.draws import draw

        if self._stack is None:
            raise ValueError("There are no restarts to draw chains from: pass num_restarts=.")
        kept = self._stack.live()
        values: list[dict[str, Tensor]] = []
        scores: list[dict[str, Tensor]] = []
        try:
            for restart in range(self._stack.num_restarts):
                self._stack.select(restart)
                with torch.no_grad():
                    drawn = draw(self.model, self.guide, args, kwargs, num_samples=num_samples)
                values.append(drawn.values)
                scale = drawn.layout.scale
                scores.append(
                    {
                        "log_q": scale * drawn.log_q_rows.sum(-1) + drawn.log_q_global,
                        "log_p": scale * drawn.log_p_rows.sum(-1) + drawn.log_p_global,
                    }
                )
        finally:
            self._stack.restore(kept)
        return (
            {name: torch.stack([chain[name] for chain in values]) for name in values[0]},
            {name: torch.stack([chain[name] for chain in scores]) for name in scores[0]},
        )

    def steps(self, num_steps: int, *args: Any, **kwargs: Any) -> list[float]:
        """Make up to ``num_steps`` steps on one batch, as many as one call of the graph makes."""
        if self._is_eager(args, kwargs):
            return [super().step(*args, **kwargs)]
        return self._steps(args, kwargs, num_steps)

    def _steps(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], most: int | None
    ) -> list[float]:
        programs = (self.model, self.guide, self.objective)
        if not all(map(operator.is_, programs, self._programs)):
            self._kinds.clear()
            self._programs = programs
        arguments = self._arguments(args, kwargs)
        kind = self._kinds.get(arguments.key)
        if kind is None and len(self._kinds) >= _MOST_KINDS:
            if self._stack is not None:
                raise RuntimeError(
                    f"Restarts need a graph, and {_MOST_KINDS} kinds of calls were captured "
                    "already. Pass numbers that change as tensors, and batches of few sizes."
                )
            # Arguments that differ in every call would be captured for ever.
            warnings.warn(
                f"{_MOST_KINDS} kinds of calls were captured, and this is another one; it "
                "runs eagerly. Pass numbers that change as tensors, and batches of few sizes.",
                UserWarning,
                stacklevel=4,
            )
            return [super().step(*args, **kwargs)]
        if kind is None:
            kind = self._kinds[arguments.key] = Kind(
                lambda: self._setup(arguments),
                self.optim,
                mode=self.mode,
                reason=self._fallback,
                steps_per_call=self.steps_per_call,
                stack=self._stack,
                joint_noise=self.noise == "per_call",
            )
        kind.optim = self.optim
        if not kind.is_current():
            kind.renew(lambda: self._setup(arguments))
        if kind.graph is None:
            if self._stack is not None:
                raise RuntimeError(
                    f"Restarts need a graph, and this program has none: {kind.reason}. Run SVI "
                    "once for each start instead."
                )
            return [super().step(*args, **kwargs)]
        if not self._is_finite(arguments.tensors):
            if self._stack is not None:
                raise ValueError("The data contain NaN or infinity; no step was made.")
            # Graphs check no values: the eager step says what is wrong before it moves anything.
            return [super().step(*args, **kwargs)]
        losses: list[Any] = kind.steps(arguments.tensors, most)[0].tolist()
        if self._stack is None:
            return losses
        self.restart_losses += losses
        return [_finite_mean(row) for row in losses]

    def _is_finite(self, tensors: list[Tensor]) -> bool:
        """Whether the data are numbers; looked at again when they are others."""
        marks = [0 if t.is_inference() else t._version for t in tensors]
        seen, known = self._seen
        if marks == known and len(seen) == len(tensors) and all(map(operator.is_, seen, tensors)):
            return True
        if not all(bool(torch.isfinite(t).all()) for t in tensors if t.is_floating_point()):
            return False
        self._seen = (list(tensors), marks)
        return True

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """The call taken apart; not again, where it is the very call before."""
        if self._last is not None:
            values, known = self._last
            given = (len(args), *args, *kwargs, *kwargs.values())
            if len(given) == len(values) and all(map(operator.is_, given, values)):
                return known
        arguments = flatten(args, kwargs)
        # What holds other values may change inside.
        plain = all(isinstance(v, (Tensor, str, int, float)) for v in (*args, *kwargs.values()))
        values = (len(args), *args, *kwargs, *kwargs.values())
        self._last = (values, arguments) if plain else None
        return arguments

    def _setup(self, arguments: Arguments) -> Program:
        refused = refuse(self.objective) or refuse_arguments(arguments)
        if refused is not None:
            raise CaptureError(refused)
        args, kwargs = arguments.build(arguments.tensors)
        touched: dict[str, Tensor] = {}
        for program in (self.guide, self.model):
            touched.update(capture(program, args, kwargs))
        used = {id(tensor): tensor for tensor in touched.values()}.values()
        # Pyro's optimizers go on with what was frozen after it learned.
        parameters = [t for t in used if t.requires_grad or t.grad is not None]
        wanted = [tensor for tensor in parameters if tensor.requires_grad]

        def function(*data: Tensor) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
            given, named = arguments.build(data)
            loss, found = loss_and_grads(
                self.objective, self.model, self.guide, given, named, wanted
            )
            grads = {id(tensor): grad for tensor, grad in zip(wanted, found, strict=True)}
            return loss, [grads.get(id(tensor)) for tensor in parameters], []

        return Program(
            function,
            arguments.tensors,
            touched,
            parameters,
            (self.model, self.guide, self.objective),
            alone=True,
        )


def _finite_mean(losses: list[float]) -> float:
    """The mean over the restarts that are finite; NaN where none is."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan
