"""One blocked trace of a program: every site written down, nothing disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from guides.supports import check_data, check_support, feasible

__all__ = ["Probe", "Program", "probe"]

Program = Callable[..., Any]


class Probe(Messenger):
    """Give latents a feasible value, fix known indices, and write every site down."""

    def __init__(
        self, indices: Mapping[str, Tensor], latents: frozenset[str] | None, offset: float
    ) -> None:
        super().__init__()
        self.indices = indices
        self.latents = latents
        self.offset = offset
        self.sites: dict[str, dict[str, Any]] = {}
        self.subsamples: dict[str, tuple[dict[str, Any], bool, bool]] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if site_is_subsample(msg):
            explicit = msg["value"] is not None
            random = not explicit and not _is_full(msg["fn"])
            if random and name in self.indices:
                msg["value"] = self.indices[name]
            self.subsamples[name] = (msg, explicit, random)
        elif msg["is_observed"]:
            return
        elif self.latents is None or name in self.latents:
            check_support(name, msg["fn"])
            if msg["value"] is None:
                msg["value"] = feasible(name, msg["fn"], self.offset)

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"] and not msg["infer"].get("_deterministic", False):
            check_data(msg["name"], msg["fn"], msg["value"], msg["mask"])
        self.sites[msg["name"]] = msg.copy()


def _is_full(fn: Any) -> bool:
    return fn.subsample_size is None or fn.subsample_size >= fn.size


@contextlib.contextmanager
def _undisturbed(gradients: bool) -> Iterator[None]:
    """No gradients by default, random state restored, nothing seen by handlers outside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices), torch.set_grad_enabled(gradients), poutine.block():
        yield


def probe(
    model: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    indices: Mapping[str, Tensor],
    latents: frozenset[str] | None,
    offset: float = 0.0,
    gradients: bool = False,
) -> Probe:
    """Run the program once under a :class:`Probe`, blocked and without gradients.

    Args:
        model: The program.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        indices: Row numbers for plates that the program subsamples at random.
        latents: Names of the latent sites; None for every unobserved site.
        offset: Unconstrained value around which every latent is set.
        gradients: Keep the graph, for programs that learn the support of a latent.

    Returns:
        The probe, with every site written down.
    """
    reader = Probe(indices, latents, offset)
    try:
        with _undisturbed(gradients), reader:
            model(*args, **kwargs)
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":
            raise
        raise ValueError(
            "A plate of the program is empty: the call has no rows. Pass a batch of at least one."
        ) from None
    except Exception as error:
        given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        error.add_note(f"While reading the layout of the model called with ({', '.join(given)}).")
        raise
    return reader


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}"
    plain = isinstance(value, (int, float, str, type(None)))
    return repr(value) if plain else type(value).__name__
