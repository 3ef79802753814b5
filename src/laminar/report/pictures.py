"""The pictures of the report as files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax.random as jr

from laminar._errors import InputError
from laminar._files import PathLike, check_writable
from laminar._typing import PRNGKeyArray
from laminar.report import columns, reliability
from laminar.report.page import fit_panels, scores_of
from laminar.report.scene import Panel, picture_kind, write_sheet
from laminar.report.study import Study, study
from laminar.tables.model import TableFlow
from laminar.tables.table import Table

Kind = Literal["marginals", "pairs", "pit", "path", "fit"]
KINDS: tuple[Kind, ...] = ("marginals", "pairs", "pit", "path", "fit")

_MOST_MARGINALS = 24
_MOST_LATENTS = 12
_FRAMES = 5


def write_pictures(
    model: TableFlow,
    table: Table,
    out: PathLike,
    *,
    key: PRNGKeyArray,
    meta: dict[str, Any] | None = None,
    kind: Kind | None = None,
) -> list[str]:
    """Write pictures of a model and a table as PNG or SVG files.

    ``"marginals"`` are the columns of rows and samples, ``"pairs"`` the columns that depend on each
    other most, ``"pit"`` the regions of highest density and the latent transforms, ``"path"`` the
    way of samples from the base to the rows, ``"fit"`` scores and training.

    Args:
        model: The model.
        table: Rows with the model's columns.
        out: A file that ends in .png or .svg, for one kind; or a folder, which gets a PNG of each
            kind that there is, named after it.
        key: Draws the samples.
        meta: What the model's file says of the fit.
        kind: Which picture; all of them, into a folder, when None.

    Returns:
        The paths of the files.

    Raises:
        InputError: If there is nothing to draw, or a file cannot be written.
        MissingExtraError: For PNG files, if matplotlib is not installed.
    """
    folder = check_out(out, kind)
    study_key, path_key = jr.split(key)
    found = study(model, table, study_key, meta)
    drawn: dict[str, tuple[str, list[Panel], int | None]] = {}
    for name in KINDS if kind is None else (kind,):
        panels, across = _PANELS[name](found, path_key)
        if panels:
            drawn[name] = (f"{_TITLES[name]}: {table.source}", panels, across)
        elif kind is not None:
            raise InputError(f"There is nothing to draw of the kind {kind!r}: {_NOTHING[kind]}.")
    if folder:
        Path(out).mkdir(exist_ok=True)
    written = []
    for name, (title, panels, across) in drawn.items():
        path = str(Path(out) / f"{name}.png") if folder else str(out)
        write_sheet(panels, path, title=title, across=across)
        written.append(path)
    return written


def check_kind(kind: str | None) -> Kind | None:
    """The kind of a name, or an error that lists them."""
    for known in KINDS:
        if kind == known:
            return known
    if kind is None:
        return None
    raise InputError(f"There is no picture of the kind {kind!r}; choose {', '.join(KINDS)}.")


def check_out(out: PathLike, kind: str | None) -> bool:
    """Refuse what cannot take the pictures, before any work; whether it is a folder.

    Raises:
        InputError: If it is one file for several pictures, ends in another suffix than .png or
            .svg, or cannot be written.
    """
    if Path(out).suffix and not Path(out).is_dir():
        picture_kind(out)
        if kind is None:
            raise InputError(
                f"{out} is one file, and there are several pictures; name a kind "
                f"({', '.join(KINDS)}), or give a folder."
            )
        check_writable(out)
        return False
    if Path(out).exists() and not Path(out).is_dir():
        raise InputError(f"{out} is a file; give a folder, or a name that ends in .png or .svg.")
    # A file in it stands for the folder that is to be made.
    check_writable(out if not Path(out).exists() else Path(out) / f"{KINDS[0]}.png")
    return True


_TITLES = {
    "marginals": "Columns of rows (blue) and samples (orange)",
    "pairs": "Pairs of columns, rows (blue) and samples (orange)",
    "pit": "Calibration",
    "path": "From the base to the rows",
    "fit": "The fit",
}
_NOTHING = {
    "marginals": "no column varies",
    "pairs": "there is only one column",
    "pit": "no row has a finite log density",
    "path": "fewer than two columns vary, or the steps of the flow are no vectors of the columns",
    "fit": "the model's file does not say how it was fitted",
}


def _marginals(found: Study, key: PRNGKeyArray) -> tuple[list[Panel], int | None]:
    return [columns.marginal(view) for view in found.views[:_MOST_MARGINALS]], None


def _pairs(found: Study, key: PRNGKeyArray) -> tuple[list[Panel], int | None]:
    return [panel for a, b, _ in found.pairs for panel in columns.pair(found, a, b)], 2


def _pit(found: Study, key: PRNGKeyArray) -> tuple[list[Panel], int | None]:
    regions, latent = found.regions(), found.latent()
    panels = [] if regions is None else [reliability.region_chart(regions)]
    if latent is not None:
        order = (-latent.distance).argsort(kind="stable")[:_MOST_LATENTS]
        panels += [reliability.latent_chart(latent, int(d)) for d in order]
    return panels, None


def _path(found: Study, key: PRNGKeyArray) -> tuple[list[Panel], int | None]:
    motion = found.motion(key)
    if motion is None:
        return [], None
    i, j = motion.foremost([pair[:2] for pair in found.pairs])
    panels = [motion.frame(k, i, j) for k in motion.spread(_FRAMES)]
    x, y = motion.views[i], motion.views[j]
    panels.append(columns.pair(found, x.name, y.name)[0])
    return panels, len(panels) if len(panels) <= 4 else 3


def _fit(found: Study, key: PRNGKeyArray) -> tuple[list[Panel], int | None]:
    return [panel for panel, _ in fit_panels(found.meta, scores_of(found))], None


_PANELS: dict[str, Callable[[Study, PRNGKeyArray], tuple[list[Panel], int | None]]] = {
    "marginals": _marginals,
    "pairs": _pairs,
    "pit": _pit,
    "path": _path,
    "fit": _fit,
}
