"""Curvatures of models of several frameworks, as they are, against dense matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import diffprog as dp

from .helpers import close


KEY = jr.key(0)
LETTERS, WIDTH, LENGTH = 5, 4, 3
TEXTS = jr.randint(KEY, (4, LENGTH), 0, LETTERS)
NEXT = jnp.roll(TEXTS, -1, 1)


class OfEquinox(eqx.Module):
    """A convolution, attention, two normalizations, and an embedding used twice."""

    embedding: eqx.nn.Embedding
    convolution: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.embedding = eqx.nn.Embedding(LETTERS, WIDTH, key=keys[0])
        self.convolution = eqx.nn.Conv1d(WIDTH, WIDTH, 3, padding=1, key=keys[1])
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=keys[2])
        self.norm = eqx.nn.LayerNorm(WIDTH)

    def __call__(self, letters):
        x = jax.vmap(self.embedding)(letters)
        x = x + jax.nn.gelu(self.convolution(x.T).T)
        x = jax.vmap(self.norm)(x + self.attention(x, x, x))
        return x @ self.embedding.weight.T


class OfLinen(linen.Module):
    @linen.compact
    def __call__(self, letters):
        embedding = linen.Embed(LETTERS, WIDTH, param_dtype=float)
        x = embedding(letters)
        x = x + linen.gelu(linen.Conv(WIDTH, (3,), param_dtype=float)(x))
        attention = linen.MultiHeadDotProductAttention(2, param_dtype=float)
        x = linen.LayerNorm(param_dtype=float)(x + attention(x))
        return embedding.attend(x)


class OfNNX(nnx.Module):
    def __init__(self, rngs):
        options = dict(param_dtype=jnp.float64, dtype=jnp.float64, rngs=rngs)
        self.embedding = nnx.Embed(LETTERS, WIDTH, **options)
        self.convolution = nnx.Conv(WIDTH, WIDTH, (3,), **options)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, **options)
        self.norm = nnx.LayerNorm(WIDTH, **options)

    def __call__(self, letters):
        x = self.embedding(letters)
        x = x + nnx.gelu(self.convolution(x))
        return self.embedding.attend(self.norm(x + self.attention(x)))


def of_equinox():
    return OfEquinox(KEY), None


def of_linen():
    module = OfLinen()
    return module.init(KEY, TEXTS), module.apply


def of_nnx():
    graph, params, rest = nnx.split(OfNNX(nnx.Rngs(0)), nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest)(x)


# The attention of NNX takes its softmax in float32.
MODELS = {"equinox": (of_equinox, 1e-12), "linen": (of_linen, 1e-12)}
MODELS |= {"nnx": (of_nnx, 1e-6)}


@pytest.mark.slow
@pytest.mark.parametrize("framework", MODELS)
def test_products_of_models_as_they_are_equal_dense_ones(framework):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        make, rtol = MODELS[framework]
        model, predict = make()
        loss = dp.losses.SoftmaxCrossEntropy()
        at = dp.optim.ggn(loss, predict)(model, TEXTS, NEXT)
        params, rest = eqx.partition(model, eqx.is_inexact_array)
        flat, unravel = ravel_pytree(params)
        d = jr.normal(KEY, flat.shape)
        run = predict or (lambda model, x: jax.vmap(model)(x))
        outputs = lambda w: run(eqx.combine(unravel(w), rest), TEXTS)
        total = lambda z: jnp.sum(loss(z.reshape(*TEXTS.shape, LETTERS), NEXT))

        @jax.jit
        def dense():
            z = outputs(flat).ravel()
            J = jax.jacfwd(lambda w: outputs(w).ravel())(flat)
            g = jax.grad(total)(z)
            return J.T @ jax.hessian(total)(z) @ J / len(TEXTS), J.T @ g / len(TEXTS)

        @jax.jit
        def ours(at):
            model = at.linearize()
            return ravel_pytree(model.mv(unravel(d)))[0], model.gradient

        C, g = dense()
        Cd, gradient = ours(at)
        close(Cd, C @ d, rtol, scale="norm")
        optimizer = dp.optim.model_step(optax.scale(-1.0))
        state = optimizer.init(params)
        update = jax.jit(lambda at: optimizer.update(gradient, state, curvature=at))
        updates, state = update(at)
        assert state.result == dp.RESULTS.successful
        a = g @ g / (g @ C @ g + 1e-3 * g @ g) / (1 + 1e-4)
        close(ravel_pytree(updates)[0], -0.5 * a * g, 10 * rtol, scale="norm")
