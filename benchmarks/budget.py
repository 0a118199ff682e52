"""Budget: how much work a run may do, the same for every method of a task unless stated."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Budget"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Numbers of updates and of draws, and step sizes.

    Args:
        num_steps: Updates of every method, in training and where a guide with free parameters
            is refitted to held-out rows.
        num_particles: Draws of the objective in one update.
        batch_size: Rows of one update for guides that can be told their rows; None for all rows.
        lr: Step size of network weights and of the model's parameters.
        local_lr: Step size of free parameters, one set a row or one in all.
        weight_decay: Precision of a Gaussian prior on the model's parameters, the same for every
            method. Points need it: the joint density of latents and weights has no maximum
            where latents can shrink while weights grow.
        lr_decay: Step sizes fall geometrically to this fraction at the last update.
        relaxation_steps: Gradient steps of predictive coding on the latents in one update.
        inference_steps: Gradient steps of predictive coding where it is only asked for a
            posterior; Newton steps to the mode follow.
        num_samples: Draws behind an ELBO, a row.
        num_khat_samples: Draws behind a Pareto k-hat, a row.
        num_evidence_samples: K of the importance-weighted evidence, a row.
        num_curve_points: Points of the learning curve.
        num_curve_samples: Draws behind each of them, a row.

    Example:
        >>> from benchmarks import Budget
        >>> Budget(num_steps=1000).scaled("smoke").num_steps
        20
    """

    num_steps: int = 1000
    num_particles: int = 1
    batch_size: int | None = None
    lr: float = 0.005
    local_lr: float = 0.05
    weight_decay: float = 0.0
    lr_decay: float = 0.05
    relaxation_steps: int = 20
    inference_steps: int = 100
    num_samples: int = 400
    num_khat_samples: int = 1000
    num_evidence_samples: int = 5000
    num_curve_points: int = 10
    num_curve_samples: int = 16

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "batch_size" and value is None:
                continue
            if value < 0 or (value == 0 and name != "weight_decay"):
                raise ValueError(f"Budget.{name} must be positive, got {value}.")

    def scaled(self, name: str) -> Budget:
        """Return the budget under a name: `full` as it is, `demo` or `smoke` with less of it.

        Args:
            name: `full` for numbers to rely on; `demo` to see every part at work in minutes;
                `smoke` to see that everything runs, with numbers that mean nothing.
        """
        if name == "full":
            return self
        if name == "demo":
            return replace(
                self,
                num_steps=max(1, self.num_steps * 2 // 5),
                num_evidence_samples=min(self.num_evidence_samples, 1000),
            )
        if name == "smoke":
            return replace(
                self,
                num_steps=min(self.num_steps, 20),
                relaxation_steps=min(self.relaxation_steps, 5),
                inference_steps=min(self.inference_steps, 20),
                num_samples=min(self.num_samples, 20),
                num_khat_samples=min(self.num_khat_samples, 100),
                num_evidence_samples=min(self.num_evidence_samples, 100),
                num_curve_points=min(self.num_curve_points, 3),
                num_curve_samples=min(self.num_curve_samples, 4),
            )
        raise ValueError(f"A budget is one of full, demo, smoke; got {name!r}.")

    def as_config(self) -> dict[str, Any]:
        """Return the fields as plain values: part of every record, and of its key."""
        return asdict(self)
