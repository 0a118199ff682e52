"""The arrays that all peers start from: data, parameters, and the noise of one draw.

`arrays` makes them from a seed with numpy's generator; `save` writes them, so that any side may
pass arrays of its own. Names and shapes, by task:

    eight_schools   y, sigma (8)                                    K = 10 latents
    radon           floor, uranium, county, y (919)                 K = 90 latents
      both          loc (K), scale (K) or scale_tril (K, K), noise (K)
    vae             x (B, 784), model.*, guide.*, noise (B, 48)
    pc              x (B, 784), model.*
    pcx_decoder     x (B, 784), layers.0.weight (out, in), layers.0.bias, ..  layers.2.*
    fabricpc_mnist  x (B, 784), labels (B), layers.0.weight (out, in), layers.0.bias, ..

Latents are packed unconstrained, u ~ loc + scale * noise (or scale_tril @ noise):

    eight_schools   mu, log tau, theta_trans (8)
    radon           mu_alpha, log sigma_alpha, log sigma_y, beta (2), alpha_raw (85)
    vae             z2 (16), z1 (32), of every row

The loss is minus the ELBO at that one draw, log|dz/du| included, in nats, of all rows together.

`model.*` are the names of the state of zoo's HierarchicalVAE(784, (32, 16), (256,)), and
`guide.shift`, `guide.scale`, `guide.init`, `guide.network.0.weight` .. `guide.network.2.bias`
those of the amortized normal guide's encoder.

The radon program is posteriordb's radon_hierarchical_intercept_noncentered:

    mu_alpha ~ Normal(0, 10)   sigma_alpha ~ HalfNormal(1)   sigma_y ~ HalfNormal(1)
    beta_1, beta_2 ~ Normal(0, 10)
    alpha_raw_j ~ Normal(0, 1)                                        j = 1..85 counties
    y_n ~ Normal(mu_alpha + sigma_alpha alpha_raw[county_n]
                 + beta_1 uranium_n + beta_2 floor_n, sigma_y)         n = 1..919 homes

Its data are made here with that shape, or read from posteriordb's `radon_mn.json.zip`.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TASKS", "arrays", "load", "radon_data", "save"]

Arrays = dict[str, NDArray[Any]]

TASKS = ("eight_schools", "radon", "vae", "pc", "pcx_decoder", "fabricpc_mnist")

_COUNTIES = 85
_HOMES = 919
_MIN_SCALE = 0.05


def arrays(
    task: str,
    seed: int = 0,
    *,
    guide: str = "normal",
    batch: int | None = None,
    data: str | Path | None = None,
    dtype: str = "float32",
) -> Arrays:
    """Make the arrays of a task.

    Args:
        task: One of ``TASKS``.
        seed: Seed of data, parameters and noise.
        guide: ``"normal"`` or ``"multivariate_normal"``, for eight schools and radon.
        batch: Rows of the tasks on images; 128 by default, 200 for the tasks of others.
        data: posteriordb's radon data, or an npz with images ``x`` (and ``labels``).
        dtype: Floating-point type.

    Raises:
        ValueError: For an unknown task or guide.

    Example:
        >>> made = arrays("eight_schools")
        >>> made["loc"].shape, made["scale"].shape, made["noise"].shape
        ((10,), (10,), (10,))
    """
    rng = np.random.default_rng(seed)
    if task == "eight_schools":
        made: Arrays = {
            "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
            "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
            **_gaussian(rng, 10, guide),
        }
    elif task == "radon":
        made = {**radon_data(rng, data), **_gaussian(rng, _COUNTIES + 5, guide)}
    elif task == "vae":
        x = _images(rng, batch or 128, data)["x"] > 0.5
        made = {"x": x.astype(float), **_decoder(rng), **_encoder(rng, x.astype(float))}
        made["noise"] = rng.standard_normal((len(x), 48))
    elif task == "pc":
        x = _images(rng, batch or 128, data)["x"] > 0.5
        made = {"x": x.astype(float), **_decoder(rng)}
    elif task == "pcx_decoder":
        made = {"x": _images(rng, batch or 200, data)["x"], **_layers(rng, (64, 128, 128, 784))}
    elif task == "fabricpc_mnist":
        made = {**_images(rng, batch or 200, data), **_layers(rng, (784, 256, 64, 10))}
    else:
        raise ValueError(f"Unknown task {task!r}. Available: {', '.join(TASKS)}.")
    return {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in made.items()}


def save(path: str | Path, made: Mapping[str, Any]) -> None:
    """Write arrays to an npz file, whose path is the option ``arrays`` of a request.

    Args:
        path: The file.
        made: Arrays by name.
    """
    with Path(path).open("wb") as file:
        values: dict[str, Any] = {name: np.asarray(value) for name, value in made.items()}
        np.savez(file, **values)


def load(task: str, seed: int, options: Mapping[str, Any]) -> Arrays:
    """The arrays of a request: those of its file ``arrays``, or made from its seed.

    Args:
        task: One of ``TASKS``.
        seed: Seed.
        options: Options of the request: ``arrays``, ``guide``, ``batch``, ``data``, ``dtype``.
    """
    if options.get("arrays"):
        with np.load(options["arrays"]) as file:
            return {name: file[name] for name in file.files}
    known = {k: v for k, v in options.items() if k in ("guide", "batch", "data", "dtype") and v}
    return arrays(task, seed, **known)


def radon_data(rng: np.random.Generator, path: str | Path | None = None) -> Arrays:
    """Log radon of homes in counties.

    Args:
        rng: Makes data of that shape where there is no path.
        path: posteriordb's ``radon_mn.json.zip``, or its JSON.

    Returns:
        ``floor``, ``uranium``, ``county`` (from 0) and ``y``, one entry a home.
    """
    if path is None:
        counts = 1 + rng.multinomial(_HOMES - _COUNTIES, rng.dirichlet(np.ones(_COUNTIES)))
        county = np.repeat(np.arange(_COUNTIES), counts)
        uranium = rng.normal(0.0, 0.4, _COUNTIES)[county]
        floor = (rng.random(_HOMES) < 0.17).astype(float)
        effects = 1.5 + 0.15 * rng.standard_normal(_COUNTIES)[county]
        y = effects + 0.7 * uranium - 0.65 * floor + 0.75 * rng.standard_normal(_HOMES)
        return {"floor": floor, "uranium": uranium, "county": county, "y": y}
    path = Path(path)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            text = archive.read(archive.namelist()[0]).decode()
    else:
        text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    return {
        "floor": np.array(found["floor_measure"], dtype=float),
        "uranium": np.array(found["log_uppm"], dtype=float),
        "county": np.array(found["county_idx"], dtype=np.int64) - 1,
        "y": np.array(found["log_radon"], dtype=float),
    }


def _gaussian(rng: np.random.Generator, size: int, guide: str) -> Arrays:
    made: Arrays = {"loc": 0.1 * rng.standard_normal(size)}
    scale = 0.1 * np.exp(0.3 * rng.standard_normal(size))
    if guide == "normal":
        made["scale"] = scale
    elif guide == "multivariate_normal":
        lower = np.tril(0.1 * rng.standard_normal((size, size)), -1)
        made["scale_tril"] = scale[:, None] * (np.eye(size) + lower)
    else:
        raise ValueError(f'guide must be "normal" or "multivariate_normal", got {guide!r}.')
    return {**made, "noise": rng.standard_normal(size)}


def _images(rng: np.random.Generator, batch: int, data: str | Path | None) -> Arrays:
    """Pixels in [0, 1], of digits or of noise as dark as digits, and labels."""
    if data is not None:
        with np.load(data) as file:
            x = file["x"][:batch].reshape(-1, 784)
            labels = file["labels"][:batch] if "labels" in file.files else None
        x = x / 255.0 if x.dtype == np.uint8 else x
        return {"x": x.astype(float), **({} if labels is None else {"labels": labels})}
    x = np.clip(rng.normal(0.13, 0.5, (batch, 784)), 0.0, 1.0)
    return {"x": x, "labels": rng.integers(0, 10, batch)}


def _linear(rng: np.random.Generator, name: str, inputs: int, outputs: int) -> Arrays:
    bound = inputs**-0.5
    return {
        f"{name}.weight": rng.uniform(-bound, bound, (outputs, inputs)),
        f"{name}.bias": rng.uniform(-bound, bound, outputs),
    }


def _layers(rng: np.random.Generator, sizes: tuple[int, ...]) -> Arrays:
    made: Arrays = {}
    for number, (inputs, outputs) in enumerate(pairwise(sizes)):
        made |= _linear(rng, f"layers.{number}", inputs, outputs)
    return made


def _decoder(rng: np.random.Generator) -> Arrays:
    made = {
        **_linear(rng, "model.levels.0.network.0", 16, 256),
        **_linear(rng, "model.levels.0.loc", 256, 32),
        **_linear(rng, "model.levels.0.raw_scale", 256, 32),
        **_linear(rng, "model.network.0", 32, 256),
        **_linear(rng, "model.likelihood.output", 256, 784),
    }
    # The scale of z1 starts near 1, as in the zoo's model.
    made["model.levels.0.raw_scale.bias"] += np.log(np.expm1(1.0 - _MIN_SCALE))
    return made


def _encoder(rng: np.random.Generator, x: NDArray[Any]) -> Arrays:
    shift = x.mean(0)
    made = {
        "guide.shift": shift,
        "guide.scale": np.full(784, np.sqrt(np.square(x - shift).mean())),
        "guide.init": np.concatenate([np.zeros(48), np.full(48, np.log(np.expm1(0.1)))]),
        **_linear(rng, "guide.network.0", 784, 256),
        **_linear(rng, "guide.network.2", 256, 96),
    }
    made["guide.network.2.weight"] *= 0.1
    return made
