"""Fashion-MNIST: 60,000 + 10,000 articles of clothing of 28 x 28 pixels, harder than MNIST."""

from __future__ import annotations

from zoo.data.dataset import Dataset
from zoo.data.idx import load_images, remote_files

__all__ = ["FILES", "load"]

FILES = remote_files(
    "fashion_mnist",
    {
        "train-images-idx3-ubyte": (
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte": (
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte": (
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte": (
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
    mirrors=(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    ),
    # Debian's package dataset-fashion-mnist
    system=("/usr/share/datasets/fashion-mnist",),
)


def load(
    *,
    binarize: str = "none",
    seed: int = 0,
    num_validation: int = 0,
    mirror: str | None = None,
) -> Dataset:
    """Fashion-MNIST, pixels from 0 to 1 in rows of 784.

    References:
        | Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms
        | (Xiao, Rasul & Vollgraf, 2017) https://arxiv.org/abs/1708.07747

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
        "fashion_mnist",
        FILES,
        how=binarize,
        seed=seed,
        num_validation=num_validation,
        mirror=mirror,
    )
