"""Sixteen posteriors of posteriordb as NumPyro models, and the way to the names of its draws.

The densities are those of the reference draws: priors as stated with each model, and flat ones, on
the whole line or on the positive half for a scale, where none is stated. Reference draws are on the
constrained scale, 10 chains of 1,000, and taken as good as independent.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints

Values = dict[str, np.ndarray]

GP_JITTER = 1e-10


@dataclasses.dataclass(frozen=True)
class Case:
    """One posterior.

    Attributes:
        name: As in posteriordb.
        model: A NumPyro model, called with `args`.
        args: Its data.
        to_reference: From constrained values with leading axes to ``(…, P)`` in the order of the
            reference's names.
        from_reference: The other way, or None where single precision has lost it.
        double: Whether single precision cannot hold the model.
    """

    name: str
    model: Callable
    args: tuple
    to_reference: Callable[[Values], np.ndarray]
    from_reference: Callable[[np.ndarray], Values] | None
    double: bool = False


def flat(name: str, *shape: int, support: Any = constraints.real) -> Any:
    """A parameter with a flat prior."""
    return numpyro.sample(name, dist.ImproperUniform(support, (), shape))


# Linear regressions


def regression(x, y):
    """Flat coefficients and scale."""
    beta = flat("beta", x.shape[1])
    sigma = flat("sigma", support=constraints.positive)
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def regression_cauchy(x, y):
    """Flat coefficients and a half-Cauchy scale."""
    beta = flat("beta", x.shape[1])
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def regression_normal(x, y):
    """Wide normal coefficients and a half-normal scale."""
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand((x.shape[1],)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def diamonds(x, y):
    """Centred columns, normal coefficients, Student-t intercept and scale."""
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand((x.shape[1],)).to_event(1))
    intercept = numpyro.sample("Intercept", dist.StudentT(3.0, 8.0, 10.0))
    sigma = flat("sigma", support=constraints.positive)
    numpyro.factor("sigma_prior", dist.StudentT(3.0, 0.0, 10.0).log_prob(sigma))
    numpyro.sample("y", dist.Normal(intercept + x @ b, sigma), obs=y)


# Time series


def ar(past, y):
    """An autoregression of order K."""
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(0.0, 10.0).expand((past.shape[1],)).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    numpyro.sample("y", dist.Normal(alpha + past @ beta, sigma), obs=y)


def garch(y, sigma1):
    """GARCH(1, 1), whose last coefficient is below one minus the one before.

    It is written as a share of that, so that every site has a support of its own; the factor makes
    the prior flat in the coefficient itself.
    """
    mu = flat("mu")
    alpha0 = flat("alpha0", support=constraints.positive)
    alpha1 = numpyro.sample("alpha1", dist.Uniform(0.0, 1.0))
    share = numpyro.sample("share", dist.Uniform(0.0, 1.0))
    numpyro.factor("flat_beta1", jnp.log1p(-alpha1))
    beta1 = numpyro.deterministic("beta1", (1 - alpha1) * share)

    def step(variance, last):
        variance = alpha0 + alpha1 * (last - mu) ** 2 + beta1 * variance
        return variance, variance

    first = jnp.asarray(sigma1**2, y.dtype)
    _, later = jax.lax.scan(step, first * jnp.ones_like(mu), y[:-1])
    variance = jnp.concatenate([first[None], later])
    numpyro.sample("y", dist.Normal(mu, jnp.sqrt(variance)), obs=y)


def hidden_markov(y):
    """Two hidden states with unit emission noise; the first state has weight one in both."""
    rows = [numpyro.sample(f"theta{k}", dist.Dirichlet(jnp.ones(2))) for k in (1, 2)]
    mu = flat("mu", 2, support=constraints.positive_ordered_vector)
    numpyro.factor("mu_prior", dist.Normal(jnp.array([3.0, 10.0]), 1.0).log_prob(mu).sum())
    log_theta = jnp.log(jnp.stack(rows))
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])

    def step(forward, log_p):
        return jax.nn.logsumexp(forward[:, None] + log_theta, axis=0) + log_p, None

    last, _ = jax.lax.scan(step, emission[0], emission[1:])
    numpyro.factor("y", jax.nn.logsumexp(last))


_YEAR = 10
"""Runge–Kutta steps of a year: log-populations at the reference draws are then right to 1e-5."""
_FAR = 15.0
"""Log-populations are kept within ±15, where the draws never are, so that no trial overflows."""


def lotka_volterra(ts, y_init, y):
    """Predators and prey by an ordinary differential equation.

    It is solved for the logarithms by the classical Runge–Kutta method with fixed steps, which all
    draws and chains take together.
    """
    positive = [dist.TruncatedNormal(m, s, low=0.0) for m, s in ((1.0, 0.5), (0.05, 0.05))]
    theta = jnp.stack([numpyro.sample(f"theta{k + 1}", positive[k % 2]) for k in range(4)])
    z_init = numpyro.sample("z_init", dist.LogNormal(np.log(10.0), 1.0).expand((2,)).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(-1.0, 1.0).expand((2,)).to_event(1))
    log_z = predator_and_prey(theta, jnp.log(z_init), len(ts))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma), obs=y_init)
    numpyro.sample("y", dist.LogNormal(log_z, sigma), obs=y)


def predator_and_prey(theta, log_start, years: int):
    """Log-populations ``(years, 2)`` after each year."""
    a, b, c, d = theta

    def slope(log_z):
        u, v = jnp.exp(jnp.clip(log_z, -_FAR, _FAR))
        return jnp.stack([a - b * v, -c + d * u])

    def step(log_z, _):
        h = 1 / _YEAR
        first = slope(log_z)
        second = slope(log_z + h / 2 * first)
        third = slope(log_z + h / 2 * second)
        last = slope(log_z + h * third)
        log_z = log_z + h / 6 * (first + 2 * second + 2 * third + last)
        return jnp.clip(log_z, -_FAR, _FAR), None

    def year(log_z, _):
        log_z, _ = jax.lax.scan(step, log_z, None, length=_YEAR)
        return log_z, log_z

    return jax.lax.scan(year, log_start, None, length=years)[1]


# Hierarchies and processes


def eight_schools(y, sigma):
    """Effects of coaching, non-centred."""
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    raw = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0).expand((len(y),)).to_event(1))
    numpyro.sample("y", dist.Normal(mu + tau * raw, sigma), obs=y)


def gp_poisson(x, k):
    """Counts whose log-rate is a Gaussian process."""
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    raw = numpyro.sample("f_tilde", dist.Normal(0.0, 1.0).expand((len(x),)).to_event(1))
    square = jnp.square(x[:, None] - x[None, :])
    cov = alpha**2 * jnp.exp(-0.5 * square / rho**2) + GP_JITTER * jnp.eye(len(x))
    f = numpyro.deterministic("f", jnp.linalg.cholesky(cov) @ raw)
    numpyro.sample("k", dist.Poisson(jnp.exp(f)), obs=k)


def _gp_draws(values: Values, x) -> np.ndarray:
    """The process itself, in double precision."""
    rho, alpha, raw = (np.asarray(values[k], float) for k in ("rho", "alpha", "f_tilde"))
    square = np.square(x[:, None] - x[None, :])
    scale = alpha[..., None, None] ** 2
    cov = scale * np.exp(-0.5 * square / rho[..., None, None] ** 2) + GP_JITTER * np.eye(len(x))
    f = (np.linalg.cholesky(cov) @ raw[..., None])[..., 0]
    return np.concatenate([rho[..., None], alpha[..., None], f], -1)


# From models to names


def _way(**widths: int) -> tuple[Callable[[Values], np.ndarray], Callable[[np.ndarray], Values]]:
    """From values to columns side by side, and back; a scalar has width 0 and takes one column."""

    def stack(values):
        arrays = [np.asarray(values[name]) for name in widths]
        pairs = zip(arrays, widths.values(), strict=True)
        return np.concatenate([x if width else x[..., None] for x, width in pairs], -1)

    def cut(draws):
        found, start = {}, 0
        for name, width in widths.items():
            stop = start + max(width, 1)
            found[name] = draws[..., start:stop] if width else draws[..., start]
            start = stop
        return found

    return stack, cut


def _columns(data: dict, *names: str) -> np.ndarray:
    arrays = [np.asarray(data[name], float) for name in names]
    return np.stack([np.ones_like(arrays[0]), *arrays], 1)


def _linear(name: str, x: np.ndarray, y, model: Callable = regression) -> Case:
    width = x.shape[1]
    way = _way(beta=width, sigma=0)
    return Case(name, model, (x, np.asarray(y, float)), *way)


def cases(arrays: Any) -> dict[str, Case]:
    """All posteriors by name, from the arrays of posteriordb.npz."""

    def data(name):
        return json.loads(arrays[f"data:{name}"].tobytes())

    made = [*_regressions(data), *_series(data), *_hierarchies(data)]
    return {case.name: case for case in made}


def _regressions(data) -> list[Case]:
    earn, kids, bush, votes, wide = (
        data(name) for name in ("earnings", "kidiq", "mesquite", "nes1980", "sblrc")
    )
    gems = data("diamonds")
    height, log_earn = _columns(earn, "height"), np.log(earn["earn"])
    volume = np.prod([bush[k] for k in ("diam1", "diam2", "canopy_height")], axis=0)
    sizes = ("diam1", "diam2", "canopy_height", "total_height", "density", "group")
    ages = {f"age{k}": np.asarray(votes["age_discrete"]) == k for k in (2, 3, 4)}
    opinion = ("real_ideo", "race_adj", *ages, "educ1", "gender", "income")
    columns = np.asarray(gems["X"], float)[:, 1:]
    gem_data = (columns - columns.mean(0), np.asarray(gems["Y"], float))
    gem_way = _way(b=columns.shape[1], Intercept=0, sigma=0)
    scores = {
        "momhs": ("mom_hs",),
        "momiq": ("mom_iq",),
        "momhsiq": ("mom_hs", "mom_iq"),
    }
    return [
        _linear("earnings-earn_height", height, earn["earn"]),
        _linear("earnings-logearn_height", height, log_earn),
        *(
            _linear(
                f"kidiq-kidscore_{key}",
                _columns(kids, *names),
                kids["kid_score"],
                regression_cauchy,
            )
            for key, names in scores.items()
        ),
        _linear("mesquite-mesquite", _columns(bush, *sizes), bush["weight"]),
        _linear(
            "mesquite-logmesquite_logvolume",
            _columns({"volume": np.log(volume)}, "volume"),
            np.log(bush["weight"]),
        ),
        _linear("nes1980-nes", _columns({**votes, **ages}, *opinion), votes["partyid7"]),
        _linear("sblrc-blr", np.asarray(wide["X"], float), wide["y"], regression_normal),
        Case("diamonds-diamonds", diamonds, gem_data, *gem_way),
    ]


def _series(data) -> list[Case]:
    k, y = data("arK")["K"], np.asarray(data("arK")["y"], float)
    past = np.stack([y[k - lag : len(y) - lag] for lag in range(1, k + 1)], 1)
    market, hidden, hares = data("garch"), data("hmm_example"), data("hudson_lynx_hare")
    names = [f"theta{i}" for i in range(1, 5)]

    def from_garch(draws):
        mu, alpha0, alpha1, beta1 = np.moveaxis(draws, -1, 0)
        return {"mu": mu, "alpha0": alpha0, "alpha1": alpha1, "share": beta1 / (1 - alpha1)}

    def to_garch(values):
        beta1 = (1 - np.asarray(values["alpha1"])) * np.asarray(values["share"])
        return np.stack([*(np.asarray(values[k]) for k in ("mu", "alpha0", "alpha1")), beta1], -1)

    return [
        Case(
            "arK-arK",
            ar,
            (past, y[k:]),
            *_way(alpha=0, beta=k, sigma=0),
        ),
        Case(
            "garch-garch11",
            garch,
            (np.asarray(market["y"], float), float(market["sigma1"])),
            to_garch,
            from_garch,
        ),
        Case(
            "hmm_example-hmm_example",
            hidden_markov,
            (np.asarray(hidden["y"], float),),
            *_way(theta1=2, theta2=2, mu=2),
        ),
        Case(
            "hudson_lynx_hare-lotka_volterra",
            lotka_volterra,
            tuple(np.asarray(hares[key], float) for key in ("ts", "y_init", "y")),
            *_way(**dict.fromkeys(names, 0), z_init=2, sigma=2),
        ),
    ]


def _hierarchies(data) -> list[Case]:
    schools, counts = data("eight_schools"), data("gp_pois_regr")
    x = np.asarray(counts["x"], float)

    def to_schools(values):
        mu, tau = (np.asarray(values[name])[..., None] for name in ("mu", "tau"))
        return np.concatenate([mu + tau * np.asarray(values["theta_trans"]), mu, tau], -1)

    def from_schools(draws):
        theta, mu, tau = draws[..., :-2], draws[..., -2], draws[..., -1]
        raw = (theta - mu[..., None]) / tau[..., None]
        return {"mu": mu, "tau": tau, "theta_trans": raw}

    return [
        Case(
            "eight_schools-eight_schools_noncentered",
            eight_schools,
            tuple(np.asarray(schools[key], float) for key in ("y", "sigma")),
            to_schools,
            from_schools,
        ),
        Case(
            "gp_pois_regr-gp_pois_regr",
            gp_poisson,
            (x, np.asarray(counts["k"])),
            lambda values: _gp_draws(values, x),
            None,
            double=True,
        ),
    ]


def reference(arrays: Any, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """The reference draws ``(10, 1000, P)`` in double precision, and their names."""
    names = tuple(str(n) for n in arrays[f"{name}__names"])
    return np.asarray(arrays[f"{name}__draws"], float), names


def stein(
    target: Any, draws: np.ndarray, from_reference: Callable
) -> tuple[np.ndarray, np.ndarray]:
    """How far reference draws are from Stein's identities for a target, in standard errors.

        E ∂_i ln p̃(z) = 0,        E (z_i − E z_i) ∂_i ln p̃(z) = −1

    They hold for every smooth density without mass at the edges, so a wrong density shows.

    Args:
        target: A `laminar.inference.Target`.
        draws: Reference draws ``(chains, n, P)``.
        from_reference: From such draws to the target's values.

    Returns:
        The two deviations for each unconstrained coordinate.
    """
    flat_draws = draws.reshape(-1, draws.shape[-1])
    z = target.unconstrain({k: jnp.asarray(v) for k, v in from_reference(flat_draws).items()})
    scores = np.asarray(jax.lax.map(jax.grad(target.log_density), z, batch_size=500))
    centred = np.asarray(z) - np.asarray(z).mean(0)
    products = centred * scores + 1

    def deviation(terms):
        return terms.mean(0) / (terms.std(0) / np.sqrt(len(terms)))

    return deviation(scores), deviation(products)
