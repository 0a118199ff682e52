"""Natural patches: squares cut from photographs, for filters that whiten or explain them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zoo.data.dataset import Dataset

__all__ = ["cut", "load", "photographs"]

_GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601


def photographs(folder: str | Path | None = None) -> list[Tensor]:
    """Photographs in gray, values from 0 to 1.

    Args:
        folder: A folder of images of one's own (PNG or JPEG); by default the two photographs
            that scikit-learn ships, a temple and a flower, 427 x 640.

    Returns:
        One ``(height, width)`` a photograph, ordered by name.

    Raises:
        FileNotFoundError: For a folder without images.
        ModuleNotFoundError: Where scikit-learn is not installed.

    Example:
        >>> [tuple(image.shape) for image in photographs()]
        [(427, 640), (427, 640)]
    """
    if folder is None:
        try:
            from sklearn.datasets import load_sample_images
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                'The photographs are in scikit-learn: pip install "pyro-zoo[data]".'
            ) from None
        arrays: Iterable[np.ndarray] = load_sample_images().images
    else:
        from matplotlib.image import imread

        found = sorted(
            path
            for path in Path(folder).glob("*")
            if path.suffix.lower() in (".png", ".jpg", ".jpeg")
        )
        if not found:
            raise FileNotFoundError(
                f"{folder} has no PNG or JPEG images. Name a folder of photographs."
            )
        arrays = [imread(path) for path in found]
    return [_gray(array) for array in arrays]


def _gray(array: np.ndarray) -> Tensor:
    values = torch.from_numpy(np.array(array, dtype=np.float64))
    if array.dtype == np.uint8:
        values = values / 255
    if values.dim() == 3:
        values = (
            values[..., :3] @ values.new_tensor(_GREY) if values.shape[2] >= 3 else values[..., 0]
        )
    return values.to(torch.get_default_dtype())


def cut(
    images: list[Tensor], patch: tuple[int, int], number: int, generator: torch.Generator
) -> Tensor:
    """Cut patches at random places.

    Args:
        images: Photographs ``(height, width)``.
        patch: Height and width of a patch.
        number: Patches in all; photographs are drawn by their area.
        generator: Source of the places.

    Returns:
        Patches ``(number, height, width)``.

    Raises:
        ValueError: Where a photograph is smaller than a patch.
    """
    height, width = patch
    small = [tuple(i.shape) for i in images if i.shape[0] < height or i.shape[1] < width]
    if small:
        raise ValueError(
            f"Patches of {height} x {width} do not fit an image of {small[0][0]} x {small[0][1]}: "
            "ask for smaller patches, or leave that image out."
        )
    areas = torch.tensor(
        [float((i.shape[0] - height + 1) * (i.shape[1] - width + 1)) for i in images]
    )
    chosen = torch.multinomial(areas, number, replacement=True, generator=generator)
    places = torch.rand(number, 2, generator=generator, dtype=torch.float64)
    patches = []
    for which, (down, right) in zip(chosen.tolist(), places.tolist(), strict=True):
        image = images[which]
        top = int(down * (image.shape[0] - height + 1))
        left = int(right * (image.shape[1] - width + 1))
        patches.append(image[top : top + height, left : left + width])
    return torch.stack(patches)


def load(
    *,
    patch: int | tuple[int, int] = 16,
    num_train: int = 20_000,
    num_test: int = 2_000,
    seed: int = 0,
    folder: str | Path | None = None,
    center: bool = True,
) -> Dataset:
    """Patches of photographs, in rows.

    Test patches come from the right fifth of every photograph, training patches from the rest:
    no pixel is in both.

    Args:
        patch: Side of a square patch, or height and width.
        num_train: Training patches.
        num_test: Test patches.
        seed: Seed of the places; the global generator is left alone.
        folder: A folder of images of one's own; see :func:`photographs`.
        center: Take each patch's own mean from it: how light a place is says nothing of its form.

    Raises:
        ValueError: For patches that do not fit, or numbers below 1.

    Example:
        >>> data = load(patch=8, num_train=100, num_test=10)
        >>> data.train.shape, data.image_shape
        (torch.Size([100, 64]), (8, 8))
    """
    if min(num_train, num_test) < 1:
        raise ValueError(
            f"num_train and num_test must be at least 1, got {num_train} and {num_test}."
        )
    size = (patch, patch) if isinstance(patch, int) else patch
    generator = torch.Generator().manual_seed(seed)
    images = photographs(folder)
    edges = [int(image.shape[1] * 0.8) for image in images]
    parts = {
        "train": [i[:, :e] for i, e in zip(images, edges, strict=True)],
        "test": [i[:, e:] for i, e in zip(images, edges, strict=True)],
    }
    rows = {}
    for name, number in (("train", num_train), ("test", num_test)):
        patches = cut(parts[name], size, number, generator).reshape(number, -1)
        rows[name] = patches - patches.mean(-1, keepdim=True) if center else patches
    return Dataset(
        name="natural_patches",
        train=rows["train"],
        test=rows["test"],
        binarization="none, gray values from 0 to 1" + (", patch mean taken off" * center),
        image_shape=size,
    )
