"""Attributes, closures and globals that a program reads, as they were when it was captured.

A program is a function, a method, or an object that is called. From there on everything is
followed that its code can name: what its functions close over, globals that they load, attributes
of objects whose names occur in that code, and what wrappers such as ``guides.inference.Given``
hold. Code of torch, of Pyro, of the standard library and of this package is not read.
"""

from __future__ import annotations

import builtins
import dis
import functools
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Distribution

__all__ = ["PLAIN", "PythonState"]

PLAIN = (bool, int, float, str)
_OURS = "guides"
_CLOSED = frozenset({"torch", "pyro", "numpy", "zuko", _OURS}) | sys.stdlib_module_names
_MOST = 2000  # places; what lies further away than these is not looked at
_LONG = 64  # entries of a list or dict that are looked at one by one
_MODULE = frozenset(vars(nn.Module())) | {"_pyro_context"}
_MISSING = object()


class PythonState:
    """Places that hold what a program reads, and what they held.

    Numbers and strings are compared by value, tensors by identity and version, everything else
    by identity. Large dictionaries and lists are told by their length alone.

    Args:
        programs: The programs.
        moving: Tensors that change without another graph: arguments and parameters.
    """

    def __init__(self, programs: Collection[Any], moving: Collection[Tensor]) -> None:
        self._moving = {id(tensor) for tensor in moving}
        self._names: set[str] = set()
        before = -1
        while len(self._names) > before:
            # What is called on an object, its code may name more attributes of others.
            before = len(self._names)
            self._gets: list[tuple[Callable[..., Any], Any]] = []
            self._sized: list[Any] = []
            self._tensors: list[Tensor] = []
            self._places: set[tuple[int, Any]] = set()
            self._walk(programs)
        self._kept = self._values()
        self._counts = self._numbers()

    def settle(self) -> None:
        """Leave out what has changed by now, after the program has run: it writes that itself."""
        now = self._values()
        stays = [_same(a, b) for a, b in zip(now, self._kept, strict=True)]
        self._gets = [get for get, same in zip(self._gets, stays, strict=True) if same]
        sizes = [len(value) for value in self._sized]
        known = self._counts[: len(sizes)]
        self._sized = [v for v, n, k in zip(self._sized, sizes, known, strict=True) if n == k]
        versions = self._counts[len(sizes) :]
        self._tensors = [
            t for t, k in zip(self._tensors, versions, strict=True) if t._version == k
        ]
        self._kept, self._counts = self._values(), self._numbers()

    def is_current(self) -> bool:
        """Whether everything is what it was."""
        now = self._values()
        if not all(map(operator.is_, now, self._kept)):
            if not all(map(_same, now, self._kept)):
                return False
            self._kept = now
        return self._numbers() == self._counts

    def _values(self) -> list[Any]:
        return [get(key, _MISSING) for get, key in self._gets]

    def _numbers(self) -> list[int]:
        return [*map(len, self._sized), *[tensor._version for tensor in self._tensors]]

    def _walk(self, programs: Collection[Any]) -> None:
        seen: dict[int, Any] = {}
        queue = [(program, True) for program in programs]
        for value, is_root in queue:  # it grows: what is near comes first
            if id(value) in seen or value is None or isinstance(value, (*PLAIN, bytes)):
                continue
            if len(self._gets) >= _MOST:
                return
            seen[id(value)] = value
            queue += [(found, False) for found in self._inside(value, is_root)]

    def _inside(self, value: Any, is_root: bool) -> Iterator[Any]:
        """Note the places of a value; what is found there."""
        if isinstance(value, Tensor):
            fixed = not value.requires_grad and not value.is_inference()
            if fixed and id(value) not in self._moving:
                self._tensors.append(value)
        elif isinstance(value, FunctionType):
            yield from self._function(value)
        elif isinstance(value, MethodType):
            yield from (value.__self__, value.__func__)
        elif isinstance(value, functools.partial):
            yield from (value.func, *value.args, *value.keywords.values())
            yield from self._keys(vars(value), list(vars(value)))
        elif isinstance(value, dict):
            self._sized.append(value)
            if len(value) <= _LONG:
                yield from self._keys(value, list(value))
        elif isinstance(value, list):
            self._sized.append(value)
            if len(value) <= _LONG:
                for place in range(len(value)):
                    yield self._place(functools.partial(_item, value), place)
        elif isinstance(value, tuple):
            yield from value[:_LONG]
        elif isinstance(value, type):
            yield from self._class_attributes(value)
        elif isinstance(value, nn.Module) and _root(type(value)) in _CLOSED:
            yield getattr(value, "model", None)
        elif is_root or _is_open(value):
            yield from self._object(value)

    def _function(self, function: FunctionType) -> Iterator[Any]:
        yield from self._keys(vars(function), list(vars(function)))
        if _root(function) in _CLOSED:
            return
        for cell in function.__closure__ or ():
            yield self._place(functools.partial(_content, cell), None)
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(function, name) is not None:
                yield self._place(functools.partial(getattr, function), name)
        names, loaded = _read(function.__code__)
        self._names |= names
        for name, attribute in loaded:
            found = function.__globals__.get(name, _MISSING)
            if found is _MISSING and hasattr(builtins, name):
                continue
            if not isinstance(found, ModuleType):
                yield from self._keys(function.__globals__, [name])
            elif isinstance(vars(found).get(attribute or ""), (*PLAIN, Tensor)):
                yield from self._keys(vars(found), [attribute])

    def _object(self, value: Any) -> Iterator[Any]:
        own: dict[str, Any] = getattr(value, "__dict__", {})
        ours = _root(type(value)) in _CLOSED
        # Pyro keeps the priors of a module's parameters apart.
        keys = [k for k in own if ours or k in self._names or k == "_pyro_samples"]
        if isinstance(value, nn.Module):
            keys = [key for key in keys if key not in _MODULE]
        yield from self._keys(own, keys)
        if isinstance(value, nn.Module):
            yield from value._modules.values()
        if ours:
            return
        for owner in type(value).__mro__:
            if _root(owner) in _CLOSED:
                continue
            for name, found in vars(owner).items():
                function = getattr(found, "fget", getattr(found, "__func__", found))
                special = name.startswith("__") and name not in ("__init__", "__new__")
                special = special or name == "forward"
                if isinstance(function, FunctionType) and (special or name in self._names):
                    yield function
                    if not special:
                        yield from self._keys(own, [name])  # one of its own would come first
                elif name in getattr(owner, "__slots__", ()) and name in self._names:
                    yield self._place(functools.partial(getattr, value), name)
                elif name in self._names and isinstance(found, (*PLAIN, Tensor)):
                    # A value of its own may come before that of the class later on.
                    yield from self._keys(own, [name])
                    yield from self._keys(vars(owner), [name])

    def _class_attributes(self, owner: type) -> Iterator[Any]:
        if _root(owner) not in _CLOSED:
            plain = [k for k, v in vars(owner).items() if isinstance(v, (*PLAIN, Tensor))]
            yield from self._keys(vars(owner), [k for k in plain if k in self._names])

    def _keys(self, own: Any, keys: list[Any]) -> Iterator[Any]:
        for key in keys:
            if (id(own), key) not in self._places:
                self._places.add((id(own), key))
                yield self._place(own.get, key)

    def _place(self, get: Callable[..., Any], key: Any) -> Any:
        self._gets.append((get, key))
        found = get(key, _MISSING)
        return None if found is _MISSING else found


def _same(now: Any, before: Any) -> bool:
    """Whether two values are one to a graph."""
    if now is before:
        return True
    if type(now) is not type(before) or not isinstance(now, PLAIN):
        # A method is another object at each look.
        return isinstance(now, MethodType) and bool(now == before)
    return bool(now == before)


def _item(values: list[Any], place: int, missing: Any) -> Any:
    return values[place] if place < len(values) else missing


def _content(cell: CellType, key: None, missing: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return missing


def _root(value: Any) -> str:
    """The package that a class or a function is from."""
    return str(getattr(value, "__module__", None) or "").partition(".")[0]


def _is_open(value: Any) -> bool:
    """Whether the attributes of an object are looked at."""
    root = _root(type(value))
    if root == _OURS:
        return callable(value)  # a program around another one, not a loop
    return root not in _CLOSED or isinstance(value, (Messenger, Distribution))


@functools.lru_cache(maxsize=1024)
def _read(code: CodeType) -> tuple[frozenset[str], tuple[tuple[str, str | None], ...]]:
    """Names of attributes in a function's code, and globals with the attribute that follows."""
    names = set(code.co_names)
    loaded: list[tuple[str, str | None]] = []
    instructions = list(dis.get_instructions(code))
    for place, instruction in enumerate(instructions):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            after = instructions[place + 1] if place + 1 < len(instructions) else None
            is_attribute = after is not None and after.opname in ("LOAD_ATTR", "LOAD_METHOD")
            attribute = after.argval if after is not None and is_attribute else None
            loaded.append((instruction.argval, attribute))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _read(constant)
            names |= inner[0]
            loaded += inner[1]
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)  # for getattr
    return frozenset(names), tuple(loaded)
