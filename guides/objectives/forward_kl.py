"""ForwardKL: a guide trained on simulations from the model (inclusive KL, wake-sleep's sleep)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor, nn

from guides.draws import guide_terms
from guides.energy import LogJoint
from guides.guide import ProgramGuide
from guides.layout import layout
from guides.objectives.guide_alone import of_guide_alone
from guides.objectives.objective import Objective, own_guide
from guides.probe import Program

__all__ = ["ForwardKL"]

Simulated = tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]


class ForwardKL(Objective):
    """Inclusive KL: the guide learns from latents and data that the model itself makes.

        z_n, x_n ~ p(z, x)                          n = 1..B, fresh at every call
        loss = - mean_n log q(z_n | x_n)

    The data of the call lend their shape only: every observed site is simulated and takes the
    place of the argument that held it. Only the guide gets gradients, and the likelihood need
    not have a density. With a flow as the family this is neural posterior estimation.

    The loss is a mean over rows, not a sum over N (lower is better). It is **no bound** on
    -log p(x): it is at least the mean entropy of the exact posteriors under the model's own data,
    and reaches it where q is exact. Densities are those of the constrained sites.

    Only amortized latents of the data plate can learn so: free parameters belong to the rows of
    one data set, and global latents would fit their prior.

    References:
        | Reweighted Wake-Sleep (Bornschein & Bengio, 2015) https://arxiv.org/abs/1406.2751
        | Fast epsilon-free Inference of Simulation Models (Papamakarios & Murray, 2016)
        | https://arxiv.org/abs/1605.06376

    Args:
        num_particles: Number of data sets to simulate at each call.
        size: Rows to simulate at each call, for models that take ``size`` and data None, as the
            zoo's do. By default the rows of the call.
        simulate: A callable with the model's arguments that returns ``(args, kwargs, values)``:
            a call with simulated data, and the latents behind it by site. By default the model is
            run with its observations taken away.

    Raises:
        TypeError: For a guide whose q cannot be scored at given latents.
        ValueError: For a guide that is not amortized, latents outside the data plate, or where
            simulated data cannot be told from the arguments.

    Example:
        >>> import pyro, guides, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> x = torch.randn(100)
        >>> guide = guides.make("amortized_normal", model, x)
        >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ForwardKL())
        >>> svi.step(x) > 0
        True
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        size: int | None = None,
        simulate: Callable[..., Simulated] | None = None,
    ) -> None:
        super().__init__(num_particles)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"size must be an integer of at least 1, got {size!r}.")
        if size is not None and simulate is not None:
            raise ValueError("Pass size= or simulate=, not both: simulate= decides the size.")
        self.size = size
        self.simulate = simulate

    def differentiable_loss(
        self, model: Program, guide: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Minus the mean log density of simulated latents."""
        _check_amortized(guide)
        total = torch.zeros(())
        for _ in range(self.num_particles):
            new_args, new_kwargs, values = self.draw(model, *args, **kwargs)
            log_q = self.log_q(guide, values, *new_args, model=model, **new_kwargs)
            total = total - log_q.mean()
        loss = total / self.num_particles
        own = isinstance(guide, nn.Module) and any(
            isinstance(module, ProgramGuide) for module in guide.modules()
        )
        # Refined and top-down guides run the model, which must not learn from its simulations.
        return of_guide_alone(loss, guide) if own else loss

    def draw(self, model: Program, *args: Any, **kwargs: Any) -> Simulated:
        """Simulate from the model: a call with new data, and the latents behind it by site."""
        with torch.no_grad(), poutine.block():
            if self.simulate is not None:
                return self.simulate(*args, **kwargs)
            if self.size is not None:
                args, kwargs = _resized(model, args, kwargs, self.size)
            return _simulate(model, args, kwargs)

    def log_q(
        self,
        guide: Callable[..., Any],
        values: Mapping[str, Tensor],
        /,
        *args: Any,
        model: Program | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Log density of given latents under the guide, row by row ``(B,)``.

        Args:
            guide: The guide.
            values: Constrained values by site, ``batch_shape + event_shape``.
            *args: Positional arguments of the model, with the data that q is conditioned on.
            model: The program; needed only for guides that are not of this package.
            **kwargs: Keyword arguments of the model.
        """
        if isinstance(guide, ProgramGuide):
            own = own_guide(self, guide.model, guide, args, kwargs, external=True)
            return _score(own, values, args, kwargs)
        if model is None:
            raise TypeError("Scoring a guide that is not of this package needs model= as well.")
        return _score_any(guide, values, model, args, kwargs)

    def __repr__(self) -> str:
        """Options."""
        size = "" if self.size is None else f", size={self.size}"
        own = "" if self.simulate is None else ", simulate=..."
        return f"ForwardKL(num_particles={self.num_particles}{size}{own})"


def _check_amortized(guide: Any) -> None:
    if isinstance(guide, ProgramGuide) and not getattr(guide, "amortized", False):
        raise ValueError(
            "ForwardKL needs an amortized guide: free parameters belong to the rows of one data "
            "set, and every call simulates another. Use amortized_ and the same family."
        )


def _score(
    guide: ProgramGuide,
    values: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    read = guide._layout(args, kwargs, None)
    _check_local([name for name, site in read.sites.items() if site.row_dim is None])
    packed = read.pack(values)
    call = guide._call(args, kwargs, read)
    upstream: dict[str, Tensor] = {}
    rows = torch.zeros(())
    with guide._pyro_context:
        for group in read.groups:
            q = guide.group_distribution(group, call, upstream)
            upstream[group.name] = group.batch(packed[group.name])
            score = q.log_prob(upstream[group.name])
            if (mask := guide.group_mask(group)) is not None:
                score = torch.where(mask, score, torch.zeros_like(score))
            rows = rows + score.reshape(group.shape[:-1])
    log_dets = LogJoint(guide.model, args, kwargs, layout=read).unpack(packed)[2]
    return sum((-log_det for log_det in log_dets.values()), rows)


def _score_any(
    guide: Callable[..., Any],
    values: Mapping[str, Tensor],
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    read = layout(model, args, kwargs)
    _check_local([name for name, site in read.sites.items() if site.row_dim is None])
    terms = guide_terms(guide, args, kwargs, read, values, expose_params=True)
    missing = [name for name in read.sites if name not in terms.values]
    drawn = [name for name in terms.values if name not in read.sites]
    if missing or drawn or any(terms.values[name] is not values[name] for name in read.sites):
        raise TypeError(
            f"ForwardKL scores simulated latents under the guide, and {type(guide).__name__} "
            f"draws {', '.join(drawn or missing or read.sites)} in a way that leaves no density "
            "of the latents themselves. Use a guide of this package (guides.make), or one that "
            "samples every latent site from its own distribution."
        )
    return terms.total()[0]


def _check_local(outside: list[str]) -> None:
    if outside:
        raise ValueError(
            f"ForwardKL trains latents of the data plate; {', '.join(outside)} would be simulated "
            "anew with every data set while its q cannot read the data, and would fit the prior. "
            "Put it into the data plate (one data set a row), or use another objective."
        )


def _simulate(model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Simulated:
    """Run the program without its observations, and put what it made into the arguments."""
    with poutine.trace() as tracer, poutine.uncondition():
        model(*args, **kwargs)
    sites: dict[str, Any] = {
        name: site
        for name, site in tracer.trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }
    values: dict[str, Tensor] = {}
    data: dict[str, Tensor] = {}
    kwargs = dict(kwargs)
    for name, site in sites.items():
        infer, value = site["infer"], site["value"]
        if infer.get("_deterministic", False):
            continue
        if type(site["fn"]).__name__ == "Unit":
            raise ValueError(
                f"The program adds a factor ({name!r}), which cannot be simulated. Pass "
                "simulate=, a callable that returns (args, kwargs, values)."
            )
        if not infer.get("was_observed", False):
            # A latent, or data of which there are none in this call.
            (data if _is_missing(model, name, args, kwargs) else values)[name] = value
            continue
        old = infer["obs"]
        if not any(given is old for given in (*args, *kwargs.values())):
            raise ValueError(
                f"Observed site {name!r} is simulated, but no argument of the model is its value "
                "itself, so it is not known where the new data belong. Pass simulate=, a callable "
                "that returns (args, kwargs, values)."
            )
        args = tuple(value if given is old else given for given in args)
        kwargs = {key: value if given is old else given for key, given in kwargs.items()}
    if data:
        bound = _signature(model).bind(*args, **kwargs)
        bound.arguments.update(data)
        args, kwargs = bound.args, bound.kwargs
    return args, kwargs, values


def _is_missing(
    model: Program, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether an unobserved site has an argument of its name that the call leaves at None."""
    signature = _signature(model)
    parameter = signature.parameters.get(name)
    if parameter is None or parameter.default is not None:
        return False
    return signature.bind_partial(*args, **kwargs).arguments.get(name) is None


def _resized(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], size: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call without data and with another number of rows."""
    signature = _signature(model)
    stated = getattr(model, "data_args", None)
    if "size" not in signature.parameters or stated is None:
        raise ValueError(
            "size= needs a model that simulates by itself: data arguments that may be None, "
            "listed in an attribute data_args, and a keyword argument size. Pass data of as many "
            "rows as are to be simulated, or simulate=."
        )
    bound = signature.bind_partial(*args, **kwargs)
    for name in stated:
        bound.arguments[name] = None
    bound.arguments["size"] = size
    bound.arguments.pop("index", None)
    return bound.args, bound.kwargs


def _signature(model: Program) -> inspect.Signature:
    return inspect.signature(model.forward if isinstance(model, nn.Module) else model)
