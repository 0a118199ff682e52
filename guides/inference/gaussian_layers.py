"""Layers of Gaussians: what zero-divergence and fixed-prediction learning ask of a program."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guides.energy import LogJoint
from guides.inference.dependencies import dependencies
from guides.inference.particle_density import ParticleDensity
from guides.supports import unwrap

__all__ = ["Layers", "gaussian_layers"]


@dataclass(frozen=True)
class Layers:
    """A chain of Gaussian sites.

    Args:
        sites: Latents and the output, from the output to the one nearest the inputs.
        scales: Standard deviation of each latent, the same for all rows and coordinates.
    """

    sites: tuple[str, ...]
    scales: dict[str, float]


def gaussian_layers(log_joint: LogJoint) -> Layers:
    """Read the chain of a program: each variable predicts the next one, the last is observed.

    Args:
        log_joint: The log joint of a call.

    Returns:
        Its layers.

    Raises:
        ValueError: Where there are latents outside the data plate, more or fewer than one observed
            output, a latent that is no Normal of one fixed standard deviation, or a latent that
            does not predict exactly one other site.
    """
    read = log_joint.layout
    rule = "Learning that equals backpropagation needs a chain of Gaussian layers"
    outside = [name for name, site in read.sites.items() if site.row_dim is None]
    if outside:
        raise ValueError(
            f"{rule}, and latent {outside[0]!r} lies outside the data plate. Use PredictiveCoding."
        )
    outputs = [name for name, site in read.observed.items() if site.row_dim is not None]
    if len(outputs) != 1:
        raise ValueError(
            f"{rule} with one observed output, and this program observes "
            f"{', '.join(outputs) or 'nothing'}. Use PredictiveCoding."
        )
    found = dependencies(ParticleDensity(log_joint))
    scales: dict[str, float] = {}
    for name in (*read.sites, *outputs):
        site = read.sites[name].fn if name in read.sites else read.observed[name].fn
        base = unwrap(site)
        if type(base).__name__ != "Normal":
            raise ValueError(
                f"{rule}, and site {name!r} is {type(base).__name__}. Use PredictiveCoding, which "
                "takes any density."
            )
        scale = base.scale.detach()
        if bool((scale != scale.flatten()[0]).any()) or base.scale.requires_grad:
            raise ValueError(
                f"{rule} whose standard deviations are fixed, one a site, and that of site "
                f"{name!r} is learned or differs between entries. Use PredictiveCoding."
            )
        scales[name] = float(scale.flatten()[0])
        children = found.children.get(name, ())
        if name in read.sites and (len(children) != 1 or len(found.parents[name]) > 1):
            raise ValueError(
                f"{rule}: each latent predicts one other site. {name!r} depends on "
                f"{', '.join(found.parents[name]) or 'no latent'} and predicts "
                f"{', '.join(children) or 'nothing'}. Use PredictiveCoding."
            )
    chain = [outputs[0]]
    while found.parents[chain[-1]]:
        if len(found.parents[chain[-1]]) > 1:
            raise ValueError(
                f"{rule}, and site {chain[-1]!r} has several parents: "
                f"{', '.join(found.parents[chain[-1]])}. Use PredictiveCoding."
            )
        chain.append(found.parents[chain[-1]][0])
    _check_scales_hold(log_joint, scales, rule)
    return Layers(tuple(chain), scales)


def _check_scales_hold(log_joint: LogJoint, scales: dict[str, float], rule: str) -> None:
    """Raise where a standard deviation moves with a latent."""
    values = log_joint.predictions()
    with torch.no_grad():
        fns = log_joint.run({n: v + 0.37 for n, v in values.items()}, density=False).fns
    for name, scale in scales.items():
        if bool((unwrap(fns[name]).scale - scale).abs().max() > 1e-6 * scale):
            raise ValueError(
                f"{rule}, and the standard deviation of site {name!r} depends on a latent. Use "
                "PredictiveCoding."
            )
