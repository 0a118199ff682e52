"""Words: what a method, a regime and a score are, for a reader who has not read the docs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any

__all__ = [
    "FAMILIES",
    "FLOWS",
    "GLOSSARY",
    "REGIMES",
    "SCHEMES",
    "describe",
    "first_sentence",
    "look",
    "title",
]

FAMILIES = {
    "delta": "a single point, the most probable one; scored as a Gaussian around it (Laplace)",
    "normal": "a Gaussian with independent coordinates (mean field)",
    "multivariate_normal": "a Gaussian with a full covariance",
    "low_rank_normal": "a Gaussian with a covariance of low rank plus a diagonal",
    "student_t": "independent Student-t coordinates, with heavier tails than a Gaussian's",
    "mixture": "a mixture of Gaussians",
    "auxiliary": "a Gaussian made richer by an auxiliary variable",
    "spline_coupling": "a normalizing flow (rational-quadratic spline couplings)",
    "affine_coupling": "a normalizing flow (affine couplings)",
    "iaf": "a normalizing flow (inverse autoregressive)",
    "planar": "a normalizing flow (planar)",
    "radial": "a normalizing flow (radial)",
    "householder": "a Gaussian turned by Householder reflections",
    "sylvester": "a normalizing flow (Sylvester)",
    "unconstrained_monotone": "a normalizing flow (unconstrained monotone networks)",
    "own": "a guide of the user's own",
}

FLOWS = ("spline_coupling", "affine_coupling", "iaf", "unconstrained_monotone")

SCHEMES = {
    "Local": "free parameters for every row",
    "Encoder": "a network that reads the row",
    "Iterative": "a network that refines its first answer",
    "SemiAmortized": "a network, then gradient steps",
    "LaplaceRefinement": "a network, then Newton steps to the mode and its curvature",
    "BottomUp": "a network a level, from the data upwards",
    "TopDown": "networks from the data up, merged with the model from the top down (ladder)",
    "Autoregressive": "a network a latent site, which reads the sites before it",
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
    "low_rank_normal": "c6",
    "student_t": "c6",
    "mixture": "c5",
    "auxiliary": "c5",
    # Pyro's autoguides have the colors of their nearest kin, and a shape of their own.
    "Delta": "c1",
    "LaplaceApproximation": "c1",
    "Normal": "c2",
    "DiagonalNormal": "c2",
    "MultivariateNormal": "c3",
    "Gaussian": "c3",
    "Structured": "c3",
    "LowRankMultivariateNormal": "c6",
    "IAFNormal": "c4",
}
_SHAPES = {"Local": "circle", "Encoder": "diamond", "Iterative": "triangle"}


def _sentence(path: str) -> str:
    """The first sentence of a docstring, to stand within another."""
    module, _, attribute = path.partition(":")
    text = inspect.getdoc(getattr(import_module(module), attribute)) or attribute
    sentence = first_sentence(text.split("\n\n")[0]).rstrip(".").replace("``", "")
    return sentence[:1].lower() + sentence[1:]


def _family(name: str) -> str | None:
    """A family of the grid in words: those above, or the first sentence of its docstring."""
    from guides.families import FAMILIES as paths

    if name in FAMILIES:
        return FAMILIES[name]
    return _sentence(paths[name]) if name in paths else None


def _scheme(name: str) -> str:
    """A scheme in words: those above, or the first sentence of its docstring."""
    from guides.schemes import SCHEMES as paths

    path = next((path for path in paths.values() if path.endswith(f":{name}")), None)
    return SCHEMES.get(name) or (name if path is None else _sentence(path))


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
    family = _family(run["family"]) or f"Pyro's {run['method']}"
    if run["family"] == run["scheme"] == "own":
        return family
    return f"{family}; {_scheme(run['scheme'])}"


def first_sentence(text: str) -> str:
    r"""Return the first sentence of a message, whole.

    Example:
        >>> from benchmarks.words import first_sentence
        >>> first_sentence("Axis 0 has 3 rows, not 3.5 of them. Pass others.\nMore.")
        'Axis 0 has 3 rows, not 3.5 of them.'
    """
    joined = " ".join(text.split())
    found = re.search(r"(?<![A-Z]\.)(?<=[.!?])\s+(?=[A-Z(])", joined)
    return joined if found is None else joined[: found.start()]


def look(run: Mapping[str, Any]) -> tuple[str, str]:
    """Return the color class and the shape that stand for a method: family and scheme."""
    if run["loop"] == "predictive_coding":
        return "c5", "triangle"
    family = run["family"]
    flow = family not in _COLORS and _family(family) is not None and family != "own"
    shape = "square" if family[:1].isupper() else _SHAPES.get(run["scheme"], "square")
    return _COLORS.get(family, "c4" if flow else "c7"), shape


def title(name: str) -> str:
    """Return a name as a heading: `hierarchical_vae` as `Hierarchical VAE`.

    Example:
        >>> from benchmarks.words import title
        >>> title("hierarchical_vae")
        'Hierarchical VAE'
    """
    words = name.replace("_", " ").split()
    known = {"vae": "VAE", "ppca": "pPCA", "mnist": "MNIST", "gaussian": "Gaussian"}
    text = " ".join(known.get(word.lower(), word) for word in words)
    return text[:1].upper() + text[1:]
