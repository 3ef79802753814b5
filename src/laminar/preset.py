"""Which sizes suit a table: the one place where defaults are chosen from rows and columns."""

import dataclasses

from laminar._errors import InputError


@dataclasses.dataclass(frozen=True)
class Preset:
    """What `laminar.train.density.fit_density` tries, and how hard; made by `preset`.

    Attributes:
        rows: Rows it was made for.
        columns: Columns D of an event.
        condition: Columns of the condition, 0 for none.
        components: Numbers of Gaussian components to try.
        priors: Strengths of the prior on covariances to try, in rows; None tries several that suit
            the number of columns.
        kernel_widths: Kernel widths to try, in units of the table's own covariance.
        folds: Folds that score the candidates; 1 scores them on the validation rows alone.
        parts: At most so many mixtures are kept.
        bases: One neural spline flow is trained for each of these bases, ``"normal"`` or
            ``"mixture"`` (the best mixture found); none at all for small tables.
        layers, width, depth, bins: Sizes of each flow.
        steps, batch_size, learning_rate, weight_decay, patience, ema: How each is trained.
    """

    rows: int
    columns: int
    condition: int = 0
    components: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    priors: tuple[float, ...] | None = None
    kernel_widths: tuple[float, ...] = ()
    folds: int = 1
    parts: int = 8
    bases: tuple[str, ...] = ()
    layers: int = 4
    width: int = 64
    depth: int = 2
    bins: int = 8
    steps: int = 2000
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    patience: int | None = 8
    ema: float | None = 0.99


def preset(rows: int, columns: int, condition: int = 0) -> Preset:
    """Sizes for a table, from 150 rows to a million: pass the result to `fit` in place of a flow.

    Small tables get mixtures and kernels weighted by cross-validation, which no trained network
    beats there; larger ones get neural spline flows beside them, wider and longer with more rows.

    Args:
        rows: Number of rows N.
        columns: Number of columns D of an event.
        condition: Number of columns it is conditioned on.

    Raises:
        InputError: If a number is out of range.
    """
    if rows < 1 or columns < 1 or condition < 0:
        raise InputError(
            f"preset needs at least one row and one column, and not {rows} rows, {columns} columns "
            f"and {condition} conditions."
        )
    small = rows < 2_500
    wide = 64 if rows < 5_000 else 96 if rows < 30_000 else 128 if rows < 200_000 else 256
    return Preset(
        rows,
        columns,
        condition,
        components=(1, 2, 4, 8, 16, 32) if small else (4, 16, 48),
        priors=None if small else (0.5,),
        parts=8 if small else 3,
        kernel_widths=(0.1, 0.2, 0.4, 0.7) if small else (0.1, 0.2) if rows <= 4_000 else (),
        folds=4 if rows < 600 else 3 if small else 1,
        bases=("mixture", "normal") if rows >= 1_500 else ("normal",) if condition else (),
        layers=3 if rows < 5_000 else 4 if rows < 30_000 else 5,
        width=wide,
        bins=8 if rows < 30_000 else 12,
        steps=_steps(rows),
        batch_size=256 if rows < 30_000 else 512,
        weight_decay=1e-2 if rows < 20_000 else 1e-3,
        ema=0.99 if rows < 5_000 else 0.998,
    )


def _steps(rows: int) -> int:
    if rows < 5_000:
        return 1_500
    return 3_000 if rows < 15_000 else 6_000 if rows < 100_000 else 15_000
