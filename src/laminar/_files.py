"""Files that are whole or absent: atomic writes, and the container of models and checkpoints.

The container is a safetensors file, so other tools can list and read its arrays. Four strings stand
in its metadata:

    format        "laminar model", "laminar checkpoint", …
    version       of that format; a reader refuses what is newer than itself
    description   JSON: {"body": the writer's own description, "arrays": {name: [dtype, shape]},
                  "sha256": over the arrays}
    checksum      SHA-256 over the three strings above

Two sums, so that the description can be trusted without reading the arrays. Nothing in a file is
ever executed, imported or unpickled.
"""

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ml_dtypes
import numpy as np
import safetensors

from laminar._errors import InputError, ModelFileError

PathLike = str | os.PathLike[str]

_MAX_HEADER = 100_000_000  # the limit of the safetensors format itself
_LENGTH_BYTES = 8
_SUMMED = ("format", "version", "description")

# Element types that safetensors names itself; the others are stored as their bytes.
_NATIVE = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_RAW = (
    "complex128",
    "int2",
    "int4",
    "uint2",
    "uint4",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn",
)


def _dtypes() -> dict[str, np.dtype]:
    """Every element type that a file may name."""
    found = {}
    for name in (*_NATIVE, *_RAW):
        kind = getattr(np, name if name != "bool" else "bool_", None) or getattr(
            ml_dtypes, name, None
        )
        if kind is not None:
            found[name] = np.dtype(kind)
    return found


DTYPES = _dtypes()


def checksum(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of byte strings and arrays of bytes in order, each preceded by its length, as hex."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)  # type: ignore[arg-type]
    return digest.hexdigest()


def check_writable(path: PathLike) -> Path:
    """Refuse a destination that cannot be written, before the work whose result it is to hold.

    Returns:
        The real path, symbolic links followed.

    Raises:
        InputError: If it is a folder, a device or a pipe, or is write-protected; or if its folder
            is missing or read-only.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    try:
        mode = _mode(target)
        if mode is not None and stat.S_ISDIR(mode):
            raise InputError(f"{path} is a folder; give the name of a file in it.")
        if mode is not None and not stat.S_ISREG(mode):
            raise InputError(f"{path} is not a regular file; give another name.")
        # The name could be given away all the same, but who protects a file does not mean that.
        if mode is not None and not (mode & 0o222 and os.access(target, os.W_OK)):
            raise InputError(f"{path} cannot be written: the file is write-protected.")
        if not folder.is_dir():
            raise InputError(f"{path} cannot be written: the folder {folder} does not exist.")
    except OSError as error:
        raise InputError(f"{_brief(path)} cannot be written: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{path} cannot be written: no permission to write in {folder}.")
    return target


def atomic_write(path: PathLike, data: bytes) -> None:
    """Write a file so that at every moment it is the old one, the new one, or absent.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name
    in one step. A symbolic link keeps pointing to the file it names, and an existing file keeps its
    permissions. A process that is killed leaves at most the one temporary file of that name, which
    the next write to it takes over.

    Raises:
        InputError: If the file cannot be written; what was there before is untouched.
    """
    target = check_writable(path)
    temporary = target.with_name(temporary_name(target.name))
    try:
        with _exclusive(temporary) as file:
            try:
                mode = _mode(target)
                if mode is not None:
                    os.fchmod(file.fileno(), mode & 0o777)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        _sync_folder(target.parent)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}.") from error


def temporary_name(name: str) -> str:
    """The name under which a file is written before it takes its own."""
    # With the longest of names there is no room for more.
    return f".{name if len(os.fsencode(name)) < 240 else checksum(os.fsencode(name))[:32]}.tmp"


def _exclusive(temporary: Path) -> BinaryIO:
    """Open a new file that no other writer has; one left by a killed process is thrown away.

    Writers of the same name wait for each other by a lock, which goes with the process. Who waited
    finds that the file it opened has since taken its name, and starts anew.
    """
    import fcntl  # which only Unix has, so that other systems can at least read

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        # Not tempfile, which would make it private: here the user's mask decides.
        file = os.fdopen(os.open(temporary, flags, 0o666), "r+b")
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            mine = os.fstat(file.fileno())
            try:
                there = os.lstat(temporary)
            except FileNotFoundError:
                there = None
            if there is not None and os.path.samestat(mine, there):
                if mine.st_size == 0:
                    return file
                temporary.unlink(missing_ok=True)
        except BaseException:
            file.close()
            raise
        file.close()


def _mode(target: Path) -> int | None:
    """Type and permissions of what stands at a path, or None where nothing does."""
    try:
        return target.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _brief(path: PathLike) -> str:
    """A path as messages name it; what is longer than any name is cut."""
    text = os.fspath(path)
    return text if len(text) <= 300 else f"{text[:150]}…"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack(
    arrays: Mapping[str, np.ndarray], body: Mapping[str, Any], *, kind: str, version: int
) -> bytes:
    """The bytes of a container.

    Args:
        arrays: NumPy arrays of the types in `DTYPES`, by name.
        body: What the writer has to say, of what JSON can express.
        kind: What the file is: ``"model"``, ``"checkpoint"``, ….
        version: Version of the writer's format, a positive integer.

    Raises:
        InputError: If an array's type or something in `body` cannot be stored.
    """
    # The stored arrays must outlive the call of serialize, which takes their addresses.
    kept = {name: _storable(name, array) for name, array in arrays.items()}
    try:
        description = json.dumps(
            {
                "body": body,
                "arrays": {name: [a.dtype.name, list(a.shape)] for name, a in arrays.items()},
                "sha256": _arrays_checksum(kept),
            },
            separators=(",", ":"),
            allow_nan=False,
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"The description cannot be stored as JSON: {error}.") from error
    strings = {"format": f"laminar {kind}", "version": str(version), "description": description}
    specs = {
        name: safetensors.TensorSpec(
            dtype=a.dtype.name, shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
        )
        for name, a in kept.items()
    }
    data = bytes(safetensors.serialize(specs, {**strings, "checksum": _sum(strings)}))
    if int.from_bytes(data[:_LENGTH_BYTES], "little") > _MAX_HEADER:
        raise InputError("The description takes more than 100 MB and cannot be stored.")
    return data


def unpack(path: PathLike, *, kind: str, version: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Read and verify a container: its ``body`` and its arrays.

    Args:
        path: The file.
        kind: What it must be.
        version: The newest version of the format that the caller understands.

    Raises:
        InputError: If there is no such file or it cannot be read.
        ModelFileError: If it is something else, damaged, or newer.
    """
    path, data = _read(path, kind, whole=True)
    return unpack_bytes(data, path, kind=kind, version=version)


def unpack_bytes(
    data: bytes, path: Path, *, kind: str, version: int
) -> tuple[Any, dict[str, np.ndarray]]:
    """Verify the bytes of a container as `unpack` does; errors call them by `path`."""
    description = _describe(path, data, kind, version)
    try:
        tensors = safetensors.deserialize(data)
    except (safetensors.SafetensorError, ValueError, OverflowError) as error:
        _damaged(path, kind, error)
    stored = {name: np.frombuffer(t["data"], np.uint8) for name, t in tensors}
    headers = {name: (t["dtype"], list(t["shape"])) for name, t in tensors}
    arrays = {}
    for name, (dtype_name, shape) in description["arrays"].items():
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            raise ModelFileError(
                f"{path} holds an array of type {dtype_name!r}, which is not known here; it may "
                "come from a newer version of laminar."
            )
        native = _NATIVE.get(dtype_name)
        expected = (native, shape) if native else ("U8", [math.prod(shape) * dtype.itemsize])
        if headers.get(name) != expected:
            _damaged(path, kind, f"the array {name!r} does not match its description")
        arrays[name] = stored[name].view(dtype).reshape(shape)
    whole = {name: _storable(name, a) for name, a in arrays.items()}
    if len(arrays) != len(tensors) or description["sha256"] != _arrays_checksum(whole):
        _damaged(path, kind, "its checksum does not match its arrays")
    return description["body"], arrays


def peek(path: PathLike, *, kind: str, version: int) -> tuple[Any, dict[str, tuple]]:
    """The ``body`` and ``{array name: (dtype name, shape)}``, verified, without reading arrays.

    Raises:
        InputError, ModelFileError: As `unpack`, except that damage to the arrays goes unnoticed.
    """
    path, data = _read(path, kind, whole=False)
    description = _describe(path, data, kind, version)
    return description["body"], {
        name: (dtype, tuple(shape)) for name, (dtype, shape) in description["arrays"].items()
    }


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    """The array as safetensors takes it: contiguous, little-endian, and bytes where it must be."""
    if DTYPES.get(array.dtype.name) is None:
        raise InputError(f"The array {name} has type {array.dtype}, which cannot be stored.")
    array = np.ascontiguousarray(array).reshape(array.shape)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array if array.dtype.name in _NATIVE else array.reshape(-1).view(np.uint8)


def _arrays_checksum(stored: Mapping[str, np.ndarray]) -> str:
    parts: list[bytes | np.ndarray] = []
    for name in sorted(stored):
        array = stored[name]
        head = json.dumps([name, array.dtype.name, list(array.shape)]).encode()
        parts += [head, array.reshape(-1).view(np.uint8)]
    return checksum(*parts)


def _sum(strings: Mapping[str, str]) -> str:
    return checksum(*(strings[k].encode(errors="surrogatepass") for k in _SUMMED))


def _read(path: PathLike, kind: str, whole: bool) -> tuple[Path, bytes]:
    """The file's bytes, or the first of them up to the end of the header."""
    path = Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path} is a folder, not a laminar {kind}; give the name of a file.")
        if not path.exists():
            raise InputError(f"There is no file {path}.")
        if not path.is_file():
            raise InputError(f"{path} is not a regular file.")
        with path.open("rb") as file:
            head = file.read(_LENGTH_BYTES)
            size = int.from_bytes(head, "little")
            if not head:
                raise ModelFileError(f"{path} is empty; it is not a laminar {kind}.")
            if len(head) < _LENGTH_BYTES or not 2 <= size <= _MAX_HEADER:
                raise ModelFileError(f"{path} is not a laminar {kind}.")
            return path, head + file.read(-1 if whole else size)
    except OSError as error:
        raise InputError(f"{_brief(path)} cannot be read: {error.strerror or error}.") from error


def _describe(path: Path, data: bytes, kind: str, version: int) -> Any:
    """Verify the header and return its description."""
    size = int.from_bytes(data[:_LENGTH_BYTES], "little")
    header = data[_LENGTH_BYTES : _LENGTH_BYTES + size]
    if header[:1] != b"{":
        raise ModelFileError(f"{path} is not a laminar {kind}.")
    if len(header) < size:
        _damaged(path, kind, "it ends within its header")
    strings: Any = _parse(path, header, kind)
    strings = strings.get("__metadata__") if isinstance(strings, dict) else None
    strings = strings if isinstance(strings, dict) else {}
    found = strings.get("format")
    if not isinstance(found, str) or not found.startswith("laminar "):
        raise ModelFileError(f"{path} is a safetensors file, but not a laminar {kind}.")
    if found != f"laminar {kind}":
        raise ModelFileError(f"{path} is a {found[:40]}, not a laminar {kind}.")
    written = strings.get("version")
    if not isinstance(written, str) or not (written.isascii() and written.isdigit()):
        _damaged(path, kind, "it states no version")
    if len(written) > 9 or int(written) > version:
        raise ModelFileError(
            f"{path} was written in version {written[:20]} of the format and this laminar reads up "
            f"to version {version}; install a newer laminar to read it."
        )
    if not isinstance(strings.get("description"), str) or strings.get("checksum") != _sum(strings):
        _damaged(path, kind, "its checksum does not match its description")
    description = _parse(path, strings["description"].encode(errors="surrogatepass"), kind)
    if not _well_formed(description):
        _damaged(path, kind, "its description is incomplete")
    return description


def _well_formed(description: Any) -> bool:
    if not isinstance(description, dict) or not {"body", "arrays", "sha256"} <= set(description):
        return False
    arrays = description["arrays"]
    return isinstance(arrays, dict) and all(
        isinstance(entry, list)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], list)
        and all(type(n) is int and n >= 0 for n in entry[1])
        for entry in arrays.values()
    )


def _parse(path: Path, text: bytes, kind: str) -> Any:
    """JSON, with everything that a hostile text can provoke turned into one error."""
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError, MemoryError) as error:
        _damaged(path, kind, f"its header is not JSON that can be read ({type(error).__name__})")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON.")


def _damaged(path: Path, kind: str, why: object) -> NoReturn:
    raise ModelFileError(
        f"{path} is not a whole laminar {kind}: {why}; it is truncated or damaged, so restore it "
        "from where it came."
    )
