"""Words: what a method, a regime and a score are, for a reader who has not read the docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "FLOWS", "GLOSSARY", "REGIMES", "SCHEMES", "describe", "look", "title"]

FAMILIES = {
    "delta": "a single point, the most probable one; scored as a Gaussian around it (Laplace)",
    "normal": "a Gaussian with independent coordinates (mean field)",
    "multivariate_normal": "a Gaussian with a full covariance",
    "low_rank_normal": "a Gaussian with a low-rank covariance",
    "spline_coupling": "a normalizing flow (rational-quadratic spline couplings)",
    "iaf": "a normalizing flow (inverse autoregressive)",
    "own": "a guide of the user's own",
}

FLOWS = ("spline_coupling", "iaf")

SCHEMES = {
    "Local": "free parameters for every row",
    "Encoder": "a network that reads the row",
    "Iterative": "a network that refines its first answer",
    "SemiAmortized": "a network, then gradient steps",
    "own": "as written by its author",
}

REGIMES = {
    "joint": (
        "Model and guide trained together",
        "Every method trained a model of its own, so the models differ. They are ordered by "
        "their evidence: how probable they make rows that they have not seen.",
    ),
    "frozen": (
        "One shared model, only the guide differs",
        "The model was trained once per seed and then fixed. Every method approximates the "
        "posterior of that very model, so differences are due to the guide alone: this is the "
        "fair comparison of guides. They are ordered by their ELBO.",
    ),
}

GLOSSARY = (
    (
        "Evidence",
        "log p(x), how probable a model makes the data, in nats (natural-log units; higher is "
        "better). Where it cannot be computed, it is estimated from below by "
        "the logarithm of a mean of K importance weights, tighter as K grows. It judges models.",
    ),
    (
        "ELBO",
        "A lower bound on the evidence that depends on the guide, the approximate posterior. On "
        "one and the same model the guide with the higher ELBO is the closer one: the gap "
        "between evidence and ELBO is its Kullback-Leibler divergence from the posterior.",
    ),
    (
        "Paired difference",
        "Two methods are compared row by row and seed by seed, and the differences are averaged. "
        "What is hard for both cancels, so small differences can be told apart. Bars reach two "
        "standard errors to either side: a bar that crosses zero shows no difference.",
    ),
    (
        "Pareto k̂",
        "A check of the guide's tails, row by row. Up to 0.7 its draws can be reweighted into "
        "draws of the true posterior; above, the guide misses part of it.",
    ),
    (
        "Gradient evaluations",
        "Cost that does not depend on the machine: one is the gradient of one row's log joint at "
        "one draw. Evaluation is not counted, in neither gradients nor seconds.",
    ),
    (
        "Local and Encoder",
        "Local fits free parameters for every row, so held-out rows are fitted anew, the model "
        "fixed. An encoder is a network trained once; new rows then cost one forward pass.",
    ),
)

_COLORS = {
    "delta": "c1",
    "normal": "c2",
    "multivariate_normal": "c3",
    "spline_coupling": "c4",
    "iaf": "c4",
    "low_rank_normal": "c6",
}
_SHAPES = {"Local": "circle", "Encoder": "diamond"}


def describe(run: Mapping[str, Any]) -> str:
    """Return what a method is, in one line.

    Example:
        >>> from benchmarks.words import describe
        >>> describe({"loop": "svi", "family": "normal", "scheme": "Encoder", "method": "vae"})
        'a Gaussian with independent coordinates (mean field); a network that reads the row'
    """
    if run["loop"] == "predictive_coding":
        return (
            "predictive coding: latents relaxed by prediction errors to the most probable point; "
            "scored as a Gaussian around it (Laplace)"
        )
    family = FAMILIES.get(run["family"], f"Pyro's {run['method']}")
    if run["family"] == run["scheme"] == "own":
        return family
    return f"{family}; {SCHEMES.get(run['scheme'], run['scheme'])}"


def look(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return the color class and the shape that stand for a method: family and scheme."""
    if run["loop"] == "predictive_coding":
        return "c5", "triangle"
    return _COLORS.get(run["family"], "c7"), _SHAPES.get(run["scheme"], "square")


def title(name: str) -> str:
    """Return a name as a heading: `hierarchical_vae` as `Hierarchical VAE`.

    Example:
        >>> from benchmarks.words import title
        >>> title("hierarchical_vae")
        'Hierarchical VAE'
    """
    words = name.replace("_", " ").split()
    known = {"vae": "VAE", "ppca": "pPCA", "mnist": "MNIST"}
    text = " ".join(known.get(word.lower(), word) for word in words)
    return text[:1].upper() + text[1:]
