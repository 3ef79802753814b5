"""scikit-learn's own checks: all of them for all four classes, and a few in every run."""

import pytest
from sklearn.base import clone
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator

from laminar import FlowClassifier, FlowDensity, FlowOutlier, FlowRegressor

ALLOWED = {
    "check_sample_weight_equivalence_on_dense_data": (
        "rows are held out at random, and copies of a row may fall on both sides"
    ),
}
QUICK = FlowRegressor(members=2, steps=40, width=16, depth=1)
SOME = (
    "check_no_attributes_set_in_init",
    "check_estimators_unfitted",
    "check_estimators_pickle",
    "check_methods_subset_invariance",
    "check_fit2d_1sample",
    "check_n_features_in",
)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "estimator",
    [FlowDensity(), pytest.param(FlowOutlier(), marks=pytest.mark.slow), FlowClassifier(), QUICK],
    ids=lambda estimator: type(estimator).__name__,
)
def test_some_checks_pass(estimator):
    for name in SOME:
        getattr(estimator_checks, name)(type(estimator).__name__, clone(estimator))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "estimator",
    [FlowDensity(), FlowOutlier(), FlowClassifier(), FlowRegressor(), QUICK],
    ids=repr,
)
def test_all_checks_pass(estimator):
    results = check_estimator(estimator, expected_failed_checks=ALLOWED, on_skip=None, on_fail=None)
    assert len(results) > 40
    wrong = [r for r in results if r["status"] not in ("passed", "skipped", "xfail")]
    assert [(r["check_name"], repr(r["exception"])) for r in wrong] == []
