"""Data that are no rows of a model: each gets one error that names the site and the fix."""

import math

import pyro
import pytest
import torch
from pyro import poutine

import zoo
from tests.model_cases import MODEL_CASES


def bad(x, **kwargs):
    return lambda model: model(x, **kwargs)


ROW_ERRORS = {
    "nothing": (lambda model: model(), ValueError, r"'x' has neither data .* Pass x=, or size="),
    "features": (bad(torch.zeros(3, 5)), ValueError, r"'x' needs data of shape \(rows, 4\), got"),
    "one row, flat": (bad(torch.zeros(4)), ValueError, r"'x' needs data of shape .* Reshape"),
    "empty": (bad(torch.zeros(0, 4)), ValueError, r"'x' got an empty batch"),
    "nan": (
        bad(torch.tensor([[0.0, 1, 0, 1], [0, math.nan, 0, 0]])),
        ValueError,
        r"'x' needs finite data, but 1 of 8 values are .* in row 1. Drop or impute",
    ),
    "infinite": (bad(torch.full((1, 4), math.inf)), ValueError, r"'x' needs finite data, but 4"),
    "grey": (bad(torch.full((1, 4), 0.5)), ValueError, r"'x' is Bernoulli .* Binarize the data"),
    "integers": (bad(torch.zeros(3, 4).long()), TypeError, r"'x' needs floating point .* pass x"),
    "array": (bad([[0.0] * 4]), TypeError, r"'x' needs a tensor, got list"),
    "size": (
        bad(torch.zeros(3, 4), size=7),
        ValueError,
        r"'x' has 3 rows, but size=7. Pass index",
    ),
    "no rows": (lambda model: model(size=0), ValueError, r"size must be at least 1, got 0"),
    "short index": (
        bad(torch.zeros(3, 4), size=7, index=torch.tensor([1])),
        ValueError,
        r"'x' has 3 rows, but index has 1 numbers",
    ),
    "index without size": (
        bad(torch.zeros(1, 4), index=torch.tensor([1])),
        ValueError,
        r"index= needs size= too",
    ),
    "index of a matrix": (
        bad(torch.zeros(1, 4), size=7, index=torch.tensor([[1]])),
        ValueError,
        r"index must hold one number a row",
    ),
    "index of floats": (
        bad(torch.zeros(1, 4), size=7, index=torch.tensor([1.0])),
        TypeError,
        r"index must be a tensor of integers .*, got torch.float32",
    ),
    "index out of range": (
        bad(torch.zeros(1, 4), size=7, index=torch.tensor([7])),
        ValueError,
        r"index must lie between 0 and size - 1 = 6",
    ),
}


@pytest.mark.parametrize("name", ROW_ERRORS)
@pytest.mark.parametrize("key", ["vae", "hierarchical_vae"])
def test_rows_that_are_none(key, name) -> None:
    call, error, message = ROW_ERRORS[name]
    with pytest.raises(error, match=message):
        call(MODEL_CASES[key].build())


def test_continuous_bernoulli_rows_lie_between_0_and_1() -> None:
    model = zoo.make("vae", x_dim=4, z_dim=2, hidden=(3,), likelihood="continuous_bernoulli")
    with pytest.raises(ValueError, match="'x' is continuous Bernoulli and needs data from 0 to 1"):
        model(torch.full((2, 4), 1.5))


def test_shapes_are_checked_with_validation_off() -> None:
    """Pyro would broadcast a short index silently."""
    model = MODEL_CASES["vae"].build()
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="index has 1 numbers"):
        model(torch.zeros(3, 4), size=7, index=torch.tensor([1]))


def test_values_are_not_read_with_validation_off() -> None:
    """Under torch.func transforms of the data there are no values to read."""
    model = MODEL_CASES["vae"].build()
    x, z = torch.bernoulli(torch.full((3, 5, 4), 0.5)), torch.randn(5, 2)

    def log_joint(x):
        return poutine.trace(poutine.condition(model, {"z": z})).get_trace(x).log_prob_sum()

    expected = torch.stack([log_joint(part) for part in x])
    with pyro.validation_enabled(False):
        torch.testing.assert_close(torch.func.vmap(log_joint)(x), expected)
