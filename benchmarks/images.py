"""Images: what a fitted model shows, kept in a record as small grey-level arrays.

Images are means of the likelihood, not draws of pixels: a Bernoulli row shows its probabilities.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

__all__ = ["decoded", "encoded", "pictures"]

NUM_IMAGES = 10


def encoded(images: np.ndarray) -> dict[str, Any]:
    """Return images `(n, height, width)` in [0, 1] as JSON: shape, and bytes in base 64."""
    grey = np.clip(np.rint(np.nan_to_num(images) * 255), 0, 255).astype(np.uint8)
    return {"shape": list(grey.shape), "bytes": base64.b64encode(grey.tobytes()).decode()}


def decoded(content: Mapping[str, Any]) -> np.ndarray:
    """Return the bytes of `encoded` as an array `(n, height, width)` of uint8.

    Example:
        >>> import numpy as np
        >>> from benchmarks.images import decoded, encoded
        >>> decoded(encoded(np.ones((2, 3, 4)))).shape
        (2, 3, 4)
    """
    raw = np.frombuffer(base64.b64decode(content["bytes"]), dtype=np.uint8)
    return raw.reshape(content["shape"])


def _likelihood(trace: Any, name: str, like: Tensor) -> Tensor:
    fn = trace.nodes[name]["fn"]
    return fn.mean.detach().expand_as(like)


def pictures(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    image_shape: tuple[int, int],
    num_draws: int = 20,
) -> dict[str, Any]:
    """Return originals, reconstructions and samples of a model of images.

    Args:
        model: The program.
        guide: A fitted guide.
        args: Positional arguments: the rows to reconstruct.
        kwargs: Keyword arguments.
        image_shape: Height and width; the observed site with as many values a row is shown.
        num_draws: Draws of q that a reconstruction is the mean of.
    """
    with torch.no_grad():
        observed = poutine.trace(model).get_trace(*args, **kwargs)
        name, data = next(
            (site, node["value"])
            for site, node in observed.nodes.items()
            if node["type"] == "sample"
            and node["is_observed"]
            and isinstance(node["value"], Tensor)
            and node["value"].numel() % (image_shape[0] * image_shape[1]) == 0
        )
        total = torch.zeros(())
        for _ in range(num_draws):
            drawn = poutine.trace(guide).get_trace(*args, **kwargs)
            replayed = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
            total = total + _likelihood(replayed, name, data)
        prior = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
        samples = _likelihood(prior, name, data)
    shown = {
        "originals": data.reshape(-1, *image_shape),
        "reconstructions": (total / num_draws).reshape(-1, *image_shape),
        "samples": samples.reshape(-1, *image_shape),
    }
    # Evenly spaced rows: neighbours in a file are often alike.
    total_rows = len(shown["originals"])
    where = torch.linspace(0, total_rows - 1, min(NUM_IMAGES, total_rows)).long()
    return {
        key: encoded(value[where].double().cpu().numpy() / max(1.0, float(value.max())))
        for key, value in shown.items()
    }
