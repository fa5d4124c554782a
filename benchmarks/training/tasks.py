"""Networks and data of the study. Nothing is downloaded."""

import pydoc_data.topics
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from sklearn import datasets

import diffprog as dp
from diffprog.extend import diagonal_factor, total
from diffprog.losses import AbstractLoss, Logistic, SoftmaxCrossEntropy, Squared


class Task(NamedTuple):
    """What is trained: `model(key)`, on examples and their targets.

    - `title`: what it is, in a few words.
    - `goals`: values of the training loss whose first step is reported.
    """

    name: str
    title: str
    model: Callable
    loss: AbstractLoss
    train: tuple[Any, Any]
    test: tuple[Any, Any]
    steps: int
    goals: tuple[float, ...] = ()
    batch: int = 128


class Bernoulli(AbstractLoss):
    """Cross entropy of probabilities p: sum of p softplus(-u) + (1 - p) softplus(u)."""

    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        softplus = jax.nn.softplus
        return total(targets * softplus(-outputs) + (1 - targets) * softplus(outputs))

    def count(self, outputs, targets):
        return outputs.shape[0]

    def gradient(self, outputs, targets):
        return jax.nn.sigmoid(outputs) - targets

    def hessian_mv(self, outputs, targets, vector):
        return jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs) * vector

    def factor(self, outputs, targets):
        g = self.gradient(outputs, targets)
        curvature = jax.nn.sigmoid(outputs) * jax.nn.sigmoid(-outputs)
        return diagonal_factor(g, curvature, jnp.finfo(g.dtype).eps * jnp.abs(g))


def dense(sizes, activations, key):
    """Layers with an activation after each, `None` for none."""
    layers = []
    keys = jr.split(key, len(activations))
    for a, b, activation, k in zip(sizes, sizes[1:], activations, keys):
        layers.append(eqx.nn.Linear(a, b, key=k))
        layers += [activation] if activation else []
    return dp.Network(layers)


def split(inputs, targets, share=0.8):
    """Training and test examples, shuffled once for good."""
    order = np.random.default_rng(0).permutation(len(inputs))
    cut = int(share * len(inputs))
    part = lambda rows: (jnp.asarray(inputs[rows]), jnp.asarray(targets[rows]))
    return part(order[:cut]), part(order[cut:])


def digits():
    data = datasets.load_digits()
    return (data.data / 16).astype(np.float32), data.target.astype(np.int32)


def classifier() -> Task:
    model = lambda key: dense((64, 128, 128, 10), (jnp.tanh, jnp.tanh, None), key)
    goals = 0.03, 0.01, 0.001
    return Task(
        "classifier",
        "Digits, dense classifier 64-128-128-10",
        model,
        SoftmaxCrossEntropy(),
        *split(*digits()),
        240,
        goals,
    )


def autoencoder() -> Task:
    sizes, inputs = (64, 96, 8, 96, 64), digits()[0]
    model = lambda key: dense(sizes, (jnp.tanh, None, jnp.tanh, None), key)
    return Task(
        "autoencoder",
        "Digits, dense autoencoder 64-96-8-96-64",
        model,
        Bernoulli(),
        *split(inputs, inputs),
        240,
        (17.5, 16.5),
    )


def deep() -> Task:
    sizes = (64,) * 7 + (10,)
    model = lambda key: dense(sizes, (jnp.tanh,) * 6 + (None,), key)
    goals = 0.03, 0.01, 0.001
    loss = SoftmaxCrossEntropy()
    return Task(
        "7 layers",
        "Digits, seven dense layers",
        model,
        loss,
        *split(*digits()),
        240,
        goals,
    )


class Residual(eqx.Module):
    """A convolutional residual network for images of 8 x 8."""

    convolutions: list[eqx.nn.Conv2d]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys, sizes = jr.split(key, 4), (1, 16, 32, 32)
        self.convolutions = [
            eqx.nn.Conv2d(a, b, 3, padding=1, key=k)
            for a, b, k in zip(sizes, sizes[1:], keys)
        ]
        self.head = eqx.nn.Linear(32, 10, key=keys[3])

    def __call__(self, x):
        first, second, third = self.convolutions
        x = jax.nn.relu(first(x.reshape(1, 8, 8)))
        x = eqx.nn.AvgPool2d(2, 2)(jax.nn.relu(second(x)))
        x = x + jax.nn.relu(third(x))
        return self.head(jnp.mean(x, (1, 2)))


def convolutional() -> Task:
    return Task(
        "convolutions",
        "Digits, convolutional residual network",
        Residual,
        SoftmaxCrossEntropy(),
        *split(*digits()),
        200,
    )


WIDTH, HEADS, LENGTH = 48, 4, 48


class Block(eqx.Module):
    """Attention to what came before, and a small network, with residuals."""

    attention: eqx.nn.MultiheadAttention
    norms: list[eqx.nn.LayerNorm]
    network: eqx.nn.MLP

    def __init__(self, key):
        first, second = jr.split(key)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=first)
        self.norms = [eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)]
        self.network = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=second)

    def __call__(self, x):
        before, after = (jax.vmap(norm) for norm in self.norms)
        y = before(x)
        x = x + self.attention(y, y, y, mask=jnp.tril(jnp.ones((LENGTH, LENGTH), bool)))
        return x + jax.vmap(self.network)(after(x))


class Transformer(eqx.Module):
    """The next character of a text, at every place."""

    embedding: eqx.nn.Embedding
    places: jax.Array
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, letters, key):
        keys = jr.split(key, 5)
        self.embedding = eqx.nn.Embedding(letters, WIDTH, key=keys[0])
        self.places = 0.02 * jr.normal(keys[1], (LENGTH, WIDTH))
        self.blocks = [Block(keys[2]), Block(keys[3])]
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, letters, key=keys[4])

    def __call__(self, letters):
        x = jax.vmap(self.embedding)(letters) + self.places
        for block in self.blocks:
            x = block(x)
        return jax.vmap(self.head)(jax.vmap(self.norm)(x))


class PerLetter(AbstractLoss):
    """The cross entropy of a text, in the mean over its letters."""

    loss: SoftmaxCrossEntropy = SoftmaxCrossEntropy()
    smooth: ClassVar[bool] = True

    def __call__(self, outputs, targets):
        return self.loss(outputs, targets) / LENGTH

    def count(self, outputs, targets):
        return self.loss.count(outputs, targets)

    def gradient(self, outputs, targets):
        return self.loss.gradient(outputs, targets) / LENGTH

    def hessian_mv(self, outputs, targets, vector):
        return self.loss.hessian_mv(outputs, targets, vector) / LENGTH

    def factor(self, outputs, targets):
        raise NotImplementedError("Nothing in this study asks for it.")


def transformer() -> Task:
    """Pieces of 48 characters of what CPython says of its own topics."""
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))[:200_000]
    known = sorted(set(text))
    numbers = {letter: i for i, letter in enumerate(known)}
    codes = np.array([numbers[letter] for letter in text], np.int32)
    rows = (len(codes) - 1) // LENGTH
    inputs = codes[: rows * LENGTH].reshape(rows, LENGTH)
    targets = codes[1 : rows * LENGTH + 1].reshape(rows, LENGTH)
    model = lambda key: Transformer(len(known), key)
    parts = split(inputs, targets, 0.9)
    return Task(
        "Transformer",
        "Text, Transformer of two blocks",
        model,
        PerLetter(),
        *parts,
        150,
        batch=16,
    )


def photograph() -> Task:
    """Colors of a photograph from where they are: a network of coordinates."""
    picture = datasets.load_sample_image("flower.jpg")[::8, ::8] / 255
    height, width, _ = picture.shape
    place = np.stack(
        np.meshgrid(
            np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij"
        ),
        -1,
    ).reshape(-1, 2)
    waves = np.random.default_rng(1).normal(size=(2, 32)) * 4
    inputs = np.concatenate([np.sin(place @ waves), np.cos(place @ waves)], 1)
    colors = 4 * (picture.reshape(-1, 3) - 0.5)
    model = lambda key: dense(
        (64, 96, 96, 3), (jax.nn.softplus, jax.nn.softplus, None), key
    )
    parts = split(inputs.astype(np.float32), colors.astype(np.float32))
    return Task(
        "photograph",
        "A photograph, dense network of coordinates",
        model,
        Squared(),
        *parts,
        240,
    )


def tumors() -> Task:
    """Benign or malignant, by 30 measurements of cells."""
    data = datasets.load_breast_cancer()
    inputs = (data.data - data.data.mean(0)) / data.data.std(0)
    signs = 2.0 * data.target[:, None] - 1
    relu = jax.nn.relu
    model = lambda key: dense((30, 64, 64, 64, 1), (relu, relu, relu, None), key)
    parts = split(inputs.astype(np.float32), signs.astype(np.float32))
    return Task(
        "tumors",
        "Breast cancer, dense classifier with ReLU",
        model,
        Logistic(),
        *parts,
        240,
    )


TASKS = {
    "classifier": classifier,
    "autoencoder": autoencoder,
    "7 layers": deep,
    "convolutions": convolutional,
    "Transformer": transformer,
    "photograph": photograph,
    "tumors": tumors,
}
