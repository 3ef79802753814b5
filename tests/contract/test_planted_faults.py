"""For each check, a map that breaks just that, which the check must catch."""

from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from jax.core import Tracer

from laminar._errors import InputError
from laminar.bijections.base import AbstractBijection, AbstractTransform
from laminar.bijections.dequantise import Dequantise
from laminar.bijections.elementwise import Affine
from laminar.bijections.simplex import Softmax
from laminar.diagnose import check
from laminar.distributions import Normal
from laminar.flow import Flow
from laminar.spaces import Sphere
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
    """y = scale · x on vectors of two; each draw of its log-det is off, and so may be the mean."""

    scale: jnp.ndarray
    fault: str = eqx.field(static=True)
    exactness: str = eqx.field(static=True)
    in_shape: tuple = eqx.field(static=True)
    out_shape: tuple = eqx.field(static=True)
    cond_shape: None = eqx.field(static=True)

    def __init__(self, exactness, fault="none"):
        self.scale, self.exactness, self.fault = jnp.array([0.5, 3.0]), exactness, fault
        self.in_shape, self.out_shape, self.cond_shape = (2,), (2,), None

    def _log_det(self, x, key, sign):
        noise = sign * jr.normal(key, (), x.dtype)
        log_det = sign * jnp.log(self.scale).sum() + 0.3 * noise
        if self.exactness == "bound":  # ln of a weight whose mean is one
            log_det = log_det - 0.5 * 0.3**2
        match self.fault:
            case "biased":
                log_det = log_det + 0.1 * sign
            case "biased backwards":
                log_det = log_det + 0.1 * (sign < 0)
            case "too high":
                log_det = log_det + 0.25
            case "too high there":
                log_det = log_det + 0.4 * jnp.where(x[0] > 0, 1.0, -2.0).astype(x.dtype)
            case "finite gradients":
                log_det = log_det + 0.0 * jnp.sqrt(x @ x)
            case "NaN stays NaN":
                log_det = jnp.nan_to_num(log_det)
        return log_det

    def _image(self, y, key):
        match self.fault:
            case "the image keeps to the point":
                return y + 0.01 * jr.normal(key, y.shape, y.dtype)
            case "NaN stays NaN":
                return jnp.nan_to_num(y)
        return y

    def forward(self, x, condition=None, *, key=None):
        if key is None:
            raise InputError("It needs a key.")
        return self._image(self.scale * x, key), self._log_det(x, key, 1)

    def inverse(self, y, condition=None, *, key=None):
        if key is None:
            raise InputError("It needs a key.")
        extra = 0.01 if self.fault == "round trip" else 0.0
        return self._image(y / self.scale, key) + extra, self._log_det(y, key, -1)


class UsesKey(Faulty):
    """Claims to be exact, and changes with a key if it is given one."""

    def forward(self, x, condition=None, *, key=None):
        y, log_det = super().forward(x, condition)
        return y, log_det if key is None else log_det + 0.1


class OnSphere(AbstractBijection):
    """y = s x / |s x| on the sphere, with one fault in what it says of measures."""

    scale: jnp.ndarray
    fault: str = eqx.field(static=True)
    in_shape: tuple = eqx.field(static=True, default=(3,))
    out_shape: tuple = eqx.field(static=True, default=(3,))
    cond_shape: None = eqx.field(static=True, default=None)

    @property
    def in_space(self):
        return Sphere(2)

    @property
    def out_space(self):
        return None if self.fault == "dimensions" else Sphere(2)

    def _run(self, x, scale):
        on, off = Sphere(2).clamp(x)
        y = on * scale
        length = jnp.sqrt(y @ y)
        metric = 0 if self.fault == "log-det is the Jacobian's" else 3 * jnp.log(length)
        log_det = jnp.log(scale).sum() - metric
        keep = self.fault == "outside"
        return y / length, log_det if keep else jnp.where(off, -jnp.inf, log_det)

    def forward(self, x, condition=None, *, key=None):
        return self._run(x, self.scale)

    def inverse(self, y, condition=None, *, key=None):
        return self._run(y, 1 / self.scale)


class WrongMeasure(Softmax):
    """The log-det of the simplex's surface measure, though its space states another."""

    def _forward(self, x, condition):
        y, log_det = super()._forward(x, condition)
        return y, log_det + 0.5 * jnp.log(3.0).astype(x.dtype)

    def _inverse(self, y, condition):
        x, log_det = super()._inverse(y, condition)
        return x, log_det - 0.5 * jnp.log(3.0).astype(y.dtype)


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


@pytest.mark.parametrize("exactness", ["unbiased", "biased", "bound"])
def test_honest_estimates_pass(exactness):
    report = check_bijection(Estimate(exactness), key=jr.key(0), float64=False)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("exactness", "fault", "name"),
    [
        ("unbiased", "biased", "log-det is unbiased"),
        ("unbiased", "finite gradients", "finite gradients"),
        ("biased", "round trip", "round trip"),
        ("biased", "NaN stays NaN", "NaN stays NaN"),
        ("biased", "the image keeps to the point", "the image keeps to the point"),
        ("bound", "too high", "the bound holds"),
        ("bound", "too high there", "the bound holds"),
        ("exact", "none", "needs no key"),
    ],
)
def test_fault_of_an_estimate_is_caught(exactness, fault, name):
    with pytest.raises(ContractError, match=name):
        check_bijection(Estimate(exactness, fault), key=jr.key(0), float64=False)


def test_declared_bias_is_told():
    report = check_bijection(Estimate("biased", "biased"), key=jr.key(0), float64=False)
    told = [check for check in report.checks if check.name == "forward: bias of the log-det"]
    assert told[0].error == pytest.approx(0.1, abs=0.05)


def test_an_exact_map_that_uses_a_key_is_caught():
    with pytest.raises(ContractError, match="batch-last"):
        check_bijection(UsesKey("none"), key=jr.key(0), float64=False)


@pytest.mark.parametrize(
    ("exactness", "fault", "name"),
    [
        ("unbiased", "none", None),
        ("unbiased", "biased", "log-det estimates are unbiased"),
        ("unbiased", "biased backwards", "log-det estimates are unbiased"),
        ("bound", "none", None),
        ("bound", "too high", "log_prob is a lower bound"),
        ("bound", "too high there", "log_prob is a lower bound"),
        ("exact", "none", "an exact density needs no key"),
    ],
)
def test_check_of_a_flow_catches_it_too(exactness, fault, name):
    report = check(Flow(Normal(2), Estimate(exactness, fault)), key=jr.key(0), n=64)
    assert report.passed == (name is None), str(report)
    assert name is None or report[name].passed is False


class LoudCells(AbstractTransform):
    """Dequantisation whose way to the latents claims more than it may."""

    inner: Dequantise
    by: float = eqx.field(static=True)
    cond_shape: None = None
    batch_last: ClassVar[bool] = True

    @property
    def in_shape(self):
        return self.inner.in_shape

    @property
    def out_shape(self):
        return self.inner.out_shape

    @property
    def exactness(self):
        return "bound"

    def forward(self, x, condition=None, *, key=None):
        return self.inner.forward(x, condition, key=key)

    def inverse(self, y, condition=None, *, key=None):
        x, log_det = self.inner.inverse(y, condition, key=key)
        return x, log_det + self.by


@pytest.mark.parametrize("by", [0.0, 1.5])
def test_a_bound_with_a_bounded_domain_is_held_to_it(by):
    report = check_bijection(
        LoudCells(Dequantise((2,), 4), by),
        key=jr.key(0),
        domain=(0.0, 1.0),
        image=(0.0, 3.0),
        float64=False,
        throw=False,
    )
    held = [check.passed for check in report.checks if check.name == "the bound holds"]
    assert held == [by == 0]


def test_report_lists_failures_without_raising():
    report = check_bijection(Faulty("round trip"), key=jr.key(0), float64=False, throw=False)
    assert not report.passed
    assert "FAIL" in str(report)
    assert "BROKEN" in str(report)


def test_default_is_a_check_of_the_identity_too():
    assert check_bijection(Affine(shape=(2,)), key=jr.key(0), float64=False).passed


@pytest.mark.parametrize("fault", ["log-det is the Jacobian's", "dimensions", "outside"])
def test_faults_on_a_manifold_are_caught(fault):
    scale = jnp.array([0.5, 1.0, 2.0])
    with pytest.raises(ContractError, match=fault):
        check_bijection(OnSphere(scale, fault), key=jr.key(0), float64=False)


def test_another_measure_than_the_stated_one_is_caught():
    assert check_bijection(OnSphere(jnp.ones(3), "none"), key=jr.key(0), float64=False).passed
    with pytest.raises(ContractError, match="log-det is the Jacobian's"):
        check_bijection(WrongMeasure(3), key=jr.key(0), float64=False)
