"""kfac-jax on the dense networks of the study: its own optimizer and loop."""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax

from .run import batches_of, EVERY, Run
from .tasks import Bernoulli, Task


CLASSES = np.arange(10, dtype=np.int32)[None]


def evaluated(eqn, values):
    """What kfac-jax 0.0.8 does with an operation, for a newer JAX."""
    found = eqn.primitive.get_bind_params(eqn.params)
    functions, params = found if isinstance(found, tuple) else ((), found)
    out = eqn.primitive.bind(*functions, *values, **params)
    return out if isinstance(out, list) else [out]


class KFACJax:
    """The runs of one task. A setting is a falling rate and a damping."""

    settings = tuple((r, d) for d in (1e-2, 1e-1) for r in (3e-3, 1e-2, 3e-2, 1e-1))

    def __init__(self, task: Task):
        import kfac_jax

        kfac_jax.tag_graph_matcher.eval_jaxpr_eqn = evaluated
        self.task = task
        self.layers = task.model(jr.key(0)).layers

        # Only what `lax` has: it does not know the calls that `jax.numpy` makes.
        def loss(params, batch):
            x, y = batch
            outputs = self.outputs(params, x)
            if isinstance(task.loss, Bernoulli):
                kfac_jax.register_sigmoid_cross_entropy_loss(outputs, y)
                losses = lax.log1p(lax.exp(-lax.abs(outputs))) - y * outputs
                losses = losses + lax.max(outputs, lax.full_like(outputs, 0))
            else:
                kfac_jax.register_softmax_cross_entropy_loss(outputs, y)
                total = lax.log(lax.reduce(lax.exp(outputs), 0.0, lax.add, (1,)))
                one_hot = lax.eq(y[:, None], CLASSES).astype(outputs.dtype)
                losses = total - lax.reduce(outputs * one_hot, 0.0, lax.add, (1,))
            axes = tuple(range(losses.ndim))
            return lax.reduce(losses, 0.0, lax.add, axes) / task.batch

        mean = lambda params, x, y: jnp.mean(task.loss(self.outputs(params, x), y))
        self.loss = jax.jit(mean)
        self.optimizer = kfac_jax.Optimizer(
            jax.value_and_grad(loss),
            l2_reg=0.0,
            curvature_ema=0.95,
            inverse_update_period=5,
            num_burnin_steps=0,
            multi_device=False,
        )

    def outputs(self, params, x):
        """The layers as plain products, which kfac-jax knows."""
        params = iter(params)
        for layer in self.layers:
            if isinstance(layer, eqx.nn.Linear):
                W, b = next(params)
                x = lax.dot(x, W) + lax.broadcast_in_dim(b, (len(x), len(b)), (1,))
            else:
                x = lax.tanh(x)
        return x

    def run(self, setting, seed: int) -> Run:
        task, (rate, damping), optimizer = self.task, setting, self.optimizer
        layers = task.model(jr.key(seed)).layers
        linear = [layer for layer in layers if isinstance(layer, eqx.nn.Linear)]
        params = [(jnp.array(layer.weight.T), layer.bias) for layer in linear]
        batches = batches_of(task, seed)
        state = optimizer.init(params, jr.key(0), batches[0])
        losses, seconds, spent = [float(self.loss(params, *task.train))], [0.0], 0.0
        for i, batch in enumerate(batches):
            falling = jnp.asarray(rate * (1 - i / task.steps))
            options = dict(
                learning_rate=falling,
                momentum=jnp.asarray(0.9),
                damping=jnp.asarray(damping),
            )
            before = time.process_time()
            params, state, _ = jax.block_until_ready(
                optimizer.step(
                    params, state, jr.key(i), batch=batch, global_step_int=i, **options
                )
            )
            # The first steps compile.
            spent += (time.process_time() - before) if i > 5 else 0.0
            if (i + 1) % EVERY == 0:
                losses.append(float(self.loss(params, *task.train)))
                seconds.append(spent)
        test = float(self.loss(params, *task.test))
        return Run(setting, np.array(losses), np.array(seconds), test)
