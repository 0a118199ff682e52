"""Load a guide from its file, in a process that has not seen the data.

The example call that builds the guide again has the shapes of the first one and holds zeros; what
was learned, and every statistic of the data, comes from the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guides.guide import Guide, ProgramGuide
from guides.inference.laplace_guide import Laplace
from guides.probe import Program
from guides.recipe import Recipe, build, others
from guides.saving import FORMAT, KEY, device_of, digest, latents_of, quiet
from guides.sites import Plate

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    model: Program,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> ProgramGuide:
    """Build the guide of a file for a program, without its data.

    The guide gets a name of its own in Pyro's parameter store unless ``name=`` gives one.

    Args:
        path: The file.
        model: The program that the guide was made for; it gets the parameters in the file, where
            they were saved.
        *args: Positional arguments of an example call, for programs whose structure depends on
            the values of the data (the number of groups, say). Not needed otherwise.
        model_kwargs: Keyword arguments of the example call.
        **overrides: Options in place of those in the file, and those that the file cannot hold:
            modules (``encoder=``, whose weights are in the file) and callables (``inputs=``). For
            a composite guide a mapping of options by cell, ``data={"encoder": network}``.

    Returns:
        The guide.

    Raises:
        FileNotFoundError: Where there is no such file.
        ValueError: For a damaged file, one of a newer format, an option that must be passed
            again, or a program that is not the one that the guide was made for.
    """
    description, tensors = _read(Path(path))
    recipe = _recipe(description["recipe"])
    own = {key.partition(".")[2]: v for key, v in tensors.items() if key.startswith("guide.")}
    if description["has_model"]:
        weights = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("model.")}
        _fill(model, weights, "model", path)
    call = _call(recipe, model, args, model_kwargs)
    with quiet():
        try:
            guide = _build(recipe, model, *call, description["data_plate"], overrides)
        except Exception as error:
            error.add_note(
                f"While building the guide of {path} from an example call of zeros. Where the "
                "program depends on the values of its data, pass an example call: "
                "guides.load(path, model, *args)."
            )
            raise
    _check_latents(guide, description["latents"], path)
    if isinstance(guide, Laplace):
        _restore_laplace(guide, description["posterior"], own, tensors.get("plate.index"))
    _match_dtypes(guide, own)
    _fill(guide, own, "guide", path)
    frozen = set(description["frozen"])
    for name, parameter in guide.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return guide


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged, or no safetensors file ({error}). Save the guide again."
        ) from None
    if KEY not in metadata:
        raise ValueError(
            f"{path} was not written by guides.save: it holds tensors without the description of "
            "a guide. Build the guide by guides.make and use load_state_dict."
        )
    try:
        description = json.loads(metadata[KEY])
        written = description["format"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"The description in {path} is damaged. Save the guide again.") from None
    if written > FORMAT:
        raise ValueError(
            f"{path} has format {written}, and this version of pyro-zoo reads up to {FORMAT}; it "
            f"was written by pyro-zoo {description.get('versions', {}).get('pyro-zoo')}. Upgrade "
            "pyro-zoo."
        )
    if digest(tensors) != description["digest"]:
        raise ValueError(f"The tensors in {path} are damaged (digest). Save the guide again.")
    return description, tensors


def _recipe(content: dict[str, Any]) -> Recipe:
    cells = tuple((key, name, options) for key, name, options in content["cells"])
    return Recipe(**{**content, "cells": cells})


def _call(
    recipe: Recipe, model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args or kwargs:
        return args, dict(kwargs or {})
    absent = others(recipe.args, "args") + others(recipe.kwargs, "model_kwargs")
    if absent:
        listed = ", ".join(f"{where} (a {kind})" for where, kind in absent)
        raise ValueError(
            f"The file cannot hold these arguments of the example call: {listed}. Pass an example "
            "call: guides.load(path, model, *args, model_kwargs={...})."
        )
    device = device_of(model)
    return build(recipe.args, device), build(recipe.kwargs, device)


def _build(
    recipe: Recipe,
    model: Program,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    data_plate: str | None,
    overrides: dict[str, Any],
) -> ProgramGuide:
    import guides

    if recipe.kind == "laplace":
        unknown = [key for key in overrides if key != "name"]
        if unknown:
            raise TypeError(f"A Laplace posterior has no option {unknown[0]!r}, only name.")
        return Laplace(model, args, kwargs, data_plate=data_plate, **overrides)
    composite = recipe.cells[0][0] is not None
    cells: dict[str | None, tuple[str, dict[str, Any]]] = {}
    for key, name, options in recipe.cells:
        given = (
            overrides.pop(str(key), {})
            if composite
            else {k: overrides.pop(k) for k in list(overrides) if k not in ("jacobian", "name")}
        )
        absent = [
            f"{option}= (a {found[0][1]})"
            for option, value in options.items()
            if option not in given and (found := others(value))
        ]
        if absent:
            where = f" in {key}={{...}}" if composite else ""
            raise ValueError(
                f"The file cannot hold these options of guide {name!r}: {', '.join(absent)}. Pass "
                f"them again to guides.load{where}; weights of modules are in the file."
            )
        kept = {k: build(value) for k, value in options.items() if k not in given}
        if "encoder" in given:
            kept.pop("features", None)
        cells[key] = (name, {**kept, **given})
    own = {**{k: build(v) for k, v in recipe.options.items()}, "data_plate": data_plate}
    if composite:
        mapping = {str(key): cell for key, cell in cells.items()}
        return guides.make(mapping, model, *args, model_kwargs=kwargs, **{**own, **overrides})
    name, options = cells[None]
    return guides.make(name, model, *args, model_kwargs=kwargs, **{**own, **options, **overrides})


def _check_latents(guide: ProgramGuide, expected: list[dict[str, Any]], path: Any) -> None:
    found = latents_of(guide)
    if found == expected:
        return

    def words(latents: list[dict[str, Any]]) -> str:
        return ", ".join(
            f"{item['site']} ({item['family']}, {item['size']} coordinates, {item['group']})"
            for item in latents
        )

    raise ValueError(
        f"{path} holds a guide for another program: its latents are {words(expected)}; those of "
        f"this program are {words(found)}. Pass the program that the guide was made for; where "
        "its latents depend on the values of the data, pass an example call as well: "
        "guides.load(path, model, *args)."
    )


def _restore_laplace(
    guide: Laplace, posterior: dict[str, Any], state: Mapping[str, Tensor], index: Tensor | None
) -> None:
    guide.minibatch_estimate = posterior["minibatch_estimate"]
    found = posterior["plate"]
    device = guide._example.groups[0].device
    if found is None:
        guide.plate = None
    else:
        index = None if index is None else index.to(device)
        guide.plate = Plate(
            str(guide.data_plate), found["dim"], found["rows"], found["size"], index
        )
    for name, value in state.items():
        guide.register_buffer(name, torch.empty_like(value, device=device))


def _match_dtypes(guide: ProgramGuide, state: Mapping[str, Tensor]) -> None:
    """A guide that was converted (``guide.double()``) is built again in its first dtype."""
    if not isinstance(guide, Guide):
        return
    for group in guide._example.groups:
        prefixes = (f"families.{group.name}.", f"schemes.{group.name}.")
        dtypes = {
            value.dtype
            for name, value in state.items()
            if name.startswith(prefixes) and value.is_floating_point()
        }
        if len(dtypes) == 1:
            (dtype,) = dtypes
            guide.families[group.name].to(dtype)
            guide.schemes[group.name].to(dtype)


def _fill(module: Any, state: dict[str, Tensor], role: str, path: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"{path} holds parameters of the model, but the model passed is a "
            f"{type(module).__name__} and has none. Pass the nn.Module that was saved."
        )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        hint = (
            "Where a network's shape follows from the values of the data, pass an example call: "
            "guides.load(path, model, *args)."
            if role == "guide"
            else "Build the model with the options that it was saved with."
        )
        raise ValueError(f"The {role} in {path} does not fit this one: {error} {hint}") from None
