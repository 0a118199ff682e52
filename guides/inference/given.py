"""One program, used in any direction: what is known, what is asked, and what counts.

    clamp     a latent becomes data                     p(x, z1 = value, z2)
    release   data become a latent: generate, classify  p(x, z) with x free
    missing   entries of data become latents            x_m = mu_m + S_mk S_kk^-1 (x_k - mu_k)
    gain      precision of a site's errors times g      attention

The result is a Pyro program again; the program itself is not touched. With several entries
missing per row, the latent ``<site>_missing`` holds those that are missing in any row. Entries of
it that a row knows have the density exp(-pi u^2), which integrates to one and adds no energy at
its mode, so energies and evidences stay those of the program.

References:
    | Recurrent predictive coding models for associative memory (Tang et al., 2023)
    | https://doi.org/10.1371/journal.pcbi.1010719

    | Attention, uncertainty, and free-energy (Feldman & Friston, 2010)
    | https://doi.org/10.3389/fnhum.2010.00215
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from guides import location_scale
from guides.probe import Program
from guides.supports import is_masked, is_real, unwrap

__all__ = ["Given"]


class Given:
    """A program with other sites known.

    Args:
        model: Any Pyro program.
        clamp: Values of latents that are known, by site, each of the shape of its site.
        release: Observed sites that are latent now.
        missing: Observed sites whose NaN entries are latents. Entries of a discrete likelihood
            with independent entries are left out of the energy instead, which sums them out as
            long as no other site depends on them.
        gain: Factors of the precision of a site's errors, a number or a tensor that broadcasts
            with the value. Location-scale sites get ``scale / sqrt(gain)``; the log density of
            others is multiplied, with one factor an event.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> from guides.inference import PredictiveCoding
        >>> pc = PredictiveCoding(model, pyro.optim.SGD({}), num_steps=100)
        >>> x = torch.tensor([2.0])
        >>> pc.given(gain={"x": 3.0}).infer(x)["z"]
        tensor([1.5000])
        >>> pc.given(clamp={"z": torch.tensor([5.0])}, release=["x"]).infer(x)["x"]
        tensor([5.])
    """

    def __init__(
        self,
        model: Program,
        *,
        clamp: Mapping[str, Tensor] | None = None,
        release: Collection[str] = (),
        missing: Collection[str] = (),
        gain: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        self.model = model
        self.clamp = {} if clamp is None else dict(clamp)
        self.release = _names("release", release)
        self.missing = _names("missing", missing)
        self.gain = {} if gain is None else dict(gain)
        both = set(self.clamp) & (set(self.release) | set(self.missing))
        both |= set(self.release) & set(self.missing)
        if both:
            raise ValueError(
                f"Site {sorted(both)[0]!r} is given twice: a site is clamped, released or has "
                "missing entries. Name it in one of them."
            )
        for name, value in self.gain.items():
            if not bool((torch.as_tensor(value) > 0).all()):
                raise ValueError(
                    f"gain of site {name!r} must be positive, got {value}. To leave entries out, "
                    "make them NaN and pass missing=."
                )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program with those sites known."""
        handler = _Given(self)
        with handler:
            result = self.model(*args, **kwargs)
        handler.check()
        return result

    def completed(self, values: Mapping[str, Tensor]) -> set[str]:
        """Observed sites whose missing entries are among the latents."""
        return {name for name in self.missing if f"{name}_missing" in values}


def _names(option: str, names: Collection[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise TypeError(f"{option} must be a collection of names: pass [{names!r}].")
    return tuple(names)


class _Given(Messenger):
    def __init__(self, given: Given) -> None:
        super().__init__()
        self.known = given
        self.seen: dict[str, bool] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, known = msg["name"], self.known
        if site_is_subsample(msg):
            return
        self.seen[name] = bool(msg["is_observed"])
        if name in known.clamp:
            _clamp(msg, known.clamp[name])
        elif name in known.release and msg["is_observed"]:
            msg["value"], msg["is_observed"] = None, False
        if name in known.gain:
            _weigh(msg, known.gain[name])
        if name in known.missing and msg["is_observed"]:
            _fill(msg)

    def check(self) -> None:
        """Raise for names of no site, or of a site that is not what it is taken for."""
        known = self.known
        asked = [*known.clamp, *known.release, *known.missing, *known.gain]
        absent = [name for name in asked if name not in self.seen]
        if absent:
            raise ValueError(
                f"The program has no site named {absent[0]!r}. Its sites: {', '.join(self.seen)}."
            )
        for name in (*known.release, *known.missing):
            if not self.seen[name]:
                raise ValueError(
                    f"Site {name!r} is no data in this call, so there is nothing to release. Call "
                    "the model with the data of that site."
                )


def _clamp(msg: dict[str, Any], value: Any) -> None:
    """Make a latent known, at its own shape: what broadcasts would be another program's value."""
    name, fn = msg["name"], msg["fn"]
    if msg["is_observed"]:
        raise ValueError(
            f"Site {name!r} is data in this call, and clamp makes latents known. Call the model "
            "with that value in place of its data."
        )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"The value that site {name!r} is clamped to must be a tensor, got "
            f"{type(value).__name__}. Pass torch.as_tensor(value)."
        )
    shape = fn.batch_shape + fn.event_shape
    if value.shape != shape:
        raise ValueError(
            f"The value that site {name!r} is clamped to must have the shape of the site in this "
            f"call, {tuple(shape)}, got {tuple(value.shape)}. Expand it "
            f"(value.expand{tuple(shape)}), or take the rows of this call."
        )
    msg["value"], msg["is_observed"] = value, True


def _weigh(msg: dict[str, Any], gain: Tensor | float) -> None:
    """Multiply the precision of a site."""
    fn = msg["fn"]
    if not location_scale.is_location_scale(fn):
        factor = torch.as_tensor(gain)
        if not _broadcasts(factor, fn.batch_shape):
            raise ValueError(
                f"gain of site {msg['name']!r} ({type(unwrap(fn)).__name__}) must have one factor "
                f"an event, of shape {tuple(fn.batch_shape)}, got {tuple(factor.shape)}. Gains of "
                "entries need a location-scale site."
            )
        msg["scale"] = msg["scale"] * gain
        return
    if is_masked(fn):
        raise ValueError(
            f"Site {msg['name']!r} has a gain, and its distribution a mask that would be lost. "
            "Mask the site itself, with pyro.poutine.mask around it."
        )
    base = unwrap(fn)
    root = torch.as_tensor(gain, dtype=base.loc.dtype).rsqrt()
    shape = fn.batch_shape + fn.event_shape
    if not _broadcasts(root, shape):
        raise ValueError(
            f"gain of site {msg['name']!r} must broadcast with its value, of shape "
            f"{tuple(shape)}, got {tuple(root.shape)}. Gains of rows need trailing dimensions "
            "of one for the entries of an event."
        )
    if type(base).__name__ == "MultivariateNormal":
        tril = root.unsqueeze(-1) * base.scale_tril if root.dim() else root * base.scale_tril
        weighted: Any = dist.MultivariateNormal(base.loc.expand(shape), scale_tril=tril)
    else:
        options = {"df": base.df} if type(base).__name__ == "StudentT" else {}
        family = getattr(dist, type(base).__name__)
        scale = (root * base.scale).expand(shape)
        weighted = family(loc=base.loc.expand(shape), scale=scale, **options)
        weighted = weighted.to_event(fn.event_dim)
    msg["fn"] = weighted.expand(fn.batch_shape)


def _broadcasts(factor: Tensor, shape: torch.Size) -> bool:
    """Whether a tensor broadcasts to a shape without widening it."""
    try:
        return torch.broadcast_shapes(factor.shape, shape) == shape
    except RuntimeError:
        return False


def _fill(msg: dict[str, Any]) -> None:
    """Replace NaN entries of a site's data by latents, or leave them out."""
    name, fn, value = msg["name"], msg["fn"], msg["value"]
    absent = torch.isnan(value)
    if not bool(absent.any()):
        return
    if isinstance(msg["mask"], Tensor) or is_masked(fn):
        raise ValueError(
            f"Site {name!r} has missing entries and a mask. Make the entries that the mask leaves "
            "out NaN, and take the mask away."
        )
    base = unwrap(fn)
    support = base.support
    if support.is_discrete:
        if base.event_dim:
            raise NotImplementedError(
                f"Entries of site {name!r} ({type(base).__name__}) are one choice and cannot be "
                f"missing one by one. Release the whole site: release=[{name!r}]."
            )
        shape = fn.batch_shape + fn.event_shape
        kept = base.expand(shape).mask(~absent.expand(shape)).to_event(fn.event_dim)
        msg["fn"], msg["value"] = kept, torch.where(absent, torch.zeros_like(value), value)
        return
    own = support.base_constraint if isinstance(support, constraints.independent) else support
    transform = None if is_real(own) else biject_to(own)
    if own.event_dim:
        raise NotImplementedError(
            f"Entries of site {name!r} ({type(base).__name__}) have the joint support {support} "
            f"and cannot be missing one by one. Release the whole site: release=[{name!r}]."
        )
    num_batch = absent.dim() - fn.event_dim
    flat = absent.reshape(*absent.shape[:num_batch], -1) if fn.event_dim else absent
    columns = flat.reshape(-1, flat.shape[-1]).any(0) if fn.event_dim else None
    here = flat if columns is None else flat[..., columns]
    prior = _Missing(fn, here, columns, own, transform, value)
    latent = pyro.sample(f"{name}_missing", prior)
    filled = torch.nan_to_num(value)
    if columns is None:
        msg["value"] = torch.where(absent, latent, filled)
        return
    index = columns.cumsum(0) - 1
    spread = latent[..., index.clamp_min(0)].reshape(latent.shape[:-1] + fn.event_shape)
    msg["value"] = torch.where(absent, spread, filled)


class _Missing(TorchDistribution):
    """Flat over missing entries, and exp(-pi u^2) over those that are known."""

    # names a floating tensor, from which a layout takes dtype and device
    arg_constraints = {"like": constraints.real}

    def __init__(
        self,
        fn: Any,
        absent: Tensor,
        columns: Tensor | None,
        support: Any,
        transform: Any,
        like: Tensor,
    ) -> None:
        self.fn, self.absent, self.columns = fn, absent, columns
        self.transform = transform
        self.like = like
        event = absent.shape[-1:] if columns is not None else ()
        self._support = constraints.independent(support, len(event)) if event else support
        super().__init__(fn.batch_shape, torch.Size(event), validate_args=False)

    @property
    def support(self) -> Any:
        return self._support

    @property
    def mean(self) -> Tensor:
        """What the parents of the data predict."""
        found = (
            location_scale.location(self.fn)
            if location_scale.is_location_scale(self.fn)
            else self.fn.mean
        )
        found = found.expand(self.fn.batch_shape + self.fn.event_shape)
        if self.columns is None:
            return found
        return found.reshape(*self.fn.batch_shape, -1)[..., self.columns]

    def log_prob(self, value: Tensor) -> Tensor:
        u = value if self.transform is None else self.transform.inv(value)
        term = -math.pi * u.square()
        if self.transform is not None:
            term = term - self.transform.log_abs_det_jacobian(u, value)
        term = torch.where(self.absent, torch.zeros_like(term), term)
        return term if self.columns is None else term.sum(-1)
