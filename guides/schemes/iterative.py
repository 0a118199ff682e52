"""Iterative: a learned network that improves q from gradients of its bound, or from errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from guides.families.family import Family
from guides.schemes.bound import RowBound
from guides.schemes.encoder import Encoder
from guides.schemes.guard import first_better
from guides.schemes.highway import Highway
from guides.schemes.natural_step import TRUST, natural_step
from guides.schemes.recording import Iterate, Refined, active, scale_gradient
from guides.schemes.refinement import Refinement, State
from guides.schemes.scheme import Call
from guides.sites import Group

__all__ = ["ENCODINGS", "UPDATES", "Iterative"]

ENCODINGS = (
    "natural_gradient",
    "gradient",
    "log_gradient",
    "layer_norm_gradient",
    "standard_parameters",
    "errors",
    "parameters",
    "data",
)
UPDATES = ("highway", "direct", "learned_step", "natural_step")
# Draws that compare two bounds, in antithetic pairs.
_NUM_CHECKS = 8
# The updates that follow the gradient, and start with a head that says nothing.
_STEPS = ("learned_step", "natural_step")
_GRADIENTS = ENCODINGS[:4]  # the encodings that read the gradient


class Iterative(Refinement):
    """Iterative amortized inference: one network for every iteration and every row.

        lam_0 = prior or encoder
        g     = d L_n / d lam_n                            of the row's own bound
        e     = encodings of (g, errors, lam, x)           all detached
        h     = highway network(e)
        lam_t = gate(h) lam_{t-1} + (1 - gate(h)) m(h)     update="highway"
        lam_t = m(h)                                       update="direct"
        lam_t = lam_{t-1} + rate(h) F^-1 g + F^-1/2 tanh(m(h))      update="learned_step"
        lam_t = natural_step(lam_{t-1}, g, rate(h), tanh(m(h)))     update="natural_step"

    F is the Fisher information of q, coordinate by coordinate, which makes the learned step
    independent of the units of the latents; ``precondition=False`` steps along the gradient
    itself, ``rate(h) g + m(h)``. The natural step goes the same way in the natural parameters of
    q: precisions first, then locations by the new covariance
    (:func:`guides.schemes.natural_step.natural_step`). From the width of the prior it is close to
    the best q in a few iterations before anything is learned. A family without a scale takes the
    learned step in its place. Gradients of Gaussian families are path gradients, which hardly
    vary from draw to draw near the optimum.

    Nothing is backpropagated from one iteration to the next: ``lam_{t-1}`` and ``g`` enter as
    numbers. Under an ordinary objective the network learns from its last iteration; with
    :class:`guides.objectives.RefinementELBO` it learns from the mean over all iterations, the
    start included, and the model from the last one alone, as published.

    Evaluation may iterate longer than training (``eval_iterations``). What the network says there
    was never learned, so updates beyond ``num_iterations`` shrink as 1 / t, and a row takes one
    only if its own bound rises, at fresh draws and by more than their noise; else a natural step
    without the network, else none. :attr:`evaluations` counts what that costs.

    Encodings, any of them together:

    ``natural_gradient``
        The whitened gradient ``F^-1/2 g``, which has no unit, on a signed logarithmic scale.
    ``gradient``
        The gradient as it is.
    ``log_gradient``
        log(abs(g) + 1e-5) and sign(g): both sizes and signs of gradients that span decades.
    ``layer_norm_gradient``
        Centered and scaled over the coordinates of a row, locations and other parameters apart.
    ``errors``
        Prediction errors of every site of the row, observed and latent: d log p / d loc for
        location-scale sites, ``(value - mean) / variance`` otherwise, on a signed logarithmic
        scale. They need no backward pass.
    ``parameters``
        ``lam_{t-1}``.
    ``standard_parameters``
        ``lam_{t-1}`` from the mean start of the rows that built the guide, in units of q's scale
        there, on a signed logarithmic scale.
    ``data``
        The standardized data, as an encoder reads them.

    References:
        | Iterative amortized inference (Marino, Yue & Mandt, 2018)
        | https://arxiv.org/abs/1807.09356
        | A general method for amortizing variational filtering (Marino, Cvitkovic & Yue, 2018)
        | https://arxiv.org/abs/1811.05090 (the learned step)

    Args:
        init: Parameters of one datum at the start, ``(P,)``.
        group: The group it serves.
        call: The call that built the guide.
        num_iterations: Updates T.
        encodings: What the network reads, see above.
        update: ``"highway"``, ``"direct"``, ``"learned_step"`` or ``"natural_step"``.
        network: Widths of the highway network's layers.
        rate: Rate of a step where its head says nothing, which can at most double it; by default
            0.8 for natural steps and 0.3 for learned ones.
        precondition: Whether the learned step is along ``F^-1 g`` or along ``g``.
        start: ``"prior"`` or ``"encoder"``.
        start_scale: Scale of q at the prior start: ``"prior"``, as published, or ``"family"`` for
            the family's ``init_scale``; an ``init_scale`` given to :func:`guides.make` is one
            that is meant.
        num_particles: Draws of the inner bound: two are antithetic, and leave a gradient far less
            noise than one.
        hidden: Widths of the encoder that starts it.
        **options: See :class:`guides.schemes.refinement.Refinement`.
    """

    init: Tensor
    center: Tensor
    unit: Tensor

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        num_iterations: int = 5,
        encodings: Sequence[str] = ("natural_gradient", "standard_parameters"),
        update: str = "natural_step",
        network: Sequence[int] = (128, 128),
        rate: float | None = None,
        precondition: bool = True,
        eval_iterations: int | None = None,
        num_particles: int = 2,
        shared_noise: bool = False,
        tolerance: float = 0.0,
        start: str = "prior",
        start_scale: str = "prior",
        data_args: Mapping[str, int] | None = None,
        inputs: Callable[..., Tensor] | Sequence[str] | None = None,
        encoder: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        features: str | Mapping[str, str] = "auto",
    ) -> None:
        super().__init__(
            init,
            group,
            call,
            num_iterations=num_iterations,
            eval_iterations=eval_iterations,
            num_particles=num_particles,
            shared_noise=shared_noise,
            tolerance=tolerance,
            start=start,
            start_scale=start_scale,
            data_args=data_args,
            inputs=inputs,
            encoder=encoder,
            hidden=hidden,
            features=features,
        )
        encodings = (encodings,) if isinstance(encodings, str) else tuple(encodings)
        unknown = [name for name in encodings if name not in ENCODINGS]
        if unknown or not encodings:
            raise ValueError(
                f"encodings must be some of {', '.join(ENCODINGS)}, got "
                f"{', '.join(map(repr, unknown)) or 'none'}."
            )
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}.")
        family = None if call.guide is None else cast(Family, call.guide.families[group.name])
        self.natural = (
            update == "natural_step" and precondition and (family is None or family.has_scale)
        )
        if rate is None:
            rate = 0.8 if self.natural else 0.3
        if not network or rate <= 0 or (self.natural and rate >= 1):
            raise ValueError(
                "network needs a layer and rate must be positive (for natural steps below 1), "
                f"got {network} and {rate}."
            )
        self.encodings = encodings
        self.update = update
        self.rate = rate
        self.precondition = precondition
        self.register_buffer("init", init.clone())
        if "data" in encodings:
            # Reads the data as an encoder does; its network is not used.
            self.reader = Encoder(init, group, call, inputs=inputs, hidden=(1,), features=features)
            self.reader.network = nn.Identity()
        if "standard_parameters" in encodings:
            with torch.no_grad():
                # One start for all rows: only its order of magnitude matters.
                first = self.start(group, call)
                unit = self.bound(group, call).family.root(first)
                self.register_buffer("center", first.mean(0))
                self.register_buffer("unit", unit.mean(0))
        with torch.no_grad():
            read = self._read(self._start_of(init, call), group, call)
        options: dict[str, Any] = {"dtype": init.dtype, "device": init.device}
        self.network = Highway(read.shape[-1], tuple(network), **options)
        self.move = nn.Linear(network[-1], init.shape[0], **options)
        self.gate = nn.Linear(network[-1], init.shape[0], **options)
        with torch.no_grad():
            # The first updates are small and the same for every row, whatever the gradients.
            self.move.weight.mul_(0.1)
            self.move.bias.zero_()
            self.gate.weight.zero_()
            self.gate.bias.fill_(0.0 if update in _STEPS else 1.0)
        if update in _STEPS:
            nn.init.zeros_(self.move.weight)
        elif update == "direct":
            del self.gate

    @property
    def needs_gradient(self) -> bool:
        """Whether an update reads the gradient of the bound."""
        return self.update in _STEPS or any(e in _GRADIENTS for e in self.encodings)

    def refine(self, lam: Tensor, group: Group, call: Call) -> Tensor:
        """T updates; returns the last parameters, attached to the last update only."""
        record = active()
        bound = self.bound(group, call)
        features = self._features(group, call)
        iterates: list[Iterate] = []

        def update(t: int, state: State, bound: RowBound, rows: Tensor | None) -> State:
            lam = state["lam"]
            own = features if rows is None or features is None else features[rows]
            with torch.no_grad():
                fixed = lam.detach()
                noise = bound.noise(fixed)
                gradient = None
                if self.needs_gradient or record is not None:
                    gradient = bound.gradient(fixed, noise, weights=record is not None, path=True)
                errors = bound.errors(fixed, noise) if "errors" in self.encodings else None
            if record is not None and gradient is not None and rows is None and lam.requires_grad:
                iterates.append(Iterate(lam, gradient.lam, gradient.weights))
            found = None if gradient is None else gradient.lam
            new = self.step(bound.family, fixed, found, errors, own)
            if self.training or t < self.num_iterations:
                return {"lam": new}
            return {"lam": self._guarded(t, bound, fixed, new, found)}

        lam = self.iterate({"lam": lam}, update, group, call, bound)["lam"]
        if record is None:
            return lam
        fraction = 1.0 / (len(iterates) + 1)
        scale = call.layout.scale
        record.append(Refined(group.name, bound.family, scale, tuple(iterates), fraction))
        return scale_gradient(lam, fraction)

    def step(
        self,
        family: Family,
        lam: Tensor,
        gradient: Tensor | None,
        errors: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """One update of parameters ``(B, P)``, attached to the network's weights.

        Args:
            family: The family, which knows the scale of its parameters.
            lam: Parameters, detached.
            gradient: Gradient of the rows' bounds ``(B, P)``, where an encoding or the update
                reads it.
            errors: Prediction errors ``(B, E)``, where an encoding reads them.
            features: Data ``(B, F)``, where an encoding reads them.
        """
        h = self.network(self._encode(family, lam, gradient, errors, features))
        move = self.move(h)
        if self.update == "direct":
            return self.init + move
        gate = torch.sigmoid(self.gate(h))
        if self.update == "highway":
            return gate * lam + (1 - gate) * (self.init + move)
        if gradient is None:
            raise ValueError("The learned step needs the gradient.")
        if not self.precondition:
            return lam + 2 * self.rate * gate * gradient + move
        if self.natural:
            return natural_step(family, lam, gradient, 2 * self.rate * gate, torch.tanh(move))
        # In units of q's own scale and bounded, an update cannot leave the range of numbers.
        direction, _ = family.natural(lam, gradient, TRUST)
        return lam + 2 * self.rate * gate * direction + family.root(lam) * torch.tanh(move)

    def _guarded(
        self, t: int, bound: RowBound, lam: Tensor, new: Tensor, gradient: Tensor | None
    ) -> Tensor:
        """The update where the row is better off with it, else a plain step, else none.

        The network has seen no iteration beyond those it was trained with.
        """
        # Shorter and shorter, as stochastic approximation has it: else noise would not die out.
        fraction = self.num_iterations / (t + 1.0)
        plain = self._plain(bound.family, lam, gradient, fraction)
        proposed = (lam + fraction * (new - lam), plain)
        return first_better(bound, lam, proposed, self.num_checks)

    def _plain(
        self, family: Family, lam: Tensor, gradient: Tensor | None, fraction: float
    ) -> Tensor:
        """A natural step that nothing was learned for, shorter and shorter."""
        if gradient is None:
            return lam
        rate = torch.full_like(lam, 0.5 * fraction)
        if family.has_scale:
            return natural_step(family, lam, gradient, rate, torch.zeros_like(lam))
        return lam + 0.2 * rate * family.natural(lam, gradient, TRUST)[0]

    @property
    def num_checks(self) -> int:
        """Draws that compare the bound before and after an iteration beyond the trained ones."""
        return max(_NUM_CHECKS, 2 * self.num_particles)

    @property
    def evaluations(self) -> int:
        """Gradients of a row's log joint that the next call takes, one a draw.

        A draw that compares bounds takes no backward pass, and is counted as if it did.
        """
        beyond = 0 if self.training else max(0, self.iterations - self.num_iterations)
        # The parameters as they are, the update, and the plain step in its place.
        return self.iterations * self.num_particles + 3 * self.num_checks * beyond

    def _encode(
        self,
        family: Family,
        lam: Tensor,
        gradient: Tensor | None,
        errors: Tensor | None,
        features: Tensor | None,
    ) -> Tensor:
        parts = []
        for name in self.encodings:
            if name == "parameters":
                parts.append(lam)
            elif name == "standard_parameters":
                parts.append(_signed_log((lam - self.center) / self.unit))
            elif name == "data":
                parts.append(_given(features, name))
            elif name == "errors":
                parts.append(_signed_log(_given(errors, name)))
            elif name == "natural_gradient":
                parts.append(_signed_log(family.natural(lam, _given(gradient, "gradient"))[1]))
            else:
                parts.extend(_encode_gradient(name, _given(gradient, "gradient"), self.size))
        return torch.cat(parts, -1)

    def _features(self, group: Group, call: Call) -> Tensor | None:
        return self.reader.features_of(group, call) if "data" in self.encodings else None

    def _start_of(self, init: Tensor, call: Call) -> Tensor:
        return init.expand(call.layout.num_rows, -1)

    def _read(self, lam: Tensor, group: Group, call: Call) -> Tensor:
        """The encodings at given parameters, to learn how wide they are."""
        bound = self.bound(group, call)
        noise = bound.noise(lam)
        errors = bound.errors(lam, noise) if "errors" in self.encodings else None
        features = self._features(group, call)
        return self._encode(bound.family, lam, torch.zeros_like(lam), errors, features)

    def extra_repr(self) -> str:
        """Iterations, encodings and update."""
        return (
            f"num_iterations={self.num_iterations}, encodings={self.encodings}, "
            f"update={self.update!r}"
        )


def _given(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"The encoding needs {name}, and none was given.")
    return value


def _signed_log(value: Tensor) -> Tensor:
    """Linear near zero, logarithmic far from it."""
    return value.sign() * value.abs().log1p()


def _encode_gradient(name: str, gradient: Tensor, size: int) -> list[Tensor]:
    if name == "gradient":
        return [gradient]
    if name == "log_gradient":
        return [(gradient.abs() + 1e-5).log() / 5.0, gradient.sign()]
    parts = [gradient[..., :size], gradient[..., size:]]
    return [
        (part - part.mean(-1, keepdim=True)) / (part.std(-1, keepdim=True, correction=0) + 1e-7)
        for part in parts
        if part.shape[-1]
    ]
