"""Training killed with SIGKILL at five random moments and resumed ends with the same bits."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

SCRIPT = """
import sys
import jax, jax.numpy as jnp, jax.random as jr, numpy as np
import equinox as eqx
from laminar.bijections.compose import Chain, repeat, reverse
from laminar.bijections.coupling import coupling
from laminar.bijections.elementwise import Affine
from laminar.bijections.linear import ActNorm
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.train import Checkpoint, fit

x = np.random.default_rng(0).normal(size=(3000, 6)) ** 3
layers = lambda key: Chain([ActNorm(6), coupling(6, Affine(), width=64, key=key), reverse(6)])
flow = Flow(Normal((6,)), repeat(layers, 4, key=jr.key(1)))
flow, history = fit(
    jr.key(0), flow, x, steps=int(sys.argv[2]), batch_size=128, validate_every=37, patience=None,
    ema=0.99, checkpoint=Checkpoint(sys.argv[1] + "/checkpoint", seconds=0.0), resume=True,
)
leaves = jax.tree_util.tree_leaves(eqx.filter(flow, eqx.is_array))
np.savez(sys.argv[1] + "/result.npz", *leaves, loss=history.loss, validation=history.validation)
"""
STEPS = 1500


def start(folder):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(STEPS)],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-3000:]


def wait_for_save(process, path, after):
    """Wait until a checkpoint newer than a moment is there; say whether training still runs."""
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > after:
            return True
        time.sleep(0.002)
    return False


@pytest.mark.slow
def test_five_kills_change_no_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    process = start(whole)
    assert wait_for_save(process, whole / "checkpoint", 0)
    begun = time.monotonic()
    finish(process)
    seconds = time.monotonic() - begun

    moments = random.Random(0)
    checkpoint = killed / "checkpoint"
    for _ in range(5):
        process = start(killed)
        saved = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        assert wait_for_save(process, checkpoint, saved), "training ended before the fifth kill"
        # A random moment of training, mostly within a segment or while a checkpoint is written.
        time.sleep(moments.uniform(0, 0.15) * seconds)
        assert process.poll() is None, "training ended before the fifth kill"
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start(killed))

    one, two = np.load(whole / "result.npz"), np.load(killed / "result.npz")
    assert set(one.files) == set(two.files)
    for name in one.files:
        assert one[name].dtype == two[name].dtype
        assert one[name].tobytes() == two[name].tobytes(), name
