"""Watch a flow bend a round cloud into a pinwheel: the picture at the top of the README.

Writes flow.png and history.png. Takes about a minute.
"""

import os

import jax.random as jr

import laminar
from laminar.report.plots import plot_history, plot_path

STEPS = int(os.environ.get("LAMINAR_EXAMPLE_STEPS", "3000"))

table = laminar.read_table("builtin:pinwheel")
mean, scale = table.values.mean(0), table.values.std(0)
x = (table.values - mean) / scale

build_key, fit_key, draw_key = jr.split(jr.key(0), 3)
flow = laminar.nsf(2, key=build_key, layers=4, width=64)
flow, history = laminar.fit(fit_key, flow, x, steps=STEPS, batch_size=512, learning_rate=2e-3)

plot_path(flow, x, "flow.png", key=draw_key, names=table.names, count=3000)
plot_history(history, "history.png", title="Training on the pinwheel")
print(f"held-out log-density {-history.best_loss:.3f} nats a row after {history.best_step} steps")
