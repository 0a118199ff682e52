"""MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 pixels."""

from __future__ import annotations

from zoo.data.dataset import Dataset
from zoo.data.idx import load_images, remote_files

__all__ = ["FILES", "load"]

FILES = remote_files(
    "mnist",
    {
        "train-images-idx3-ubyte": (
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        "train-labels-idx1-ubyte": (
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        "t10k-images-idx3-ubyte": (
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        "t10k-labels-idx1-ubyte": (
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    mirrors=(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist",
    ),
)


def load(
    *,
    binarize: str = "none",
    seed: int = 0,
    num_validation: int = 0,
    mirror: str | None = None,
) -> Dataset:
    """MNIST, pixels from 0 to 1 in rows of 784.

    The published figures of static binarization are for ``binarized_mnist``: a stochastic
    binarization with a seed of one's own is another data set.

    References:
        | Gradient-based learning applied to document recognition (LeCun et al., 1998)
        | https://doi.org/10.1109/5.726791

    Args:
        binarize: ``"none"``, ``"threshold"`` or ``"stochastic"``.
        seed: Seed of a stochastic binarization.
        num_validation: How many of the last training rows are set aside.
        mirror: Base address of a mirror of one's own.

    Raises:
        ValueError: For an unknown binarization, or a file with a wrong checksum.
        FileNotFoundError: Where the files are nowhere and cannot be downloaded.
    """
    return load_images(
        "mnist", FILES, how=binarize, seed=seed, num_validation=num_validation, mirror=mirror
    )
