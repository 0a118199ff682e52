"""ConvVAE: its network, its start at the data, and the encoder that it gets."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.nn import functional

import guides
import zoo
from guides.encoders.image import ImageNetwork
from guides.inference import SVI

SIZES = {"x_shape": (1, 9, 8), "z_dim": 2, "channels": (3, 2)}


@pytest.mark.usefixtures("float64")
def test_the_network_is_what_it_says_it_is() -> None:
    """Transposed convolution by its definition: scatter each input times the kernel, by hand."""
    model = zoo.make("conv_vae", x_shape=(2, 5, 4), z_dim=2, channels=(3,))
    z = torch.randn(4, 2)
    linear, output = model.network[0], model.likelihood.output
    small = functional.silu(z @ linear.weight.T + linear.bias).reshape(4, 3, 3, 2)
    kernel = output.convolution.weight  # (3, 2, 4, 4)
    canvas = torch.zeros(4, 2, 8, 6)
    for i in range(3):
        for j in range(2):
            patch = torch.einsum("nc,cdkl->ndkl", small[:, :, i, j], kernel)
            canvas[:, :, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += patch
    logits = canvas[:, :, 1:-1, 1:-1][:, :, :5, :4] + output.bias
    torch.testing.assert_close(model.decode(z).base_dist.logits, logits)


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli", "gaussian"])
@pytest.mark.usefixtures("float64")
def test_output_bias_starts_at_the_mean_image(likelihood: str) -> None:
    mean = torch.rand(1, 9, 8) * 0.8 + 0.1
    model = zoo.make("conv_vae", **SIZES, likelihood=likelihood, data_mean=mean)
    with torch.no_grad():
        model.likelihood.output.convolution.weight.zero_()
    found = model.decode(torch.randn(3, 2)).mean
    torch.testing.assert_close(found, mean.expand(3, 1, 9, 8), rtol=0, atol=1e-6)


def test_every_pixel_has_a_term_of_the_likelihood() -> None:
    model = zoo.make("conv_vae", **SIZES)
    z, x = torch.randn(5, 2), torch.bernoulli(torch.full((5, 1, 9, 8), 0.5))
    row = model.decode(z)
    terms = functional.binary_cross_entropy_with_logits(row.base_dist.logits, x, reduction="none")
    assert row.event_shape == (1, 9, 8)
    torch.testing.assert_close(row.log_prob(x), -terms.sum((1, 2, 3)))
    many = model.decode(torch.stack([z, z]))
    torch.testing.assert_close(many.log_prob(x), row.log_prob(x).expand(2, 5))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "flat": ({"x_shape": (64,)}, r"x_shape must be \(channels, height, width\), got \(64,\)"),
    "zero": ({"z_dim": 0}, "sizes of at least 1"),
    "no channels": ({"channels": ()}, "channels at least one"),
    "too deep": ({"channels": (4, 4, 4, 4)}, r"at least 16 x 16.*Pass fewer channels"),
    "likelihood": ({"likelihood": "poisson"}, "Unknown likelihood 'poisson'"),
    "mean": ({"data_mean": torch.zeros(72)}, r"data_mean .* shape \(1, 9, 8\), got \(72,\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        zoo.make("conv_vae", **{**SIZES, **options})


def test_data_of_another_shape() -> None:
    model = zoo.make("conv_vae", **SIZES)
    with pytest.raises(ValueError, match=r"shape \(rows, 1, 9, 8\), got \(3, 72\)"):
        model(torch.zeros(3, 72))


def test_its_guide_is_convolutional() -> None:
    model = zoo.make("conv_vae", x_shape=(1, 28, 28), z_dim=2, channels=(4, 4))
    with torch.no_grad():
        x = model(size=3)
    _, guide = guides.pair(model, x)
    encoder = guide.schemes["data"]
    assert [type(m) for m in encoder.network[0].networks] == [ImageNetwork]
    assert any(isinstance(m, nn.Conv2d) for m in encoder.modules())
    assert "x: image (1, 28, 28)" in repr(encoder)


def test_it_learns() -> None:
    """One bright quadrant an image: the model finds that pixels go together."""
    corner = torch.randint(4, (200,))
    x = torch.zeros(200, 1, 8, 8)
    for k in range(4):
        top, left = 4 * (k // 2), 4 * (k % 2)
        x[corner == k, :, top : top + 4, left : left + 4] = 1.0
    model, guide = guides.pair(
        zoo.make("conv_vae", x_shape=(1, 8, 8), z_dim=2, channels=(16, 8), data_mean=x.mean(0)),
        x,
        hidden=(32,),
    )
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    for _ in range(150):
        svi.step(x)
    # Independent pixels cost 64 times the entropy of a quarter; the corner alone costs log 4.
    independent = 64 * (0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert svi.evaluate_loss(x) / 200 < independent / 4
