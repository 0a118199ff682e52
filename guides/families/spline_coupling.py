"""SplineCoupling: a rational-quadratic coupling flow with shared weights and a per-datum base."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from guides.families.family import Family, inverse_softplus, positive

# Importing Zuko switches torch's validation of distributions off for the whole process.
_validate = torch.distributions.Distribution._validate_args
import zuko  # noqa: E402
from zuko.flows.coupling import GeneralCouplingTransform  # noqa: E402
from zuko.transforms import MonotonicRQSTransform  # noqa: E402

torch.distributions.Distribution.set_default_validate_args(_validate)

__all__ = ["SplineCoupling"]


class SplineCoupling(Family):
    """A neural spline flow in standardized coordinates; transforms from Zuko.

        loc, raw, context = split(lam)
        e ~ Normal(0, I)
        u = loc + softplus(raw) * spline_T(... spline_1(e; context) ...; context)

    The weights of the splines are shared by all rows; each row has its own base and a context
    that bends the flow. Location and scale act after the splines, so that the spline's box
    (``|e| < bound``) sits on the posterior wherever it lies. Weights start near the identity, so
    training starts at the mean-field Gaussian. With K = 1 the splines are conditioned on the
    context alone.

    References:
        | Neural Spline Flows (Durkan et al., 2019)
        | https://arxiv.org/abs/1906.04032

    Args:
        size: Length K of the packed latents.
        context: Length of the per-datum context.
        transforms: Number of coupling layers; the masks alternate.
        bins: Bins of each spline.
        hidden: Widths of the hidden layers of the coupling networks.
        init_scale: Standard deviation at the start.

    Example:
        >>> family = SplineCoupling(3)
        >>> u, log_q = family.rsample_and_log_prob(family.init(torch.zeros(5, 3)))
        >>> u.shape, log_q.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        size: int,
        *,
        context: int = 8,
        transforms: int = 4,
        bins: int = 8,
        hidden: tuple[int, ...] = (64,),
        init_scale: float = 0.1,
    ) -> None:
        super().__init__(size)
        if transforms < 1 or bins < 2 or context < 0:
            raise ValueError(
                "transforms must be at least 1, bins at least 2 and context at least 0, got "
                f"transforms={transforms}, bins={bins}, context={context}."
            )
        self.context = context
        self.raw_scale = inverse_softplus(init_scale)
        masks = [torch.arange(size) % 2 == i % 2 for i in range(transforms)]
        self.transforms = nn.ModuleList(
            GeneralCouplingTransform(
                size,
                context,
                mask,
                univariate=MonotonicRQSTransform,
                shapes=[(bins,), (bins,), (bins - 1,)],
                **_network(size, context, hidden),
            )
            for mask in masks
        )
        with torch.no_grad():
            for transform in self.transforms:
                for parameter in _last_layer(transform):
                    parameter.mul_(0.01)

    @property
    def num_params(self) -> int:
        """2 K plus the length of the context."""
        return 2 * self.size + self.context

    def init(self, loc: Tensor) -> Tensor:
        """Around ``loc`` with standard deviation ``init_scale`` and a zero context."""
        context = loc.new_zeros(*loc.shape[:-1], self.context)
        return torch.cat([loc, torch.full_like(loc, self.raw_scale), context], -1)

    def distribution(self, lam: Tensor) -> dist.TorchDistribution:
        """The flow's distribution; scores points of its own and of others."""
        loc, raw, context = lam.split([self.size, self.size, self.context], -1)
        steps = [transform(context if self.context else None) for transform in self.transforms]
        return _FlowDistribution(zuko.transforms.ComposedTransform(*steps), loc, positive(raw))

    def location(self, lam: Tensor) -> Tensor:
        """The location, where the flow sends the center of its base near the start."""
        return lam[..., : self.size]


def _network(size: int, context: int, hidden: tuple[int, ...]) -> dict[str, Any]:
    # With one feature and no context there is no network, only free spline parameters.
    return {} if size == 1 and not context else {"hidden_features": hidden}


def _last_layer(transform: nn.Module) -> list[nn.Parameter]:
    hyper = getattr(transform, "hyper", None)
    if hyper is not None:
        return list(hyper[-1].parameters())
    return list(transform.parameters())


class _FlowDistribution(dist.TorchDistribution):
    """``loc + scale * flow(e)`` with batch shape ``loc.shape[:-1]``, expandable to plates."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        flow: Any,
        loc: Tensor,
        scale: Tensor,
        batch_shape: torch.Size | None = None,
    ) -> None:
        self.flow = flow
        self.loc = loc
        self.scale = scale
        self.drawn: tuple[Tensor, Tensor] | None = None
        batch_shape = loc.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _FlowDistribution:
        return _FlowDistribution(self.flow, self.loc, self.scale, torch.Size(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        e = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        y, log_det = self.flow.call_and_ladj(e)
        value = self.loc + self.scale * y
        # Keeping the forward density saves the inverse pass, and its rounding, for own draws.
        self.drawn = (value, _standard_log_prob(e) - log_det - self.scale.log().sum(-1))
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self.drawn is not None and self.drawn[0] is value:
            return self.drawn[1]
        y = (value - self.loc) / self.scale
        e, log_det = self.flow.inv.call_and_ladj(y)
        return _standard_log_prob(e) + log_det - self.scale.log().sum(-1)


def _standard_log_prob(e: Tensor) -> Tensor:
    return -0.5 * (
        e.square() + torch.tensor(2 * torch.pi, dtype=e.dtype, device=e.device).log()
    ).sum(-1)
