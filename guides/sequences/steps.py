"""Steps: the time axis of a program, read from the order in which it samples.

    z_1 x_1 z_2 x_2 .. z_T x_T          a step ends where the next latent follows an observation
    z_1 .. z_T x_1 .. x_T               as many latents a step as there are for each observation

Nothing is asked of the program but that its steps look alike: equal numbers of latents and of
features, so that one network serves them all. How many steps there are may change between calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from guides.capturing import is_capturing
from guides.layout import Layout
from guides.sites import Group, Observed
from guides.supports import is_masked

__all__ = ["Step", "hides_data", "present_entries", "present_rows", "read_steps", "step_rows"]


@dataclass(frozen=True)
class Step:
    """One step of the program.

    Args:
        sites: Names of its latent sites.
        inputs: Its observed values, one vector a row ``(B, F)``, zero where they are masked.
        mask: Rows that have this step ``(B,)``; None where all have.
        observed: Names of its observed sites.
        widths: Features of each of them.
        present: Which of ``inputs`` count ``(B, F)``; None where no observed site has a mask.
    """

    sites: tuple[str, ...]
    inputs: Tensor
    mask: Tensor | None
    observed: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    present: Tensor | None = None


def read_steps(read: Layout) -> list[Step]:
    """The steps of one call.

    Args:
        read: The layout of the call.

    Returns:
        The steps, first to last.

    Raises:
        ValueError: Where the program has no data plate, or steps that do not look alike.
        NotImplementedError: Where the distribution of a latent has a mask of its own.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from guides.layout import layout
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = 0.0
        ...         for t in range(x.shape[1]):
        ...             z = pyro.sample(f"z_{t}", dist.Normal(z, 1.0))
        ...             pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[:, t])
        >>> [step.sites for step in read_steps(layout(model, (torch.zeros(4, 3),)))]
        [('z_0',), ('z_1',), ('z_2',)]
    """
    local = {name for name, site in read.sites.items() if site.row_dim is not None}
    seen = {name for name, site in read.observed.items() if site.row_dim is not None}
    if read.data_plate is None or not local or not seen:
        raise ValueError(
            "A guide of sequences needs latents and observations of every step inside the data "
            f"plate; latents there: {', '.join(sorted(local)) or 'none'}, observations there: "
            f"{', '.join(sorted(seen)) or 'none'}. One row of the plate is one sequence."
        )
    cut: list[tuple[list[str], list[str]]] = [([], [])]
    for name in read.order:
        if name in local:
            if cut[-1][1]:
                cut.append(([], []))
            cut[-1][0].append(name)
        elif name in seen and (cut[-1][0] or len(cut) > 1):
            cut[-1][1].append(name)
    if not cut[-1][1]:
        raise ValueError(
            f"The last latents of the program, {', '.join(cut[-1][0])}, have no observation after "
            "them, so where its steps end is not known. Sample the latents of a step before what "
            "is observed at that step."
        )
    if len(cut) == 1:
        cut = _dealt(*cut[0])
    sizes = [sum(read.sites[name].size for name in names) for names, _ in cut]
    steps = []
    for latents, observed in cut:
        parts, seen_parts = zip(
            *(_features(read.observed[name]) for name in observed), strict=True
        )
        present = None
        if any(part is not None for part in seen_parts):
            present = torch.cat(
                [
                    torch.ones_like(part, dtype=torch.bool) if own is None else own
                    for part, own in zip(parts, seen_parts, strict=True)
                ],
                -1,
            )
        masks = [site_mask for name in latents if (site_mask := _mask(read, name)) is not None]
        mask = None if not masks else torch.stack(masks).all(0)
        if _differ(mask, masks):
            raise ValueError(
                f"The latents of one step, {', '.join(latents)}, have different masks. Mask a "
                "step of a row as a whole."
            )
        features = tuple(part.shape[-1] for part in parts)
        inputs = torch.cat(parts, -1)
        steps.append(Step(tuple(latents), inputs, mask, tuple(observed), features, present))
    widths = [step.inputs.shape[1] for step in steps]
    for what, numbers in (("latent coordinates", sizes), ("observed features", widths)):
        if len(set(numbers)) > 1:
            odd = next(i for i, n in enumerate(numbers) if n != numbers[0])
            raise ValueError(
                f"Steps must look alike, since one network or one update serves them all: step 1 "
                f"({', '.join(steps[0].sites)}) has {numbers[0]} {what}, step {odd + 1} "
                f"({', '.join(steps[odd].sites)}) has {numbers[odd]}. Observe every step and mask "
                "the rows that lack it (pyro.poutine.mask); put a latent of the whole row into "
                "the state of every step, or make it a parameter. Programs without alike steps "
                "are for autoregressive_ guides and PredictiveCoding."
            )
    return steps


def step_rows(group: Group) -> Tensor | None:
    """Rows that have the step of a group of latents, ``(B, 1, .., 1)``; None where all have.

    Args:
        group: The latents of one step.
    """
    masks = [site.mask for site in group.sites if site.mask is not None]
    if group.plate is None or not masks:
        return None
    rows = masks[0].expand(group.sites[0].batch_shape).movedim(group.plate.dim, 0)
    on = rows.reshape(rows.shape[0], -1).all(1)
    return on.reshape(-1, *(1,) * (-group.plate.dim - 1))


def _dealt(latents: list[str], observed: list[str]) -> list[tuple[list[str], list[str]]]:
    """All latents before all observations: deal them out in equal parts, in order."""
    number = len(observed)
    if len(latents) % number:
        raise ValueError(
            f"The program samples {len(latents)} latents and then {number} observations, so which "
            "belong to one step is not known. Sample the latents of a step right before what is "
            "observed at that step."
        )
    each = len(latents) // number
    return [(latents[i * each : (i + 1) * each], [observed[i]]) for i in range(number)]


def _differ(whole: Tensor | None, masks: list[Tensor]) -> bool:
    if whole is None or is_capturing():
        return False
    return any(not torch.equal(whole, own) for own in masks)


def present_entries(steps: Sequence[Step]) -> Tensor:
    """Which observed values of which step count, ``(B, T, F)``; all where there is no mask.

    Args:
        steps: The steps of a call.
    """
    return torch.stack(
        [
            torch.ones_like(step.inputs, dtype=torch.bool)
            if step.present is None
            else step.present
            for step in steps
        ],
        1,
    )


def present_rows(steps: Sequence[Step]) -> Tensor:
    """Which rows have which step, ``(B, T)``.

    Args:
        steps: The steps of a call.
    """
    ones = torch.ones(len(steps[0].inputs), dtype=torch.bool, device=steps[0].inputs.device)
    return torch.stack([ones if step.mask is None else step.mask for step in steps], 1)


def hides_data(steps: Sequence[Step]) -> bool:
    """Whether a mask takes observed values from steps that their rows have.

    Args:
        steps: The steps of a call.
    """
    if all(step.present is None for step in steps):
        return False
    return bool((present_rows(steps)[..., None] & ~present_entries(steps)).any())


def _features(site: Observed) -> tuple[Tensor, Tensor | None]:
    value = site.rows().to(torch.get_default_dtype()) if not _floats(site) else site.rows()
    if site.mask is None:
        return value, None
    mask = site.rows_first(site.mask.expand_as(site.value)).flatten(1)
    return torch.where(mask, value, torch.zeros_like(value)), mask


def _floats(site: Observed) -> bool:
    return site.value.is_floating_point()


def _mask(read: Layout, name: str) -> Tensor | None:
    site = read.sites[name]
    if site.row_dim is None:
        return None
    if is_masked(site.fn):
        raise NotImplementedError(
            f"The distribution of site {name!r} has a mask of its own, which does not say that "
            "its row lacks the step. Mask the site, with pyro.poutine.mask around it."
        )
    if site.mask is None:
        if site.masked:
            raise NotImplementedError(
                f"Site {name!r} has the mask False, which does not say which rows lack the step. "
                "Give one number a row, with pyro.poutine.mask around it."
            )
        return None
    rows = site.mask.expand(site.batch_shape).movedim(site.row_dim, 0)
    flat = rows.reshape(rows.shape[0], -1)
    if not is_capturing() and not torch.equal(flat.all(1), flat.any(1)):
        raise ValueError(
            f"Latent site {name!r} is masked in part of a row. A guide of sequences switches "
            "whole steps of a row off: give the mask one number a row."
        )
    return flat.all(1)
