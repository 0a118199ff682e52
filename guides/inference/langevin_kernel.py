"""Kernels of a program: steps, preconditioners and energies of its latents; what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from guides.arguments import did_you_mean
from guides.capturing import is_capturing
from guides.energy import LogJoint
from guides.inference.curvature import hessian
from guides.inference.langevin import Evaluate, Metric, State
from guides.inference.laplace_guide import IndefiniteHessianError
from guides.inference.relaxation import energy_function
from guides.layout import Layout

__all__ = [
    "check_finite",
    "check_layout",
    "check_settings",
    "evaluate_chains",
    "hessian_metric",
    "own_metric",
]

SAMPLERS = ("ula", "mala")
PRECONDITIONERS = ("hessian", "second_moment", "running")


def check_settings(
    sampler: Any, step_size: Any, momentum: Any, preconditioner: Any, num_mixing: int
) -> None:
    """Raise for settings that do not sample exp(-E).

    Raises:
        TypeError: For an optimizer in place of a sampler.
        ValueError: For what no kernel here does, or does without bias.
    """
    if not isinstance(sampler, str):
        name = getattr(sampler, "__name__", type(sampler).__name__)
        raise TypeError(
            f'sampler must be "ula" or "mala", got {name}. An optimizer is no sampler: noise of '
            "size sqrt(2 eta) is right for plain gradient steps only. Momentum needs it scaled by "
            'sqrt(1 - m): pass sampler="ula", momentum=m. The divisors of Adam move with the '
            'state, which biases the draws: pass preconditioner="second_moment".'
        )
    if sampler not in SAMPLERS:
        raise ValueError(
            f'sampler must be "ula" or "mala", got {sampler!r}. '
            f"{did_you_mean(sampler, SAMPLERS)}For momentum pass momentum=, for Adam's divisors "
            'preconditioner="second_moment".'
        )
    number = isinstance(step_size, (int, float)) and not isinstance(step_size, bool)
    if step_size != "auto" and not (number and step_size > 0):
        raise ValueError(f'step_size must be "auto" or a positive number, got {step_size!r}.')
    if isinstance(momentum, bool) or not (
        isinstance(momentum, (int, float)) and 0 <= momentum < 1
    ):
        raise ValueError(
            f"momentum must be in [0, 1), got {momentum!r}: its noise has variance "
            "2 (1 - momentum) eta, and from 1 on nothing is forgotten."
        )
    if momentum and sampler == "mala":
        raise ValueError(
            'sampler="mala" has no momentum: accepting or rejecting its updates would need the '
            'velocity reversed. Pass momentum=0, or sampler="ula" with its known bias.'
        )
    if isinstance(preconditioner, Mapping) or preconditioner is None:
        return
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(
            f"preconditioner must be one of {', '.join(PRECONDITIONERS)}, tensors by group, or "
            f"None; got {preconditioner!r}. "
            f"{did_you_mean(str(preconditioner), PRECONDITIONERS)}".rstrip()
        )
    if preconditioner == "running" and sampler == "mala":
        raise ValueError(
            'preconditioner="running" changes from state to state, and MALA needs the way back '
            'to have the same one. Pass preconditioner="second_moment", which stands still while '
            "draws are kept."
        )
    if preconditioner == "second_moment" and num_mixing < 1:
        raise ValueError(
            'preconditioner="second_moment" is measured in the discarded updates, and '
            "num_mixing=0 has none. Pass num_mixing of 10 or more."
        )


def check_layout(read: Layout, sampler: str) -> None:
    """Raise where the latents of a call cannot be sampled.

    Raises:
        ValueError: For a masked latent, or MALA for the global latents of a minibatch.
    """
    masked = [site.name for site in read.sites.values() if site.masked]
    if masked:
        raise ValueError(
            f"Latent site {masked[0]!r} is masked: where its mask is off it has no density, and "
            "a chain would wander off. Sample it without the mask (mask only what is observed)."
        )
    if sampler == "mala" and read.scale != 1.0 and read.group("global") is not None:
        names = ", ".join(repr(site.name) for site in read.group("global").sites)  # type: ignore
        raise ValueError(
            f"MALA cannot sample the global latents {names} from a minibatch: accepting needs the "
            'energy of all rows. Pass all rows, or sampler="ula", stochastic gradient Langevin, '
            "whose draws of the globals are too wide by the noise of the minibatch."
        )


def evaluate_chains(log_joint: LogJoint) -> Evaluate:
    """Gradients and energies of packed latents with a leading dimension of chains."""
    scale = log_joint.layout.scale
    gradient = torch.func.grad(energy_function(log_joint, jacobian=True), has_aux=True)

    def one(packed: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        grads, (rows, other) = gradient(packed)
        return {k: g / scale if g.dim() == 2 else g for k, g in grads.items()}, rows, other

    def evaluate(packed: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        num_chains = next(iter(packed.values())).shape[0]
        if num_chains > 1:
            try:
                return torch.func.vmap(one)(packed)
            except RuntimeError:
                # Control flow on values cannot be vectorized; a loop gives the same numbers.
                pass
        found = [one({k: v[c] for k, v in packed.items()}) for c in range(num_chains)]
        grads = {k: torch.stack([item[0][k] for item in found]) for k in packed}
        return grads, torch.stack([f[1] for f in found]), torch.stack([f[2] for f in found])

    return evaluate


def check_finite(log_joint: LogJoint, state: State, where: str) -> None:
    """Raise where the energy of a state is not finite, with the sites and rows.

    Args:
        log_joint: The log joint of the call.
        state: A state with a leading dimension of chains.
        where: When this was found, to end the sentence.
    """
    if is_capturing():
        return
    good = torch.isfinite(state.rows).all(-1) & torch.isfinite(state.other)
    good &= torch.stack(
        [torch.isfinite(v).flatten(1).all(-1) for v in state.gradient.values()]
    ).all(0)
    if bool(good.all()):
        return
    chain = int((~good).nonzero()[0])
    packed = {name: value[chain] for name, value in state.packed.items()}
    with torch.no_grad():
        terms = log_joint.sites(log_joint.layout.constrain(packed))
    sites = [name for name, term in terms.items() if not bool(torch.isfinite(term).all())]
    rows = (~torch.isfinite(state.rows[chain])).nonzero().flatten().tolist()
    raise ValueError(
        f"The energy or its gradient is not finite {where}"
        + (f", at sites {', '.join(map(repr, sites))}" if sites else "")
        + (f", in rows {rows[:5]}{' ...' if len(rows) > 5 else ''}" if rows else "")
        + ". An unadjusted step must be below 2 / lambda_max of the energy's Hessian wherever the "
        'chain goes: take a smaller step_size, or sampler="mala", which rejects such proposals. '
        "At the start, check that the data lie in the support of their distributions."
    )


def hessian_metric(log_joint: LogJoint, packed: Mapping[str, Tensor]) -> dict[str, Metric]:
    """M = Lambda^-1 by group: the inverse Hessian blocks at given latents, ``{group: (B, K)}``.

    Raises:
        IndefiniteHessianError: Where a block is not positive definite.
    """
    blocks = hessian(log_joint, packed)
    found = {}
    for group in log_joint.layout.groups:
        block = blocks["global" if group.plate is None else "local"]
        block = 0.5 * (block + block.mT)
        factor, info = torch.linalg.cholesky_ex(block)
        if not is_capturing() and bool((info > 0).any()):
            names = ", ".join(repr(site.name) for site in group.sites)
            raise IndefiniteHessianError(
                f"The Hessian of the energy is not positive definite at sites {names}, so its "
                "inverse is no preconditioner. Relax further before the chains start (num_steps), "
                'or pass preconditioner="second_moment".'
            )
        eye = torch.eye(group.size, dtype=block.dtype, device=block.device)
        found[group.name] = Metric(
            torch.linalg.solve_triangular(factor.mT, eye.expand(block.shape), upper=True), True
        )
    return found


def own_metric(given: Mapping[str, Tensor], read: Layout) -> dict[str, Metric]:
    """Preconditioners that the user passed, by group.

    Raises:
        ValueError: For a group that is missing or unknown, a shape that does not fit, or a
            matrix that is not positive definite.
    """
    names = [group.name for group in read.groups]
    if set(given) != set(names):
        raise ValueError(
            f"preconditioner must have a tensor for every group of latents: {', '.join(names)}; "
            f"got {', '.join(given) or 'none'}."
        )
    found = {}
    for group in read.groups:
        value, size = given[group.name], group.size
        diagonals = [(size,)] if group.plate is None else [(size,), (read.num_rows, size)]
        full = [(size, size)] if group.plate is None else [
            (1, size, size), (read.num_rows, size, size)
        ]  # fmt: skip
        shape = tuple(value.shape)
        if shape not in diagonals + full:
            raise ValueError(
                f"The preconditioner of the {group.name} latents must have one of the shapes "
                f"{', '.join(map(str, diagonals + full))}, got {shape}."
            )
        value = value.detach().to(dtype=group.dtype, device=group.device)
        if shape in full:
            root, info = torch.linalg.cholesky_ex(value)
            bad = not is_capturing() and bool((info > 0).any())
        else:
            root = value.sqrt()
            bad = not is_capturing() and not bool((value > 0).all())
        if bad:
            raise ValueError(
                f"The preconditioner of the {group.name} latents is not positive definite. Pass "
                "an estimate of the posterior covariance, or of its diagonal."
            )
        found[group.name] = Metric(root, shape in full)
    return found
