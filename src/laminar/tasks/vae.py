"""The deep latent Gaussian model: a variational autoencoder whose posterior is a flow.

    z ~ p(z),    x ~ p(x | z),    z_K = f_K ∘ … ∘ f_1(z_0),    z_0 ~ N(μ(x), diag σ²(x))

Every part is a distribution of laminar. The posterior q(z | x) is a conditional `Flow` whose
embedding is the inference network: it runs once for each x and sets the normal law of z_0 and the
parameters of the flow. The prior is a standard normal or a flow; p(x | z) is Bernoulli, or a
conditional flow over dequantised pixels. A `VAE` is itself a distribution, of whose density only a
lower bound can be had, so `laminar.fit` trains it like any other:

    model = vae(784, 40, posterior="planar", layers=80, key=model_key)
    objective = free_energy(linear_annealing())
    model, history = laminar.fit(fit_key, model, x, objective=objective, batch_size=100)
    log_p = model.log_likelihood(key, x_test).log_prob

Rezende & Mohamed (2015), "Variational Inference with Normalizing Flows".
"""

import functools
import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax

from laminar import zoo
from laminar._checks import check_sizes
from laminar._errors import InputError, ShapeError
from laminar._params import Frozen, expand
from laminar._typing import Array, ArrayLike, Callable, PRNGKeyArray, Shape
from laminar.bijections.amortized import Amortized, count_parameters
from laminar.bijections.base import AbstractTransform, Identity
from laminar.bijections.compose import Chain
from laminar.bijections.elementwise import Sigmoid
from laminar.density import AbstractDistribution, apply_net
from laminar.distributions import ConditionalNormal, Normal
from laminar.flow import Flow
from laminar.nn.mlp import Dense
from laminar.objectives import Annealing, Batch
from laminar.tasks.networks import Decoder, Gentle, Maxout

Observe = Callable[[PRNGKeyArray, Array], Array]
"""What turns the stored rows into observed ones, such as `binarise`."""

LAYERS = {"diagonal": 0, "planar": 10, "radial": 10, "sylvester": 4, "nice": 10, "iaf": 4}
"""The kinds of posterior, with how many layers each has unless told."""

_DRAWS = 20
_ROWS = {"cpu": 100}
_MOST_ROWS = 1000


class Evidence(NamedTuple):
    """Estimates of ln p(x) for each row, from S draws z_s of the posterior.

    Attributes:
        log_prob: ln (1/S) Σ_s w_s with w_s = p(x, z_s) / q(z_s | x). It is below ln p(x) on
            average, and the less so the more draws there are.
        error: Its standard error over draws by the delta method; NaN for a single draw.
        elbo: The mean of ln w_s, an unbiased estimate of the evidence lower bound.
        ess: Effective number of draws, (Σ w_s)² / Σ w_s². Near one, `log_prob` is too low by more
            than `error` tells.
    """

    log_prob: Array
    error: Array
    elbo: Array
    ess: Array


class VAE(AbstractDistribution):
    """A latent-variable model p(x) = ∫ p(x | z) p(z) dz with its approximate posterior.

        ln p(x) ≥ E_q(z | x)[ln p(x | z) + ln p(z) − ln q(z | x)]

    As a distribution it samples exactly; its `log_prob` is that bound from a single draw, so it
    needs a key. `log_likelihood` is far tighter.

    Args:
        posterior: q(z | x), a flow with an embedding of x.
        prior: p(z); in a `Frozen` it is not trained.
        decoder: p(x | z), conditional on a vector z.

    Raises:
        ShapeError: If the three do not fit.
    """

    posterior: Flow
    prior: AbstractDistribution | Frozen[AbstractDistribution]
    decoder: AbstractDistribution

    def __check_init__(self):
        latent = self._prior.shape
        fits = self.posterior.shape == latent == self.decoder.cond_shape
        if not fits or self._prior.cond_shape is not None:
            raise ShapeError(
                f"VAE: the posterior draws {self.posterior.shape}, the prior {latent} under the "
                f"condition {self._prior.cond_shape}, and the decoder takes "
                f"{self.decoder.cond_shape}; all must be one shape, and the condition None."
            )
        if self.posterior.cond_shape != self.decoder.shape:
            raise ShapeError(
                f"VAE: the posterior takes events of shape {self.posterior.cond_shape}, the "
                f"decoder draws {self.decoder.shape}."
            )

    @property
    def _prior(self) -> AbstractDistribution:
        return self.prior.value if isinstance(self.prior, Frozen) else self.prior

    @property
    def shape(self) -> Shape:
        """Shape of one x."""
        return self.decoder.shape

    @property
    def cond_shape(self) -> None:
        """None: the model of x takes no condition."""
        return

    @property
    def exactness(self) -> str:
        """``"bound"``."""
        return "bound"

    def _row_cost(self, direction):
        parts = (self.posterior._row_cost("forward"), self.decoder._row_cost(direction))
        return 4 * max(parts)

    def _log_prob(self, x, condition=None, *, key=None):
        if key is None:
            raise InputError("VAE: the density is a bound from random draws, so it needs a key.")
        return self._log_weights(key, x, self.posterior._embedded(x), 1)[0]

    def _sample(self, key, batch=(), condition=None):
        prior_key, decoder_key = jr.split(key)
        return self.decoder._sample(decoder_key, batch, self._prior._sample(prior_key, batch))

    def _infer(self, key: PRNGKeyArray, h: Array, path_gradient: bool = False):
        """Draws of q(z | x), one for each encoding, with ln q; all batch-last.

        With `path_gradient`, ln q is differentiated through z alone.
        """
        q = Flow(self.posterior.base, self.posterior.bijection)
        if not path_gradient:
            return q._sample_and_log_prob(key, h.shape[1:], h)
        z = q._sample(key, h.shape[1:], h)
        return z, Frozen(q).value._log_prob(z, lax.stop_gradient(h))

    def _log_weights(self, key: PRNGKeyArray, x: Array, h: Array, draws: int) -> Array:
        """The terms ln p(x, z) − ln q(z | x) of some draws for each row, ``(draws, rows)``."""

        def one(key):
            infer_key, decoder_key = jr.split(key)
            z, log_q = self._infer(infer_key, h)
            log_p = self.decoder._log_prob(x, z, key=decoder_key) + self._prior._log_prob(z)
            return log_p - log_q

        # Mapped over keys, whatever depends on h alone is computed once.
        return jax.vmap(one)(jr.split(key, draws))

    def log_likelihood(
        self,
        key: PRNGKeyArray,
        x: ArrayLike,
        samples: int = 200,
        *,
        batch_size: int | None = None,
    ) -> Evidence:
        """Estimate ln p(x) of every row by importance sampling from the posterior.

        Args:
            key: Random key. The draws depend on it and on `batch_size`.
            x: Events ``batch + shape``.
            samples: Draws S for each row; 200 in the paper.
            batch_size: Rows in one chunk.

        Returns:
            Estimates of the batch shape, in nats.

        Raises:
            ShapeError: If x does not fit.
            InputError: If `samples` or `batch_size` is not positive.
        """
        x, batch = self._check_event(x, self.shape, "x")
        if batch_size is None:
            batch_size = _ROWS.get(jax.default_backend(), _MOST_ROWS)
        check_sizes("VAE.log_likelihood", samples=samples, batch_size=batch_size)
        rows = _evidence(self, key, x.reshape((-1, *self.shape)), samples, batch_size)
        return Evidence(*(value.reshape(batch) for value in rows))

    def encode(self, key: PRNGKeyArray, x: ArrayLike, shape: Shape | int = ()) -> Array:
        """Latent codes: draws of q(z | x), ``shape`` for each x of ``batch + self.shape``."""
        return self.posterior.sample(key, shape, x)

    def decode(self, key: PRNGKeyArray, z: ArrayLike) -> Array:
        """What latent codes ``batch + latent shape`` stand for.

        Returns:
            The mean of p(x | z) where it is known in closed form, as for Bernoulli pixels, and
            otherwise a draw, ``batch + self.shape``.
        """
        if not isinstance(self.decoder, Bernoulli):
            return self.decoder.sample(key, (), z)
        return self.decoder.mean(z)

    def reconstruct(self, key: PRNGKeyArray, x: ArrayLike) -> Array:
        """Encode and decode: one image for each x, by one draw of its posterior."""
        encode_key, decode_key = jr.split(key)
        return self.decode(decode_key, self.encode(encode_key, x))


@eqx.filter_jit
def _evidence(model: VAE, key: PRNGKeyArray, x: Array, samples: int, size: int) -> Evidence:
    """`VAE.log_likelihood` of rows ``(N, *shape)``, in chunks of rows and of draws."""
    count, size = len(x), max(min(size, len(x)), 1)
    chunks = -(-count // size)
    at_once = min(samples, _DRAWS)
    # Padding repeats a true row.
    x = jnp.pad(x, [(0, chunks * size - count)] + [(0, 0)] * (x.ndim - 1), mode="edge")

    def rows(at):
        key, x = at
        x = jnp.moveaxis(x, 0, -1)
        h = model.posterior._embedded(x)
        keys = jr.split(key, -(-samples // at_once))
        log_w = lax.map(lambda key: model._log_weights(key, x, h, at_once), keys)
        return _summary(log_w.reshape((-1, size))[:samples])

    out = lax.map(rows, (jr.split(key, chunks), x.reshape((chunks, size, *x.shape[1:]))))
    return Evidence(*(value.reshape(-1)[:count] for value in out))


def _summary(log_w: Array) -> Evidence:
    """The estimates from log weights ``(S, rows)``."""
    samples = len(log_w)
    total = jax.nn.logsumexp(log_w, axis=0)
    ess = jnp.exp(2 * total - jax.nn.logsumexp(2 * log_w, axis=0))
    error = jnp.sqrt(jnp.maximum(samples / ess - 1, 0) / (samples - 1 or jnp.nan))
    return Evidence(total - math.log(samples), error, log_w.mean(0), ess)


class Bernoulli(AbstractDistribution):
    """Independent binary entries whose log-odds a network reads from the condition.

        ln p(x | c) = Σ_i [ x_i l_i − ln(1 + e^{l_i}) ],    l = net(c)

    Args:
        net: Maps one condition to logits of the event's shape; any callable. With an attribute
            ``batch_last = True`` it takes trailing batch axes itself.
        shape: Event shape.
        cond_shape: Shape of one condition.
    """

    net: Callable
    shape: Shape = eqx.field(static=True)
    cond_shape: Shape = eqx.field(static=True)

    def __init__(self, net: Callable, shape: Shape | int, cond_shape: Shape | int):
        self.net = net
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.cond_shape = (cond_shape,) if isinstance(cond_shape, int) else tuple(cond_shape)

    def _logits(self, condition: Array) -> Array:
        logits = apply_net(self.net, condition, self.cond_shape)
        batch = condition.shape[len(self.cond_shape) :]
        if logits.size != math.prod(self.shape + batch):
            raise ShapeError(
                f"Bernoulli: the network gives {logits.shape} for conditions {condition.shape}, "
                f"but events have shape {self.shape}."
            )
        return logits.reshape(self.shape + batch)

    def _log_prob(self, x, condition=None, *, key=None):
        logits = expand(self._logits(condition), x.ndim)
        return (x * logits - jax.nn.softplus(logits)).sum(tuple(range(len(self.shape))))

    def _sample(self, key, batch=(), condition=None):
        logits = expand(self._logits(condition), len(self.shape + batch))
        drawn = jr.bernoulli(key, jax.nn.sigmoid(logits), self.shape + batch)
        return drawn.astype(logits.dtype)

    def mean(self, condition: ArrayLike) -> Array:
        """The probabilities of ones, ``batch + shape`` for conditions ``batch + cond_shape``."""
        c, batch = self._check_condition(condition)
        c = jnp.moveaxis(c.reshape((-1, *self.cond_shape)), 0, -1)
        return jnp.moveaxis(jax.nn.sigmoid(self._logits(c)), -1, 0).reshape(batch + self.shape)


def binarise(key: PRNGKeyArray, x: Array) -> Array:
    """Draw every entry as a bit that is one with the probability that the entry is.

    Applied once to data, this is the fixed protocol; given to `free_energy` as `observe`, it draws
    anew whenever a row is used, which is the dynamic one.

    Args:
        key: Random key.
        x: Numbers from 0 to 1, such as pixels divided by the largest value.

    Returns:
        Zeros and ones of the shape and dtype of x.
    """
    return jr.bernoulli(key, x).astype(x.dtype)


class UniformDequantisation(eqx.Module):
    """Spread whole levels over [0, 1): x ↦ (round(x (L − 1)) + u) / L with u uniform on [0, 1).

    A density of the result bounds the probability of the levels (Theis et al. 2016): bits for each
    dimension are log₂ L − log₂ p(x) / D.

    Args:
        levels: Number of levels L.
    """

    levels: int = eqx.field(static=True, default=256)

    def __call__(self, key: PRNGKeyArray, x: Array) -> Array:
        """Fresh noise for x from 0 to 1."""
        y = (jnp.round(x * (self.levels - 1)) + jr.uniform(key, x.shape, x.dtype)) / self.levels
        # Rounding must not put it on the edge of the support.
        edge = jnp.finfo(x.dtype).epsneg
        return jnp.clip(y, edge, 1 - edge)


class FreeEnergy(eqx.Module):
    """The objective that `free_energy` makes."""

    anneal: Annealing | None
    samples: int
    path_gradient: bool
    observe: Observe | None

    def __call__(
        self, model: VAE, batch: Batch, key: PRNGKeyArray, *, step: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """The free energy of a batch, and its parts at β = 1."""
        if not isinstance(model, VAE):
            raise InputError(f"free_energy trains a VAE, not a {type(model).__name__}.")
        observe_key, draw_key = jr.split(key)
        x, rows = model._check_event(batch.x, model.shape, "x")
        if len(rows) != 1:
            raise ShapeError(f"free_energy: x has batch axes {rows}, but a batch has exactly one.")
        weights = jnp.ones(rows, x.dtype) if batch.weights is None else batch.weights
        weights = jnp.asarray(weights, x.dtype)
        used = weights > 0
        x = jnp.where(used.reshape((-1,) + (1,) * len(model.shape)), x, 0)
        x = x if self.observe is None else self.observe(observe_key, x)
        x = jnp.moveaxis(x, 0, -1)
        h = model.posterior._embedded(x)

        def draw(key):
            infer_key, decoder_key = jr.split(key)
            z, log_q = model._infer(infer_key, h, self.path_gradient)
            return log_q, model._prior._log_prob(z), model.decoder._log_prob(x, z, key=decoder_key)

        if self.samples == 1:
            terms = draw(draw_key)
        else:
            terms = [t.mean(0) for t in jax.vmap(draw)(jr.split(draw_key, self.samples))]
        total = weights.sum()
        share = weights / jnp.where(total > 0, total, 1)
        log_q, log_prior, log_x = (jnp.where(used, share * term, 0).sum() for term in terms)
        aux = {
            "elbo": log_x + log_prior - log_q,
            "log_likelihood": log_x,
            "kl": log_q - log_prior,
            "weight": total,
        }
        if self.anneal is None or step is None:
            return -aux["elbo"], aux
        beta = jnp.asarray(self.anneal(step)).astype(x.dtype)
        return log_q - beta * (log_x + log_prior), aux


def free_energy(
    anneal: Annealing | None = None,
    *,
    samples: int = 1,
    path_gradient: bool = False,
    observe: Observe | None = None,
) -> FreeEnergy:
    """The flow free energy, which training makes small (Rezende & Mohamed 2015, eqs. 15 and 20).

        F_t(x) = E_q(z | x)[ln q(z | x) − β_t (ln p(x | z) + ln p(z))]

    Args:
        anneal: β as a function of the step, such as ``objectives.linear_annealing()``, which is
            the paper's; validation always has β = 1, where F is the negative bound on ln p(x).
        samples: Draws of z for each row.
        path_gradient: Leave out the score of q, which is zero on average, so that the gradient has
            less variance near the optimum ("sticking the landing", Roeder et al. 2017). It costs
            the inverse of the posterior: nothing if it is diagonal, one pass more for NICE, a
            sequential pass for IAF, and a root search in each layer of a planar flow.
        observe: What is observed of a stored row at each use, such as `binarise` for the dynamic
            protocol, or ``UniformDequantisation()``; by default the row itself.

    Returns:
        An objective for `laminar.fit`, ``(model, batch, key, step=None) -> (loss, aux)``. Its aux
        holds means over rows, in nats: ``elbo``, ``log_likelihood`` E_q[ln p(x | z)] and ``kl``
        E_q[ln q(z | x) − ln p(z)].

    Raises:
        InputError: If `samples` is not positive.
    """
    check_sizes("free_energy", samples=samples)
    return FreeEnergy(anneal, samples, path_gradient, observe)


def vae(
    dim: int,
    latent: int = 40,
    *,
    key: PRNGKeyArray,
    posterior: str | AbstractTransform = "diagonal",
    layers: int | None = None,
    prior: str | AbstractDistribution = "normal",
    decoder: str | AbstractDistribution = "bernoulli",
    width: int = 400,
    depth: int = 2,
    window: int = 4,
    flow_width: int = 200,
    mean: ArrayLike | None = None,
) -> VAE:
    """Build a `VAE` of vectors. The defaults are the sizes of Rezende & Mohamed (2015, §6.2).

    Args:
        dim: Length of x.
        latent: Length of z.
        key: Draws the weights.
        posterior: The flow that carries the diagonal normal law of z_0: one of `LAYERS`, or a
            bijection of z of your own that takes a condition of shape ``(width,)``, or none.
        layers: Layers K of that flow; by default as `LAYERS` has it.
        prior: ``"normal"``, the standard normal, or ``"flow"``, a flow trained with the rest
            (eight affine coupling layers), or a distribution of z.
        decoder: ``"bernoulli"`` for x of zeros and ones; ``"flow"`` for x in [0, 1], such as
            dequantised pixels, four affine coupling layers over a normal law that depend on z; or a
            distribution of x that takes a condition of shape ``(latent,)``.
        width: Units of a hidden layer.
        depth: Hidden layers of the inference network, and as many of the decoder.
        window: Affine maps in the maxout of each unit; 1 means ReLU.
        flow_width: Hidden units of the networks inside NICE and IAF, and of flows as prior or
            decoder.
        mean: Mean of the data, ``(dim,)``, at which the decoder then starts.

    Raises:
        InputError: If a name or size has no meaning.
        ShapeError: If a part given does not fit.
    """
    sizes = {"dim": dim, "latent": latent, "width": width, "depth": depth, "window": window}
    check_sizes("vae", **sizes, flow_width=flow_width)
    encoder_key, head_key, flow_key, prior_key, decoder_key = jr.split(key, 5)
    trunk = functools.partial(Maxout, width=width, depth=depth, window=window)
    head = Dense(width, 2 * latent, key=head_key)
    bijection = _posterior_flow(posterior, latent, layers, width, flow_width, flow_key)
    base = ConditionalNormal(head, latent, width)
    return VAE(
        Flow(base, bijection, trunk(dim, key=encoder_key)),
        _make_prior(prior, latent, flow_width, prior_key),
        _make_decoder(decoder, dim, latent, trunk, flow_width, mean, decoder_key),
    )


def _posterior_flow(
    kind: str | AbstractTransform,
    latent: int,
    layers: int | None,
    context: int,
    width: int,
    key: PRNGKeyArray,
) -> AbstractTransform:
    if isinstance(kind, AbstractTransform):
        return kind
    if kind not in LAYERS:
        raise InputError(f"vae: posterior is {kind!r}; choose one of {', '.join(LAYERS)}.")
    if kind == "diagonal":
        return Identity((latent,))
    count = LAYERS[kind] if layers is None else layers
    check_sizes("vae", layers=count)
    build = getattr(zoo, kind)
    if kind in ("nice", "iaf"):
        return build(latent, key=key, layers=count, width=width, depth=1, cond_dim=context)._map
    flow_key, net_key = jr.split(key)
    flow = build(latent, key=flow_key, layers=count)._map
    net = Dense(context, count_parameters(flow), key=net_key, gain=0.0, use_bias=False)
    return Amortized(flow, Gentle(net), context)


def _make_prior(
    kind: str | AbstractDistribution, latent: int, width: int, key: PRNGKeyArray
) -> AbstractDistribution | Frozen[AbstractDistribution]:
    if isinstance(kind, AbstractDistribution):
        return kind
    normal: Frozen[AbstractDistribution] = Frozen(Normal(latent))
    if kind == "normal":
        return normal
    if kind != "flow":
        raise InputError(f"vae: prior is {kind!r}; choose 'normal', 'flow' or a distribution.")
    return Flow(normal, zoo.realnvp(latent, key=key, layers=8, width=width, depth=1)._map)


def _make_decoder(
    kind: str | AbstractDistribution,
    dim: int,
    latent: int,
    trunk: Any,
    width: int,
    mean: ArrayLike | None,
    key: PRNGKeyArray,
) -> AbstractDistribution:
    if isinstance(kind, AbstractDistribution):
        return kind
    if kind not in ("bernoulli", "flow"):
        raise InputError(f"vae: decoder is {kind!r}; choose 'bernoulli', 'flow' or a distribution.")
    trunk_key, head_key, flow_key = jr.split(key, 3)
    start = jnp.full((dim,), 0.5) if mean is None else jnp.asarray(mean, jnp.result_type(float))
    if start.shape != (dim,):
        raise ShapeError(f"vae: mean has shape {start.shape}, but x has {dim} entries.")
    start = jnp.clip(start, 0.01, 0.99)
    start = jnp.log(start) - jnp.log1p(-start)
    binary = kind == "bernoulli"
    head = Dense(trunk.keywords["width"], dim if binary else 2 * dim, key=head_key, gain=0.1)
    bias = start if binary else jnp.concatenate([start, jnp.zeros_like(start)])
    head = eqx.tree_at(lambda head: head.bias, head, bias)
    net = Decoder(trunk(latent, key=trunk_key), head)
    if binary:
        return Bernoulli(net, dim, latent)
    stack = zoo.realnvp(dim, key=flow_key, layers=4, width=width, depth=1, cond_dim=latent)._map
    return Flow(ConditionalNormal(net, dim, latent), Chain([stack, Sigmoid((dim,))]))
