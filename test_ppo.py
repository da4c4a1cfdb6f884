# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26", "pytest", "hypothesis"]
# ///
"""The lecture's second half: what each formula claims, proved on ppo.py's own functions.

    python test_ppo.py

A  The lecture            one claim after the other, L1 to L19, in worlds small enough to be exact
B  The gradients          each one written by hand, against finite differences, through the network
C  The tests              a formula changed in one place must be noticed
D  The components         each function on its own: values, dtypes, extremes
E  The ends of episodes   true ends, time limits and reset rows, from the environment to the critic
F  The tasks              what --env accepts, and that it is learned
G  The command line       its output, its files, and everything that it refuses

Expectations are sums over everything that can happen, or quadrature where actions are reals; only
sampling itself is tested by sampling. A test reads ppo.py's functions through the name `ppo`, which
section C points at an altered copy.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))

import ppo  # before numpy, which reads the thread default that ppo sets

# isort: split
import ast
import csv
import dataclasses
import inspect
import io
import json
import os
import pickle
import resource
import shlex
import signal
import subprocess
import types
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

HEADS = ["Categorical", "Gaussian"]
SOURCE = Path(ppo.__file__).read_text(encoding="utf-8")


def numerical_gradient(f, params, h=1e-5):
    """The gradient of the number f(params) by central finite differences, as one vector."""
    vector = np.concatenate(params, axis=None)
    views = ppo.unflatten(vector, params)
    gradient = np.empty_like(vector)
    for i, x in enumerate(vector.copy()):
        vector[i] = x + h
        above = f(views)
        vector[i] = x - h
        gradient[i] = (above - f(views)) / (2 * h)
        vector[i] = x
    return gradient


def new_actor(name, rng):
    """θ for three inputs and three actions, or two real ones, in float64."""
    if name == "Categorical":
        return ppo.init_mlp([3, 4, 3], rng, dtype=np.float64)
    return [*ppo.init_mlp([3, 4, 2], rng, dtype=np.float64), np.array([-0.3, 0.2])]


def one_state(name, rng):
    """A head, and its inputs in one state."""
    inputs, _ = ppo.policy_forward(new_actor(name, rng), rng.standard_normal((1, 3)))
    return getattr(ppo, name), inputs


def all_actions(inputs):
    """Actions (M,...), weights (M,) and inputs for M rows: weights @ f(actions) is E_a~π[f(a)].

    For Gaussian by Gauss-Hermite quadrature, which is exact for polynomials up to degree 15.
    """
    if len(inputs) == 1:
        probs = np.exp(inputs[0][0])
        actions, weights = np.arange(len(probs)), probs / probs.sum()
    else:
        nodes, node_weights = np.polynomial.hermite_e.hermegauss(8)
        grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
        actions = inputs[0] + np.exp(inputs[1]) * grid
        weights = np.outer(node_weights, node_weights).ravel() / (2 * np.pi)
    return actions, weights, [inputs[0].repeat(len(weights), axis=0), *inputs[1:]]


def batch_of(name, actor_old, obs, actions, advantages):
    """Arguments of actor_loss, at θ = θ_k."""
    head, (inputs_old, _) = getattr(ppo, name), ppo.policy_forward(actor_old, obs)
    log_prob_old, _ = head.log_prob(actions, *inputs_old)
    given = {"head": head, "actor": actor_old, "obs": obs, "actions": actions}
    old = {"inputs_old": inputs_old, "log_prob_old": log_prob_old, "advantages": advantages}
    return given | old | {"objective": ppo.clip, "epsilon": 0.2, "beta": 0.0, "ent_coef": 0.0}


def minibatch(name):
    """The same for 16 rows, with θ away from θ_k: each of four ratios meets each of four Â."""
    rng = np.random.default_rng(0)
    actor, actor_old, obs = new_actor(name, rng), new_actor(name, rng), rng.standard_normal((16, 3))
    actions = rng.integers(3, size=16) if name == "Categorical" else rng.standard_normal((16, 2))
    log_prob = batch_of(name, actor, obs, actions, None)["log_prob_old"]
    batch = batch_of(name, actor_old, obs, actions, np.repeat([2.0, 0.3, -0.5, -1.0], 4))
    log_ratio = np.log(np.tile([0.5, 0.9, 1.1, 1.5], 4))
    return batch | {"actor": actor, "log_prob_old": log_prob - log_ratio}


def actor_gradient(batch, **changes):
    """The gradient of actor_loss as one vector."""
    return ppo.flatten(ppo.actor_loss(**batch | changes)[1])


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
REWARDS = REWARD[STATES, ACTIONS]
RETURN = REWARDS.sum(axis=1)
TO_GO = REWARDS[:, ::-1].cumsum(axis=1)[:, ::-1]


def policy(actor):
    """π_θ(a|s) (3, 2)."""
    (logits,), _ = ppo.policy_forward(actor, ONE_HOT)
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def path_probs(actor):
    """p_θ(τ) = p(s_1) Π π_θ(a_t|s_t) p(s_t+1|s_t,a_t) of every path (648,)."""
    steps = policy(actor)[STATES, ACTIONS] * NEXT[STATES, ACTIONS, PATHS[:, 2::2]]
    return START[PATHS[:, 0]] * steps.prod(axis=1)


def path_gradients(actor, weights):
    """The gradient of the policy gradient's loss on every path (648, len(θ)); weights (648, 3)."""
    gradients = []
    for states, actions, weight in zip(STATES, ACTIONS, weights, strict=True):
        inputs, cache = ppo.policy_forward(actor, ONE_HOT[states])
        log_prob, (d_logits,) = ppo.Categorical.log_prob(actions, *inputs)
        _, d_loss = ppo.policy_gradient(log_prob, log_prob, weight)
        gradients.append(ppo.policy_backward(actor, cache, [d_loss[:, None] * d_logits]))
    return np.array([ppo.flatten(g) for g in gradients])


class Counting:
    """Two environments that count steps. One terminates at 2, the other is cut off at 3."""

    count, ended = np.zeros(2), np.zeros(2, bool)

    def step(self, actions):
        rewards = np.where(self.ended, 0, 10 * self.count + actions)
        self.count = np.where(self.ended, 0, self.count + 1)
        self.ended = self.count == [2, 3]
        terminated, truncated = self.ended & np.eye(2, dtype=bool)
        return self.count[:, None], rewards, terminated, truncated, {}


class World:
    """Many copies of the world above, played by chance."""

    def __init__(self, copies, rng):
        self.rng, self.states = rng, rng.choice(3, size=copies, p=START)

    def step(self, actions):
        rewards, no = REWARD[self.states, actions], np.zeros(len(actions), bool)
        bounds = NEXT[self.states, actions].cumsum(axis=1)[:, :2]
        self.states = (self.rng.random((len(actions), 1)) > bounds).sum(axis=1)
        return ONE_HOT[self.states], rewards, no, no, {}


def test_L1_rows_of_a_trajectory_belong_together():
    """Row t holds s_t, the action chosen from it, its reward and how it ended; the true last state
    follows, and then the reset. Here the policy all but always plays s_t mod 2."""
    actor, rng = [np.array([[-100.0, 100.0]]), np.zeros(2)], np.random.default_rng(0)
    obs, actions, rewards, terminated, truncated = ppo.rollout(
        Counting(), ppo.Categorical, actor, lambda x: x % 2 - 0.5, np.zeros((2, 1)), 5, rng
    )
    assert_array_equal(obs[:, :, 0].T, [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 0, 1]])
    assert_array_equal(actions.T, [[0, 1, 0, 0, 1], [0, 1, 0, 1, 0]])
    assert_array_equal(rewards.T, [[0, 11, 0, 0, 11], [0, 11, 20, 0, 0]])
    assert_array_equal(terminated.T, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]])
    assert_array_equal(truncated.T, [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0]])


def test_L1_L2_probability_of_a_trajectory_and_the_objective():
    """rollout draws each path τ with probability p_θ(τ), and the mean return estimates J(θ)."""
    rng, n = np.random.default_rng(0), 40_000
    actor = ppo.init_mlp([3, 4, 2], rng)
    world = World(n, rng)
    obs, actions, rewards, *_ = ppo.rollout(
        world, ppo.Categorical, actor, lambda x: x, ONE_HOT[world.states], 3, rng
    )
    states = obs.argmax(axis=-1)
    drawn = [states[0], actions[0], states[1], actions[1], states[2], actions[2], states[3]]
    counts = np.bincount(np.ravel_multi_index(drawn, [3, 2, 3, 2, 3, 2, 3]), minlength=648)
    probs = path_probs(actor)
    assert_allclose(probs.sum(), 1, rtol=1e-6)
    assert np.all(abs(counts - n * probs) <= 5 * np.sqrt(n * probs) + 1e-9)
    J = probs @ RETURN
    assert abs(rewards.sum(axis=0).mean() - J) < 5 * np.sqrt(probs @ (RETURN - J) ** 2 / n)


@pytest.mark.parametrize("name", HEADS)
def test_L3_log_derivative_trick_and_eglp_lemma(name):
    """∇p = p ∇log p; and the expected grad-log-prob is 0, for every parameter of the network."""
    rng = np.random.default_rng(0)
    head, actor, obs = getattr(ppo, name), new_actor(name, rng), rng.standard_normal((1, 3))
    actions, weights, _ = all_actions(ppo.policy_forward(actor, obs)[0])

    def grad_log_prob(actions, weights):
        inputs, cache = ppo.policy_forward(actor, obs.repeat(len(actions), axis=0))
        log_prob, d_inputs = head.log_prob(actions, *inputs)
        grads = ppo.policy_backward(actor, cache, [weights[:, None] * d for d in d_inputs])
        return np.exp(log_prob), ppo.flatten(grads)

    def prob(actor):
        return np.exp(head.log_prob(actions[:1], *ppo.policy_forward(actor, obs)[0])[0][0])

    p, grad_log_p = grad_log_prob(actions[:1], np.ones(1))
    assert_allclose(numerical_gradient(prob, actor), p * grad_log_p, rtol=1e-6, atol=1e-10)
    assert_allclose(grad_log_prob(actions, weights)[1], 0, atol=1e-13)


def test_L4_L5_L6_policy_gradient():
    """With the weights R(τ), R_t, R_t - E[R_t] and R_t - V(s_t) the loss has the gradient -∇J, the
    exact one; and each weight has less variance than the one before it."""
    actor = ppo.init_mlp([3, 4, 2], np.random.default_rng(0), dtype=np.float64)
    probs, pi = path_probs(actor), policy(actor)
    V = np.zeros((4, 3))
    for t in (2, 1, 0):
        V[t] = (pi * (REWARD + NEXT @ V[t + 1])).sum(axis=1)
    assert_allclose(START @ V[0], probs @ RETURN)

    minus_grad_J = numerical_gradient(lambda actor: -path_probs(actor) @ RETURN, actor)
    variances = []
    for weights in [
        np.broadcast_to(RETURN[:, None], (648, 3)),
        TO_GO,
        TO_GO - probs @ TO_GO,
        TO_GO - V[np.arange(3), STATES],
    ]:
        gradients = path_gradients(actor, weights)
        assert_allclose(probs @ gradients, minus_grad_J, rtol=1e-6, atol=1e-9)
        variances.append(probs @ ((gradients - minus_grad_J) ** 2).sum(axis=1))
    assert variances == sorted(variances, reverse=True)
    assert variances[3] < variances[0] / 4


def test_L5_discounted_reward_to_go():
    """R_t = r_t + γ r_t+1 + γ² r_t+2 + ..., which gae gives for λ = 1 and a critic that says 0."""
    never = np.zeros((3, 1), bool)
    rewards = np.array([[1.0], [2.0], [3.0]])
    to_go = ppo.gae(rewards, np.zeros((4, 1)), never, never, gamma=0.5, lam=1)
    assert_array_equal(to_go, [[1 + 1 + 0.75], [2 + 1.5], [3]])


def test_L7_expected_td_error_is_the_advantage():
    """With the true V, E_s'[δ] = Q(s,a) - V(s) = A(s,a), and E_a[A] = 0."""
    gamma = 0.9
    pi = policy(ppo.init_mlp([3, 4, 2], np.random.default_rng(0), dtype=np.float64))
    V = np.linalg.solve(
        np.eye(3) - gamma * np.einsum("sa,sat->st", pi, NEXT), (pi * REWARD).sum(axis=1)
    )
    Q = REWARD + gamma * NEXT @ V
    s, a, s_next = np.indices((3, 2, 3)).reshape(3, -1)
    never = np.zeros((1, 18), bool)
    deltas = ppo.gae(REWARD[[s], [a]], V[np.array([s, s_next])], never, never, gamma, lam=0)
    A = (NEXT * deltas.reshape(3, 2, 3)).sum(axis=2)
    assert_allclose(A, Q - V[:, None], atol=1e-13)
    assert_allclose((pi * A).sum(axis=1), 0, atol=1e-13)


def episode(T=6):
    """Rewards (T,) and values (T+1,), and a gae for them, in one episode without an end."""
    rng, never = np.random.default_rng(0), np.zeros((T, 1), bool)
    r, v = rng.standard_normal(T), rng.standard_normal(T + 1)
    return r, v, lambda lam: ppo.gae(r[:, None], v[:, None], never, never, 0.9, lam)[:, 0]


def k_step_advantage(r, v, t, k):
    """A^(k)_t = r_t + γ r_t+1 + ... + γ^k V(s_t+k) - V(s_t), with γ = 0.9."""
    return sum(0.9**i * r[t + i] for i in range(k)) + 0.9**k * v[t + k] - v[t]


def test_L8_k_step_advantage_is_a_sum_of_td_errors():
    """A^(k)_t = Σ_l<k γ^l δ_t+l: between the first and the last, all values cancel."""
    r, v, advantages = episode()
    deltas = advantages(0)
    for t in range(6):
        for k in range(1, 6 - t + 1):
            total = sum(0.9**i * deltas[t + i] for i in range(k))
            assert_allclose(total, k_step_advantage(r, v, t, k))


def test_L9_gae_is_the_average_of_all_k_step_advantages():
    """Â_t = (1-λ) Σ λ^(k-1) A^(k)_t, and all weight that is left goes to the longest A^(k). So
    λ = 0 is the TD error A^(1), and λ = 1 the reward-to-go minus V(s_t)."""
    r, v, advantages = episode()
    for lam in (0, 0.3, 0.95, 1):
        for t, advantage in enumerate(advantages(lam)):
            longest = 6 - t
            weights = [(1 - lam) * lam ** (k - 1) for k in range(1, longest)]
            weights.append(lam ** (longest - 1))
            terms = [w * k_step_advantage(r, v, t, k) for k, w in enumerate(weights, start=1)]
            assert_allclose(advantage, sum(terms))


def test_L9_gae_in_every_pattern_of_endings():
    """Â_t = Σ (γλ)^l δ_t+l up to the episode's end; V(s_t+1) is 0 after a true end only. All 256
    ways to set both flags in four steps stand side by side."""
    rng, T, gamma, lam = np.random.default_rng(0), 4, 0.9, 0.8
    flags = np.indices([2] * 2 * T).reshape(2, T, -1).astype(bool)
    rewards, values = rng.standard_normal((T, 256)), rng.standard_normal((T + 1, 256))
    advantages = ppo.gae(rewards, values, *flags, gamma, lam)
    for t, n in np.ndindex(T, 256):
        expected = 0
        for i in range(t, T):
            terminated, truncated = flags[:, i, n]
            following = 0 if terminated else values[i + 1, n]
            delta = rewards[i, n] + gamma * following - values[i, n]
            expected += (gamma * lam) ** (i - t) * delta
            if terminated or truncated:
                break
        assert_allclose(advantages[t, n], expected, atol=1e-14)


def test_L9_time_limit_is_no_true_end():
    """A critic that is right, V = 1/(1-γ) for a reward of 1 in each step, leaves no advantage when
    a time limit stops the episode; a true end there is a loss of all that was to come."""
    ones, none = np.ones((3, 1)), np.zeros((3, 1), bool)
    last = np.array([[False], [False], [True]])
    values = np.full((4, 1), 1 / (1 - 0.9))
    assert_allclose(ppo.gae(ones, values, none, last, 0.9, 0), 0, atol=1e-14)
    assert_allclose(ppo.gae(ones, values, last, none, 0.9, 0), [[0], [0], [-9]], atol=1e-14)


def bandit():
    """One state and three actions: J(θ), and a batch in which each action is one row, weighted by
    its probability under θ_k; then another θ."""
    actor_old = ppo.init_mlp([1, 3], np.random.default_rng(0), dtype=np.float64)
    rewards = np.array([1.0, -2.0, 3.0])

    def J(actor):
        probs = np.exp(actor[0][0] + actor[1])
        return probs @ rewards / probs.sum()

    batch = batch_of("Categorical", actor_old, np.ones((3, 1)), np.arange(3), None)
    batch["advantages"] = 3 * np.exp(batch["log_prob_old"]) * rewards  # 3 rows: 3 · mean = sum
    return J, batch, [actor_old[0] + [[0.5, -0.4, 0.1]], actor_old[1]]


def test_L10_data_serve_one_step():
    """On data of θ_k the plain policy gradient is -∇J at θ_k alone; after a step it is wrong, and
    the importance-weighted one is right."""
    J, batch, actor = bandit()
    pg, surrogate = ppo.policy_gradient, ppo.importance_sampling
    minus_grad_J = -numerical_gradient(J, batch["actor"])
    assert_allclose(actor_gradient(batch, objective=pg), minus_grad_J, atol=1e-9)

    minus_grad_J = -numerical_gradient(J, actor)
    batch["actor"] = actor
    assert_allclose(actor_gradient(batch, objective=surrogate), minus_grad_J, atol=1e-9)
    assert np.linalg.norm(actor_gradient(batch, objective=pg) - minus_grad_J) > 0.1


def test_L11_importance_sampling():
    """E_q[f p/q] = E_p[f] for every q; Var_q[f p/q] = E_p[f² p/q] - E_p[f]² grows as q leaves p."""
    p, f = np.array([0.2, 0.3, 0.5]), np.array([1.0, 3.0, 2.0])
    variances = []
    for q in ([0.2, 0.3, 0.5], [0.3, 0.3, 0.4], [0.5, 0.3, 0.2], [0.68, 0.3, 0.02]):
        loss, _ = ppo.importance_sampling(np.log(p), np.log(q), f)
        assert_allclose(q @ -loss, 2.1)
        variance = q @ (-loss - 2.1) ** 2
        assert_allclose(variance, p @ (f**2 * p / q) - 2.1**2)
        variances.append(variance)
    assert_allclose(variances[0], 0.49)
    assert variances == sorted(variances) and variances[-1] > 50 * variances[0]


@pytest.mark.parametrize("name", HEADS)
def test_L12_all_objectives_start_alike(name):
    """At θ = θ_k the gradients of the surrogate, of PPO1 (any β) and of PPO2 are L4's."""
    args = minibatch(name)
    batch = batch_of(name, *(args[x] for x in ("actor", "obs", "actions", "advantages")))
    pg = actor_gradient(batch, objective=ppo.policy_gradient)
    assert np.linalg.norm(pg) > 0.1
    assert_allclose(actor_gradient(batch, objective=ppo.importance_sampling), pg, atol=1e-13)
    assert_allclose(actor_gradient(batch, objective=ppo.clip), pg, atol=1e-13)
    for beta in (0.5, 50.0):
        assert_allclose(actor_gradient(batch, objective=ppo.kl_penalty, beta=beta), pg, atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_L13_kl_divergence(name):
    """KL = E_a~π_θ_k[log π_θ_k - log π_θ], term by term; never negative, and 0 and flat at θ_k."""
    rng = np.random.default_rng(0)
    (head, old), (_, new) = one_state(name, rng), one_state(name, rng)
    actions, weights, rows = all_actions(old)
    log_prob_old = head.log_prob(actions, *rows)[0]
    log_prob = head.log_prob(actions, new[0].repeat(len(actions), axis=0), *new[1:])[0]
    assert_allclose(head.kl(*old, *new)[0], weights @ (log_prob_old - log_prob))
    for _ in range(100):
        assert head.kl(*old, *[x + 0.3 * rng.standard_normal(x.shape) for x in old])[0] > 0
    kl, grads = head.kl(*old, *old)
    assert_allclose([kl[0], *ppo.flatten(grads)], 0, atol=1e-15)


def test_L13_kl_is_a_distance_in_behaviour():
    """Adding a constant to every logit moves the parameters far and the policy not at all."""
    head, (logits,) = one_state("Categorical", np.random.default_rng(0))
    assert_allclose(head.kl(logits, logits + 100)[0], 0, atol=1e-13)
    assert head.kl(logits, logits + [[100, 0, 0]])[0] > 10


@pytest.mark.parametrize("name", HEADS)
def test_L14_trust_region_has_the_shape_of_the_fisher_matrix(name):
    """The KL's second derivative at θ_k is E[∇log π ∇log πᵀ]: to second order, what TRPO bounds and
    PPO replaces by simpler means is ½ Δᵀ F Δ."""
    head, old = one_state(name, np.random.default_rng(0))
    actions, weights, rows = all_actions(old)
    g = np.hstack(head.log_prob(actions, *rows)[1])
    fisher = g.T * weights @ g

    def slope(i):
        return lambda inputs: np.concatenate(head.kl(*old, *inputs)[1], axis=None)[i]

    hessian = [numerical_gradient(slope(i), old) for i in range(len(fisher))]
    assert_allclose(hessian, fisher, atol=1e-9)


def test_L15_adaptive_beta():
    """β doubles above 1.5 KL targets, halves below 2/3 of one, stays in between, and is bounded."""
    for kl, expected in [(0.016, 2.0), (0.0149, 1.0), (0.01, 1.0), (0.0067, 1.0), (0.006, 0.5)]:
        assert ppo.adapt_beta(1.0, kl, target=0.01) == expected
    assert ppo.adapt_beta(1e4, 1.0, target=0.01) == 1e4
    assert ppo.adapt_beta(1e-4, 0.0, target=0.01) == 1e-4


def test_L15_larger_beta_keeps_the_policy_closer():
    """Minimising -(ρ Â - β KL) ends nearer to θ_k the larger β is."""
    _, batch, _ = bandit()
    distances = []
    for beta in (0.5, 2, 8, 32):
        adam = ppo.Adam(ppo.flatten(batch["actor"]))
        actor = ppo.unflatten(adam.theta, batch["actor"])
        for _ in range(200):
            changes = {"actor": actor, "objective": ppo.kl_penalty, "beta": beta}
            adam.step(actor_gradient(batch, **changes), lr=0.03)
        inputs, _ = ppo.policy_forward(actor, batch["obs"])
        distances.append(ppo.Categorical.kl(*batch["inputs_old"], *inputs)[0][0])
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 100 * distances[-1] > 0


def test_L16_clip_table():
    """The lecture's six cases, ε = 0.2: nothing to gain beyond 1 ± ε, but always a way back."""
    ratio = np.array([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, slope = ppo.clip(np.log(ratio), np.zeros(6), advantages, epsilon=0.2)
    assert_allclose(loss, [-1.0, -2.0, -2.4, 1.6, 2.0, 3.0])
    assert_allclose(slope, [-1.0, -2.0, 0.0, 0.0, 2.0, 3.0])


def test_L16_clip_at_the_boundary():
    """At 1 ± ε the loss has a kink and no jump; the slope -ρÂ ends on the side that has no gain."""
    ratio = np.array([0.8 - 1e-9, 0.8 + 1e-9, 1.2 - 1e-9, 1.2 + 1e-9])
    for advantage, slopes in [(1.0, [-0.8, -0.8, -1.2, 0]), (-1.0, [0, 0.8, 1.2, 1.2])]:
        loss, slope = ppo.clip(np.log(ratio), np.zeros(4), np.full(4, advantage), epsilon=0.2)
        assert_allclose(loss, -advantage * ratio, atol=2e-9)
        assert_allclose(slope, slopes, atol=2e-9)


def test_L16_clip_is_literally_the_minimum():
    """loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â), whatever the numbers."""
    rng = np.random.default_rng(0)
    for ratio, advantage, epsilon in rng.uniform([0, -3, 0.05], [3, 3, 0.5], (300, 3)):
        loss, _ = ppo.clip(np.log([ratio]), np.zeros(1), np.array([advantage]), epsilon=epsilon)
        bounded = max(1 - epsilon, min(ratio, 1 + epsilon))
        assert_allclose(loss[0], -min(ratio * advantage, bounded * advantage))


def test_L16_clip_bounds_the_ratio():
    """What is clipped is ρ and not ρ Â: at ρ = 1 every advantage, small or large, has its slope."""
    advantages = np.array([0.1, 0.3, 5.0, -0.3, -5.0])
    loss, slope = ppo.clip(np.zeros(5), np.zeros(5), advantages, epsilon=0.2)
    assert_allclose(loss, -advantages)
    assert_allclose(slope, -advantages)


@pytest.mark.parametrize("name", HEADS)
def test_L17_entropy(name):
    """H = -E_a[log π(a)]: log n for n equal chances, ½ log(2πe) for the standard normal."""
    uniform, normal = np.zeros((1, 5)), [np.zeros((1, 1)), np.zeros(1)]
    assert_allclose(ppo.Categorical.entropy(uniform)[0], np.log(5))
    assert_allclose(ppo.Gaussian.entropy(*normal)[0], 1.4189385332046727)
    head, inputs = one_state(name, np.random.default_rng(0))
    actions, weights, rows = all_actions(inputs)
    assert_allclose(head.entropy(*inputs)[0], -weights @ head.log_prob(actions, *rows)[0])


def test_log_std_may_be_given_row_by_row():
    """(d,) for all rows or (B, d): log π, H and KL are the same."""
    rng = np.random.default_rng(0)
    mean, log_std, actions = rng.standard_normal((5, 2)), np.array([0.3, -0.2]), np.ones((5, 2))
    rows = np.tile(log_std, (5, 1))
    for method, first in ("log_prob", [actions]), ("entropy", []), ("kl", [mean + 1, log_std - 1]):
        f = getattr(ppo.Gaussian, method)
        (value, grads), (value_rows, grads_rows) = f(*first, mean, log_std), f(*first, mean, rows)
        assert_allclose([value, *np.hstack(grads).T], [value_rows, *np.hstack(grads_rows).T])


@pytest.mark.parametrize("name", HEADS)
def test_L17_entropy_bonus(name):
    """Without advantages, a step against the gradient of the actor's loss makes π more random."""
    batch = minibatch(name) | {"advantages": np.zeros(16), "ent_coef": 0.01}
    for objective in ppo.OBJECTIVES.values():
        theta = ppo.flatten(batch["actor"]) - actor_gradient(batch, objective=objective)
        before, after = (
            batch["head"].entropy(*ppo.policy_forward(actor, batch["obs"])[0])[0].mean()
            for actor in (batch["actor"], ppo.unflatten(theta, batch["actor"]))
        )
        assert after > before


def test_L18_critic_loss():
    """(V - R̂)² and its slope; the best constant V is the mean return."""
    returns = np.array([1.0, 2.0, 6.0])
    loss, slope = ppo.value_loss(np.array([3.0, 3.0, 3.0]), returns)
    assert_array_equal(loss, [4.0, 1.0, 9.0])
    assert_array_equal(slope, [4.0, 2.0, -6.0])
    assert slope.sum() == 0
    for other in (2.9, 3.1):
        assert ppo.value_loss(np.full(3, other), returns)[0].sum() > loss.sum()


def small_run(**chosen):
    """A new agent and its environments, for two short iterations unless chosen otherwise."""
    small = {"num_envs": 4, "num_steps": 32, "total_steps": 256, "minibatch_size": 32, "epochs": 2}
    settings = ppo.Settings(**{**small, "hidden": (16,), **chosen})
    envs = ppo.make_envs(settings.env, settings.num_envs)
    return ppo.Agent(envs, settings), envs


@pytest.mark.parametrize("objective", ["pg", "is", "kl", "clip"])
def test_L19_update_makes_better_actions_likelier(objective):
    """Of two actions, the one with advantage +1 gains probability, and the critic comes nearer to
    the returns."""
    agent, _ = small_run(objective=objective)
    rng = np.random.default_rng(0)
    obs, actions = rng.standard_normal((64, 4)).astype(np.float32), np.tile([0, 1], 32)
    advantages, returns = (2 * actions - 1).astype(np.float32), np.ones(64, np.float32)

    def likelihood():
        logits = ppo.policy_forward(agent.actor, obs)[0][0]
        return np.exp(ppo.log_softmax(logits))[:, 1].mean()

    before = likelihood()
    critic_before = ppo.critic_loss(agent.critic, obs, returns)[0].mean()
    ppo.update(agent, obs, actions, advantages, returns, left=0.5)
    assert likelihood() > before + 1e-3
    assert ppo.critic_loss(agent.critic, obs, returns)[0].mean() < critic_before


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1"])
def test_L19_update_measures_from_theta_k(env):
    """θ_k stays what it was while θ moves: the KL and the clip fraction that update reports are
    those between the policies before and after it."""
    agent, _ = small_run(env=env, epochs=10, lr=0.01)
    head, rng = agent.head, np.random.default_rng(0)
    obs = rng.standard_normal((64, agent.actor[0].shape[0])).astype(np.float32)
    old = [x.copy() for x in ppo.policy_forward(agent.actor, obs)[0]]
    actions = head.sample(head.noise(rng, old[0].shape), *old)
    advantages = rng.standard_normal(64).astype(np.float32)
    record = ppo.update(agent, obs, actions, advantages, np.zeros(64, np.float32), left=1)
    new, _ = ppo.policy_forward(agent.actor, obs)
    ratio = np.exp(head.log_prob(actions, *new)[0] - head.log_prob(actions, *old)[0])
    assert_allclose(record["kl"], head.kl(*old, *new)[0].mean(), rtol=1e-4)
    assert record["clip_fraction"] == (abs(ratio - 1) > 0.2).mean() > 0


def test_L19_loop_is_determined_by_its_seed():
    """Each iteration turns θ_k into θ_k+1; one seed gives the same θ to the last bit, another seed
    a different one."""

    def thetas(seed):
        agent, envs = small_run(seed=seed)
        return [agent.actor_adam.theta.copy() for _ in ppo.learn(agent, envs)]

    first, again, other = thetas(1), thetas(1), thetas(2)
    assert len(first) == 2 and not np.array_equal(*first)
    assert_array_equal(first, again)
    assert not np.array_equal(first[1], other[1])


# B  The gradients ---------------------------------------------------------------------------------


def assert_gradient(grads, f, params):
    """grads is the gradient of the number f(params), to a relative error of 1e-6."""
    numeric = numerical_gradient(f, params)
    error = np.linalg.norm(np.concatenate(grads, axis=None) - numeric)
    assert error <= 1e-6 * np.linalg.norm(numeric)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("objective", ["pg", "is", "kl", "clip"])
@pytest.mark.parametrize("name", HEADS)
def test_gradient_of_actor_loss(name, objective, ent_coef):
    """Objective, entropy, head and network together, in every case of the clip table."""
    batch = minibatch(name) | {"objective": ppo.OBJECTIVES[objective], "ent_coef": ent_coef}
    batch["beta"] = 0.5 if objective == "kl" else 0.0
    inputs, _ = ppo.policy_forward(batch["actor"], batch["obs"])
    log_prob, _ = batch["head"].log_prob(batch["actions"], *inputs)
    ratio = np.exp(log_prob - batch["log_prob_old"])
    cases = set(zip(np.digitize(ratio, [0.8, 1.2]), batch["advantages"] > 0, strict=True))
    assert len(cases) == 6
    assert abs(ratio[:, None] - [0.8, 1.2]).min() > 1e-3  # a kink has no derivative
    _, grads = ppo.actor_loss(**batch)
    assert_gradient(
        grads, lambda x: ppo.actor_loss(**batch | {"actor": x})[0].mean(), batch["actor"]
    )


def test_gradient_of_critic_loss():
    """Squared error and network together."""
    rng = np.random.default_rng(0)
    critic = ppo.init_mlp([3, 5, 4, 1], rng, dtype=np.float64)
    obs, returns = rng.standard_normal((8, 3)), rng.standard_normal(8)
    _, grads = ppo.critic_loss(critic, obs, returns)
    assert_gradient(grads, lambda x: ppo.critic_loss(x, obs, returns)[0].mean(), critic)


@pytest.mark.parametrize("method", ["log_prob", "entropy", "kl"])
@pytest.mark.parametrize("name", HEADS)
def test_gradient_of_head(name, method):
    """log π, H and KL with respect to all of the head's inputs, under a random projection."""
    rng, batch = np.random.default_rng(0), minibatch(name)
    given = {"log_prob": [batch["actions"]], "entropy": [], "kl": batch["inputs_old"]}[method]
    inputs, _ = ppo.policy_forward(batch["actor"], batch["obs"])
    f, projection = getattr(batch["head"], method), rng.standard_normal(16)
    d_inputs = [projection[:, None] * d for d in f(*given, *inputs)[1]]
    grads = [d_inputs[0], *[d.sum(axis=0) for d in d_inputs[1:]]]
    assert_gradient(grads, lambda x: projection @ f(*given, *x)[0], inputs)


def test_gradient_of_mlp():
    """A random projection of the outputs, through three layers."""
    rng = np.random.default_rng(0)
    params = [x + 0.1 for x in ppo.init_mlp([3, 5, 4, 2], rng, dtype=np.float64)]
    x, projection = rng.standard_normal((7, 3)), rng.standard_normal((7, 2))
    _, cache = ppo.mlp_forward(params, x)
    grads = ppo.mlp_backward(params, cache, projection)
    assert_gradient(grads, lambda p: (projection * ppo.mlp_forward(p, x)[0]).sum(), params)


# C  The tests -------------------------------------------------------------------------------------
# A test that cannot fail proves nothing. Each line changes one thing in ppo.py, and the test named
# beside it must notice.

MUTANTS = [
    ("1 - x * x", "1 - x", "gradient_of_mlp"),
    ("q *= np.sign(np.diag(r))", "pass", "init_mlp_prefers_no_direction"),
    ("logits + noise", "logits - noise", "categorical_samples_by_its_probabilities"),
    ("(probs_old * (", "(np.exp(log_probs) * (", "L13_kl_divergence", "Categorical"),
    ("z * z - 1]", "z * z]", "L3_log_derivative_trick_and_eglp_lemma", "Gaussian"),
    ("2 * np.pi * np.e)", "2 * np.pi)", "L17_entropy", "Gaussian"),
    ("observe(observations[t])", "observe(obs)", "L1_rows_of_a_trajectory_belong_together"),
    ("gamma * values[1:] *", "values[1:] *", "L7_expected_td_error_is_the_advantage"),
    ("values[1:] * ~terminated", "values[1:]", "L9_gae_in_every_pattern_of_endings"),
    ("values[1:] * ~terminated", "values[1:] * ~ended", "L9_time_limit_is_no_true_end"),
    ("np.where(ended, 0,", "np.where(terminated, 0,", "L9_gae_in_every_pattern_of_endings"),
    ("gamma * lam)", "gamma)", "L9_gae_is_the_average_of_all_k_step_advantages"),
    ("* advantages, -advantages", "* advantages, advantages", "L4_L5_L6_policy_gradient"),
    ("advantages, -ratio *", "advantages, -", "L10_data_serve_one_step"),
    ("if kl > kl_max", "if kl < kl_max", "L15_adaptive_beta"),
    ("np.minimum(", "np.maximum(", "L16_clip_table"),
    ("1 - epsilon, 1 + epsilon", "1 + epsilon, 1 - epsilon", "L16_clip_table"),
    ("np.clip(ratio, 1", "np.clip(surrogate, 1", "L16_clip_bounds_the_ratio"),
    ("surrogate <= cl", "surrogate < cl", "L12_all_objectives_start_alike", "Categorical"),
    ("error, 2 * error", "error, error", "gradient_of_critic_loss"),
    ("self.m / (1 - self.beta1**self.t)", "self.m", "adam_by_hand"),
    ("d + beta * d_term", "d - beta * d_term", "L15_larger_beta_keeps_the_policy_closer"),
    ("d - ent_coef * d_term", "d + ent_coef * d_term", "L17_entropy_bonus", "Categorical"),
    ("[d / len(obs) for d in d_inputs]", "d_inputs", "gradient_of_actor_loss", "Gaussian", "is", 0),
    ("np.array(np.broad", "np.asarray(np.broad", "L19_update_measures_from_theta_k", "Pendulum-v1"),
    ("~np.vstack([ended_last", "~np.vstack([ended[-1]", "E_every_transition_is_learned_from_once"),
    ("default_rng(s.seed)", "default_rng()", "L19_loop_is_determined_by_its_seed"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant[2])
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [[3, 8, 5, 2], [8, 2, 9, 1]])
def test_init_mlp_is_orthogonal(sizes, dtype):
    """Rows or columns, whichever are fewer, are orthogonal: length √2 in hidden layers, then
    out_gain; biases are 0."""
    params = ppo.init_mlp(sizes, np.random.default_rng(0), out_gain=0.1, dtype=dtype)
    assert len(params) == 6 and all(x.dtype == dtype for x in params)
    for i, squared_length in enumerate([2, 2, 0.01]):
        W, b = params[2 * i : 2 * i + 2]
        assert W.shape == (sizes[i], sizes[i + 1]) and b.shape == (sizes[i + 1],)
        product = W.T @ W if sizes[i] >= sizes[i + 1] else W @ W.T
        assert_allclose(product, squared_length * np.eye(len(product)), atol=1e-6)
        assert not b.any()


def test_init_mlp_prefers_no_direction():
    """Each weight is as often positive as negative."""
    rng = np.random.default_rng(0)
    positive = np.mean([ppo.init_mlp([3, 2], rng)[0] > 0 for _ in range(1000)], axis=0)
    assert_allclose(positive, 0.5, atol=0.07)


def test_log_softmax_of_large_logits():
    """Literal values, where exp alone would overflow."""
    assert_allclose(
        ppo.log_softmax(np.array([[1e4, 1e4, -1e4], [0.0, np.log(2), np.log(5)]])),
        [[-np.log(2), -np.log(2), -2e4 - np.log(2)], np.log([1 / 8, 2 / 8, 5 / 8])],
    )


def test_categorical_samples_by_its_probabilities():
    """A hundred thousand draws fall on the actions as π says, within 4 standard errors."""
    rng, probs, n = np.random.default_rng(0), np.array([0.1, 0.2, 0.7]), 100_000
    logits = np.tile(np.log(probs), (n, 1))
    actions = ppo.Categorical.sample(ppo.Categorical.noise(rng, (n, 3)), logits)
    counts = np.bincount(actions, minlength=3)
    assert np.all(abs(counts - n * probs) < 4 * np.sqrt(n * probs * (1 - probs)))
    assert_array_equal(ppo.Categorical.mode(logits[:2]), [2, 2])


def test_gaussian_samples_by_its_density():
    """Of a hundred thousand draws 15.87, 50 and 84.13 % lie below mean - std, mean and mean + std,
    and the two dimensions are independent."""
    rng, n = np.random.default_rng(0), 100_000
    mean, log_std = np.tile([1.0, -3.0], (n, 1)), np.log([0.5, 2.0])
    actions = ppo.Gaussian.sample(ppo.Gaussian.noise(rng, (n, 2)), mean, log_std)
    for z, share in [(-1, 0.158655), (0, 0.5), (1, 0.841345)]:
        below = (actions < [1 + z * 0.5, -3 + z * 2.0]).mean(axis=0)
        assert_allclose(below, share, atol=4 * np.sqrt(share * (1 - share) / n))
    assert abs(np.corrcoef(actions.T)[0, 1]) < 4 / np.sqrt(n)
    assert_array_equal(ppo.Gaussian.mode(mean, log_std), mean)


def test_flatten_and_unflatten():
    """One vector and its views: when the vector moves, so do the arrays."""
    arrays = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0]), np.array([6.0, 7.0])]
    vector = ppo.flatten(arrays)
    assert_array_equal(vector, [1, 2, 3, 4, 5, 6, 7])
    views = ppo.unflatten(vector, arrays)
    vector += 10
    for view, array in zip(views, arrays, strict=True):
        assert_array_equal(view, array + 10)


def test_clip_by_global_norm():
    """Longer gradients are scaled down to max_norm, shorter ones stay, overflow becomes zeros."""
    gradient = np.array([3.0, 4.0])
    assert_allclose(ppo.clip_by_global_norm(gradient, 1.0), [0.6, 0.8])
    assert_array_equal(ppo.clip_by_global_norm(gradient, 5.0), gradient)
    assert_array_equal(ppo.clip_by_global_norm(0 * gradient, 5.0), [0, 0])
    for broken in (np.inf, np.nan, 1e200):
        with np.errstate(over="ignore"):
            assert_array_equal(ppo.clip_by_global_norm(np.array([broken, 1.0]), 5.0), [0, 0])


def test_adam_by_hand():
    """Two steps with the gradients 0.5 and -0.25: m̂ = 0.5, v̂ = 0.25, then m = 0.9·0.05 - 0.1·0.25 =
    0.02 and v = 0.999·0.00025 + 0.001·0.0625 = 0.00031225, each divided by 1 - beta²."""
    theta = np.array([1.0])
    adam = ppo.Adam(theta)
    adam.step(np.array([0.5]), lr=0.1)
    after_one = 1 - 0.1 * 0.5 / (0.5 + 1e-5)
    assert_allclose(theta, after_one)
    adam.step(np.array([-0.25]), lr=0.1)
    assert_allclose(
        theta, after_one - 0.1 * (0.02 / 0.19) / ((0.00031225 / 0.001999) ** 0.5 + 1e-5)
    )


@pytest.mark.parametrize("broken", ["observation", "reward"])
def test_rollout_refuses_what_is_not_finite(broken):
    """A number from the environment that is no number stops the rollout and names the step."""

    class Broken(Counting):
        def step(self, actions):
            obs, rewards, *rest = super().step(actions)
            if self.count[1] == 3:
                {"observation": obs, "reward": rewards}[broken][0] = np.nan
            return obs, rewards, *rest

    rng = np.random.default_rng(0)
    actor, observe, obs = ppo.init_mlp([1, 2], rng), lambda obs: obs, np.zeros((2, 1))
    with pytest.raises(FloatingPointError, match=f"{broken} is not finite in float32, at step 2"):
        ppo.rollout(Broken(), ppo.Categorical, actor, observe, obs, 5, rng)


LECTURE = [x.name for x in ast.parse(SOURCE.split("# §8")[0]).body if hasattr(x, "name")]


def pasted_alone(name):
    """The definition in a file of its own: numpy and the definitions that it names, no more."""
    namespace, needed = {"np": np}, [name]
    for x in needed:
        source = inspect.getsource(getattr(ppo, x))
        exec(source, namespace)
        named = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        needed += sorted(named & set(LECTURE) - set(needed))
    return namespace[name]


def small_calls(dtype):
    """For each definition, by name: how to use it on small inputs of this dtype."""
    rng = np.random.default_rng(0)

    def x(*shape):
        return rng.standard_normal(shape).astype(dtype)

    net, flags, rows = [x(3, 4), x(4), x(4, 2), x(2)], np.eye(3, 2, dtype=bool), [x(5), x(5), x(5)]
    _, cache = ppo.mlp_forward(net, x(5, 3))

    def head(actions, *inputs):
        return lambda h: [
            h.log_prob(actions, *inputs),
            h.entropy(*inputs),
            h.kl(*inputs, *inputs),
            h.sample(h.noise(rng, (5, 2)), *inputs),
            h.mode(*inputs),
        ]

    def adam(f):
        optimiser = f(x(5))
        optimiser.step(x(5), 0.1)
        return optimiser.theta, optimiser.m, optimiser.v

    def rollout(f):
        return f(Counting(), ppo.Categorical, [x(1, 2), x(2)], lambda obs: obs, x(2, 1), 5, rng)[1]

    return {
        "init_mlp": lambda f: f([3, 4, 2], rng, dtype=dtype),
        "mlp_forward": lambda f: f(net, x(5, 3)),
        "mlp_backward": lambda f: f(net, cache, x(5, 2)),
        "log_softmax": lambda f: f(x(5, 2)),
        "Categorical": head(np.array([0, 1, 1, 0, 1]), x(5, 2)),
        "Gaussian": head(x(5, 2), x(5, 2), x(2)),
        "policy_forward": lambda f: f([*net, x(2)], x(5, 3)),
        "policy_backward": lambda f: f([*net, x(2)], cache, [x(5, 2), x(5, 2)]),
        "rollout": rollout,
        "gae": lambda f: f(x(3, 2), x(4, 2), flags, ~flags, 0.9, 0.8),
        "policy_gradient": lambda f: f(*rows),
        "importance_sampling": lambda f: f(*rows),
        "kl_penalty": lambda f: f(*rows, kl=x(5), beta=0.5),
        "clip": lambda f: f(*rows, epsilon=0.2),
        "adapt_beta": lambda f: f(1.0, 0.1, 0.01),
        "value_loss": lambda f: f(x(5), x(5)),
        "flatten": lambda f: f(net),
        "unflatten": lambda f: f(x(26), net),
        "clip_by_global_norm": lambda f: [f(x(5), 0.1), f(x(5), 1e3), f(np.inf * x(5), 1)],
        "Adam": adam,
    }


def arrays_in(value):
    """Every array in nested lists and tuples."""
    if isinstance(value, list | tuple):
        return [array for item in value for array in arrays_in(item)]
    return [value] if isinstance(value, np.ndarray) else []


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LECTURE)
def test_definition_runs_alone_and_keeps_the_dtype(name, dtype):
    """Every function and class of §1-§7, pasted into an empty file, runs; float32 stays float32."""
    result = small_calls(dtype)[name](pasted_alone(name))
    assert all(x.dtype == dtype for x in arrays_in(result) if x.dtype.kind == "f")
    assert all(np.isfinite(x).all() for x in arrays_in(result))


@pytest.mark.parametrize("scale", [0, 1e-6, 1e6])
@pytest.mark.parametrize("objective", ["pg", "is", "kl", "clip"])
def test_learning_stays_finite(objective, scale):
    """With constant, tiny and huge rewards, and minibatches of one row, numbers stay numbers."""
    agent, envs = small_run(objective=objective, total_steps=64, num_steps=8, minibatch_size=1)
    step = envs.step

    def scaled_step(actions):
        obs, rewards, *rest = step(actions)
        return obs, scale * rewards, *rest

    envs.step = scaled_step
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        records = list(ppo.learn(agent, envs))
    assert np.isfinite(agent.actor_adam.theta).all() and np.isfinite(agent.critic_adam.theta).all()
    assert all(np.isfinite(x[key]) for x in records for key in x if key != "mean_return")


# E  The ends of episodes --------------------------------------------------------------------------


def register(env_id, entry_point, **kwargs):
    """Register an environment, in place of an earlier one of the same name."""
    gym.registry.pop(env_id, None)
    gym.register(env_id, entry_point, kwargs=kwargs)


class Constant(gym.Env):
    """Reward 1 for ever, from a state that never changes. kind says how an episode of 10 ends."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, kind):
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 10
        return (
            np.ones(1, np.float32),
            1.0,
            over and self.kind == "end",
            over and self.kind == "limit",
            {},
        )


for kind in ("end", "limit"):
    register(f"Constant-{kind}-v0", Constant, kind=kind)


def learned_value(kind):
    agent, _ = ppo.train(env=f"Constant-{kind}-v0", total_steps=30_000, gamma=0.9, lr=3e-3)
    return ppo.mlp_forward(agent.critic, np.ones((1, 1), np.float32))[0].item()


def test_E_a_time_limit_is_no_end():
    """Reward 1 for ever is worth 1/(1-γ) = 10, however often a time limit interrupts it."""
    assert learned_value("limit") == pytest.approx(10, rel=0.03)


def test_E_a_true_end_is_an_end():
    """With true ends, no state is worth more than the ten rewards of an episode, Σ γ^k = 6.51."""
    assert learned_value("end") < 6.52


class Diary(gym.Env):
    """Every observation occurs once; true ends and time limits alternate at odd lengths."""

    observation_space = gym.spaces.Box(0, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    transitions, clock = [], 0

    def see(self):
        Diary.clock += 1
        self.obs = np.array([Diary.clock], np.float32)
        return self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, self.np_random.integers(1, 8)
        return self.see(), {}

    def step(self, action):
        before = self.obs.item()
        self.t += 1
        over, even = self.t == self.length, self.length % 2 == 0
        Diary.transitions.append((before, action.item(), self.see().item()))
        return self.obs, 1.0, over and even, over and not even, {}


register("Diary-v0", Diary)


def test_E_every_transition_is_learned_from_once():
    """Reset rows never reach the learner; the rows of both kinds of last steps do, exactly once."""
    following, learned = {}, []
    rollout, update = ppo.rollout, ppo.update

    def watched_rollout(*args):
        result = rollout(*args)
        obs = result[0][:, :, 0]
        following.update(zip(obs[:-1].ravel(), obs[1:].ravel(), strict=True))
        return result

    def watched_update(agent, obs, actions, *rest):
        for o, a in zip(obs[:, 0], actions[:, 0].clip(-1, 1), strict=True):
            learned.append((o, a, following[o]))
        return update(agent, obs, actions, *rest)

    Diary.transitions.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "rollout", watched_rollout)
        patch.setattr(ppo, "update", watched_update)
        ppo.train(env="Diary-v0", num_envs=3, num_steps=17, total_steps=459, minibatch_size=16)
    assert len(learned) == len(Diary.transitions) > 300
    assert sorted(learned) == sorted(Diary.transitions)


def test_E_episode_returns():
    """Episodes run on from one rollout to the next; literal rewards, in order of their ends."""
    rewards = np.array([[1.0, 10.0], [2.0, 20.0], [0.0, 30.0], [4.0, 40.0]])
    ended = np.array([[0, 0], [1, 0], [0, 1], [0, 0]], bool)
    returns, so_far = ppo.episode_returns(rewards, ended, np.array([100.0, 1000.0]))
    assert_array_equal(returns, [103, 1060])
    assert_array_equal(so_far, [4, 40])


def test_E_discounted_sums():
    """Σ γ^k r_t-k starts anew after either ending; γ = 0.5, literal rewards."""
    rewards, ended = np.array([[1.0], [2.0], [0.0], [4.0]]), np.array([[0], [1], [0], [0]], bool)
    sums, so_far = ppo.discounted_sums(rewards, ended, 0.5, np.array([8.0]))
    assert_array_equal(sums, [[5], [4.5], [0], [4]])
    assert_array_equal(so_far, [4])


def test_E_budget_and_learning_rate(monkeypatch):
    """The last rollout is as short as the budget; the learning rate falls linearly with steps."""
    rates, step = [], ppo.Adam.step
    monkeypatch.setattr(ppo.Adam, "step", lambda *args: rates.append(args[-1]) or step(*args))
    _, history = ppo.train(
        env="Diary-v0", num_envs=2, num_steps=8, total_steps=42, minibatch_size=8, lr=0.1
    )
    assert [record["steps"] for record in history] == [16, 32, 42]
    assert_allclose(sorted(set(rates), reverse=True), [0.1, 0.1 * 26 / 42, 0.1 * 10 / 42])


def test_E_a_rollout_of_resets_only_is_passed_over():
    """One environment and one step: every row after an ending is a rollout without transitions."""
    agent, history = ppo.train(
        env="Diary-v0", num_envs=1, num_steps=1, total_steps=60, minibatch_size=1
    )
    assert agent.steps == 60 > len(history) > 30


# F  The tasks -------------------------------------------------------------------------------------


class Odd(gym.Env):
    """Observations and actions of any space; reward 1 for an action that is inside its space."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), action
        self.t += 1
        return self.observation_space.sample(), 1.0, False, self.t == 5, {}


BOX, TWO = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (gym.spaces.Box(0, 255, (3,), np.uint8), TWO),
        (gym.spaces.Box(-1, 1, (3,), np.float64), TWO),
        (gym.spaces.Box(-1, 1, ()), TWO),
        (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), TWO),
        (gym.spaces.Discrete(5, start=-2), TWO),
        (gym.spaces.MultiBinary(4), TWO),
        (gym.spaces.MultiDiscrete([3, 2]), TWO),
        (gym.spaces.Tuple([TWO, BOX]), TWO),
        (gym.spaces.Dict(a=BOX, b=gym.spaces.Discrete(3)), TWO),
        (BOX, gym.spaces.Discrete(3, start=7)),
        (BOX, gym.spaces.Box(-np.inf, np.inf, (2,))),
        (BOX, gym.spaces.Box(0, 1, ())),
        (BOX, gym.spaces.Box(-1, 1, (2, 2), np.float64)),
        (BOX, gym.spaces.Box(0, 9, (3,), np.int64)),
    ],
    ids=str,
)
def test_spaces(observation_space, action_space):
    """Whatever Gymnasium can flatten is observed; actions arrive inside their space."""
    register("Odd-v0", Odd, observation_space=observation_space, action_space=action_space)
    agent, history = ppo.train(
        env="Odd-v0", num_envs=2, num_steps=8, total_steps=32, minibatch_size=8, normalize_obs=True
    )
    assert history[-1]["mean_return"] == 5
    assert all(np.isfinite(p).all() for p in agent.actor + agent.critic)
    assert (ppo.evaluate(agent, episodes=3) == 5).all()


def test_normalised_observations_and_scaled_rewards(monkeypatch):
    """The networks see observations of mean 0 and deviation 1, and rewards over √Var(Σ γ^k r)."""
    seen, rewards = [], []
    gae = ppo.gae
    monkeypatch.setattr(ppo, "gae", lambda r, *args: rewards.append(r) or gae(r, *args))
    agent, _ = ppo.train(
        env="Pendulum-v1",
        num_envs=16,
        num_steps=64,
        epochs=1,
        total_steps=20_480,
        gamma=0.9,
        normalize_obs=True,
        scale_rewards=True,
    )
    envs = ppo.make_envs("Pendulum-v1", 16)
    obs, _ = envs.reset(seed=0)
    for _ in range(150):
        seen.append(obs)
        obs, *_ = envs.step(np.random.default_rng(len(seen)).uniform(-2, 2, (16, 1)))
    seen = agent.observe(np.concatenate(seen))
    assert_allclose(seen.mean(axis=0), 0, atol=0.3)
    assert_allclose(seen.std(axis=0), 1, atol=0.3)
    sums, _ = ppo.discounted_sums(
        np.concatenate(rewards), np.zeros((1280, 16), bool), 0.9, np.zeros(16)
    )
    assert sums[400:].std() == pytest.approx(1, abs=0.3)


SHORT = {
    "CartPole-v1": (40_000, 400),
    "Acrobot-v1": (40_000, -110),
    "MountainCar-v0": (100_000, -160),
    "MountainCarContinuous-v0": (100_000, 90),
    "Pendulum-v1": (40_000, -300),
    "FrozenLake-v1": (80_000, 0.45),
    "Taxi": (130_000, -60),
    "CliffWalking": (60_000, -20),
}


@pytest.mark.parametrize("task", SHORT)
def test_tasks_are_learned(task):
    """A short run with the settings of the task comes far above what a broken learner reaches."""
    steps, enough = SHORT[task]
    (env,) = (
        x for x in gym.registry if x == task or (x in ppo.TUNED and x.startswith(f"{task}-v"))
    )
    agent, _ = ppo.train(env=env, total_steps=steps, seed=300)
    assert ppo.evaluate(agent, episodes=50).mean() >= enough


def test_module_prefix(tmp_path, monkeypatch, capsys):
    """module:Env-v0 imports the module first, as everywhere in Gymnasium."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv',"
        " max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ppo.main(["--env", "my_envs:Mine-v0", *TINY]) == 0
    assert "min" in capsys.readouterr().out


class Broken(gym.Env):
    """Returns a number that is not finite at its 40th step (or reset)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, quantity, value, continuous):
        self.action_space = BOX if continuous else TWO
        self.quantity, self.value, self.t = quantity, value, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(2, self.value if self.quantity == "reset" else 0.5), {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.t += 1
        obs, reward = np.zeros(2), 1.0
        if self.t == 40 and self.quantity == "observation":
            obs[1] = self.value
        if self.t == 40 and self.quantity == "reward":
            reward = self.value
        return obs, reward, False, False, {}


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("quantity", ["observation", "reward"])
def test_numbers_that_are_not_finite_stop_the_run(quantity, value, continuous, tmp_path, capsys):
    """One line names the quantity and the step; what was saved before stays as it was."""
    register("Broken-v0", Broken, quantity=quantity, value=value, continuous=continuous)
    path = tmp_path / "policy.npz"
    flags = ["--num-envs", "1", "--num-steps", "16", "--minibatch-size", "16", "--save", str(path)]
    assert ppo.main(["--env", "Broken-v0", *flags, "--save-every", "1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert quantity in message and "step 7 of a rollout, 32 steps into the run" in message
    _, state = ppo.load(str(path))
    assert json.loads(str(state["rest"]))["steps"] == 32


# G  The command line ------------------------------------------------------------------------------

TINY = [
    "--num-envs",
    "2",
    "--num-steps",
    "8",
    "--minibatch-size",
    "8",
    "--total-steps",
    "32",
    "--episodes",
    "2",
]


def refused(argv, capsys):
    """The one line with which the command line refuses argv."""
    assert ppo.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ppo.py: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


NUMBERS = [f for f in dataclasses.fields(ppo.Settings) if f.metadata["low"] is not None]


@pytest.mark.parametrize("name", [f.name for f in NUMBERS])
@pytest.mark.parametrize("wrong", ["below", "above", "text", "", "nan", "inf", "-inf", "1e999"])
def test_wrong_numbers(name, wrong, capsys):
    """Below its range, above it, or no number at all: refused, and the flag is named."""
    (f,) = (f for f in NUMBERS if f.name == name)
    value = {"below": f.metadata["low"] - 1, "above": f.metadata["high"] + 1}.get(wrong, wrong)
    flag = "--" + name.replace("_", "-")
    assert flag in refused([f"{flag}={value}"], capsys)


register("Wide-v0", Odd, observation_space=BOX, action_space=gym.spaces.MultiBinary(3))
LONG = gym.spaces.Box(-1, 1, (10_000,))
register("Long-v0", Odd, observation_space=LONG, action_space=TWO)


@pytest.mark.parametrize(
    ("line", "clue"),
    [
        ("--env CartPole-v9", "v1"),
        ("--env CartPol-v1", "CartPole"),
        ("--env ''", "cannot make"),
        ("--env no_such_module:Env-v0", "no_such_module"),
        ("--env ALE/Pong-v5", "ALE"),
        ("--env Wide-v0", "MultiBinary(3)"),
        ("--objective trpo", "pg, is, kl, clip"),
        ("--minibatch-size 65 --num-envs 8 --num-steps 8", "8 environments x 8 steps"),
        ("--hidden", "--hidden"),
        ("--hidden 64 x", "--hidden"),
        ("--normalize-obs yes", "yes"),
        ("--gama 0.9", "--gama"),
        ("CartPole-v1", "CartPole-v1"),
        ("--lr", "--lr"),
        ("--episodes 0", "--episodes"),
        ("--save-every 0 --save x.npz", "--save-every"),
        ("--save-every 3", "--save FILE"),
        ("--render", "--play"),
        ("--play x.npz --lr 0.1", "--play"),
        ("--play x.npz --load y.npz", "--play"),
        ("--play missing.npz", "missing.npz"),
        ("--load missing.npz", "missing.npz"),
        ("--save missing/folder/p.npz", "missing/folder"),
        ("--save ''", "--save"),
        ("--save x.npz --log x.npz", "another name"),
        ("--save /", "not a file"),
        ("--save /dev/null", "not a file"),
        ("--log missing/folder/l.csv", "missing/folder"),
        ("--env Long-v0 --num-envs 99 --num-steps 1000000 --total-steps 99000000", "allocate"),
    ],
)
def test_wrong_command_lines(line, clue, capsys):
    """What cannot work is refused before anything starts, with what to change."""
    assert clue in refused(shlex.split(line), capsys)


@pytest.mark.filterwarnings("ignore:.*autoreset_mode")
def test_other_reset_modes_are_refused(capsys):
    """An environment whose reset hides the last observation would be learned from wrongly."""

    class SameStep:
        metadata = {"autoreset_mode": types.SimpleNamespace(value="SameStep")}
        unwrapped = types.SimpleNamespace()

        def __init__(self, **kwargs):
            pass

    gym.registry.pop("SameStep-v0", None)
    gym.register("SameStep-v0", vector_entry_point=SameStep)
    assert "NEXT_STEP" in refused(["--env", "SameStep-v0"], capsys)


def test_a_missing_extra_package_is_named(monkeypatch, capsys):
    """Gymnasium knows what to install; its hint is passed on."""
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    assert "gymnasium[box2d]" in refused(["--env", "LunarLander-v3"], capsys)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_settings_keep_the_parameters_finite(data):
    """Any valid settings run two iterations; no parameter becomes NaN or infinite."""
    small = {
        "num_envs": st.integers(1, 3),
        "num_steps": st.integers(1, 6),
        "epochs": st.integers(1, 3),
        "hidden": st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
        "objective": st.sampled_from(list(ppo.OBJECTIVES)),
        "normalize_obs": st.booleans(),
        "scale_rewards": st.booleans(),
        "env": st.sampled_from(["CartPole-v1", "Pendulum-v1", "Diary-v0"]),
        "seed": st.integers(0, 2**32 - 1),
    }
    wide = {
        f.name: st.floats(f.metadata["low"], f.metadata["high"]) for f in NUMBERS if f.type is float
    }
    chosen = data.draw(st.fixed_dictionaries({**small, **wide}))
    rows = chosen["num_envs"] * chosen["num_steps"]
    chosen |= {"total_steps": 2 * rows, "minibatch_size": data.draw(st.integers(1, rows))}
    with np.errstate(all="ignore"):
        agent, _ = ppo.train(**chosen)
    assert agent.steps == 2 * rows
    assert all(np.isfinite(p).all() for p in agent.actor + agent.critic)


def test_a_hundred_task_seeds():
    """No seed crashes or yields NaN."""
    for seed in range(1000, 1100):
        agent, history = ppo.train(
            seed=seed, num_envs=2, num_steps=32, minibatch_size=32, total_steps=128
        )
        assert np.isfinite(agent.actor_adam.theta).all() and np.isfinite(history[-1]["kl"])


def test_a_run_prints_and_logs_what_it_does(tmp_path, capsys):
    """Settings, rows, curve, evaluation, no control characters; and a CSV row per iteration."""
    log = tmp_path / "run.csv"
    assert ppo.main([*TINY, "--log", str(log)]) == 0
    out = capsys.readouterr().out
    assert "--num-envs=2" in out and "--gamma" in out
    assert "mean return over" in out
    assert "greedy evaluation over 2 episodes: mean" in out
    assert "\r" not in out and "\x1b" not in out and "beta" not in out
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["16", "32"]
    assert float(rows[-1]["entropy"]) == pytest.approx(np.log(2), abs=0.1)
    assert ppo.main([*TINY, "--objective", "kl"]) == 0
    assert "beta" in capsys.readouterr().out


@pytest.mark.parametrize("env", ["CartPole-v1", *ppo.TUNED])
def test_printed_flags_repeat_the_settings(env):
    """What a run prints first makes the same settings, whatever the table holds by then."""
    settings = ppo.choose_settings(env=env, seed=7)
    _, chosen = ppo.parse(ppo.as_flags(settings).split())
    assert ppo.Settings(**chosen) == settings


def test_an_id_without_a_version_is_evaluated_too(capsys):
    """Gymnasium takes the latest version of "CartPole"; so does the evaluation."""
    assert ppo.main([*TINY, "--env", "CartPole"]) == 0
    assert "greedy evaluation over 2 episodes" in capsys.readouterr().out


def test_a_saved_policy_plays_and_goes_on(tmp_path, capsys):
    """A file holds all that learning needs: --play evaluates it, --load continues the schedule."""
    path = str(tmp_path / "policy.npz")
    assert ppo.main([*TINY, "--save", path]) == 0
    evaluation = capsys.readouterr().out.splitlines()[-1]
    assert ppo.main(["--play", path, "--episodes", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == evaluation
    assert "already trained" in refused(["--load", path], capsys)
    assert ppo.main(["--load", path, "--total-steps", "64", "--save", path, "--episodes", "1"]) == 0
    settings, state = ppo.load(path)
    rest = json.loads(str(state["rest"]))
    gradient_steps = 4 * 6 * 2  # iterations, epochs, minibatches of at most 8 out of 16 rows
    assert (settings.total_steps, rest["steps"], rest["adam_t"]) == (64, 64, gradient_steps)
    assert sorted(os.listdir(tmp_path)) == ["policy.npz"]


def test_the_curve_leaves_out_what_has_no_return_yet():
    """A continued run knows of earlier episodes before one of its own has ended."""
    history = [
        {"steps": 10 * i, "episodes": 5, "mean_return": value}
        for i, value in enumerate([float("nan"), 1.0, 3.0])
    ]
    lines = ppo.draw_curve(history, width=2, height=2).splitlines()
    assert lines[0].split() == ["3.0", "|", "█"] and lines[1].split() == ["1.0", "|▁█"]
    assert lines[2] == "mean return over 10 to 20 steps"
    assert ppo.draw_curve(history[:1]) == "no episode has ended yet"


def test_packing_is_exact():
    """An agent unpacked from another one's state continues bit for bit as that one does."""
    chosen = dict(env="Pendulum-v1", num_envs=2, num_steps=16, minibatch_size=8, normalize_obs=True)
    first, _ = ppo.train(**chosen, total_steps=64)
    second, _ = ppo.train(**chosen, total_steps=32, seed=5)
    ppo.unpack(second, ppo.pack(first))
    obs, actions = np.ones((16, 3), np.float32), np.ones((16, 1), np.float32)
    advantages = np.linspace(-1, 1, 16, dtype=np.float32)
    for agent in (first, second):
        ppo.update(agent, obs, actions, advantages, advantages, left=0.5)
    assert (first.actor_adam.theta == second.actor_adam.theta).all()
    assert (first.critic_adam.theta == second.critic_adam.theta).all()
    assert (first.observe(obs) == second.observe(obs)).all()


def test_stopping_and_going_on_learns_as_well(tmp_path, capsys):
    """CartPole in two halves, with a file between them, is solved like in one go."""
    path = str(tmp_path / "policy.npz")
    halves = ["--total-steps", "50000", "--episodes", "10", "--save", path]
    ppo.main(halves)
    ppo.main(["--load", path, "--total-steps", "100000", "--episodes", "10"])
    assert "mean 500.00" in capsys.readouterr().out.splitlines()[-1]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def hostile_files(folder):
    """Name and content of files that are no policies."""
    ppo.main([*TINY, "--save", str(folder / "good.npz")])
    good = (folder / "good.npz").read_bytes()
    yield "empty", b""
    yield "truncated", good[: len(good) // 2]
    yield "text", b"not a policy"
    yield "foreign", _npz(weights=np.ones(3))
    yield "pickle", pickle.dumps(Bomb())
    yield "pickled_array", _npz(rest=np.array([Bomb()], object))
    state = dict(np.load(folder / "good.npz"))
    yield "broken_settings", _npz(**{**state, "rest": np.array("{}")})
    rest = json.loads(str(state["rest"]))
    for key, value in ("steps", "a"), ("steps", -1), ("beta", 1e300), ("return_stats", [0, "a", 1]):
        yield f"wrong_{key}", _npz(**{**state, "rest": np.array(json.dumps(rest | {key: value}))})
    for key, value in ("seed", 1.5), ("epochs", True), ("hidden", [8192] * 30), ("lr", "fast"):
        wrong = rest | {"settings": rest["settings"] | {key: value}}
        yield f"wrong_{key}", _npz(**{**state, "rest": np.array(json.dumps(wrong))})
    yield "wrong_type", _npz(**{**state, "actor_0": np.ones((4, 64), complex)})
    yield "missing_array", _npz(**{k: v for k, v in state.items() if k != "actor_2"})
    yield "wrong_shape", _npz(**{**state, "critic_0": np.ones((3, 3))})
    yield "not_finite", _npz(**{**state, "actor_1": np.full(64, np.nan, np.float32)})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
    )
    oversized = io.BytesIO()
    with zipfile.ZipFile(oversized, "w") as archive:
        archive.writestr("actor_0.npy", header.getvalue())
    yield "oversized", oversized.getvalue()


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("flag", ["--play", "--load"])
def test_files_that_are_no_policies(flag, tmp_path, monkeypatch, capsys):
    """One line, status 2, and nothing in the file is executed."""
    monkeypatch.chdir(tmp_path)
    for name, content in hostile_files(tmp_path):
        (tmp_path / name).write_bytes(content)
        capsys.readouterr()
        assert name in refused([flag, name], capsys)
    assert not os.path.exists("exploded")


def test_policies_that_do_not_fit(tmp_path, capsys):
    """Another environment or other layers: the line says which two things do not fit."""
    path = str(tmp_path / "p.npz")
    ppo.main([*TINY, "--save", path])
    capsys.readouterr()
    line = refused(["--play", path, "--env", "Acrobot-v1"], capsys)
    assert "CartPole-v1" in line and "Acrobot-v1" in line
    line = refused(["--load", path, "--hidden", "32"], capsys)
    assert "(64, 64)" in line and "(32,)" in line


def start(*argv, **kwargs):
    return subprocess.Popen(
        [sys.executable, ppo.__file__, *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def test_ctrl_c_keeps_the_policy(tmp_path):
    """SIGINT: policy saved, curve and evaluation printed, exit status 130, no traceback."""
    path = str(tmp_path / "p.npz")
    process = start("--total-steps", "10000000", "--save", path)
    while "1,024" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""
    assert "mean return over" in out and "greedy evaluation over 5 episodes" in out
    assert ppo.main(["--play", path, "--episodes", "1"]) == 0


def test_a_closed_pipe_ends_quietly(tmp_path):
    """| head: the run ends with the policy saved, and nothing on standard error."""
    path = str(tmp_path / "p.npz")
    process = start("--total-steps", "200000", "--save", path)
    while "1,024" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 141
    assert ppo.main(["--play", path, "--episodes", "1"]) == 0


def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path):
    """A save that fails says so, the run goes on, and the file on disk stays what it was."""
    path = tmp_path / "p.npz"
    ppo.main([*TINY, "--save", str(path)])
    before = path.read_bytes()
    limit = 1000  # bytes that this process may write to one file
    process = start(
        "--load", str(path), "--save", str(path), "--total-steps", "320",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "cannot save" in err and "Traceback" not in err
    assert "320" in out
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["p.npz"]


def test_importing_has_no_side_effects():
    """Importing ppo prints nothing and only sets the documented thread default."""
    code = "import os; old = dict(os.environ); import ppo; print(os.environ.items() - old.items())"
    for own, expected in ({}, "{('OMP_NUM_THREADS', '1')}"), ({"OMP_NUM_THREADS": "2"}, "set()"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | own
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=os.path.dirname(ppo.__file__), env=environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (result.stdout.strip(), result.stderr) == (expected, "")
