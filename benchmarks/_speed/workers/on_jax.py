"""What the adapters of the JAX libraries share."""

import importlib.metadata
import os

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np


def randomised(params):
    """Parameters with a little noise, so that no map is the identity and no weight is zero."""
    leaves, treedef = jtu.tree_flatten(params)
    keys = jr.split(jr.key(1), len(leaves))
    noisy = [
        leaf + 0.1 * jr.normal(key, leaf.shape) / np.sqrt(max(leaf.shape[-1:] or (1,)))
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return jtu.tree_unflatten(treedef, noisy)


class JaxAdapter:
    """Data, keys and waiting."""

    versions = ()
    parameters = 0

    def __init__(self, name):
        self.name = name

    def prepare(self, spec):
        """Draw the data, the same for every library, and start the device."""
        self.spec = spec
        self._rng = np.random.default_rng(0)
        data = self._rng.standard_normal((spec["rows"], spec["dim"])).astype(np.float32)
        self.key = jr.key(2)
        self.keys = list(jr.split(jr.key(3), 64))
        self._data = {spec["rows"]: jnp.asarray(data)}
        jax.block_until_ready((self._data, self.keys))

    def rows_to_train(self):
        """Rows for training, enough for some batches."""
        count = self.spec["batch"] * self.spec["train_batches"]
        return self._rng.standard_normal((count, self.spec["dim"])).astype(np.float32)

    def x(self, rows):
        """Rows to score."""
        if rows not in self._data:
            self._data[rows] = self._data[self.spec["rows"]][:rows]
        return self._data[rows]

    def next_key(self):
        """One of many keys in turn, so that no result can be remembered."""
        self.keys.append(self.keys.pop(0))
        return self.keys[0]

    def call(self, op, rows, count):
        """Do it and wait for the device."""
        return jax.block_until_ready(getattr(self, op)(rows, count))

    def finite(self, value):
        """Whether every number is finite."""
        return all(bool(jnp.isfinite(leaf).all()) for leaf in jtu.tree_leaves(value))

    def info(self):
        device = jax.devices()[0]
        names = [module.__name__ for module in self.versions]
        return {
            "parameters": int(self.parameters),
            "versions": {name: importlib.metadata.version(name) for name in names},
            "platform": device.platform,
            "device": device.device_kind,
            # JAX takes all cores, which the script that starts the worker has counted.
            "threads": int(os.environ["OMP_NUM_THREADS"]),
        }

    def device_memory(self):
        """Bytes in use and their peak since the start, or None on a CPU.

        The peak cannot be reset: what stays under that of an earlier call reads as that call's.
        """
        stats = jax.devices()[0].memory_stats() if jax.devices()[0].platform != "cpu" else None
        return stats and (stats["bytes_in_use"], stats["peak_bytes_in_use"])

    def work(self, op, rows):
        """Known operations or bytes of a call."""
        return {}

    def analyse(self, rows):
        return {}
