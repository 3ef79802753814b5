"""Model files: what goes in comes out, and nothing else comes in."""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import pkgutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import safetensors.numpy

import laminar
from laminar import _files, _registry, io
from laminar._errors import InputError, ModelFileError
from laminar._params import Frozen
from laminar.bijections.compose import Chain, Independent, Repeat, repeat, reverse
from laminar.bijections.elementwise import Affine, Exp
from laminar.bijections.linear import LU
from laminar.io import load, read_header, save


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.lam"


def round_trip(tree, path, **options):
    save(path, tree, **options)
    return load(path, **options)


def model():
    body = Chain([LU(3, key=jr.key(0)), reverse(3)])
    stacked = repeat(lambda key: LU(3, key=key), 3, key=jr.key(1))
    return Chain([body, stacked, Independent(Affine(0.5, 2.0), 3)])


# --- Round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -(2**70),
        0.1,
        1e-310,
        -0.0,
        "Grüße\n\x00𝕏",
        (),
        (1, (2.5, [None, {"a": 1, 2: "b", (1, "x"): 0.5, None: 3}])),
        {},
        [[], ((),)],
        np.dtype("float32"),
        np.int8,
        jnp.float32,
        jnp.bfloat16,
        jax.nn.relu,
        jnp.tanh,
        jax.lax.erf,
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_plain_values(value, path):
    back = round_trip({"v": value}, path)["v"]
    assert type(back) is type(value)
    assert repr(back) == repr(value)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_floats_that_json_lacks(value, path):
    assert repr(round_trip((value,), path)[0]) == repr(value)


@pytest.mark.parametrize("name", sorted(_files.DTYPES))
def test_numpy_arrays_of_every_type(name, path):
    dtype = _files.DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 2, (2, 3)).astype(dtype)
    tree = [bits, bits[:0], bits[0, 0], bits.T, np.asarray(bits[0, 0])]
    back = round_trip(tree, path)
    for a, b in zip(tree, back, strict=True):
        assert (a.dtype, a.shape, type(a)) == (b.dtype, b.shape, type(b))
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint32", "float16", "bfloat16", "float32"])
def test_jax_arrays(dtype, path):
    x = jnp.asarray([[0, 1, 1]], dtype)
    back = round_trip((x, x[0, 0], x[:0]), path)
    assert all(isinstance(b, jax.Array) and b.dtype == x.dtype for b in back)
    assert np.array_equal(back[0], x)
    assert (back[1].shape, back[2].shape) == ((), (0, 3))


def test_special_float_bits_survive(path):
    x = np.array([np.nan, -np.nan, np.inf, -0.0, 1e-45], np.float32)
    x.view(np.uint32)[0] = 0x7FC12345
    back = round_trip((x, jnp.asarray(x)), path)
    assert back[0].tobytes() == x.tobytes()
    assert np.asarray(back[1]).tobytes() == x.tobytes()


def test_loaded_numpy_arrays_are_writable_and_native(path):
    back = round_trip([np.arange(3), np.arange(3, dtype=">i4")], path)
    back[0][0] = 5
    assert back[1].tolist() == [0, 1, 2]
    assert back[1].dtype == np.dtype("int32")


def test_random_keys(path):
    keys = (jr.key(3), jr.split(jr.key(1), 4), jr.key(0, impl="rbg"), jr.PRNGKey(7))
    back = round_trip(keys, path)
    assert jr.normal(back[0]) == jr.normal(keys[0])
    assert back[1].shape == (4,)
    assert jr.key_impl(back[2]) == jr.key_impl(keys[2])
    assert np.array_equal(back[3], keys[3])


def test_modules(path):
    flow = model()
    back = round_trip(flow, path)
    assert eqx.tree_equal(flow, back)
    assert jax.tree.structure(flow) == jax.tree.structure(back)
    x = jnp.ones(3)
    for a, b in zip(flow.forward(x), back.forward(x), strict=True):
        assert np.array_equal(a, b)
    assert isinstance(round_trip(Frozen({"a": np.ones(2)}), path), Frozen)


@pytest.mark.parametrize(
    "net",
    [
        lambda key: eqx.nn.MLP(2, 3, 4, 2, key=key),
        lambda key: eqx.nn.MLP(2, 3, 4, 2, jax.nn.gelu, final_activation=jnp.tanh, key=key),
        lambda key: eqx.nn.Conv2d(1, 2, 3, key=key),
        lambda key: eqx.nn.Sequential([eqx.nn.Linear(2, 2, key=key), eqx.nn.Lambda(jax.nn.relu)]),
        lambda key: eqx.nn.GRUCell(2, 3, key=key),
        lambda key: eqx.nn.MultiheadAttention(2, 4, key=key),
        lambda key: eqx.nn.LayerNorm(3),
        lambda key: eqx.nn.PReLU(0.1),
    ],
)  # fmt: skip
def test_equinox_layers(net, path):
    net = net(jr.key(0))
    assert eqx.tree_equal(net, round_trip(net, path))


def test_partial_of_a_known_function(path):
    back = round_trip(jax.tree_util.Partial(jax.nn.leaky_relu, negative_slope=0.3), path)
    assert np.allclose(back(jnp.array(-1.0)), -0.3)


def test_float64(path):
    with jax.enable_x64(True):
        flow = Affine(jnp.asarray(np.pi, jnp.float64), jnp.asarray(2.0, jnp.float64))
        assert eqx.tree_equal(flow, round_trip(flow, path))
    with pytest.raises(ModelFileError, match=r"float64 .* 32 bits.*jax_enable_x64"):
        load(path)


# --- The user's own classes -----------------------------------------------------------------------


class Mine(eqx.Module):
    weight: jax.Array
    size: int = eqx.field(static=True)
    extra: float = 2.5


@dataclasses.dataclass(frozen=True, slots=True)
class Plain:
    a: int
    b: tuple = ()


class Named(NamedTuple):
    x: int
    y: float = 1.0


def my_activation(x):
    return x


def test_user_classes_by_argument(path):
    tree = (Mine(jnp.ones(2), 3), Plain(1, (2,)), Named(1), my_activation)
    classes = [Mine, Plain, Named, my_activation]
    back = round_trip(tree, path, classes=classes)
    assert eqx.tree_equal(back[0], tree[0])
    assert back[1:] == tree[1:]
    with pytest.raises(ModelFileError, match=r"'Mine'.*@laminar\.register or load with classes"):
        load(path)


def test_user_classes_by_decorator(path, monkeypatch):
    monkeypatch.setattr(_registry, "_user", _registry._Registry())
    assert io.register(Mine) is Mine
    assert io.register("other name")(Plain) is Plain
    back = round_trip([Mine(jnp.ones(2), 3), Plain(1)], path)
    assert type(back[0]) is Mine
    assert back[1] == Plain(1)
    with pytest.raises(InputError, match="registered under the name 'user:Mine'"):
        io.register("Mine")(Plain)
    with pytest.raises(InputError, match="neither"):
        io.register(type("Odd", (), {}))
    with pytest.raises(InputError, match="no name"):
        io.register(lambda x: x)


def test_no_constructor_runs(path):
    class Loud(eqx.Module):
        x: int

        def __init__(self, x):
            if x != "first":
                raise AssertionError
            self.x = 1

        def __check_init__(self):
            if self.x != 1:
                raise AssertionError

    assert round_trip(Loud("first"), path, classes=[Loud]).x == 1


def test_fields_may_be_added_with_a_default_but_not_vanish(path):
    save(path, Mine(jnp.ones(2), 3, 7.0), classes=[Mine])

    def rewrite(change):
        body, arrays = _files.unpack(path, kind="model", version=1)
        change(body["tree"]["fields"])
        new = path.with_name("changed.lam")
        new.write_bytes(_files.pack(arrays, body, kind="model", version=1))
        return load(new, classes=[Mine])

    assert rewrite(lambda f: f.pop("extra")).extra == 2.5
    with pytest.raises(ModelFileError, match="lacks the field 'size'"):
        rewrite(lambda f: f.pop("size"))
    with pytest.raises(ModelFileError, match="has the field 'other', which this version"):
        rewrite(lambda f: f.update(other=1))


# --- What is refused when saving ------------------------------------------------------------------


class Net(eqx.Module):
    activation: Callable


class Holder(eqx.Module):
    net: Net
    parts: tuple


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x, r"^chain\.parts\[0\]\.bijection is a lambda, which cannot be saved"),
        (functools.partial(jnp.sum), r"is a functools\.partial, which cannot be saved"),
        (jnp.sum, r"is the function jax.*sum, which is not registered"),
        (object(), r"is of the class builtins\.object, which is not registered"),
        (np.array(["a"]), r"is an array of type <U1, which cannot be saved"),
        (np.array([None]), r"is an array of type object, which cannot be saved"),
        ({1, 2}, r"is of the class builtins\.set"),
        (Affine, r"parts\[0\]\.bijection is the class laminar.*Affine itself"),
        (jax.tree_util.Partial(jnp.sum), r"bijection\.func is the function"),
    ],
)
def test_refused(value, message, path):
    tree = eqx.tree_at(lambda c: c.parts[0].bijection, Chain([Independent(Exp(), 2)]), value)
    with pytest.raises(InputError, match=message):
        save(path, tree)
    assert not path.exists()


def test_the_path_of_a_field_in_a_module(path):
    tree = {"flow": Holder(Net(jax.nn.relu), (1, {"k": Net(lambda x: x)}))}
    with pytest.raises(InputError, match=r"^tree\['flow'\]\.parts\[1\]\['k'\]\.activation is a"):
        save(path, tree, classes=[Net, Holder])


def test_traced_deleted_and_too_deep(path):
    with pytest.raises(InputError, match="traced"):
        jax.jit(lambda x: save(path, [x]))(1.0)
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(InputError, match="deleted"):
        save(path, gone)
    deep = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match="levels deep"):
        save(path, deep)
    with pytest.raises(InputError, match="JSON"):
        save(path, 10**5000)
    assert not path.exists()


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"a": float("nan")}, {"a": np.float32(1)}])
def test_meta_must_be_json(meta, path):
    with pytest.raises(InputError, match="meta must be"):
        save(path, 1, meta)


# --- Writing --------------------------------------------------------------------------------------


def test_a_failed_save_leaves_the_old_file(path, monkeypatch):
    save(path, 1)
    before = path.read_bytes()
    with pytest.raises(InputError):
        save(path, lambda x: x)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot be written: No space left"):
        save(path, 2)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_unwritable_destinations(tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        save(tmp_path, 1)
    with pytest.raises(InputError, match="does not exist"):
        save(tmp_path / "no" / "model.lam", 1)


def test_permissions_and_links(path):
    mask = os.umask(0o027)
    try:
        save(path, 1)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o600)
    link = path.with_name("link.lam")
    link.symlink_to(path)
    save(link, 2)
    assert link.is_symlink()
    assert load(path) == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_header(path):
    save(path, model(), {"columns": ["a", "b"], "rows": 10})
    header = read_header(path)
    assert header.meta == {"columns": ["a", "b"], "rows": 10}
    assert header.laminar == laminar._version.__version__
    assert (header.jax, header.equinox) == (jax.__version__, eqx.__version__)
    assert header.created.endswith("+00:00")
    arrays = jax.tree.leaves(eqx.filter(model(), eqx.is_array))
    assert header.size == sum(a.size for a in arrays)
    assert "parts[0].parts[0].raw" in header.arrays
    damaged = path.read_bytes()
    path.write_bytes(damaged[:-4])
    assert read_header(path).size == header.size  # the arrays are not read


def test_other_tools_can_read_the_arrays(path):
    save(path, model())
    arrays = safetensors.numpy.load_file(path)
    assert np.array_equal(arrays["parts[1].layers.raw"], model().parts[1].layers.raw)


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


# --- The registry ---------------------------------------------------------------------------------


def test_names_are_unique_and_complete():
    """Every public module below the reports and commands can be saved under its own name."""
    known = _registry._own_and_upper()  # raises where two share a name
    outside = ("__main__", "cli", "objectives", "report", "tasks", "testing", "train")
    packages = [
        f"laminar.{info.name}"
        for info in pkgutil.iter_modules(laminar.__path__)
        if info.name not in outside
    ]
    missing = [
        f"{cls.__module__}.{name}"
        for name, cls in _registry.own_classes(packages)
        if issubclass(cls, eqx.Module) and known.things.get(name) is not cls
    ]
    assert missing == []


def test_names_do_not_depend_on_where_a_class_stands(path, monkeypatch):
    save(path, Affine(0.0, 1.0))
    monkeypatch.setattr(Affine, "__module__", "laminar.elsewhere")
    assert isinstance(load(path), Affine)


def test_repeat_survives(path):
    stack = Repeat([Affine(0.0, float(i)) for i in range(1, 4)])
    assert eqx.tree_equal(round_trip(stack, path), stack)


# --- Files of every version -----------------------------------------------------------------------

GOLDEN = sorted((Path(__file__).parent / "golden").glob("v*.lam"))


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_files_of_every_version_load_for_ever(file):
    expected = json.loads(file.with_suffix(".json").read_text())
    flow = load(file)
    x, condition = (np.array(expected[name], np.float32) for name in ("x", "condition"))
    found = flow.log_prob(x, condition)
    assert np.allclose(found, expected["log_prob"], rtol=1e-4, atol=1e-4)
    assert read_header(file).meta == {"note": "golden"}
    lost = [name for name in expected["names"] if _registry.Lookup(()).thing(name) is None]
    assert lost == [], "a renamed class needs its old name in laminar._registry._RENAMED"


def test_there_is_a_golden_file():
    assert GOLDEN
