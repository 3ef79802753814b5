"""Which classes and functions a model file may name.

Names are short and stable: a class of laminar goes by its bare name wherever it stands, so moving
it does not break old files; renaming it takes a line in `_RENAMED`. A user's own come under
``user:``. Nothing is imported or evaluated by a name read from a file.
"""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, overload

import equinox as eqx
import jax
import jax.numpy as jnp

from laminar import _params
from laminar._errors import InputError

T = TypeVar("T")

# Packages whose modules, dataclasses and named tuples are known from the start, and those above
# this file in the layering, whose modules and dataclasses are looked at when a name is not among
# them. What only lives while training runs is not part of a model.
_PACKAGES = (
    "laminar._params",
    "laminar.spaces",
    "laminar.nn",
    "laminar.bijections",
    "laminar.density",
    "laminar.mixtures",
    "laminar.distributions",
    "laminar.conditional",
    "laminar.directional",
    "laminar.mixed",
    "laminar.flow",
)
_UPPER_PACKAGES = ("laminar.tables", "laminar.inference", "laminar.tasks")

# Old name -> present name, for classes of laminar renamed after a release.
_RENAMED: dict[str, str] = {}

_FUNCTIONS: dict[str, tuple[types.ModuleType, str]] = {
    "jax.nn": (
        jax.nn,
        "celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu "
        "log_sigmoid log_softmax logsumexp mish relu relu6 selu sigmoid silu soft_sign softmax "
        "softplus sparse_plus sparse_sigmoid squareplus standardize swish tanh",
    ),
    "jnp": (
        jnp,
        "abs absolute arccos arccosh arcsin arcsinh arctan arctanh cbrt cos cosh exp exp2 expm1 "
        "log log10 log1p log2 negative positive reciprocal sign sin sinc sinh sqrt square tan tanh",
    ),
    "jax.lax": (
        jax.lax,
        "abs acos acosh asin asinh atan atanh cbrt cos cosh erf erf_inv exp exp2 expm1 log log1p "
        "logistic neg rsqrt sign sin sinh sqrt square stop_gradient tan tanh",
    ),
}


class _Registry:
    """Names of classes and functions, one to one in the direction of saving."""

    def __init__(self):
        self.things: dict[str, Any] = {}
        # By identity, and with the thing itself so that its id is not given to another.
        self.names: dict[int, tuple[str, Any]] = {}

    def add(self, name: str, thing: Any) -> None:
        known = self.things.get(name, thing)
        if known is not thing and not _same_place(known, thing):
            raise InputError(
                f"Two classes or functions are registered under the name {name!r}: "
                f"{place(known)} and {place(thing)}; give one another name."
            )
        self.things[name] = thing
        self.names.setdefault(id(thing), (name, thing))

    def copy(self) -> "_Registry":
        new = _Registry()
        new.things, new.names = dict(self.things), dict(self.names)
        return new


def place(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"


def _same_place(a: Any, b: Any) -> bool:
    """Whether two classes are one, defined twice, as when a notebook cell is run again."""
    return place(a) == place(b)


_user = _Registry()


@overload
def register(thing: str) -> Callable[[T], T]: ...
@overload
def register(thing: T) -> T: ...
def register(thing: Any) -> Any:
    """Let `save` and `load` know a class or function of yours.

    Use it as ``@register``, which takes the bare name, or ``@register("name")``. A class is a
    module, a dataclass or a named tuple. The name must stay the same for old files to load; the
    module where it stands may change.

    Raises:
        InputError: If the name is taken, or the class is of a kind that cannot be saved.

    Example:
        ```python
        @register
        class Shift(AbstractBijection):
            by: Array
        ```
    """
    if isinstance(thing, str):
        return functools.partial(_register, name=thing)
    return _register(thing, name=getattr(thing, "__name__", None))


def _register(thing: Any, name: str | None) -> Any:
    _user.add(*_user_entry(thing, name))
    return thing


def _user_entry(thing: Any, name: str | None = None) -> tuple[str, Any]:
    name = name or getattr(thing, "__name__", None)
    if name is None or "<" in name:
        raise InputError(f"{thing!r} has no name; define it with def or class to register it.")
    if isinstance(thing, type) and not is_record(thing):
        raise InputError(
            f"{place(thing)} is neither an eqx.Module, a dataclass nor a named tuple, so it "
            "cannot be registered."
        )
    own = str(getattr(thing, "__module__", "")).split(".")[0] == "laminar"
    return (name if own else f"user:{name}"), thing


def is_record(cls: type) -> bool:
    """Whether instances are described by named fields."""
    return dataclasses.is_dataclass(cls) or is_named_tuple(cls)


def is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _walk(package: str) -> Iterator[types.ModuleType]:
    """A module and, of a package, the modules in it; nothing where it does not exist."""
    if importlib.util.find_spec(package) is None:
        return
    module = importlib.import_module(package)
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        yield from _walk(f"{package}.{info.name}")


def own_classes(packages: Iterable[str]) -> Iterator[tuple[str, type]]:
    """The concrete public modules, dataclasses and named tuples that packages of laminar define.

    Private classes hold what lives within a call and are not saved.
    """
    for package in packages:
        for module in _walk(package):
            for name, thing in sorted(vars(module).items()):
                if (
                    isinstance(thing, type)
                    and thing.__module__ == module.__name__
                    and thing.__name__ == name
                    and not name.startswith("_")
                    and is_record(thing)
                    and not inspect.isabstract(thing)
                ):
                    yield name, thing


@functools.cache
def _own() -> _Registry:
    """What is known without the user's help: laminar, Equinox layers, common functions."""
    registry = _Registry()
    for name, cls in own_classes(_PACKAGES):
        registry.add(name, cls)
    for name, thing in sorted(vars(eqx.nn).items()):
        if isinstance(thing, type) and issubclass(thing, eqx.Module):
            registry.add(f"eqx.nn.{name}", thing)
    for prefix, (module, names) in _FUNCTIONS.items():
        for name in names.split():
            if hasattr(module, name):
                registry.add(f"{prefix}.{name}", getattr(module, name))
    # Equinox's "no activation" is a lambda without a public name.
    default = inspect.signature(eqx.nn.MLP.__init__).parameters["final_activation"].default
    registry.add("eqx.nn.identity", default)
    for name, thing in sorted(vars(_params).items()):
        if inspect.isfunction(thing) and thing.__module__ == _params.__name__:
            registry.add(f"laminar.{name}", thing)
    return registry


@functools.cache
def _own_and_upper() -> _Registry:
    registry = _own().copy()
    for name, cls in own_classes(_UPPER_PACKAGES):
        if dataclasses.is_dataclass(cls):
            registry.add(name, cls)
    return registry


class Lookup:
    """The registry of one call: laminar's, the user's, and the classes given with the call."""

    def __init__(self, classes: Iterable[Any]):
        self.extra = _user.copy()
        for thing in classes:
            self.extra.add(*_user_entry(thing))

    def name(self, thing: Any) -> str | None:
        """The name of a class or function, or None when it has none."""
        found = self.extra.names.get(id(thing)) or _own().names.get(id(thing))
        if found is None and str(getattr(thing, "__module__", "")).startswith("laminar."):
            found = _own_and_upper().names.get(id(thing))
        return None if found is None else found[0]

    def thing(self, name: str) -> Any:
        """The class or function of a name, or None."""
        name = _RENAMED.get(name, name)
        found = self.extra.things.get(name) or _own().things.get(name)
        if found is None and ":" not in name and "." not in name:
            found = _own_and_upper().things.get(name)
        return found
