"""Bidirectional predictive coding: every level is predicted from above and from below.

    E = forward * -log p(x, z) + backward * sum_l 0.5 |z_l - g_l(z_below)|^2
    infer:  z <- argmin_z E
    learn:  (theta, phi) <- (theta, phi) - optim(dE/d(theta, phi) at the final z)

For a Gaussian chain with unit scales the first term is
``forward * sum_l 0.5 |z_l - f_l(z_above)|^2``: one energy with predictions in both directions, and
a latent settles at their precision-weighted mean. What is clamped decides what the network does:
data, and it classifies; the label, and it generates; half of the data, and it completes.

A recognition that only starts the relaxation and learns where it ended, without a term in the
energy, is :class:`~guides.inference.hybrid.HybridPredictiveCoding`.

References:
    | Bidirectional predictive coding (Oliviers, Tang & Bogacz, 2025)
    | https://arxiv.org/abs/2505.23415
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.optim
from torch import Tensor

from guides.arguments import check_number
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.inference.bidirectional_program import BidirectionalProgram
from guides.inference.checks import capture, check_ownership, warn_frozen
from guides.inference.given import Given
from guides.inference.predictive_coding import PredictiveCoding
from guides.probe import Program

__all__ = ["BidirectionalPredictiveCoding"]


class BidirectionalPredictiveCoding(PredictiveCoding):
    """Bidirectional predictive coding (bPC) as a loop with SVI's interface.

    Latents start where the recognition predicts them, from the data upwards; where data that it
    reads are latent themselves, at what the model predicts. ``posterior`` is the Laplace posterior
    of the energy with both terms, which is not that of the model.

    Args:
        model: Any Pyro program with continuous latents.
        optim: A ``PyroOptim`` for the parameters of model and recognition.
        recognition: A Pyro program with the model's arguments that samples sites of the model,
            from the data upwards, also observed ones (a label); ``1 / scale**2`` of a Normal is
            its precision. Keep its scales fixed: learned beside free latents they go to zero. Or
            an amortized guide of this package without a density, ``guides.make("bottom_up_delta",
            model, x)``, whose predictions have unit precision in unconstrained space. For a guide
            that predicts an observed site as well, make it for ``Given(model, release=["y"])``.
        num_steps: Updates of the latents in a relaxation.
        forward: Weight of the model's energy. Small ones (1e-3) favor classification.
        backward: Weight of the recognition's; at zero this is ``PredictiveCoding``.
        **options: See :class:`~guides.inference.predictive_coding.PredictiveCoding`.

    Raises:
        ValueError: For weights out of range, a recognition that samples no site of the model, a
            guide with a density or one that is not amortized.
        TypeError: Where the recognition is no program.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from guides.inference import BidirectionalPredictiveCoding
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def recognition(x):
        ...     w = pyro.param("w", torch.tensor(2.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(w * x, 1.0))
        >>> optim = pyro.optim.Adam({"lr": 0.01})
        >>> bpc = BidirectionalPredictiveCoding(model, optim, recognition, num_steps=50)
        >>> bpc.infer(torch.tensor([0.0, 3.0]))["z"]  # of 0, x and 2 x
        tensor([0., 3.])
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        recognition: Program,
        num_steps: int = 20,
        *,
        forward: float = 1.0,
        backward: float = 1.0,
        **options: Any,
    ) -> None:
        if not callable(recognition) or isinstance(recognition, (type, pyro.optim.PyroOptim)):
            raise TypeError(
                "The order is BidirectionalPredictiveCoding(model, optim, recognition), and the "
                f"recognition is a Pyro program or a guide, as guides.make('amortized_delta', "
                f"model, x) makes one; got {type(recognition).__name__}."
            )
        if "guide" in options:
            raise TypeError(
                "BidirectionalPredictiveCoding starts from its recognition and takes no guide=. "
                "Pass the guide as the recognition, or use HybridPredictiveCoding."
            )
        if isinstance(recognition, ProgramGuide):
            _check_guide(recognition)
        check_number("backward", backward, least=0.0)
        check_number("forward", forward, least=0.0)
        if not forward:
            raise ValueError(
                "forward must be positive, got 0: without the model's energy its parameters learn "
                "nothing. Take a small weight, such as 1e-3."
            )
        super().__init__(model, optim, None, num_steps, **options)
        self.recognition = recognition
        self.program = BidirectionalProgram(model, recognition, float(forward), float(backward))
        self.model = self.program

    def _start(self, log_joint: LogJoint) -> dict[str, Tensor]:
        if not self.program.backward or self._reads_latents():
            return super()._start(log_joint)
        kept = {} if self._globals is None else self._globals
        known = {name: value for name, value in kept.items() if name in log_joint.layout.sites}
        return log_joint.predictions({**self.program.sweep(log_joint), **known})

    def _reads_latents(self) -> bool:
        """Whether data that the recognition reads, and does not predict, are latent."""
        asked: set[str] = set()
        program: Any = self.model
        while isinstance(program, Given):
            asked |= {*program.release, *program.missing}
            program = program.model
        return bool(asked - self.program.recognized)

    def _log_joint(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> LogJoint:
        self.program.forget()
        log_joint = super()._log_joint(args, kwargs)
        plate = log_joint.layout.data_plate
        if plate is not None and plate.random:
            raise ValueError(
                f"Plate {plate.name!r} draws other rows whenever the program runs, and model and "
                "recognition need the same. Give the program an argument index, and write "
                f"pyro.plate({plate.name!r}, size, subsample=index)."
            )
        return log_joint

    def _check(
        self, log_joint: LogJoint, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        super()._check(log_joint, args, kwargs)
        if not self.program.backward or self.model is not self.program:
            return  # or a program whose sites are given, as checked before
        if not self.program.recognized:
            raise ValueError(
                "The recognition samples no site, so it predicts nothing. Sample latents of the "
                f"model in it: {', '.join(log_joint.layout.sites)}."
            )
        programs = {"model": self.program.model, "recognition": self.recognition}
        used = {role: capture(program, args, kwargs) for role, program in programs.items()}
        check_ownership(programs, used)

    def _frozen(self, learning: set[Tensor]) -> list[str]:
        found = warn_frozen(self.program.model, learning)
        return found + warn_frozen(self.recognition, learning) if self.program.backward else found

    def _settings(self) -> tuple[Any, ...]:
        both = self.program.forward, self.program.backward
        return (*super()._settings(), id(self.recognition), *both)


def _check_guide(guide: ProgramGuide) -> None:
    if not getattr(guide, "amortized", False):
        raise ValueError(
            f"The recognition predicts latents from data, and {type(guide).__name__} has free "
            'parameters for its rows. Pass an amortized guide, guides.make("bottom_up_delta", '
            "model, x), or a Pyro program."
        )
    if guide.has_density:
        raise ValueError(
            "The recognition's precision is fixed, and this guide learns a density: beside free "
            'latents its scales would go to zero. Pass guides.make("bottom_up_delta", model, x) '
            'or "amortized_delta", and say how much they count by backward=.'
        )
