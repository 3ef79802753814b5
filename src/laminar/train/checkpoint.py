"""Checkpoints: the whole state of a training run in one file, written whole or not at all.

A checkpoint holds arrays and a description, no code and no structure: it is restored into a
template, the state that the same call of `fit` builds anew. What decides the numbers of a run and
can be compared is recorded, and a difference is refused by name: the key, the data, the budget, the
options, the shapes of all arrays, the fields of the flow that are no arrays, and the name of the
objective. What an objective or an optimiser of one's own does inside is not seen, nor are the
values that the flow began with: these must be the same by the user's own care.
"""

import dataclasses
import glob
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from laminar._errors import InputError, ModelFileError
from laminar._files import PathLike, atomic_write, check_writable, pack, unpack
from laminar._typing import PyTree
from laminar.train.history import History

FORMAT_VERSION = 1
_KIND = "checkpoint"
_PART = "flow-"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often training is saved.

    Attributes:
        path: The file; replaced at every save.
        seconds: Save when so much time has passed since the last save.
        steps: Save also when so many steps have.
    """

    path: PathLike
    seconds: float = 60.0
    steps: int | None = None

    def __post_init__(self):
        check_writable(self.path)
        if not self.seconds >= 0 or (self.steps is not None and self.steps < 1):
            raise InputError("Checkpoint: seconds must be at least 0 and steps at least 1.")

    def due(self, seconds: float, steps: int) -> bool:
        """Whether so much since the last save calls for another."""
        return seconds >= self.seconds or (self.steps is not None and steps >= self.steps)

    @property
    def exists(self) -> bool:
        """Whether there is something to resume."""
        return Path(self.path).exists()

    def part(self, name: str) -> "Checkpoint":
        """A checkpoint beside this one, for one of several flows trained in turn."""
        return dataclasses.replace(self, path=f"{self.path}.{_PART}{name}")

    def files(self) -> list[Path]:
        """The files that exist of this checkpoint and of its parts."""
        path = Path(self.path)
        parts = path.parent.glob(f"{glob.escape(path.name)}.{_PART}*")
        return [file for file in (path, *sorted(parts)) if file.exists()]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(state: PyTree) -> dict[str, Any]:
    """The arrays of a state under their paths, such as ``.model.base.loc``."""
    arrays = eqx.filter(state, eqx.is_array)
    return {jtu.keystr(path): leaf for path, leaf in jtu.tree_leaves_with_path(arrays)}


def _shapes(leaves: Mapping[str, Any]) -> dict[str, list]:
    return {name: [str(leaf.dtype), list(leaf.shape)] for name, leaf in leaves.items()}


def structure_hash(state: PyTree) -> str:
    """SHA-256 over the paths, dtypes and shapes of a state's arrays."""
    lines = [
        f"{name} {kind} {shape}" for name, (kind, shape) in _shapes(_named_leaves(state)).items()
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def static_hash(tree: PyTree) -> str:
    """SHA-256 over everything in a tree but its arrays: classes, static fields, functions by name.

    Addresses in memory are left out, so the hash is the same in another process.
    """
    text = f"{jtu.tree_structure(tree)} {eqx.tree_pformat(tree, short_arrays=True)}"
    return hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", text).encode()).hexdigest()


def save_checkpoint(
    path: PathLike, state: PyTree, history: History, settings: Mapping[str, Any]
) -> None:
    """Write a state, the history so far, and the settings of the run.

    Args:
        path: The file, replaced in one step.
        state: Any pytree of arrays, random keys included.
        history: The history so far.
        settings: Of what JSON can hold; `load_checkpoint` compares them.

    Raises:
        InputError: If the file cannot be written.
    """
    leaves = _named_leaves(state)
    arrays = {
        f"state{name}": np.asarray(jr.key_data(leaf) if _is_key(leaf) else leaf)
        for name, leaf in leaves.items()
    }
    scalars = {}
    for field in dataclasses.fields(history):
        value = getattr(history, field.name)
        if isinstance(value, str):
            scalars[field.name] = value
        else:
            arrays[f"history.{field.name}"] = np.asarray(value)
    body = {
        "structure": structure_hash(state),
        "leaves": _shapes(leaves),
        "history": scalars,
        "settings": dict(settings),
    }
    atomic_write(path, pack(arrays, body, kind=_KIND, version=FORMAT_VERSION))


def load_checkpoint(
    path: PathLike, template: PyTree, settings: Mapping[str, Any]
) -> tuple[Any, History, dict[str, Any]]:
    """Restore a state into a template of the same structure.

    Args:
        path: A file of `save_checkpoint`.
        template: A state built by the same configuration; its arrays are replaced.
        settings: The settings of the run that wants to go on.

    Returns:
        The state, the history, and all settings that were saved.

    Raises:
        InputError: If there is no file, or it belongs to a run of other settings.
        ModelFileError: If the file is damaged, foreign or newer, or its arrays do not fit.
    """
    body, arrays = unpack(path, kind=_KIND, version=FORMAT_VERSION)
    if not isinstance(body, dict) or not {"structure", "leaves", "history", "settings"} <= set(
        body
    ):
        raise ModelFileError(f"{path} is a checkpoint without a description of its contents.")
    if body["structure"] != structure_hash(template):
        raise ModelFileError(
            f"{path} belongs to another model or optimiser: "
            f"{_difference(body['leaves'], _shapes(_named_leaves(template)))}; resume with the "
            "configuration that wrote it."
        )
    for name, value in settings.items():
        written = body["settings"].get(name)
        if written != value:
            raise InputError(
                f"{path} was written by a run with {name} = {written}, and this one has {value}; "
                "resume with the same settings, or start anew without resume."
            )
    dynamic, static = eqx.partition(template, eqx.is_array)
    paths, structure = jtu.tree_flatten_with_path(dynamic)
    leaves = [_restore(arrays[f"state{jtu.keystr(p)}"], leaf) for p, leaf in paths]
    history = History(**body["history"])
    for field in dataclasses.fields(history):
        value = arrays.get(f"history.{field.name}")
        if value is not None:
            setattr(history, field.name, value if value.ndim else value.item())
    state = eqx.combine(jtu.tree_unflatten(structure, leaves), static)
    return state, history, body["settings"]


def _restore(stored: np.ndarray, leaf: Any) -> Any:
    if _is_key(leaf):
        return jr.wrap_key_data(jnp.asarray(stored), impl=jr.key_impl(leaf))
    # A copy, since the state will be donated.
    return jnp.array(stored)


def _difference(written: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first array in which two states differ, in words."""

    def words(entry):
        return f"{entry[0]} {tuple(entry[1])}"

    for name, entry in here.items():
        if name not in written:
            return f"it has no {name}"
        if list(written[name]) != list(entry):
            return f"{name} is {words(written[name])} there and {words(entry)} here"
    extra = [name for name in written if name not in here]
    return f"it also has {extra[0]}" if extra else "its arrays stand in another order"
