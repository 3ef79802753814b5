"""The training loop: compiled segments of many steps, one synchronisation with the host for each.

A segment is one compiled loop whose number of steps is an argument, so one program serves every
segment, and where the host cuts has no influence on the numbers: what happens at fixed steps
(validation, the end) depends on the step alone. That is why a run that was killed and resumed ends
with the same bits as one that was not.
"""

import dataclasses
import inspect
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from laminar._errors import InputError, TrainingError
from laminar._files import PathLike
from laminar._params import Frozen
from laminar._typing import Array, PRNGKeyArray, PyTree
from laminar.bijections.base import AbstractTransform, Invert
from laminar.bijections.compose import Chain, Indexed, Repeat
from laminar.density import check_key
from laminar.flow import Flow
from laminar.objectives import Batch, nll
from laminar.train.blame import find_blame
from laminar.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, static_hash
from laminar.train.clock import Clock
from laminar.train.feed import (
    ArrayFeed,
    NoFeed,
    Nothing,
    Placement,
    Rows,
    Stack,
    StreamFeed,
    digest,
    place,
    prepare,
    same_draws,
    stack_held_out,
)
from laminar.train.history import History
from laminar.train.progress import Progress
from laminar.train.source import seed_words
from laminar.train.state import (
    MOST_STEPS,
    Assessment,
    Info,
    Objective,
    Recipe,
    Schedule,
    TrainState,
    init,
    step,
    validate,
)

T = TypeVar("T")

OTHER_DOORS: dict[type, Callable] = {}
"""What may be given in place of a flow, and what then fits it: put here by the modules that train
their flows by `fit`, which it cannot know."""

_INIT_ROWS = 4096
_STEPS_WITHOUT_DATA = 5_000
_VALIDATION_KEYS = 16


def fit(
    key: PRNGKeyArray,
    flow: T,
    data: Any = None,
    *,
    condition: PyTree = None,
    weights: Any = None,
    validation: float | Batch | None = 0.1,
    objective: Objective = nll,
    steps: int | None = None,
    batch_size: int = 256,
    learning_rate: float = 3e-3,
    schedule: Schedule | None = None,
    optimizer: optax.GradientTransformation | None = None,
    clip: float | None = 5.0,
    weight_decay: float = 1e-4,
    ema: float | None = None,
    patience: int | None = 20,
    validate_every: int | None = None,
    time_limit: float | None = None,
    freeze: Callable[[T], Any] | None = None,
    warm_start: bool = False,
    max_rollbacks: int = 5,
    checkpoint: PathLike | Checkpoint | None = None,
    resume: bool = False,
    devices: int | Sequence[Any] | Mesh | None = None,
    progress: bool | None = None,
) -> tuple[T, History]:
    """Train a flow on data.

    Args:
        key: Random key. It decides the validation split, the order of rows and the objective's
            draws, so the same call gives the same bits.
        flow: The flow to train. It is not changed; its arrays are copied once. Or a `Preset` (see
            `laminar.zoo.preset`), to be given the best density for the table:
            `laminar.train.density.fit_density`, whose options are then all that count.
        data: Rows along the first axis: an array; a `Batch`; or a source: `ArraySource`,
            `MappedSource` for arrays larger than memory, or a stream of one's own
            (`laminar.train.Stream`). A memory-mapped array is read as a `MappedSource`. None is for
            objectives that make their own draws, such as `laminar.objectives.reverse_kl`.
        condition: One condition for each row of an array.
        weights: One non-negative weight for each row of an array, honoured in validation too.
        validation: Fraction of the rows to hold out, or a `Batch` of held-out rows, or None. The
            rows held out depend on `key` alone, and all of them are used every time. Of a
            `MappedSource` at most 100,000 rows are held out. Without data, unless None or 0: the
            mean loss under 16 keys, always the same ones.
        objective: ``(flow, batch, key) -> (loss, aux)``, a weighted mean over the batch. One with a
            keyword ``step`` is given the number of the step.
        steps: Steps of gradient descent; by default about 50 epochs, at least 2,000 and at most
            20,000 (5,000 without data), or no limit when there is a `time_limit`.
        batch_size: Rows for each step, at most all of them.
        learning_rate: Peak rate, after a short warm-up.
        schedule: ``"cosine"``, down to zero at the last step, or ``"constant"``. None means cosine,
            but constant under a time limit or with an `optimizer` of one's own.
        optimizer: Any Optax transformation, learning rate included, in place of AdamW; a schedule
            multiplies its updates.
        clip: Largest global norm of a gradient, or None.
        weight_decay: Decay of the weight matrices of networks, decoupled as in AdamW.
        ema: Decay of a moving average of the parameters, such as 0.999. The average is validated
            too and returned where it is better (or always, without validation).
        patience: Stop after so many validations without a better one; None never does.
        validate_every: Steps between validations, by default a fiftieth of the budget, or more
            where validation would take a large part of the time, with four earlier ones in the
            first interval.
        time_limit: Seconds in all, compilation included. The rate is constant and falls linearly to
            zero over the last fifth, so the result depends on the machine's speed.
        freeze: ``lambda flow: flow.base`` (or a tuple of parts): what is not trained.
        warm_start: Go on from the flow as it is: data-dependent initialisation (ActNorm) is
            skipped.
        max_rollbacks: Non-finite steps that are taken back, each halving the rate, before training
            stops with an error.
        checkpoint: A file for the whole state of training, by default saved every minute; or a
            `Checkpoint` that says when.
        resume: Go on from the checkpoint if it exists. With a budget of steps the result has the
            same bits as that of an uninterrupted run.
        devices: Share each batch among devices: how many, which, or a mesh of one axis. Parameters
            and data are replicated.
        progress: Show progress on standard error; None shows it on a terminal only.

    Returns:
        The flow with the parameters of the lowest held-out loss (the last ones without validation),
        the initial ones included, and the history.

    Raises:
        InputError: If data, options or checkpoint do not fit.
        TrainingError: If training stays non-finite; it names the step, the part of the flow and
            the rows.
    """
    check_key("fit", key)
    door = next((door for kind, door in OTHER_DOORS.items() if isinstance(flow, kind)), None)
    if door is not None:
        given = _options_given(locals())
        shown = (checkpoint, resume, progress, given)
        arguments = (key, flow, data, condition, weights, validation, time_limit, *shown)
        return door(*arguments)
    begun = time.monotonic()
    _check_budget(steps, batch_size, patience, validate_every, time_limit, schedule)
    shuffle_key, split_key, step_key, validation_key = jr.split(key, 4)
    placement = place(devices)
    split_seed = np.asarray(seed_words(split_key))
    if data is None:
        _check_without_data(objective, condition, weights, validation, placement)
        feed, held_out = NoFeed(), same_draws(_VALIDATION_KEYS) if validation else None
    else:
        source, rows, held_out = prepare(flow, data, condition, weights, validation, split_seed)
        feed = _make_feed(flow, source, rows, seed_words(shuffle_key), batch_size, placement)
    try:
        if steps is None and time_limit is None:
            steps = _default_steps(feed)
        clock = Clock(begun, steps, time_limit, validate_every, feed, held_out)
        recipe = Recipe(
            flow,
            objective=objective,
            steps=steps,
            learning_rate=learning_rate,
            schedule="constant" if time_limit is not None else schedule,
            optimizer=optimizer,
            clip=clip,
            weight_decay=weight_decay,
            ema=ema,
            freeze=freeze,
            max_rollbacks=max_rollbacks,
        )
        if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint(checkpoint)
        run = _Run(feed, clock, checkpoint, {}, placement, patience)
        run.settings = _settings(key, flow, recipe, run, held_out, learning_rate, weight_decay)
        state, history = run.start(step_key, flow, recipe, warm_start, resume)
        chunks = held_out
        if held_out is not None and data is not None:
            chunks = stack_held_out(held_out, feed.size, placement)
        with Progress(progress, steps, time_limit) as shown:
            state, history = run.loop(state, history, recipe, chunks, validation_key, shown)
            shown.finish(_closing_words(history))
        return _result(state, history, recipe, placement), history
    finally:
        feed.close()


def _options_given(arguments: dict[str, Any]) -> dict[str, bool]:
    """For each option that a preset decides itself, whether the call of `fit` changed it."""
    shared = (
        "condition",
        "weights",
        "validation",
        "time_limit",
        "checkpoint",
        "resume",
        "progress",
    )
    options = [p for p in inspect.signature(fit).parameters.values() if p.kind == p.KEYWORD_ONLY]
    return {p.name: arguments[p.name] != p.default for p in options if p.name not in shared}


def _check_budget(steps, batch_size, patience, validate_every, time_limit, schedule) -> None:
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("patience", patience),
        ("validate_every", validate_every),
    ):
        # The bound first, as int() refuses what is infinite.
        if value is not None and not (1 <= value <= MOST_STEPS and value == int(value)):
            raise InputError(f"{name} is {value}; give a whole number from 1 to {MOST_STEPS:,}.")
    if time_limit is not None and not 0 < time_limit < math.inf:
        raise InputError(f"time_limit is {time_limit}; give a positive number of seconds.")
    if time_limit is not None and schedule == "cosine":
        raise InputError(
            "A cosine schedule needs a budget of steps; under a time limit the rate is constant "
            "with a final decay, so leave schedule out."
        )


def _check_without_data(objective, condition, weights, validation, placement: Placement) -> None:
    if objective is nll:
        raise InputError(
            "fit: nll needs data; give rows, or an objective that makes its own draws."
        )
    if condition is not None or weights is not None or isinstance(validation, Batch):
        raise InputError(
            "fit: conditions, weights and held-out rows belong to data; none is given."
        )
    if placement.devices > 1:
        raise InputError("fit: devices share the rows of a batch; without data there are none.")


def _default_steps(feed: "ArrayFeed | StreamFeed | NoFeed") -> int:
    if isinstance(feed, NoFeed):
        return _STEPS_WITHOUT_DATA
    return int(np.clip(50 * feed.steps_per_epoch, 2_000, 20_000))


def _settings(key, flow, recipe: Recipe, run: "_Run", held_out, rate, weight_decay) -> dict:
    """Whatever decides the numbers of a run: a checkpoint goes on only where all are the same."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return {
        "key": np.asarray(jr.key_data(key) if typed else key).tolist(),
        "data": run.feed.fingerprint(),
        "batch_size": run.feed.size,
        "steps": None if run.clock.limit is not None else run.clock.steps,
        "validate_every": run.clock.validate_every,
        "validation": None if held_out is None else digest(held_out),
        "learning_rate": rate,
        "patience": run.patience,
        "objective": _name_of(recipe.objective),
        "schedule": recipe.rate.schedule,
        "clip": recipe.clip,
        "weight_decay": weight_decay,
        "ema": recipe.ema,
        "max_rollbacks": recipe.max_rollbacks,
        "devices": run.placement.devices,
        "the flow's fields that are no arrays": static_hash(flow),
    }


def _name_of(objective: Objective) -> str:
    """An objective as a checkpoint remembers it: a function's name, or a class and its fields."""
    named = inspect.unwrap(getattr(objective, "func", objective))
    if not hasattr(named, "__qualname__"):
        named = type(named)
    name = f"{named.__module__}.{named.__qualname__}"
    return f"{name} {static_hash(objective)}" if isinstance(objective, eqx.Module) else name


def _make_feed(flow, source, numbers: Any, seed, batch_size: int, placement: Placement):
    n = placement.devices
    if numbers is not None:
        count = len(numbers)
        batch_size = min(batch_size, count)
        batch_size -= batch_size % n
        if batch_size == 0:
            raise InputError(
                f"A batch must have a row for each of the {n} devices; there are {count} rows."
            )
    if isinstance(source, Batch):
        return ArrayFeed(source, numbers, seed, batch_size, placement)
    return StreamFeed(source, numbers, seed, batch_size, placement, flow)


def init_from_data(flow: T, batch: Batch) -> T:
    """The flow with its data-dependent parameters (ActNorm) set from a batch."""
    if not isinstance(flow, Flow) or isinstance(flow.bijection, Frozen):
        return flow
    if not _wants_data(flow.bijection):
        return flow

    @eqx.filter_jit
    def initialised(flow, batch):
        x, condition = jtu.tree_map(lambda a: jnp.moveaxis(a, 0, -1), (batch.x, batch.condition))
        return flow.bijection.init_from_data(x, flow._embedded(condition))

    done = initialised(flow, jtu.tree_map(jnp.asarray, batch))
    return eqx.tree_at(lambda f: f.bijection, flow, done)


def _wants_data(bijection: AbstractTransform) -> bool:
    """Whether some elementary part has parameters of its own to learn from data."""

    def is_part(x):
        return isinstance(x, AbstractTransform) and x is not bijection

    own = type(bijection).init_from_data is not AbstractTransform.init_from_data
    if own and not isinstance(bijection, Chain | Repeat | Invert | Indexed):
        return True
    parts = jtu.tree_leaves(bijection, is_leaf=is_part)
    return any(_wants_data(part) for part in parts if is_part(part))


@eqx.filter_jit(donate="all-except-first")
def _segment(
    fixed: tuple[Recipe, Rows | Stack | Nothing, Array, int, Placement], state: TrainState
) -> tuple[TrainState, Info]:
    """Up to `length` steps in one compiled loop; nothing goes to the host before its end.

    The number of steps is an array, so that segments of any length share one program.
    """
    recipe, batches, count, length, placement = fixed
    dynamic, static = eqx.partition(state, eqx.is_array)
    nothing = jnp.full((length,), jnp.nan, jnp.float32)
    record = Info(nothing, nothing, nothing)

    def body(carry):
        i, cursor, dynamic, record = carry
        cursor, batch = batches.next(cursor)
        state, info = step(eqx.combine(dynamic, static), placement.spread(batch), recipe)
        record = jtu.tree_map(lambda r, v: r.at[i].set(v), record, info)
        return i + 1, cursor, eqx.filter(state, eqx.is_array), record

    start = (jnp.zeros((), jnp.int32), batches.first(), dynamic, record)
    _, _, dynamic, record = lax.while_loop(lambda carry: carry[0] < count, body, start)
    return eqx.combine(dynamic, static), record


@eqx.filter_jit(donate="all-except-first")
def _validate(
    fixed: tuple[Recipe, Batch, PRNGKeyArray], state: TrainState
) -> tuple[TrainState, Assessment]:
    recipe, chunks, key = fixed
    return validate(state, chunks, key, recipe)


@dataclasses.dataclass
class _Run:
    """The host's side of a run: decides how far each segment goes and keeps the books."""

    feed: ArrayFeed | StreamFeed | NoFeed
    clock: Clock
    checkpoint: Checkpoint | None
    settings: dict[str, Any]
    placement: Placement
    patience: int | None

    def start(
        self, key: PRNGKeyArray, flow: Any, recipe: Recipe, warm_start: bool, resume: bool
    ) -> tuple[TrainState, History]:
        """The state to begin with: new, or that of the checkpoint."""
        if resume and self.checkpoint is None:
            raise InputError("resume needs the file to resume from; give checkpoint=.")
        if self.checkpoint is None or not (resume and self.checkpoint.exists):
            if not (warm_start or isinstance(self.feed, NoFeed)):
                flow = init_from_data(flow, self.feed.sample(max(self.feed.size, _INIT_ROWS)))
            return self.placement.put(init(key, flow, recipe)), History()
        template = init(key, flow, recipe)
        state, history, written = load_checkpoint(self.checkpoint.path, template, self.settings)
        reason = self.clock.resume(history.seconds, written["clock"], history.stop_reason)
        history.stop_reason = reason
        return self.placement.put(state), history

    def loop(
        self,
        state: TrainState,
        history: History,
        recipe: Recipe,
        chunks: Batch | None,
        key: PRNGKeyArray,
        shown: Progress,
    ) -> tuple[TrainState, History]:
        """Train until the budget or the patience is spent."""
        clock, books = self.clock, _Books(history)
        done = history.steps
        saved_at, saved_step = time.monotonic(), done
        if chunks is not None and done == 0:
            state, assessment = _validate((recipe, chunks, key), state)
            books.add_assessment(0, clock.elapsed(), jax.device_get(assessment))
        clock.begin(done)
        while not books.history.stop_reason:
            if clock.limit is not None:
                recipe = eqx.tree_at(lambda r: r.rate, recipe, clock.rate(recipe.rate, done))
            count, following = clock.count(done)
            batches = self.feed.segment(done, count, following)
            fixed = (recipe, batches, jnp.asarray(count, jnp.int32), clock.length, self.placement)
            state, record = _segment(fixed, state)
            done += count
            assessment = None
            if chunks is not None and clock.validates(done):
                state, assessment = _validate((recipe, chunks, key), state)
            # The one synchronisation of this segment.
            watched = (record, assessment, state.rollbacks, state.best_step, state.best_loss)
            record, assessment, rollbacks, *best = jax.device_get(watched)
            if rollbacks >= recipe.max_rollbacks:
                raise self._trouble(state, recipe)
            elapsed = clock.tick(done, count)
            books.add(record, count, elapsed, int(rollbacks), *best)
            if assessment is not None:
                books.add_assessment(done, elapsed, assessment)
            reason = clock.finished(done)
            if reason and chunks is not None and assessment is None:
                state, assessment = _validate((recipe, chunks, key), state)
                watched = assessment, state.best_step, state.best_loss
                assessment, *best = jax.device_get(watched)
                books.add_assessment(done, elapsed, assessment)
                books.note_best(*best)
            if not reason and assessment is not None and books.stale() >= (self.patience or np.inf):
                reason = clock.give_up(done)
            books.history.stop_reason = reason
            since = time.monotonic() - saved_at, done - saved_step
            if self.checkpoint is not None and (reason or self.checkpoint.due(*since)):
                settings = {**self.settings, "clock": clock.to_dict()}
                save_checkpoint(self.checkpoint.path, state, books.joined(), settings)
                saved_at, saved_step = time.monotonic(), done
            shown.update(done, elapsed, float(record.loss[count - 1]), books.best())
        return state, books.finish()

    def _trouble(self, state: TrainState, recipe: Recipe) -> TrainingError:
        """The error that says what went wrong at the last step taken back."""
        failed_at = int(state.failed_at)
        batch, named = self.feed.inspect(failed_at)
        key = jr.fold_in(state.key, failed_at)
        blame = find_blame(state.model, batch, key, recipe.objective, recipe.spec)
        if isinstance(self.feed, NoFeed):
            words, rows = "draws of its own; see that the target is finite wherever they fall", ()
        else:
            words, rows = ("the whole batch", ()) if blame.rows is None else named(blame.rows)
            words += ". Look there for values far outside the others"
        return TrainingError(
            f"Training stopped at step {failed_at + 1}: {int(state.rollbacks)} steps were not "
            f"finite, though each was taken back and the learning rate halved. The first part to "
            f"give a non-finite value is {blame.part}, for {words}, or lower the learning rate.",
            rows,
        )


class _Books:
    """A history in the making: lists that are joined when it is needed."""

    def __init__(self, history: History):
        self.history = history
        self._loss, self._rate = [history.loss], [history.rate]

    def add(self, record: Any, count: int, elapsed: float, rollbacks: int, step, loss) -> None:
        """A segment's losses and rates, and where the best parameters stand."""
        self._loss.append(record.loss[:count])
        self._rate.append(record.rate[:count])
        history = self.history
        history.seconds, history.rollbacks = elapsed, rollbacks
        self.note_best(step, loss)

    def note_best(self, step, loss) -> None:
        """Where the best parameters stand."""
        if np.isfinite(loss):
            self.history.best_step, self.history.best_loss = int(step), float(loss)

    def add_assessment(self, step: int, elapsed: float, assessment: Any) -> None:
        """The losses of a validation."""
        history = self.history
        for name, value in (
            ("validation", assessment.loss),
            ("validation_ema", assessment.ema_loss),
            ("validation_steps", step),
            ("validation_seconds", elapsed),
        ):
            array = getattr(history, name)
            setattr(history, name, np.append(array, np.asarray(value).astype(array.dtype)))

    def stale(self) -> int:
        """Validations since the best one."""
        return int((self.history.validation_steps > self.history.best_step).sum())

    def best(self) -> float | None:
        """The best held-out loss, if there is one."""
        return self.history.best_loss if np.isfinite(self.history.best_loss) else None

    def joined(self) -> History:
        """The history up to here."""
        history = self.history
        history.loss, history.rate = np.concatenate(self._loss), np.concatenate(self._rate)
        self._loss, self._rate = [history.loss], [history.rate]
        return history

    def finish(self) -> History:
        """The history to return: without a best loss, the parameters returned are the last ones."""
        history = self.joined()
        if not np.isfinite(history.best_loss):
            history.best_step = history.steps
        return history


def _result(state: TrainState, history: History, recipe: Recipe, placement: Placement) -> Any:
    """The flow to return, on one device."""
    params, rest = eqx.partition(state.model, recipe.spec)
    if np.isfinite(history.best_loss):
        params = state.best
    elif state.ema is not None:
        params = state.ema
    flow = eqx.combine(params, rest)
    if placement.mesh is None:
        return flow
    arrays, static = eqx.partition(flow, eqx.is_array)
    return eqx.combine(jax.device_put(arrays, placement.mesh.devices.flat[0]), static)


def _closing_words(history: History) -> str:
    text = f"{history.steps:,} steps in {history.seconds:.1f} s ({history.stop_reason})"
    if np.isfinite(history.best_loss):
        text += f", best held-out loss {history.best_loss:.4f} after {history.best_step:,} steps"
    if history.rollbacks:
        text += f", {history.rollbacks} non-finite steps taken back"
    return text + "."
