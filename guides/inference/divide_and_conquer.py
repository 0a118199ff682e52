"""Divide-and-conquer predictive coding: particles of every row move site by site.

    for site in reverse topological order:                       S sweeps a step
        e  = score of the site's complete conditional            its own error and its children's
        u' = u + eta P e + sqrt(2 eta P) noise                   P = 1 / (Var_k[e] + 1/K)
        weight, resample where few particles are effective
    theta <- theta - optim(- N/B sum_n sum_k W_nk d log p(x_n, z_nk) / d theta)

Particles persist from step to step, row by row. The corrected variant weights with the reverse
kernel, so that weights are near one where the published ones have infinite variance, and its
fresh start estimates p(x) without bias.

References:
    | Divide-and-Conquer Predictive Coding (Sennesh, Wu & Salvatori, 2024)
    | https://arxiv.org/abs/2408.05834
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro.optim
import pyro.poutine as poutine
import torch
from pyro.infer.util import zero_grads
from torch import Tensor

from guides.arguments import check_number
from guides.diagnostics.scores import Score
from guides.energy import LogJoint
from guides.inference.checks import capture, check_ownership, check_program, warn_frozen
from guides.inference.dependencies import Dependencies, dependencies
from guides.inference.particle_density import ParticleDensity
from guides.inference.particle_evidence import particle_evidence
from guides.inference.particle_guide import ParticleGuide
from guides.inference.particle_memory import ParticleMemory, choose
from guides.inference.particle_moves import PRECONDITIONERS
from guides.inference.particle_sampler import Cloud, Sampler
from guides.inference.running import Runs
from guides.inference.same_data import CallData
from guides.layout import layout
from guides.probe import Program

__all__ = ["DivideAndConquer"]


class DivideAndConquer(Runs):
    """Divide-and-conquer predictive coding as a loop with SVI's interface.

    Args:
        model: Any Pyro program with continuous latents and proper priors. Its dependence
            structure is read from it.
        optim: A ``PyroOptim`` for the model's parameters.
        num_particles: Particles K of every row in a step.
        num_sweeps: Sweeps over the latents in a step.
        step_size: Langevin step in units of the preconditioner.
        variant: ``"corrected"``, or ``"published"``: weights g(u') / q(u' | u), and every site
            resampled by itself after every move.
        correction: What the corrected variant does about the finite step: ``"reverse_kernel"``
            weights, ``"metropolis"`` accepts or rejects, row by row. Where a weight is joint over
            many rows (global latents), only the latter keeps weights from degenerating.
        resampler: ``"systematic"``, or ``"published"``, which never keeps the last particle: a
            negative control of the published variant.
        preconditioner: ``"variance"``; ``"normalized"``, its mean over a site's coordinates one;
            or ``"identity"``.
        threshold: Resample where the effective fraction of the particles falls below.
        anneal: Sweeps of a fresh start from the prior, over as many temperatures.
        num_samples: Particles of an answer: :meth:`infer`, :meth:`posterior`.
        rows_by_position: Without ``index=`` a step goes on with its rows' particles only while
            steps bring the same tensors, unchanged; this takes rows as 0 to B - 1 of one data
            set, whatever tensors they bring.
        data_plate: See :func:`guides.layout.layout`.

    Attributes:
        gradient_evaluations: Gradients of one row's log joint in steps so far.
        frozen: Trainable parameters of the model that got no gradient at the first step.
        dependencies: Parents, children and the order of a sweep, once a call was made.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> loop = DivideAndConquer(model, pyro.optim.Adam({"lr": 0.01}), num_particles=8)
        >>> score = loop.evidence(torch.tensor([0.0, 2.0]), num_particles=100)
        >>> abs(score.total - (-3.531)) < 0.5
        True
    """

    def __init__(
        self,
        model: Program,
        optim: pyro.optim.PyroOptim,
        *,
        num_particles: int = 4,
        num_sweeps: int = 1,
        step_size: float = 0.1,
        variant: str = "corrected",
        correction: str = "reverse_kernel",
        resampler: str = "systematic",
        preconditioner: str = "variance",
        threshold: float = 0.5,
        anneal: int = 50,
        num_samples: int = 100,
        rows_by_position: bool = False,
        data_plate: str | None = "auto",
    ) -> None:
        check_program("DivideAndConquer(model, optim)", model, optim)
        counts = {
            "num_particles": num_particles,
            "num_sweeps": num_sweeps,
            "anneal": anneal,
            "num_samples": num_samples,
        }
        for name, value in counts.items():
            check_number(name, value, integer=True, least=1)
        check_number("step_size", step_size)
        if not 0 < step_size < math.inf:
            raise ValueError(f"step_size must be positive, got {step_size!r}.")
        check_number("threshold", threshold, least=0)
        _check_choice("variant", variant, ("corrected", "published"))
        _check_choice("correction", correction, ("reverse_kernel", "metropolis"))
        _check_choice("resampler", resampler, ("systematic", "published"))
        _check_choice("preconditioner", preconditioner, PRECONDITIONERS)
        if variant == "corrected" and resampler == "published":
            raise ValueError(
                "The published resampler loses the last particle and is offered with "
                'variant="published" only, for comparison. Use resampler="systematic".'
            )
        if variant == "published" and correction != "reverse_kernel":
            raise ValueError(
                "The published variant has weights of its own, so correction= has no meaning "
                'there. Leave it out, or use variant="corrected".'
            )
        self.model = model
        self.guide = None
        self.optim = optim
        self.num_particles = num_particles
        self.num_sweeps = num_sweeps
        self.anneal = anneal
        self.num_samples = num_samples
        self.data_plate = data_plate
        self.rows_by_position = rows_by_position
        self.sampler = Sampler(
            step_size, variant, correction, resampler, preconditioner, threshold
        )
        self.gradient_evaluations = 0
        self.frozen: list[str] = []
        self.dependencies: Dependencies | None = None
        self._memory = ParticleMemory()
        self._steps = 0

    def step(self, *args: Any, **kwargs: Any) -> float:
        """Move the particles of these rows, then update the model's parameters.

        Rows that were not seen before start fresh; see ``anneal``.

        Returns:
            The energy, -log p(x, z) of all N rows, averaged over the weighted particles, before
            the update; in nats, lower is better. It is no bound on -log p(x).
        """
        density = self._density(args, kwargs)
        cloud = self._sweeps(density, self._start(density), counted=True)
        self._memory.write(density, cloud, self._data_of(density))
        values = density.constrained(cloud.particles)
        with torch.enable_grad(), poutine.trace(param_only=True) as trace:
            rows, other = density.over_values(values)
            loss = self._energy(density, cloud, rows, other)
        nodes: Any = trace.trace.nodes.values()
        params: Any = {site["value"].unconstrained() for site in nodes}
        params = {parameter for parameter in params if parameter.requires_grad}
        learning: Any = set()
        if params and loss.requires_grad:
            loss.backward()
            self.gradient_evaluations += max(1, density.layout.num_rows) * self.num_particles
            learning = {parameter for parameter in params if parameter.grad is not None}
        if self._steps == 0:
            self.frozen = warn_frozen(self.model, learning)
        if learning:
            self.optim(learning)
            zero_grads(learning)
        self._steps += 1
        return float(loss.detach())

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The energy as :meth:`step` returns it; changes nothing."""
        density = self._density(args, kwargs)
        cloud = self._sweeps(density, self._start(density))
        with torch.no_grad():
            rows, other = density.log_joint_of(cloud.particles)
        return float(self._energy(density, cloud, rows, other))

    def particles(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Weighted particles of a call, from a fresh start.

        Returns:
            Constrained values by site, ``(num_samples,) + site shape``, and normalized weights
            ``(num_samples, B)``, or ``(num_samples, 1)`` where they are joint.
        """
        density = self._density(args, kwargs)
        cloud = self._fresh(density, self.num_samples)
        return density.constrained(cloud.particles), cloud.log_weights.softmax(0)

    def infer(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The posterior mean in unconstrained space, from a fresh start.

        Returns:
            Constrained values by site, detached.
        """
        density = self._density(args, kwargs)
        cloud = self._fresh(density, self.num_samples)
        weights = cloud.log_weights.softmax(0)  # (K, U)
        mean = {
            name: (value * (weights.unsqueeze(-1) if value.dim() == 3 else weights)).sum(0, True)
            for name, value in cloud.particles.items()
        }
        return {name: value[0] for name, value in density.constrained(mean).items()}

    def posterior(self, *args: Any, **kwargs: Any) -> ParticleGuide:
        """A guide around the particles of a fresh start: Gaussian kernels, row by row.

        See :mod:`guides.inference.particle_guide` for its density, which has the mean and the
        covariance of the particles.

        Returns:
            A guide for the rows of this call.
        """
        density = self._density(args, kwargs)
        cloud = self._fresh(density, self.num_samples)
        read = density.layout
        plate = None if read.data_plate is None else read.data_plate.name
        guide = ParticleGuide(self.model, args, kwargs, data_plate=plate)
        guide.set(read, cloud.particles, cloud.log_weights)
        return guide

    def evidence(
        self,
        *args: Any,
        num_sweeps: int | None = None,
        num_particles: int | None = None,
        num_repeats: int = 4,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Score:
        """Estimate log p(x) by fresh runs from the prior; the persistent particles play no part.

        A pilot run finds the preconditioners and is thrown away; the estimate is the mean of
        ``num_repeats`` runs that hold them fixed, so that exp of every row's score is unbiased for
        p(x_n). With global latents the score is joint.

        Args:
            *args: Positional arguments of the model.
            num_sweeps: Temperatures of a run; ``anneal`` by default.
            num_particles: Particles of a run; ``num_samples`` by default.
            num_repeats: Runs that are averaged; their spread gives the standard errors.
            model_kwargs: Keyword arguments of the model.

        Returns:
            The score, in nats. That of the published variant says in its name that it is biased.
        """
        num_sweeps = self.anneal if num_sweeps is None else num_sweeps
        num_particles = self.num_samples if num_particles is None else num_particles
        for name, value in (
            ("num_sweeps", num_sweeps),
            ("num_particles", num_particles),
            ("num_repeats", num_repeats),
        ):
            check_number(name, value, integer=True, least=1)
        density = self._density(args, {} if model_kwargs is None else model_kwargs)
        return particle_evidence(
            self.sampler,
            density,
            self._graph(density),
            num_sweeps=num_sweeps,
            num_particles=num_particles,
            num_repeats=num_repeats,
        )

    def get_state(self) -> dict[str, Any]:
        """What persists between steps beside parameters: the particles."""
        return {
            "memory": self._memory.state(),
            "steps": self._steps,
            "gradient_evaluations": self.gradient_evaluations,
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`get_state` returned."""
        self._memory.set_state(state["memory"])
        self._steps = state["steps"]
        self.gradient_evaluations = state["gradient_evaluations"]

    def _density(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ParticleDensity:
        first = self.dependencies is None
        read = layout(self.model, args, kwargs, data_plate=self.data_plate, check=first)
        if not read.groups:
            raise ValueError("The model has no latent sites, so there is nothing to infer.")
        if fresh := read.fresh_indices():
            read = layout(self.model, args, kwargs, data_plate=self.data_plate, indices=fresh)
        density = ParticleDensity(LogJoint(self.model, args, kwargs, layout=read))
        if density.joint and read.scale != 1.0:
            shared = [name for name, site in read.sites.items() if site.row_dim is None]
            raise ValueError(
                f"Global latents {', '.join(shared)} have joint particles with all rows, but the "
                f"call brings {read.num_rows} of {round(read.num_rows * read.scale)}: weights of "
                "a minibatch are no weights of the data. Call with all rows, or make the globals "
                "parameters (pyro.param)."
            )
        if first:
            self._check(density, args, kwargs)
        return density

    def _check(
        self, density: ParticleDensity, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        check_ownership({"model": self.model}, {"model": capture(self.model, args, kwargs)})
        masked = [site.name for site in density.sites.values() if site.masked]
        if masked:
            raise ValueError(
                f"Latent site {masked[0]!r} is masked: where its mask is off it has no density to "
                "move in. Sample it without the mask (mask only what is observed)."
            )
        values = density.log_joint.predictions()
        with torch.no_grad():
            density.log_joint.run(values, validate=True)
        density.log_joint.check_rows(density.layout.pack(values))
        self.dependencies = dependencies(density)

    def _graph(self, density: ParticleDensity) -> Dependencies:
        if self.dependencies is None or set(self.dependencies.order) != set(density.sites):
            self.dependencies = dependencies(density)
        return self.dependencies

    def _fresh(self, density: ParticleDensity, num_particles: int) -> Cloud:
        graph = self._graph(density)
        return self.sampler.anneal(density, graph, num_particles, self.anneal)

    def _sweeps(self, density: ParticleDensity, cloud: Cloud, counted: bool = False) -> Cloud:
        graph = self._graph(density)
        for _ in range(self.num_sweeps):
            cloud = self.sampler.sweep(density, graph, cloud, settled=True)
        self.sampler.check(cloud)
        if counted:
            units = max(1, density.layout.num_rows) * cloud.num_particles
            per_site = 2 if self.sampler.variant == "corrected" else 1
            self.gradient_evaluations += units * per_site * len(graph.order) * self.num_sweeps
        return cloud

    def _energy(
        self, density: ParticleDensity, cloud: Cloud, rows: Tensor, other: Tensor
    ) -> Tensor:
        """-log p(x, z) of all N rows, averaged over the weighted particles."""
        weights = cloud.log_weights.softmax(0).detach()
        if density.joint:
            return -(weights[:, 0] * (rows.sum(-1) + other)).sum()
        return -(density.layout.scale * (weights * rows).sum() + other.mean())

    def _data_of(self, density: ParticleDensity) -> CallData | None:
        """What tells rows without numbers apart from those of other steps."""
        called = density.log_joint
        return None if self.rows_by_position else CallData(called.args, called.kwargs)

    def _start(self, density: ParticleDensity) -> Cloud:
        """Remembered particles, fresh ones for rows that are new."""
        cloud, known = self._memory.read(density, self._data_of(density))
        if cloud is not None and bool(known.all()):
            return cloud
        fresh = self._fresh(density, self.num_particles)
        # Metropolis steps never weigh again: the weights of the start would stay for good.
        fresh = self.sampler.equalized(density, fresh)
        return fresh if cloud is None else choose(known, cloud, fresh)

    def __repr__(self) -> str:
        """Variant, sizes, and the order of a sweep."""
        order = "not read yet" if self.dependencies is None else " ".join(self.dependencies.order)
        sampler = self.sampler
        kind = sampler.correction if sampler.variant == "corrected" else sampler.resampler
        return (
            f"DivideAndConquer({sampler.variant}, {kind}, num_particles={self.num_particles}, "
            f"num_sweeps={self.num_sweeps}, step_size={sampler.step_size}, order: {order})"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        words = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be one of {words}, got {value!r}.")
