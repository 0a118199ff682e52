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

# Differences that an error lists.
_SHOWN = 3


def load(
    path: str | os.PathLike[str],
    model: Program,
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> ProgramGuide:
    """Build the guide of a file for a program, without its data.

    The guide gets a name of its own in Pyro's parameter store unless ``name=`` gives one. It is in
    the mode, training or evaluation, that it was saved in, with the settings that it had then.

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
        TypeError: For a path and a model in each other's place, or an option of another type.
        ValueError: For a damaged file, one of a newer format, an option that must be passed
            again, or a program that is not the one that the guide was made for.
    """
    if not isinstance(path, (str, os.PathLike)) or not callable(model):
        raise TypeError(
            "The order is guides.load(path, model, *args): a string or a pathlib.Path, then the "
            f"program; got {type(path).__name__} and {type(model).__name__}."
        )
    description, tensors = _read(Path(path))
    recipe = _recipe(description["recipe"])
    own = {key.partition(".")[2]: v for key, v in tensors.items() if key.startswith("guide.")}
    if description["has_model"]:
        weights = {k.partition(".")[2]: v for k, v in tensors.items() if k.startswith("model.")}
        _fill(model, weights, "model", path)
    call = _call(recipe, model, args, model_kwargs)
    with quiet():
        try:
            guide = _build(recipe, model, *call, description["data_plate"], dict(overrides))
        except Exception as error:
            given = "the example call" if args or model_kwargs else "an example call of zeros"
            error.add_note(
                f"While building the guide of {path} from {given}, {_shapes(call)}. The program "
                "must be the one that the guide was made for; where it depends on the values of "
                "its data, pass an example call: guides.load(path, model, *args)."
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
    _restore_settings(guide, description, overrides)
    return guide


def _shapes(call: tuple[tuple[Any, ...], Mapping[str, Any]]) -> str:
    """What a call looks like, in words."""
    args, kwargs = call
    parts = [_shape(value) for value in args] + [f"{k}={_shape(v)}" for k, v in kwargs.items()]
    return f"({', '.join(parts)})"


def _shape(value: Any) -> str:
    return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _restore_settings(
    guide: ProgramGuide, description: Mapping[str, Any], overrides: Mapping[str, Any]
) -> None:
    """Settings that were changed after construction, and the mode; overrides stay."""
    for group, settings in description.get("settings", {}).items():
        key = guide.cell_of(group)
        given = overrides if key is None else overrides.get(key, {})
        passed = {option.removeprefix("scheme_") for option in given}
        for name, value in settings.items():
            if name not in passed:
                setattr(guide.schemes[group], name, value)
    if "evaluating" in description:
        evaluating = set(description["evaluating"])
        for name, part in guide.named_modules():
            part.training = name not in evaluating


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        kind = " It is a folder: name the file in it." if path.is_dir() else ""
        raise FileNotFoundError(f"There is no file {str(path)!r}.{kind}")
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

    here = {item["site"]: item for item in found}
    changed = [
        f"latent site {item['site']!r} has {item['size']} coordinates of group {item['group']!r} "
        f"in the file and {other['size']} of group {other['group']!r} here"
        for item in expected
        if (other := here.get(item["site"])) is not None and other != item
    ]

    def words(latents: list[dict[str, Any]]) -> str:
        return ", ".join(
            f"{item['site']} ({item['family']}, {item['size']} coordinates, {item['group']})"
            for item in latents
        )

    raise ValueError(
        f"{path} holds a guide for another program: "
        + (f"{'; '.join(changed)}. Its" if changed else "its")
        + f" latents are {words(expected)}; those of this program are {words(found)}. Pass the "
        "program that the guide was made for; where "
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
    wrong = _misfits(module, state)
    if wrong:
        # Before anything is copied: a module that is half filled would look like a loaded one.
        hint = (
            "Pass the program that the guide was made for, on data of the same shape; where a "
            "network's shape follows from the values of the data, pass an example call: "
            "guides.load(path, model, *args)."
            if role == "guide"
            else "Build the model with the options that it was saved with."
        )
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"The {role} in {path} does not fit this one: {'; '.join(wrong[:_SHOWN])}{more}. "
            f"{hint}"
        )
    module.load_state_dict(state)


def _misfits(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What differs between a module and a state, each with its name and both shapes."""
    own = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = []
    for name in dict.fromkeys((*state, *own)):
        words = _place(module, name)
        if name not in own:
            found.append(f"{words} of shape {tuple(state[name].shape)} is in the file only")
        elif name not in state:
            found.append(f"{words} of shape {own[name]} is not in the file")
        elif own[name] != tuple(state[name].shape):
            shape = tuple(state[name].shape)
            found.append(f"{words} has shape {shape} in the file and {own[name]} here")
    return found


def _place(module: nn.Module, name: str) -> str:
    """A parameter by the group of latents that it serves."""
    part, _, rest = name.partition(".")
    key, _, rest = rest.partition(".")
    if isinstance(module, Guide) and part in ("schemes", "families"):
        sites = next(group.sites for group in module._example.groups if group.name == key)
        listed = ", ".join(repr(site.name) for site in sites)
        return f"{rest!r} of the {part} of group {key!r} (latents {listed})".replace(
            "schemes", "scheme"
        ).replace("families", "family")
    return repr(name)
