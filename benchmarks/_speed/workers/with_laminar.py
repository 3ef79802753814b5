"""laminar: the flow's own methods, the compiled segment of `fit`, and the floor beside them."""

from typing import Any

import equinox as eqx
import floor
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from on_jax import JaxAdapter, randomised

import laminar
from laminar import zoo
from laminar._params import partition
from laminar._typing import Array
from laminar.bijections.base import Invert
from laminar.bijections.compose import Chain, Permute, repeat
from laminar.bijections.coupling import coupling
from laminar.bijections.splines import RationalQuadratic
from laminar.density import _chunk_size
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.nn.mlp import Dense
from laminar.objectives import Batch
from laminar.train.clock import _LENGTH
from laminar.train.feed import ArrayFeed, Placement
from laminar.train.fit import _segment
from laminar.train.source import seed_words
from laminar.train.state import Recipe, init, step


class Hidden(eqx.Module):
    """A plain hidden layer in the place of a residual block."""

    dense: Dense

    def __call__(self, h: Array, condition: Array | None = None) -> Array:
        return self.dense(jax.nn.relu(h))


def is_empty(x) -> bool:
    """Whether x is the tuple of no blocks, which is otherwise no leaf."""
    return isinstance(x, tuple) and not x


def coupling_flow(spec: dict) -> Flow:
    """The stack that `zoo.nsf` builds, halves swapped from layer to layer.

    Its network is residual, with two products of width² in a block, where those of the rivals'
    couplings have two hidden layers and one such product. So here a plain layer stands in the place
    of the blocks.
    """
    dim, width = spec["dim"], spec["width"]
    template = RationalQuadratic(spec["bins"], interval=(-spec["interval"], spec["interval"]))

    def layer(at):
        order, key = at
        net_key, hidden_key = jr.split(key)
        inner = coupling(dim, template, width=width, depth=0, key=net_key)
        hidden = (Hidden(Dense(width, width, key=hidden_key)),)
        inner = eqx.tree_at(lambda c: c.net.blocks, inner, hidden, is_leaf=is_empty)
        move = Permute(jnp.argsort(order))
        return Chain([move, inner, Invert(move)])

    forth = jnp.arange(dim)
    orders = jnp.stack([forth[::-1] if i % 2 else forth for i in range(spec["layers"])])
    keys = jr.split(jr.key(0), spec["layers"])
    return Flow(Normal(dim), repeat(layer, spec["layers"], over=(orders, keys)))


def flow_of(spec: dict) -> Flow:
    """The flow, its parameters randomised."""
    if spec["arch"] == "nsf_coupling":
        flow = coupling_flow(spec)
    else:
        shared = {"key": jr.key(0), "layers": spec["layers"], "width": spec["width"], "depth": 2}
        if spec["arch"] == "maf":
            flow = zoo.maf(spec["dim"], **shared)
        else:
            flow = zoo.nsf(spec["dim"], bins=spec["bins"], interval=spec["interval"], **shared)
    trained, rest = partition(flow)
    return eqx.combine(randomised(trained), rest)


class Adapter(JaxAdapter):
    versions = (laminar, jax, eqx)

    def build(self, spec):
        self.prepare(spec)
        self.flow = flow_of(spec)
        trained, _ = partition(self.flow)
        self.parameters = sum(leaf.size for leaf in jtu.tree_leaves(trained))
        self.recipe = Recipe(self.flow, steps=1_000_000, learning_rate=spec["rate"])
        rows: Any = self.rows_to_train()
        self.feed = ArrayFeed(Batch(rows), None, seed_words(jr.key(4)), spec["batch"], Placement())
        self.state = init(jr.key(5), self.flow, self.recipe)
        self.taken = 0
        self.floor = floor.Floor(spec)
        jax.block_until_ready((self.flow, self.state))

    def step(self, rows, count):
        """Segments as `fit` calls them: batches are drawn from the rows on the device."""
        record: Any = None
        now = 0
        while count:
            now = min(count, _LENGTH)
            batches = self.feed.segment(self.taken, now, 0)
            length = jnp.asarray(now, jnp.int32)
            fixed = (self.recipe, batches, length, _LENGTH, Placement())
            self.state, record = _segment(fixed, self.state)
            self.taken, count = self.taken + now, count - now
        return record.loss[now - 1]

    def log_prob(self, rows, count):
        return self.flow.log_prob(self.x(rows))

    def sample(self, rows, count):
        return self.flow.sample(self.next_key(), (rows,))

    def call(self, op, rows, count):
        if op in floor.OPS:
            return jax.block_until_ready(self.floor.call(op, rows, count))
        return super().call(op, rows, count)

    def work(self, op, rows):
        return self.floor.work(op, rows)

    def analyse(self, rows):
        """What XLA counts in programs of one layer, times the number of layers.

        It counts the body of a loop once, so the program of all layers, which scans over them,
        cannot be asked. What layers share, such as the base, is counted with each. For the same
        reason log_prob is asked about one of the chunks into which it cuts the rows.
        """
        spec = self.spec | {"layers": 1}
        flow, layers = flow_of(spec), self.spec["layers"]
        recipe = Recipe(flow, steps=1_000_000)
        batch = Batch(jnp.zeros((spec["batch"], spec["dim"])))
        size = _chunk_size(rows, self.flow._row_cost("forward"), None)
        score: Any = eqx.filter_jit(lambda flow, x: flow.log_prob(x, batch_size=size))
        times = {"log_prob": layers * -(-rows // size), "step": layers}
        update: Any = eqx.filter_jit(step)
        programs = {
            "log_prob": score.lower(flow, self.x(size)),
            "step": update.lower(init(jr.key(0), flow, recipe), batch, recipe),
        }
        found = {}
        for op, lowered in programs.items():
            cost = lowered.compile().compiled.cost_analysis() or {}
            names = {"flops": "flops", "bytes": "bytes accessed"}
            found[op] = {n: times[op] * cost.get(key, float("nan")) for n, key in names.items()}
        return found
