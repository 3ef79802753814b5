"""Built-in tables: as large as they say, the same every time, and drawn from what they say."""

import numpy as np
import pytest

from laminar._errors import InputError
from laminar.tables.builtin import BUILTIN, GENERATORS, load_builtin
from laminar.tables.read import read_table


@pytest.mark.parametrize("name", BUILTIN)
def test_sizes_are_the_listed_ones(name):
    table = load_builtin(name)
    assert table.values.shape == (BUILTIN[name].rows, BUILTIN[name].columns)
    assert np.isfinite(table.values).all()
    np.testing.assert_array_equal(table.values, load_builtin(name).values)


def test_the_extra_column_comes_only_when_named():
    assert "target" not in read_table("builtin:iris").names
    assert read_table("builtin:iris", also=["target"]).names[-1] == "target"
    assert read_table("builtin:wine", ["ash"], ["target"]).names == ("ash", "target")
    with pytest.raises(InputError, match="did you mean 'ash'"):
        read_table("builtin:wine", ["ashh"])


def test_generated_sets_lie_where_they_should():
    rng = np.random.default_rng(0)
    radius = np.linalg.norm(GENERATORS["rings"](rng, 2_000), axis=1)
    assert np.abs(radius - np.round(radius)).max() < 0.45
    board = GENERATORS["checkerboard"](rng, 2_000)
    assert np.abs(board).max() <= 4
    assert (np.floor(board / 2).sum(axis=1) % 2 == 0).all()
    centres = np.round(np.angle(GENERATORS["eight_gaussians"](rng, 2_000) @ [1, 1j]) / (np.pi / 4))
    assert len(np.unique(centres % 8)) == 8
    assert GENERATORS["spirals"](rng, 7).shape == (7, 2)
