"""Fit a density to a real table, compare it with what one would use instead, check it, draw it.

The table is 24 measurements of the cell nuclei in 569 breast masses (WDBC, which ships with
scikit-learn). Many are nearly bound by laws, such as compactness = perimeter² / area − 1, so the
density is concentrated near a bent sheet: hard for a Gaussian, and something for a flow to find.
The six columns of concavity are left out: zeros in them stand for "none", and a continuous density
is unbounded on values that repeat.

Every density is fitted to the same rows and scored on the same others, in nats and in the units of
the table. Run by ``make demo``; takes one to two minutes on two cores.
"""

import dataclasses
import os
import time
from pathlib import Path

import jax.random as jr
import numpy as np
from sklearn.mixture import GaussianMixture

import laminar
from laminar.preset import preset
from laminar.report.plots import plot_path

SEED = 0
# The tests set this to see in little time that everything runs.
STEPS = int(os.environ.get("LAMINAR_EXAMPLE_STEPS", "1000"))


def mixture_log_prob(train: np.ndarray, test: np.ndarray, components: int) -> np.ndarray:
    """scikit-learn's mixture on standardised columns: the log-densities of the test rows."""
    location, scale = train.mean(0), train.std(0)
    mixture = GaussianMixture(components, n_init=3, random_state=SEED)
    mixture.fit((train - location) / scale)
    return mixture.score_samples((test - location) / scale) - np.log(scale).sum()


def chosen_components(train: np.ndarray) -> int:
    """The number of components that is best on a fifth of the training rows."""
    cut = len(train) // 5
    counts = [1, 2, 3, 4, 6, 8, 12, 16]
    scores = [mixture_log_prob(train[cut:], train[:cut], count).mean() for count in counts]
    return counts[int(np.argmax(scores))]


def fit_density(train: np.ndarray) -> tuple[laminar.Flow, float]:
    """A spline flow averaged with mixtures, weighted on held-out rows; and the seconds it took."""
    begun = time.monotonic()
    # With so few rows the default trains no flow; here there is to be one, over a mixture.
    sizes = dataclasses.replace(preset(*train.shape), bases=("mixture",), steps=STEPS)
    density, tried = laminar.fit_density(jr.key(SEED), train, preset=sizes)
    seconds = time.monotonic() - begun
    parts = sorted(zip(tried.weights, tried.candidates, strict=True), reverse=True)
    print(
        "weights of its parts: " + ", ".join(f"{name} {w:.2f}" for w, name in parts[:4]) + ", …\n"
    )
    return density, seconds


def main() -> None:
    """Fit, compare, check, draw."""
    table = laminar.read_table("builtin:breast_cancer")
    table = table.select([name for name in table.names if "conca" not in name])
    rows = table.values[np.random.default_rng(SEED).permutation(len(table))]
    test, train = rows[:114], rows[114:]
    print(f"{table.source}, {len(table.names)} columns")
    print(f"{len(train)} rows to learn from, {len(test)} set aside\n")

    density, seconds = fit_density(train)
    components = chosen_components(train)
    scores = {
        f"laminar ({seconds:.0f} s)": np.asarray(density.log_prob(test), np.float64),
        f"Gaussian mixture of {components}, scikit-learn": mixture_log_prob(
            train, test, components
        ),
        "Gaussian with full covariance": mixture_log_prob(train, test, 1),
    }
    print("mean log-density of the rows set aside, in nats a row")
    first = next(iter(scores.values()))
    for name, log_p in scores.items():
        gain = first - log_p
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        behind = "" if log_p is first else f"   behind by {gain.mean():.3f} ± {error:.3f}"
        print(f"  {name:38}{log_p.mean():8.3f}{behind}")

    print("\nDoes the mathematics hold?\n")
    print(laminar.check(density, data=test, key=jr.key(SEED)))

    out = Path("demo")
    out.mkdir(exist_ok=True)
    plot_path(
        density,
        rows,
        out / "flow.png",
        key=jr.key(SEED),
        names=table.names,
        columns=("mean radius", "mean compactness"),
        title="A density fitted to the nuclei of breast masses",
    )
    print(f"\nData, samples and the path from base to data are drawn in {out / 'flow.png'}.")


if __name__ == "__main__":
    main()
