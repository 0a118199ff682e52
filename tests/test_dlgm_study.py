"""The study of one deep latent Gaussian model: every method trains, both estimators agree."""

from __future__ import annotations

import pyro
import pytest
import torch

from benchmarks.studies import mnist_dlgm
from benchmarks.studies.mnist_dlgm import BATCH, DLGM, METHODS, evidence, score, summary, train
from benchmarks.study import StudyLog

SIZES = (2, 3, 4, 8)


def digits(number: int = 2 * BATCH) -> torch.Tensor:
    return (torch.rand(number, SIZES[-1]) < torch.linspace(0.1, 0.9, SIZES[-1])).float()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_spends_its_budget_and_moves_every_weight(method: str) -> None:
    pyro.set_rng_seed(3)
    start = DLGM(SIZES, digits().mean(0)).state_dict()
    model, history = train(method, 3, digits(), budget=BATCH * 30, sizes=SIZES)
    assert history["gradients"] >= BATCH * 30
    assert history["updates"] >= 1
    assert all(not torch.equal(v, start[n]) for n, v in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())


def test_methods_of_a_seed_start_from_the_same_weights(monkeypatch) -> None:
    seen = []
    data = digits()
    for method in ("direct amortization", "predictive coding"):
        build = METHODS[method].build

        def spy(model, x, optim, build=build):
            seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return build(model, x, optim)

        chosen = mnist_dlgm.Method(spy, METHODS[method].cost)
        monkeypatch.setitem(mnist_dlgm.METHODS, method, chosen)
        train(method, 1, data, budget=1, sizes=SIZES)
    assert all(torch.equal(value, seen[1][name]) for name, value in seen[0].items())


def test_both_estimators_agree_with_draws_from_the_prior() -> None:
    model = DLGM(SIZES, digits().mean(0)).requires_grad_(False)
    x = digits(4)
    values = score(model, x, 0, 4)
    number = 200_000
    z = torch.randn(number, SIZES[0])
    for weights in list(model.maps)[:-1]:
        z = weights(torch.nn.functional.silu(z))
        z = z + torch.randn_like(z)
    logits = model.maps[-1](torch.nn.functional.silu(z))
    for row, weighted, annealed in zip(x, values["log_evidence"], values["annealed"], strict=True):
        terms = torch.distributions.Bernoulli(logits=logits).log_prob(row).sum(-1)
        exact = float(terms.logsumexp(0)) - torch.tensor(float(number)).log().item()
        spread = float((2 * terms).logsumexp(0) - 2 * terms.logsumexp(0))
        error = torch.tensor(spread).exp().sqrt().item()
        assert weighted == pytest.approx(exact, abs=4 * error + 0.05)
        assert annealed == pytest.approx(exact, abs=4 * error + 0.3)


def test_importance_sampling_is_right_where_it_is_exact() -> None:
    """Without weights on the latents the data are independent of them: log p(x) is known."""
    model = DLGM(SIZES, digits().mean(0)).requires_grad_(False)
    model.maps[-1].weight.zero_()
    x = digits(3)
    rows, sizes = evidence(model, x, num_samples=500)
    known = torch.distributions.Bernoulli(logits=model.maps[-1].bias).log_prob(x).sum(-1)
    assert (rows - known).abs().max() < 0.05
    assert sizes.min() > 100


def test_independent_pixels_are_bernoullis_of_their_means() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    found = mnist_dlgm.independent_pixels(train, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    expected = torch.tensor([0.75 * 0.25, 0.25 * 0.75]).log()
    torch.testing.assert_close(found, expected)


def test_the_note_waits_for_all_runs(tmp_path) -> None:
    about = {"title": "t", "question": "q", "protocol": "p", "command": "c"}
    with StudyLog(tmp_path / "study.jsonl", **about) as log:
        for method in METHODS:
            assert summary(log, 1) == []
            log.add(
                key={"method": method, "seed": 0},
                values={"log_evidence": [-2.0, -3.0], "annealed": [-1.5]},
            )
        assert "+0.50 to +0.50" in summary(log, 1)[0]
