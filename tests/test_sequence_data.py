"""Loaders of patches and sequences: shapes, physics, splits, seeds, and published baselines."""

from __future__ import annotations

import os

import pytest
import torch

import zoo.data
from zoo.data import bouncing_balls, moving_digits, natural_patches
from zoo.data.sequences import pad

REAL = os.environ.get("PYRO_ZOO_DATA")


def test_patches_are_pieces_of_the_photographs() -> None:
    images = natural_patches.photographs()
    data = zoo.data.load("natural_patches", patch=(6, 4), num_train=50, num_test=5, center=False)
    assert data.train.shape == (50, 24)
    assert data.image_shape == (6, 4)
    windows = torch.cat(
        [
            image[:, : int(image.shape[1] * 0.8)].unfold(0, 6, 1).unfold(1, 4, 1).reshape(-1, 24)
            for image in images
        ]
    )
    for row in data.train[:3]:
        assert (windows == row).all(-1).any()
    right = torch.cat(
        [
            image[:, int(image.shape[1] * 0.8) :].unfold(0, 6, 1).unfold(1, 4, 1).reshape(-1, 24)
            for image in images
        ]
    )
    for row in data.test:
        assert (right == row).all(-1).any()
    centered = zoo.data.load("natural_patches", patch=(6, 4), num_train=50, num_test=5)
    assert centered.train.mean(-1).abs().max() < 1e-6
    again = zoo.data.load("natural_patches", patch=(6, 4), num_train=50, num_test=5)
    assert again.train.equal(centered.train)


def test_a_folder_of_ones_own(tmp_path) -> None:
    import numpy as np
    from matplotlib.image import imsave

    gradient = np.linspace(0, 1, 40 * 50).reshape(40, 50)
    imsave(tmp_path / "a.png", gradient, cmap="gray", vmin=0, vmax=1)
    images = natural_patches.photographs(tmp_path)
    assert (images[0] - torch.from_numpy(gradient)).abs().max() < 2 / 254  # 256 grays
    assert zoo.data.load("natural_patches", folder=tmp_path, patch=5, num_test=3).test.shape == (
        3,
        25,
    )
    with pytest.raises(FileNotFoundError, match="no PNG or JPEG"):
        natural_patches.photographs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="do not fit an image"):
        zoo.data.load("natural_patches", folder=tmp_path, patch=45)


def test_a_moving_digit_is_the_digit_moved() -> None:
    digits = zoo.data.load("digits", binarize="none")
    image = digits.train[0].reshape(8, 8)
    whole = moving_digits.render(image, torch.tensor([3.0, 5.0]).double(), 16)
    assert whole[3:11, 5:13].equal(image.double())
    assert whole.sum() == image.double().sum()
    between = moving_digits.render(image, torch.tensor([3.5, 5.0]).double(), 16)
    both = moving_digits.render(image, torch.tensor([4.0, 5.0]).double(), 16)
    assert torch.allclose(between, (whole + both) / 2)


def test_moving_digits_keep_their_mass_and_stay_inside() -> None:
    data = zoo.data.load(
        "moving_digits", num_train=20, num_validation=2, num_test=2, num_steps=60, dequantize=False
    )
    mass = data.train.sum(-1)
    assert (mass - mass[:, :1]).abs().max() < 1e-3
    frames = data.train.reshape(20, 60, 16, 16)
    center = (frames.sum(-1) * torch.arange(16.0)).sum(-1) / frames.sum((-1, -2))
    assert center.diff(dim=1).abs().max() <= 1.5 + 1e-3
    assert center.diff(dim=1).sign().diff(dim=1).abs().max() == 2, "nothing bounced"
    noisy = zoo.data.load("moving_digits", num_train=20, num_validation=2, num_test=2)
    level = noisy.train * 256
    assert level.min() >= 0
    assert level.max() < 256
    assert (level.frac() - 0.5).abs().mean() == pytest.approx(0.25, abs=0.01)
    assert noisy.train.equal(
        zoo.data.load("moving_digits", num_train=20, num_validation=2, num_test=2).train
    )


def test_balls_conserve_energy_and_stay_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    places = bouncing_balls.trajectories(20, 100, 3, 1.2, generator)
    assert places.min() > 1.2 - 0.09  # a substep at the highest speed
    assert places.max() < 8.8 + 0.09
    apart = torch.cdist(places, places) + 100 * torch.eye(3)
    assert apart.min() > 2 * 1.2 - 0.2
    # Free flight between two frames is at the speed that energy allows: 3 balls at 0.5.
    speed = places.diff(dim=1).norm(dim=-1)
    assert speed.square().sum(-1).max() <= 3 * 0.25 + 1e-9
    free = speed.square().sum(-1) > 3 * 0.25 - 1e-9
    assert free.double().mean() > 0.3
    assert free[:, -20:].any(), "energy was lost"


def test_padding_and_the_mean_of_the_steps() -> None:
    rows, lengths = pad([torch.ones(2, 1), 3 * torch.ones(4, 1)])
    assert rows.shape == (2, 4, 1)
    assert lengths.tolist() == [2, 4]
    data = zoo.data.sequences.Sequences("two", rows, lengths, rows, lengths, "numbers")
    assert data.num_steps == 6
    assert float(data.data_mean) == pytest.approx(14 / 6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("moving_digits", {"side": 8}, "cannot move in a frame of side 8"),
        ("moving_digits", {"num_steps": 0}, "must be at least 1"),
        ("bouncing_balls", {"num_balls": 30}, "find no room"),
        ("bouncing_balls", {"num_balls": 0}, "at least 1"),
        ("natural_patches", {"num_train": 0}, "at least 1"),
    ],
)
def test_bad_options_say_what_is_wrong(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.data.load(name, **options)


@pytest.mark.skipif(REAL is None, reason="the chorales are not at hand: set PYRO_ZOO_DATA")
def test_chorales_have_the_known_sizes_and_baseline(monkeypatch) -> None:
    monkeypatch.setenv("PYRO_ZOO_DATA", str(REAL))
    data = zoo.data.load("jsb_chorales")
    assert [len(x) for x in (data.train, data.validation, data.test)] == [229, 76, 77]
    lengths = (data.train_lengths, data.validation_lengths, data.test_lengths)
    assert [int(x.sum()) for x in lengths] == [13807, 4602, 4725]
    assert data.x_dim == 88
    assert set(data.train.unique().tolist()) == {0.0, 1.0}
    # Independent notes with the training frequencies: 11.06 nats a step on the test set.
    mean = data.data_mean.clamp(1e-4, 1 - 1e-4)
    terms = torch.distributions.Bernoulli(mean).log_prob(data.test).sum(-1)
    seen = torch.arange(data.test.shape[1]) < data.test_lengths[:, None]
    assert float(-(terms * seen).sum() / data.test_lengths.sum()) == pytest.approx(11.06, abs=0.02)
