"""Exported functions run without laminar and give what the flow gives."""

import builtins
import hashlib
import json
import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import pytest
from scipy import stats

from laminar import _files
from laminar._errors import InputError, MissingExtraError
from laminar._params import trainable
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Affine, Exp
from laminar.bijections.linear import LU
from laminar.distributions import ConditionalNormal, GaussianMixture, Normal, StudentT, Uniform
from laminar.export import export
from laminar.flow import Flow
from laminar.zoo import nsf

pytest.importorskip("flatbuffers")

STRANGER = """
import pathlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("laminar", "equinox"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
import jax, jax.export
jax.config.update("jax_enable_x64", X64)

folder = pathlib.Path(sys.argv[1])
log_prob = jax.export.deserialize(bytearray((folder / "log_prob.bin").read_bytes())).call
sample = jax.export.deserialize(bytearray((folder / "sample.bin").read_bytes())).call
given = np.load(folder.parent / "given.npz")
condition = [given["condition"]] if "condition" in given else []
rows = condition or [np.zeros(len(given["x"]), np.uint8)]
np.savez(
    folder.parent / "found.npz",
    log_p=log_prob(given["x"], *condition),
    first=log_prob(given["x"][:1], *[c[:1] for c in condition]),
    sample=sample(np.array([0, 3], np.uint32), *rows),
)
assert not any(name.split(".")[0] == "laminar" for name in sys.modules)
"""


def shake(tree, key, size=0.3):
    dynamic, static = eqx.partition(tree, trainable(tree))
    leaves, structure = jtu.tree_flatten(dynamic)
    keys = jr.split(key, len(leaves))
    moved = [x + size * jr.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return eqx.combine(jtu.tree_unflatten(structure, moved), static)


def run_as_stranger(folder, x64=False, **given):
    np.savez(folder.parent / "given.npz", **given)
    code = STRANGER.replace("X64", str(x64))
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return np.load(folder.parent / "found.npz")


def read(folder):
    return [
        jax.export.deserialize(bytearray((folder / f"{name}.bin").read_bytes())).call
        for name in ("log_prob", "sample")
    ]


KEY_DATA = jnp.array([0, 3], jnp.uint32)


def test_a_stranger_gets_the_same(tmp_path):
    flow = nsf(3, key=jr.key(0), layers=2, width=8, depth=1, bins=4, cond_dim=2)
    flow = shake(flow, jr.key(1), 0.1)
    condition = np.asarray(jr.normal(jr.key(2), (50, 2)))
    x = np.asarray(flow.sample(jr.key(3), (), condition))
    folder = export(flow, tmp_path / "out")
    found = run_as_stranger(folder, x=x, condition=condition)
    expected = flow.log_prob(x, condition)
    assert np.allclose(found["log_p"], expected, atol=1e-4)
    assert np.allclose(found["first"], expected[:1], atol=1e-4)
    assert found["sample"].shape == (50, 3)
    keys = jax.vmap(lambda i: jr.fold_in(jr.wrap_key_data(KEY_DATA), i))(jnp.arange(50))
    same = jax.vmap(lambda key, c: flow._sample(key, (), c))(keys, jnp.asarray(condition))
    assert np.allclose(found["sample"], same, atol=1e-4)


def test_float64(tmp_path):
    with jax.enable_x64(True):
        flow = Flow(Normal(2), Chain([LU(2), Affine(0.5, 2.0, shape=(2,))]))
        folder = export(shake(flow, jr.key(0)), tmp_path / "out")
        x = jr.normal(jr.key(1), (7, 2))
        expected = shake(flow, jr.key(0)).log_prob(x)
    found = run_as_stranger(folder, x64=True, x=np.asarray(x))
    assert found["log_p"].dtype == np.float64
    assert np.allclose(found["log_p"], expected, rtol=1e-12)
    assert 'jax.config.update("jax_enable_x64", True)' in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "distribution",
    [
        Normal(()),
        StudentT((2, 3)),
        Uniform(2),
        GaussianMixture(np.ones(2), np.eye(2, 3)),
        Flow(Normal(2), Exp((2,))),
    ],
    ids=lambda d: d.name,
)
def test_distributions(distribution, tmp_path):
    log_prob, sample = read(export(distribution, tmp_path / "out"))
    x = sample(KEY_DATA, jnp.zeros(40, jnp.uint8))
    assert x.shape == (40, *distribution.shape)
    assert np.allclose(log_prob(x), distribution.log_prob(x), atol=1e-5)
    assert np.array_equal(sample(KEY_DATA, jnp.zeros(7, jnp.uint8)), x[:7])
    assert not np.allclose(sample(KEY_DATA + jnp.uint32(1), jnp.zeros(7, jnp.uint8)), x[:7])
    odd = np.asarray(x).copy().reshape(40, -1)
    odd[0, 0], odd[1, 0], odd[2, 0] = np.inf, np.nan, -np.inf
    odd = jnp.asarray(odd.reshape(x.shape))
    assert np.array_equal(np.isnan(log_prob(odd)), np.isnan(distribution.log_prob(odd)))
    assert np.array_equal(log_prob(odd)[::2] == -np.inf, distribution.log_prob(odd)[::2] == -np.inf)


def test_samples_are_of_the_right_law(tmp_path):
    flow = Flow(Normal(2), Affine(1.0, 2.0, shape=(2,)))
    _, sample = read(export(flow, tmp_path / "out"))
    x = np.asarray(sample(KEY_DATA, jnp.zeros(4000, jnp.uint8)))
    assert stats.kstest(x.ravel(), stats.norm(1, 2).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.06


def test_conditions_may_be_trees(tmp_path):
    class Embed(eqx.Module):
        def __call__(self, condition):
            return jnp.concatenate([condition["a"], condition["b"].reshape(-1)])

    base = ConditionalNormal(eqx.nn.Linear(6, 4, key=jr.key(0)), 2, 6)
    flow = Flow(base, LU(2), Embed(), cond_shape={"a": (2,), "b": (2, 2)})
    condition = {"a": jnp.ones((5, 2)), "b": jr.normal(jr.key(0), (5, 2, 2))}
    log_prob, sample = read(export(flow, tmp_path / "out"))
    x = sample(KEY_DATA, condition)
    assert x.shape == (5, 2)
    assert np.allclose(log_prob(x, condition), flow.log_prob(x, condition), atol=1e-4)


def test_gradients_on_request(tmp_path):
    flow = Flow(Normal(2), Affine(1.0, 2.0, shape=(2,)))
    log_prob, _ = read(export(flow, tmp_path / "out", vjp_order=1))
    x = jr.normal(jr.key(0), (3, 2))
    slope = jax.grad(lambda x: log_prob(x).sum())(x)
    assert np.allclose(slope, -(x - 1) / 4, atol=1e-6)


def test_the_description_and_the_readme(tmp_path, monkeypatch):
    folder = export(Normal(2), tmp_path / "out", meta={"columns": ["a", "b"]})
    description = json.loads((folder / "export.json").read_text())
    assert description["format"] == "laminar export"
    assert description["shape"] == [2]
    assert description["cond_shape"] is None
    assert description["meta"] == {"columns": ["a", "b"]}
    text = (folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(textwrap.dedent(code), "README.md", "exec"), names)
    assert names["log_density"].shape == (1000,)


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    folder = export(Normal(2), tmp_path / "out")
    export(Normal(3), folder)
    assert json.loads((folder / "export.json").read_text())["shape"] == [3]
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for name, message in (
        ("file", "is a file"),
        ("full", "is not empty and not an earlier"),
        ("none/out", "does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            export(Normal(2), tmp_path / name)
    with pytest.raises(InputError, match="meta must be"):
        export(Normal(2), tmp_path / "new", meta={"a": {1}})
    assert not (tmp_path / "new").exists()


def test_an_export_that_is_cut_short_is_none_and_can_be_done_again(tmp_path, monkeypatch):
    folder = export(Normal(2), tmp_path / "out")
    (folder / "table.py").write_text("of the earlier export")
    written = []

    def stop(path, data):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        _files.atomic_write(path, data)

    monkeypatch.setattr("laminar.export.atomic_write", stop)
    with pytest.raises(KeyboardInterrupt):
        export(Normal(3), folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "log_prob.bin",
        "sample.bin",
    ]
    monkeypatch.undo()
    (folder / _files.temporary_name("README.md")).touch()
    export(Normal(3), folder)
    description = json.loads((folder / "export.json").read_text())
    assert description["shape"] == [3]
    for name, expected in description["checksums"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected
    (folder / "export.json").unlink()
    (folder / "mine").touch()
    with pytest.raises(InputError, match="not an earlier"):
        export(Normal(3), folder)


def test_what_cannot_be_exported(tmp_path):
    class Checked(eqx.Module):
        def __call__(self, x):
            return eqx.error_if(x, x.sum() > 1e30, "too large")

    base = ConditionalNormal(eqx.nn.Linear(2, 4, key=jr.key(0)), 2, 2)
    flow = Flow(base, LU(2), Checked(), cond_shape=(2,))
    with pytest.raises(InputError, match="log_prob cannot be exported"):
        export(flow, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="takes a flow"):
        export(LU(2), tmp_path / "out")  # type: ignore[arg-type]


def test_missing_flatbuffers(tmp_path, monkeypatch):
    true_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "flatbuffers":
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"pip install 'laminar\[export\]'"):
        export(Normal(2), tmp_path / "out")
