"""Iterative: a learned network that improves q from gradients of its bound, or from errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guides.families.family import Family
from guides.schemes.bound import RowBound
from guides.schemes.encoder import Encoder
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
    "errors",
    "parameters",
    "data",
)
UPDATES = ("highway", "direct", "learned_step")
# Standard deviations of q that a learned step can move a coordinate at a rate of one.
_TRUST = 2.0
_GRADIENTS = ENCODINGS[:4]


class Iterative(Refinement):
    """Iterative amortized inference: one network for every iteration and every row.

        lam_0 = prior or encoder
        g     = d L_n / d lam_n                            of the row's own bound
        e     = encodings of (g, errors, lam, x)           all detached
        h     = highway network(e)
        lam_t = gate(h) lam_{t-1} + (1 - gate(h)) m(h)     update="highway"
        lam_t = m(h)                                       update="direct"
        lam_t = lam_{t-1} + rate(h) F^-1 g + F^-1/2 tanh(m(h))      update="learned_step"

    F is the Fisher information of q, coordinate by coordinate, which makes the learned step
    independent of the units of the latents and a good method before anything is learned;
    ``precondition=False`` steps along the gradient itself, ``rate(h) g + m(h)``. Gradients of
    Gaussian families are path gradients, which hardly vary from draw to draw near the optimum.

    Nothing is backpropagated from one iteration to the next: ``lam_{t-1}`` and ``g`` enter as
    numbers. Under an ordinary objective the network learns from its last iteration; with
    :class:`guides.objectives.RefinementELBO` it learns from the mean over all iterations, the
    start included, and the model from the last one alone, as published.

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
        update: ``"highway"``, ``"direct"`` or ``"learned_step"``.
        network: Widths of the highway network's layers.
        rate: Step of ``"learned_step"`` where its head says nothing.
        precondition: Whether the learned step is along ``F^-1 g`` or along ``g``.
        start: ``"prior"`` or ``"encoder"``.
        num_particles: Draws of the inner bound.
        hidden: Widths of the encoder that starts it.
        **options: See :class:`guides.schemes.refinement.Refinement`.
    """

    def __init__(
        self,
        init: Tensor,
        group: Group,
        call: Call,
        *,
        num_iterations: int = 5,
        encodings: Sequence[str] = ("natural_gradient", "parameters"),
        update: str = "learned_step",
        network: Sequence[int] = (128, 128),
        rate: float = 0.3,
        precondition: bool = True,
        eval_iterations: int | None = None,
        num_particles: int = 1,
        shared_noise: bool = False,
        tolerance: float = 0.0,
        start: str = "prior",
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
        if not network or rate <= 0:
            raise ValueError(
                f"network needs a layer and rate must be positive, got {network} and {rate}."
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
        with torch.no_grad():
            read = self._read(self._start_of(init, call), group, call)
        options: dict[str, Any] = {"dtype": init.dtype, "device": init.device}
        self.network = _Highway(read.shape[-1], tuple(network), **options)
        self.move = nn.Linear(network[-1], init.shape[0], **options)
        self.gate = nn.Linear(network[-1], init.shape[0], **options)
        with torch.no_grad():
            # The first updates are small and the same for every row, whatever the gradients.
            self.move.weight.mul_(0.1)
            self.move.bias.zero_()
            self.gate.weight.zero_()
            self.gate.bias.fill_(0.0 if update == "learned_step" else 1.0)
        if update == "learned_step":
            nn.init.zeros_(self.move.weight)
        elif update == "direct":
            del self.gate

    @property
    def needs_gradient(self) -> bool:
        """Whether an update reads the gradient of the bound."""
        return self.update == "learned_step" or any(e in _GRADIENTS for e in self.encodings)

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
            return {"lam": self.step(bound.family, fixed, found, errors, own)}

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
        # In units of q's own scale and bounded, an update cannot leave the range of numbers.
        direction, _ = family.natural(lam, gradient, _TRUST)
        return lam + 2 * self.rate * gate * direction + family.root(lam) * torch.tanh(move)

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


class _Highway(nn.Module):
    """h_1 = g W_0 e + (1 - g) f(W_1 e);  h_k = g h_{k-1} + (1 - g) f(W h_{k-1})."""

    def __init__(self, features: int, widths: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        sizes = (features, *widths)
        pairs = list(itertools.pairwise(sizes))
        self.values = nn.ModuleList(nn.Linear(a, b, **options) for a, b in pairs)
        self.gates = nn.ModuleList(nn.Linear(a, b, **options) for a, b in pairs)
        # A skip needs a projection only where the width changes.
        self.skips = nn.ModuleList(
            nn.Identity() if a == b and i else nn.Linear(a, b, **options)
            for i, (a, b) in enumerate(pairs)
        )

    def forward(self, e: Tensor) -> Tensor:
        h = e
        for value, gate, skip in zip(self.values, self.gates, self.skips, strict=True):
            g = torch.sigmoid(gate(h))
            h = g * skip(h) + (1 - g) * nn.functional.elu(value(h))
        return h
