"""The rivals' environments: made once by pip from pinned files, and used again."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_FOLDER = Path(__file__).parent
_MARK = "made-from"


class NoEnvironmentError(Exception):
    """An environment that could not be made; the message is one sentence."""


def interpreters(
    environments: Mapping[str, str | None], folder: Path, gpu: bool = False
) -> dict[str, Path | str]:
    """For each library the interpreter of its environment, or why there is none.

    Args:
        environments: For each library its environment, None for the one that runs this.
        folder: Where environments are kept.
        gpu: Whether they are for a GPU.
    """
    made: dict[str | None, Path | str] = {None: Path(sys.executable)}
    for environment in environments.values():
        if environment is None or environment in made:
            continue
        try:
            made[environment] = python_of(environment, folder, gpu)
        except NoEnvironmentError as error:
            print(error, file=sys.stderr, flush=True)
            made[environment] = str(error)
    return {name: made[environment] for name, environment in environments.items()}


def python_of(name: str, folder: Path, gpu: bool, timeout: float = 900) -> Path:
    """The interpreter of an environment, which is made first if it is not there.

    Args:
        name: "jax" or "torch".
        folder: Where environments are kept.
        gpu: Whether it is for a GPU.
        timeout: Seconds that making it may take.

    Raises:
        NoEnvironmentError: If it cannot be made.
    """
    suffix = "-gpu" if gpu else ""
    wanted = _FOLDER / f"requirements-{name}{suffix}.txt"
    requirements = wanted if wanted.exists() else _FOLDER / f"requirements-{name}.txt"
    where = folder.absolute() / f"{name}{suffix}"
    python = where / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    texts = [path.read_bytes() for path in sorted(_FOLDER.glob(f"requirements-{name}*.txt"))]
    mark = hashlib.sha256(b"".join([*texts, sys.version.encode()])).hexdigest()
    if python.exists() and (where / _MARK).is_file() and (where / _MARK).read_text() == mark:
        return python
    print(f"Making the environment {where} …", flush=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _call([sys.executable, "-m", "venv", "--clear", str(where)], name, timeout)
    _call([*pip, "-r", str(requirements)], name, timeout)
    (where / _MARK).write_text(mark)
    return python


def _call(command: list[str], name: str, timeout: float) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoEnvironmentError(f"The environment {name!r} cannot be made: {error}.") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        # pip repeats its reason last, in a line that begins so.
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise NoEnvironmentError(f"The environment {name!r} cannot be made: {reason}")
