"""Programs whose relaxed state is known exactly: the oracle set of predictive coding.

Linear Gaussian graphs: with v all sites stacked, the standardized errors are A v - c, so

    v ~ Normal(A^-1 c, (A^T A)^-1)
    E[z | x] = mu_z + C_zx C_xx^-1 (x - mu_x)        log p(x) = Normal(x; mu_x, C_xx)

computed from the covariance, which the energy never forms. Two conjugate programs with a
constrained latent stand beside them. All make sense in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

__all__ = ["ORACLES", "Exact", "LinearGraph", "Node", "Oracle", "chain", "hand_chain"]


@dataclass(frozen=True)
class Node:
    """A site of a linear Gaussian graph.

    Args:
        name: Its name.
        size: Its number of coordinates.
        parents: Names of its parents; its loc is the sum of their linear maps and its bias.
        scale: Standard deviation, one number or one a coordinate.
        observed: Whether it is data.
        bias: Whether it has a bias.
    """

    name: str
    size: int
    parents: tuple[str, ...] = ()
    scale: float | tuple[float, ...] = 1.0
    observed: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Exact:
    """What is known of a linear Gaussian graph with data.

    Args:
        mean: Posterior mean by latent site, ``(B, size)``; the relaxed state.
        covariance: Posterior covariance of the latents in their order, ``(K, K)``.
        log_evidence: log p(x), ``(B,)``.
        mahalanobis: ``0.5 r^T S^-1 r`` with ``r = x - E[x]``, ``(B,)``: the quadratic part of the
            energy at the relaxed state. A clamped input adds its own term to it.
    """

    mean: dict[str, Tensor]
    covariance: Tensor
    log_evidence: Tensor
    mahalanobis: Tensor


class LinearGraph(PyroModule):
    """A linear Gaussian program over any directed graph.

    Its data are the observed sites side by side, in the order of the nodes.

    Args:
        nodes: Sites, parents first.
        seed: Of the weights, which are Normal(0, 1 / fan_in), and of the biases.
    """

    def __init__(self, nodes: tuple[Node, ...], seed: int = 0) -> None:
        super().__init__("linear_graph")
        self.nodes = nodes
        generator = torch.Generator().manual_seed(seed)
        sizes = {node.name: node.size for node in nodes}
        self.weights = nn.ParameterDict()
        self.biases = nn.ParameterDict()
        for node in nodes:
            for parent in node.parents:
                weight = torch.randn(
                    node.size, sizes[parent], generator=generator, dtype=torch.float64
                )
                self.weights[f"{parent}_{node.name}"] = nn.Parameter(weight / sizes[parent] ** 0.5)
            if node.bias:
                bias = torch.randn(node.size, generator=generator, dtype=torch.float64)
                self.biases[node.name] = nn.Parameter(bias)

    def scale(self, node: Node) -> Tensor:
        """Standard deviations of a site ``(size,)``."""
        return torch.as_tensor(node.scale, dtype=torch.float64).expand(node.size)

    def forward(
        self, x: Tensor | None = None, size: int | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Run the program.

        Args:
            x: Data ``(B, D)``, all observed sites side by side; drawn if None.
            size: Number of all rows.
            index: Which of them ``x`` holds ``(B,)``.
        """
        widths = [node.size for node in self.nodes if node.observed]
        data = dict(
            zip(
                (node.name for node in self.nodes if node.observed),
                [None] * len(widths) if x is None else x.split(widths, -1),
                strict=True,
            )
        )
        size = size if size is not None else len(x)  # type: ignore[arg-type]
        values: dict[str, Tensor] = {}
        with pyro.plate("data", size, subsample=index):
            for node in self.nodes:
                loc = torch.zeros(node.size, dtype=torch.float64)
                for parent in node.parents:
                    loc = loc + values[parent] @ self.weights[f"{parent}_{node.name}"].T
                if node.bias:
                    loc = loc + self.biases[node.name]
                values[node.name] = pyro.sample(
                    node.name,
                    dist.Normal(loc, self.scale(node)).to_event(1),
                    obs=data.get(node.name),
                )
        return torch.cat([values[node.name] for node in self.nodes if node.observed], -1)

    def joint(self) -> tuple[Tensor, Tensor, dict[str, slice]]:
        """Mean ``(D,)`` and covariance ``(D, D)`` of all sites stacked, and where each lies."""
        total = sum(node.size for node in self.nodes)
        a, c = torch.zeros(total, total, dtype=torch.float64), torch.zeros(total).double()
        place: dict[str, slice] = {}
        start = 0
        for node in self.nodes:
            here = place[node.name] = slice(start, start + node.size)
            start += node.size
            scale = self.scale(node)
            a[here, here] = (1 / scale).diag()
            for parent in node.parents:
                weight = self.weights[f"{parent}_{node.name}"]
                a[here, place[parent]] = -weight / scale.unsqueeze(-1)
            if node.bias:
                c[here] = self.biases[node.name] / scale
        inverse = torch.linalg.inv(a)
        return inverse @ c, inverse @ inverse.T, place

    def exact(self, x: Tensor) -> Exact:
        """Posterior and evidence of data ``(B, D)``; differentiable in the weights."""
        mean, covariance, place = self.joint()
        order = torch.arange(len(mean))
        latent = [node for node in self.nodes if not node.observed]
        seen = torch.cat([order[place[node.name]] for node in self.nodes if node.observed])
        free = torch.cat([order[place[node.name]] for node in latent])
        inner, cross = covariance[seen][:, seen], covariance[free][:, seen]
        gain = torch.linalg.solve(inner, cross.T).T
        residual = x - mean[seen]  # (B, D)
        posterior = mean[free] + residual @ gain.T
        solved = torch.linalg.solve(inner, residual.T).T
        split = posterior.split([node.size for node in latent], -1)
        return Exact(
            mean={node.name: part for node, part in zip(latent, split, strict=True)},
            covariance=covariance[free][:, free] - gain @ cross.T,
            log_evidence=dist.MultivariateNormal(mean[seen], inner).log_prob(x),
            mahalanobis=0.5 * (residual * solved).sum(-1),
        )


def chain(
    depth: int, *, width: int = 3, inputs: int = 2, outputs: int = 2, seed: int = 0, **node: Any
) -> LinearGraph:
    """Clamped input x, latents h1 .. h``depth``, clamped output y.

    ``node`` holds further fields of the sites below the input.
    """
    names = ["x", *(f"h{i}" for i in range(1, depth + 1)), "y"]
    nodes = [Node("x", inputs, observed=True)]
    for parent, name in itertools.pairwise(names):
        observed = name == "y"
        size = outputs if observed else width
        nodes.append(Node(name, size, (parent,), observed=observed, **node))
    return LinearGraph(tuple(nodes), seed)


def hand_chain() -> LinearGraph:
    """A chain of one coordinate a site with weights 2 and 3: numbers checked by hand."""
    model = chain(1, width=1, inputs=1, outputs=1)
    with torch.no_grad():
        model.weights["x_h1"].fill_(2.0)
        model.weights["h1_y"].fill_(3.0)
    return model


class GammaPoisson(PyroModule):
    """rate ~ Gamma(3, 2), counts ~ Poisson(rate): the posterior is Gamma(3 + sum x, 2 + 4)."""

    def __init__(self) -> None:
        super().__init__("gamma_poisson")

    def forward(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        """Run the program with counts ``(B, 4)``."""
        like = torch.ones((), dtype=torch.float64)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Gamma(3 * like, 2 * like))
            pyro.sample("x", dist.Poisson(z.unsqueeze(-1).expand(*z.shape, 4)).to_event(1), obs=x)


class BetaBernoulli(PyroModule):
    """chance ~ Beta(2, 3), flips ~ Bernoulli(chance): the posterior is Beta(2 + s, 3 + 6 - s)."""

    def __init__(self) -> None:
        super().__init__("beta_bernoulli")

    def forward(self, x: Tensor, size: int | None = None, index: Tensor | None = None) -> None:
        """Run the program with flips ``(B, 6)``."""
        like = torch.ones((), dtype=torch.float64)
        with pyro.plate("data", size or len(x), subsample=index):
            z = pyro.sample("z", dist.Beta(2 * like, 3 * like))
            flips = dist.Bernoulli(z.unsqueeze(-1).expand(*z.shape, 6))
            pyro.sample("x", flips.to_event(1), obs=x)


@dataclass(frozen=True)
class Oracle:
    """A program, data and the relaxed state.

    Args:
        model: The program, ``model(x, size=None, index=None)``.
        x: Data ``(B, ...)``.
        mode: The minimizer of the energy by site, in unconstrained space with the Jacobian.
        mode_without_jacobian: The minimizer of the energy without the Jacobian.
        log_evidence: log p(x), ``(B,)``.
        gaussian: Whether the energy is a quadratic.
    """

    model: Any
    x: Tensor
    mode: dict[str, Tensor]
    mode_without_jacobian: dict[str, Tensor]
    log_evidence: Tensor
    gaussian: bool


def _linear(model: LinearGraph) -> Oracle:
    width = sum(node.size for node in model.nodes if node.observed)
    generator = torch.Generator().manual_seed(1)
    x = 2 * torch.randn(3, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        exact = model.exact(x)
    return Oracle(model, x, exact.mean, exact.mean, exact.log_evidence, gaussian=True)


def _gamma_poisson() -> Oracle:
    x = torch.tensor([[0, 1, 0, 2], [3, 5, 1, 2], [9, 7, 12, 8]]).double()
    shape, rate = 3 + x.sum(-1), torch.tensor(6.0).double()
    # log of b^a Gamma(a') / (Gamma(a) b'^a' prod x!)
    evidence = (
        3 * torch.tensor(2.0).double().log()
        - torch.lgamma(torch.tensor(3.0).double())
        + torch.lgamma(shape)
        - shape * rate.log()
        - torch.lgamma(x + 1).sum(-1)
    )
    return Oracle(
        GammaPoisson(), x, {"z": shape / rate}, {"z": (shape - 1) / rate}, evidence, gaussian=False
    )


def _beta_bernoulli() -> Oracle:
    x = torch.tensor([[0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1]]).double()
    a, b = 2 + x.sum(-1), 3 + 6 - x.sum(-1)

    def log_beta(p: Tensor, q: Tensor) -> Tensor:
        return torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)

    prior = log_beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    return Oracle(
        BetaBernoulli(),
        x,
        {"z": a / (a + b)},
        {"z": (a - 1) / (a + b - 2)},
        log_beta(a, b) - prior,
        gaussian=False,
    )


def _fork_merge() -> LinearGraph:
    return LinearGraph(
        (
            Node("top", 2, bias=True),
            Node("left", 3, ("top",), scale=0.7),
            Node("right", 2, ("top",), scale=1.3),
            Node("merge", 3, ("left", "right"), bias=True),
            Node("y", 4, ("merge",), scale=0.5, observed=True),
        )
    )


def _clamped_internal() -> LinearGraph:
    return LinearGraph(
        (
            Node("top", 2),
            Node("seen", 3, ("top",), scale=0.9, observed=True),
            Node("low", 2, ("seen", "top")),
            Node("y", 3, ("low",), scale=0.6, observed=True),
        )
    )


def _prior_only_source() -> LinearGraph:
    return LinearGraph(
        (
            Node("x", 2, observed=True),
            Node("source", 2, scale=1.5),
            Node("h", 3, ("x", "source")),
            Node("y", 2, ("h",), scale=0.8, observed=True),
        )
    )


def _unclamped_readout() -> LinearGraph:
    return LinearGraph(
        (
            Node("top", 3),
            Node("y", 3, ("top",), scale=0.7, observed=True),
            Node("readout", 2, ("top",), scale=0.9, bias=True),
        )
    )


ORACLES: dict[str, Callable[[], Oracle]] = {
    "chain1": lambda: _linear(chain(1)),
    "chain2": lambda: _linear(chain(2)),
    "chain3": lambda: _linear(chain(3)),
    "chain4": lambda: _linear(chain(4)),
    "biases": lambda: _linear(chain(2, bias=True)),
    "precisions": lambda: _linear(
        LinearGraph(
            (
                Node("top", 2, scale=(2.0, 0.5)),
                Node("h", 3, ("top",), scale=(0.5, 1.0, 1.7)),
                Node("y", 2, ("h",), scale=(0.3, 0.9), observed=True),
            )
        )
    ),
    "stiff": lambda: _linear(chain(3, scale=0.8, width=6)),
    "fork_merge": lambda: _linear(_fork_merge()),
    "clamped_internal": lambda: _linear(_clamped_internal()),
    "prior_only_source": lambda: _linear(_prior_only_source()),
    "unclamped_readout": lambda: _linear(_unclamped_readout()),
    "gamma_poisson": _gamma_poisson,
    "beta_bernoulli": _beta_bernoulli,
}
