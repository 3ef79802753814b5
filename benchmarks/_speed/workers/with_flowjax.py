"""FlowJAX: its flows under `equinox.filter_jit`, and its own training step."""

import equinox as eqx
import flowjax
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
import paramax
from flowjax.bijections import RationalQuadraticSpline
from flowjax.distributions import Normal
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from flowjax.train import step
from flowjax.train.losses import MaximumLikelihoodLoss
from flowjax.train.train_utils import get_batches
from on_jax import JaxAdapter, randomised


def is_frozen(leaf):
    return isinstance(leaf, paramax.NonTrainable)


class Adapter(JaxAdapter):
    versions = (flowjax, jax, eqx)

    def build(self, spec):
        self.prepare(spec)
        dim, bins, interval = spec["dim"], spec["bins"], spec["interval"]
        # So many inner knots make one bin more.
        spline = RationalQuadraticSpline(knots=bins - 1, interval=interval)
        builder = coupling_flow if spec["arch"] == "nsf_coupling" else masked_autoregressive_flow
        flow = builder(
            jr.key(0),
            base_dist=Normal(jnp.zeros(dim)),
            transformer=None if spec["arch"] == "maf" else spline,
            flow_layers=spec["layers"],
            nn_width=spec["width"],
            nn_depth=2,
        )
        params, static = eqx.partition(flow, eqx.is_inexact_array, is_leaf=is_frozen)
        params = randomised(params)
        self.parameters = sum(leaf.size for leaf in jtu.tree_leaves(params))
        self.flow = eqx.combine(params, static)
        self.static, self.params = static, jtu.tree_map(jnp.copy, params)
        self.optimizer = optax.adam(spec["rate"])
        self.optimum = self.optimizer.init(self.params)
        self.loss = MaximumLikelihoodLoss()
        self.score = eqx.filter_jit(lambda flow, x: flow.log_prob(x))
        self.draw = eqx.filter_jit(lambda flow, key, rows: flow.sample(key, (rows,)))
        self.batches = get_batches((jnp.asarray(self.rows_to_train()),), spec["batch"])
        jax.block_until_ready((self.flow, self.batches, self.optimum))

    def step(self, rows, count):
        """As `fit_to_data` calls it: an iteration over stacked batches, with a key for each."""
        done, loss = 0, None
        while done < count:
            for batch in zip(*self.batches, strict=True):
                self.key, key = jr.split(self.key)
                self.params, self.optimum, loss = step(
                    self.params,
                    self.static,
                    *batch,
                    optimizer=self.optimizer,
                    opt_state=self.optimum,
                    loss_fn=self.loss,
                    key=key,
                )
                done += 1
                if done == count:
                    break
        return self.params, loss

    def log_prob(self, rows, count):
        return self.score(self.flow, self.x(rows))

    def sample(self, rows, count):
        return self.draw(self.flow, self.next_key(), rows)
