"""Model files that are cut, changed, foreign or hostile: one error, and never anything else."""

import contextlib
import json
import pickle
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from laminar import _files, io
from laminar._errors import InputError, ModelFileError
from laminar.bijections.elementwise import Exp
from laminar.io import load, read_header, save


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.lam"


# --- Reading what is not whole --------------------------------------------------------------------


def small(path):
    save(path, (Exp(), jnp.arange(3.0), 1.5), {"é": [1e-5, "\n"]})
    return path.read_bytes()


def test_every_flipped_bit_is_noticed(path, monkeypatch):
    data = small(path)
    changed = bytearray(data)
    monkeypatch.setattr(_files, "_read", lambda path, kind, whole: (path, bytes(changed)))
    assert len(data) < 1500
    for byte in range(len(data)):
        for bit in range(8):
            changed[byte] ^= 1 << bit
            with pytest.raises(ModelFileError):
                load(path)
            changed[byte] ^= 1 << bit
    assert load(path)[2] == 1.5


def test_every_truncation_is_noticed(path):
    data = small(path)
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelFileError, match=r"truncated|not a laminar|empty"):
            load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ModelFileError):
        load(path)


def foreign():
    nested = b'{"a":' + b"[" * 200_000
    return {
        "text": b"a,b\n1,2\n" * 10,
        "json": b'{"a": 1}' * 5,
        "pickle": pickle.dumps({"a": np.ones(3)}),
        "zeros": bytes(1000),
        "ones": b"\xff" * 1000,
        "nested": len(nested).to_bytes(8, "little") + nested,
        "digits": (6011).to_bytes(8, "little") + b'{"a":' + b"9" * 6005 + b"}",
        "list": (4).to_bytes(8, "little") + b"{[]}",
        "empty object": (2).to_bytes(8, "little") + b"{}",
        "safetensors": safetensors.numpy.save({"x": np.ones(2)}),
        "other metadata": safetensors.numpy.save({"x": np.ones(2)}, {"format": "pt"}),
        "surrogate": (47).to_bytes(8, "little")
        + rb'{"__metadata__":{"format":"laminar \ud800 "  }}',
    }


@pytest.mark.parametrize("name", foreign())
def test_foreign_files(name, path):
    path.write_bytes(foreign()[name])
    for read in (load, read_header):
        with pytest.raises(ModelFileError, match="laminar model") as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < len(str(path)) + 250


def test_missing_empty_and_folder(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        load(tmp_path / "none.lam")
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ModelFileError, match="is empty"):
        load(tmp_path / "empty")


def test_newer_and_other_kinds(path):
    body = {"tree": None}
    path.write_bytes(_files.pack({}, body, kind="model", version=io.FORMAT_VERSION + 1))
    with pytest.raises(ModelFileError, match="install a newer laminar"):
        load(path)
    path.write_bytes(_files.pack({}, body, kind="checkpoint", version=1))
    with pytest.raises(ModelFileError, match="is a laminar checkpoint, not a laminar model"):
        load(path)


# --- Reading what is hostile, with a right checksum -----------------------------------------------


def deep(kind, levels):
    node = 1
    for _ in range(levels):
        node = {kind: [node]}
    return node


HOSTILE = {
    "unknown class": {"class": "NoSuch", "fields": {}},
    "path to a class": {"class": "os.system", "fields": {}},
    "function as class": {"class": "jax.nn.relu", "fields": {}},
    "class as function": {"function": "Affine"},
    "unknown function": {"function": "builtins.eval"},
    "dunder": {"function": "__import__"},
    "class of no name": {"class": 3, "fields": {}},
    "no fields": {"class": "Affine"},
    "fields a list": {"class": "Affine", "fields": []},
    "dunder field": {"class": "Exp", "fields": {"__class__": 1}},
    "unknown kind": {"pickle": "gASV"},
    "bare list": [1],
    "two levels": {"tuple": 3},
    "missing array": {"array": "x", "as": "numpy"},
    "array of no name": {"array": ["x"], "as": "numpy"},
    "odd array": {"array": "a", "as": "memmap"},
    "scalar of many": {"array": "a", "as": "scalar"},
    "odd key": {"key": "a", "impl": "threefry2x32"},
    "odd implementation": {"key": "a", "impl": ["rbg"]},
    "odd float": {"float": "__import__('os')"},
    "odd dtype": {"dtype": "object"},
    "dtype list": {"dtype": ["float32"]},
    "unhashable key": {"dict": [[{"list": []}, 1]]},
    "key twice": {"dict": [[1, 1], [1, 2]]},
    "broken dict": {"dict": [[1]]},
    "partial of nothing": {"partial": {"func": 1, "args": {"tuple": []}, "keywords": {"dict": []}}},
    "deep tuple": deep("tuple", 101),
    "deeper list": deep("list", 300),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_descriptions(name, path):
    arrays = {"a": np.zeros(3, np.uint32)}
    path.write_bytes(_files.pack(arrays, {"tree": HOSTILE[name]}, kind="model", version=1))
    with pytest.raises(ModelFileError, match="cannot be loaded") as caught:
        load(path)
    assert len(str(caught.value)) < len(str(path)) + 500


@pytest.mark.parametrize("body", [None, [], 3, {}, {"tre": 1}])
def test_bodies_that_are_none(body, path):
    path.write_bytes(_files.pack({}, body, kind="model", version=1))
    with pytest.raises(ModelFileError):
        load(path)
    with pytest.raises(ModelFileError):
        read_header(path)


def sealed(description, tensors):
    """A file with a right checksum around any description, as an attacker would make it."""
    strings = {"format": "laminar model", "version": "1", "description": description}
    strings["checksum"] = _files._sum(strings)
    return safetensors.numpy.save(tensors, strings)


@pytest.mark.parametrize(
    "description",
    [
        "[" * 100_000,
        '{"a":' * 50_000,
        "1" * 10_000,
        "NaN",
        "null",
        '{"body":1,"arrays":[],"sha256":""}',
        '{"body":1,"arrays":{"x":["float32",[-1]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["float32",["2"]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["object",[2]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["complex128",[2]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["complex128",[99999999999999999999]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["float64",[2]]},"sha256":""}',
        '{"body":1,"arrays":{"y":["float64",[2]]},"sha256":""}',
        '{"body":1,"arrays":{"x":["float64",[2]]},"sha256":[]}',
    ],
    ids=lambda text: text[:40],
)
def test_sealed_nonsense(description, path):
    path.write_bytes(sealed(description, {"x": np.ones(2)}))
    with pytest.raises(ModelFileError):
        load(path)


def test_huge_nesting_does_not_crash_the_interpreter(path):
    path.write_bytes(sealed('{"body":' + "[" * 5_000_000, {}))
    code = (
        "import sys\nfrom laminar._files import unpack\n"
        "try: unpack(sys.argv[1], kind='model', version=1)\n"
        "except Exception as error: print(type(error).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "ModelFileError\n"


def test_random_damage_to_descriptions_never_escapes(path):
    """Any change of the description under a right checksum gives a model or a ModelFileError."""
    small(path)
    body, arrays = _files.unpack(path, kind="model", version=1)
    text = json.dumps(body["tree"])
    rng = np.random.default_rng(0)
    done = 0
    while done < 300:
        i, j = sorted(rng.integers(0, len(text), 2))
        k = rng.integers(0, len(text))
        try:
            tree = json.loads(text[:k] + text[i : min(j, i + 30)] + text[k + rng.integers(0, 20) :])
        except ValueError:
            continue
        done += 1
        path.write_bytes(_files.pack(arrays, {"tree": tree}, kind="model", version=1))
        with contextlib.suppress(ModelFileError):
            load(path)
