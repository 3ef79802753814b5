"""Pictures: whole PNG files with what they should show, and one-sentence errors."""

import builtins
import struct

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import laminar
from laminar._errors import InputError, MissingExtraError, ShapeError
from laminar.report.plots import _choose_pair, _spread, plot_history, plot_pairs, plot_path
from laminar.report.views import limits
from laminar.train.history import History

KEY = jr.key(0)


def size_of(path) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


@pytest.fixture(scope="module")
def flow():
    bends = [laminar.SinhArcsinh(0.2 * i, 1.0, shape=(2,)) for i in range(4)]
    return laminar.Flow(laminar.Normal(2), laminar.Chain(bends))


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).normal(size=(200, 2))


def test_path_shows_five_frames(flow, rows, tmp_path):
    figure = plot_path(flow, rows, tmp_path / "path.png", key=KEY, names=["a", "b"], title="T")
    assert min(size_of(tmp_path / "path.png")) > 500
    assert (tmp_path / "path.png").stat().st_size < 300_000
    heads = [axes.get_title() for axes in figure.axes]
    assert heads[0] == "data (200 rows)"
    assert heads[1] == "samples (200)"
    assert heads[2:] == ["$z_0$: base", "$z_{1}$", "$z_{2}$", "$z_{3}$", "$z_{4}$: data"]
    assert figure.axes[0].get_xlabel() == "a"


def test_path_of_a_flow_with_a_condition(rows):
    flow = laminar.nsf(2, key=KEY, layers=2, width=8, cond_dim=3)
    figure = plot_path(flow, rows, key=KEY, condition=jnp.zeros(3), count=50)
    assert len(figure.axes) == 2 + 3


def test_path_follows_the_heaviest_deep_part_of_a_mixture(flow, rows):
    shallow = laminar.Flow(laminar.Normal(2), laminar.Affine(shape=(2,)))
    mixture = laminar.Mixture([shallow, flow], jnp.log(jnp.array([0.7, 0.3])))
    whole = laminar.Flow(mixture, laminar.Frozen(laminar.Affine(jnp.ones(2), 2.0)))
    figure = plot_path(whole, rows, key=KEY)
    assert "weight 0.30" in figure.subfigs[1].get_suptitle()


def test_path_of_a_table_is_in_the_tables_units(tmp_path):
    from laminar.tables.flow import TableFlow
    from laminar.tables.schema import learn_schema

    x = 1000 + 50 * np.random.default_rng(0).normal(size=(100, 3))
    table = laminar.Table(("a", "b", "c"), x)
    model = TableFlow(
        laminar.Flow(laminar.Normal(3), laminar.Affine(shape=(3,))), learn_schema(table)
    )
    figure = plot_path(model, table, key=KEY, columns=("c", "a"))
    low, high = figure.axes[0].get_xlim()
    assert 700 < low < 1000 < high < 1300
    assert figure.axes[0].get_xlabel() == "c"
    assert figure.axes[2].get_xlim()[0] > -10


def test_pairs(rows, tmp_path):
    figure = plot_pairs(rows, rows + 1, tmp_path / "pairs.png", names=["a", "b"])
    assert len(figure.axes) == 4
    assert min(size_of(tmp_path / "pairs.png")) > 300
    assert len(plot_pairs(rows[:, :1], rows[:, :1]).axes) == 1


def test_history_with_gaps(tmp_path):
    loss = np.linspace(3, 1, 500).astype(np.float32)
    loss[100] = np.nan
    history = History(
        loss=loss,
        validation=np.array([2.0, 1.5]),
        validation_ema=np.full(2, np.nan),
        validation_steps=np.array([250, 500]),
        best_step=500,
        best_loss=1.5,
    )
    figure = plot_history(history, tmp_path / "history.png")
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["training (means of 5)", "held out", "returned: 1.500"]
    assert min(size_of(tmp_path / "history.png")) > 300
    plot_history(History(loss=loss))


def test_no_global_state_of_matplotlib_is_touched(flow, rows, tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_path(flow, rows, tmp_path / "path.png", key=KEY)
    assert dict(matplotlib.rcParams) == before


def test_degenerate_data_are_drawn(flow):
    constant = np.ones((20, 2))
    plot_path(flow, constant, key=KEY)
    plot_pairs(constant, np.full((20, 2), np.nan))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: plot_path(f, x[:, :1], key=KEY), ShapeError, r"\(1,\).*\(2,\)"),
        (lambda f, x: plot_path(f, x[0], key=KEY), InputError, "two rows"),
        (lambda f, x: plot_path(f, x, key=KEY, columns=(0, 2)), InputError, "two different"),
        (lambda f, x: plot_path(f, x, key=KEY, columns=("q", 1)), InputError, "two different"),
        (lambda f, x: plot_path(f, x, key=KEY, names=["a"]), InputError, "1 names .* 2 columns"),
        (lambda f, x: plot_pairs(x, x[:, :1]), ShapeError, r"\(200, 2\).*\(200, 1\)"),
        (lambda f, x: plot_pairs(x, x, columns=[5]), InputError, "one to eight of the 2"),
        (lambda f, x: plot_history(History()), InputError, "no step was taken"),
        (lambda f, x: plot_path(f, x, "/no/such/folder/x.png", key=KEY), InputError, "folder"),
    ],
)
def test_errors_say_what_is_wrong(flow, rows, call, error, message):
    with pytest.raises(error, match=message):
        call(flow, rows)


def test_steps_of_other_sizes_are_refused(rows):
    flow = laminar.Flow(laminar.Normal((1, 2)), laminar.Reshape((1, 2), (2,)))
    with pytest.raises(ShapeError, match="every step is a vector of 2"):
        plot_path(flow, rows, key=KEY)


def test_missing_matplotlib_names_the_extra(monkeypatch, flow, rows):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"laminar\[plot\]"):
        plot_path(flow, rows, key=KEY)


def test_frames_are_spread_and_hold_both_ends():
    assert _spread(5, 5) == [0, 1, 2, 3, 4]
    assert _spread(11, 5) == [0, 2, 5, 8, 10]
    assert _spread(2, 5) == [0, 1]


def test_most_correlated_pair_is_chosen():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 4))
    x[:, 3] = np.exp(x[:, 1]) + 0.01 * x[:, 3]
    assert _choose_pair(x, list("abcd"), None) == (1, 3)
    assert _choose_pair(x, list("abcd"), ("c", 0)) == (2, 0)


def test_windows_leave_outliers_out():
    values = np.concatenate([np.linspace(0, 1, 1000), [1e9, np.nan]])
    low, high = limits(values, values)
    assert -0.2 < low < 0.05
    assert 0.95 < high < 1.2
