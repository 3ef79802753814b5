"""What is compared: architectures, sizes, libraries, and how many rows each cell gets."""

from typing import NamedTuple

ARCHITECTURES = {
    "nsf_ar": "NSF, autoregressive",
    "nsf_coupling": "NSF, coupling",
    "maf": "MAF, affine",
}
DIMS = (2, 8, 43, 128)
INTERVAL = 5.0
TRAIN_BATCHES = 16

OPS = {"step": "training step", "log_prob": "log_prob", "sample": "sampling"}

NOT_BEGUN = "not begun within the budget"
"""The reason of what is left out for want of time, beside those of what failed."""


class Library(NamedTuple):
    """A library: its environment, None for the one that runs the script, and its adapter."""

    title: str
    environment: str | None
    adapter: str


LIBRARIES = {
    "laminar": Library("laminar", None, "with_laminar"),
    "flowjax": Library("FlowJAX", "jax", "with_flowjax"),
    "zuko": Library("zuko", "torch", "with_torch"),
    "zuko_compiled": Library("zuko+compile", "torch", "with_torch"),
    "nflows": Library("nflows", "torch", "with_torch"),
    "normflows": Library("normflows", "torch", "with_torch"),
}
COMPILED = "zuko_compiled"
"""The one library whose every first call takes half a minute or more."""

_FEW = (("nsf_ar", 8),)
_FEW_OPS = ("step", "log_prob")

# Rows times passes times columns that a library with D passes may take in sampling.
_MOST_WORK = 2_000_000
_FEWEST_ROWS = 128


class Cell(NamedTuple):
    """One architecture at one size."""

    arch: str
    dim: int

    @property
    def words(self) -> str:
        """The cell for people."""
        return f"{ARCHITECTURES[self.arch]}, D={self.dim}"


def cells(archs: tuple[str, ...], dims: tuple[int, ...]) -> list[Cell]:
    """All cells, those that matter most first: the middle sizes, in the order of architectures."""
    middle = [d for d in dims if 2 < d < 128]
    outer = [d for d in dims if d not in middle]
    return [Cell(arch, dim) for part in (middle, outer) for dim in part for arch in archs]


def ops_of(library: str, cell: Cell, compiled: str) -> tuple[str, ...]:
    """The operations of a library that are measured in a cell; none if it is left out."""
    if library != COMPILED or compiled == "all":
        return tuple(OPS)
    return _FEW_OPS if compiled == "some" and cell in _FEW else ()


def rows_of(op: str, cell: Cell, rows: int, batch: int) -> int:
    """Rows in one call, the same for all libraries of a cell.

    Sampling from an autoregressive flow takes the rivals D passes of D columns, so that their time
    grows with D². There the rows shrink by the same measure.
    """
    if op == "step":
        return batch
    if op == "sample" and cell.arch != "nsf_coupling":
        return min(rows, max(_FEWEST_ROWS, _MOST_WORK // cell.dim**2))
    return rows


def products(cell: Cell, width: int, bins: int) -> list[tuple[int, int]]:
    """The matrices (outputs, inputs) that a layer's conditioner of two hidden layers multiplies."""
    params = 2 if cell.arch == "maf" else 3 * bins - 1
    inputs = cell.dim // 2 if cell.arch == "nsf_coupling" else cell.dim
    outputs = cell.dim - inputs if cell.arch == "nsf_coupling" else cell.dim
    return [(width, inputs), (width, width), (params * outputs, width)]
