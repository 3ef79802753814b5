"""Fit flows to a real table, compare them with what one would use instead, check, and draw.

The table is four measurements of the cell nuclei in 569 breast masses (WDBC, which ships with
scikit-learn): radius, perimeter, area and compactness. They are nearly bound by a law, compactness
being perimeter² / area − 1 up to how each was averaged, so the density is a thin bent sheet: hard
for a Gaussian, and something for a flow to find out.

Every density is fitted to the same rows and scored on the same others, in nats and in the units of
the table. Run by ``make demo``; takes one to two minutes on two cores.
"""

import os
import time
from pathlib import Path

import jax.random as jr
import numpy as np
from sklearn.mixture import GaussianMixture

import laminar
from laminar.report.plots import plot_path

COLUMNS = ["mean radius", "mean perimeter", "mean area", "mean compactness"]
SEED = 0
# The tests set this to see in seconds that everything runs.
STEPS = int(os.environ["LAMINAR_EXAMPLE_STEPS"]) if "LAMINAR_EXAMPLE_STEPS" in os.environ else None


def gaussian_mixture(train: np.ndarray, test: np.ndarray, components: int) -> np.ndarray:
    """scikit-learn's mixture on standardised columns: the log-densities of the test rows."""
    location, scale = train.mean(0), train.std(0)
    mixture = GaussianMixture(components, n_init=3, random_state=SEED)
    mixture.fit((train - location) / scale)
    return mixture.score_samples((test - location) / scale) - np.log(scale).sum()


def chosen_mixture(train: np.ndarray, test: np.ndarray) -> tuple[int, np.ndarray]:
    """The mixture whose number of components is best on a fifth of the training rows."""
    cut = len(train) // 5
    counts = [1, 2, 3, 4, 6, 8, 12, 16]
    scores = [gaussian_mixture(train[cut:], train[:cut], count).mean() for count in counts]
    best = counts[int(np.argmax(scores))]
    return best, gaussian_mixture(train, test, best)


def flow(name: str, train: laminar.Table) -> tuple[laminar.TableFlow, float]:
    """Fit a flow to a table; the flow and the seconds it took."""
    begun = time.monotonic()
    model, _ = laminar.fit_table(train, flow=name, seed=SEED, steps=STEPS)
    return model, time.monotonic() - begun


def main() -> None:
    """Fit, compare, check, draw."""
    table = laminar.read_table("builtin:breast_cancer", columns=COLUMNS)
    order = np.random.default_rng(SEED).permutation(len(table))
    train, test = table.take(order[114:]), table.take(order[:114])
    print(f"{table.source}: {len(train)} rows to learn from, {len(test)} set aside, {COLUMNS}\n")

    default, default_seconds = flow("auto", train)
    spline, spline_seconds = flow("nsf", train)
    components, mixture = chosen_mixture(train.values, test.values)
    scores = {
        f"laminar, default ({default_seconds:.0f} s)": default.log_prob(test),
        f"laminar, one spline flow ({spline_seconds:.0f} s)": spline.log_prob(test),
        f"scikit-learn mixture of {components}": mixture,
        "Gaussian, full covariance": gaussian_mixture(train.values, test.values, 1),
    }
    print("mean log-density of the rows set aside, nats a row; difference row by row\n")
    best = next(iter(scores.values()))
    for name, log_p in scores.items():
        behind = best - log_p
        print(
            f"  {name:36} {log_p.mean():8.3f}   behind the first by "
            f"{behind.mean():6.3f} ± {behind.std(ddof=1) / np.sqrt(len(behind)):.3f}"
        )

    print("\nDoes the mathematics hold?\n")
    print(laminar.check(default.flow, data=default.batch(test)[0], key=jr.key(SEED)))

    out = Path("demo")
    out.mkdir(exist_ok=True)
    plot_path(
        spline,
        table,
        out / "flow.png",
        key=jr.key(SEED),
        columns=("mean radius", "mean compactness"),
        title="A spline flow fitted to the nuclei of breast masses",
    )
    print(f"\nThe way of the spline flow from its base to the data is drawn in {out / 'flow.png'}.")


if __name__ == "__main__":
    main()
