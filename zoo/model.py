"""Model: what the zoo's programs share, so that each of them is only its generative process.

Three things, none of which is about probability: a name of its own in Pyro's parameter store, the
registration of trainable parameters only, and a plate over the data that checks its rows
(:mod:`zoo.rows`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import pyro
from pyro.nn import PyroModule
from pyro.params import param_with_module_name
from torch import Tensor, nn

__all__ = ["Model", "latent_names"]

_COUNTER = itertools.count()


class Model(PyroModule):
    """A Pyro program with parameters: the base of the zoo's models, and of nothing else.

    Subclasses write ``forward(x=None, *, size=None, index=None)``: None simulates ``size`` rows,
    data condition. A minibatch passes its rows' numbers as ``index`` and the size N of the whole
    data set as ``size``, so that the data plate scales it by N/B.

    Each instance, copies and unpickled ones too, has a name of its own in Pyro's parameter store:
    equal attribute paths under equal names would be *one* parameter. Frozen parameters stay
    frozen and silent: Pyro would warn about those of a submodule, and switch ``requires_grad``
    of a module's direct parameters on again. A submodule may be replaced between calls.

    Attributes:
        default_guide: The usual partner, a key of ``guides.GUIDES``; None where there are no
            latents.
        data_args: Arguments of ``forward`` that hold rows, and the axis of the rows.

    Sites:
        Those of the subclass.

    Example:
        >>> import zoo
        >>> model = zoo.make("vae", x_dim=4, z_dim=2)
        >>> isinstance(model, Model), model.default_guide, model.data_args
        (True, 'amortized_normal', {'x': 0})
    """

    default_guide: ClassVar[str | None] = "amortized_normal"
    data_args: ClassVar[Mapping[str, int]] = {"x": 0}

    def __init__(self) -> None:
        super().__init__(_unique(type(self)))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        # Runs in deepcopy and unpickling: a copy under the old name would share its parameters
        # with the original, and a copied context could be one that is active.
        super().__setstate__(dict(state))
        name, context = _unique(type(self)), type(self._pyro_context)()
        for path, module in self.named_modules():
            if isinstance(module, PyroModule):
                module.__dict__["_pyro_name"] = f"{name}.{path}" if path else name
                module.__dict__["_pyro_context"] = context

    def __getattr__(self, name: str) -> Any:
        context = self.__dict__.get("_pyro_context")
        if context is None or not context.active or pyro.settings.get("module_local_params"):
            return super().__getattr__(name)
        parameter = self.__dict__["_parameters"].get(name)
        if parameter is not None and not _trainable(parameter):
            return parameter
        child = self.__dict__["_modules"].get(name)
        if child is None or isinstance(child, PyroModule):
            return super().__getattr__(name)
        prefix, store = self._pyro_get_fullname(name), pyro.get_param_store()
        for path, value in child.named_parameters():
            if not _trainable(value):
                continue
            full = param_with_module_name(prefix, path)
            # A layer that replaced another would otherwise leave the old one to the optimizer.
            if full in store and store[full].unconstrained() is not value:  # type: ignore[attr-defined]
                del store[full]
            pyro.param(full, value)
        return child


def latent_names(num_levels: int) -> tuple[str, ...]:
    """Names of a model's latent sites, from the top level down to the one nearest the data.

    Example:
        >>> latent_names(1), latent_names(3)
        (('z',), ('z3', 'z2', 'z1'))
    """
    if num_levels == 1:
        return ("z",)
    return tuple(f"z{level}" for level in range(num_levels, 0, -1))


def _trainable(value: Tensor) -> bool:
    # Under torch.func.functional_call the values are tensors, and no parameters of Pyro's.
    return isinstance(value, nn.Parameter) and value.requires_grad


def _unique(model_class: type) -> str:
    return f"zoo_{model_class.__name__.lower()}_{next(_COUNTER)}"
