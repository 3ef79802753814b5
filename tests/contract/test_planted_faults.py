"""For each check, a map that breaks just that, which the check must catch."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.core import Tracer

from laminar._errors import InputError
from laminar.bijections.base import AbstractBijection, AbstractTransform
from laminar.bijections.elementwise import Affine
from laminar.testing import ContractError, check_bijection


class Faulty(AbstractBijection):
    """y = scale · x on vectors of two, with one fault."""

    scale: jnp.ndarray
    fault: str = eqx.field(static=True)
    tag: object = eqx.field(static=True)
    in_shape: tuple = eqx.field(static=True, default=(2,))
    out_shape: tuple = eqx.field(static=True, default=(2,))
    cond_shape: None = eqx.field(static=True, default=None)

    def __init__(self, fault):
        self.scale = jnp.array([0.5, 3.0])
        self.fault, self.tag = fault, object() if fault == "one trace" else None
        self.in_shape = self.out_shape = (2,)
        self.cond_shape = None

    def _damage(self, y, log_det):
        match self.fault:
            case "eager = compiled":
                return y + (0.0 if isinstance(y, Tracer) else 0.01), log_det
            case "finite gradients":
                return y, log_det + 0.0 * jnp.sqrt(y @ y)
            case "NaN stays NaN":
                return jnp.nan_to_num(y), log_det
            case "shapes":
                return y, log_det + 0.0 * y
            case "dtype":
                return y, log_det.astype("float16")
            case "precision":
                return y.astype("float32").astype(y.dtype), log_det
        return y, log_det

    def forward(self, x, condition=None, *, key=None):
        y, log_det = self.scale * x, jnp.log(self.scale).sum()
        if self.fault == "log-det is the Jacobian's":
            return y, log_det + 0.01
        return self._damage(y, log_det)

    def inverse(self, y, condition=None, *, key=None):
        x, log_det = y / self.scale, -jnp.log(self.scale).sum()
        match self.fault:
            case "round trip":
                return x + 0.01, log_det
            case "log-det is the Jacobian's":
                return x, log_det - 0.01
            case "log-dets cancel":
                return x, -log_det
        return self._damage(x, log_det)


class WrongBatch(AbstractBijection):
    """Claims trailing batch axes, but sums log-dets over them, or mistakes a shared condition."""

    fault: str = eqx.field(static=True)
    in_shape: tuple = eqx.field(static=True, default=(2,))
    out_shape: tuple = eqx.field(static=True, default=(2,))
    cond_shape: tuple = eqx.field(static=True, default=(2,))
    batch_last: ClassVar[bool] = True

    def _shift(self, x, condition):
        if condition.ndim < x.ndim:
            condition = condition.reshape(2, *(1,) * (x.ndim - 1))
            if self.fault == "shared condition":
                condition = condition + 1
        return condition

    def _log_det(self, x):
        zeros = jnp.zeros(x.shape[1:], x.dtype)
        return zeros.sum() if self.fault == "batch-last" else zeros

    def forward(self, x, condition=None, *, key=None):
        return x + self._shift(x, condition), self._log_det(x)

    def inverse(self, y, condition=None, *, key=None):
        return y - self._shift(y, condition), self._log_det(y)


class NoEdge(AbstractBijection):
    """A logistic map that forgets −inf outside (0, 1)."""

    in_shape: tuple = eqx.field(static=True, default=())
    out_shape: tuple = eqx.field(static=True, default=())
    cond_shape: None = eqx.field(static=True, default=None)

    def forward(self, x, condition=None, *, key=None):
        x = jnp.clip(x, -20.0, 20.0)
        y = 1 / (1 + jnp.exp(-x))
        return y, jnp.log(y) - x - jnp.log1p(jnp.exp(-x))

    def inverse(self, y, condition=None, *, key=None):
        y = jnp.clip(y, 1e-6, 1 - 1e-6)
        return jnp.log(y) - jnp.log1p(-y), -jnp.log(y) - jnp.log1p(-y)


class Estimate(AbstractTransform):
    """Does not claim to be exact."""

    in_shape: tuple = eqx.field(static=True, default=())
    out_shape: tuple = eqx.field(static=True, default=())
    cond_shape: None = eqx.field(static=True, default=None)
    exactness: str = eqx.field(static=True, default="bound")

    def forward(self, x, condition=None, *, key=None):
        return x, jnp.zeros_like(x)

    inverse = forward


FAULTS = [
    "round trip",
    "log-det is the Jacobian's",
    "log-dets cancel",
    "eager = compiled",
    "finite gradients",
    "NaN stays NaN",
    "shapes",
    "dtype",
]


def test_without_a_fault_it_passes():
    report = check_bijection(Faulty("none"), key=jr.key(0), float64=False)
    assert report.passed
    assert "kept" in str(report)


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault):
    with pytest.raises(ContractError, match=fault):
        check_bijection(Faulty(fault), key=jr.key(0), float64=False)


def test_lost_precision_is_caught_in_float64():
    with pytest.raises(ContractError, match="round trip failed in float64"):
        check_bijection(Faulty("precision"), key=jr.key(0))


def test_second_compilation_is_caught():
    with pytest.raises(ContractError, match="one trace"):
        check_bijection(
            Faulty("one trace"), other=Faulty("one trace"), key=jr.key(0), float64=False
        )


@pytest.mark.parametrize("fault", ["batch-last", "shared condition"])
def test_wrong_batch_is_caught(fault):
    with pytest.raises(ContractError, match=fault):
        check_bijection(WrongBatch(fault), key=jr.key(0), float64=False)


def test_forgotten_support_is_caught():
    with pytest.raises(ContractError, match="outside"):
        check_bijection(NoEdge(), key=jr.key(0), image=(0, 1), float64=False)


def test_estimates_are_refused():
    with pytest.raises(InputError, match="bound"):
        check_bijection(Estimate(), key=jr.key(0))


def test_report_lists_failures_without_raising():
    report = check_bijection(Faulty("round trip"), key=jr.key(0), float64=False, throw=False)
    assert not report.passed
    assert "FAIL" in str(report)
    assert "BROKEN" in str(report)


def test_default_is_a_check_of_the_identity_too():
    assert check_bijection(Affine(shape=(2,)), key=jr.key(0), float64=False).passed
