"""Models in one file: a description of the module tree, its arrays, versions and a checksum.

The file is a safetensors container (see `laminar._files`) whose metadata hold the tree as JSON:

    null, true, 3, 0.5, "text"                          themselves
    {"float": "inf"}                                    floats that JSON lacks
    {"array": NAME, "as": "jax" | "numpy" | "scalar"}   an array of the container
    {"key": NAME, "impl": IMPLEMENTATION}               a typed random key
    {"tuple": […]}, {"list": […]}, {"dict": [[k, v]…]}  containers
    {"class": NAME, "fields": {…}}                      a module, dataclass or named tuple
    {"partial": {"func": …, "args": …, "keywords": …}}  a jax.tree_util.Partial
    {"function": NAME}, {"dtype": NAME}                 things looked up by name

A NAME is looked up in a registry and never imported or evaluated; objects are made without calling
their constructors. So a file cannot run code, and a class may move to another module without
breaking old files: its name alone counts.
"""

import dataclasses
import datetime
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

from laminar._errors import InputError, ModelFileError
from laminar._files import (
    DTYPES,
    PathLike,
    atomic_write,
    check_writable,
    pack,
    peek,
    unpack,
    unpack_bytes,
)
from laminar._registry import Lookup, is_named_tuple, is_record, place, register
from laminar._typing import PyTree
from laminar._version import __version__

__all__ = [
    "FORMAT_VERSION",
    "Header",
    "from_bytes",
    "load",
    "read_header",
    "register",
    "save",
    "to_bytes",
]

FORMAT_VERSION = 1
_KIND = "model"
_KEY_WIDTHS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
_MAX_DEPTH = 100  # of the tree; far beyond any model, far below what recursion bears

T = TypeVar("T")

# --- The public doors -----------------------------------------------------------------------------


class Header(NamedTuple):
    """What a model file says of itself, without its arrays.

    Attributes:
        format_version: Version of the file format.
        laminar: Version of laminar that wrote it.
        jax: Version of JAX that wrote it.
        equinox: Version of Equinox that wrote it.
        created: When, in ISO 8601 and UTC.
        meta: What the writer added.
        tree: The description of the module tree (see the module's first lines).
        arrays: Type name and shape of every array.
    """

    format_version: int
    laminar: str
    jax: str
    equinox: str
    created: str
    meta: dict[str, Any]
    tree: Any
    arrays: dict[str, tuple[str, tuple[int, ...]]]

    @property
    def size(self) -> int:
        """How many numbers the arrays hold together."""
        return sum(math.prod(shape) for _, shape in self.arrays.values())


def save(
    path: PathLike,
    tree: PyTree,
    meta: Mapping[str, Any] | None = None,
    *,
    classes: Iterable[Any] = (),
) -> None:
    """Write a model, or any tree of modules, to one file.

    It may hold modules, dataclasses and named tuples of laminar, layers of `equinox.nn`,
    activations of `jax.nn`, `jax.numpy` and `jax.lax`, registered classes and functions, JAX and
    NumPy arrays of every numeric type, NumPy scalars, random keys, tuples, lists, dicts, None,
    booleans, integers, floats, strings and element types. The file takes its name only when it is
    complete; what stood there before is lost only then.

    Args:
        path: The file.
        tree: What to save.
        meta: Anything JSON can express, kept beside the model and read back by `read_header`.
        classes: Your own classes or functions, in place of `register`.

    Raises:
        InputError: If something in the tree cannot be saved (the message names where it stands,
            as in ``flow.bijection.parts[0].net.activation``), or the file cannot be written.
    """
    check_writable(path)
    atomic_write(path, to_bytes(tree, meta, classes=classes))


def to_bytes(
    tree: PyTree, meta: Mapping[str, Any] | None = None, *, classes: Iterable[Any] = ()
) -> bytes:
    """What `save` writes, for those who keep it elsewhere than in a file; arguments as there."""
    meta = {} if meta is None else dict(meta)
    try:
        json.dumps(meta, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"meta must be what JSON can express: {error}.") from error
    writer = _Writer(Lookup(classes))
    root = type(tree).__name__.lower() if isinstance(tree, eqx.Module) else "tree"
    body = {
        "format_version": FORMAT_VERSION,
        "laminar": __version__,
        "jax": jax.__version__,
        "equinox": eqx.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "meta": meta,
        "tree": writer.node(tree, root, 0),
    }
    return pack(writer.arrays, body, kind=_KIND, version=FORMAT_VERSION)


def load(path: PathLike, *, classes: Iterable[Any] = ()) -> PyTree:
    """Read what `save` wrote, with every type as it was.

    Weakly typed scalars come back strongly typed. JAX arrays of 64 bits need
    ``jax_enable_x64``: they are never silently rounded.

    Args:
        path: The file.
        classes: Your own classes or functions, in place of `register`.

    Raises:
        InputError: If there is no such file.
        ModelFileError: If it is not a laminar model, is truncated or damaged, was written by a
            newer version, or holds a class that is not known.
    """
    body, arrays = unpack(path, kind=_KIND, version=FORMAT_VERSION)
    return _read_tree(path, body, arrays, classes)


def from_bytes(data: bytes, *, classes: Iterable[Any] = ()) -> PyTree:
    """Read what `to_bytes` made; errors as in `load`."""
    path = Path("the model")
    body, arrays = unpack_bytes(data, path, kind=_KIND, version=FORMAT_VERSION)
    return _read_tree(path, body, arrays, classes)


def _read_tree(path: PathLike, body: Any, arrays: Any, classes: Iterable[Any]) -> PyTree:
    if not isinstance(body, dict) or "tree" not in body:
        raise ModelFileError(f"{path} holds no model.")
    return _Reader(path, Lookup(classes), arrays).value(body["tree"], "model", 0)


def read_header(path: PathLike) -> Header:
    """Read the description of a model and not its arrays: versions, date, `meta`, structure.

    Raises:
        InputError: If there is no such file.
        ModelFileError: If it is not a laminar model, its header is damaged, or it is newer.
    """
    body, arrays = peek(path, kind=_KIND, version=FORMAT_VERSION)
    try:
        return Header(arrays=arrays, **{k: body[k] for k in Header._fields if k != "arrays"})
    except (TypeError, KeyError) as error:
        raise ModelFileError(f"{path} has an incomplete description.") from error


# --- Tree to description --------------------------------------------------------------------------


class _Writer:
    """Builds the description and collects the arrays under readable names."""

    def __init__(self, lookup: Lookup):
        self.lookup = lookup
        self.arrays: dict[str, np.ndarray] = {}

    def node(self, x: Any, where: str, depth: int) -> Any:
        """The description of a value that stands at `where`."""
        if depth > _MAX_DEPTH:
            raise InputError(f"{where[:200]} is nested more than {_MAX_DEPTH} levels deep.")
        if x is None or type(x) in (bool, int, str):
            return x
        if type(x) is float:
            return x if math.isfinite(x) else {"float": str(x)}
        if type(x) in (tuple, list):
            items = [self.node(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(x)]
            return {type(x).__name__: items}
        if type(x) is dict:
            return {
                "dict": [
                    [self.node(k, f"a key of {where}", depth + 1), self.node(v, at, depth + 1)]
                    for k, v in x.items()
                    for at in [f"{where}[{k!r}]"]
                ]
            }
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return self.array(x, where)
        if isinstance(x, np.dtype) and x.name in DTYPES:
            return {"dtype": x.name}
        if _is_scalar_type(x):
            return {"dtype": jnp.dtype(x).name, "as": "jax" if _is_jax_type(x) else "numpy"}
        return self.record(x, where, depth)

    def record(self, x: Any, where: str, depth: int) -> Any:
        """A function, or an object with named fields."""
        if isinstance(x, type):
            raise InputError(
                f"{where} is the class {place(x)} itself, which cannot be saved; save an object of "
                "it, or the name of the class as a string."
            )
        if callable(x) and not isinstance(x, eqx.Module) and (name := self.lookup.name(x)):
            return {"function": name}
        cls = type(x)
        if isinstance(x, jtu.Partial):
            parts = {"func": x.func, "args": x.args, "keywords": dict(x.keywords)}
            return {
                "partial": {k: self.node(v, f"{where}.{k}", depth + 1) for k, v in parts.items()}
            }
        name = self.lookup.name(cls)
        if name is None or not is_record(cls):
            _refuse(x, where)
        fields = {}
        for field in _field_names(cls):
            if not hasattr(x, field):
                raise InputError(f"{where} has no value for its field {field!r}.")
            fields[field] = self.node(getattr(x, field), f"{where}.{field}", depth + 1)
        return {"class": name, "fields": fields}

    def array(self, x: Any, where: str) -> Any:
        """Store an array and refer to it."""
        if isinstance(x, Tracer):
            raise InputError(f"{where} is a traced value; save outside of jit, vmap and grad.")
        kind = "scalar" if isinstance(x, np.generic) else "numpy"
        if isinstance(x, jax.Array):
            kind = "jax"
            if x.is_deleted():
                raise InputError(f"{where} is an array that was deleted (donated to a jit).")
            if not x.is_fully_addressable:
                raise InputError(f"{where} is spread over several processes; gather it first.")
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                impl = str(jr.key_impl(x))
                if impl not in _KEY_WIDTHS:
                    raise InputError(f"{where} is a random key of the unknown kind {impl!r}.")
                return {"key": self.store(np.asarray(jr.key_data(x)), where), "impl": impl}
        value = np.asarray(x)
        if value.dtype.name not in DTYPES:
            raise InputError(f"{where} is an array of type {value.dtype}, which cannot be saved.")
        return {"array": self.store(value, where), "as": kind}

    def store(self, value: np.ndarray, where: str) -> str:
        """Put an array into the container under a name made from where it stands."""
        start = min((i for i in (where.find("."), where.find("[")) if i >= 0), default=0)
        path = where[start:].lstrip(".").replace("'", "")
        base = "".join(c if c.isascii() and (c.isalnum() or c in "_.[]") else "_" for c in path)
        base = base[-200:]
        name, i = base, 1
        while name in self.arrays or name == "__metadata__":
            i += 1
            name = f"{base}#{i}"
        self.arrays[name] = value
        return name


def _refuse(x: Any, where: str) -> NoReturn:
    """Say why a value cannot be saved."""
    if isinstance(x, functools.partial):
        raise InputError(
            f"{where} is a functools.partial, which cannot be saved; write a module with the "
            "arguments as fields, or a registered function."
        )
    if inspect.isfunction(x) and x.__name__ == "<lambda>":
        raise InputError(
            f"{where} is a lambda, which cannot be saved; use a function of jax.nn, or define it "
            "with def and decorate it with @laminar.register."
        )
    kind = f"the function {place(x)}" if callable(x) and hasattr(x, "__name__") else None
    kind = kind or f"of the class {place(type(x))}"
    raise InputError(
        f"{where} is {kind}, which is not registered; decorate it with @laminar.register."
    )


def _field_names(cls: type) -> list[str]:
    if is_named_tuple(cls):
        return list(cls._fields)  # type: ignore[attr-defined]
    return [f.name for f in dataclasses.fields(cls)]


def _is_jax_type(x: Any) -> bool:
    """Whether this is ``jnp.float32`` or alike, which is not a class of NumPy."""
    return getattr(jnp, getattr(x, "__name__", ""), None) is x and not isinstance(x, np.dtype)


def _is_scalar_type(x: Any) -> bool:
    name = getattr(x, "__name__", "")
    if isinstance(x, type) and issubclass(x, np.generic):
        return name in DTYPES
    return name in DTYPES and _is_jax_type(x)


# --- Description to tree --------------------------------------------------------------------------


class _Reader:
    """Rebuilds the tree; whatever the description says, only known names are looked up."""

    def __init__(self, path: PathLike, lookup: Lookup, arrays: dict[str, np.ndarray]):
        self.path = path
        self.lookup = lookup
        self.arrays = arrays
        self.kinds: dict[str, Callable[[Any, str, int], Any]] = {
            "float": self.read_float,
            "array": self.read_array,
            "key": self.read_key,
            "tuple": self.read_sequence,
            "list": self.read_sequence,
            "dict": self.read_dict,
            "dtype": self.read_dtype,
            "function": self.read_function,
            "partial": self.read_partial,
            "class": self.read_record,
        }

    def fail(self, where: str, why: str) -> NoReturn:
        """Raise the error of this file."""
        raise ModelFileError(f"{self.path} cannot be loaded: {where[:300]} {why}.")

    def value(self, node: Any, where: str, depth: int) -> Any:
        """The value that a node describes."""
        if depth > _MAX_DEPTH:
            self.fail(where, f"is nested more than {_MAX_DEPTH} levels deep")
        if not isinstance(node, dict):
            if isinstance(node, list):
                self.fail(where, "has a description of an unknown kind")
            return node
        kind = next((k for k in self.kinds if k in node), None)
        if kind is None:
            self.fail(where, "has a description of an unknown kind")
        return self.kinds[kind](node, where, depth)

    def get(self, node: dict, key: str, kind: type[T], where: str) -> T:
        """An entry of a node, of the expected type."""
        found = node.get(key)
        if not isinstance(found, kind):
            self.fail(where, f"has a description without a proper {key!r}")
        return found

    def read_float(self, node: dict, where: str, depth: int) -> float:
        """inf, −inf or nan."""
        if node["float"] not in ("inf", "-inf", "nan"):
            self.fail(where, "is not a number")
        return float(node["float"])

    def stored(self, name: Any, where: str) -> np.ndarray:
        """An array of the container."""
        if not isinstance(name, str) or name not in self.arrays:
            self.fail(where, "refers to an array that is not in the file")
        return self.arrays[name]

    def read_array(self, node: dict, where: str, depth: int) -> Any:
        """A JAX array, NumPy array or NumPy scalar."""
        value = self.stored(node["array"], where).copy()
        kind = node.get("as")
        if kind == "numpy":
            return value
        if kind == "scalar" and value.ndim == 0:
            return value[()]
        if kind != "jax":
            self.fail(where, "has a description of an unknown kind")
        if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
            self.fail(
                where,
                f"is of type {value.dtype} and JAX is set to 32 bits; enable it with "
                "jax.config.update('jax_enable_x64', True) or JAX_ENABLE_X64=1",
            )
        return jnp.array(value)

    def read_key(self, node: dict, where: str, depth: int) -> Any:
        """A random key or an array of them."""
        data, impl = self.stored(node["key"], where), node.get("impl")
        if not isinstance(impl, str) or impl not in _KEY_WIDTHS or data.dtype != np.uint32:
            self.fail(where, "is a random key of an unknown kind")
        if data.shape[-1:] != (_KEY_WIDTHS[impl],):
            self.fail(where, "is a random key of the wrong size")
        return jr.wrap_key_data(jnp.array(data), impl=impl)

    def read_sequence(self, node: dict, where: str, depth: int) -> Any:
        """A tuple or list."""
        kind = tuple if "tuple" in node else list
        items = self.get(node, kind.__name__, list, where)
        return kind(self.value(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(items))

    def read_dict(self, node: dict, where: str, depth: int) -> Any:
        """A dictionary, in its order."""
        pairs = self.get(node, "dict", list, where)
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
            self.fail(where, "is a dictionary with broken entries")
        result = {}
        for key_node, value_node in pairs:
            key = self.value(key_node, f"a key of {where}", depth + 1)
            try:
                known = key in result
            except TypeError:
                self.fail(where, "is a dictionary with a key that cannot be one")
            if known:
                self.fail(where, "is a dictionary that has a key twice")
            result[key] = self.value(value_node, f"{where}[{key!r}]", depth + 1)
        return result

    def read_dtype(self, node: dict, where: str, depth: int) -> Any:
        """An element type: a ``np.dtype``, or the scalar class of NumPy or JAX."""
        name, kind = node["dtype"], node.get("as")
        if not isinstance(name, str) or name not in DTYPES:
            self.fail(where, "is an element type that is not known")
        if kind == "jax":
            return getattr(jnp, name, None) or self.fail(where, "is an unknown element type")
        return DTYPES[name].type if kind == "numpy" else DTYPES[name]

    def thing(self, name: Any, where: str) -> Any:
        """The registered class or function of a name."""
        found = self.lookup.thing(name) if isinstance(name, str) else None
        if found is None:
            shown = str(name)[:100]
            why = f"names {shown!r}, which this version of laminar does not know; a newer one may"
            if shown.startswith("user:"):
                why = (
                    f"is of the user's own {shown.removeprefix('user:')!r}, which is not "
                    "registered; decorate it with @laminar.register or load with classes=[…]"
                )
            self.fail(where, why)
        return found

    def read_function(self, node: dict, where: str, depth: int) -> Any:
        """A registered function."""
        found = self.thing(node["function"], where)
        if isinstance(found, type):
            self.fail(where, "names a class as a function")
        return found

    def read_partial(self, node: dict, where: str, depth: int) -> Any:
        """A ``jax.tree_util.Partial`` of a registered function or a module."""
        parts = self.get(node, "partial", dict, where)
        func, args, keywords = (
            self.value(parts.get(k), where, depth + 1) for k in ("func", "args", "keywords")
        )
        named = isinstance(keywords, dict) and all(isinstance(k, str) for k in keywords)
        if not callable(func) or not isinstance(args, tuple) or not named:
            self.fail(where, "is a broken jax.tree_util.Partial")
        return jtu.Partial(func, *args, **keywords)

    def read_record(self, node: dict, where: str, depth: int) -> Any:
        """A module, dataclass or named tuple, made without its constructor."""
        cls = self.thing(node["class"], where)
        nodes = self.get(node, "fields", dict, where)
        if not isinstance(cls, type) or not is_record(cls):
            self.fail(where, f"names {cls!r} as a class")
        names = _field_names(cls)
        unknown = sorted(set(nodes) - set(names))
        if unknown:
            self.fail(
                where,
                f"({cls.__name__}) has the field {unknown[0][:100]!r}, which this version of the "
                "class does not have",
            )
        values = {
            k: self.value(nodes[k], f"{where}.{k}", depth + 1)
            if k in nodes
            else self.default(cls, k, where)
            for k in names
        }
        if is_named_tuple(cls):
            return tuple.__new__(cls, values.values())
        made = object.__new__(cls)
        for name, value in values.items():
            object.__setattr__(made, name, value)
        return made

    def default(self, cls: Any, name: str, where: str) -> Any:
        """The default of a field that the file, being older than it, does not have."""
        if is_named_tuple(cls):
            defaults = cls._field_defaults
        else:
            defaults = {
                f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
                for f in (cls.__dataclass_fields__[name],)
                if f.default is not dataclasses.MISSING
                or f.default_factory is not dataclasses.MISSING
            }
        if name not in defaults:
            self.fail(where, f"({cls.__name__}) lacks the field {name!r}")
        return defaults[name]
