# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26", "pytest", "hypothesis"]
# ///
"""The lecture's second half: what each formula claims, proved on ppo.py's own functions.

    python test_ppo.py

A  The lecture            one claim after the other, Eq. 1 to 19, in worlds small enough to be exact
B  The gradients          each one written by hand, against finite differences, through the network
C  The tests              a formula changed in one place must be noticed
D  The components         each function on its own: values, dtypes, extremes
E  The ends of episodes   true ends, time limits and reset rows, from the environment to the critic
F  The tasks              what --env accepts, and that it is learned
G  The command line       its output, its files, and everything that it refuses

Expectations are sums over everything that can happen, or quadrature where actions are reals. A test
reads ppo.py's functions through the name `ppo`, which section C points at an altered copy.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))

import ppo  # before numpy, which reads the thread default that ppo sets

# isort: split
import ast
import dataclasses
import importlib.util
import inspect
import io
import json
import os
import pickle
import re
import signal
import subprocess
import types
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

pytestmark = pytest.mark.filterwarnings("ignore:.*latest versioned", "ignore:.*autoreset_mode")

# A  The lecture -----------------------------------------------------------------------------------
# A world with three states and two actions. In three steps 648 paths are possible: all of them are
# written down here, so that an expectation over trajectories is a sum of 648 terms.

START = np.array([0.5, 0.3, 0.2])
NEXT = np.array([[7, 2, 1], [1, 1, 8], [3, 3, 4], [0, 9, 1], [2, 5, 3], [6, 1, 3]]) / 10
NEXT = NEXT.reshape(3, 2, 3)  # p(s'|s,a)
REWARD = np.array([[0.0, 1.0], [3.0, 2.0], [5.0, 8.0]])  # r(s,a)
ONE_HOT = np.eye(3)

PATHS = np.indices([3, 2, 3, 2, 3, 2, 3]).reshape(7, -1).T
STATES, ACTIONS = PATHS[:, 0:6:2], PATHS[:, 1::2]  # (648, 3)
TO_GO = REWARD[STATES, ACTIONS][:, ::-1].cumsum(axis=1)[:, ::-1]
RETURN = TO_GO[:, 0]


def softmax(logits):
    """π(a) = exp(logits_a) / Σ exp(logits), as the lecture writes it."""
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def path_probs(actor):
    """p_θ(τ) = p(s_1) Π π_θ(a_t|s_t) p(s_t+1|s_t,a_t) of every path (648,)."""
    pi = softmax(ppo.policy_forward(actor, ONE_HOT)[0].logits)
    steps = pi[STATES, ACTIONS] * NEXT[STATES, ACTIONS, PATHS[:, 2::2]]
    return START[PATHS[:, 0]] * steps.prod(axis=1)


class World:
    """Many copies of this world, played by chance."""

    def __init__(self, copies, rng):
        self.rng, self.states = rng, rng.choice(3, size=copies, p=START)

    def step(self, actions):
        rewards, no = REWARD[self.states, actions], np.zeros(len(actions), bool)
        bounds = NEXT[self.states, actions].cumsum(axis=1)[:, :2]
        self.states = (self.rng.random((len(actions), 1)) > bounds).sum(axis=1)
        return ONE_HOT[self.states], rewards, no, no, {}


class Script:
    """Two environments that play this, whatever the actions; after each end comes a reset."""

    num_envs, t = 2, 0
    obs = np.array([[1, 0.3], [2, -1], [4, 1], [3, 2], [5, 7], [50, 0.5], [6, 3]])[:, :, None]
    rewards = np.array([[1, 10], [2, 20], [0, 30], [3, 0], [4, 40], [5, 50]])
    ends = np.zeros((2, 6, 2), bool)  # terminated and truncated
    ends[0, [1, 5], 0] = ends[1, 2, 1] = True

    def reset(self, seed):
        return self.obs[0], {}

    def step(self, actions):
        self.t += 1
        return self.obs[self.t], self.rewards[self.t - 1], *self.ends[:, self.t - 1], {}


def test_eq1_rows_belong_together():
    """Row t holds s_t, the action chosen from it, its reward and how it ended; s_t+1 follows."""
    rows = ppo.rollout(Script(), lambda obs: 10 * obs[:, 0], Script.obs[0], 6)
    played = Script.obs, 10 * Script.obs[:-1, :, 0], Script.rewards, *Script.ends
    for x, y in zip(rows, played, strict=True):
        assert_allclose(x, y, rtol=1e-6)


def test_eq1_eq2_paths_and_objective():
    """rollout draws each path τ with probability p_θ(τ), and the mean return estimates J(θ)."""
    rng, n = np.random.default_rng(0), 40_000
    actor, world = ppo.init_mlp([3, 4, 2], rng), World(n, rng)
    obs, actions, rewards, *_ = ppo.rollout(
        world, lambda obs: ppo.policy_forward(actor, obs)[0].sample(rng), ONE_HOT[world.states], 3
    )
    s, a = obs.argmax(axis=-1), actions
    drawn = np.ravel_multi_index([s[0], a[0], s[1], a[1], s[2], a[2], s[3]], [3, 2] * 3 + [3])
    counts = np.bincount(drawn, minlength=648)
    probs = path_probs(actor)
    assert np.all(abs(counts - n * probs) <= 5 * np.sqrt(n * probs) + 1e-9)
    J = probs @ RETURN
    assert abs(rewards.sum(axis=0).mean() - J) < 5 * np.sqrt(probs @ (RETURN - J) ** 2 / n)


# Two small actors, one for each policy, and expectations over all that they may do.

POLICIES = ["Categorical", "Gaussian"]
flatten = partial(np.concatenate, axis=None)  # arrays as one vector


def new_actor(name, rng):
    """θ for three inputs and three actions, or two real ones, in float64."""
    if name == "Categorical":
        return ppo.init_mlp([3, 4, 3], rng, dtype=np.float64)
    return [*ppo.init_mlp([3, 4, 2], rng, dtype=np.float64), np.array([-0.3, 0.2])]


def all_actions(actor, inputs):
    """All actions in each state, a row for each: weights, inputs, actions and log π. weights @ f is
    E_a~π[f], averaged over the states; for real actions by Gauss-Hermite quadrature."""
    policy, _ = ppo.policy_forward(actor, inputs)
    if hasattr(policy, "logits"):
        weights = softmax(policy.logits).ravel()
        actions = np.tile(np.arange(policy.logits.shape[1]), len(inputs))
    else:
        nodes, node_weights = np.polynomial.hermite_e.hermegauss(20)
        grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
        weights = np.tile(np.outer(node_weights, node_weights).ravel() / (2 * np.pi), len(inputs))
        actions = (policy.mean[:, None] + np.exp(policy.log_std) * grid).reshape(-1, 2)
    inputs = inputs.repeat(len(actions) // len(inputs), axis=0)
    log_prob, _ = ppo.policy_forward(actor, inputs)[0].log_prob(actions)
    return weights / weights.sum(), inputs, actions, log_prob


def expected(actor, objective, weights, inputs, actions, log_prob_old=None, advantages=None):
    """The sum of the rows' losses, each times its weight; and its gradient as one vector (P,)."""

    def weighted(*args):
        loss, slope = objective(*args)
        return loss * weights * len(weights), slope * weights * len(weights)  # a mean is to come

    loss, grads = ppo.actor_loss(actor, weighted, 0, inputs, actions, log_prob_old, advantages)
    return loss.mean(), flatten(grads)


def numerical_gradient(f, params, h=1e-5):
    """The gradient of the number f(params) by central finite differences, as one vector."""
    vector, steps = flatten(params), h * np.eye(sum(x.size for x in params))
    above, below = ([f(ppo.unflatten(x, params)) for x in vector + s] for s in (steps, -steps))
    return (np.array(above) - below) / (2 * h)


@pytest.mark.parametrize("name", POLICIES)
def test_eq3_log_derivative_trick_and_eglp(name):
    """∇p = p ∇log p; and the expected grad-log-prob is 0, for every parameter of the network."""
    rng = np.random.default_rng(0)
    actor, obs = new_actor(name, rng), rng.standard_normal((1, 3))
    weights, inputs, actions, log_prob = all_actions(actor, obs)

    def grad_log_prob(weights, *rows):
        return expected(actor, ppo.policy_gradient, weights, *rows, None, -np.ones(len(weights)))[1]

    def prob(actor):
        return np.exp(ppo.policy_forward(actor, obs)[0].log_prob(actions[:1])[0][0])

    p_grad_log_p = np.exp(log_prob[0]) * grad_log_prob(np.ones(1), obs, actions[:1])
    assert_allclose(numerical_gradient(prob, actor), p_grad_log_p, rtol=1e-6, atol=1e-10)
    assert_allclose(grad_log_prob(weights, inputs, actions), 0, atol=1e-12)


def test_eq4_eq5_eq6_policy_gradient():
    """With R(τ), R_t, R_t - E[R_t] and R_t - V(s_t) it is -∇J; each has less variance."""
    actor = ppo.init_mlp([3, 4, 2], np.random.default_rng(0), dtype=np.float64)
    probs, pi = path_probs(actor), softmax(ppo.policy_forward(actor, ONE_HOT)[0].logits)
    V = np.zeros((4, 3))
    for t in (2, 1, 0):
        V[t] = (pi * (REWARD + NEXT @ V[t + 1])).sum(axis=1)
    minus_grad_J = numerical_gradient(lambda actor: -path_probs(actor) @ RETURN, actor)
    variances = []
    whole = np.tile(RETURN, (3, 1)).T
    for weights in whole, TO_GO, TO_GO - probs @ TO_GO, TO_GO - V[np.arange(3), STATES]:
        gradients = [
            expected(actor, ppo.policy_gradient, np.ones(3), ONE_HOT[s], a, None, weight)[1]
            for s, a, weight in zip(STATES, ACTIONS, weights, strict=True)
        ]
        assert_allclose(probs @ gradients, minus_grad_J, rtol=1e-6, atol=1e-9)
        variances.append(probs @ ((gradients - minus_grad_J) ** 2).sum(axis=1))
    assert variances == sorted(variances, reverse=True)


def test_eq7_td_error_is_the_advantage():
    """With the true V, E_s'[δ] = Q(s,a) - V(s) = A(s,a), and E_a[A] = 0."""
    actor = ppo.init_mlp([3, 4, 2], np.random.default_rng(0), dtype=np.float64)
    gamma, pi = 0.9, softmax(ppo.policy_forward(actor, ONE_HOT)[0].logits)
    I_minus_P = np.eye(3) - gamma * np.einsum("sa,sat->st", pi, NEXT)
    V = np.linalg.solve(I_minus_P, (pi * REWARD).sum(axis=1))
    Q = REWARD + gamma * NEXT @ V
    s, a, s_next = np.indices((3, 2, 3)).reshape(3, -1)
    never = np.zeros((1, 18), bool)
    deltas = ppo.gae(REWARD[[s], [a]], V[np.array([s, s_next])], never, never, gamma, lam=0)
    A = (NEXT * deltas.reshape(3, 2, 3)).sum(axis=2)
    assert_allclose(A, Q - V[:, None], atol=1e-13)
    assert_allclose((pi * A).sum(axis=1), 0, atol=1e-13)


@pytest.mark.parametrize("lam", [0, 0.3, 0.95, 1])
def test_eq5_eq8_eq9_gae_averages_k_steps(lam):
    """A^(k)_t = Σ_l<k γ^l δ_t+l, and Â_t = (1-λ) Σ λ^(k-1) A^(k)_t, where the longest has all the
    weight left. So λ = 0 is the TD error, and λ = 1 the reward-to-go R_t minus V(s_t)."""
    rng, never = np.random.default_rng(0), np.zeros((6, 1), bool)
    r, v = rng.standard_normal(6), rng.standard_normal(7)
    gae = partial(ppo.gae, r[:, None], v[:, None], never, never, 0.9)
    deltas, advantages = gae(0)[:, 0], gae(lam)[:, 0]
    for t in range(6):
        average, longest = 0, 6 - t
        for k in range(1, longest + 1):
            k_step = sum(0.9**i * r[t + i] for i in range(k)) + 0.9**k * v[t + k] - v[t]
            assert_allclose(k_step, sum(0.9**i * deltas[t + i] for i in range(k)))
            average += (1 - lam if k < longest else 1) * lam ** (k - 1) * k_step
        assert_allclose(advantages[t], average)


def test_eq9_every_pattern_of_endings():
    """Â_t = Σ (γλ)^l δ_t+l to the episode's end, V = 0 after true ends: all 256 cases."""
    rng, T, gamma, lam = np.random.default_rng(0), 4, 0.9, 0.8
    flags = np.indices([2] * 2 * T).reshape(2, T, -1).astype(bool)
    rewards, values = rng.standard_normal((T, 256)), rng.standard_normal((T + 1, 256))
    advantages = ppo.gae(rewards, values, *flags, gamma, lam)
    for t, n in np.ndindex(T, 256):
        total = 0
        for i in range(t, T):
            terminated, truncated = flags[:, i, n]
            following = 0 if terminated else gamma * values[i + 1, n]
            total += (gamma * lam) ** (i - t) * (rewards[i, n] + following - values[i, n])
            if terminated or truncated:
                break
        assert_allclose(advantages[t, n], total, atol=1e-14)


def bandit(rewards=(1.0, -2.0, 3.0)):
    """One state and three actions: J(θ), θ_k, and all actions with their rewards as advantages."""
    actor_old = ppo.init_mlp([1, 3], np.random.default_rng(0), dtype=np.float64)
    batch = [*all_actions(actor_old, np.ones((1, 1))), np.array(rewards)]
    return lambda actor: softmax(actor[0][0] + actor[1]) @ rewards, actor_old, batch


def test_eq10_data_serve_one_step():
    """On data of θ_k Eq. 4 is -∇J at θ_k alone; after a step Eq. 12 is, by its weights."""
    J, actor_old, batch = bandit()
    gradient = expected(actor_old, ppo.policy_gradient, *batch)[1]
    assert_allclose(gradient, -numerical_gradient(J, actor_old), atol=1e-9)
    actor = [actor_old[0] + [[0.5, -0.4, 0.1]], actor_old[1]]
    minus_grad_J = -numerical_gradient(J, actor)
    loss, gradient = expected(actor, ppo.importance_sampling, *batch)
    assert_allclose([loss, *gradient], [-J(actor), *minus_grad_J], atol=1e-9)
    assert np.linalg.norm(expected(actor, ppo.policy_gradient, *batch)[1] - minus_grad_J) > 0.1


def test_eq11_importance_sampling():
    """E_q[f p/q] = E_p[f] for every q; Var_q[f p/q] = E_p[f² p/q] - E_p[f]² grows as q leaves p."""
    p, f = np.array([0.2, 0.3, 0.5]), np.array([1.0, 3.0, 2.0])
    variances = []
    for q in ([0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2], [0.68, 0.3, 0.02]):
        loss, _ = ppo.importance_sampling(np.log(p), np.log(q), f)
        assert_allclose(q @ -loss, 2.1)
        variance = q @ (-loss - 2.1) ** 2
        assert_allclose(variance, p @ (f**2 * p / q) - 2.1**2)
        variances.append(variance)
    assert variances == sorted(variances) and variances[-1] > 50 * variances[0]


def minibatch(name):
    """An actor and 16 rows of which each of four ratios meets each of four Â."""
    rng = np.random.default_rng(0)
    actor, inputs = new_actor(name, rng), rng.standard_normal((16, 3))
    actions = rng.integers(3, size=16) if name == "Categorical" else rng.standard_normal((16, 2))
    log_prob, _ = ppo.policy_forward(actor, inputs)[0].log_prob(actions)
    log_prob_old = log_prob - np.log(np.tile([0.5, 0.9, 1.1, 1.5], 4))
    return actor, [inputs, actions, log_prob_old, np.repeat([2.0, 0.3, -0.5, -1.0], 4)]


def objectives(beta=0.5, epsilon=0.2):
    """All of §5, by name."""
    penalty, clip = partial(ppo.kl_penalty, beta=beta), partial(ppo.clip, epsilon=epsilon)
    plain = {"pg": ppo.policy_gradient, "is": ppo.importance_sampling}
    return plain | {"kl alone": ppo.kl_divergence, "kl": penalty, "clip": clip}


@pytest.mark.parametrize("name", POLICIES)
def test_eq12_all_start_alike(name):
    """At θ = θ_k the gradients of the surrogate, of PPO1 (any β) and of PPO2 are Eq. 4's."""
    actor, (inputs, actions, _, advantages) = minibatch(name)
    log_prob, _ = ppo.policy_forward(actor, inputs)[0].log_prob(actions)
    batch = [np.ones(16), inputs, actions, log_prob, advantages]
    plain = expected(actor, ppo.policy_gradient, *batch)[1]
    assert np.linalg.norm(plain) > 1
    for objective in "is", "kl", "clip":
        gradient = expected(actor, objectives(beta=50)[objective], *batch)[1]
        assert_allclose(gradient, plain, atol=1e-11)


def exact_kl(actor_old, actor, inputs):
    """E[log π_θ_k - log π_θ] over all actions of π_θ_k, averaged over the states."""
    weights, inputs, actions, log_prob_old = all_actions(actor_old, inputs)
    return weights @ (log_prob_old - ppo.policy_forward(actor, inputs)[0].log_prob(actions)[0])


@pytest.mark.parametrize("name", POLICIES)
def test_eq13_kl_from_the_data(name):
    """Over actions of π_θ_k, rows and slopes average to KL(π_θ_k‖π_θ) and its gradient."""
    rng = np.random.default_rng(0)
    actor_old, obs = new_actor(name, rng), rng.standard_normal((2, 3))
    batch = all_actions(actor_old, obs)
    actor = [x + 0.2 * rng.standard_normal(x.shape) for x in actor_old]
    kl, gradient = expected(actor, ppo.kl_divergence, *batch)
    assert kl > 0.01
    assert_allclose(kl, exact_kl(actor_old, actor, obs), rtol=1e-9)
    exact = numerical_gradient(lambda x: exact_kl(actor_old, x, obs), actor)
    assert_allclose(gradient, exact, rtol=1e-6, atol=1e-9)


def test_eq13_kl_is_a_distance_in_behaviour():
    """No row is negative, however small or large the difference, in float32 too."""
    log_ratio = np.concatenate([np.logspace(-30, 1, 99), -np.logspace(-30, 2, 99)])
    for log_prob_old in np.full(198, -0.7), np.full(198, -0.7, np.float32):
        log_prob = log_prob_old + log_ratio.astype(log_prob_old.dtype)
        rows, _ = ppo.kl_divergence(log_prob, log_prob_old)
        assert rows.min() >= 0
        assert_allclose(rows[[98, 197]], [np.exp(10) - 11, 99], rtol=1e-5)


def of_theta(actor, objective, *batch):
    """The expected loss and its gradient as a function of θ, given as one vector."""
    return lambda theta: expected(ppo.unflatten(theta, actor), objective, *batch)


def fisher_matrix(actor, weights, inputs, actions, *_):
    """F = E[∇log π ∇log πᵀ] (P, P), written out."""
    rows, one = zip(inputs[:, None], actions[:, None], strict=True), np.ones(1)
    g = [expected(actor, ppo.policy_gradient, one, *row, None, -one)[1] for row in rows]
    return np.transpose(g) * weights @ g


@pytest.mark.parametrize("name", POLICIES)
def test_eq14_fisher_product(name):
    """The change of ∇KL in the direction v is F v, through the network; damping adds to it."""
    rng = np.random.default_rng(0)
    actor = new_actor(name, rng)
    batch = all_actions(actor, rng.standard_normal((2, 3)))
    theta, kl = flatten(actor), of_theta(actor, ppo.kl_divergence, *batch)
    F = fisher_matrix(actor, *batch)
    for length in (1e-3, 1, 1e3):
        v = length * rng.standard_normal(len(theta))
        product = ppo.fisher_product(kl, theta, v, damping=0)
        assert np.linalg.norm(product - F @ v) < 1e-6 * np.linalg.norm(F @ v)
        assert_allclose(ppo.fisher_product(kl, theta, v, damping=0.3), product + 0.3 * v)


def test_eq14_conjugate_gradients():
    """Five iterations solve F x = g for five unknowns; the first goes the best way along g."""
    A, g = np.split(np.random.default_rng(0).standard_normal((6, 5)), [5])
    F, g = A @ A.T + np.eye(5), g[0]
    x = ppo.conjugate_gradients(lambda v: F @ v, g)
    assert_allclose(x, np.linalg.solve(F, g), rtol=1e-8)
    x = ppo.conjugate_gradients(lambda v: F @ v, g, iterations=1)
    assert_allclose(x, (g @ g) / (g @ F @ g) * g)
    assert_array_equal(ppo.conjugate_gradients(lambda v: 2 * v, g), g / 2)


UP, DOWN = (1.0, -2.0, 3.0), (-1.0, 2.0, -3.0)
BANDITS = [(UP, 1e-6, 0), (DOWN, 1e-6, 1), (UP, 1.0, 0), (DOWN, 1.0, 1)]


@pytest.mark.parametrize(("rewards", "delta", "halvings"), BANDITS)
def test_eq14_trust_region_step(rewards, delta, halvings):
    """Of all steps with ½ΔᵀFΔ = δ it takes the one with the largest gᵀΔ, √(2δ / gᵀF⁻¹g) F⁻¹g; and
    halves it until KL ≤ δ and J has grown."""
    J, actor_old, batch = bandit(rewards)
    theta_old, theta = flatten(actor_old), flatten(actor_old)
    surrogate = of_theta(actor_old, ppo.importance_sampling, *batch)
    kl = of_theta(actor_old, ppo.kl_divergence, *batch)
    ppo.trust_region_step(theta, surrogate, kl, delta, damping=0)
    g, F = numerical_gradient(J, actor_old), fisher_matrix(actor_old, *batch)
    step = np.linalg.pinv(F, rcond=1e-9) @ g  # F is singular, as logits may be shifted
    step *= np.sqrt(2 * delta / (step @ F @ step))
    assert_allclose(theta - theta_old, step / 2**halvings, rtol=1e-4)
    for k in range(halvings + 1):
        actor = ppo.unflatten(theta_old + step / 2**k, actor_old)
        distance = exact_kl(actor_old, actor, np.ones((1, 1)))
        assert (distance <= delta and J(actor) > J(actor_old)) == (k == halvings)


LINE_SEARCH = [  # surrogate, KL, where the step from 0 ends
    (lambda x: -x, lambda x: x * x / 2.0001, 1),  # a full step
    (lambda x: -x, lambda x: x**2 / 2 + x**4, 0.5),  # the full step is too far
    (lambda x: (x - 0.1) ** 2, lambda x: x * x / 2.0001, 0.125),  # the gain is short
    (lambda x: abs(x - 1e-9), lambda x: x * x / 2.0001, 0),  # there is no gain
    (lambda x: -x, lambda x: x * x / 2 + (x > 0), 0),  # all is too far
    (lambda x: 0 * x, lambda x: x * x / 2, 0),  # all is flat
]


@pytest.mark.parametrize(("surrogate", "kl", "end"), LINE_SEARCH)
def test_eq14_line_search(surrogate, kl, end):
    """In one dimension, with F = 1 and δ = ½, the full step is 1, or √(1 / 1.1) if damped by 0.1.
    It is halved until KL and surrogate agree; where ten times do not help, θ stays what it was."""

    def with_slope(f):
        return lambda x: (f(x[0]), (f(x + 1e-9) - f(x - 1e-9)) / 2e-9)

    theta = np.zeros(1)
    ppo.trust_region_step(theta, with_slope(surrogate), with_slope(kl), 0.5, damping=0)
    assert_allclose(theta, end, rtol=1e-3)
    ppo.trust_region_step(theta := np.zeros(1), with_slope(surrogate), with_slope(kl), 0.5)
    assert_allclose(theta, end / 1.1**0.5, rtol=1e-3)


def test_eq15_kl_penalty_and_adaptive_beta():
    """Surrogate + β KL; β doubles above 1.5 KL targets, halves below 2/3, and is bounded."""
    rows = np.random.default_rng(0).standard_normal((3, 8))
    both = [ppo.importance_sampling(*rows), ppo.kl_divergence(*rows)]
    assert_allclose(ppo.kl_penalty(*rows, beta=0.7), np.tensordot([1, 0.7], both, axes=1))
    cases = [(1, 0.016, 2), (1, 0.0149, 1), (1, 0.0067, 1), (1, 0.006, 0.5)]
    for beta, kl, following in [*cases, (1e4, 1, 1e4), (1e-4, 0, 1e-4)]:
        assert ppo.adapt_beta(beta, kl, target=0.01) == following


def test_eq16_clip_table():
    """The lecture's six cases, ε = 0.2: nothing to gain beyond 1 ± ε, but always a way back."""
    ratio = np.array([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, slope = ppo.clip(np.log(ratio), np.zeros(6), advantages, epsilon=0.2)
    assert_allclose(loss, [-1.0, -2.0, -2.4, 1.6, 2.0, 3.0])
    assert_allclose(slope, [-1.0, -2.0, 0.0, 0.0, 2.0, 3.0])


def test_eq16_clip_is_literally_the_minimum():
    """loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â), whatever the numbers: clipped is ρ and not ρ Â."""
    rng = np.random.default_rng(0)
    for ratio, advantage, epsilon in rng.uniform([0, -3, 0.05], [3, 3, 0.5], (300, 3)):
        loss, slope = ppo.clip(np.log([ratio]), np.zeros(1), np.array([advantage]), epsilon=epsilon)
        plain, bounded = ratio * advantage, max(1 - epsilon, min(ratio, 1 + epsilon)) * advantage
        assert_allclose(loss[0], -min(plain, bounded))
        assert_allclose(slope[0], 0 if bounded < plain else -plain)


@pytest.mark.parametrize("name", POLICIES)
def test_eq17_entropy(name):
    """H = -E_a[log π(a)]; where no advantages count, a step makes π more random."""
    assert_allclose(ppo.Categorical(np.zeros((1, 5))).entropy()[0], np.log(5))
    assert_allclose(ppo.Gaussian(np.zeros((1, 1)), np.zeros(1)).entropy()[0], 1.4189385332046727)
    actor, (inputs, actions, *_) = minibatch(name)
    weights, _, _, log_prob = all_actions(actor, inputs)
    H = ppo.policy_forward(actor, inputs)[0].entropy()[0].mean()
    assert_allclose(H, -weights @ log_prob)
    zeros = np.zeros(16)
    _, grads = ppo.actor_loss(actor, ppo.policy_gradient, 0.01, inputs, actions, zeros, zeros)
    moved = [x - d for x, d in zip(actor, grads, strict=True)]
    assert ppo.policy_forward(moved, inputs)[0].entropy()[0].mean() > H


TWO, THREE, BOX = gym.spaces.Discrete(2), gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))


def an_agent(space, **chosen):
    """An agent for one number as observation and this space of actions, with random θ and φ."""
    envs = types.SimpleNamespace(single_observation_space=gym.spaces.Box(-99, 99, (1,)))
    envs.single_action_space, rng = space, np.random.default_rng(0)
    agent = ppo.Agent(envs, ppo.Settings(hidden=(4,), **chosen))
    for vector in agent.theta, agent.phi:
        vector[:] = rng.standard_normal(len(vector))
    return agent


def test_eq19_learn():
    """Two iterations of the loop on the script: what gae and update are given, and the records.
    V(s) = 2s + 1, the action is s > 0, and gae is a list of distinct numbers."""
    agent = an_agent(TWO, num_steps=3, total_steps=12, gamma=0.5, lam=0.8)
    agent.critic = [np.array([[2.0]]), np.array([1.0])]
    agent.actor = [np.array([[0.0, 1e3]]), np.zeros(2)]
    envs, judged, learned, A = Script(), [], [], np.arange(100, 106.0).reshape(3, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "gae", lambda *args: judged.append(args) or A)
        patch.setattr(ppo, "update", lambda *args: learned.append(args) or {"kl": 0.0})
        records = [tuple(record.values()) for record in ppo.learn(agent, envs)]
    assert records == [(6, 2, (3 + 60) / 2, 0.0), (12, 3, (3 + 60 + 12) / 3, 0.0)]

    seen, sums = [1, 0.3, 2, -1, 1], [1, 10, 2.5, 25, 42.5]  # states and discounted sums, no resets
    for i, (mean, std) in enumerate([(0, 1), (np.mean(seen), np.std(seen))]):
        rewards, values, *flags, gamma, lam = judged[i]
        steps, valid = slice(3 * i, 3 * i + 3), [[0, 1, 2, 3, 5], [0, 2, 3, 4, 5]][i]
        inputs = np.clip((Script.obs[3 * i : 3 * i + 4] - mean) / std, -10, 10)
        sums += [[], [3, 5.5, 40, 7.75, 70]][i]
        assert_allclose(rewards, Script.rewards[steps] / np.std(sums), rtol=1e-3)
        assert_allclose(values, 2 * inputs[:, :, 0] + 1, rtol=1e-3)
        assert_array_equal(flags, Script.ends[:, steps])
        assert (gamma, lam) == (0.5, 0.8)
        given = [inputs[:3], inputs[:3, :, 0] > 0, A, A + 2 * inputs[:3, :, 0] + 1]
        assert learned[i][0] is agent and learned[i][-1] == 1 - i / 2
        for x, y in zip(learned[i][1:-1], given, strict=True):
            assert_allclose(x, y.reshape(6, *y.shape[2:])[valid], rtol=1e-3)


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@pytest.mark.parametrize("space", [TWO, BOX], ids=POLICIES)
def test_eq19_update(space, objective):
    """Three epochs with one minibatch, written out: what becomes of θ, φ and β, and the record."""
    chosen = dict(objective=objective, kl_target=1e-3, ent_coef=0.3, clip=0.1, lr=0.1)
    agent = an_agent(space, epochs=3, minibatch_size=99, max_grad_norm=0.01, **chosen)
    agent.beta, rng = 0.7, np.random.default_rng(0)
    inputs = rng.standard_normal((12, 1)).astype(np.float32)
    advantages, returns = rng.normal(5, [[2], [9]], (2, 12)).astype(np.float32)
    theta, phi = agent.theta.copy(), agent.phi.copy()
    actor, critic = ppo.unflatten(theta, agent.actor), ppo.unflatten(phi, agent.critic)
    actions = ppo.policy_forward(actor, inputs)[0].sample(rng)
    log_prob_old, _ = ppo.policy_forward(actor, inputs)[0].log_prob(actions)
    record = ppo.update(agent, inputs, actions, advantages, returns, remaining=0.2)
    data = inputs, actions, log_prob_old, (advantages - np.mean(advantages)) / np.std(advantages)

    def loss(f, ent_coef, theta):
        loss, grads = ppo.actor_loss(ppo.unflatten(theta, actor), f, ent_coef, *data)
        return loss.mean(), flatten(grads)

    def adam(theta, gradient):
        m = v = 0
        for t in (1, 2, 3):
            g = gradient(theta)
            g = g * min(1, 0.01 / np.linalg.norm(g))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            theta -= 0.1 * 0.2 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)) ** 0.5 + 1e-5)

    if objective == "trpo":
        losses = [(ppo.importance_sampling, 0.3 * 0.2), (ppo.kl_divergence, 0)]
        ppo.trust_region_step(theta, *(partial(loss, *x) for x in losses), 1e-3)
    else:
        f = objectives(beta=0.7, epsilon=0.1)[objective]
        adam(theta, lambda theta: loss(f, 0.3 * 0.2, theta)[1])
    adam(phi, lambda _: flatten(ppo.critic_loss(critic, inputs, returns)[1]))
    assert_allclose(agent.theta, theta, rtol=1e-4, atol=1e-5)
    assert_allclose(agent.phi, phi, rtol=1e-4, atol=1e-5)
    assert objective != "kl" or agent.beta == 1.4
    policy, _ = ppo.policy_forward(actor, inputs)
    ratio = np.exp(policy.log_prob(actions)[0] - log_prob_old)
    assert_allclose(record["kl"], np.mean(ratio - 1 - np.log(ratio)), rtol=1e-2)
    assert record["clipped"] == np.mean(abs(ratio - 1) > 0.1)
    assert_allclose(record["entropy"], policy.entropy()[0].mean(), rtol=1e-4)
    assert_allclose(record["explained"], 1 - np.var(advantages) / np.var(returns), rtol=1e-4)


# B  The gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["pg", "is", "kl alone", "kl", "clip"])
@pytest.mark.parametrize("name", POLICIES)
def test_gradient_of_actor_loss(name, objective, ent_coef):
    """Objective, entropy, policy and network together, in every case of the clip table."""
    actor, batch = minibatch(name)
    loss = partial(ppo.actor_loss, objective=objectives()[objective], ent_coef=ent_coef)
    args = dict(zip(["inputs", "actions", "log_prob_old", "advantages"], batch, strict=True))
    numeric = numerical_gradient(lambda x: loss(x, **args)[0].mean(), actor)
    assert_allclose(flatten(loss(actor, **args)[1]), numeric, rtol=1e-6, atol=1e-9)


def test_eq18_critic_loss():
    """(V - R̂)² for each row, and the gradient of its mean, through three layers with biases."""
    rng = np.random.default_rng(0)
    critic = [x + 0.1 for x in ppo.init_mlp([3, 5, 4, 1], rng, dtype=np.float64)]
    inputs, returns = rng.standard_normal((8, 3)), rng.standard_normal(8)
    loss, grads = ppo.critic_loss(critic, inputs, returns)
    assert_allclose(loss, (ppo.mlp_forward(critic, inputs)[0][:, 0] - returns) ** 2)
    numeric = numerical_gradient(lambda x: ppo.critic_loss(x, inputs, returns)[0].mean(), critic)
    assert_allclose(flatten(grads), numeric, rtol=1e-6, atol=1e-9)


# C  The tests -------------------------------------------------------------------------------------
# A test that cannot fail proves nothing: what a line changes in ppo.py, the test beside it notices.

SOURCE = Path(ppo.__file__).read_text(encoding="utf-8")
MUTANTS = [
    ("1 - x * x", "1 - x", "eq18_critic_loss"),
    ("q *= np.sign(np.diag(r))", "pass", "init_mlp"),
    ("self.logits + rng", "self.logits - rng", "categorical"),
    ("grad_logits[rows, actions] += 1", "pass", "eq3_log_derivative_trick_and_eglp", "Categorical"),
    ("z * z - 1]", "z * z]", "eq3_log_derivative_trick_and_eglp", "Gaussian"),
    ("self.std * rng", "rng", "gaussian_samples_by_its_density"),
    ("2 * np.pi * np.e)", "2 * np.pi)", "eq17_entropy", "Gaussian"),
    ("probs + entropy[", "probs - entropy[", "gradient_of_actor_loss", "Categorical", "pg", 0.1),
    ("act(observations[t])", "act(obs)", "eq1_rows_belong_together"),
    ("gamma * values[1:] *", "values[1:] *", "eq7_td_error_is_the_advantage"),
    ("values[1:] * ~terminated", "values[1:]", "eq9_every_pattern_of_endings"),
    ("* ~terminated -", "* ~(terminated | truncated) -", "eq9_every_pattern_of_endings"),
    ("where(terminated | truncated", "where(terminated", "eq9_every_pattern_of_endings"),
    ("gamma * lam)", "gamma)", "eq5_eq8_eq9_gae_averages_k_steps", 0.3),
    ("* advantages, -advantages", "* advantages, advantages", "eq4_eq5_eq6_policy_gradient"),
    ("advantages, -ratio *", "advantages, -", "eq10_data_serve_one_step"),
    ("prob + ratio_minus_1, ", "prob, ", "eq13_kl_is_a_distance_in_behaviour"),
    ("prob_old - log_prob +", "prob - log_prob_old +", "eq13_kl_from_the_data", "Gaussian"),
    ("1, ratio_minus_1", "1, -ratio_minus_1", "eq13_kl_from_the_data", "Categorical"),
    ("theta - h * v", "theta", "eq14_fisher_product", "Gaussian"),
    ("+ damping * v", "- damping * v", "eq14_fisher_product", "Categorical"),
    ("residual - length", "residual + length", "eq14_conjugate_gradients"),
    ("residual + (residual", "residual - (residual", "eq14_conjugate_gradients"),
    ("), -gradient)", "), gradient)", "eq14_trust_region_step", *BANDITS[0]),
    ("np.sqrt(2 * delta", "np.sqrt(delta", "eq14_trust_region_step", *BANDITS[0]),
    ("step = step / 2", "step = step / 3", "eq14_trust_region_step", *BANDITS[1]),
    ("+ damping * v", "", "eq14_line_search", *LINE_SEARCH[0]),
    ("kl(theta + step)[0] <= delta and ", "", "eq14_line_search", *LINE_SEARCH[1]),
    (" and surrogate(theta + step)[0] < loss_old", "", "eq14_line_search", *LINE_SEARCH[2]),
    ("slope + beta * kl_slope", "slope - beta * kl_slope", "eq15_kl_penalty_and_adaptive_beta"),
    ("if kl > 1.5 * target", "if kl < 1.5 * target", "eq15_kl_penalty_and_adaptive_beta"),
    ("-np.minimum(", "-np.maximum(", "eq16_clip_table"),
    ("ratio.clip(1", "(ratio * advantages).clip(1", "eq16_clip_is_literally_the_minimum"),
    ("surrogate <= clipped", "surrogate < clipped", "eq12_all_start_alike", "Gaussian"),
    ("d - ent_coef * grad", "d + ent_coef * grad", "eq17_entropy", "Categorical"),
    ("2 * error[:", "error[:", "eq18_critic_loss"),
    ("1 - self.beta1**self.t", "1", "eq19_update", TWO, "is"),
    ("eps=1e-5", "eps=1e-8", "eq19_update", TWO, "pg"),
    ("(advantages - advantages.mean())", "advantages", "eq19_update", TWO, "clip"),
    ("s.lr * remaining", "s.lr", "eq19_update", BOX, "clip"),
    ("s.ent_coef * remaining", "s.ent_coef", "eq19_update", TWO, "clip"),
    ("[inputs, returns], lr)", "[inputs, returns], s.lr)", "eq19_update", TWO, "pg"),
    ("s.max_grad_norm)", "1.0)", "eq19_update", TWO, "is"),
    ("beta=agent.beta", "beta=1.0", "eq19_update", BOX, "kl"),
    ("agent.beta = adapt_beta", "_ = adapt_beta", "eq19_update", BOX, "kl"),
    ("epsilon=s.clip", "epsilon=0.2", "eq19_update", BOX, "clip"),
    ("(abs(ratio_minus_1) >", "(ratio_minus_1 >", "eq19_update", BOX, "is"),
    ("kl_divergence, 0), s.kl_target", "kl_divergence, 0), 0.01", "eq19_update", BOX, "trpo"),
    ("advantages.var() / (returns.", "returns.var() / (advantages.", "eq19_update", TWO, "pg"),
    ("advantages = gae(", "values[-1] = values[-2]; advantages = gae(", "eq19_learn"),
    ("inputs = agent.n", "agent.obs_stats.update(obs); inputs = agent.n", "eq19_learn"),
    ("np.vstack([ended_last", "np.vstack([ended[-1]", "eq19_learn"),
    ("(observations[:-1][valid])", "(observations[:-1].reshape(-1, 1))", "eq19_learn"),
    ("self.actor, self.normalize(obs))[0]", "self.actor, obs)[0]", "eq19_learn"),
    ("update(discounted[", "update(totals[", "eq19_learn"),
    ("advantages + values[:-1]", "advantages + values[1:]", "eq19_learn"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant[2]}: {mutant[1]}")
def test_mutant_is_noticed(mutant, monkeypatch):
    """A test fails when the formula that it proves is changed."""
    old, new, test, *arguments = mutant
    assert SOURCE.count(old) == 1
    module = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", module)
    exec(SOURCE.replace(old, new), vars(module))
    monkeypatch.setitem(globals(), "ppo", module)
    with pytest.raises(AssertionError):
        globals()["test_" + test](*arguments)


# D  The components --------------------------------------------------------------------------------


def test_init_mlp():
    """Orthogonal, of length √2 or, at last, out_gain; no direction preferred; biases 0."""
    rng = np.random.default_rng(0)
    for sizes in [3, 8, 5, 2], [8, 2, 9, 1]:
        params = ppo.init_mlp(sizes, rng, out_gain=0.1)
        assert [x.shape for x in params[::2]] == list(zip(sizes[:-1], sizes[1:], strict=True))
        for W, b, squared in zip(params[::2], params[1::2], [2, 2, 0.01], strict=True):
            product = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
            assert_allclose(product, squared * np.eye(len(product)), atol=1e-6)
            assert b.shape == W.shape[1:] and not b.any()
    positive = np.mean([ppo.init_mlp([3, 2], rng)[0] > 0 for _ in range(1000)], axis=0)
    assert_allclose(positive, 0.5, atol=0.07)


def test_categorical():
    """Literal values where exp alone would overflow; each action has its share of draws."""
    policy = ppo.Categorical(np.array([[1e4, 1e4, -1e4], [0.0, np.log(2), np.log(5)]]))
    half, probs, n = np.log(1 / 2), np.array([1 / 8, 2 / 8, 5 / 8]), 100_000
    assert_allclose(policy.log_probs, [[half, half, -2e4 + half], np.log(probs)])
    assert policy.mode()[1] == 2
    draws = ppo.Categorical(np.tile(np.log(probs), (n, 1))).sample(np.random.default_rng(0))
    counts = np.bincount(draws, minlength=3)
    assert np.all(abs(counts - n * probs) < 4 * np.sqrt(n * probs * (1 - probs)))


def test_gaussian_samples_by_its_density():
    """The draws have the shares of the normal distribution, independent in each dimension."""
    n, mean = 100_000, np.tile([1.0, -3.0], (100_000, 1))
    policy = ppo.Gaussian(mean, np.log([0.5, 2.0]))
    z = (policy.sample(np.random.default_rng(0)) - mean) / [0.5, 2.0]
    for bound, share in [(-1, 0.158655), (0, 0.5), (1, 0.841345)]:
        assert_allclose((z < bound).mean(axis=0), share, atol=4 * np.sqrt(share * (1 - share) / n))
    assert abs(np.corrcoef(z.T)[0, 1]) < 4 / np.sqrt(n)
    assert_array_equal(policy.mode(), mean)


def test_clip_by_global_norm():
    """Longer gradients are scaled down to max_norm, shorter ones stay, overflow becomes zeros."""
    assert_allclose(ppo.clip_by_global_norm(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    assert_array_equal(ppo.clip_by_global_norm(np.array([3.0, 4.0]), 5.0), [3, 4])
    for zero in (0, np.inf, np.nan):
        assert_array_equal(ppo.clip_by_global_norm(np.array([zero, 0.0]), 5.0), [0, 0])


def test_fit_shows_every_row_once_an_epoch():
    """Minibatches of equal size, at most B; each epoch in another order, rows kept together."""
    agent, adam = an_agent(TWO, epochs=3, minibatch_size=4), ppo.Adam(np.zeros(2))
    rows, seen = np.arange(10.0), []
    ppo.fit(agent, adam, lambda *data: (seen.append(data), [adam.m]), [rows, -rows], lr=0.1)
    assert [len(x) for x, _ in seen] == [3, 3, 4] * 3
    x, y = np.concatenate(seen, axis=1).reshape(2, 3, 10)
    assert_array_equal(x, -y)
    assert_array_equal(np.sort(x), [rows] * 3)
    assert len({tuple(epoch) for epoch in x}) == 3


LECTURE = [x.name for x in ast.parse(SOURCE.split("# §8")[0]).body if hasattr(x, "name")]


def checked(x):
    """x, of which every array must be finite, and float32 unless it holds whole numbers."""
    if isinstance(x, list | tuple):
        return type(x)(map(checked, x))
    if isinstance(x, np.ndarray):
        assert (x.dtype == np.float32 or x.dtype.kind in "bi") and np.isfinite(x).all()
    return x


@pytest.mark.parametrize("scale", [0, 1e-6, 1e6])
@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@pytest.mark.parametrize("space", [TWO, BOX], ids=POLICIES)
def test_definitions_run_alone_and_keep_float32(space, objective, scale, monkeypatch):
    """§1-§7, pasted into an empty file under `import numpy as np`, carry two iterations of a run;
    whatever they return is float32 and finite, for constant, tiny and huge rewards."""
    pasted = {"np": np}
    for name in LECTURE:
        exec(inspect.getsource(getattr(ppo, name)), pasted)
        if isinstance(pasted[name], types.FunctionType):
            pasted[name] = lambda *args, f=pasted[name], **more: checked(f(*args, **more))
        monkeypatch.setattr(ppo, name, pasted[name])
    chosen = dict(objective=objective, num_steps=3, total_steps=12, minibatch_size=1)
    agent, envs = an_agent(space, **chosen), Script()
    envs.rewards = scale * Script.rewards
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        numbers = [x for record in ppo.learn(agent, envs) for x in record.values()]
    assert agent.theta.dtype == agent.phi.dtype == np.float32
    assert np.isfinite([*agent.theta, *agent.phi, *numbers]).all()


# E  The ends of episodes --------------------------------------------------------------------------

TINY = dict(num_envs=2, num_steps=8, minibatch_size=8, total_steps=32, episodes=2)
ARGV = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]


class Odd(gym.Env):
    """Observations and actions of any space; reward 1 for each action inside its space. Episodes
    end for true after a number of steps in ends, and at a time limit after one in limits."""

    metadata = {"render_modes": ["human"], "render_fps": 50}
    transitions = []

    def __init__(self, spaces, ends=(), limits=(10,), render_mode=None):
        self.observation_space, self.action_space = spaces
        self.ends, self.limits, self.render_mode = ends, limits, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.render_mode == "human":
            raise RuntimeError("no display")
        self.t, self.length = 0, self.np_random.choice([*self.ends, *self.limits])
        self.obs = self.observation_space.sample()
        return self.obs, {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), action
        Odd.transitions.append((self.obs, action))
        self.obs, self.t = self.observation_space.sample(), self.t + 1
        over, true_end = self.t == self.length, self.length in self.ends
        return self.obs, 1.0, over and true_end, over and not true_end, {}


def odd(*spaces, env_id="Odd-v0", **kwargs):
    """The name of an environment with these spaces, of observations and of actions."""
    gym.registry.pop(env_id, None)
    gym.register(env_id, Odd, kwargs={"spaces": spaces, **kwargs})
    return env_id


ONE = gym.spaces.Box(1, 1, (1,))  # a state that never changes
MIXED = odd(BOX, BOX, env_id="Mixed-v0", ends=(2, 4, 6), limits=(1, 3, 5, 7))


@pytest.mark.parametrize(("ends", "limits", "value"), [((), [10], 10), ([10], (), 4.138)])
def test_a_time_limit_is_no_end(ends, limits, value):
    """Reward 1 for ever is worth 1/(1-γ) = 10, whatever time limits interrupt it; with true ends it
    is worth 10 - 9 (1 - γ^10) on average. A rollout holds six times ten steps and a reset."""
    chosen = dict(num_steps=66, total_steps=30_000, gamma=0.9, lam=1.0, lr=3e-3, seed=300)
    agent, _ = ppo.train(env=odd(ONE, THREE, ends=ends, limits=limits), **chosen)
    values, _ = ppo.mlp_forward(agent.critic, agent.normalize(np.ones((1, 1), np.float32)))
    assert values.item() * agent.return_stats.var**0.5 == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize(("num_envs", "num_steps"), [(3, 17), (1, 1)])
def test_every_transition_is_learned_from_once(num_envs, num_steps, monkeypatch):
    """Reset rows never reach the learner, which passes over rollouts of nothing else; both kinds of
    last steps do, once, with the action that was sampled; the environment sees the clipped one."""
    learned, update = [], ppo.update

    def watched_update(agent, inputs, actions, *rest):
        assert len(actions) > 0
        learned.extend(zip(inputs.tolist(), actions, strict=True))
        return update(agent, inputs, actions, *rest)

    monkeypatch.setattr(ppo, "update", watched_update)
    monkeypatch.setattr(ppo.Agent, "normalize", lambda agent, obs: obs)
    monkeypatch.setattr(Odd, "transitions", [])
    ppo.train(env=MIXED, num_envs=num_envs, num_steps=num_steps, total_steps=459, log_std_init=0.0)
    assert len(learned) == len(Odd.transitions) > 300
    transitions = [[s, a.clip(-1, 1).tolist()] for s, a in learned]
    assert sorted(transitions) == sorted([s.tolist(), a.tolist()] for s, a in Odd.transitions)
    assert any(abs(a).max() > 1 for _, a in learned)


# F  The tasks -------------------------------------------------------------------------------------

OBSERVATIONS = [
    (gym.spaces.Box(0, 255, (3,), np.uint8), "discrete actions"),
    (gym.spaces.Box(0, 1, (), np.float64), "discrete actions"),
    (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), "discrete actions"),
    (gym.spaces.Dict(a=gym.spaces.Text(5), b=gym.spaces.Dict(c=BOX)), "discrete actions"),
    (gym.spaces.Discrete(5, start=-2), "one-hot observations"),
    (gym.spaces.MultiDiscrete([3, 2]), "one-hot observations"),
    (gym.spaces.Tuple([THREE, THREE]), "one-hot observations"),
]
ACTIONS_AND_LEGAL = [  # a space, what the actor wants, what env.step receives
    (THREE, [0, 5, 1], 1),
    (gym.spaces.Discrete(3, start=7), [0, 5, 1], 8),
    (gym.spaces.Box(-5, 5, (4,), np.int64), [1.9, -0.9, 99, -99], [2, -1, 5, -5]),
    (gym.spaces.Box(-1, 2, (2, 2), np.float64), [0.5, -3, 7, 0.25], [[0.5, -1], [2, 0.25]]),
    (gym.spaces.Box(-np.inf, np.inf, (2,)), [9, -9], [9, -9]),
    (gym.spaces.Box(0, 255, (), np.uint8), [254.6], 255),
]
SPACES = [(space, THREE, kind) for space, kind in OBSERVATIONS]
SPACES += [(BOX, ACTIONS_AND_LEGAL[i][0], "real actions") for i in (2, 3, 4)]
SPACES += [(BOX, ACTIONS_AND_LEGAL[5][0], "one real action")]


@pytest.mark.parametrize(("observation_space", "action_space", "kind"), SPACES, ids=str)
def test_spaces(observation_space, action_space, kind):
    """All that can be flattened is observed; actions are legal, one or a batch."""
    agent, history = ppo.train(env=odd(observation_space, action_space), **TINY)
    assert history[-1]["mean_return"] == 10
    inputs = np.eye(agent.actor[0].shape[0], dtype=np.float32)  # indicators are seen as they are
    assert (agent.normalize(inputs) == inputs).all() == (kind == "one-hot observations")
    envs = gym.make_vec("Odd-v0", num_envs=3, vectorization_mode="sync")
    assert ppo.kind_of(envs) == kind
    obs, _ = envs.reset(seed=0)
    envs.step(actions := agent.act(obs))
    rows = list(gym.vector.utils.iterate(envs.observation_space, obs))
    assert_allclose([agent.act(row) for row in rows], actions, rtol=1e-4)
    assert play_plainly("Odd-v0", agent) == 10


def play_plainly(env, agent, seed=0):
    """The README's loop: the return of one episode in an environment made by gym.make."""
    env = gym.make(env, disable_env_checker=True)
    (obs, _), total, over = env.reset(seed=seed), 0, False
    while not over:
        obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
        total, over = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize(("space", "wanted", "received"), ACTIONS_AND_LEGAL, ids=str)
def test_actions_are_legal(space, wanted, received):
    """Shifted by start, or clipped, rounded and shaped; of the space's dtype; one or a batch."""
    agent = ppo.new_agent(odd(BOX, space))
    agent.theta[:] = 0
    agent.actor[5][:] = wanted  # b3: with W3 = 0 this is what the network says of any state
    for obs, expected in ((np.zeros(2), received), (np.zeros((3, 2)), [received] * 3)):
        assert_array_equal(agent.act(obs), expected)
        assert agent.act(obs).dtype == space.dtype


def test_settings_are_chosen_by_kind_and_by_name(monkeypatch):
    """Chosen wins over task, task over kind, kind over default, whatever the version."""
    for name, row in (ppo.KINDS | ppo.TASKS).items():
        ppo.Settings(name, **row)  # raises where a number is out of range
    monkeypatch.setitem(ppo.KINDS, "one real action", dict(lr=0.5, gamma=0.5, lam=0.5))
    monkeypatch.setattr(ppo, "TASKS", {"Pendulum": dict(gamma=0.25, lam=0.25)})
    for env in ("Pendulum-v1", "Pendulum", "gymnasium.envs.classic_control:Pendulum-v1"):
        s = ppo.new_agent(env, lam=0.125).settings
        assert (s.lam, s.gamma, s.lr, s.epochs) == (0.125, 0.25, 0.5, ppo.Settings.epochs)
    assert ppo.new_agent("MountainCarContinuous-v0").settings.gamma == 0.5


SHORT = [  # task, steps, mean return
    ("CartPole-v1", 40_000, 200),
    ("Acrobot-v1", 40_000, -130),
    ("MountainCar-v0", 60_000, -170),
    ("MountainCarContinuous-v0", 30_000, 90),
    ("Pendulum-v1", 40_000, -600),
    ("FrozenLake-v1", 120_000, 0.45),
    ("Taxi", 100_000, -100),
    ("CliffWalking", 60_000, -20),
]


@pytest.mark.parametrize(("task", "steps", "enough"), SHORT)
def test_tasks_are_learned(task, steps, enough):
    """A short run with the settings of the task comes far above what a broken learner reaches."""
    agent, _ = ppo.train(env=task, total_steps=steps, seed=300)
    assert ppo.evaluate(agent, episodes=50).mean() >= enough
    assert np.mean([play_plainly(task, agent, seed) for seed in range(20)]) >= enough


class Uneven(gym.vector.VectorEnv):
    """Reward 1 for ever. Episodes of environment i have i + 1 steps, or no end."""

    def __init__(self, num_envs, ends=True, obs_dim=1, mode="NextStep"):
        self.metadata = {"autoreset_mode": types.SimpleNamespace(value=mode)}
        self.num_envs, self.lengths = num_envs, np.arange(num_envs) + 1 if ends else np.inf
        self.single_observation_space = gym.spaces.Box(-1, 1, (obs_dim,))
        self.single_action_space, self.obs = THREE, np.zeros((num_envs, obs_dim), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = np.zeros(self.num_envs)
        return self.obs, {}

    def step(self, actions):
        resets = self.t == self.lengths
        self.t = np.where(resets, 0, self.t + 1)
        return self.obs, 1.0 - resets, self.t == self.lengths, np.zeros(self.num_envs, bool), {}


VECTORS = {"Uneven": {}, "Endless": {"ends": False}, "Long": {"obs_dim": 1000}}
for name, kwargs in (VECTORS | {"SameStep": {"mode": "SameStep"}}).items():
    gym.register(f"{name}-v0", vector_entry_point=Uneven, kwargs=kwargs)
odd(BOX, gym.spaces.MultiBinary(3), env_id="Wide-v0")
odd(gym.spaces.Graph(BOX, None), THREE, env_id="Graph-v0")


def test_evaluation_counts_whole_episodes_of_every_length():
    """Each of ten environments plays once a round; what never ends is cut at 1,000 steps."""
    agent, once = ppo.new_agent("Uneven-v0"), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert_array_equal(ppo.evaluate(agent, episodes=25), once + once + once[:5])
    assert_array_equal(ppo.evaluate(agent, episodes=3), [1, 2, 3])
    assert_array_equal(ppo.evaluate(ppo.new_agent("Endless-v0"), episodes=12), [1000] * 12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("index", [0, 1], ids=["observation", "reward"])
def test_numbers_that_are_not_finite_stop_the_run(index, value, tmp_path, monkeypatch, capsys):
    """One line says so; the policy of the iterations before is kept."""
    path, steps, step = tmp_path / "policy.npz", [], Odd.step

    def broken_step(env, action):
        steps.append(action)
        results = [*step(env, action)]
        if len(steps) == 30:
            results[index] = np.full(np.shape(results[index]), value)
        return tuple(results)

    monkeypatch.setattr(Odd, "step", broken_step)
    argv = ["--env", odd(BOX, BOX), "--num-envs=1", "--num-steps=16", "--save", str(path)]
    assert "not finite" in refused(argv, capsys)
    assert path.exists()


# G  The command line ------------------------------------------------------------------------------


def refused(argv, capsys):
    """The one line with which the command line refuses argv."""
    with pytest.raises(SystemExit, match="2"):
        sys.exit(ppo.main(argv))
    err = capsys.readouterr().err
    assert err.startswith("ppo.py: ") and err.count("\n") == 1
    return err


def printed_steps(out):
    """The first column of the rows that a run printed."""
    rows = re.findall(r"^ +([\d,]+)(?: +\S+){5,}$", out, re.M)
    return [int(steps.replace(",", "")) for steps in rows]


NUMBERS = [f for f in dataclasses.fields(ppo.Settings) if f.metadata["low"] is not None]


@pytest.mark.parametrize("f", NUMBERS, ids=lambda f: f.name)
@pytest.mark.parametrize("wrong", ["below", "above", "text", "", "nan", "inf", "-inf", "1e999"])
def test_wrong_numbers(f, wrong, capsys):
    """Below its range, above it, or no number at all: refused, and the setting is named."""
    value = {"below": f.metadata["low"] - 1, "above": f.metadata["high"] + 1}.get(wrong, wrong)
    line = refused([f"--{f.name.replace('_', '-')}={value}"], capsys)
    assert f.name in line.replace("-", "_")


@pytest.mark.parametrize(
    ("line", "clue"),
    [
        ("--env CartPole-v9", "v1"),
        ("--env Wide-v0", "MultiBinary(3)"),
        ("--env Graph-v0", "observations of a fixed size"),
        ("--env SameStep-v0", "NextStep auto-reset"),
        ("--objective ppo", "pg, is, trpo, kl or clip"),
        ("--gama 0.9", "--gama"),
        ("--play missing.npz", "missing.npz"),
        ("--save missing/folder/p.npz", "missing/folder"),
        ("--env Long-v0 --num-envs 4096 --num-steps 1000000 --total-steps 9999999999", "allocate"),
    ],
)
def test_wrong_command_lines(line, clue, capsys):
    """What cannot work is refused in one line that says what to change."""
    assert clue in refused([*ARGV, *line.split()], capsys)


FLOATS = [f for f in NUMBERS if f.type is float]
RANDOM = {f.name: st.floats(f.metadata["low"], f.metadata["high"]) for f in FLOATS}
RANDOM |= dict.fromkeys(["num_envs", "num_steps", "epochs", "minibatch_size"], st.integers(1, 6))
RANDOM["hidden"] = st.lists(st.integers(1, 6), max_size=3)
RANDOM["objective"] = st.sampled_from(["pg", "is", "trpo", "kl", "clip"])
RANDOM["env"] = st.sampled_from(["CartPole-v1", "Pendulum-v1", MIXED, "FrozenLake-v1"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(RANDOM | {"seed": st.integers(0, 2**32 - 1)}))
def test_random_settings_keep_the_parameters_finite(chosen):
    """Any valid settings run two iterations; no parameter becomes NaN or infinite."""
    with np.errstate(all="ignore"):
        agent, _ = ppo.train(**chosen, total_steps=2 * chosen["num_envs"] * chosen["num_steps"])
    assert np.isfinite(agent.theta).all() and np.isfinite(agent.phi).all()


def test_a_run_prints_and_logs_what_it_does(tmp_path, monkeypatch, capsys):
    """Settings, rows, curve, CSV; control characters for terminals only; train if asked."""
    log = tmp_path / "run.csv"
    assert ppo.main([*ARGV, "--log", str(log)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("discrete actions") and err == ""
    assert all(f"{f.name}=" in out for f in dataclasses.fields(ppo.Settings))
    assert printed_steps(out) == [16, 32] and "mean return over" in out
    assert not set(out) & set("\r\b\x1b")
    assert [row.split(",")[0] for row in log.read_text().splitlines()] == ["steps", "16", "32"]
    for verbose in (False, True):
        ppo.train(verbose=verbose, **TINY)
        assert printed_steps(capsys.readouterr().out) == [16, 32] * verbose
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert ppo.main(ARGV) == 0
    assert re.search(r" 50%.* steps/s, .* s left *\r", capsys.readouterr().out)


@pytest.mark.parametrize("total_steps", [1, 63, 60_001])
def test_the_last_row_is_printed(total_steps, capsys):
    """Whatever the budget is; and there are about twenty rows."""
    ppo.train(verbose=True, total_steps=total_steps, epochs=1, minibatch_size=1024)
    steps = printed_steps(capsys.readouterr().out)
    assert total_steps <= steps[-1] < total_steps + 16 and len(steps) <= 22


def test_what_can_be_made_to_work_works():
    """Minibatches beyond the rollout; hidden as list, tuple or none; parts of another dtype."""
    chosen = dict(num_envs=1, num_steps=16, total_steps=16)
    whole, _ = ppo.train(**chosen, minibatch_size=16, hidden=[5])
    large, _ = ppo.train(**chosen, minibatch_size=10**9, hidden=(5,))
    assert_array_equal(whole.theta, large.theta)
    linear, _ = ppo.train(**chosen, **ppo.parse(["--hidden"])[1])
    assert [p.size for p in whole.actor + linear.actor] == [4 * 5, 5, 5 * 2, 2, 4 * 2, 2]
    assert ppo.new_agent().phi.any() and not ppo.new_agent(hidden=()).phi.any()  # V = 0
    agent = ppo.new_agent(odd(gym.spaces.Dict(a=BOX, b=THREE), THREE))
    assert agent.act({"a": np.array([2.0, 0.0]), "b": 1}) in THREE


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_policy_file_plays_as_the_run_ended(env, tmp_path, capsys):
    """The last line of a run, of --play with its file, and evaluate say the same."""
    path = str(tmp_path / "policy.npz")
    assert ppo.main([*ARGV, "--env", env, "--save", path]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert ppo.main(["--play", path]) == 0
    assert capsys.readouterr().out.splitlines() == [last]
    assert f"over 2 episodes: mean {ppo.evaluate(ppo.load(path)).mean():.2f}" in last


def test_a_warm_start_learns_on(tmp_path, monkeypatch):
    """The policy is the file's, bit for bit; optimiser and schedule begin again."""
    path, rates, step = str(tmp_path / "policy.npz"), [], ppo.Adam.step
    trained, _ = ppo.train(total_steps=60_000, seed=300)
    ppo.save(path, trained)
    agent, obs = ppo.load(path, total_steps=30_000), np.eye(4)
    assert agent.settings == dataclasses.replace(trained.settings, total_steps=30_000)
    assert (agent.theta == trained.theta).all() and (agent.phi == trained.phi).all()
    assert_array_equal(agent.normalize(obs), trained.normalize(obs))
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: rates.append(args[-1]) or step(*args))
    history = list(ppo.run(agent, verbose=False))
    assert rates[0] == agent.settings.lr and agent.actor_adam.t == len(rates) / 2
    assert history[-1]["mean_return"] > 475 and ppo.evaluate(agent, 20).mean() > 475


@pytest.mark.parametrize("flag", ["--play", "--load"])
def test_files_that_are_no_policies(flag, tmp_path, monkeypatch, capsys):
    """One line, status 2, and nothing in the file is executed."""

    class Bomb:
        def __reduce__(self):
            return os.mkdir, ("exploded",)

    monkeypatch.chdir(tmp_path)
    ppo.save("good.npz", ppo.new_agent())
    whole = Path("good.npz").read_bytes()
    for content in b"", b"no policy", whole[:9999], pickle.dumps(Bomb()):
        Path("bad.npz").write_bytes(content)
        assert "bad.npz" in refused([*ARGV, flag, "bad.npz"], capsys)
    with np.load("good.npz") as file:
        good = dict(file)
    chosen = json.loads(str(good["settings"]))
    wrong = dict(seed=1.5, lr="fast", env=5, gamma=None, objective=["clip"], epochs=2.0, lam=[])
    changes = [("settings", json.dumps(chosen | {name: x})) for name, x in wrong.items()]
    changes += [("actor_0", good["actor_0"][:1]), ("obs_count", np.nan), ("return_var", -1.0)]
    changes += [("settings", "[1]"), ("settings", "[" * 100_000), ("critic_0", np.ones((3, 3)))]
    changes += [(name, np.array([Bomb()], object)) for name in ("settings", "actor_0", "obs_mean")]
    changes += [("actor_0", np.full((4, 64), x)) for x in ("a", 1j, 1e300, np.nan)]
    bad = [good | {name: value} for name, value in changes]
    bad += [{k: x for k, x in good.items() if k != name} for name in good]
    for arrays in bad:
        np.savez("bad.npz", **arrays)
        assert "bad.npz" in refused([*ARGV, flag, "bad.npz"], capsys)
    assert "good.npz" in refused([*ARGV, flag, "good.npz", "--env=Acrobot-v1"], capsys)
    assert not os.path.exists("exploded")


@pytest.mark.parametrize("where", ["rollout", "gae", "critic_loss"])
def test_an_interrupted_run_keeps_its_policy(where, tmp_path, monkeypatch, capsys):
    """Ctrl-C anywhere: policy saved, curve printed, status 130, and no biased evaluation."""
    path, function, calls = str(tmp_path / "p.npz"), getattr(ppo, where), []
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it

    def interrupted(*args):
        calls.append(1)
        if len(calls) == (30 if where == "critic_loss" else 4):
            signal.raise_signal(signal.SIGINT)
        return function(*args)

    monkeypatch.setattr(ppo, where, interrupted)
    assert ppo.main([*ARGV, "--env", odd(ONE, THREE), "--total-steps=80", "--save", path]) == 130
    out, err = capsys.readouterr()
    assert "mean return over 32 to" in out and "greedy" not in out and err == ""
    assert (ppo.load(path).theta != ppo.new_agent("Odd-v0").theta).any()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows reports no broken pipe")
@pytest.mark.parametrize(("flag", "lines"), [("--save", 7), ("--save", 0), ("--play", 0)])
def test_a_closed_pipe_ends_quietly(flag, lines, tmp_path):
    """| head: the policy is saved and nothing said, even where only the exit writes."""
    path, pipe = str(tmp_path / "p.npz"), subprocess.PIPE
    ppo.save(path, ppo.new_agent())
    argv = [sys.executable, ppo.__file__, flag, path, "--total-steps=200000", "--episodes=1"]
    env = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(argv, env=env, stdout=pipe, stderr=pipe, encoding="utf-8")
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 141)
    assert (ppo.load(path).obs_stats.count > 1) == (flag == "--save")


def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path, monkeypatch, capsys):
    """A save that fails half-way is reported in one line; the file on disk stays what it was."""
    path = tmp_path / "p.npz"
    ppo.save(str(path), ppo.new_agent())
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:99])
            raise OSError(28, "No space left")

    monkeypatch.setattr(ppo, "open", lambda name, mode: Full(name, mode[0]), raising=False)
    argv = [*ARGV, "--load", str(path), "--save", str(path)]
    assert f"cannot save {path}: No space left" in refused(argv, capsys)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["p.npz"]


@pytest.mark.parametrize(("env", "clue"), [("Odd-v0", "display"), ("CartPole-v1", "pygame")])
def test_render(env, clue, tmp_path, monkeypatch, capsys):
    """Runs evaluate, then show five episodes; --play only shows; no window costs no run."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    path, shown, _ = str(tmp_path / "p.npz"), [], odd(BOX, THREE)
    assert clue in refused([*ARGV, "--env", env, "--save", path, "--render"], capsys)
    monkeypatch.setattr(ppo, "evaluate", lambda _, *args, **kw: shown.append((args, kw)) or TO_GO)
    assert ppo.main([*ARGV[:-1], "--env", env, "--render"]) == 0
    assert ppo.main(["--play", path, "--render", "--episodes=3"]) == 0
    assert shown == [((), {}), ((5,), {"render": True}), ((3,), {"render": True})]


@pytest.mark.parametrize("before", ["", "import numpy, gymnasium; "])
@pytest.mark.parametrize(("own", "new"), [(None, "{('OMP_NUM_THREADS', '1')}"), ("2", "set()")])
def test_importing_has_no_side_effects(before, own, new, monkeypatch):
    """Importing ppo, in a notebook too, prints nothing and only sets the documented default."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    code = f"{before}import os; old = dict(os.environ); from ppo import train; "
    code += "train(num_envs=1, total_steps=9); print(os.environ.items() - old.items())"
    argv, folder = [sys.executable, "-W", "always", "-c", code], os.path.dirname(ppo.__file__)
    result = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == (new, "")


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    """Every python block, in one namespace, with small budgets; or it compiles at least."""
    text = Path(ppo.__file__).with_name("README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert ppo.main([*ARGV, "--save", "policy.npz", "--log", "run.csv"]) == 0
    namespace, ran = {}, 0
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        code = compile(re.sub(r"total_steps=[\d_]+", "total_steps=2_000", block), "README", "exec")
        if all(importlib.util.find_spec(x) for x in ("matplotlib", "pandas") if x in block):
            exec(code, namespace)
            ran += 1
    assert ran >= 2
