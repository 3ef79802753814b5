"""A bijection of one's own: define it, test it, train it, check the result, save it.

The map bends the plane, y = (x_1, x_2 + a x_1²), with a trained number a. `check_bijection` runs
on it the tests that every bijection of the library passes.
"""

import os

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr

import laminar
from laminar.testing import check_bijection

STEPS = int(os.environ.get("LAMINAR_EXAMPLE_STEPS", "500"))


@laminar.register
class Bend(laminar.AbstractBijection):
    """y_1 = x_1, y_2 = x_2 + a x_1²; the Jacobian is triangular with ones on its diagonal."""

    a: jax.Array
    in_shape: tuple = eqx.field(static=True, default=(2,))
    out_shape: tuple = eqx.field(static=True, default=(2,))
    cond_shape: None = eqx.field(static=True, default=None)

    def forward(self, x, condition=None, *, key=None):
        """The bend, with log-det zero."""
        return jnp.stack([x[0], x[1] + self.a * x[0] ** 2]), jnp.zeros((), x.dtype)

    def inverse(self, y, condition=None, *, key=None):
        """The bend undone."""
        return jnp.stack([y[0], y[1] - self.a * y[0] ** 2]), jnp.zeros((), y.dtype)


data_key, fit_key, check_key = jr.split(jr.key(0), 3)
check_bijection(Bend(jnp.array(0.7)), key=check_key)

truth = laminar.Flow(laminar.Normal(2), Bend(jnp.array(0.5)))
x = truth.sample(data_key, (4000,))
flow = laminar.Flow(laminar.Normal(2), Bend(jnp.array(0.0)))
flow, history = laminar.fit(fit_key, flow, x, steps=STEPS, learning_rate=1e-2)
print(f"a = {flow.bijection.a:.3f}, and 0.5 in truth")
print(laminar.check(flow, key=check_key))

laminar.save("bend.laminar", flow)
assert jnp.array_equal(laminar.load("bend.laminar").log_prob(x), flow.log_prob(x))
