"""Any fitted guide into ArviZ: draws, predictions and pointwise log densities with named axes.

    posterior              z_s ~ q(z | x)                     deterministic sites too
    posterior_predictive   x_s ~ p(x | z_s)
    log_likelihood         log p(x[n] | z_s)                  at the plates of each observed site
    log_prior              log p(z_s)                         at the plates of each latent site
    sample_stats           lp = log p(x, z_s), log_q = log q(z_s | x)
    prior, prior_predictive                z_s ~ p(z), x_s ~ p(x | z_s)
    observed_data, constant_data           the arguments of the call

References:
    | ArviZ schema: https://python.arviz.org/en/latest/schema/schema.html
    | Bayesian leave-one-out cross-validation for large data (Magnusson et al., 2019)
    | https://arxiv.org/abs/1904.10679
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from guides.arguments import check_number, did_you_mean
from guides.diagnostics.arviz_arrays import (
    FIXED_GROUPS,
    SAMPLE_DIMS,
    SAMPLED_GROUPS,
    Labeled,
    from_arrays,
)
from guides.diagnostics.constant_data import constant_data
from guides.diagnostics.export_calls import split_calls
from guides.diagnostics.export_draws import Assembly, assemble
from guides.guide import ProgramGuide
from guides.layout import Layout, layout
from guides.pairs import check_follows, check_order
from guides.probe import Program

__all__ = ["to_arrays", "to_arviz"]

_WARNING = (
    "Independent draws from a guide, in one chain: R-hat and effective sample size describe the "
    "random number generator and say nothing about the error of the approximation. Judge it by "
    "guides.diagnostics.pareto_khat, or by PSIS with lp and log_q of sample_stats "
    "(arviz.loo_approximate_posterior)."
)


def to_arviz(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    batch_size: int | None = None,
    groups: Collection[str] | None = None,
    data_plate: str | None = "auto",
    data_args: Mapping[str, int] | None = None,
) -> Any:
    """Export a model with a fitted guide to ArviZ.

    Dimensions are ``chain`` (1), ``draw`` (``num_samples``), one a plate under the plate's name,
    and one an event axis, named by ``infer={"event_dims": ["feature"]}`` at the site or
    numbered. A dimension that shares its name with a variable gets the suffix ``_dim``; a ``/``
    in a name becomes a dot.

    With ``batch_size``, or where the program draws minibatches itself, latents outside the data
    plate are drawn once and replayed in every minibatch, and rows come out complete and in
    order. Log densities are those of all rows, without N/B; the program's own ``poutine.scale``
    and ``poutine.mask`` act. ``lp`` equals the sum of ``log_likelihood``, ``log_prior`` and the
    program's factors, which ``sample_stats`` holds as ``factor.<name>``.

    ``log_likelihood`` is *conditional* where a row has latents of its own: its attribute
    ``conditional_on`` names them, and LOO from it is about a row whose own latents are known.

    Args:
        model: The program, called with its data.
        guide: Any guide for it with a density: of this package, of Pyro, or written by hand.
        *args: Positional arguments of the call.
        model_kwargs: Keyword arguments of the call.
        num_samples: Number of draws.
        batch_size: Rows simulated at a time; None for all at once.
        groups: The groups wanted, to save time and memory; None for all.
        data_plate: See :func:`guides.layout.layout`; a guide of this package brings its own.
        data_args: Arguments that hold rows, and the axis of the rows; see :mod:`guides.rows`.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x.

    Raises:
        ValueError: For a guide without a density or without one of the latents, a program whose
            rows cannot be told, an unknown group, or names that clash.

    Example:
        >>> import pyro, torch, pyro.distributions as dist, guides
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
        >>> x = torch.randn(5)
        >>> guide = guides.make("normal", model, x)
        >>> data = to_arviz(model, guide, x, num_samples=100)
        >>> data["log_likelihood"]["x"].dims
        ('chain', 'draw', 'data')
    """
    arrays, coords, attrs = to_arrays(
        model,
        guide,
        *args,
        model_kwargs=model_kwargs,
        num_samples=num_samples,
        batch_size=batch_size,
        groups=groups,
        data_plate=data_plate,
        data_args=data_args,
    )
    return from_arrays(arrays, coords=coords, attrs=attrs)


def to_arrays(
    model: Program,
    guide: Callable[..., Any],
    *args: Any,
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
    batch_size: int | None = None,
    groups: Collection[str] | None = None,
    data_plate: str | None = "auto",
    data_args: Mapping[str, int] | None = None,
) -> tuple[dict[str, dict[str, Labeled]], dict[str, NDArray[Any]], dict[str, dict[str, Any]]]:
    """What :func:`to_arviz` exports, as NumPy arrays; needs no ArviZ. See there for arguments.

    Returns:
        Groups, coordinates and attributes: the arguments of
        :func:`guides.diagnostics.arviz_arrays.from_arrays`.
    """
    kwargs = {} if model_kwargs is None else dict(model_kwargs)
    known = (*SAMPLED_GROUPS, *FIXED_GROUPS)
    wanted = known if groups is None else tuple(groups)
    check_order("to_arviz(model, guide, *args)", model, guide)
    check_number("num_samples", num_samples, integer=True, least=1)
    for group in wanted:
        if group not in known:
            raise ValueError(
                f"Unknown group {group!r}. {did_you_mean(group, known)}Groups: {', '.join(known)}."
            )
    if isinstance(guide, ProgramGuide):
        check_follows(guide, model, args, kwargs)
        data_plate = guide.data_plate
    read = layout(model, args, kwargs, data_plate=data_plate)
    calls = split_calls(model, args, kwargs, read, batch_size, data_args)
    assembly = assemble(model, guide, calls, num_samples, wanted)
    constant = constant_data(model, args, kwargs, read, data_args, assembly)
    for name, array in constant:
        assembly.add("constant_data", name, *array)
    arrays, rename = _label(assembly, wanted)
    coords = {}
    if read.data_plate is not None and read.data_plate.index is not None:
        dim = rename(read.data_plate.name)
        used = any(dim in array.dims for group in arrays.values() for array in group.values())
        if used and not read.data_plate.random:
            coords[dim] = read.data_plate.index.cpu().numpy()
    return arrays, coords, _attrs(model, guide, num_samples, read, arrays)


def _label(
    assembly: Assembly, wanted: Collection[str]
) -> tuple[dict[str, dict[str, Labeled]], Callable[[str], str]]:
    """Drop padding, convert to NumPy, and settle names that clash."""
    entries = {group: assembly.groups[group] for group in wanted if group in assembly.groups}
    variables = {name for group in entries.values() for name in group}

    def rename(dim: str) -> str:
        plain = dim.replace("/", ".")
        return f"{plain}_dim" if plain in {name.replace("/", ".") for name in variables} else plain

    arrays: dict[str, dict[str, Labeled]] = {}
    for group, sites in entries.items():
        arrays[group] = {}
        sampled = group in SAMPLED_GROUPS
        for name, (tensor, axes) in sites.items():
            values = tensor.detach().cpu().resolve_conj().numpy()
            padding = tuple(i + 1 if sampled else i for i in axes.padding)
            values = values.squeeze(padding) if padding else values
            dims = tuple(rename(axis) for axis in axes.names if axis is not None)
            if sampled:
                values, dims = values[None], (*SAMPLE_DIMS, *dims)
            plain = name.replace("/", ".")
            if plain in arrays[group]:
                raise ValueError(
                    f"Sites {name!r} and {plain!r} would both be exported as {plain!r}, because "
                    "'/' separates groups. Rename one of them."
                )
            arrays[group][plain] = Labeled(values, dims)
    return {group: sites for group, sites in arrays.items() if sites}, rename


def _attrs(
    model: Program,
    guide: Callable[..., Any],
    num_samples: int,
    read: Layout,
    arrays: Mapping[str, Mapping[str, Labeled]],
) -> dict[str, dict[str, Any]]:
    attrs: dict[str, dict[str, Any]] = {
        "/": {
            "inference_library": "pyro-ppl",
            "inference_library_version": importlib.metadata.version("pyro-ppl"),
            "creation_library": "pyro-zoo",
            "creation_library_version": _own_version(),
            "creation_library_language": "Python",
            "model": _name(model),
            "guide": _name(guide),
            "num_samples": num_samples,
        }
    }
    for group in arrays:
        attrs[group] = {}
    if "posterior" in arrays:
        attrs["posterior"]["warning"] = _WARNING
    local = _local_latents(read)
    if "log_likelihood" in arrays:
        attrs["log_likelihood"]["conditional_on"] = ", ".join(local) or "global latents only"
        if local:
            attrs["log_likelihood"]["note"] = (
                f"Conditional on latents that each row has to itself: {', '.join(local)}. "
                "LOO from it is about a row whose latents are known, not about a new row."
            )
    return attrs


def _local_latents(read: Layout) -> list[str]:
    """Latents that a row, or an entry of an observed site, has to itself."""
    entries = [{plate.name for plate in site.plates} for site in read.observed.values()]
    local = []
    for site in read.sites.values():
        plates = {plate.name for plate in site.plates}
        if site.row_dim is not None or any(entry and entry <= plates for entry in entries):
            local.append(site.name)
    return local


def _name(program: Any) -> str:
    name = getattr(program, "__name__", None)
    if isinstance(name, str):
        return name
    if isinstance(program, ProgramGuide):
        return " ".join(repr(program).split())
    return type(program).__name__


def _own_version() -> str:
    try:
        return importlib.metadata.version("pyro-zoo")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
