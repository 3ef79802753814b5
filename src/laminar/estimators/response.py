"""Fitting the law of one number given a vector: several members at once, in one compiled program.

Rows fall into folds. Member m trains on all folds but its own, is stopped by its own, and gives the
log-density of its rows: so every row is held out once, and nearly all of them train every member.
The members run side by side under `vmap`, and validation, early stopping and the choice of the best
parameters are inside the program. Its shapes depend on the number of rows only through the next
power of two (or one and a half times that), so fits of like size compile once between them.
"""

import dataclasses
import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from laminar._errors import TrainingError
from laminar._lengths import bucket
from laminar._typing import Array, PRNGKeyArray
from laminar.estimators.law import TAIL_DF, make_law, make_members
from laminar.flow import Flow
from laminar.objectives import Batch, nll
from laminar.train.mixtures import apply_knots, fit_knots, stack
from laminar.train.state import Recipe, TrainState, init, step

_LEAST_TAIL = 1e-4
_LEAST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the members are, and how they are trained.

    Attributes:
        width: Hidden units of each network.
        depth: Its residual blocks.
        bins: Bins of each spline.
        steps: Steps of gradient descent, at most.
        batch_size: Rows of one step.
        learning_rate: Its peak.
        weight_decay: Of the networks' matrices.
        ema: Decay of the averaged parameters.
        rounds: How many validations the steps are cut into.
        patience: Validations without a better one after which training ends.
    """

    width: int
    depth: int
    bins: int
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    ema: float = 0.99
    rounds: int = 40
    patience: int = 12


def sizes_for(rows: int) -> Sizes:
    """Sizes for a number of rows: wider and longer with more of them."""
    if rows < 1_000:
        return Sizes(32, 1, 6, 800, 64, 1e-3, 1.0)
    if rows < 5_000:
        return Sizes(64, 2, 8, 2_000, 128, 1e-3, 1.0)
    return Sizes(96, 2, 12, 3_000 if rows < 25_000 else 5_000, 256, 1.5e-3, 1.0, ema=0.998)


class Fitted(NamedTuple):
    """What `fit_law` found.

    Attributes:
        law: The law, with the best parameters of every member.
        held_out: The log-density of every row under the law of the member that did not see it, the
            tail included; float64 (N,).
        losses: Held-out losses, (M, 1 + rounds), the first before training; NaN after the last.
        best_round: The round of each member's best loss, (M,); 0 is before training.
    """

    law: Flow
    held_out: np.ndarray
    losses: np.ndarray
    best_round: np.ndarray


def fit_law(
    seed: int,
    value: np.ndarray,
    condition: np.ndarray,
    weights: np.ndarray,
    folds: np.ndarray,
    sizes: Sizes,
) -> Fitted:
    """Fit the law of a number given a vector.

    Args:
        seed: Of parameters, order of rows and noise.
        value: Numbers (N,); those of a grid must have had their noise.
        condition: Vectors (N, C) of about unit scale; the law takes those of `pad_condition`.
        weights: Positive weights (N,), of mean one.
        folds: The fold of each row, 0, …, M − 1, each with a row at least; M is the number of
            members.
        sizes: Of networks and training.

    Raises:
        TrainingError: When no member ever has a finite held-out loss.
    """
    made_key, state_key, train_key = jr.split(jr.key(seed), 3)
    count = int(folds.max()) + 1
    condition = pad_condition(condition)
    members = make_members(
        made_key,
        count,
        condition.shape[1],
        width=sizes.width,
        depth=sizes.depth,
        bins=sizes.bins,
    )
    recipe = Recipe(
        members,
        steps=sizes.steps,
        learning_rate=sizes.learning_rate,
        weight_decay=sizes.weight_decay,
        ema=sizes.ema,
    )
    knots = fit_knots(value[:, None], weights)
    latent, log_det = (part.reshape(-1) for part in apply_knots(knots, value[:, None]))
    rows = _Rows.make(latent, condition, weights, folds, members.dtype)
    state = _initial(recipe, jr.split(state_key, count), members)
    every = -(-sizes.steps // sizes.rounds)
    plan = _Plan(jnp.asarray(every, jnp.int32), jnp.asarray(sizes.patience, jnp.int32))
    state, losses = _train(recipe, state, rows, plan, train_key, sizes.batch_size, sizes.rounds)
    best_loss = np.asarray(state.best_loss)
    if not np.isfinite(best_loss).all():
        raise TrainingError(
            "No parameters with a finite held-out loss were found for the response; look for "
            "values of the target far outside the others."
        )
    best = eqx.combine(state.best, eqx.partition(state.model, recipe.spec)[1])
    held = np.asarray(_held_out(best, rows), np.float64)
    held_out = np.empty(len(value))
    for fold in range(count):
        mine = np.flatnonzero(folds == fold)
        held_out[mine] = held[fold, : len(mine)]
    tail_share, held_out = _weigh_tail(latent, held_out, weights)
    best_round = np.asarray(state.best_step) // every
    law = make_law(best, tail_share, knots)
    return Fitted(law, held_out + log_det, np.asarray(losses).T, best_round)


def pad_condition(condition: np.ndarray) -> np.ndarray:
    """The vectors (N, C) with zeros up to a multiple of eight: few lengths, so few programs."""
    return np.pad(condition, ((0, 0), (0, -condition.shape[1] % 8)))


def _weigh_tail(
    value: np.ndarray, held_out: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """The weight of the tail that suits rows held out, and their density under the mixture."""
    from scipy.stats import t as student

    tail = student.logpdf(value, TAIL_DF)
    share = float(stack(np.stack([held_out, tail], 1), weights)[1])
    share = float(np.clip(share, max(_LEAST_TAIL, 1 / (len(value) + 10)), 0.5))
    return share, np.logaddexp(np.log1p(-share) + held_out, np.log(share) + tail)


# --- the compiled program ------------------------------------------------------------------------


class _Rows(NamedTuple):
    """All rows on the device, padded, and which of them each member trains on and is stopped by.

    Attributes:
        value, condition, weights: (L,), (L, C) and (L,); rows of padding have weight zero.
        train, counts: Positions of a member's training rows, (M, L), and how many are so, (M,).
        held, held_weights: Those of its own fold, (M, H), with their weights.
    """

    value: Array
    condition: Array
    weights: Array
    train: Array
    counts: Array
    held: Array
    held_weights: Array

    @classmethod
    def make(cls, value, condition, weights, folds, dtype) -> "_Rows":
        """Pad and cast rows of the host."""
        length, members = bucket(len(value), _LEAST_ROWS, doubled=_LEAST_ROWS), int(folds.max()) + 1
        sizes = np.bincount(folds, minlength=members)
        width = bucket(int(sizes.max()), _LEAST_ROWS, doubled=_LEAST_ROWS)
        train = np.zeros((members, length), np.int32)
        held = np.zeros((members, width), np.int32)
        held_weights = np.zeros((members, width))
        for fold in range(members):
            mine, others = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
            train[fold, : len(others)] = others
            held[fold, : len(mine)] = mine
            held_weights[fold, : len(mine)] = weights[mine]
        extra = length - len(value)
        return cls(
            jnp.asarray(np.pad(value, (0, extra)), dtype),
            jnp.asarray(np.pad(condition, ((0, extra), (0, 0))), dtype),
            jnp.asarray(np.pad(weights, (0, extra)), dtype),
            jnp.asarray(train),
            jnp.asarray(len(value) - sizes, jnp.int32),
            jnp.asarray(held),
            jnp.asarray(held_weights, dtype),
        )


class _Plan(NamedTuple):
    """Numbers that the program takes as arguments.

    Attributes:
        every: Steps between validations.
        patience: Validations without a better one before the end.
    """

    every: Array
    patience: Array


@eqx.filter_jit
def _initial(recipe: Recipe, keys: PRNGKeyArray, members: Flow) -> TrainState:
    """The states of all members before training, stacked."""
    return eqx.filter_vmap(functools.partial(init, recipe=recipe))(keys, members)


@eqx.filter_jit
def _train(
    recipe: Recipe,
    state: TrainState,
    rows: _Rows,
    plan: _Plan,
    key: PRNGKeyArray,
    batch_size: int,
    rounds: int,
) -> tuple[TrainState, Array]:
    """Train until the rounds or the patience are spent; the held-out losses are (1 + rounds, M)."""
    arrays, static = eqx.partition(state, eqx.is_array)
    members = rows.counts.size
    advance = eqx.filter_vmap(step, in_axes=(eqx.if_array(0), 0, None))
    assess = eqx.filter_vmap(_keep_best, in_axes=(eqx.if_array(0), 0, None))
    held = _held_batch(rows)

    def one_step(i, arrays):
        u = jr.uniform(jr.fold_in(key, i), (members, batch_size), jnp.float32)
        place = jnp.floor(u * rows.counts[:, None].astype(jnp.float32)).astype(jnp.int32)
        place = jnp.minimum(place, rows.counts[:, None] - 1)
        index = jnp.take_along_axis(rows.train, place, axis=1)
        batch = Batch(rows.value[index][..., None], rows.condition[index], rows.weights[index])
        new, _ = advance(eqx.combine(arrays, static), batch, recipe)
        return eqx.filter(new, eqx.is_array)

    def measured(arrays):
        new, losses = assess(eqx.combine(arrays, static), held, recipe)
        return eqx.filter(new, eqx.is_array), losses

    def one_round(carry):
        done, arrays, losses = carry
        # The first round takes no step: what there is before training is measured too.
        last = done * plan.every
        arrays = lax.fori_loop(jnp.maximum(last - plan.every, 0), last, one_step, arrays)
        arrays, loss = measured(arrays)
        return done + 1, arrays, losses.at[done].set(loss)

    def goes_on(carry):
        done, arrays, _ = carry
        latest = eqx.combine(arrays, static).best_step.max() // plan.every
        return (done <= rounds) & (done - 1 - latest < plan.patience)

    losses = jnp.full((rounds + 1, members), jnp.nan, jnp.float32)
    _, arrays, losses = lax.while_loop(
        goes_on, one_round, (jnp.zeros((), jnp.int32), arrays, losses)
    )
    return eqx.combine(arrays, static), losses


def _keep_best(state: TrainState, held: Batch, recipe: Recipe) -> tuple[TrainState, Array]:
    """Measure the averaged parameters on rows held out, and keep the best.

    As `laminar.train.state.validate`, without a look at the parameters themselves, which are never
    better for long: half the program, and half the time.
    """
    params, rest = eqx.partition(state.model, recipe.spec)
    loss = nll(eqx.combine(state.ema, rest), held)[0].astype(jnp.float32)
    better = jnp.isfinite(loss) & (loss < state.best_loss)
    sound = jnp.isfinite(loss) & (state.in_a_row == 0)

    def chosen(condition, new, old):
        return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)

    new = (
        chosen(better, state.ema, state.best),
        jnp.where(better, loss, state.best_loss),
        jnp.where(better, state.step, state.best_step),
        chosen(sound, (params, state.opt), state.good),
    )
    state = eqx.tree_at(
        lambda s: (s.best, s.best_loss, s.best_step, s.good),
        state,
        new,
        is_leaf=lambda leaf: leaf is None,
    )
    return state, loss


def _held_batch(rows: _Rows) -> Batch:
    """Each member's held-out rows, (M, H, …)."""
    return Batch(rows.value[rows.held][..., None], rows.condition[rows.held], rows.held_weights)


@eqx.filter_jit
def _held_out(members: Flow, rows: _Rows) -> Array:
    """The log-density of each member's held-out rows, (M, H)."""
    batch = _held_batch(rows)

    def one(member: Flow, batch: Batch) -> Array:
        return member._log_prob(batch.x.T, batch.condition.T)

    return eqx.filter_vmap(one)(members, batch)
