"""The pure core of training: `init` makes a state, `step` turns a state and a batch into the next.

    recipe = Recipe(flow, steps=1_000)
    state = init(key, flow, recipe)
    state, info = step(state, batch, recipe)        # jit, scan, vmap it as you like

`fit` runs the same two functions inside compiled segments. `validate` is the third one: it measures
the held-out loss and keeps the best parameters, on the device.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax

from laminar._errors import InputError
from laminar._params import Frozen, trainable
from laminar._typing import Array, PRNGKeyArray, PyTree
from laminar.bijections.base import AbstractTransform
from laminar.bijections.compose import Independent, Repeat
from laminar.density import AbstractDistribution
from laminar.objectives import Batch, nll

Schedule = Literal["cosine", "constant"]
Objective = Callable[..., tuple[Array, dict]]

MOST_STEPS = 2**31 - 2  # steps are counted in 32 bits
_NEVER = 2**31 - 1
_WARMUP = 100


class Rate(eqx.Module):
    """The learning rate as a function of the step.

        rate(t) = peak · min(1, (t + 1) / warmup) · shape(t) · tail(t)

    shape is ½ (1 + cos π s) with s the part of the budget after the warm-up that is done, or 1 for
    a constant schedule; tail is ``level`` up to step ``decay_from`` and falls linearly to 0 over
    the ``decay_steps`` steps that follow (level is 1 and nothing falls, unless set by `decaying`).
    """

    peak: Array
    warmup: Array
    steps: Array
    level: Array
    decay_from: Array
    decay_steps: Array
    schedule: Schedule = eqx.field(static=True)

    def __init__(self, peak: float, steps: int | None, schedule: Schedule, warmup: int | None):
        if schedule not in ("cosine", "constant"):
            raise InputError(f"schedule is {schedule!r}; choose 'cosine' or 'constant'.")
        if not (math.isfinite(peak) and peak > 0):
            raise InputError(f"learning_rate is {peak}; give a positive number.")
        if schedule == "cosine" and steps is None:
            raise InputError("A cosine schedule needs the number of steps; give steps=.")
        if steps is not None and not 1 <= steps <= MOST_STEPS:
            raise InputError(f"steps is {steps}; give a whole number from 1 to {MOST_STEPS:,}.")
        total = _NEVER if steps is None else steps
        if warmup is None:
            warmup = min(_WARMUP, total // 20)
        self.peak = jnp.asarray(peak, jnp.float32)
        self.warmup = jnp.asarray(warmup, jnp.int32)
        self.steps = jnp.asarray(total, jnp.int32)
        self.level = jnp.ones((), jnp.float32)
        self.decay_from = jnp.asarray(_NEVER, jnp.int32)
        self.decay_steps = jnp.asarray(1, jnp.int32)
        self.schedule = schedule

    def __call__(self, step: Array) -> Array:
        """The rate of a step, float32."""
        t = step.astype(jnp.float32)
        warmup = self.warmup.astype(jnp.float32)
        rate = self.peak * jnp.minimum(1.0, (t + 1) / jnp.maximum(warmup, 1.0))
        if self.schedule == "cosine":
            left = jnp.maximum(self.steps.astype(jnp.float32) - warmup, 1.0)
            done = jnp.clip((t - warmup) / left, 0.0, 1.0)
            rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * done))
        # The difference is taken in integers, where it is exact at any step.
        past = jnp.maximum(step - self.decay_from, 0).astype(jnp.float32)
        left = jnp.maximum(1 - past / self.decay_steps.astype(jnp.float32), 0.0)
        return rate * self.level * left

    def decaying(self, start: int, steps: int, level: float = 1.0) -> "Rate":
        """The same rate with a final linear decay from `level` to zero over some steps."""
        values = (
            jnp.asarray(level, jnp.float32),
            jnp.asarray(start, jnp.int32),
            jnp.asarray(max(steps, 1), jnp.int32),
        )
        return eqx.tree_at(lambda r: (r.level, r.decay_from, r.decay_steps), self, values)


class Recipe(eqx.Module):
    """Everything a step needs besides the state and the batch.

    Args:
        flow: What is trained; only its structure is looked at.
        objective: ``(flow, batch, key) -> (loss, aux)``; with a keyword ``step`` it is also given
            the number of the step.
        steps: Budget, which the cosine schedule needs.
        learning_rate: Peak rate of the built-in optimiser, AdamW.
        schedule: ``"cosine"`` or ``"constant"``. None means cosine where the number of steps is
            known, and constant with an `optimizer` of one's own, whose updates the schedule
            multiplies.
        warmup: Steps of linear increase; by default a twentieth of `steps`, at most 100, and none
            with an `optimizer` of one's own.
        optimizer: Any Optax transformation, learning rate included; it replaces AdamW, and
            `learning_rate` and `weight_decay` then mean nothing.
        clip: Gradients of greater global norm are scaled down to it; None does not clip.
        weight_decay: Decoupled decay of the weight matrices of networks (Loshchilov & Hutter 2019).
        ema: Decay of an exponential moving average of the parameters, or None.
        freeze: ``lambda flow: subtree`` (or a tuple of subtrees) not to be trained.
        max_rollbacks: How many non-finite steps are taken back before the state freezes.

    Raises:
        InputError: If a value is out of range, or `freeze` does not point into the flow.
    """

    objective: Objective
    transform: optax.GradientTransformation
    rate: Rate
    spec: PyTree
    clip: float | None
    ema: float | None
    max_rollbacks: int

    def __init__(
        self,
        flow: PyTree,
        *,
        objective: Objective = nll,
        steps: int | None = None,
        learning_rate: float = 3e-3,
        schedule: Schedule | None = None,
        warmup: int | None = None,
        optimizer: optax.GradientTransformation | None = None,
        clip: float | None = 5.0,
        weight_decay: float = 1e-4,
        ema: float | None = None,
        freeze: Callable[[Any], Any] | None = None,
        max_rollbacks: int = 5,
    ):
        _check_options(clip, weight_decay, ema, max_rollbacks)
        self.objective = objective
        self.spec = training_spec(flow, freeze)
        self.clip, self.ema, self.max_rollbacks = clip, ema, max_rollbacks
        if optimizer is None:
            self.transform = _adamw(weight_decay)
            schedule = schedule or ("constant" if steps is None else "cosine")
        else:
            if not hasattr(optimizer, "update"):
                raise InputError("optimizer must be an Optax transformation, as optax.adam(1e-3).")
            self.transform = optax.with_extra_args_support(optimizer)
            learning_rate, schedule = 1.0, schedule or "constant"
            warmup = warmup or 0
        self.rate = Rate(learning_rate, steps, schedule, warmup)


@functools.lru_cache(maxsize=64)
def _adamw(weight_decay: float) -> optax.GradientTransformation:
    """AdamW at rate one; kept, so that a second training of like shapes compiles nothing."""
    decay = [optax.add_decayed_weights(weight_decay, decay_mask)] if weight_decay else []
    return optax.chain(optax.scale_by_adam(), *decay, optax.scale(-1.0))


def _check_options(clip, weight_decay, ema, max_rollbacks) -> None:
    if clip is not None and not clip > 0:
        raise InputError(f"clip is {clip}; give a positive norm, or None not to clip.")
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise InputError(f"weight_decay is {weight_decay}; give a number from 0 upwards.")
    if ema is not None and not 0 < ema < 1:
        raise InputError(f"ema is {ema}; give a decay between 0 and 1, such as 0.999, or None.")
    if max_rollbacks < 1:
        raise InputError(f"max_rollbacks is {max_rollbacks}; give at least 1.")


class TrainState(eqx.Module):
    """Where training stands; a pytree, saved whole in a checkpoint.

    Attributes:
        model: The flow, with the current parameters.
        opt: State of the optimiser.
        good: Parameters and optimiser state to fall back on: those at the latest validation with a
            finite loss.
        ema: Averaged parameters, or None.
        best: The parameters with the lowest validation loss so far.
        best_loss, best_step: That loss (inf before any), and after how many steps it was reached.
        step: Steps taken, the refused ones included.
        key: Step t uses ``fold_in(key, t)``.
        scale: Factor on the learning rate, halved at every non-finite step.
        in_a_row: Non-finite steps since the last finite one.
        rollbacks: Non-finite steps in all.
        failed_at: The latest non-finite step, −1 before any.
    """

    model: PyTree
    opt: PyTree
    good: tuple[PyTree, PyTree]
    ema: PyTree
    best: PyTree
    best_loss: Array
    best_step: Array
    step: Array
    key: PRNGKeyArray
    scale: Array
    in_a_row: Array
    rollbacks: Array
    failed_at: Array


class Info(NamedTuple):
    """What a step tells: the loss on its batch, the learning rate, and the gradient's norm."""

    loss: Array
    rate: Array
    norm: Array


def init(key: PRNGKeyArray, flow: PyTree, recipe: Recipe) -> TrainState:
    """The state before the first step.

    Args:
        key: Random key of the objective's draws.
        flow: The flow to begin from; its arrays are copied.
        recipe: What it will be trained with.
    """

    def copy(tree):
        return jtu.tree_map(lambda x: x.copy() if eqx.is_array(x) else x, tree)

    params = eqx.filter(flow, recipe.spec)
    if not jtu.tree_leaves(params):
        raise InputError("There is nothing to train: every parameter of the flow is frozen.")
    opt = recipe.transform.init(params)

    def count(value=0):
        return jnp.asarray(value, jnp.int32)

    return TrainState(
        model=copy(flow),
        opt=copy(opt),
        good=(copy(params), copy(opt)),
        ema=None if recipe.ema is None else copy(params),
        best=copy(params),
        best_loss=jnp.asarray(jnp.inf, jnp.float32),
        best_step=count(),
        step=count(),
        key=key,
        scale=jnp.ones((), jnp.float32),
        in_a_row=count(),
        rollbacks=count(),
        failed_at=count(-1),
    )


def step(state: TrainState, batch: Batch, recipe: Recipe) -> tuple[TrainState, Info]:
    """One step of gradient descent; pure.

    A step whose loss, gradient or update is not finite is not taken: parameters and optimiser stay
    as they were, and the learning rate is halved. If the step before failed as well, the parameters
    themselves are suspect, and both go back to ``state.good``. At the last rollback that the recipe
    allows the state freezes as it is, so that what failed can be looked at.
    """
    params, rest = eqx.partition(state.model, recipe.spec)

    def loss_of(params):
        key = jr.fold_in(state.key, state.step)
        model = eqx.combine(params, rest)
        if _takes_step(recipe.objective):
            return recipe.objective(model, batch, key, step=state.step)
        return recipe.objective(model, batch, key)

    (loss, _), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(params)
    norm = optax.tree.norm(grads)
    if recipe.clip is not None:
        factor = jnp.minimum(1.0, recipe.clip / jnp.maximum(norm, 1e-30)).astype(norm.dtype)
        grads = _scaled(grads, factor)
    # Optax mixes dtypes, which a user's strict settings may forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, opt = recipe.transform.update(grads, state.opt, params)
    rate = recipe.rate(state.step) * state.scale
    updates = _scaled(updates, rate)
    new = jtu.tree_map(lambda p, u: p + u.astype(p.dtype), params, updates)

    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
    halted = state.rollbacks >= recipe.max_rollbacks
    failed = ~finite & ~halted
    rollbacks = state.rollbacks + failed.astype(jnp.int32)
    accept = finite & ~halted
    restore = failed & (state.in_a_row >= 1) & (rollbacks < recipe.max_rollbacks)

    def select(new, old, good):
        kept = jtu.tree_map(lambda o, g: jnp.where(restore, g, o), old, good)
        return jtu.tree_map(lambda n, k: jnp.where(accept, n, k), new, kept)

    params = select(new, params, state.good[0])
    ema = state.ema
    if recipe.ema is not None:
        ema = _averaged(ema, params, state.step, recipe.ema, accept)
    return TrainState(
        model=eqx.combine(params, rest),
        opt=select(opt, state.opt, state.good[1]),
        good=state.good,
        ema=ema,
        best=state.best,
        best_loss=state.best_loss,
        best_step=state.best_step,
        step=state.step + 1,
        key=state.key,
        scale=jnp.where(failed, state.scale * 0.5, state.scale),
        in_a_row=jnp.where(finite, 0, jnp.where(failed, state.in_a_row + 1, state.in_a_row)),
        rollbacks=rollbacks,
        failed_at=jnp.where(failed, state.step, state.failed_at),
    ), Info(loss.astype(jnp.float32), rate, norm.astype(jnp.float32))


def _takes_step(objective: Objective) -> bool:
    """Whether an objective wants the number of the step, for annealing."""
    try:
        return "step" in inspect.signature(objective).parameters
    except ValueError:  # a callable written in C has no signature
        return False


def _scaled(tree: PyTree, factor: Array) -> PyTree:
    return jtu.tree_map(lambda x: x * factor.astype(x.dtype), tree)


def _averaged(ema, params, step, decay, accept):
    """The moving average, quicker at the start, where there is little to average."""
    t = step.astype(jnp.float32)
    keep = jnp.where(accept, jnp.minimum(decay, (1 + t) / (10 + t)), 1.0)

    def mean(e, p):
        k = keep.astype(e.dtype)
        return k * e + (1 - k) * p

    return jtu.tree_map(mean, ema, params)


class Assessment(NamedTuple):
    """Held-out losses of the parameters and of their average (NaN without one)."""

    loss: Array
    ema_loss: Array


def validate(
    state: TrainState, chunks: Batch, key: PRNGKeyArray, recipe: Recipe
) -> tuple[TrainState, Assessment]:
    """Measure the held-out loss and keep the best parameters.

    Args:
        state: The state.
        chunks: All held-out rows as batches of one size, stacked along a leading axis, with
            weights (zero for padding).
        key: The same at every call, so that losses can be compared.
        recipe: The recipe.

    Returns:
        The state with ``best`` and ``good`` brought up to date, and the losses.
    """
    params, rest = eqx.partition(state.model, recipe.spec)

    def loss_of(params):
        return _mean_loss(eqx.combine(params, rest), chunks, key, recipe.objective)

    if state.ema is None:
        loss, ema_loss = loss_of(params), jnp.full((), jnp.nan, jnp.float32)
    else:
        # One after the other in a loop, so that the density is compiled once and not twice.
        both = jtu.tree_map(lambda *leaves: jnp.stack(leaves), params, state.ema)
        loss, ema_loss = lax.map(loss_of, both)
    best, best_loss, best_step = state.best, state.best_loss, state.best_step

    def consider(candidate, value):
        # A loss of −inf is a failure too; as the best one it would stay for ever.
        better = jnp.isfinite(value) & (value < best_loss)
        chosen = jtu.tree_map(lambda c, b: jnp.where(better, c, b), candidate, best)
        return (
            chosen,
            jnp.where(better, value, best_loss),
            jnp.where(better, state.step, best_step),
        )

    best, best_loss, best_step = consider(params, loss)
    if state.ema is not None:
        best, best_loss, best_step = consider(state.ema, ema_loss)
    sound = jnp.isfinite(loss) & (state.in_a_row == 0)
    good = jtu.tree_map(lambda n, g: jnp.where(sound, n, g), (params, state.opt), state.good)
    state = eqx.tree_at(
        lambda s: (s.best, s.best_loss, s.best_step, s.good),
        state,
        (best, best_loss, best_step, good),
        is_leaf=lambda x: x is None,
    )
    return state, Assessment(loss, ema_loss)


def _mean_loss(model, chunks: Batch, key, objective: Objective) -> Array:
    """The weighted mean of the chunks' weighted means, float32."""

    def body(carry, chunk):
        total, weight, i = carry
        options = {"step": None} if _takes_step(objective) else {}
        loss, _ = objective(model, chunk, jr.fold_in(key, i), **options)
        w = chunk.weights.sum().astype(jnp.float32)
        total = total + jnp.where(w > 0, w * loss.astype(jnp.float32), 0.0)
        return (total, weight + w, i + 1), None

    zero = jnp.zeros((), jnp.float32)
    (total, weight, _), _ = lax.scan(body, (zero, zero, jnp.zeros((), jnp.int32)), chunks)
    return total / weight


class _Frozen(eqx.Module):
    """Marks what `freeze` pointed to."""


def training_spec(flow: PyTree, freeze: Callable[[Any], Any] | None = None) -> PyTree:
    """Which leaves of a flow are trained: those of `_params.trainable`, less those of `freeze`.

    Returns:
        A tree of booleans with the structure of the flow.

    Raises:
        InputError: If `freeze` returns something that is not a part of the flow.
    """
    marked = flow
    if freeze is not None:
        try:
            marked = eqx.tree_at(freeze, flow, replace_fn=lambda _: _Frozen())
        except (ValueError, AttributeError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(
                "freeze must return parts of the flow, as lambda flow: flow.base; "
                f"it failed with: {error}"
            ) from error

    def is_frozen(x):
        return isinstance(x, _Frozen | Frozen)

    prefix = jtu.tree_map(
        lambda x: not is_frozen(x) and bool(trainable(x)), marked, is_leaf=is_frozen
    )
    return jtu.tree_map(lambda on, sub: jtu.tree_map(lambda _: on, sub), prefix, flow)


def decay_mask(tree: PyTree) -> PyTree:
    """Which leaves of a tree decay: the weight matrices of networks.

    That is, arrays of two or more axes, stacking axes of `Repeat` and `Independent` not counted,
    whose name does not contain "bias" and whose owner is neither a transform nor a distribution:
    the parameters of those are a template, a location or a covariance, which zero does not suit.
    """

    def visit(node, axes: int, name: str, inside: bool):
        if eqx.is_array(node):
            return inside and node.ndim - axes >= 2 and "bias" not in name
        if isinstance(node, AbstractTransform | AbstractDistribution):
            inside = False
            if isinstance(node, Repeat) or (isinstance(node, Independent) and node.stacked):
                axes += 1
        elif isinstance(node, eqx.Module):
            inside = True
        children, structure = jtu.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
        if len(children) == 1 and children[0][1] is node:
            return False
        done = []
        for path, child in children:
            # Elements of a tuple or list go by the name of the field that holds it.
            label = path[-1].name if isinstance(path[-1], jtu.GetAttrKey) else name
            done.append(visit(child, axes, label, inside))
        return jtu.tree_unflatten(structure, done)

    return visit(tree, 0, "", False)
