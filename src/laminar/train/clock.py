"""When things happen in a training run: segments, validations, the final decay, the end."""

import dataclasses
import math
import time
from typing import Any

import jax.tree_util as jtu

from laminar.objectives import Batch
from laminar.train.state import Rate

_LENGTH = 1000
_DECAY_PART = 0.2
_MARGIN = 0.95
_EARLY = 4


@dataclasses.dataclass(frozen=True)
class Decay:
    """A linear fall of the learning rate from `level` to zero over `steps` steps after `start`."""

    start: int
    steps: int
    level: float

    @property
    def plan(self) -> tuple[int, int, float]:
        """The arguments of `Rate.decaying`."""
        return self.start, self.steps, self.level

    @property
    def end(self) -> int:
        """The step at which the rate is zero."""
        return self.start + self.steps

    def level_at(self, step: int) -> float:
        """How far the rate has fallen."""
        return self.level * (1 - (step - self.start) / self.steps)


class Clock:
    """Decides by steps where there is a budget of steps, and by time where there is a time limit.

    How many steps a segment takes follows the clock on the wall in both cases, but changes no
    number: with a budget of steps, validations and the end stand at fixed steps. Before the first
    regular validation stand four earlier ones, at doubling steps, as most is learnt there; not
    where the user chose the interval.

    Args:
        begun: ``time.monotonic()`` at the start of the run.
        steps: Budget of steps, or None.
        time_limit: Seconds, or None.
        validate_every: Steps between validations, or None to choose.
        feed: The feed, for its batch size and for how many batches it can hold.
        held_out: The validation rows (without data, one for each key), or None.
    """

    def __init__(
        self,
        begun: float,
        steps: int | None,
        time_limit: float | None,
        validate_every: int | None,
        feed: Any,
        held_out: Batch | None,
    ):
        self._begun, self.steps, self.limit = begun, steps, time_limit
        rows = 0
        if held_out is not None:
            rows = len(jtu.tree_leaves(held_out)[0])
        # A row costs a third in validation of what it costs in training: this keeps the whole of
        # validation under about a seventh of the time.
        cheap = math.ceil(2.5 * rows / feed.size)
        budget = _LENGTH if steps is None else steps
        self.validate_every = validate_every or max(math.ceil(budget / 50), cheap, 10)
        # Where the user has chosen the steps, they are kept.
        halvings = () if validate_every or held_out is None else range(_EARLY, 0, -1)
        self._early = [every for h in halvings if (every := self.validate_every >> h)]
        self.length = feed.capacity or _LENGTH
        self._fixed = feed.capacity is not None
        self._before = 0.0
        self._calls = 0
        self._pace: float | None = None
        self._marked = begun
        self._decay: Decay | None = None
        self._given_up = False

    def to_dict(self) -> dict[str, Any]:
        """What a resumed run must know."""
        decay = None if self._decay is None else dataclasses.asdict(self._decay)
        return {
            "decay": decay,
            "given_up": self._given_up,
            "steps": self.steps,
            "time_limit": self.limit,
        }

    def resume(self, seconds: float, written: dict[str, Any], reason: str) -> str:
        """Go on where another clock was: its seconds count, and a decay once begun stays.

        Args:
            seconds: What the other clock showed.
            written: Its `to_dict`.
            reason: Why that run ended, or nothing if it did not.

        Returns:
            The reason, or nothing if there is more to do: a run that used up its time, or its steps
            under a time limit, goes on where it is now allowed more. The rate is then what it was
            before the decay.
        """
        self._before = seconds
        if self.limit is not None and (
            (reason == "time limit" and self.limit > written["time_limit"])
            or (reason == "steps" and (self.steps is None or self.steps > written["steps"]))
        ):
            return ""
        self._decay = None if written["decay"] is None else Decay(**written["decay"])
        self._given_up = written["given_up"]
        return reason

    def elapsed(self) -> float:
        """Seconds of the run so far."""
        return self._before + time.monotonic() - self._begun

    def begin(self, step: int) -> None:
        """Start the stop-watch of the first segment."""
        self._marked = time.monotonic()

    def count(self, step: int) -> tuple[int, int]:
        """How many steps the next segment takes, and at most how many batches to read after it.

        A feed that reads ahead gets segments of a length known in advance; otherwise a segment
        takes about a second.
        """
        count = self._up_to_mark(step, self.length)
        wanted = min(self.length, self.validate_every)
        if not self._fixed or self.limit is not None:
            if self._pace is None:
                wanted = 1 if self._calls == 0 else 10
            else:
                seconds = 1.0 if self.limit is None else min(1.0, 0.02 * self.limit)
                wanted = max(int(seconds * self._pace), 1)
            count = min(count, wanted)
        # A little more than is likely, as a segment that a validation cuts short is followed by a
        # longer one, and the pace may rise; what is read ahead and not asked for is kept.
        following = min(2 * wanted, self.length)
        end = self._end()
        if end is not None:
            following = min(following, max(end - step - count, 0))
        return count, following

    def tick(self, step: int, count: int) -> float:
        """Note that a segment has ended; the first one, which compiles, is not timed."""
        now = time.monotonic()
        self._calls += 1
        if self._calls > 1:
            pace = count / max(now - self._marked, 1e-6)
            # The harmonic mean with the past, since it is times that add up.
            self._pace = pace if self._pace is None else 2 / (1 / pace + 1 / self._pace)
        self._marked = now
        return self.elapsed()

    def validates(self, step: int) -> bool:
        """Whether a validation follows this step."""
        return step == self._end() or step == self._next_validation(step - 1)

    def rate(self, rate: Rate, step: int) -> Rate:
        """The learning rate of the next segment, with its final decay under a time limit.

        The decay begins when a fifth of the time, or of the steps, is left, and ends with them. As
        the pace may change, it is planned anew from where it stands before every segment.
        """
        if self.limit is None or self._pace is None:
            return rate if self._decay is None else rate.decaying(*self._decay.plan)
        left = self.limit - self.elapsed()
        steps = max(int(left * self._pace * _MARGIN), 1)
        due = left <= _DECAY_PART * self.limit or self._given_up
        if self.steps is not None:
            steps = min(steps, self.steps - step)
            due = due or step >= (1 - _DECAY_PART) * self.steps
        if self._decay is not None:
            level = self._decay.level_at(step)
            # What was planned is not lengthened.
            self._decay = Decay(step, min(steps, max(self._decay.end - step, 1)), level)
        elif due:
            # After giving up, a quarter of what was trained is enough.
            most = max(step // 4, 1) if self._given_up else steps
            self._decay = Decay(step, min(steps, most), 1.0)
        return rate if self._decay is None else rate.decaying(*self._decay.plan)

    def give_up(self, step: int) -> str:
        """What to do when the patience is spent: stop, but under a time limit decay first."""
        if self.limit is None:
            return "patience"
        self._given_up = True
        return ""

    def finished(self, step: int) -> str:
        """Why training ends after this step, or nothing."""
        if self.steps is not None and step >= self.steps:
            return "steps"
        if self._decay is not None and step >= self._decay.end:
            return "patience" if self._given_up else "time limit"
        if self._decay is None and self.limit is not None and self.elapsed() >= self.limit:
            return "time limit"
        return ""

    def _end(self) -> int | None:
        """The step after which training ends, where it is known."""
        decayed = None if self._decay is None else self._decay.end
        known = [e for e in (self.steps, decayed) if e is not None]
        return min(known) if known else None

    def _next_validation(self, step: int) -> int:
        """The first step after this one that a validation follows."""
        every = self.validate_every
        return next((e for e in self._early if e > step), (step // every + 1) * every)

    def _up_to_mark(self, step: int, most: int) -> int:
        """Steps until the next validation or the end, at most so many."""
        end = self._end()
        mark = self._next_validation(step)
        if end is not None:
            mark = min(mark, max(end, step + 1))
        return min(mark - step, most)
