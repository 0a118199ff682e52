"""SequenceGuide: a posterior over the latents of a sequence that follows their order in time.

    mean field      q(z_t | x_t)                         or q(z_t | x_1 .. x_T) with both networks
    filtering       q(z_t | z_{t-1}, x_1 .. x_t)
    smoothing       q(z_t | z_{t-1}, x_t .. x_T)         the form of the exact posterior

The Markov structure is read from the program (:mod:`guides.sequences.steps`); one set of networks
serves every step, so that sequences may be longer than any that was trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from guides.capturing import is_capturing
from guides.families.family import Family
from guides.guide import ProgramGuide, start_of
from guides.layout import Layout, layout
from guides.probe import Program
from guides.schemes.local import Local
from guides.schemes.scheme import Call
from guides.sequences.context import Context
from guides.sequences.product import Product
from guides.sequences.statistics import statistics
from guides.sequences.steps import Step, hides_data, present_entries, read_steps, step_rows
from guides.sites import Group

__all__ = ["SequenceCall", "SequenceGuide"]


@dataclass(frozen=True)
class SequenceCall(Call):
    """A call of a guide of sequences.

    Args:
        steps: Its steps.
        context: Summaries of the observations, ``(B, H)`` for every step.
        terms: What counts at each step beside its latents, for guides that run the program.
    """

    steps: tuple[Step, ...] = ()
    context: tuple[Tensor, ...] = field(default=(), repr=False)
    terms: tuple[tuple[str, ...], ...] = ()


class SequenceGuide(ProgramGuide):
    """A posterior of sequences, step by step.

        c_t   = summaries of x around step t                    guides.sequences.context
        lam_t = init + W [c_t, z_{t-1}] + V silu(U [c_t, z_{t-1}])
        u_t   ~ family(lam_t)                                   in unconstrained space

    With ``combiner="average"`` it is the structured network of Krishnan et al.,

        h_t   = (tanh(A z_{t-1} + a) + l_t + r_t) / number of terms
        lam_t = init + W h_t + b

    and with ``combiner="product"`` each of z_{t-1}, l_t and r_t has a Gaussian of its own, which
    are multiplied (:mod:`guides.sequences.product`): without z_{t-1}, in
    ``mean_field_smoothing_normal``, the mean-field network from left and right (MF-LR).

    Steps that a mask switches off count neither in q nor in the model. Where a mask takes data
    from a step that the row has, the networks see zeros, after centering, and beside them which
    data there are.

    References:
        | Structured inference networks for nonlinear state space models (Krishnan, Shalit &
        | Sontag, 2017) https://arxiv.org/abs/1609.09869
        | Sequential neural models with stochastic layers (Fraccaro et al., 2016)
        | https://arxiv.org/abs/1605.07571

    Args:
        model: Any Pyro program with a data plate over sequences.
        *args: Positional arguments of an example call; how long its sequences are does not
            matter.
        family: A callable from a packed size K to a family.
        past: Whether q of a step sees the observations before it.
        future: Whether q of a step sees the observations after it.
        markov: Whether q of a step is given the draw of the step before.
        recurrent: Size of the recurrent states.
        cell: ``"gru"``, ``"lstm"`` or ``"rnn"``.
        hidden: Width of the hidden layer of the ``"network"`` combiner.
        combiner: ``"network"``, ``"average"`` or ``"product"``.
        missing: Whether data may be missing at steps that a row has. By default where they are in
            the example call, or its data have a mask and its latents none.
        model_kwargs: Keyword arguments of the example call.
        data_plate: See :func:`guides.layout.layout`.
        name: Prefix of the guide's parameters in Pyro's store; unique by default.

    Raises:
        ValueError: Where the program has no steps that look alike, or an option fits none.

    Example:
        >>> import pyro
        >>> from guides.families.normal import Normal
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = torch.zeros(len(x))
        ...         for t in pyro.markov(range(x.shape[1])):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> guide = SequenceGuide(model, torch.randn(5, 3), family=Normal, recurrent=8)
        >>> len(guide(torch.randn(2, 7)))
        7
    """

    amortized = True
    missing = False

    shift: Tensor
    scale: Tensor
    init: Tensor
    draw_shift: Tensor
    draw_scale: Tensor

    def __init__(
        self,
        model: Program,
        *args: Any,
        family: Callable[[int], Family],
        past: bool = True,
        future: bool = True,
        markov: bool = True,
        recurrent: int = 64,
        cell: str = "gru",
        hidden: int = 64,
        combiner: str = "network",
        missing: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        data_plate: str | None = "auto",
        name: str | None = None,
    ) -> None:
        kwargs = {} if model_kwargs is None else dict(model_kwargs)
        super().__init__(model, args, kwargs, data_plate=data_plate, name=name)
        if combiner not in ("network", "average", "product"):
            raise ValueError(
                f'combiner must be "network", "average" or "product", got {combiner!r}.'
            )
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}.")
        self.past, self.future, self.markov = past, future, markov
        self.combiner = combiner
        read = self._layout(args, kwargs, None)
        self._example = read
        steps = read_steps(read)
        first = next(group for group in read.groups if group.plate is not None)
        self.step_size = first.size
        self.step_features = steps[0].inputs.shape[1]
        member = family(first.size).to(first.device)
        self.family = member.to(first.dtype) if first.dtype.is_floating_point else member
        self.has_density = self.family.has_density
        self.jacobian = self.has_density
        init = self.family.init(start_of(first))
        self.register_buffer("init", init.clone())
        # A mask of the data alone counts even where it hides nothing, here.
        alone = any(step.present is not None and step.mask is None for step in steps)
        self.missing = alone or hides_data(steps) if missing is None else missing
        shift, scale = statistics(steps, init, self.missing)
        self.register_buffer("shift", shift)
        self.register_buffer("scale", scale)
        features = self.step_features * (2 if self.missing else 1)
        self.network = Context(features, recurrent, past, future, cell, init)
        self._combine(init, recurrent, hidden)
        self.global_family: Family | None = None
        self.global_scheme: nn.Module | None = None
        above = read.group("global")
        if above is not None:
            self.global_family = family(above.size).to(above.device)
            self.global_scheme = Local(
                self.global_family.init(start_of(above)), above, self._call(args, kwargs, read)
            )

    def _combine(self, init: Tensor, recurrent: int, hidden: int) -> None:
        """The networks from summaries and the last draw to parameters."""
        size = self.step_size
        self.start = nn.Parameter(torch.zeros_like(init[:size])) if self.markov else None

        def linear(features: int, out: int) -> nn.Linear:
            return nn.Linear(features, out).to(init)

        if self.combiner == "product":
            widths = [recurrent] * (int(self.past) + int(self.future))
            widths += [size] if self.markov else []
            self.product = Product(self.family, init, widths)
            return
        if self.combiner == "average":
            if not (self.past or self.future):
                raise ValueError(
                    'combiner="average" averages states of recurrent networks: pass past=True or '
                    "future=True."
                )
            self.of_draw = linear(size, recurrent) if self.markov else None
            self.head = linear(recurrent, len(init))
        else:
            width = self.network.size + (size if self.markov else 0)
            self.inner = nn.Sequential(linear(width, hidden), nn.SiLU())
            self.skip = linear(width, len(init))
            self.head = linear(hidden, len(init))
            with torch.no_grad():
                self.skip.weight.mul_(0.1)
                self.skip.bias.zero_()
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.zero_()

    def _layout(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        indices: Mapping[str, Tensor] | None,
    ) -> Layout:
        # Not the parent's: the sites of a call are as many as its steps.
        read = layout(
            self.model,
            args,
            kwargs,
            data_plate=self.data_plate,
            indices=indices,
            gradients=self._learned_support and torch.is_grad_enabled(),
        )
        steps = read_steps(read)
        above = [name for name, site in read.sites.items() if site.row_dim is None]
        partition = {"global": above} if above else {}
        partition |= {f"step_{t + 1}": list(step.sites) for t, step in enumerate(steps)}
        read = read.split(partition)
        size = next(group.size for group in read.groups if group.plate is not None)
        built = getattr(self, "step_size", size), getattr(self, "step_features", None)
        if built[0] != size or built[1] not in (None, steps[0].inputs.shape[1]):
            raise ValueError(
                f"The guide was built for steps of {built[0]} latent coordinates and {built[1]} "
                f"observed features, but those of this call have {size} and "
                f"{steps[0].inputs.shape[1]}. Call with data of the same kind, or build a new "
                "guide."
            )
        return read

    def _call(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Layout
    ) -> SequenceCall:
        steps = tuple(read_steps(read))
        context: tuple[Tensor, ...] = ()
        if hasattr(self, "network"):
            inputs = torch.stack([step.inputs for step in steps], 1).to(self.init)
            inputs = (inputs - self.shift) / self.scale
            if self.missing:
                present = present_entries(steps)
                inputs = torch.where(present, inputs, torch.zeros_like(inputs))
                inputs = torch.cat([inputs, present.to(inputs)], -1)
            elif not is_capturing() and hides_data(steps):
                raise ValueError(
                    "A mask takes data from steps that their rows have, but the guide was built "
                    "from a call in which no data were missing. Build it with the mask, or with "
                    "missing=True."
                )
            # Taken apart at once: the gradient of one step alone would be as large as all T.
            # Objectives ask for a call outside of forward, where parameters would not be seen.
            with self._pyro_context:
                context = self.network(inputs, [step.mask for step in steps]).unbind(1)
        return SequenceCall(self.model, args, dict(kwargs), read, steps=steps, context=context)

    def group_mask(self, group: Group) -> Tensor | None:
        """Rows that have the step of the group."""
        return step_rows(group)

    def step_parameters(self, position: int, call: SequenceCall) -> Tensor:
        """Parameters of q of a step, ``(*S, B, P)``.

        Args:
            position: Which step, from 0.
            call: The call, with the draws of the step before in ``upstream``.
        """
        context = call.context[position]  # (B, H)
        before = self._before(position, call)
        if self.combiner == "product":
            seen = list(context.split(self.network.recurrent, -1))
            multiplied: Tensor = self.product(seen if before is None else [*seen, before])
            return multiplied
        if self.combiner == "average":
            parts = list(context.split(self.network.recurrent, -1))
            if self.of_draw is not None and before is not None:
                parts.append(torch.tanh(self.of_draw(before)))
            return self.init + self.head(sum(parts[1:], parts[0]) / len(parts))
        if before is not None:
            left = before.shape[:-1]
            context = torch.cat([context.expand(*left, -1), before], -1)
        result: Tensor = self.init + self.skip(context) + self.head(self.inner(context))
        return result

    def _before(self, position: int, call: SequenceCall) -> Tensor | None:
        """The draw of the step before, ``(*S, B, K)``; a learned vector before the first."""
        if self.start is None:
            return None
        if position == 0:
            return self.start.expand(call.layout.num_rows, -1)
        return call.draws(f"step_{position}")

    def group_distribution(
        self, group: Group, call: Call, upstream: Mapping[str, Tensor]
    ) -> dist.TorchDistribution:
        """The family at the parameters of the step."""
        if group.plate is None:
            family, scheme = self._globals()
            return family.distribution(scheme(group, call))
        assert isinstance(call, SequenceCall)
        position = int(group.name.removeprefix("step_")) - 1
        lam = self.step_parameters(position, replace(call, upstream=upstream))
        return self.family.distribution(group.batch(lam))

    def _globals(self) -> tuple[Family, nn.Module]:
        """Family and scheme of the latents outside the plate."""
        if self.global_family is None or self.global_scheme is None:
            raise ValueError("This guide was built for a program without global latents.")
        return self.global_family, self.global_scheme

    def group_location(self, group: Group, call: Call) -> Tensor:
        """The family's location, each step given the location of the one before."""
        if group.plate is None:
            family, scheme = self._globals()
            return family.location(scheme(group, call))
        assert isinstance(call, SequenceCall)
        position = int(group.name.removeprefix("step_")) - 1
        return self.family.location(self.step_parameters(position, call))

    def __repr__(self) -> str:
        """What q of a step is given."""
        given = ["z_{t-1}"] if self.markov else []
        given.append(
            {
                (True, True): "x_1 .. x_T",
                (True, False): "x_1 .. x_t",
                (False, True): "x_t .. x_T",
                (False, False): "x_t",
            }[(self.past, self.future)]
        )
        return (
            f"SequenceGuide(q(z_t | {', '.join(given)}): {type(self.family).__name__}, "
            f"{self.step_size} coordinates a step, {self.combiner} combiner, amortized: yes)"
        )
