"""Model files: what goes in comes out, and nothing else comes in."""

import dataclasses
import functools
import json
import pkgutil
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


# --- The header -----------------------------------------------------------------------------------


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


# --- The registry ---------------------------------------------------------------------------------


def test_names_are_unique_and_complete():
    """Every public module below the reports and commands can be saved under its own name."""
    known = _registry._own_and_upper()  # raises where two share a name
    outside = ("__main__", "cli", "matching", "objectives", "report", "tasks", "testing", "train")
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


def test_bytes_are_those_of_the_file(tmp_path):
    flow = laminar.nsf(2, key=jr.key(0), layers=1, width=8)
    data = laminar.io.to_bytes(flow)
    (tmp_path / "flow.laminar").write_bytes(data)
    for again in (laminar.io.from_bytes(data), laminar.load(tmp_path / "flow.laminar")):
        np.testing.assert_array_equal(again.log_prob(np.ones(2)), flow.log_prob(np.ones(2)))
    with pytest.raises(laminar.ModelFileError, match="the model"):
        laminar.io.from_bytes(data[:-3])
