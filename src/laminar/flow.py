"""Flow: a base distribution carried through a bijection."""

import jax.random as jr

from laminar._params import Frozen
from laminar._typing import PRNGKeyArray, Shape
from laminar.bijections.base import AbstractTransform, call
from laminar.density import AbstractDistribution


class Flow(AbstractDistribution):
    """The distribution of x = f(z), z ~ base."""

    base: AbstractDistribution | Frozen[AbstractDistribution]
    bijection: AbstractTransform | Frozen[AbstractTransform]

    def __init__(self, base, bijection):
        self.base, self.bijection = base, bijection

    @property
    def _base(self) -> AbstractDistribution:
        return self.base.value if isinstance(self.base, Frozen) else self.base

    @property
    def _map(self) -> AbstractTransform:
        return self.bijection.value if isinstance(self.bijection, Frozen) else self.bijection

    @property
    def shape(self) -> Shape:
        """Shape of one data event."""
        return self._map.out_shape

    @property
    def cond_shape(self):
        """Shape of one condition."""
        return self._map.cond_shape if self._base.cond_shape is None else self._base.cond_shape

    def _log_prob(self, x, condition=None, *, key=None):
        z, log_det = call(self._map, "inverse", x, condition, key=key)
        return self._base._log_prob(z, condition) + log_det

    def _sample(self, key: PRNGKeyArray, batch=(), condition=None):
        base_key, map_key = jr.split(key)
        z = self._base._sample(base_key, batch, condition)
        return call(self._map, "forward", z, condition, key=map_key)[0]

    def _sample_and_log_prob(self, key: PRNGKeyArray, batch=(), condition=None):
        base_key, map_key = jr.split(key)
        z, log_q = self._base._sample_and_log_prob(base_key, batch, condition)
        x, log_det = call(self._map, "forward", z, condition, key=map_key)
        return x, log_q - log_det
