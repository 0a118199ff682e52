"""Encoders: networks follow from shapes, sets have no order, masked values are not seen."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import guides
from guides.encoders.image import ImageNetwork
from guides.encoders.sets import SetNetwork
from guides.encoders.source import unit
from guides.inference import SVI
from guides.schemes.scheme import Call


def vectors(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(x.shape[1])).to_event(1), obs=x)


def images(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        loc = z.reshape(*z.shape, *(1 for _ in x.shape[1:]))
        pyro.sample("x", dist.Normal(loc, torch.ones(x.shape[1:])).to_event(x.dim() - 1), obs=x)


def sets(x: Tensor, mask: Tensor | bool = True) -> None:
    """A level for every row, and elements that are alike around it."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("elements", x.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("x", dist.Normal(z[..., None], torch.ones(x.shape[2])).to_event(1), obs=x)


def items(x: Tensor, mask: Tensor | bool = True) -> None:
    """Items of a test: their order matters, for each has a difficulty of its own."""
    with pyro.plate("items", x.shape[1], dim=-1):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("responses", x.shape[1], dim=-1), poutine.mask(mask=mask):
            pyro.sample("x", dist.Bernoulli(logits=z - difficulty), obs=x)


def nested(x: Tensor) -> None:
    """Elements with latents of their own, which an unordered summary could not tell apart."""
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("elements", x.shape[1], dim=-1):
            own = pyro.sample("own", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(own, 1.0), obs=x)


def pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        slope = torch.linspace(-1, 1, x.shape[1] * x.shape[2]).reshape(x.shape[1:])
        with pyro.plate("height", x.shape[1], dim=-2), pyro.plate("width", x.shape[2], dim=-1):
            pyro.sample("x", dist.Normal(z * slope, 1.0), obs=x)


def several(vector: Tensor, image: Tensor, elements: Tensor) -> None:
    with pyro.plate("data", len(vector), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ones = torch.ones(vector.shape[1])
        loc = z[..., None]
        pyro.sample("vector", dist.Normal(loc, ones).to_event(1), obs=vector[:, None])
        loc = loc[..., None]
        ones = torch.ones(image.shape[1:])
        pyro.sample("image", dist.Normal(loc, ones).to_event(2), obs=image[:, None])
        with pyro.plate("elements", elements.shape[1], dim=-1):
            pyro.sample("elements_of", dist.Normal(z, 1.0), obs=elements)


def amortized(model: Any, *args: Any, **options: Any) -> Any:
    return guides.make("amortized_normal", model, *args, **{"hidden": (8,), **options})


def lam(guide: Any, *args: Any) -> Tensor:
    with torch.no_grad():
        return guide.parameters_of(*args)["data"]


def kinds(guide: Any) -> list[str]:
    return [source.kind for source in guide.schemes["data"].sources]


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (vectors, (6, 20), "vector"),
        (images, (6, 8, 8), "image"),
        (images, (6, 3, 8, 9), "image"),
        (images, (6, 7, 8), "vector"),
        (images, (6, 2, 2, 8, 8), "vector"),
        (sets, (6, 10, 9), "set"),
        (items, (6, 10), "vector"),
        (nested, (6, 4), "vector"),
        (pixels, (6, 8, 9), "image"),
    ],
)
def test_the_network_follows_from_the_shape(model: Any, shape: Any, expected: str) -> None:
    x = torch.bernoulli(torch.full(shape, 0.5))
    guide = amortized(model, x)
    assert kinds(guide) == [expected]
    assert f"x: {expected}" in repr(guide.schemes["data"])
    assert lam(guide, x).shape[0] == 6
    torch.testing.assert_close(lam(guide, x[:1]), lam(guide, x)[:1])
    assert (lam(guide, 1 - x) != lam(guide, x)).any(1).all()


def test_perceptrons_are_what_they_were() -> None:
    """Standardized by feature mean and one scale, then layers, a small head, around init."""
    x = torch.randn(50, 3) * 7 + 2
    encoder = amortized(vectors, x, hidden=(4, 5)).schemes["data"]
    mean = x.mean(0)
    inputs = (x - mean) / (x - mean).square().mean().sqrt()
    assert [type(layer) for layer in encoder.network] == [
        *[nn.Linear, nn.SiLU] * 2,
        nn.Linear,
    ]
    assert list(encoder.state_dict())[:3] == ["shift", "scale", "init"]
    assert not encoder.network[-1].bias.any()
    guide = amortized(vectors, x)
    encoder = guide.schemes["data"]
    torch.testing.assert_close(lam(guide, x), encoder.init + encoder.network(inputs).detach())


def test_features_before_the_head() -> None:
    x = torch.randn(6, 8, 8)
    guide = amortized(images, x, hidden=(8, 5))
    encoder = guide.schemes["data"]
    call = call_of(images, x)
    group = call.layout.group("data")
    hidden = encoder.hidden_of(group, call)
    assert encoder.features_of(group, call).shape == (6, 64)
    assert hidden.shape == (6, 5)
    torch.testing.assert_close(
        encoder.init + encoder.network[-1](hidden), encoder(group, call), rtol=0, atol=0
    )
    own = amortized(images, x, encoder=nn.Linear(64, 2)).schemes["data"]
    with pytest.raises(ValueError, match=r"encoder= of your own.*no hidden"):
        own.hidden_of(group, call)


# --- sets -------------------------------------------------------------------------------------


def test_the_order_of_a_set_does_not_matter() -> None:
    x = torch.randn(6, 5, 2)
    guide = amortized(sets, x)
    order = torch.randperm(5)
    torch.testing.assert_close(lam(guide, x[:, order]), lam(guide, x), rtol=1e-5, atol=1e-6)
    moved = x.clone()
    moved[0, 3] += 1.0
    changed = (lam(guide, moved) != lam(guide, x)).any(1)
    assert changed.tolist() == [True, *[False] * 5]


def test_sets_of_any_size_and_ragged_ones() -> None:
    """Padding and a mask is the same as leaving the elements out."""
    x = torch.randn(6, 5, 2)
    guide = amortized(sets, x, torch.ones(6, 5, dtype=torch.bool))
    mask = torch.tensor([1, 1, 1, 0, 0], dtype=torch.bool).expand(6, 5)
    short = lam(guide, x[:, :3], torch.ones(6, 3, dtype=torch.bool))
    torch.testing.assert_close(lam(guide, x, mask), short, rtol=1e-5, atol=1e-6)
    # Without a mask in the call every element is there.
    torch.testing.assert_close(lam(guide, x[:, :3]), short, rtol=1e-5, atol=1e-6)
    none = lam(guide, x, torch.zeros(6, 5, dtype=torch.bool))
    assert torch.isfinite(none).all()
    assert torch.equal(none, none[:1].expand_as(none))


def test_pooling_by_hand() -> None:
    network = SetNetwork(2, 0, (), torch.zeros(()))
    elements = torch.tensor([[[1.0, 5.0], [3.0, -1.0]]])
    expected = torch.tensor([[2.0, 2.0, 3.0, 5.0, torch.tensor(3.0).log()]])
    torch.testing.assert_close(network(elements.flatten(1)), expected)
    masked = SetNetwork(1, 1, (), torch.zeros(()))
    elements = torch.tensor([[[2.0, 1.0], [9.0, 0.0], [4.0, 1.0]]])
    expected = torch.tensor([[3.0, 1.0, 4.0, 1.0, torch.tensor(3.0).log()]])
    torch.testing.assert_close(masked(elements.flatten(1)), expected)


def test_a_set_encoder_finds_the_exact_posterior() -> None:
    """Normal elements of a normal level: precision 1 + M, mean sum / (1 + M), for every M."""
    z = torch.randn(400, 1)
    x = (z + torch.randn(400, 6))[..., None]
    mask = torch.arange(6) < torch.randint(1, 7, (400, 1))
    guide = amortized(sets, x, mask, hidden=(32,))
    svi = SVI(sets, guide, pyro.optim.Adam({"lr": 5e-3}), Trace_ELBO())
    for _ in range(400):
        svi.step(x, mask)
    counts = mask.sum(1)
    exact = (x[..., 0] * mask).sum(1) / (1 + counts)
    q = guide.families["data"].distribution(lam(guide, x, mask))
    assert (q.mean[:, 0] - exact).square().mean().sqrt() < 0.15
    assert (q.stddev[:, 0] * (1 + counts).sqrt() - 1).abs().mean() < 0.15


# --- masks ------------------------------------------------------------------------------------


def masked_rows(x: Tensor, mask: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.Normal(z[..., None], torch.ones(x.shape[1]))
        fn = fn if mask is None else fn.mask(mask)
        pyro.sample("x", fn.to_event(1), obs=x)


def masked_images(x: Tensor, mask: Tensor | None = None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        fn = dist.Normal(z.reshape(-1, 1, 1, 1), torch.ones(x.shape[1:]))
        fn = fn if mask is None else fn.mask(mask)
        pyro.sample("x", fn.to_event(3), obs=x)


def masked_whole(x: Tensor, mask: Tensor | bool = True) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            fn = dist.Normal(z[..., None], torch.ones(x.shape[1])).to_event(1)
            pyro.sample("x", fn, obs=x)


MASKED: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], str, int]] = {
    "entries of a vector": (masked_rows, (7, 3), (7, 3), "vector", 6),
    "a whole row": (masked_whole, (7, 3), (7,), "vector", 4),
    "an entry of every row": (masked_rows, (7, 3), (3,), "vector", 6),
    "pixels": (masked_images, (7, 2, 8, 8), (7, 2, 8, 8), "image", 256),
    "pixels of all channels": (masked_images, (7, 2, 8, 8), (7, 1, 8, 8), "image", 256),
    "elements": (sets, (7, 4, 2), (7, 4), "set", 12),
    "answers": (items, (7, 4), (7, 4), "vector", 8),
}


@pytest.mark.parametrize("case", MASKED)
def test_values_under_a_mask_are_not_seen(case: str) -> None:
    model, shape, mask_shape, kind, num_features = MASKED[case]
    x = torch.bernoulli(torch.full(shape, 0.5))
    mask = torch.rand(mask_shape) < 0.6
    mask.view(-1)[0] = False
    mask.view(-1)[1] = True
    site = guides.layout.layout(model, (x, mask)).observed["x"]
    hidden = ~site.rows_first(site.mask).expand_as(x)
    other = torch.where(hidden, 1 - x, x)
    guide = amortized(model, x, mask)
    assert kinds(guide) == [kind]
    assert guide.schemes["data"].features == num_features
    assert torch.equal(lam(guide, other, mask), lam(guide, x, mask))
    # Nor do they enter the statistics, from which the guide starts.
    torch.manual_seed(0)
    first = amortized(model, x, mask)
    torch.manual_seed(0)
    second = amortized(model, other, mask)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    # What is seen, and the mask itself, do matter.
    assert (lam(guide, torch.where(hidden, x, 1 - x), mask) != lam(guide, x, mask)).any()
    assert (lam(guide, x, torch.ones_like(mask)) != lam(guide, x, mask)).any()


def test_statistics_are_those_of_the_values_that_are_there() -> None:
    x = torch.randn(200, 3) * torch.tensor([1.0, 2.0, 3.0]) + torch.tensor([5.0, 0.0, -5.0])
    mask = torch.rand(200, 3) < 0.5
    mask[:, 2] = False
    encoder = amortized(masked_rows, x, mask).schemes["data"]
    means = [x[mask[:, i], i].mean() for i in range(2)]
    torch.testing.assert_close(encoder.shift, torch.tensor([*means, 0.0]))
    deviations = torch.cat([x[mask[:, i], i] - means[i] for i in range(2)])
    torch.testing.assert_close(encoder.scale, deviations.square().mean().sqrt().expand(3))


def test_a_mask_that_the_encoder_does_not_know() -> None:
    x, mask = torch.randn(6, 3), torch.rand(6, 3) < 0.5
    guide = amortized(masked_rows, x)
    with pytest.raises(ValueError, match=r"'x' is masked in this call.*Build it with the mask"):
        guide(x, mask)
    guide = amortized(masked_rows, x, mask)
    torch.testing.assert_close(lam(guide, x), lam(guide, x, torch.ones_like(mask)), rtol=0, atol=0)
    whole = amortized(masked_whole, x, mask[:, 0])
    with pytest.raises(ValueError, match=r"mask of observed site 'x' has shape \(3,\)"):
        whole.schemes["data"].sources[0].features(
            guides.encoders.read_inputs(None, call_of(masked_rows, x, mask))[0],
            torch.zeros(3),
            torch.ones(3),
        )


def call_of(model: Any, *args: Any) -> Any:
    return Call(model, args, {}, guides.layout.layout(model, args))


def test_masks_of_handlers_and_distributions_both_count() -> None:
    def both(x: Tensor, outer: Tensor, inner: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=outer):
            fn = dist.Normal(0.0, 1.0).expand([3]).mask(inner).to_event(1).expand([len(x)])
            pyro.sample("x", fn, obs=x)

    outer, inner = torch.tensor([True, False]), torch.tensor([True, False, True])
    site = guides.layout.layout(both, (torch.zeros(2, 3), outer, inner)).observed["x"]
    assert site.mask.tolist() == [[True, False, True], [False] * 3]
    off = guides.layout.layout(masked_whole, (torch.zeros(2, 3), False)).observed["x"]
    assert off.mask.tolist() == [[False], [False]]
    assert guides.layout.layout(masked_whole, (torch.zeros(2, 3),)).observed["x"].mask is None


def test_missing_answers_are_learned_around() -> None:
    """A masked encoder gives rows with fewer answers the wider posterior."""
    x = torch.bernoulli(torch.full((300, 6), 0.5))
    mask = torch.rand(300, 1) < 0.5
    mask = mask | (torch.arange(6) < 1)
    guide = amortized(items, x, mask, hidden=(16,))
    svi = SVI(items, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(200):
        svi.step(x, mask)
    spread = guide.families["data"].distribution(lam(guide, x, mask)).stddev[:, 0]
    full = mask.all(1)
    assert spread[~full].mean() > 1.1 * spread[full].mean()


# --- several inputs, choices, errors ------------------------------------------------------------


def test_several_sites_are_read_side_by_side() -> None:
    args = (torch.randn(6, 3), torch.randn(6, 8, 8), torch.randn(6, 4))
    guide = amortized(several, *args)
    assert kinds(guide) == ["vector", "image", "set"]
    encoder = guide.schemes["data"]
    assert [type(n) for n in encoder.network[0].networks] == [
        nn.Identity,
        ImageNetwork,
        SetNetwork,
    ]
    base = lam(guide, *args)
    for i in range(3):
        moved = [arg + (j == i) * torch.randn_like(arg) for j, arg in enumerate(args)]
        assert (lam(guide, *moved) != base).any(1).all()
    flipped = (*args[:2], args[2].flip(1))
    torch.testing.assert_close(lam(guide, *flipped), base, rtol=1e-5, atol=1e-6)
    assert lam(guide, *args[:2], torch.randn(6, 9)).shape == base.shape


def test_every_parameter_of_every_network_learns() -> None:
    args = (torch.randn(6, 3), torch.randn(6, 8, 8), torch.randn(6, 4))
    guide = amortized(several, *args)
    SVI(several, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*args)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    SVI(several, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(*args)
    assert not [n for n, p in guide.named_parameters() if torch.equal(p, before[n])]


def test_a_choice_can_be_forced() -> None:
    x = torch.randn(6, 8, 9)
    assert kinds(amortized(images, x, features="vector")) == ["vector"]
    assert kinds(amortized(images, x, features="set")) == ["set"]
    assert kinds(amortized(images, torch.randn(6, 3, 3), features="image")) == ["image"]
    assert kinds(amortized(items, x[:, 0].gt(0).float(), features="set")) == ["set"]
    by_name = amortized(vectors, x[:, 0], inputs=lambda x: x.reshape(6, 3, 3), features="set")
    order = torch.arange(9).reshape(3, 3)[torch.tensor([2, 0, 1])].flatten()
    torch.testing.assert_close(
        lam(by_name, x[:, 0]), lam(by_name, x[:, 0, order]), rtol=1e-5, atol=1e-6
    )
    assert kinds(amortized(vectors, x[:, 0], inputs=lambda _: torch.randn(6, 3, 8, 8))) == [
        "image"
    ]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"features": "graph"}, "features must be one of auto, vector, image, set"),
    "no image": ({"features": "image"}, r"features='image' needs .*inputs have 'x' \(3,\)"),
    "no set": ({"features": "set"}, "features='set' needs an input with elements"),
    "both": (
        {"features": "vector", "encoder": nn.Linear(3, 2)},
        "encoder= replaces the network that features= would choose",
    ),
    "widths": ({"hidden": (4, 0)}, r"Widths in hidden= must be at least 1, got \(4, 0\)"),
    "no value": ({"inputs": lambda x: None}, "Encoder input 'inputs' is None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str) -> None:
    options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        amortized(vectors, torch.randn(6, 3), **options)


def test_bad_calls() -> None:
    x = torch.randn(6, 3, 2)
    guide = amortized(sets, x)
    with pytest.raises(ValueError, match=r"reads 6 features a row, got 9 of 'x'"):
        guide(torch.randn(6, 3, 3))
    wide = amortized(vectors, x[:, :, 0], inputs=lambda x: x.repeat(1, len(x)))
    with pytest.raises(ValueError, match="reads 18 features a row, got 3 of 'inputs'"):
        wide(x[:1, :, 0])


def test_missing_sites() -> None:
    def optional(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = amortized(optional, torch.randn(6), torch.randn(6))
    with pytest.raises(ValueError, match="This encoder reads x, y, but this call observes x"):
        guide(torch.randn(6))


# --- dtype and device -----------------------------------------------------------------------


@pytest.mark.parametrize("model", [vectors, images, sets])
def test_float64_data_under_a_float32_default(model: Any) -> None:
    def wide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            with pyro.plate("elements", x.shape[1], dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(6, 4, dtype=torch.float64)
    guide = amortized(wide, x)
    assert {p.dtype for p in guide.parameters()} == {torch.float64}
    assert {b.dtype for b in guide.buffers() if b.is_floating_point()} == {torch.float64}
    assert lam(guide, x).dtype is torch.float64
    shape = {vectors: (6, 3), images: (6, 8, 8), sets: (6, 3, 2)}[model]
    x = torch.randn(shape)
    guide = amortized(model, x).double()
    assert lam(guide, x).dtype is torch.float64


@pytest.mark.usefixtures("float64")
def test_float32_latents_under_a_float64_default() -> None:
    def narrow(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=torch.float32), 1.0))
            pyro.sample("x", dist.Normal(z[..., None], torch.ones_like(x[0])).to_event(1), obs=x)

    x = torch.randn(6, 3, dtype=torch.float32)
    guide = amortized(narrow, x)
    assert {p.dtype for p in guide.parameters()} == {torch.float32}
    assert guide(x)["z"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_input_says_nothing_of_its_unit(dtype: torch.dtype) -> None:
    value = torch.full((7, 3), 0.1, dtype=dtype)
    shift = value.mean(0) * (1 + torch.finfo(dtype).eps)  # a mean need not be the value
    variance = (value - shift).square().mean()
    assert unit(variance, shift) == 1.0
    small = value + 1e-5 * torch.randn(7, 3, dtype=dtype)
    assert unit((small - small.mean(0)).square().mean(), small.mean(0)) < 1e-4
