"""Training on two virtual host devices gives the result of one."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, jax.random as jr, numpy as np
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
from laminar._errors import InputError
from laminar.bijections.elementwise import Affine
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.objectives import Batch
from laminar.train import fit
import laminar.train.fit
module = sys.modules[fit.__module__]

x = np.random.default_rng(0).normal(size=(101, 3)) * 2 + 1
found, spread = {}, []
run_segment = module._segment

def watching(fixed, state):
    state, record = run_segment(fixed, state)
    spread.append(len(state.model.base.loc.sharding.device_set))
    return state, record

module._segment = watching
class Stream:
    def __len__(self):
        return 3
    def batch(self, epoch, index):
        return Batch(np.random.default_rng([epoch, index]).normal(size=(15, 3)))

for name, data, validation in (("rows", x, 0.2), ("stream", Stream(), Batch(x))):
    for devices in (None, 2):
        flow, history = fit(
            jr.key(0), Flow(Normal((3,)), Affine(shape=(3,))), data, validation=validation,
            steps=60, batch_size=32, learning_rate=0.05, ema=0.9, devices=devices,
            validate_every=20,
        )
        found[f"{name} {devices}"] = [
            flow.base.loc.tolist(), history.loss.tolist(), history.validation.tolist()
        ]
        assert len(flow.base.loc.sharding.device_set) == 1
assert {1, 2} == set(spread), spread
try:
    fit(jr.key(0), Normal((3,)), x[:1], devices=2, steps=1)
except InputError as error:
    found["error"] = str(error)
print(json.dumps(found))
"""


def test_two_devices_give_the_result_of_one():
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("rows", "stream"):
        for one, two in zip(found[f"{name} None"], found[f"{name} 2"], strict=True):
            difference = max(abs(a - b) for a, b in zip(one, two, strict=True))
            assert difference < 1e-5
    assert "a row for each of the 2 devices" in found["error"]
