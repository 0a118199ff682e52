"""Save a guide to one file.

    guides.save(guide, "posterior.safetensors")
    guide = guides.load("posterior.safetensors", model)          see guides.loading

The file is a safetensors file: tensors, and a JSON description of what to build for them. Nothing
in it is executed. It holds the guide's parameters and buffers, and of the data the shapes only.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from torch import Tensor, nn

from guides import GUIDES
from guides.guide import Guide, ProgramGuide
from guides.inference.laplace_guide import Laplace
from guides.layout import Layout, layout
from guides.probe import Program
from guides.recipe import Recipe, build, describe, others
from guides.rows import take_rows
from guides.schemes import SCHEMES
from guides.schemes.encoder import Encoder
from guides.schemes.scheme import Scheme

__all__ = ["FORMAT", "KEY", "device_of", "digest", "latents_of", "quiet", "save"]

FORMAT = 1
KEY = "pyro_zoo_guide"
_PACKAGES = ("pyro-zoo", "torch", "pyro-ppl", "zuko")


def save(
    guide: ProgramGuide, path: str | os.PathLike[str], *, model: nn.Module | None = None
) -> None:
    """Write a guide to one file.

    The file appears whole or not at all. The model is not saved unless asked for, and of a model
    only its state: :func:`load` needs the program itself.

    Args:
        guide: A guide from :func:`guides.make` or a Laplace posterior.
        path: The file; ``.safetensors`` is its usual suffix.
        model: The program, where its parameters are to be saved as well.

    Raises:
        ValueError: For a guide that no recipe tells how to build, or a state that holds something
            else than tensors.
        TypeError: For a ``model`` without parameters of its own (no ``nn.Module``), or a guide and
            a path in each other's place.
        FileNotFoundError: Where the folder does not exist.

    Example:
        >>> import guides, tempfile, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = guides.make("amortized_normal", model, torch.randn(10))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(guide, f"{folder}/guide.safetensors")
        ...     loaded = guides.load(f"{folder}/guide.safetensors", model)
        >>> x = torch.ones(1)
        >>> torch.equal(loaded.parameters_of(x)["data"], guide.parameters_of(x)["data"])
        True
    """
    from safetensors.torch import save as to_bytes

    if isinstance(guide, (str, os.PathLike)) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(
            "The order is guides.save(guide, path), the path a string or a pathlib.Path; got "
            f"{type(guide).__name__} and {type(path).__name__}."
        )
    recipe = getattr(guide, "recipe", None)
    if not isinstance(recipe, Recipe) or not isinstance(guide, ProgramGuide):
        raise ValueError(
            f"This {type(guide).__name__} does not know how it was built, so it cannot be built "
            "again from a file. Save guides from guides.make, or save guide.state_dict() and "
            "build the guide by the same code."
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"model= must be an nn.Module, whose state can be saved; got {type(model).__name__}. "
            "Parameters of pyro.param are saved by pyro.get_param_store().save(path)."
        )
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{str(path)!r} is a folder. Name a file in it: guides.save(guide, "
            f"{str(path / 'guide.safetensors')!r})."
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"The folder {str(path.parent)!r} does not exist, so no file can be written there. "
            "Make it first: pathlib.Path(path).parent.mkdir(parents=True)."
        )
    tensors = _tensors("guide", guide)
    tensors |= {} if model is None else _tensors("model", model)
    if isinstance(guide, Laplace) and guide.plate is not None and guide.plate.index is not None:
        tensors["plate.index"] = guide.plate.index.detach().clone()
    description = {
        "format": FORMAT,
        "versions": {name: _version(name) for name in _PACKAGES},
        "recipe": asdict(_portable(guide, recipe)),
        "data_plate": guide.data_plate,
        "latents": latents_of(guide),
        "frozen": [name for name, p in guide.named_parameters() if not p.requires_grad],
        "posterior": _posterior(guide),
        "settings": _settings(guide),
        "evaluating": [name for name, part in guide.named_modules() if not part.training],
        "has_model": model is not None,
        "digest": digest(tensors),
    }
    content = to_bytes(tensors, {KEY: json.dumps(description)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _tensors(prefix: str, module: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The state of {prefix} holds {name!r}, a {type(value).__name__}; the file holds "
                "tensors only. Keep it in a buffer."
            )
        # Clones, because tied weights share memory, which the format refuses.
        tensors[f"{prefix}.{name}"] = value.detach().clone().contiguous()
    return tensors


def latents_of(guide: ProgramGuide) -> list[dict[str, Any]]:
    """What identifies the program of a guide: its latents in the order of packing."""
    return [
        {"site": site.name, "group": group.name, "family": site.family, "size": site.size}
        for group in guide._example.groups
        for site in group.sites
    ]


def _settings(guide: ProgramGuide) -> dict[str, dict[str, Any]]:
    """What may be changed in a guide after it was built, by group."""
    if not isinstance(guide, Guide):
        return {}
    schemes = {group.name: guide.schemes[group.name] for group in guide._example.groups}
    found = {name: cast(Scheme, scheme).settings for name, scheme in schemes.items()}
    return {name: settings for name, settings in found.items() if settings}


def _posterior(guide: ProgramGuide) -> dict[str, Any] | None:
    if not isinstance(guide, Laplace):
        return None
    plate = guide.plate
    found = (
        None if plate is None else {"dim": plate.dim, "rows": plate.num_rows, "size": plate.size}
    )
    return {"minibatch_estimate": guide.minibatch_estimate, "plate": found}


def _portable(guide: ProgramGuide, recipe: Recipe) -> Recipe:
    """The recipe with what was decided from the data, and with a single row where one will do."""
    modules = guide.modules() if isinstance(guide, Guide) else ()
    encoders = [module for module in modules if isinstance(module, Encoder)]
    kinds = {source.name: source.kind for encoder in encoders for source in encoder.sources}
    # Cells may read different inputs, and what is read how is then theirs to say.
    alike = all({s.name for s in encoder.sources} == set(kinds) for encoder in encoders)
    if encoders and alike:
        cells = [
            (key, name, {**options, "features": describe(kinds)})
            if GUIDES[name][0] != SCHEMES["local"] and "encoder" not in options
            else (key, name, options)
            for key, name, options in recipe.cells
        ]
        recipe = replace(recipe, cells=tuple(cells))
    local = isinstance(guide, Laplace) or (isinstance(guide, Guide) and not guide.amortized)
    if local or guide._example.data_plate is None or others(recipe.args) or others(recipe.kwargs):
        return recipe
    try:
        with quiet():
            device = device_of(guide.model)
            args, kwargs = build(recipe.args, device), build(recipe.kwargs, device)
            full = _layout(guide, args, kwargs)
            first = torch.zeros(1, dtype=torch.int64)
            call_args, call_kwargs = take_rows(guide.model, args, kwargs, first, full)
            # Rows' numbers that the call did not have, an inputs= callable may not take.
            call_kwargs = {key: call_kwargs[key] for key in kwargs}
            single = _layout(guide, call_args, call_kwargs)
    except Exception:  # a program may need its rows, for any reason; then they all stay
        return recipe
    if [(s.name, s.size) for s in single.sites.values()] != [
        (s.name, s.size) for s in full.sites.values()
    ]:
        return recipe
    return replace(recipe, args=describe(call_args), kwargs=describe(call_kwargs))


def _layout(guide: ProgramGuide, args: Any, kwargs: Any) -> Layout:
    return layout(guide.model, args, kwargs, data_plate=guide.data_plate, latents=guide.latents)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and contents."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No checks of values, which are zeros here, and no draws from the global generator."""
    with pyro.validation_enabled(False), torch.random.fork_rng([]):
        yield


def device_of(model: Program) -> torch.device | None:
    """Device of a module, None for other programs."""
    if not isinstance(model, nn.Module):
        return None
    tensors = [*model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else None
