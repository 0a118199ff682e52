"""A program and its recognition as one energy, which is a Pyro program again.

    -log p(x, z) * forward + backward * sum_l r_l(z_l | what is below it)

    r_l = -log q(z_l | ..)       recognition is a Pyro program over the same sites, in any order
    r_l = 0.5 |u_l - g_l|^2      recognition is a guide: g_l its location, unconstrained space

Every site that the recognition samples becomes a factor ``<site>_recognized`` at the value that
the model has there, and passes that value on. Data that are latent in a call reach the recognition
as they are there: an argument that the model observes is replaced by the value of that site.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from guides.capturing import is_capturing
from guides.energy import LogJoint, SiteTerms
from guides.guide import ProgramGuide, upstream_of
from guides.layout import Layout
from guides.probe import Program

__all__ = ["BidirectionalProgram"]


class BidirectionalProgram:
    """Model and recognition as one program.

    Args:
        model: Any Pyro program.
        recognition: A Pyro program over sites of the model, with the model's arguments, or an
            amortized guide of this package for it.
        forward: Weight of the model's energy.
        backward: Weight of the recognition's; at zero the recognition is not run.

    Attributes:
        recognized: Sites that the recognition sampled in the last run.
    """

    def __init__(
        self, model: Program, recognition: Program, forward: float = 1.0, backward: float = 1.0
    ) -> None:
        self.model = model
        self.recognition = recognition
        self.forward, self.backward = forward, backward
        self.recognized: frozenset[str] = frozenset()
        # Rows are sliced by the names of the model's own arguments.
        self.__signature__ = inspect.signature(
            model.forward if isinstance(model, nn.Module) else model
        )
        self.data_args = getattr(model, "data_args", None)
        self._layout: tuple[Any, Layout] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, and score its values by the recognition."""
        heard = _Heard()
        with poutine.scale(scale=self.forward), heard:
            result = self.model(*args, **kwargs)
        if self.backward:
            with poutine.scale(scale=self.backward):
                self.recognized = self._score(heard, args, kwargs)
            heard.check(self.recognized, (*args, *kwargs.values()))
        return result

    def _score(
        self, heard: _Heard, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> frozenset[str]:
        """Factors of everything that is recognized, and its names."""
        live = tuple(map(heard.live, args))
        named = {name: heard.live(value) for name, value in kwargs.items()}
        if isinstance(self.recognition, ProgramGuide):
            same = all(map(operator.is_, live, args))
            same = same and all(named[name] is value for name, value in kwargs.items())
            return self._residuals(self.recognition, heard, live, named, same)
        recognized = _Recognized(heard)
        with recognized:
            self.recognition(*live, **named)
        return frozenset(recognized.names)

    def sweep(self, log_joint: LogJoint) -> dict[str, Tensor]:
        """What the recognition predicts for latents, from the data upwards, by site."""
        read, args, kwargs = log_joint.layout, log_joint.args, log_joint.kwargs
        with torch.no_grad():
            if isinstance(self.recognition, ProgramGuide):
                with poutine.block():
                    values = self.recognition.locations(*args, **kwargs)
            else:
                terms = SiteTerms(read, density=False, center=True, complete=False)
                with poutine.block(), terms, _Sweep(read):
                    self.recognition(*args, **kwargs)
                values = terms.values
        return {name: values[name].detach() for name in read.sites if name in values}

    def _residuals(
        self,
        guide: ProgramGuide,
        heard: _Heard,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        same: bool,
    ) -> frozenset[str]:
        """Factors of the groups of a guide, squared distances from its locations; its sites."""
        read = self._read(guide, args, kwargs, same)
        absent = [name for name in read.sites if name not in heard.values]
        if absent:
            raise ValueError(_unknown(absent[0], heard.values))
        call = guide._call(args, kwargs, read)
        packed = read.pack({name: heard.values[name] for name in read.sites})
        before: dict[str, Tensor] = {}
        for group in read.groups:
            with guide._pyro_context:
                location = guide.group_location(group, upstream_of(call, before))
            before[group.name] = packed[group.name]
            term = -0.5 * (packed[group.name] - location).square().sum(-1)
            name = "_".join(site.name for site in group.sites) + "_recognized"
            plate = group.plate
            if plate is None:
                pyro.factor(name, term)
                continue
            term = term.reshape(-1, *(1,) * (-plate.dim - 1))
            if (mask := guide.group_mask(group)) is not None:
                term = torch.where(mask, term, torch.zeros_like(term))
            rows = torch.arange(plate.num_rows) if plate.index is None else plate.index
            # The model has a site of the plate's name already: its rows, which are these.
            with poutine.block(hide_fn=site_is_subsample):
                frame = pyro.plate(plate.name, plate.size, subsample=rows, dim=plate.dim)
            with frame:
                pyro.factor(name, term)
        return frozenset(read.sites)

    def _read(
        self, guide: ProgramGuide, args: tuple[Any, ...], kwargs: dict[str, Any], same: bool
    ) -> Layout:
        """The guide's layout of a call; one for a whole relaxation, unless its data move."""
        if same and self._layout is not None:
            call, known = self._layout
            if [*map(id, tree_leaves(call))] == [*map(id, tree_leaves((args, kwargs)))]:
                return known
        read = guide._layout(args, kwargs, None)
        if same and not is_capturing() and not guide._learned_support:
            self._layout = (args, kwargs), read
        return read

    def forget(self) -> None:
        """Read the guide's layout anew: another call begins."""
        self._layout = None


class _Heard(Messenger):
    """What the sites of the model were given, and what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}
        self.values: dict[str, Any] = {}
        self.subsamples: dict[str, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not site_is_subsample(msg):
            self.given[msg["name"]] = msg["value"] if msg["is_observed"] else None

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.subsamples[msg["name"]] = msg["value"]
        elif not msg["infer"].get("_deterministic", False):
            self.values[msg["name"]] = msg["value"]

    def live(self, value: Any) -> Any:
        """An argument of the model, or the value of the site that observes it."""
        for name, given in self.given.items():
            if given is not None and value is given and name in self.values:
                return self.values[name]
        return value

    def check(self, recognized: Collection[str], arguments: Iterable[Any]) -> None:
        """Raise where data are latent now and the recognition would go on reading the old ones."""
        arguments = list(arguments)
        for name, given in self.given.items():
            moved = given is not None and self.values.get(name, given) is not given
            if moved and name not in recognized and not any(v is given for v in arguments):
                raise ValueError(
                    f"Site {name!r} is latent in this call, and the recognition reads its data "
                    "from an argument that the model changes before it observes it. Observe the "
                    "argument as it is (obs=x), and prepare the data before the call."
                )


class _Recognized(Messenger):
    """Turns the sites of a recognition into factors at the model's values, which it passes on."""

    def __init__(self, heard: _Heard) -> None:
        super().__init__()
        self.heard = heard
        self.names: dict[str, str] = {}

    def _pyro_sample(self, msg: Any) -> None:
        name, values = msg["name"], self.heard.values
        if site_is_subsample(msg):
            if name in self.heard.subsamples:
                msg["value"], msg["stop"] = self.heard.subsamples[name], True
            return
        if msg["infer"].get("_deterministic", False):
            msg["stop"] = True
            return
        if name not in values:
            raise ValueError(_unknown(name, values))
        fn, value = msg["fn"], values[name]
        if fn.shape() != value.shape:
            raise ValueError(
                f"The recognition's distribution of site {name!r} must have the shape of the "
                f"model's value, {tuple(value.shape)}, got {tuple(fn.shape())}. Sample it in the "
                "same plates, with the same event dimensions (to_event)."
            )
        density = fn.log_prob(value)
        renamed = f"{name}_recognized"
        self.names[name] = renamed
        msg["name"], msg["fn"] = renamed, dist.Unit(density)
        msg["value"], msg["is_observed"] = density.new_empty((*density.shape, 0)), True

    def _pyro_post_sample(self, msg: Any) -> None:
        site = msg["name"].removesuffix("_recognized")
        if self.names.get(site) == msg["name"]:
            msg["value"] = self.heard.values[site]


class _Sweep(Messenger):
    """Sites that the call knows hold their data; those that are latent are sampled."""

    def __init__(self, read: Layout) -> None:
        super().__init__()
        self.read = read

    def _pyro_sample(self, msg: Any) -> None:
        name = msg["name"]
        if name in self.read.sites:
            msg["value"], msg["is_observed"] = None, False
        elif name in self.read.observed:
            msg["value"], msg["is_observed"] = self.read.observed[name].value, True


def _unknown(name: str, values: Mapping[str, Any]) -> str:
    return (
        f"The recognition samples {name!r}, which is no site of the model. It predicts sites of "
        f"the model from what is below them: {', '.join(values) or 'none'}."
    )
