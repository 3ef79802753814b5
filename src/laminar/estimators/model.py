"""RowModel: what FlowDensity and FlowOutlier share, a density of rows."""

from typing import Any

import jax.random as jr
import numpy as np

from laminar.estimators.common import kept, weights_of
from laminar.estimators.rows import RowReader, with_weights
from laminar.tables.flow import MIN_ROWS, fit_table
from laminar.tables.frames import to_frame
from laminar.tables.model import TableFlow
from laminar.tables.schema import learn_schema
from laminar.tables.table import Table
from laminar.train.density import fit_density


class RowModel(RowReader):
    """Base of the estimators that hold a density of rows."""

    model_: TableFlow
    flow: str
    steps: int | None
    time_limit: float | None
    validation: float

    def _weighted_rows(self, X: Any, sample_weight: Any) -> tuple[Table, np.ndarray | None]:
        """The rows of `fit` that have a weight, and the weights unless they are equal."""
        table, _ = self._read(X, reset=True)
        index, w = kept(weights_of(sample_weight, table.values), len(table), type(self).__name__)
        equal = sample_weight is None or bool((w == w[0]).all())
        return table.take(index), None if equal else w

    def _options(self, seed: int) -> dict[str, Any]:
        """What `fit_table` is called with."""
        given = {"steps": self.steps, "time_limit": self.time_limit}
        return {
            "kinds": self.kinds,
            "flow": self.flow,
            "seed": seed,
            "validation": self.validation,
            "progress": False,
            **{name: value for name, value in given.items() if value is not None},
        }

    def _density(
        self, table: Table, weights: np.ndarray | None, seed: int
    ) -> tuple[TableFlow, dict[str, Any]]:
        """The density of rows, also of so few that `fit_table` has none to hold out."""
        if len(table) < MIN_ROWS and self.flow == "auto":
            schema = learn_schema(table, kinds=self.kinds)
            if not schema.mixed:
                z, _ = schema.encode(table.values)
                rng = np.random.default_rng(seed)
                z = z + schema.noise * rng.uniform(-0.5, 0.5, z.shape)
                flow, history = fit_density(jr.key(seed), z, weights=weights, progress=False)
                report = {"rows": len(table), "held_out": None, "training": history.to_dict()}
                return TableFlow(flow, schema), {**report, "notes": schema.notes()}
        both, name = with_weights(table, weights)
        return fit_table(both, weights=name, **self._options(seed))

    def _draw(self, n_samples: int, seed: int) -> Any:
        """Rows drawn from the model, as the user has them."""
        drawn = self.model_.sample(jr.key(seed), n_samples)
        return drawn.values if self._like is None else to_frame(drawn, self._like)
