"""The loaders: what they return, on fabricated files and, where they are, on the real ones."""

import dataclasses
import gzip
import hashlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import zoo
import zoo.data
from zoo.data import binarized_mnist, files
from zoo.data.dataset import binarize
from zoo.data.idx import read_idx

pytestmark = pytest.mark.usefixtures("cache_folder")

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ("mnist", "fashion_mnist")
# Read before a fixture hides them, where this machine may have the real files.
REAL = {
    name: os.environ[name] for name in ("PYRO_ZOO_DATA", "PYRO_ZOO_CACHE") if name in os.environ
}


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def fabricate(name: str, folder: Path, monkeypatch) -> dict[str, np.ndarray]:
    """Small files in the layout of a data set, which the loader takes for the real ones."""
    rng = np.random.default_rng(0)
    arrays = {}
    module = importlib.import_module(f"zoo.data.{name}")
    replaced = {}
    for key, file in module.FILES.items():
        number = 20 if "train" in key else 10
        if name == "binarized_mnist":
            array = rng.integers(0, 2, (number, 784), dtype=np.uint8)
            raw = "".join(" ".join(map(str, row)) + "\n" for row in array).encode()
            content = array.tobytes()
        else:
            shape = (number, 28, 28) if "images" in key else (number,)
            array = rng.integers(0, 256 if "images" in key else 10, shape, dtype=np.uint8)
            content = idx(array)
            raw = gzip.compress(content)
        arrays[key] = array
        replaced[key] = dataclasses.replace(
            file, sha256=hashlib.sha256(content).hexdigest(), system=()
        )
        path = folder / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)
    monkeypatch.setattr(module, "FILES", replaced)
    return arrays


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("route", ["download", "folder"])
def test_image_sets(server, tmp_path, monkeypatch, name, route) -> None:
    folder = server.folder if route == "download" else tmp_path / "data"
    arrays = fabricate(name, folder, monkeypatch)
    options = {}
    if route == "download":
        options["mirror"] = server.url
    else:
        monkeypatch.setenv("PYRO_ZOO_DATA", str(folder))
    data = zoo.data.load(name, num_validation=5, **options)
    images = torch.as_tensor(arrays["train-images-idx3-ubyte"].reshape(20, 784)).float() / 255
    assert data.name == name
    assert data.train.equal(images[:15])
    assert data.validation.equal(images[15:])
    assert data.train_labels.tolist() == arrays["train-labels-idx1-ubyte"][:15].tolist()
    assert data.validation_labels.tolist() == arrays["train-labels-idx1-ubyte"][15:].tolist()
    assert data.test_labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert (data.test.shape, data.image_shape, data.x_dim) == ((10, 784), (28, 28), 784)
    assert data.binarization == "none, values from 0 to 1"
    assert data.data_mean.equal(data.train.mean(0))
    whole = zoo.data.load(name, binarize="threshold", **options)
    assert whole.validation is None
    assert whole.validation_labels is None
    assert whole.train.equal((images > 0.5).float())
    with pytest.raises(ValueError, match="num_validation must lie between 0 and 19, got 20"):
        zoo.data.load(name, num_validation=20, **options)


@pytest.mark.parametrize("route", ["amat", "npz"])
def test_binarized_mnist(server, tmp_path, monkeypatch, route) -> None:
    arrays = fabricate("binarized_mnist", server.folder, monkeypatch)
    options = {"mirror": server.url}
    if route == "npz":
        folder = tmp_path / "data" / "binarized_mnist"
        folder.mkdir(parents=True)
        parts = {f"X_{part}": array.astype(np.float32) for part, array in arrays.items()}
        np.savez_compressed(folder / "mnist_binarized.npz", **parts)
        monkeypatch.setenv("PYRO_ZOO_DATA", str(tmp_path / "data"))
        options = {}
    data = zoo.data.load("binarized_mnist", **options)
    assert data.train.equal(torch.as_tensor(arrays["train"]).float())
    assert data.validation.equal(torch.as_tensor(arrays["valid"]).float())
    assert data.test.equal(torch.as_tensor(arrays["test"]).float())
    assert data.binarization == "static, as published by Larochelle"
    assert len(server.requests) == (3 if route == "amat" else 0)


def test_a_broken_archive_is_a_wrong_file(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "binarized_mnist"
    folder.mkdir()
    (folder / "mnist_binarized.npz").write_bytes(b"PK\x03\x04 broken")
    monkeypatch.setenv("PYRO_ZOO_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"mnist_binarized\.npz is not the file"):
        zoo.data.load("binarized_mnist")


def test_broken_formats() -> None:
    with pytest.raises(ValueError, match="starts with 00 00 08, got 1f 8b 08"):
        read_idx(gzip.compress(b""))
    with pytest.raises(
        ValueError, match=r"of shape \(3,\) has 11 bytes, got 10: it is incomplete"
    ):
        read_idx(idx(np.zeros(3, np.uint8))[:-1])
    with pytest.raises(ValueError, match="holds zeros and ones"):
        binarized_mnist.read_amat(b"0 1 2\n")
    with pytest.raises(ValueError, match=r"no \.npz archive"):
        binarized_mnist.read_npz("X_train")(b"PK\x03\x04 broken")


# --- digits and binarization ------------------------------------------------------------------


def test_digits_are_split_once_for_all() -> None:
    state = torch.random.get_rng_state()
    data, again = zoo.data.load("digits", binarize="none"), zoo.data.load("digits")
    assert torch.random.get_rng_state().equal(state)
    assert (data.train.shape, data.test.shape) == ((1437, 64), (360, 64))
    assert (data.image_shape, data.validation) == ((8, 8), None)
    assert again.train.equal((data.train > 0.5).float())
    assert again.test_labels.equal(data.test_labels)
    # scikit-learn's own order, by content: every row is in exactly one part
    from sklearn.datasets import load_digits

    everything = load_digits()
    ours = torch.cat([data.train, data.test]) * 16
    order = np.lexsort(everything.data.T), np.lexsort(ours.numpy().T)
    assert (everything.data[order[0]] == ours.numpy()[order[1]]).all()
    labels = torch.cat([data.train_labels, data.test_labels]).numpy()
    assert (everything.target[order[0]] == labels[order[1]]).all()
    # a fixed split: another version of torch or scikit-learn must not move it
    assert data.test_labels[:10].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8]
    other = zoo.data.load("digits", split_seed=1)
    assert not other.test_labels.equal(data.test_labels)


def test_digits_of_every_class_are_in_both_parts() -> None:
    data = zoo.data.load("digits")
    for labels, number in ((data.train_labels, 100), (data.test_labels, 20)):
        assert labels.bincount(minlength=10).min() >= number


@pytest.mark.usefixtures("float64")
def test_rows_follow_the_default_dtype() -> None:
    assert zoo.data.load("digits").train.dtype is torch.float64


def test_digits_that_cannot_be_split() -> None:
    for number in (0, 1797):
        with pytest.raises(ValueError, match="num_test must lie between 1 and 1796"):
            zoo.data.load("digits", num_test=number)


def test_stochastic_binarization() -> None:
    state = torch.random.get_rng_state()
    probability = torch.linspace(0, 1, 11).repeat(4000, 1)
    x, words = binarize(probability, "stochastic", seed=3)
    assert words == "stochastic, drawn once with seed 3"
    assert set(x.unique().tolist()) == {0.0, 1.0}
    standard_error = (probability * (1 - probability)).mean(0).div(4000).sqrt()
    assert ((x.mean(0) - probability[0]).abs() <= 4 * standard_error).all()
    assert binarize(probability, "stochastic", seed=3)[0].equal(x)
    assert not binarize(probability, "stochastic", seed=4)[0].equal(x)
    assert binarize(probability.double(), "stochastic", seed=3)[0].equal(x.double())
    assert torch.random.get_rng_state().equal(state)


def test_unknown_names() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown data set 'cifar'\. Available data sets: digits"
    ):
        zoo.data.load("cifar")
    with pytest.raises(
        ValueError, match="binarize must be one of none, threshold, stochastic, got"
    ):
        zoo.data.load("digits", binarize="median")


def test_importing_data_loads_nothing() -> None:
    code = (
        "import sys, zoo.data; assert 'digits' in zoo.data.DATASETS; "
        "assert not {'torch', 'numpy', 'sklearn', 'pooch'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# --- the real files, where this machine has them ------------------------------------------------


def on_this_machine(name: str) -> bool:
    module = importlib.import_module(f"zoo.data.{name}")
    folders = [Path(folder) for folder in REAL.values()] or [files.cache_folder()]
    return all(
        any(path.is_file() for path in map(Path, file.system))
        or any(path.is_file() for folder in folders for path, _ in file.candidates(folder))
        for file in module.FILES.values()
    )


def real(name: str) -> pytest.MarkDecorator:
    reason = f"the real {name} files are not on this machine: set PYRO_ZOO_DATA to their folder"
    return pytest.mark.skipif(not on_this_machine(name), reason=reason)


@pytest.fixture
def real_files(cache_folder, monkeypatch) -> None:
    monkeypatch.delenv("PYRO_ZOO_CACHE")
    for name, folder in REAL.items():
        monkeypatch.setenv(name, folder)


# mean and deviation of the training pixels as they are quoted everywhere; counts by class
@pytest.mark.usefixtures("real_files")
@pytest.mark.parametrize(
    ("name", "mean", "deviation", "test_counts"),
    [
        pytest.param(
            "mnist",
            0.1307,
            0.3081,
            [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
            marks=real("mnist"),
        ),
        pytest.param("fashion_mnist", 0.2860, 0.3530, [1000] * 10, marks=real("fashion_mnist")),
    ],
)
def test_real_images(name, mean, deviation, test_counts) -> None:
    data = zoo.data.load(name)
    assert (data.train.shape, data.test.shape) == ((60000, 784), (10000, 784))
    assert data.train.mean().item() == pytest.approx(mean, abs=1e-4)
    assert data.train.std().item() == pytest.approx(deviation, abs=1e-4)
    assert data.test_labels.bincount().tolist() == test_counts


@real("binarized_mnist")
@pytest.mark.usefixtures("real_files")
def test_real_binarized_mnist() -> None:
    """Written back as text, each part has the MD5 of the published .amat file."""
    published = {
        "train": "db28b1a6ae0fe70cbd3da91acf46e477",
        "valid": "bf37822a04e94123630de6a7dfd9c9ef",
        "test": "14e41ae11040adba6ab8cb291eda0dd8",
    }
    data = zoo.data.load("binarized_mnist")
    for part, x in (("train", data.train), ("valid", data.validation), ("test", data.test)):
        text = np.full((len(x), 2 * 784), ord(" "), np.uint8)
        text[:, ::2] = x.numpy().astype(np.uint8) + ord("0")
        text[:, -1] = ord("\n")
        content = text.tobytes()
        assert hashlib.md5(content).hexdigest() == published[part]
        read = hashlib.sha256(binarized_mnist.read_amat(content)).hexdigest()
        assert read == binarized_mnist.FILES[part].sha256
