"""quick: eight cells of the grid and predictive coding on handwritten digits, in half an hour.

Two models, a VAE and one with two levels of latents, each trained jointly with every method and
each frozen first, so that guides are compared on the very same model.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.budget import Budget
from benchmarks.task import GRID, Task

__all__ = ["TASKS", "hierarchical_vae", "vae"]

_BUDGET = Budget(num_steps=1200, batch_size=256, lr=0.01, weight_decay=1.0)

# Encoders of both models: as wide as the decoders.
_OPTIONS = {name: {"hidden": (128,)} for name in GRID if name.startswith("amortized_")}


def _task(name: str, make_model: Any, description: str) -> Task:
    from zoo.data import digits

    data = digits.load()
    return Task(
        name=name,
        model_name=name,
        make_model=lambda: make_model(data.train.mean(0)),
        args=(data.train,),
        held_out=(data.test,),
        guides=GRID,
        loops=("svi", "predictive_coding"),
        regimes=("joint", "frozen"),
        decoder_guide="amortized_normal",
        evidence_guide="multivariate_normal",
        baseline="amortized_normal",
        guide_options=_OPTIONS,
        budget=_BUDGET,
        description=description,
        about_data=(
            f"Handwritten digits of 8 x 8 pixels (scikit-learn, 1,797 in all): {len(data.train)} "
            f"to train on, {len(data.test)} drawn at random held out and never trained on."
        ),
        binarization=f"{data.binarization} of the pixels' 17 grey levels scaled to 0 .. 1",
        image_shape=data.image_shape,
        expected_order=("amortized_normal", "normal", "multivariate_normal"),
    )


def vae() -> Task:
    """One level of 8 latents, a network of 128 units, Bernoulli pixels."""

    def make_model(data_mean: torch.Tensor) -> torch.nn.Module:
        from zoo.vae import VAE

        return VAE(x_dim=64, z_dim=8, hidden=(128,), data_mean=data_mean)

    text = (
        "A variational autoencoder's generative half: 8 standard normal latents a row, a network "
        "with one hidden layer of 128 units, 64 Bernoulli pixels."
    )
    return _task("vae", make_model, text)


def hierarchical_vae() -> Task:
    """Two levels of latents, 4 over 8, networks of 128 units, Bernoulli pixels."""

    def make_model(data_mean: torch.Tensor) -> torch.nn.Module:
        from zoo.hierarchical_vae import HierarchicalVAE

        return HierarchicalVAE(x_dim=64, z_dims=(8, 4), hidden=(128,), data_mean=data_mean)

    text = (
        "Two levels: 4 standard normal latents predict mean and scale of 8 latents below them, "
        "which predict 64 Bernoulli pixels; each network has one hidden layer of 128 units."
    )
    return _task("hierarchical_vae", make_model, text)


TASKS = {"vae": vae, "hierarchical_vae": hierarchical_vae}
