"""Losses.

`scores` are those of two examples and three classes, `KL` and `Chi` are
`dp.losses.KL()` and `dp.losses.ChiSquare()`.
"""

import jax
import jax.numpy as jnp

import diffprog as dp
from diffprog.losses import f_loss, f_softargmax


KL, Chi = dp.losses.KL(), dp.losses.ChiSquare()
scores, labels = jnp.ones((2, 3)), jnp.array([0, 2])
outputs, targets = jnp.ones((2, 3)), jnp.zeros((2, 3))
energy = lambda params, x, y: params[x, y]
every = dp.losses.Enumeration(jnp.arange(3))

# %% ### Scores and generators

# %% Scores come first, then the generator.
f_softargmax("scores", KL)

# %% Scores are floating: `scores.astype(float)`.
f_softargmax(jnp.arange(3), KL)

# %% Scores have an axis of classes; of one number there is `dp.losses.f_sigmoid`.
f_softargmax(jnp.ones(()), KL)

# %% Name an axis that the scores have.
f_softargmax(scores, KL, axis=2)

# %% Skip scores without classes.
f_softargmax(jnp.ones((2, 0)), KL)

# %% Masks are booleans: `scores > 0`, say.
f_softargmax(scores, KL, where=jnp.ones((2, 3)))

# %% A mask has the shape of the scores, or one that broadcasts to it.
f_softargmax(scores, KL, where=jnp.ones(7, bool))

# %% Sparsemax and entmax are of the reference "unit".
f_softargmax(scores, Chi)

# %% Write "unit" or "uniform", or give an array.
f_softargmax(scores, Chi, "ones")

# %% A reference is a measure: numbers from 0 on.
f_softargmax(scores, KL, jnp.array([1.0, -1.0, 1.0]))

# %% The caps of the classes together let a sum of 1 through.
dp.losses.capped_f_softargmax(scores, KL, cap=0.2)

# %% Losses of other libraries have another name here.
dp.losses.entmax15_loss

# %% `alpha` is a number, or an array of floats.
dp.losses.Alpha("1.5")

# %% Write floats.
dp.losses.Alpha(jnp.arange(3))

# %% `alpha` is finite.
dp.losses.Alpha(jnp.array([1.5, jnp.inf]))

# %% For alpha without end there is no generator.
dp.losses.Alpha(float("inf"))

# %% A generator of one's own takes a number and returns one, in operations of JAX.
dp.losses.generator(lambda u: "u log u")

# %% [slow] A generator is strictly convex.
dp.losses.generator(lambda u: -(u**2))

# %% The operator is that of one row; `jax.vmap` is for many.
dp.losses.hessian_operator(scores, KL)

# %% ### Losses of a batch

# %% Outputs are arrays.
dp.losses.Squared()("outputs", targets)

# %% Outputs are floating.
dp.losses.Squared()(jnp.ones((2, 3), int), targets)

# %% Targets have the shape of the outputs: mind `(n,)` beside `(n, 1)`.
dp.losses.Squared()(outputs, jnp.zeros((2, 1)))

# %% Targets are real.
dp.losses.Squared()(outputs, targets * 1j)

# %% Targets of this loss are 1.0 and -1.0.
dp.losses.Logistic()(jnp.ones(2), jnp.array([0.0, 1.0]))

# %% Labels are integers, one for each example, and probabilities are floats, one for
# each class.
dp.losses.SoftmaxCrossEntropy()(outputs, jnp.zeros((2, 1), int))

# %% Losses of classes are those of a batch.
dp.losses.SoftmaxCrossEntropy()(jnp.ones(3), jnp.zeros((), int))

# %% One output is no class: take a loss of two sides.
dp.losses.SoftmaxCrossEntropy()(jnp.ones((2, 1)), labels)

# %% Labels count from 0.
dp.losses.SoftmaxCrossEntropy()(outputs, jnp.array([1, 3]))

# %% Probabilities sum up to 1 in every row.
f_loss(scores, jnp.ones((2, 3)), KL)

# %% The label that is left out is an int.
dp.losses.SoftmaxCrossEntropy(ignore_label="none")

# %% A smoothing is a share of the probability.
f_loss(scores, labels, KL, smoothing=2.0)

# %% Smooth the labels, or leave the constant out.
f_loss(scores, labels, dp.losses.Neyman(), "unit")

# %% Give one number, or one for each example.
dp.losses.Huber().prox(outputs, jnp.ones(5), targets)

# %% Proximal steps have positive sizes.
dp.losses.Huber().prox(outputs, -1.0, targets)

# %% The width of the quadratic part is a number.
dp.losses.Huber("wide")

# %% The width of the quadratic part is positive.
dp.losses.Huber(-1.0)(outputs, targets)

# %% A block has the matrix K of each example.
dp.losses.Huber().block_update(outputs, outputs, jnp.ones((2, 2, 2)), 1.0, targets)

# %% ### Risks

# %% Take one of the names.
dp.losses.spectrum("median", 8, 0.5)

# %% Say how many losses there are.
dp.losses.spectrum("superquantile", 0, 0.5)

# %% The parameter is a Python number.
dp.losses.spectrum("superquantile", 8, jnp.ones(2))

# %% The parameter has a range, which the message names.
dp.losses.spectrum("superquantile", 8, 2.0)

# %% Losses are floating.
dp.losses.spectral_risk(jnp.arange(3), jnp.ones(3) / 3)

# %% Risks are those of one table of losses.
dp.losses.spectral_risk(jnp.ones((2, 3)), jnp.ones(3) / 3)

# %% A spectrum has an entry for each loss.
dp.losses.spectral_risk(jnp.ones(3), jnp.ones(4) / 4)

# %% Give a generator and a smoothing, or neither.
dp.losses.spectral_risk(jnp.ones(3), jnp.ones(3) / 3, KL)

# %% The smoothing is one number.
dp.losses.spectral_risk(jnp.ones(3), jnp.ones(3) / 3, KL, smoothing=jnp.ones(3))

# %% The entries of a spectrum are >= 0, do not fall, and sum up to 1.
dp.losses.spectral_risk(jnp.ones(3), jnp.array([1.0, 0.0, 0.0]))

# %% ### Energies

# %% Candidates are arrays, with one row for each.
dp.losses.Enumeration(jnp.ones(()))

# %% Give every candidate its weight.
dp.losses.Enumeration(jnp.arange(3), jnp.ones(2))

# %% An objective that draws samples needs a key at every call.
partition = lambda params, x: params[x, 0]
draw = lambda key, x: jax.random.randint(key, (), 0, 3)
objective = dp.losses.minmin_objective(energy, partition, draw, KL)
objective(scores, 0, 1)

# %% An energy is one number of one example.
objective = dp.losses.exact_objective(lambda params, x, y: params[x], every, KL)
objective(scores, 0, 1)

# %% The mass is positive.
dp.losses.exact_objective(energy, every, KL, mass=-1.0)

# %% Draw at least one sample.
partition = lambda params, x: params[x, 0]
dp.losses.minmin_objective(energy, partition, every, KL, num_samples=0)

# %% [slow] Energies take one generator for all.
dp.losses.exact_objective(energy, every, dp.losses.Alpha(jnp.ones(3) * 1.5))

# %% So many are not listed: draw samples instead.
dp.losses.Permutations(12).all()

# %% ### Sequences

# %% Moves have a score from every state to every state, at every time.
dp.losses.viterbi(jnp.ones((4, 2, 3)))

# %% Scores are floating.
dp.losses.viterbi(jnp.ones((4, 2, 2), int))

# %% Give one score for each state.
dp.losses.viterbi(jnp.ones((4, 2, 2)), start=jnp.ones(3))

# %% A mask says which moves there are, one boolean for each.
dp.losses.viterbi(jnp.ones((4, 2, 2)), mask=jnp.ones(3, bool))

# %% Tables are a list: one array for the first token, one for the second, and so on.
dp.losses.arm_from_ebm(3.0)

# %% Give one table at least.
dp.losses.arm_from_ebm([])

# %% The table of the second token has an axis for the first, and one for the second.
dp.losses.arm_from_ebm([jnp.ones(2), jnp.ones(2)])

# %% The end of a sequence is one of the tokens.
dp.losses.arm_from_ebm([jnp.ones(2)], eos=5)

# %% Logits have a row for every token.
dp.losses.rewards_from_logits(jnp.ones(3), jnp.zeros(1, int))

# %% Tokens are integers, one for each row of logits.
dp.losses.rewards_from_logits(jnp.ones((4, 3)), jnp.zeros(5, int))

# %% Tokens count from 0.
dp.losses.rewards_from_logits(jnp.ones((2, 3)), jnp.array([0, 3]))
