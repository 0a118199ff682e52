"""StateSpace: a linear Gaussian state space, whose filter, smoother and evidence are exact."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pyro
import torch
from torch import Tensor

from zoo.linear_gaussian import COVARIANCES, LinearLevel
from zoo.model import Model
from zoo.rows import check_rows, data_plate
from zoo.sequence import steps

__all__ = ["Filtered", "StateSpace"]


@dataclass(frozen=True)
class Filtered:
    """Beliefs about every state of a batch of sequences.

    Args:
        mean: Means ``(B, T, K)``.
        covariance: Covariances ``(B, T, K, K)``.
    """

    mean: Tensor
    covariance: Tensor


class StateSpace(Model):
    """A linear Gaussian state space model with its exact filter, smoother and evidence.

        z_1 ~ Normal(m, P)
        z_t ~ Normal(A z_{t-1} + a, Q)                  t = 2 .. T
        x_t ~ Normal(C z_t + c, R)                      t = 1 .. T

    The oracle of everything that infers over time: the Kalman filter gives p(z_t | x_1 .. x_t),
    the Rauch-Tung-Striebel smoother p(z_t | x_1 .. x_T).

    References:
        | A new approach to linear filtering and prediction problems (Kalman, 1960)
        | https://doi.org/10.1115/1.3662552
        | Maximum likelihood estimates of linear dynamic systems (Rauch, Tung & Striebel, 1965)
        | https://doi.org/10.2514/3.3166

    Args:
        z_dim: Dimension K of the state.
        x_dim: Dimension D of an observation.
        covariance: Of initial state, transition and observation: ``"full"``, ``"diagonal"``,
            ``"isotropic"`` or ``"unit"``.
        bias: Whether m, a and c are there; zero otherwise.
        num_steps: Steps of a sequence that is simulated.

    Sites:
        z_1 .. z_T: Latents, support real, event shape ``(K,)``, in plate ``"data"``.
        x_1 .. x_T: Observed, event shape ``(D,)``, in plate ``"data"``.

    Raises:
        ValueError: For sizes below 1 or an unknown covariance.

    Example:
        >>> model = StateSpace(z_dim=2, x_dim=3, num_steps=5)
        >>> x = model(size=4)
        >>> x.shape, model.log_evidence(x).shape
        (torch.Size([4, 5, 3]), torch.Size([4]))
        >>> model.smoother(x).mean.shape
        torch.Size([4, 5, 2])
    """

    default_guide: ClassVar[str] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0, "lengths": 0}

    def __init__(
        self,
        z_dim: int = 2,
        x_dim: int = 3,
        covariance: str = "full",
        bias: bool = False,
        num_steps: int = 10,
    ) -> None:
        super().__init__()
        if min(z_dim, x_dim, num_steps) < 1:
            raise ValueError(
                "z_dim, x_dim and num_steps must be at least 1, got "
                f"{z_dim}, {x_dim}, {num_steps}."
            )
        if covariance not in COVARIANCES:
            raise ValueError(
                f"covariance must be one of {', '.join(COVARIANCES)}, got {covariance!r}."
            )
        self.z_dim, self.x_dim, self.num_steps = z_dim, x_dim, num_steps
        self.initial = LinearLevel(z_dim, 0, covariance, bias)
        self.transition = LinearLevel(z_dim, z_dim, covariance, bias)
        self.emission = LinearLevel(x_dim, z_dim, covariance, bias)
        assert self.transition.weight is not None
        with torch.no_grad():
            # Spectral radius 0.9: states neither explode nor die over hundreds of steps.
            radius = torch.linalg.eigvals(self.transition.weight).abs().max()
            self.transition.weight.mul_(0.9 / radius.clamp_min(1e-6))

    def forward(
        self,
        x: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        size: int | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """The generative process.

        Args:
            x: Sequences ``(B, T, D)``; None simulates ``num_steps`` steps.
            lengths: Steps of every sequence ``(B,)``; all T by default. What lies beyond is
                ignored.
            size: Rows N of the whole data set, or rows to simulate.
            index: Numbers ``(B,)`` of the rows of ``x`` in the whole data set.

        Returns:
            The sequences ``(B, T, D)``.

        Raises:
            ValueError: Where the data are no sequences of this model.
        """
        time = steps(x, lengths, self.num_steps)
        with data_plate(x, size, index, event_shape=(time.number, self.x_dim)):
            z, data = None, []
            for t in pyro.markov(range(time.number)):
                with time.active(t):
                    level = self.initial if z is None else self.transition
                    z = pyro.sample(f"z_{t + 1}", level(z))
                    seen = None if x is None else x[:, t]
                    data.append(pyro.sample(f"x_{t + 1}", self.emission(z), obs=seen))
        return torch.stack(data, -2)

    def filter(self, x: Tensor, lengths: Tensor | None = None) -> Filtered:
        """The Kalman filter: p(z_t | x_1 .. x_t) for every t.

        Args:
            x: Sequences ``(B, T, D)``.
            lengths: Steps of every sequence ``(B,)``; beliefs beyond are predictions.
        """
        return self._filter(x, lengths)[0]

    def log_evidence(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The exact log p(x), ``(B,)``.

        Args:
            x: Sequences ``(B, T, D)``.
            lengths: Steps of every sequence ``(B,)``.
        """
        return self._filter(x, lengths)[2]

    def smoother(self, x: Tensor, lengths: Tensor | None = None) -> Filtered:
        """The Rauch-Tung-Striebel smoother: p(z_t | x_1 .. x_T) for every t.

        Args:
            x: Sequences ``(B, T, D)``.
            lengths: Steps of every sequence ``(B,)``; beliefs beyond are predictions.
        """
        filtered, predicted, _ = self._filter(x, lengths)
        weight = self._weight
        mean, covariance = filtered.mean[:, -1], filtered.covariance[:, -1]
        means, covariances = [mean], [covariance]
        for t in range(x.shape[1] - 2, -1, -1):
            own = filtered.covariance[:, t]
            ahead = predicted.covariance[:, t + 1]
            # G = P_t A^T (A P_t A^T + Q)^-1
            gain = torch.linalg.solve(ahead, weight @ own).mT
            mean = filtered.mean[:, t] + _times(gain, mean - predicted.mean[:, t + 1])
            covariance = own + gain @ (covariance - ahead) @ gain.mT
            means.append(mean)
            covariances.append(covariance)
        return Filtered(torch.stack(means[::-1], 1), torch.stack(covariances[::-1], 1))

    def posterior(self, x: Tensor) -> torch.distributions.MultivariateNormal:
        """The exact p(z_1, .., z_T | x), a normal batch ``(B,)`` over all states, first to last.

        Args:
            x: Sequences ``(B, T, D)``, all of T steps.
        """
        number = x.shape[1]
        total = number * self.z_dim
        emission, noise = self._weight_of(self.emission), _precision(self.emission)
        diagonal = emission.mT @ noise @ emission
        link = _precision(self.transition)
        weight = self._weight
        precision = torch.zeros(total, total, dtype=x.dtype, device=x.device)
        for t in range(number):
            own = slice(t * self.z_dim, (t + 1) * self.z_dim)
            prior = _precision(self.initial) if t == 0 else link
            precision[own, own] += diagonal + prior
            if t:
                before = slice((t - 1) * self.z_dim, t * self.z_dim)
                precision[before, before] += weight.mT @ link @ weight
                precision[own, before] -= link @ weight
                precision[before, own] -= weight.mT @ link
        mean = self.smoother(x).mean.reshape(len(x), total)
        return torch.distributions.MultivariateNormal(
            mean, precision_matrix=precision.expand(len(x), -1, -1)
        )

    def riccati(self, tolerance: float = 1e-12, most: int = 100_000) -> Tensor:
        """The covariance of z_t given x_1 .. x_{t-1} in the steady state, ``(K, K)``.

        The fixed point of the filter's own recursion, P = A (P - P C' S^-1 C P) A' + Q, which
        solves the discrete algebraic Riccati equation.

        Args:
            tolerance: Largest change of an entry at which the recursion ends.
            most: Steps at most.

        Raises:
            ValueError: Where the recursion does not settle.
        """
        weight, emission = self._weight, self._weight_of(self.emission)
        process, noise = _covariance(self.transition), _covariance(self.emission)
        covariance = process
        for _ in range(most):
            inner = emission @ covariance @ emission.mT + noise
            gain = torch.linalg.solve(inner, emission @ covariance).mT
            updated = weight @ (covariance - gain @ emission @ covariance) @ weight.mT + process
            if bool((updated - covariance).abs().max() <= tolerance):
                return updated
            covariance = updated
        raise ValueError(
            f"The Riccati recursion did not settle in {most} steps: states that are unstable and "
            "unobserved have no steady state. Check the transition's eigenvalues."
        )

    @property
    def _weight(self) -> Tensor:
        return self._weight_of(self.transition)

    @staticmethod
    def _weight_of(level: LinearLevel) -> Tensor:
        assert level.weight is not None
        return level.weight

    def _filter(self, x: Tensor, lengths: Tensor | None) -> tuple[Filtered, Filtered, Tensor]:
        """Filtered and predicted beliefs, and the log evidence ``(B,)``."""
        time = steps(x, lengths, self.num_steps)
        check_rows(x, event_shape=(time.number, self.x_dim))
        emission, noise = self._weight_of(self.emission), _covariance(self.emission)
        mean = self.initial.loc(None).expand(len(x), -1)
        covariance = _covariance(self.initial).expand(len(x), -1, -1)
        evidence = x.new_zeros(len(x))
        kept: dict[str, list[Tensor]] = {"m": [], "P": [], "pm": [], "pP": []}
        for t in range(time.number):
            if t:
                mean = self.transition.loc(mean)
                covariance = self._weight @ covariance @ self._weight.mT + _covariance(
                    self.transition
                )
            kept["pm"].append(mean)
            kept["pP"].append(covariance)
            error = x[:, t] - self.emission.loc(mean)
            factor = torch.linalg.cholesky(emission @ covariance @ emission.mT + noise)
            gain = torch.cholesky_solve(emission @ covariance, factor).mT  # (B, K, D)
            whitened = torch.linalg.solve_triangular(factor, error.unsqueeze(-1), upper=False)
            log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            constant = 0.5 * self.x_dim * math.log(2 * math.pi)
            term = -0.5 * whitened.square().sum((-2, -1)) - log_det - constant
            seen_mean = mean + _times(gain, error)
            # Joseph's form stays symmetric and positive where rounding would not.
            rest = torch.eye(self.z_dim, dtype=x.dtype, device=x.device) - gain @ emission
            seen_covariance = rest @ covariance @ rest.mT + gain @ noise @ gain.mT
            if time.lengths is None:
                mean, covariance, evidence = seen_mean, seen_covariance, evidence + term
            else:
                on = t < time.lengths
                mean = torch.where(on[:, None], seen_mean, mean)
                covariance = torch.where(on[:, None, None], seen_covariance, covariance)
                evidence = evidence + torch.where(on, term, torch.zeros_like(term))
            kept["m"].append(mean)
            kept["P"].append(covariance)
        stacked = {name: torch.stack(parts, 1) for name, parts in kept.items()}
        filtered = Filtered(stacked["m"], stacked["P"])
        return filtered, Filtered(stacked["pm"], stacked["pP"]), evidence


def _covariance(level: LinearLevel) -> Tensor:
    return level.scale_tril @ level.scale_tril.mT


def _precision(level: LinearLevel) -> Tensor:
    return torch.cholesky_inverse(level.scale_tril)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
