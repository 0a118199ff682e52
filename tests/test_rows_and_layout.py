"""Rows and layout: which arguments hold data, how latents are packed, what an encoder reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import guides
from guides.layout import layout
from guides.rows import bind, data_args_of, minibatches, take_rows


def regression(
    covariates: Tensor, y: Tensor | None = None, size: int | None = None, index: Any = None
) -> Tensor:
    slope = pyro.sample("slope", dist.Normal(torch.zeros(covariates.shape[1]), 1.0).to_event(1))
    with pyro.plate("people", size or len(covariates), subsample=index):
        own = pyro.sample("own", dist.Normal(0.0, 1.0))
        return pyro.sample("y", dist.Normal(covariates @ slope + own, 1.0), obs=y)


COVARIATES, Y = torch.randn(7, 3), torch.randn(7)


def test_fresh_rows_are_drawn_without_replacement_where_the_index_is() -> None:
    def sampled(x: Tensor) -> None:
        with pyro.plate("data", 6, subsample_size=2) as rows:
            pyro.sample("z", dist.Normal(x[rows], 1.0))

    read = layout(sampled, (torch.randn(6),))
    drawn = torch.stack([read.fresh_indices()["data"] for _ in range(300)])
    assert drawn.shape == (300, 2)
    assert (drawn[:, 0] != drawn[:, 1]).all()
    rate = drawn.flatten().bincount(minlength=6) / 300  # of 1/3 each
    assert (rate - 1 / 3).abs().max() < 4 * (2 / 9 / 300) ** 0.5
    assert read.data_plate is not None
    far = replace(read.data_plate, index=torch.empty(2, dtype=torch.long, device="meta"))
    assert replace(read, data_plate=far).fresh_indices()["data"].device.type == "meta"
    for index in (None, torch.tensor([4, 1])):
        size = None if index is None else 9
        rows = slice(None if index is None else 2)
        args = (COVARIATES[rows], Y[rows], size, index)
        assert layout(regression, args).fresh_indices() == {}


def test_the_data_plate_is_found_and_groups_are_ordered() -> None:
    read = layout(regression, (COVARIATES, Y))
    assert read.data_plate.name == "people"
    assert [(g.name, g.size, g.shape) for g in read.groups] == [
        ("global", 3, (3,)),
        ("data", 1, (7, 1)),
    ]
    joint = layout(regression, (COVARIATES, Y), data_plate=None)
    assert [(g.name, g.shape) for g in joint.groups] == [("global", (10,))]


def test_packing_round_trips_on_every_support() -> None:
    def supports(x: Tensor) -> None:
        pyro.sample("simplex", dist.Dirichlet(torch.ones(3)))
        pyro.sample("cholesky", dist.LKJCholesky(3, 1.0))
        pyro.sample("interval", dist.Uniform(-2.0, torch.tensor([1.0, 3.0])).to_event(1))
        with pyro.plate("outer", 2, dim=-3), pyro.plate("data", 5, dim=-2):
            pyro.sample("positive", dist.Gamma(torch.ones(5, 1), 1.0))
            with pyro.plate("inner", 4, dim=-1):
                pyro.sample("ordered", dist.Normal(0.0, torch.ones(3)).to_event(1))
        with pyro.plate("data_again", 5):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    read = layout(supports, (torch.randn(5),), data_plate="data")
    sizes = {site.name: site.size for site in read.sites.values()}
    assert sizes == {"simplex": 2, "cholesky": 3, "interval": 2, "positive": 2, "ordered": 24}
    torch.manual_seed(0)
    packed = {g.name: torch.randn(g.shape) for g in read.groups}
    values = read.constrain(packed)
    assert values["ordered"].shape == (2, 5, 4, 3)
    assert values["positive"].shape == (2, 5, 1)
    again = read.pack(values)
    assert all(torch.allclose(again[g], packed[g], atol=1e-4) for g in packed)
    # Each row holds its own values and no other's.
    moved = {**packed, "data": packed["data"].clone()}
    moved["data"][3] += 1
    changed = (read.constrain(moved)["ordered"] != values["ordered"]).any(-1).any(-1).any(0)
    assert changed.tolist() == [False, False, False, True, False]


def test_improper_priors_need_no_sampler() -> None:
    def flat(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    x = torch.randn(6)
    pc = guides.inference.PredictiveCoding(flat, pyro.optim.SGD({}), num_steps=50)
    assert float(pc.infer(x)["mean"]) == pytest.approx(float(x.mean()), abs=1e-5)


def test_supports_may_move_with_the_data() -> None:
    def bounded(high: Tensor) -> None:
        with pyro.plate("data", len(high)):
            z = pyro.sample("z", dist.Uniform(0.0, high))
            pyro.sample("x", dist.Normal(z, 1.0), obs=high / 2)

    guide = guides.make("amortized_normal", bounded, torch.tensor([1.0, 10.0, 100.0]))
    for high in (torch.tensor([0.1, 5.0]), torch.tensor([1000.0])):
        z = guide(high)["z"]
        assert ((z > 0) & (z < high)).all()


def test_rows_are_found_by_size_or_stated() -> None:
    read = layout(regression, (COVARIATES, Y))
    assert data_args_of(regression, (COVARIATES, Y), {}, read) == {"covariates": 0, "y": 0}
    square = torch.randn(7, 7)
    read = layout(regression, (square, Y))
    with pytest.raises(ValueError, match=r"Axes \[0, 1\] of argument 'covariates'.*data_args="):
        data_args_of(regression, (square, Y), {}, read)
    stated = {"covariates": 0, "y": 0}
    assert data_args_of(regression, (square, Y), {}, read, stated) == stated
    with pytest.raises(ValueError, match="data_args names 'z', which the call does not have"):
        data_args_of(regression, (square, Y), {}, read, {"z": 0})
    with pytest.raises(ValueError, match="axis 1 of argument 'y' holds the rows"):
        data_args_of(regression, (square, Y), {}, read, {"y": 1})
    with pytest.raises(ValueError, match="this program has none"):
        data_args_of(regression, (), {}, layout(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))))


def test_slices_tell_the_plate_their_rows() -> None:
    read = layout(regression, (COVARIATES, Y))
    rows = torch.tensor([4, 2])
    args, kwargs = take_rows(regression, (COVARIATES,), {"y": Y}, rows, read)
    assert torch.equal(args[0], COVARIATES[rows])
    assert torch.equal(kwargs["y"], Y[rows])
    assert kwargs["size"] == 7
    assert torch.equal(kwargs["index"], rows)
    # A slice of a slice counts in the numbers of the whole.
    inner = layout(regression, args, kwargs)
    deeper_args, deeper = take_rows(regression, args, kwargs, torch.tensor([1]), inner)
    assert torch.equal(deeper["index"], torch.tensor([2]))
    assert torch.equal(deeper_args[0], COVARIATES[2:3])


def test_minibatches_cover_every_row_once() -> None:
    seen = torch.cat(
        [kwargs["index"] for _, kwargs in minibatches(regression, (COVARIATES, Y), batch_size=3)]
    )
    assert sorted(seen.tolist()) == list(range(7))

    def fixed(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    with pytest.raises(ValueError, match="size=None and index=None"):
        list(minibatches(fixed, (Y,), batch_size=3))
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        list(minibatches(regression, (COVARIATES, Y), batch_size=0))


def test_arguments_are_bound_by_name() -> None:
    class Module(nn.Module):
        def forward(self, a: int, *rest: int, b: int = 0, **more: int) -> None: ...

    assert bind(Module(), (1, 2, 3), {"b": 4, "c": 5}) == {"a": 1, "1": 2, "2": 3, "b": 4, "c": 5}


def test_encoders_read_what_they_are_told() -> None:
    by_data = guides.make("amortized_normal", regression, COVARIATES, Y)
    assert by_data.schemes["data"].features == 1
    by_name = guides.make(
        "amortized_normal", regression, COVARIATES, Y, inputs=("covariates", "y")
    )
    assert by_name.schemes["data"].features == 4
    by_function = guides.make(
        "amortized_normal", regression, COVARIATES, Y, inputs=lambda c, y: c[:, :2]
    )
    assert by_function.schemes["data"].features == 2
    for guide in (by_data, by_name, by_function):
        assert guide(COVARIATES[:2], Y[:2])["own"].shape == (2,)
    own = guides.make(
        "amortized_normal",
        regression,
        COVARIATES,
        Y,
        encoder=nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 2)),
    )
    assert own(COVARIATES, Y)["own"].shape == (7,)


def test_an_encoder_sees_its_inputs_near_unit_scale() -> None:
    def counts(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(1000 * z), obs=x)

    x = torch.poisson(torch.full((50,), 3000.0))
    guide = guides.make("amortized_normal", counts, x)
    scheme = guide.schemes["data"]
    inputs = (x[:, None] - scheme.shift) / scheme.scale
    assert float(inputs.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(inputs.std()) == pytest.approx(1.0, abs=0.05)


def test_the_representation_says_what_a_guide_can_do() -> None:
    text = repr(guides.make("amortized_normal", regression, COVARIATES, Y))
    assert "Normal x Encoder, 1 coordinates per row of plate 'people': own" in text
    assert "Normal x Local, 3 coordinates: slope" in text
    assert "covariance between global and data latents: not represented" in text
    assert "density: yes, amortized: yes, scores external points: yes" in text
    assert "not represented" not in repr(
        guides.make("normal", regression, COVARIATES, Y, data_plate=None)
    )


def test_models_bring_their_usual_partner() -> None:
    class Partnered(nn.Module):
        default_guide = "multivariate_normal"

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model, guide = guides.pair(Partnered(), Y)
    assert "MultivariateNormal x Local" in repr(guide)
    assert guide.model is model
