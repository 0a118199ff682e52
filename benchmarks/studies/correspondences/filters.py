"""What filters look like, as numbers: how local, how oriented, how much center and surround."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["center_surround", "extent", "gabor", "orientation"]


def extent(filters: Tensor) -> Tensor:
    """How much of its patch a filter fills: the participation ratio of its squared weights.

        (sum_d w_d^2)^2 / (D sum_d w_d^4)

    1 / D for a single pixel, 1 for weights of one size, 1/3 for Gaussian noise.

    Args:
        filters: One a row, ``(K, D)``.

    Returns:
        One number a filter, ``(K,)``.

    Example:
        >>> extent(torch.tensor([[0.0, 2.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]]))
        tensor([0.2500, 1.0000])
    """
    power = filters.square()
    return power.sum(-1).square() / (filters.shape[-1] * power.square().sum(-1))


def orientation(filters: Tensor, shape: tuple[int, int]) -> Tensor:
    """How far the power of a filter lies at one orientation, from 0 (at all) to 1 (at one).

        | sum_k P_k exp(2 i angle_k) | / sum_k P_k

    with P the power spectrum, its corners left out so that every angle has the same frequencies.

    Args:
        filters: One a row, ``(K, D)``.
        shape: Height and width of a filter.

    Returns:
        One number a filter, ``(K,)``.

    Example:
        >>> rows = torch.arange(8.0)[:, None].expand(8, 8)
        >>> stripes, dot = torch.cos(2 * torch.pi * rows / 4), torch.zeros(8, 8)
        >>> dot[4, 4] = 1.0
        >>> both = torch.stack([stripes.flatten(), dot.flatten()])
        >>> orientation(both, (8, 8)).round(decimals=2).abs()
        tensor([0.8600, 0.0000])
    """
    size = 4 * max(shape)  # zeros around a filter, for a spectrum without coarse steps
    power = torch.fft.fft2(filters.reshape(-1, *shape), s=(size, size)).abs().square()
    axis = torch.fft.fftfreq(size, dtype=filters.dtype)
    down, right = torch.meshgrid(axis, axis, indexing="ij")
    radius = down.hypot(right)
    power = power * ((radius > 0) & (radius < 0.5))
    turned = torch.exp(2j * torch.atan2(down, right))
    return (power * turned).sum((-1, -2)).abs() / power.sum((-1, -2))


def center_surround(whitening: Tensor, side: int) -> Tensor:
    """What the four neighbors of a pixel weigh, relative to the pixel itself.

    Args:
        whitening: Filters ``(D, D)`` of square patches, the filter of pixel d in row d.
        side: Side of a patch.

    Returns:
        (sum of the four) / center, one for every pixel that has four neighbors: negative where a
        center stands against its surround, -1 where they balance.

    Example:
        >>> float(center_surround(torch.eye(9) - 0.1, side=3))
        -0.444...
    """
    filters = whitening.reshape(side, side, side, side)
    found = []
    for i in range(1, side - 1):
        for j in range(1, side - 1):
            own = filters[i, j]
            around = own[i - 1, j] + own[i + 1, j] + own[i, j - 1] + own[i, j + 1]
            found.append(around / own[i, j])
    return torch.stack(found)


def gabor(filters: Tensor, shape: tuple[int, int], num_steps: int = 150) -> Tensor:
    """How much of a filter's power the Gabor function nearest to it explains.

        g(r) = exp(-u^2 / 2 s^2 - v^2 / 2 t^2) (a cos(k u) + b sin(k u))

    with u and v the places of pixels along the wave and across it, from a center. Amplitudes a, b
    are those of least squares; center, widths (at least .7 pixels) and wave are fitted by Adam
    from the filter's own center of power and the peak of its spectrum, with widths of 1, 2 and 4
    pixels; the best fit counts.

    Args:
        filters: One a row, ``(K, D)``.
        shape: Height and width of a filter.
        num_steps: Updates of the fit.

    Returns:
        R^2, one number a filter, ``(K,)``.

    Example:
        >>> down, right = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        >>> near = torch.exp(-((down - 3) ** 2 + (right - 4) ** 2) / 8)
        >>> wave = near * torch.cos(1.5 * (down - 3) + 0.5)
        >>> bool(gabor(wave.reshape(1, -1), (8, 8)) > 0.99)
        True
    """
    filters = filters.detach().double()
    down, right = torch.meshgrid(
        *(torch.arange(float(n), dtype=torch.float64) for n in shape), indexing="ij"
    )
    places = torch.stack([down, right], -1).reshape(-1, 2)  # (D, 2)
    power = filters.square()
    center = power @ places / power.sum(-1, keepdim=True)
    starts = (1.0, 2.0, 4.0)
    parameters = {
        "center": center.repeat(len(starts), 1),
        "width": torch.tensor(starts).double().repeat_interleave(len(filters))[:, None].log()
        + torch.zeros(2),
        "wave": _peak(filters, shape).repeat(len(starts), 1),
    }
    target = filters.repeat(len(starts), 1)
    for value in parameters.values():
        value.requires_grad_()
    optim = torch.optim.Adam(parameters.values(), lr=0.05)
    best = torch.zeros(len(target), dtype=torch.float64)
    for _ in range(num_steps):
        explained = _explained_by_gabor(target, places, **parameters)
        best = torch.maximum(best, explained.detach())
        optim.zero_grad()
        (-explained.sum()).backward()
        optim.step()
    return best.reshape(len(starts), -1).max(0).values


def _peak(filters: Tensor, shape: tuple[int, int]) -> Tensor:
    """The wave vector where the power spectrum is largest, radians a pixel, ``(K, 2)``."""
    size = 4 * max(shape)
    power = torch.fft.fft2(filters.reshape(-1, *shape), s=(size, size)).abs()
    highest = power.flatten(1).argmax(-1)
    axis = 2 * torch.pi * torch.fft.fftfreq(size, dtype=filters.dtype)
    return torch.stack([axis[highest // size], axis[highest % size]], -1) + 1e-3


def _explained_by_gabor(
    target: Tensor, places: Tensor, center: Tensor, width: Tensor, wave: Tensor
) -> Tensor:
    away = places - center[:, None]  # (K, D, 2)
    along = wave / wave.norm(dim=-1, keepdim=True)
    u = (away * along[:, None]).sum(-1)
    v = away[..., 0] * along[:, None, 1] - away[..., 1] * along[:, None, 0]
    s, t = (0.7 + width.exp()).unbind(-1)
    near = torch.exp(-0.5 * ((u / s[:, None]) ** 2 + (v / t[:, None]) ** 2))
    phase = (away * wave[:, None]).sum(-1)
    even, odd = near * phase.cos(), near * phase.sin()
    # Least squares of two regressors, by hand; the ridge keeps a vanishing sine harmless.
    ee, oo, eo = (even * even).sum(-1), (odd * odd).sum(-1), (even * odd).sum(-1)
    te, to = (target * even).sum(-1), (target * odd).sum(-1)
    ridge = 1e-6 * (ee + oo)
    ee, oo = ee + ridge, oo + ridge
    fitted = (te.square() * oo - 2 * te * to * eo + to.square() * ee) / (ee * oo - eo.square())
    return fitted / target.square().sum(-1)
