"""Training: sources of batches, the pure step, the loop, and checkpoints."""

# Imported for what it adds to the doors of `fit`.
from laminar.train import density as density
from laminar.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from laminar.train.fit import fit
from laminar.train.history import History
from laminar.train.source import ArraySource, Cursor, MappedSource, Source, Stream
from laminar.train.state import Info, Rate, Recipe, TrainState, init, step, validate

__all__ = [
    "ArraySource",
    "Checkpoint",
    "Cursor",
    "History",
    "Info",
    "MappedSource",
    "Rate",
    "Recipe",
    "Source",
    "Stream",
    "TrainState",
    "fit",
    "init",
    "load_checkpoint",
    "save_checkpoint",
    "step",
    "validate",
]
