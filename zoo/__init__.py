"""Generative models, written once, as plain Pyro programs.

A model knows nothing of guides or loops: anything that runs a Pyro program runs these.

    model = zoo.make("vae", x_dim=64, z_dim=8)
    model(size=10)                  # simulates 10 rows
    model(x)                        # conditions on x

``MODELS`` is the whole registry: a plain dict from names to the class behind each. Classes are
imported when they are first used: ``zoo.VAE`` is ``zoo.vae.VAE``. Data sets are in
:mod:`zoo.data`, small posteriors with a known answer in :mod:`zoo.reference`.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.autoregressive_flow import AutoregressiveFlow
    from zoo.autoregressive_gaussian import AutoregressiveGaussian
    from zoo.conv_vae import ConvVAE
    from zoo.deep_markov import DeepMarkov
    from zoo.flow_likelihood_vae import FlowLikelihoodVAE
    from zoo.flow_prior_vae import FlowPriorVAE
    from zoo.flow_state_space import FlowStateSpace
    from zoo.hierarchical_vae import HierarchicalVAE
    from zoo.linear_gaussian import LinearGaussian
    from zoo.model import Model
    from zoo.pattern_generator import PatternGenerator
    from zoo.rao_ballard import RaoBallard
    from zoo.reference.eight_schools import EightSchools
    from zoo.reference.gaussian_mixture import GaussianMixture
    from zoo.reference.slcp import SLCP
    from zoo.reference.two_moons import TwoMoons
    from zoo.sparse_coding import SparseCoding
    from zoo.srnn import SRNN
    from zoo.state_space import StateSpace
    from zoo.temporal_difference import TemporalDifference
    from zoo.vae import VAE
    from zoo.visual_pathway import VisualPathway
    from zoo.vrnn import VRNN
    from zoo.whitening import Whitening

__all__ = [
    "MODELS",
    "SLCP",
    "SRNN",
    "VAE",
    "VRNN",
    "AutoregressiveFlow",
    "AutoregressiveGaussian",
    "ConvVAE",
    "DeepMarkov",
    "EightSchools",
    "FlowLikelihoodVAE",
    "FlowPriorVAE",
    "FlowStateSpace",
    "GaussianMixture",
    "HierarchicalVAE",
    "LinearGaussian",
    "Model",
    "PatternGenerator",
    "RaoBallard",
    "SparseCoding",
    "StateSpace",
    "TemporalDifference",
    "TwoMoons",
    "VisualPathway",
    "Whitening",
    "make",
]

MODELS = {
    "linear_gaussian": "zoo.linear_gaussian:LinearGaussian",
    "vae": "zoo.vae:VAE",
    "conv_vae": "zoo.conv_vae:ConvVAE",
    "hierarchical_vae": "zoo.hierarchical_vae:HierarchicalVAE",
    "sparse_coding": "zoo.sparse_coding:SparseCoding",
    "rao_ballard": "zoo.rao_ballard:RaoBallard",
    "whitening": "zoo.whitening:Whitening",
    "flow_prior_vae": "zoo.flow_prior_vae:FlowPriorVAE",
    "flow_likelihood_vae": "zoo.flow_likelihood_vae:FlowLikelihoodVAE",
    "state_space": "zoo.state_space:StateSpace",
    "deep_markov": "zoo.deep_markov:DeepMarkov",
    "vrnn": "zoo.vrnn:VRNN",
    "srnn": "zoo.srnn:SRNN",
    "autoregressive_gaussian": "zoo.autoregressive_gaussian:AutoregressiveGaussian",
    "autoregressive_flow": "zoo.autoregressive_flow:AutoregressiveFlow",
    "temporal_difference": "zoo.temporal_difference:TemporalDifference",
    "flow_state_space": "zoo.flow_state_space:FlowStateSpace",
    "pattern_generator": "zoo.pattern_generator:PatternGenerator",
    "visual_pathway": "zoo.visual_pathway:VisualPathway",
    "eight_schools": "zoo.reference.eight_schools:EightSchools",
    "two_moons": "zoo.reference.two_moons:TwoMoons",
    "slcp": "zoo.reference.slcp:SLCP",
    "gaussian_mixture": "zoo.reference.gaussian_mixture:GaussianMixture",
}


def make(name: str, **options: Any) -> Model:
    """Build a model by name.

    Args:
        name: A key of ``MODELS``.
        **options: Arguments of the model's constructor.

    Returns:
        The model.

    Raises:
        ValueError: For an unknown name.
        TypeError: For an option that the model does not have, or one that it needs.

    Example:
        >>> make("vae", x_dim=64, z_dim=8)(size=3).shape
        torch.Size([3, 64])
    """
    if name not in MODELS:
        close = difflib.get_close_matches(str(name), MODELS, 1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"Unknown model {name!r}. {hint}Available models: {', '.join(MODELS)}.")
    import inspect

    model_class = _resolve(MODELS[name])
    signature = inspect.signature(model_class)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise TypeError(f"Model {name!r}: {error}. Its options: {signature}.") from None
    model: Model = model_class(**options)
    return model


def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def __getattr__(name: str) -> Any:
    if name == "Model":
        return _resolve("zoo.model:Model")
    for path in MODELS.values():
        if path.partition(":")[2] == name:
            return _resolve(path)
    if name in ("data", "reference"):
        return importlib.import_module(f"zoo.{name}")
    raise AttributeError(f"module 'zoo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "data", "reference"})
