"""Mixture: diagonal Gaussians in a mixture, with draws that are differentiable in the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from guides.families.family import Family, inverse_softplus, positive

__all__ = ["Mixture"]


class Mixture(Family):
    """A mixture of C diagonal Gaussians in unconstrained space, every parameter of the row's own.

        loc, logits, offsets, raw = split(lam)
        c    ~ Categorical(logits)
        u    ~ Normal(loc + offsets_c, softplus(raw_c)^2 I)
        q(u) = sum_c softmax(logits)_c Normal(u; loc + offsets_c, softplus(raw_c)^2 I)

    Noise chooses the component and the point; the point then follows all parameters, the weights
    among them, by implicit reparameterization: with F_k(u_k | u_<k) the conditional
    distribution functions, draws move so that every F_k keeps its value,

        du = -(dF/du)^-1 (dF/dlam) dlam                 dF/du: lower triangular.

    Gradients are unbiased and first derivatives only. To the weights they carry the mass that
    has to pass between components, ``1 / q`` in the gap: between components many standard
    deviations apart their variance is too large to be of use, and the weights in effect stay
    where they are. Modes that far apart are better covered by fitting ``log_prob`` to simulations.

    The components start apart, on a grid whose order is shuffled by coordinate: equal components
    would have equal gradients and never part. Around ``loc``, the shared location, all offsets
    average to zero at the start.

    References:
        | Stochastic backpropagation through mixture density distributions (Graves, 2016)
        | https://arxiv.org/abs/1607.05690
        | Implicit reparameterization gradients (Figurnov, Mohamed & Mnih, 2018)
        | https://arxiv.org/abs/1805.08498

    Args:
        size: Length K of the packed latents.
        components: Number C of Gaussians.
        init_scale: Standard deviation at the start, of the whole mixture.

    Raises:
        ValueError: If ``components`` is below 1.

    Example:
        >>> family = Mixture(3, components=4)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    twice_differentiable = False
    symmetric_noise = False

    offsets: Tensor

    def __init__(self, size: int, *, components: int = 4, init_scale: float = 0.1) -> None:
        super().__init__(size)
        if components < 1:
            raise ValueError(f"components must be at least 1, got {components}.")
        self.components = components
        # Half the standard deviation within components, the rest of the variance between them.
        self.raw_scale = inverse_softplus(init_scale * (0.5 if components > 1 else 1.0))
        offsets = init_scale * math.sqrt(0.75) * _latin_grid(components, size)
        self.register_buffer("offsets", offsets.to(torch.get_default_dtype()), persistent=False)

    @property
    def num_params(self) -> int:
        """K + C (1 + 2 K)."""
        return self.size + self.components * (1 + 2 * self.size)

    @property
    def noise_size(self) -> int:
        """K + 1: the first number chooses the component."""
        return self.size + 1

    def init(self, loc: Tensor) -> Tensor:
        """Equal weights around ``loc``, standard deviation ``init_scale`` in all."""
        start = [
            loc.new_zeros(self.components),
            self.offsets.to(loc).flatten(),
            loc.new_full((self.components * self.size,), self.raw_scale),
        ]
        return torch.cat([loc, torch.cat(start).expand(*loc.shape[:-1], -1)], -1)

    def push(self, lam: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen component's point, attached to all parameters."""
        log_weight, loc, scale = self._parts(lam)
        value = _choose(log_weight.detach(), loc.detach(), scale.detach(), noise)
        # Scores under no_grad skip the K x K systems, unless a forward derivative is asked for.
        if torch.is_grad_enabled() or forward_ad.unpack_dual(lam).tangent is not None:
            value = _attach(value, log_weight, loc, scale)
        return value, _log_prob(value, log_weight, loc, scale)

    def log_prob(self, lam: Tensor, value: Tensor) -> Tensor:
        """Log density of points."""
        return _log_prob(value, *self._parts(lam))

    def _parts(self, lam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights ``(..., C)``, locations and scales ``(..., C, K)``."""
        number = self.components * self.size
        loc, logits, offsets, raw = lam.split([self.size, self.components, number, number], -1)
        shape = (self.components, self.size)
        locs = loc.unsqueeze(-2) + offsets.unflatten(-1, shape)
        return logits.log_softmax(-1), locs, positive(raw).unflatten(-1, shape)


def _latin_grid(components: int, size: int) -> Tensor:
    """Points ``(C, K)``, mean zero and variance one in each coordinate, no two equal in any."""
    if components == 1:
        return torch.zeros(1, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    grid = torch.linspace(-1.0, 1.0, components, dtype=torch.float64)
    grid = grid / grid.square().mean().sqrt()
    orders = [torch.randperm(components, generator=generator) for _ in range(size)]
    return torch.stack([grid[order] for order in orders], -1)


def _choose(log_weight: Tensor, loc: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
    """A point of the component that the first noise number falls into, ``(*S, ..., K)``."""
    uniform = torch.special.ndtr(noise[..., :1])
    # All bounds but the last, which may round to less than a uniform number.
    bounds = log_weight.exp().cumsum(-1)[..., :-1]
    chosen = (uniform > bounds).sum(-1, keepdim=True)  # (*S, ..., 1)
    numbers = torch.arange(log_weight.shape[-1], device=noise.device)
    one_hot = (chosen == numbers).unsqueeze(-1)  # (*S, ..., C, 1)
    loc, scale = (torch.where(one_hot, part, 0.0).sum(-2) for part in (loc, scale))
    return loc + scale * noise[..., 1:]


def _normal_log_prob(standard: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * standard.square() - scale.log() - 0.5 * math.log(2 * math.pi)


def _log_ndtr(x: Tensor) -> Tensor:
    """Log of the standard normal distribution function; torch's own knows no vmap."""
    tail = (0.5 * torch.special.erfcx(-x / math.sqrt(2))).log() - 0.5 * x.square()
    return torch.where(x < 0, tail, torch.log1p(-0.5 * torch.special.erfc(x / math.sqrt(2))))


def _log_prob(value: Tensor, log_weight: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    standard = (value.unsqueeze(-2) - loc) / scale
    return (log_weight + _normal_log_prob(standard, scale).sum(-1)).logsumexp(-1)


def _attach(value: Tensor, log_weight: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The same points, with the implicit derivative with respect to the parameters.

    Divided by the conditional density p_k of u_k, dF_k = 0 reads

        du_k = sum_c r_ck (dloc_ck + e_ck dscale_ck) - sum_c a_ck dlog pi_c(u_<k)

    where e_ck is the standardized point, pi_c(u_<k) the weight of the component given the
    coordinates before k, r_ck = pi_c(u_<=k), and a_ck = pi_c(u_<k) (Phi(e_ck) - F_k) / p_k.
    Coordinates before k move too, through pi: a unit triangular system.

    Args:
        value: Points ``(*S, ..., K)`` without derivative.
        log_weight: Normalized log weights ``(..., C)``.
        loc: Locations ``(..., C, K)``.
        scale: Scales ``(..., C, K)``.
    """
    points = value.unsqueeze(-2)
    standard = (points - loc) / scale  # (*S, ..., C, K)
    log_prob = _normal_log_prob(standard, scale)
    weight = log_weight.unsqueeze(-1).expand(*standard.shape[:-1], 1)
    joint = torch.cat([weight, log_prob], -1).cumsum(-1)
    before, upto = joint[..., :-1], joint[..., 1:]  # up to normalization log pi(u_<k), pi(u_<=k)
    share = before.detach().softmax(-2)
    responsibility = upto.detach().softmax(-2)
    fixed = standard.detach()
    # Phi - F from the side of the smaller tail, where it does not cancel; in units of p_k.
    log_density = upto.detach().logsumexp(-2, keepdim=True)
    left = (before.detach() + _log_ndtr(fixed) - log_density).exp()
    right = (before.detach() + _log_ndtr(-fixed) - log_density).exp()
    below, above = left.sum(-2, keepdim=True), right.sum(-2, keepdim=True)
    carried = torch.where(below < above, left - share * below, share * above - right)
    # The coefficients a sum to zero over components, so log pi needs no normalization.
    motion = (responsibility * (loc + fixed * scale) - carried * before).sum(-2)
    slope = -(fixed / scale.detach())  # d log Normal / du
    system = (carried.mT @ slope).tril(-1)
    system = system + torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    change = (motion - motion.detach()).unsqueeze(-1)
    moved = torch.linalg.solve_triangular(system, change, upper=False, unitriangular=True)
    return value + moved.squeeze(-1)
