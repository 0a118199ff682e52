"""The frozen decoder of the gap study: a VAE of statically binarized MNIST, trained once.

    python -m benchmarks.studies.mnist_decoder --epochs 60

trains the 784-200-200-50 model with its direct encoder on the 50,000 training images, keeps the
epoch with the best validation ELBO, and writes ``mnist_decoder.safetensors`` (the decoder) beside
this file. The encoder is written too: the gap study starts from it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
import zoo
from guides.inference import SVI
from zoo.data import binarized_mnist

__all__ = ["DECODER", "ENCODER", "load_decoder", "main", "make_encoder", "make_model", "train"]

DECODER = Path(__file__).with_name("mnist_decoder.safetensors")
ENCODER = Path(__file__).with_name("mnist_encoder.safetensors")
HIDDEN = (200, 200)
Z_DIM = 50


def make_model(data_mean: Tensor | None = None) -> zoo.VAE:
    """The model of the study, 784-200-200-50, with Bernoulli pixels."""
    return zoo.VAE(x_dim=784, z_dim=Z_DIM, hidden=HIDDEN, data_mean=data_mean)


def load_decoder(path: Path = DECODER) -> zoo.VAE:
    """The trained model, frozen and in evaluation mode."""
    from safetensors.torch import load_file

    model = make_model()
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()


def make_encoder(model: zoo.VAE, x: Tensor) -> guides.Guide:
    """The direct encoder that the decoder was trained with."""
    return guides.make("amortized_normal", model, x, hidden=HIDDEN)


def train(epochs: int, seed: int = 0, batch_size: int = 100, lr: float = 1e-3) -> dict[str, Any]:
    """Train model and encoder, keep the best epoch by validation ELBO, and write both."""
    from safetensors.torch import save_file

    pyro.set_rng_seed(seed)
    data = binarized_mnist.load()
    validation = torch.as_tensor(data.validation)
    with pyro.get_param_store().scope():
        model = make_model(data.train.mean(0))
        guide = make_encoder(model, data.train)
        num_steps = epochs * math.ceil(len(data.train) / batch_size)
        # The learning rate falls to a tenth, geometrically.
        optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / num_steps), "clip_norm": 1e4})
        svi = SVI(model, guide, optim, Trace_ELBO())
        best, history, start = -math.inf, [], time.perf_counter()
        for epoch in range(epochs):
            for args, kwargs in guides.rows.minibatches(
                model, (data.train,), batch_size=batch_size
            ):
                svi.step(*args, **kwargs)
            if epoch % 2 and epoch != epochs - 1:
                continue
            valid = -svi.evaluate_loss(validation) / len(validation)
            history.append({"epoch": epoch + 1, "validation_elbo": round(valid, 3)})
            print(history[-1], f"{time.perf_counter() - start:.0f} s", flush=True)
            if valid > best:
                best = valid
                save_file(_state(model), DECODER)
                save_file(_state(guide), ENCODER)
    summary = {
        "data": "statically binarized MNIST (Larochelle), 50,000 training images",
        "network": "50-200-200-784, SiLU",
        "seed": seed,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "validation_elbo": round(best, 3),
        "history": history,
    }
    DECODER.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in module.state_dict().items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    train(options.epochs, options.seed)


if __name__ == "__main__":
    main()
