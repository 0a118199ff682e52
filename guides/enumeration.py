"""Discrete latents summed out: a program with finite choices as one of its continuous latents.

    log p(x, z) = log sum_k exp log p(x, z, k)        k: all joint values of the discrete sites

The result is a Pyro program again, so predictive coding, Laplace, Langevin, every guide and every
score take it. Rows are independent given everything outside their plate, so the sum is taken row
by row, over the joint values of the sites of one row. The program runs once with every discrete
site at its first value, seen by all handlers, and once, hidden, with each other joint value; a
factor in the plate turns the first density into the sum.

References:
    | Pyro's TraceEnum_ELBO: Tensor variable elimination (Obermeyer et al., 2019)
    | https://arxiv.org/abs/1902.03210
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

import pyro
import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides.capturing import is_capturing
from guides.probe import Program

__all__ = ["Enumerated", "enumerated"]

_FACTOR = "_enumerated"


def enumerated(
    model: Program, sites: Collection[str] | None = None, *, limit: int = 256
) -> Enumerated:
    """Sum discrete latents out of a program.

    Args:
        model: Any Pyro program with discrete latents of finite support.
        sites: Names of the sites to sum out; by default every discrete latent.
        limit: Joint values of one row at most; each costs one run of the program.

    Returns:
        The marginal program, with the model's own signature.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from guides.inference import PredictiveCoding
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(0.5))
        ...         z = pyro.sample("z", dist.Normal(4 * k - 2, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> program = enumerated(model)
        >>> x = torch.tensor([-2.0, 2.0])
        >>> z = PredictiveCoding(program, pyro.optim.SGD({}), num_steps=50).infer(x)
        >>> program.probabilities(z, x)["k"].round(decimals=3)
        tensor([[1., 0.],
                [0., 1.]])
    """
    return Enumerated(model, sites, limit)


class Enumerated:
    """The program of :func:`enumerated`.

    Args:
        model: The program.
        sites: Sites to sum out, None for every discrete latent.
        limit: Joint values of one row at most.
    """

    def __init__(self, model: Program, sites: Collection[str] | None, limit: int) -> None:
        self.model = model
        self.names = None if sites is None else frozenset(sites)
        self.limit = limit

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with the discrete sites summed out."""
        first = _Terms({}, {}, self.names)
        with first:
            result = self.model(*args, **kwargs)
        if not first.found:
            wanted = "" if self.names is None else f" named {', '.join(sorted(self.names))}"
            raise ValueError(
                f"The program has no discrete latent{wanted} to sum out. Use it as it is, or name "
                "its discrete sites."
            )
        runs = [first, *self._others(first, args, kwargs)]
        totals = torch.stack([run.rows() for run in runs])
        correction = totals.logsumexp(0) - totals[0]
        if first.frame is None:
            pyro.factor(_FACTOR, correction)
            return result
        frame = first.frame
        size = frame.size if frame.full_size is None else frame.full_size
        index = first.values.get(frame.name)
        with pyro.plate(frame.name, size, subsample=index, dim=frame.dim):
            pyro.factor(_FACTOR, correction)
        return result

    def probabilities(
        self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior probabilities of the discrete sites, given all other latents.

        Args:
            values: Constrained values of the continuous latents by site.
            *args: Positional arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            By site, ``(B, C)``, or ``(C,)`` without a plate, in the order of its support.
        """
        with torch.no_grad():
            first = _Terms({}, dict(values), self.names)
            with poutine.block(), first:
                self.model(*args, **kwargs)
            runs = [first, *self._others(first, args, kwargs)]
            weights = torch.stack([run.rows() for run in runs]).softmax(0)
            weights = weights.flatten(1) if first.frame else weights.flatten()  # (C1 C2 .., B)
            sizes = [len(support) for support in first.found.values()]
            weights = weights.reshape(*sizes, *weights.shape[1:])
            result = {}
            for position, name in enumerate(first.found):
                other = [i for i in range(len(sizes)) if i != position]
                marginal = weights.sum(other) if other else weights
                result[name] = marginal.movedim(0, -1)
        return result

    def _others(
        self, first: _Terms, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> list[_Terms]:
        supports = first.found
        count = 1
        for support in supports.values():
            count *= len(support)
        if count > self.limit:
            raise ValueError(
                f"Discrete sites {', '.join(supports)} have {count} joint values a row, more than "
                f"limit={self.limit}, and each costs one run of the program. Raise limit=, or "
                "marginalize some of them in the model."
            )
        runs = []
        for choice in itertools.product(*(range(len(s)) for s in supports.values())):
            if not any(choice):
                continue
            taken = {name: supports[name][i] for name, i in zip(supports, choice, strict=True)}
            run = _Terms(taken, first.values, self.names)
            # Parameters stay visible: handlers outside must see those of every branch.
            with poutine.block(hide_fn=_is_sample), run:
                self.model(*args, **kwargs)
            if list(run.found) != list(supports):
                raise ValueError(
                    "The discrete sites of the program depend on one another's values: "
                    f"{', '.join(supports)} became {', '.join(run.found)}. Sample every variable "
                    "on every run."
                )
            run.check_outside(first)
            runs.append(run)
        return runs


class _Terms(Messenger):
    """Set the discrete sites, and reduce every term inside their plate to rows."""

    def __init__(
        self,
        choice: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        names: frozenset[str] | None,
    ) -> None:
        super().__init__()
        self.choice = choice
        self.given = values
        self.names = names
        self.frame: Any = None
        self.found: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.sites: list[tuple[str, Any, Any, Any, tuple[Any, ...]]] = []

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if site_is_subsample(msg):
            if name in self.given and msg["value"] is None:
                msg["value"] = self.given[name]
            return
        wanted = self.names is None or name in self.names
        if not msg["is_observed"] and wanted and _is_discrete(fn):
            support = self._support(msg)
            self.found[name] = support
            value = self.choice.get(name, support[0])
            msg["value"] = value.expand(fn.batch_shape + fn.event_shape)
            msg["is_observed"] = True
        elif not msg["is_observed"] and name in self.given:
            msg["value"] = self.given[name]
        # Scales and masks of handlers outside act on the factor as on everything else.
        self.sites.append((name, fn, msg["scale"], msg["mask"], tuple(msg["cond_indep_stack"])))

    def _pyro_post_sample(self, msg: Any) -> None:
        self.values[msg["name"]] = msg["value"]

    def _support(self, msg: dict[str, Any]) -> Tensor:
        name, fn = msg["name"], msg["fn"]
        if not fn.has_enumerate_support:
            raise NotImplementedError(
                f"Discrete site {name!r} ({type(fn).__name__}) has no finite support to sum over. "
                "Marginalize it in the model, or truncate it to a Categorical."
            )
        frames = [frame for frame in msg["cond_indep_stack"] if frame.vectorized]
        wide = [f for f in frames if fn.batch_shape[f.dim] > 1] or frames[:1]
        if len(wide) > 1 or fn.batch_shape.numel() != (wide[0].size if wide else 1):
            raise NotImplementedError(
                f"Discrete site {name!r} has batch shape {tuple(fn.batch_shape)}: several values "
                "a row, whose joint values are too many to enumerate. Give every row one value of "
                "it, in one plate, or marginalize it in the model (a mixture distribution)."
            )
        frame = wide[0] if wide else None
        if self.found and (frame is None) != (self.frame is None):
            raise NotImplementedError(
                f"Discrete site {name!r} is not in the same plate as {', '.join(self.found)}. "
                "Sum them out in two programs, the inner plate first: "
                "enumerated(enumerated(model, [inner]), [outer])."
            )
        if frame is not None and self.frame is not None and frame.name != self.frame.name:
            raise NotImplementedError(
                f"Discrete site {name!r} is in plate {frame.name!r}, and "
                f"{', '.join(self.found)} in {self.frame.name!r}. Sum them out one plate at a "
                "time."
            )
        self.frame = frame
        support = fn.enumerate_support(expand=False)
        return support.reshape(len(support), *(1,) * len(fn.batch_shape), *fn.event_shape)

    def rows(self) -> Tensor:
        """Sum of the terms inside the plate, rows at its dimension; of all without a plate."""
        total: Any = 0.0
        for inside, term in self._reduced():
            if inside:
                total = total + term
        return total

    def check_outside(self, first: _Terms) -> None:
        """Raise where a term outside the plate depends on the discrete values."""
        if is_capturing() or self.frame is None or _transformed(self.values.values()):
            return
        for (name, *_), (inside, mine), (_, theirs) in zip(
            self.sites, self._reduced(), first._reduced(), strict=True
        ):
            if not inside and not torch.allclose(mine, theirs, equal_nan=True):
                raise ValueError(
                    f"Site {name!r} lies outside plate {self.frame.name!r} and depends on "
                    f"discrete sites inside it ({', '.join(self.found)}), so rows cannot be "
                    "summed one by one. Move it into the plate."
                )

    def _reduced(self) -> list[tuple[bool, Tensor]]:
        """Terms by site, and whether they lie inside the plate.

        Dimensions of other plates are summed. What is left of all plates are draws of a score,
        and stays.
        """
        result = []
        for name, fn, scale, mask, stack in self.sites:
            frames = [frame for frame in stack if frame.vectorized]
            own = next((f for f in frames if self.frame and f.name == self.frame.name), None)
            if own is not None and own.full_size not in (None, own.size):
                scale = scale * (own.size / own.full_size)
            term = scale_and_mask(fn.log_prob(self.values[name]), scale, mask)
            if own is not None and (term.dim() < -own.dim or term.shape[own.dim] != own.size):
                shape = [1] * max(-own.dim - term.dim(), 0) + list(term.shape)
                shape[own.dim] = own.size
                term = term.expand(shape)
            deepest = 0 if own is None else own.dim
            summed = {f.dim for f in frames if f is not own} | set(range(deepest + 1, 0))
            for dim in sorted(summed):
                if term.dim() >= -dim:
                    term = term.sum(dim, keepdim=True)
            result.append((own is not None or self.frame is None, term))
        return result


def _is_sample(msg: Any) -> bool:
    return bool(msg["type"] == "sample")


def _is_discrete(fn: Any) -> bool:
    try:
        return bool(fn.support.is_discrete)
    except NotImplementedError:
        return False


def _transformed(values: Any) -> bool:
    """Whether a transform such as vmap holds the values, so that none can be read."""
    return any(
        isinstance(v, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(v)
        for v in values
    )
