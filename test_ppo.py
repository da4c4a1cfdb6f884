# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26", "pytest"]
# ///
"""The lecture's second half: what each formula claims, checked on ppo.py's own functions.

    python test_ppo.py -k eq9_

A  The lecture            Eq. 1 to 19, in worlds small enough to be exact
B  The gradients          by hand, against finite differences
C  The components         values, shapes, dtypes, extremes
D  The agent              seed, copies, statistics, runs that diverge
E  The ends of episodes   true ends, time limits and resets
F  The tasks              what --env accepts, and that it is learned
G  The command line       its output, its files, what it refuses
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))

import ppo  # before numpy, which reads the thread default that ppo sets

# isort: split
import ast
import contextlib
import copy
import inspect
import math
import os
import pickle
import re
import subprocess
import time
import tracemalloc
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from numpy.testing import assert_allclose, assert_array_equal

pytestmark = pytest.mark.filterwarnings("ignore:.*latest versioned", "ignore:.*out of date")

TWO = gym.spaces.Discrete(2)
THREE = gym.spaces.Discrete(3)
BOX = gym.spaces.Box(-1, 1, (2,))

# A  The lecture -----------------------------------------------------
# A world with three states and two actions. In three steps 648 paths are possible. All of them are
# written down here, side by side, so that an expectation over trajectories is a sum of 648 terms.

START = np.array([0.5, 0.3, 0.2])  # p(s_1)
NEXT = np.array([[7, 2, 1], [1, 1, 8], [3, 3, 4], [0, 9, 1], [2, 5, 3], [6, 1, 3]]) / 10
NEXT = NEXT.reshape(3, 2, 3)  # p(s'|s,a)
REWARD = np.array([[0.0, 1.0], [3.0, 2.0], [5.0, 8.0]])  # r(s,a)

PATHS = np.indices([3, 2, 3, 2, 3, 2, 3]).reshape(7, 648)  # s_1, a_1, s_2, a_2, s_3, a_3, s_4
STATES = PATHS[0::2]  # (4, 648)
ACTIONS = PATHS[1::2]  # (3, 648)
REWARDS = REWARD[STATES[:3], ACTIONS]  # (3, 648)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def softmax(logits):
    """π(a) = exp(logits_a) / Σ exp(logits), as the lecture writes it."""
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


def path_probs(logits):
    """Return p_θ(τ) of every path (648,), for a policy with logits (3, 2)."""
    # Eq. 1   p_θ(τ) = p(s_1) Π π_θ(a_t|s_t) p(s_t+1|s_t,a_t)
    pi = softmax(logits)[STATES[:3], ACTIONS]
    p_next = NEXT[STATES[:3], ACTIONS, STATES[1:]]
    return START[STATES[0]] * (pi * p_next).prod(axis=0)


def numerical_gradient(f, x, h=1e-5):
    """Return the gradient of the number f(x) by central differences: each x_i moves by ±h."""
    return np.array([f(x + step) - f(x - step) for step in h * np.eye(len(x))]) / (2 * h)


class Script:
    """Three environments that play this, whatever the actions. After each end comes a reset."""

    obs = [[1, 0.3, -2], [2, -1, 8], [6, 1, 0.5], [3, 7, -3], [5, 2, 1], [50, 0.5, -60], [4, 3, 2]]
    obs = np.array(obs, np.float32)[:, :, None]  # (T+1, N, 1)
    rewards = [[1, 10, 100], [2, 20, 0], [0, 30, 200], [3, 0, 300], [4, 40, 400], [5, 50, 0]]
    rewards = np.array(rewards)  # (T, N)
    # A true end, a time limit, both at once, or a reset
    ends = np.array([[*row] for row in ("..L", "T.r", "rL.", ".r.", "..B", "T.r")])  # (T, N)
    terminated = (ends == "T") | (ends == "B")
    truncated = (ends == "L") | (ends == "B")
    is_transition = ends != "r"

    def __init__(self, action_space=TWO, obs_dim=1):
        self.obs_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.single_action_space = action_space
        self.num_envs = 3
        self.t = 0

    def reset(self, seed):
        self.t = 0
        return self.obs[0], {}

    def step(self, actions):
        t = self.t
        self.t += 1
        return self.obs[t + 1], self.rewards[t], self.terminated[t], self.truncated[t], {}


def test_eq1_rows_belong_together():
    """Row t holds s_t, the action chosen from it, its reward and how it ended. s_t+1 follows."""
    played = ppo.rollout(Script(), lambda obs: 10 * obs, Script.obs[0], 6)
    script = [Script.obs, 10 * Script.obs[:6], Script.rewards, Script.terminated, Script.truncated]
    for returned, written in zip(played, script, strict=True):
        assert_array_equal(returned, written)
    observations, *_ = ppo.rollout(Script(), lambda obs: obs, Script.obs[0].astype(float), 6)
    assert observations.dtype == float  # large offsets would cost float32 its digits


# A policy in a single state: x holds three logits, or mean and log_std of a continuous action.

LOGITS = np.array([0.3, 0.1, -0.5])
POLICIES = {"Categorical": LOGITS, "Gaussian": np.array([0.4, -0.3])}
OBJECTIVES = {
    "pg": ppo.policy_gradient,
    "is": ppo.importance_sampling,
    "kl": partial(ppo.kl_penalty, beta=1),
    "clip": partial(ppo.clip, epsilon=0.2),
}
both_policies = pytest.mark.parametrize("x", POLICIES.values(), ids=POLICIES)


def policy_of(x, num_rows):
    """Return the policy with so many equal rows."""
    rows = np.tile(x, (num_rows, 1))
    return ppo.Categorical(rows) if len(x) == 3 else ppo.Gaussian(rows[:, :1], x[1:])


def all_actions(x):
    """Return weights and actions, so that weights @ f(actions) is E_a~π[f(a)]."""
    if len(x) == 3:
        return softmax(x), np.arange(3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)  # Gauss-Hermite quadrature
    return weights / np.sqrt(2 * np.pi), x[0] + np.exp(x[1]) * nodes[:, None]


def expected(objective, x, weights, actions, log_prob_old, advantages=None):
    """Return the expectation of an objective of §5, and its gradient by x."""
    log_prob, gradients = policy_of(x, len(actions)).log_prob(actions)
    loss, slope = objective(log_prob, log_prob_old, advantages)
    return weights @ loss, (weights * slope) @ np.hstack(gradients)


@both_policies
def test_eq3_log_derivative_trick_and_eglp_gradient(x):
    """∇p = p ∇log p, and the expectation of ∇log p is 0."""
    weights, actions = all_actions(x)
    _, gradients = policy_of(x, len(actions)).log_prob(actions)
    nabla_log_p = np.hstack(gradients)

    def p(x):
        log_p, _ = policy_of(x, 1).log_prob(actions[:1])
        return np.exp(log_p[0])

    # Eq. 3   ∇p = p ∇log p;   E_x~p[∇log p(x)] = 0
    assert_allclose(numerical_gradient(p, x), p(x) * nabla_log_p[0], rtol=1e-6, atol=1e-10)
    assert_allclose(weights @ nabla_log_p, 0, atol=1e-12)


def test_eq4_eq5_eq6_eq9_same_gradient_less_variance(rng):
    """Six weights of ∇log π give the same gradient, -∇J. Each has less variance than the last."""
    logits = rng.standard_normal((3, 2))
    probs = path_probs(logits)
    R = np.tile(REWARDS.sum(axis=0), (3, 1))
    R_t = REWARDS[::-1].cumsum(axis=0)[::-1]  # Eq. 5 with γ = 1: what is still to come
    # V_t(s) = Σ_a π(a|s) (r(s,a) + Σ_s' p(s'|s,a) V_t+1(s')), and nothing follows step 3.
    V = np.zeros((4, 3))
    for t in (2, 1, 0):
        V[t] = (softmax(logits) * (REWARD + NEXT @ V[t + 1])).sum(axis=1)
    V_t = np.array([V[t, STATES[t]] for t in range(4)])  # (4, 648)
    never = 0 * R_t
    delta_t = ppo.gae(REWARDS, V_t, never, never, gamma=1, lam=0)
    b_t = (R_t @ probs)[:, None]  # the means; b_t[0] is J
    weights = [R, R_t, R - b_t[0], R_t - b_t, R_t - V_t[:3], delta_t]

    def minus_J(x):
        return -path_probs(x.reshape(3, 2)) @ R[0]

    minus_grad_J = numerical_gradient(minus_J, logits.ravel())
    assert np.linalg.norm(minus_grad_J) == pytest.approx(1.8774, abs=5e-5)
    log_prob, [d_logits] = ppo.Categorical(logits[STATES[:3].ravel()]).log_prob(ACTIONS.ravel())
    variances = []
    for weight in weights:
        _, slope = ppo.policy_gradient(log_prob, None, weight.ravel())
        steps = (slope[:, None] * d_logits).reshape(3, 648, 2)
        # Eq. 4   each path's estimate: a step counts at the logits of its state
        estimates = np.einsum("tps,tpa->psa", np.eye(3)[STATES[:3]], steps).reshape(648, 6)
        mean = probs @ estimates
        assert_allclose(mean, minus_grad_J, atol=1e-8)
        variances.append(probs @ ((estimates - mean) ** 2).sum(axis=1))
    assert_allclose(variances, [127.4, 70.4, 31.2, 18.9, 11.8, 7.4], atol=0.05)


@pytest.mark.parametrize("lam", [0, 0.3, 0.95, 1])
def test_eq5_eq7_eq8_eq9_gae_averages_k_steps(lam, rng):
    """GAE averages the k-step advantages. λ = 0 gives the TD error, λ = 1 gives R_t - V(s_t)."""
    gamma = 0.9
    r = rng.standard_normal((6, 1))
    V = rng.standard_normal((7, 1))
    never = 0 * r
    deltas = ppo.gae(r, V, never, never, gamma, lam=0)
    # Eq. 7   A = Q - V with Q(s_t,a_t) = r_t + γ V(s_t+1)
    assert_allclose(deltas, r + gamma * V[1:] - V[:-1])
    k_steps = []
    for k in range(1, 7):
        # Eq. 8   A^(k)_t = Σ_l<k γ^l δ_t+l = Σ_l<k γ^l r_t+l + γ^k V(s_t+k) - V(s_t)
        powers = gamma ** np.arange(k)
        k_steps.append(powers @ r[:k] + gamma**k * V[k] - V[0])
        assert_allclose(powers @ deltas[:k], k_steps[-1])
    # Eq. 9   Â_t = (1-λ) Σ_k λ^(k-1) A^(k)_t, in which the longest has all the weight that is left
    weights = (1 - lam) * lam ** np.arange(6.0)
    weights[5] = lam**5
    advantages = ppo.gae(r, V, never, never, gamma, lam)
    assert_allclose(advantages[0], weights @ k_steps)


def test_eq9_every_pattern_of_endings(rng):
    """Â_t = Σ (γλ)^l δ_t+l up to the episode's end, and V = 0 after true ends: all 256 cases."""
    rewards = rng.standard_normal((4, 256))
    values = rng.standard_normal((5, 256))
    flags = np.indices([2] * 8).reshape(2, 4, 256)
    terminated, truncated = flags
    sums = np.zeros((4, 256))
    for t, n in np.ndindex(4, 256):
        for i in range(t, 4):
            next_value = 0 if terminated[i, n] else values[i + 1, n]
            delta = rewards[i, n] + 0.9 * next_value - values[i, n]
            sums[t, n] += (0.9 * 0.8) ** (i - t) * delta
            if terminated[i, n] or truncated[i, n]:
                break
    for dtype in (bool, int):
        advantages = ppo.gae(rewards, values, *flags.astype(dtype), gamma=0.9, lam=0.8)
        assert_allclose(advantages, sums, atol=1e-14)
    r = np.ones((2, 1), int)  # Â of integers is not rounded
    assert_array_equal(ppo.gae(r, np.ones((3, 1), int), 0 * r, 0 * r, 1, 0.5), [[1.5], [1]])


def test_eq2_sums_so_far_mirror_gae(rng):
    """They are what gae adds up with V = 0, λ = 1 if time runs backwards. Two rollouts are as one.

    All 16 patterns of endings.
    """
    rewards = rng.standard_normal((4, 16))
    ended = np.indices([2] * 4).reshape(4, 16)
    begins = np.vstack([np.ones(16), ended[:-1]])
    mirrored = ppo.gae(rewards[::-1], np.zeros((5, 16)), begins[::-1], begins[::-1], 0.9, 1)
    early, between = ppo.sums_so_far(rewards[:3], ended[:3], 0.9, np.zeros(16))
    late, after = ppo.sums_so_far(rewards[3:], ended[3:], 0.9, between)
    assert_allclose([*early, *late], mirrored[::-1])
    assert_allclose(after, (1 - ended[3]) * mirrored[0])


def test_eq10_eq12_data_serve_one_gradient_step():
    """On data of θ_k every objective has the gradient -∇J at θ_k. After a step only Eq. 12 has."""
    rewards = np.array([1.0, -2.0, 3.0])
    pi_old = softmax(LOGITS)
    data = [pi_old, np.arange(3), np.log(pi_old), rewards]

    def minus_J(logits):
        return -softmax(logits) @ rewards

    for objective in OBJECTIVES.values():
        _, gradient = expected(objective, LOGITS, *data)
        assert_allclose(gradient, numerical_gradient(minus_J, LOGITS), atol=1e-9)
    new = LOGITS + [0.5, -0.4, 0.1]
    loss, gradient = expected(ppo.importance_sampling, new, *data)
    assert_allclose(loss, minus_J(new))
    assert_allclose(gradient, numerical_gradient(minus_J, new), atol=1e-9)
    _, gradient = expected(ppo.policy_gradient, new, *data)
    assert np.linalg.norm(gradient - numerical_gradient(minus_J, new)) > 0.1


def test_eq10_eq12_eq15_eq16_reuse(rng):
    """64 samples reused 200 times: pg and is end with one action. kl and clip stay stochastic, but
    the clip does not guarantee the ratio, because it only removes what drives it."""
    actions = ppo.Categorical(np.zeros((64, 3))).sample(rng)
    rewards = np.array([0.5, 0.8, 0.2])[actions] + 0.1 * rng.standard_normal(64)
    advantages = (rewards - rewards.mean()) / rewards.std()
    data = [np.full(64, 1 / 64), actions, np.full(64, np.log(1 / 3)), advantages]
    ends = []
    for objective in OBJECTIVES.values():
        logits = np.zeros(3)
        for _ in range(200):
            _, gradient = expected(objective, logits, *data)
            logits -= 0.5 * gradient
        ends.append(softmax(logits))
    pi = [[0.00, 1.00, 0.00], [0.00, 0.99, 0.00], [0.22, 0.64, 0.14], [0.40, 0.41, 0.19]]
    assert_allclose(ends, pi, atol=0.005)
    ratio = ends[3] / (1 / 3)
    assert ratio.min() == pytest.approx(0.56, abs=0.01)  # far below 1 - ε = 0.8


def test_eq11_importance_sampling():
    """E_q[f p/q] = E_p[f] for every q, but the variance grows as q leaves p."""
    p = np.array([0.2, 0.3, 0.5])
    f = np.array([1.0, 3.0, 2.0])
    mean = p @ f
    variances = []
    for q in ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], [0.68, 0.3, 0.02]):
        loss, _ = ppo.importance_sampling(np.log(p), np.log(q), f)
        assert_allclose(q @ -loss, mean)
        variances.append(q @ (-loss - mean) ** 2)
        # Eq. 11   Var_q[f p/q] = E_p[f² p/q] - E_p[f]²
        assert_allclose(variances[-1], p @ (f**2 * p / q) - mean**2)
    assert variances == sorted(variances)


@both_policies
def test_eq13_kl_and_its_gradient(x):
    """Over actions of π_θ_k, rows and slopes average to KL(π_θ_k‖π_θ) and its gradient."""
    weights, actions = all_actions(x)
    log_prob_old, _ = policy_of(x, len(actions)).log_prob(actions)

    def exact_kl(x):
        # Eq. 13   KL = E_a~π_θ_k[log π_θ_k - log π_θ]
        log_prob, _ = policy_of(x, len(actions)).log_prob(actions)
        return weights @ (log_prob_old - log_prob)

    new = 1.5 * x
    kl, gradient = expected(ppo.kl_divergence, new, weights, actions, log_prob_old)
    assert_allclose(kl, exact_kl(new), rtol=1e-9)
    assert_allclose(gradient, numerical_gradient(exact_kl, new), rtol=1e-6, atol=1e-9)
    # A small difference ±d gives d²/2, in float32 too.
    kl, _ = ppo.kl_divergence(np.float32([1e-3, -1e-3]), np.float32([0, 0]))
    assert_allclose(kl, 5e-7, rtol=0.01)


@both_policies
def test_eq14_fisher_product_from_gradients(x):
    """How ∇KL changes in the direction v is F v. Damping adds to it."""
    weights, actions = all_actions(x)
    log_prob, gradients = policy_of(x, len(actions)).log_prob(actions)
    # Eq. 14   F = E[∇log π ∇log πᵀ]
    nabla_log_pi = np.hstack(gradients)
    F = (weights * nabla_log_pi.T) @ nabla_log_pi

    def kl(x):
        return expected(ppo.kl_divergence, x, weights, actions, log_prob)

    for length in (1e-3, 1, 1e3):
        v = length * x
        F_v = ppo.fisher_product(kl, x, v, damping=0)
        assert_allclose(F_v, F @ v, rtol=1e-6, atol=1e-6 * length)
        assert_allclose(ppo.fisher_product(kl, x, v), F_v + 0.1 * v)
    # In float32 a shorter step h would lose digits, and a longer one would miss the derivative.
    single = x.astype(np.float32)
    F_x = ppo.fisher_product(kl, single, single, damping=0)
    assert_allclose(F_x, F @ x, atol=3e-4 * abs(F @ x).max())


def test_eq14_conjugate_gradients(rng):
    """Five iterations solve F x = g for five unknowns."""
    A = rng.standard_normal((5, 5))
    F = A @ A.T + np.eye(5)
    g = rng.standard_normal(5)
    x = ppo.conjugate_gradients(F.dot, g, iterations=5)
    assert_allclose(x, np.linalg.solve(F, g), rtol=1e-8)
    assert_array_equal(ppo.conjugate_gradients(np.eye(5).dot, g), g)  # one is enough


STEPS = [  # surrogate of x + y, what is added to KL, share of the step that is taken
    (lambda z: -z, lambda x: 0, 1),
    (lambda z: -z, lambda x: x**4, 1 / 2),  # the full step is too far
    (lambda z: 4 * z * z - z, lambda x: 0, 1 / 8),  # the gain is short
    (lambda z: z, lambda x: 0, 0),  # there is no gain
    (lambda z: -z, lambda x: x > 1 / 400, 1 / 512),  # nine halvings are tried
    (lambda z: -z, lambda x: x > 1 / 600, 0),  # and not ten
]


@pytest.mark.parametrize(("loss", "more_kl", "share"), STEPS)
def test_eq14_trust_region_step(loss, more_kl, share):
    """Of all steps with ½ΔᵀFΔ = δ the best is Δ = √(2δ / xᵀFx) x, where F x = g.

    It is halved until KL ≤ δ and the surrogate falls. If ten tries do not help, θ stays.
    """
    g = np.array([1, 1])

    def surrogate(theta):
        return loss(theta.sum()), -g

    def kl(theta):
        x, y = theta
        return (x * x + 4 * y * y) / 2.0001 + more_kl(x), np.array([x, 4 * y])

    for F, damping in [(np.array([1, 4]), dict(damping=0)), (np.array([1.1, 4.1]), dict())]:
        x = g / F
        theta = np.zeros(2)
        ppo.trust_region_step(theta, surrogate, kl, 5 / 8, **damping)
        assert_allclose(theta, share * np.sqrt(2 * 5 / 8 / (x @ g)) * x, rtol=1e-3)


def test_eq15_kl_penalty_and_adaptive_beta(rng):
    """PPO1 adds β KL. β doubles above 1.5 KL targets, halves below 2/3, and has bounds."""
    rows = rng.standard_normal((3, 8))  # log π_θ, log π_θ_k, Â
    surrogate, surrogate_slope = ppo.importance_sampling(*rows)
    kl, kl_slope = ppo.kl_divergence(*rows)
    # Eq. 15   loss = -(ρ Â - β KL)
    loss, slope = ppo.kl_penalty(*rows, beta=0.7)
    assert_allclose(loss, surrogate + 0.7 * kl)
    assert_allclose(slope, surrogate_slope + 0.7 * kl_slope)
    cases = [(3, 0.0151, 6), (3, 0.015, 3), (3, 0.01 / 1.5, 3), (3, 0.0066, 1.5)]
    for beta, kl, next_beta in [*cases, (1e4, 1, 1e4), (1e-4, 0, 1e-4)]:
        assert ppo.adapt_beta(beta, kl, target=0.01) == next_beta


def test_eq16_clip_table():
    """The lecture's six cases, ε = 0.2: nothing to gain beyond 1 ± ε, but always a way back."""
    # Eq. 16   loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)
    log_ratio = np.log([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, slope = ppo.clip(log_ratio, np.zeros(6), advantages, epsilon=0.2)
    assert_allclose(loss, [-1.0, -2.0, -2.4, 1.6, 2.0, 3.0])
    assert_allclose(slope, [-1.0, -2.0, 0, 0, 2.0, 3.0])


def test_eq16_every_row_inside_counts(rng):
    """No row inside 1 ± ε has slope 0, though a numpy ε is wider than the rows of float32."""
    log_ratio = rng.uniform(-0.2, 0.18, 1000).astype(np.float32)
    advantages = rng.standard_normal(1000).astype(np.float32)
    _, slope = ppo.clip(log_ratio, np.zeros_like(log_ratio), advantages, np.float64(0.2))
    assert_array_equal(slope, -np.exp(log_ratio) * advantages)


@both_policies
def test_eq17_entropy_and_samples(x, rng):
    """H is what -log π is on average. Draws have the first two moments of the policy."""
    weights, actions = all_actions(x)
    log_prob, _ = policy_of(x, len(actions)).log_prob(actions)
    entropy, _ = policy_of(x, 1).entropy()
    # Eq. 17   H = -E_a~π[log π(a|s)]
    assert_allclose(entropy, -weights @ log_prob)
    draws = policy_of(x, 100_000).sample(rng)
    assert draws.mean() == pytest.approx(weights @ actions, abs=0.01)
    assert (draws**2).mean() == pytest.approx(weights @ actions**2, abs=0.02)


def an_agent(action_space=TWO, obs_dim=1, **chosen):
    """Return an agent that plays the script in two rollouts of three steps."""
    chosen = dict(hidden=(4,), num_steps=3, total_steps=18) | chosen
    return ppo.Agent(Script(action_space, obs_dim), ppo.Settings(**chosen))


def watch(monkeypatch, name):
    """Note arguments, by name, and result of every later call of this function of ppo."""
    function = getattr(ppo, name)
    signature = inspect.signature(function)
    calls = []

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append({**signature.bind(*args, **kwargs).arguments, "result": result})
        return result

    monkeypatch.setattr(ppo, name, watched)
    return calls


@pytest.fixture
def played(monkeypatch):
    """learn plays 3 and 2 steps of the script. V(s) = 2s + 1, the action is s > 0, γ = ½."""
    agent = an_agent(hidden=(), gamma=0.5, lam=0.8, lr=1e-9, total_steps=14)
    agent.phi[:] = [2, 1]
    agent.theta[:] = [0, 1e4, 0, 0]
    judged = watch(monkeypatch, "gae")
    learned = watch(monkeypatch, "update")
    return list(ppo.learn(agent, Script())), judged, learned


def test_eq2_mean_return_of_the_episodes(played):
    """R(τ) adds up an episode's rewards, over rollouts too. Each episode counts once."""
    returns = [100, 1 + 2, 10 + 20 + 30]
    [first, second], _, _ = played
    assert [first["steps"], first["episodes"]] == [9, 3]
    assert first["mean_return"] == pytest.approx(np.mean(returns))
    assert [second["steps"], second["episodes"]] == [15, 4]
    assert second["mean_return"] == pytest.approx(np.mean([*returns, 200 + 300 + 400]))


def test_eq18_eq19_learn_judges_and_learns(played):
    """gae gets scaled rewards, and the value of every state, the last ones too. update gets the
    rows that are no resets, with Â from gae and R̂ = Â + V."""
    _, judged, learned = played
    # Rewards are divided by the deviation of the discounted sums so far. Resets do not count.
    sums = [1, 2.5, 10, 25, 42.5, 100, 200]
    more = [3, 5.5, 40, 300 + 200 / 2, 400 + 300 / 2 + 200 / 4]
    deviations = [np.std(sums), np.std(sums + more)]
    # Inputs are the observations, then normalised as what was seen first, and clipped.
    seen = Script.obs[:3][Script.is_transition[:3]]
    inputs = [Script.obs[:4], ((Script.obs[3:6] - seen.mean()) / seen.std()).clip(-10, 10)]
    for i, rows in enumerate([slice(0, 3), slice(3, 5)]):
        call = judged[i]
        V = 2 * inputs[i][:, :, 0] + 1
        assert_allclose(call["rewards"], Script.rewards[rows] / deviations[i], rtol=1e-4)
        assert_allclose(call["values"], V, rtol=1e-4)
        assert_array_equal(call["terminated"], Script.terminated[rows])
        assert_array_equal(call["truncated"], Script.truncated[rows])
        assert [call["gamma"], call["lam"]] == [0.5, 0.8]
        advantages = call["result"]
        call = learned[i]
        is_transition = Script.is_transition[rows]
        x = inputs[i][:-1][is_transition]
        assert_allclose(call["inputs"], x, rtol=1e-4)
        assert_array_equal(call["actions"], x[:, 0] > 0)
        assert_array_equal(call["advantages"], advantages[is_transition])
        # Eq. 18   R̂ = Â + V_φ_k(s)
        assert_allclose(call["returns"], (advantages + V[:-1])[is_transition], rtol=1e-4)
        assert call["remaining"] == [1, 5 / 14][i]


both_spaces = pytest.mark.parametrize("space", [TWO, BOX], ids=POLICIES)


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_eq14_eq19_update(space, objective, rng):
    """Three epochs of one minibatch, written out for a twin, with 0.2 of the run still to come."""
    chosen = dict(epochs=3, lr=0.1, actor_lr=0.05, max_grad_norm=0.01, ent_coef=0.3, clip=0.1)
    agent = an_agent(space, objective=objective, kl_target=1e-3, **chosen)
    agent.beta = 0.7
    twin = pickle.loads(pickle.dumps(copy.deepcopy(agent)))
    inputs = rng.standard_normal((12, 1), np.float32)
    advantages, returns = rng.normal(5, [[2], [9]], (2, 12)).astype(np.float32)
    policy, _ = ppo.policy_forward(twin.actor, inputs)
    actions = policy.sample(rng)
    log_prob_old, _ = policy.log_prob(actions)
    record = ppo.update(agent, inputs, actions, advantages, returns, remaining=0.2)

    # Eq. 6   the mean is a baseline
    normalized = (advantages - advantages.mean()) / advantages.std()
    own = {"kl": partial(ppo.kl_penalty, beta=0.7), "clip": partial(ppo.clip, epsilon=0.1)}
    loss = (OBJECTIVES | own).get(objective, ppo.importance_sampling)

    def actor_loss(theta, loss=loss, ent_coef=0.3 * 0.2):
        actor = ppo.unflatten(theta, twin.actor_shapes)
        return ppo.actor_loss(actor, loss, ent_coef, inputs, actions, log_prob_old, normalized)

    if objective == "trpo":  # Eq. 14   With the entropy bonus KL would not be a distance.
        kl = partial(actor_loss, loss=ppo.kl_divergence, ent_coef=0)
        ppo.trust_region_step(twin.theta, actor_loss, kl, delta=1e-3)
    else:
        for _ in range(1 if objective == "pg" else 3):  # Eq. 10
            _, gradient = actor_loss(twin.theta)
            twin.actor_adam.step(ppo.clip_by_global_norm(gradient, 0.01), lr=0.05 * 0.2)
    for _ in range(3):
        _, gradient = ppo.critic_loss(twin.critic, inputs, returns)
        twin.critic_adam.step(ppo.clip_by_global_norm(gradient, 0.01), lr=0.1 * 0.2)
    assert_allclose(agent.theta, twin.theta, rtol=1e-4, atol=1e-5)
    assert_allclose(agent.phi, twin.phi, rtol=1e-4, atol=1e-5)

    policy, _ = ppo.policy_forward(agent.actor, inputs)
    log_prob, _ = policy.log_prob(actions)
    entropy, _ = policy.entropy()
    ratio = np.exp(log_prob - log_prob_old)
    report = {
        "kl": np.mean(ratio - 1 - np.log(ratio)),
        "clipped": np.mean(abs(ratio - 1) > 0.1),
        "entropy": entropy.mean(),
        "explained": 1 - np.var(advantages) / np.var(returns),
    }
    assert record == pytest.approx(report, rel=1e-2)
    assert agent.beta == ppo.adapt_beta(0.7, record["kl"], 1e-3)


# B  The gradients ---------------------------------------------------


def minibatch(shapes):
    """Return θ and data for an actor of these shapes. Each of four ratios meets each of four Â."""
    rng = np.random.default_rng(0)
    theta = 0.5 * rng.standard_normal(sum(math.prod(shape) for shape in shapes))
    inputs = rng.standard_normal((16, 3))
    policy, _ = ppo.policy_forward(ppo.unflatten(theta, shapes), inputs)
    actions = policy.sample(rng)
    log_prob, _ = policy.log_prob(actions)
    log_prob_old = log_prob - np.log(np.tile([0.5, 0.95, 1.05, 1.5], 4))
    return theta, [inputs, actions, log_prob_old, np.repeat([2.0, 0.3, -0.5, -1.0], 4)]


ACTORS = [[(3, 4), (4,), (4, 3), (3,)], [(3, 4), (4,), (4, 2), (2,), (2,)]]
both_actors = pytest.mark.parametrize("shapes", ACTORS, ids=POLICIES)


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), ppo.kl_divergence])
@both_actors
def test_eq17_actor_loss_and_its_gradient(shapes, objective, ent_coef):
    """Objective, entropy, policy and network together, in every case of the clip table."""
    theta, data = minibatch(shapes)
    inputs, actions, log_prob_old, advantages = data

    def loss(theta):
        policy, _ = ppo.policy_forward(ppo.unflatten(theta, shapes), inputs)
        log_prob, _ = policy.log_prob(actions)
        rows, slope = objective(log_prob, log_prob_old, advantages)
        assert slope is not rows
        entropy, _ = policy.entropy()
        return (rows - ent_coef * entropy).mean()  # Eq. 17

    mean, gradient = ppo.actor_loss(ppo.unflatten(theta, shapes), objective, ent_coef, *data)
    assert_allclose(mean, loss(theta))
    assert_allclose(gradient, numerical_gradient(loss, theta), rtol=1e-6, atol=1e-9)


def test_eq18_critic_loss_and_its_gradient(rng):
    """The loss is the mean of (V - R̂)². Its gradient passes three layers with biases."""
    shapes = [(3, 5), (5,), (5, 4), (4,), (4, 1), (1,)]
    phi = rng.standard_normal(49)
    inputs = rng.standard_normal((8, 3))
    returns = rng.standard_normal(8)

    def loss(phi):
        values, _ = ppo.mlp_forward(ppo.unflatten(phi, shapes), inputs)
        return ((values[:, 0] - returns) ** 2).mean()  # Eq. 18

    mean, gradient = ppo.critic_loss(ppo.unflatten(phi, shapes), inputs, returns)
    assert_allclose(mean, loss(phi))
    assert_allclose(gradient, numerical_gradient(loss, phi), rtol=1e-6, atol=1e-9)


# C  The components --------------------------------------------------


def test_init_mlp(rng):
    """W is orthogonal, of length √2 or, at last, 1. No sign is preferred. b is 0."""
    params = ppo.init_mlp([3, 8, 5, 2], rng)
    for W, b, squared_length in zip(params[0::2], params[1::2], [2, 2, 1], strict=True):
        product = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
        assert_allclose(product, squared_length * np.eye(len(product)), atol=1e-6)
        assert not b.any()
    positive = np.mean([ppo.init_mlp([3, 2], rng)[0] > 0 for _ in range(1000)], axis=0)
    assert_allclose(positive, 0.5, atol=0.07)


def test_eq17_log_prob_and_entropy_of_known_policies():
    """They are right even where exp would overflow. A log_std (B, d) is one for each state."""
    policy = ppo.Categorical(np.array([[1e4, 1e4, -1e4], np.log([1, 2, 5])]))
    log_prob, _ = policy.log_prob(np.array([1, 2]))
    assert_allclose(log_prob, np.log([1 / 2, 5 / 8]))
    assert policy.mode()[1] == 2
    # log N(1 | 0, 2²) = -½ (1/2)² - log 2 - ½ log 2π
    log_prob, _ = ppo.Gaussian(np.zeros((1, 1)), np.log([2.0])).log_prob(np.ones((1, 1)))
    assert_allclose(log_prob, -1 / 8 - np.log(2) - 0.9189385332046727)
    entropy, _ = ppo.Gaussian(np.zeros((2, 2)), np.log([[1, 1], [2, 3]])).entropy()
    assert_allclose(entropy, [2.837877, 2.837877 + np.log(6)], rtol=1e-6)  # log 2πe = 2.837877


def test_clip_by_global_norm():
    """Longer gradients are scaled down, shorter ones stay. What overflows does not vanish."""
    g = np.array([3.0, 4.0])
    assert_allclose(ppo.clip_by_global_norm(g, 1.0), [0.6, 0.8])
    assert_array_equal(ppo.clip_by_global_norm(g, 5.0), g)
    assert np.isnan(ppo.clip_by_global_norm(np.nan * g, 5.0)).all()
    with np.errstate(over="ignore"):
        huge = ppo.clip_by_global_norm(np.float32(1e20 * g), 1.0)
    assert np.isnan(huge).all() or np.allclose(huge, [0.6, 0.8])


def test_adam():
    """Three steps, as the paper writes them, for gradients of ordinary size and tiny ones."""
    theta = np.array([7.0, 7.0])
    wanted = theta.copy()
    adam = ppo.Adam(theta)
    m = v = 0
    for t in (1, 2, 3):
        g = np.array([1, 1e-5]) * np.cos(t)
        adam.step(g, lr=0.1)
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        m_hat = m / (1 - 0.9**t)
        v_hat = v / (1 - 0.999**t)
        wanted -= 0.1 * m_hat / (v_hat**0.5 + 1e-5)
        assert_allclose(theta, wanted, rtol=1e-12)


def test_shapes_that_would_broadcast_are_refused():
    """A column (B, 1) in place of (B,) would give (B, B) numbers, and no error."""
    r = np.zeros((4, 2))
    V = np.zeros((5, 2))
    column = np.zeros((16, 1))
    theta, [inputs, actions, log_prob_old, _] = minibatch(ACTORS[0])
    loss = partial(ppo.actor_loss, ppo.unflatten(theta, ACTORS[0]), ppo.policy_gradient, 0)
    wrong = [
        lambda: ppo.gae(r, V[:4], r, r, 1, 1),
        lambda: ppo.gae(r, V, r[:1], r, 1, 1),
        lambda: ppo.gae(r, V, r, r[:, :1], 1, 1),
        lambda: ppo.gae(r[:, 0], V[:, 0], r[:, 0], r[:, 0], 1, 1),
        lambda: ppo.Gaussian(column, np.zeros(1)).log_prob(np.zeros(16)),
        lambda: ppo.Categorical(np.zeros((16, 3))).log_prob(column),
        lambda: ppo.Categorical(np.zeros((2, 3))).log_prob(np.array([0, -1])),  # the last action
        lambda: ppo.critic_loss([np.ones((1, 1)), np.zeros(1)], column, column),
        lambda: loss(inputs, actions, log_prob_old, column),
        lambda: loss(inputs, actions, log_prob_old[:1], log_prob_old),
        lambda: ppo.Adam(np.zeros(2)).step(np.ones(1), lr=0.1),
        lambda: an_agent(obs_dim=3).policy(np.zeros((5, 1))),
        lambda: an_agent(obs_dim=3).act(np.zeros((1, 3))),
    ]
    for call in wrong:
        # ppo.py says what must be. Where only ppo.py itself calls, it asserts.
        with pytest.raises((ValueError, AssertionError), match=r"\(T, 1\)|must be \(|^$"):
            call()


def test_a_rollout_must_be_finite():
    """Observations are checked, the first and the last too, and rewards."""
    for name, t, number in [("obs", 0, np.nan), ("obs", 6, np.inf), ("rewards", 5, -np.inf)]:
        envs = Script()
        setattr(envs, name, getattr(Script, name).astype(float))
        getattr(envs, name)[t, 1] = number
        with pytest.raises(FloatingPointError, match="not finite"):
            ppo.rollout(envs, lambda obs: obs, envs.obs[0], 6)


SECTIONS = Path(ppo.__file__).read_text(encoding="utf-8").split("\n# §")
DEFINITIONS = ast.parse("\n# ".join(["", *SECTIONS[1:8], SECTIONS[9]])).body  # §1-§7 and §9
COEFFICIENTS = ["lr", "gamma", "lam", "clip", "kl_target", "ent_coef", "max_grad_norm"]


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_each_definition_runs_alone_and_keeps_float32(space, objective, monkeypatch):
    """Each definition of §1-§7 and §9, pasted with those that it names, carries learn in float32,
    with np.float64 as coefficients. Nothing overflows, for constant, tiny and huge rewards."""
    pasted = {"np": np, "math": math}
    watched = []
    for node in DEFINITIONS:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        namespace = {name: pasted[name] for name in names if name in pasted}
        exec(ast.unparse(node), namespace)
        monkeypatch.setattr(ppo, node.name, namespace[node.name])
        if isinstance(node, ast.FunctionDef):
            watched.append(watch(monkeypatch, node.name))
        pasted[node.name] = getattr(ppo, node.name)
    chosen = dict.fromkeys(COEFFICIENTS, np.float64(0.1)) | dict(objective=objective)
    for scale in (0, 1e-6, 1e6):
        hidden = (4,) if scale > 0 else ()  # a table, in which all values are 0
        agent = an_agent(space, hidden=hidden, minibatch_size=1, **chosen)
        agent.beta = np.float64(1)
        envs = Script()
        envs.rewards = scale * Script.rewards
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            list(ppo.learn(agent, envs))
    results = [call["result"] for calls in watched for call in calls]
    for result in results:
        for x in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(x, np.ndarray) or x.dtype in (np.float32, bool, int)


# D  The agent -------------------------------------------------------


def test_a_new_agent():
    """Its actions are almost equally likely, log_std is as chosen, a table of values is 0."""
    agent = an_agent(BOX, log_std_init=-1.5)
    W = agent.actor[2]
    assert_allclose(W.T @ W, 0.01**2 * np.eye(2), atol=1e-8)
    assert_array_equal(agent.actor[4], [-1.5, -1.5])
    assert_allclose(np.linalg.norm(agent.critic[2]), 1, rtol=1e-6)
    assert_array_equal(an_agent(hidden=()).phi, [0, 0])
    assert agent.beta == 1


def test_fit_shows_every_row_once_an_epoch():
    """Minibatches have equal sizes, at most B. Each epoch has another order."""
    seen = []
    agent = an_agent(epochs=3, minibatch_size=4)
    adam = ppo.Adam(np.zeros(2))
    ppo.fit(agent, adam, lambda rows: (seen.append(rows), np.zeros(2)), 10, lr=0.1)
    assert [len(rows) for rows in seen] == [4, 3, 3] * 3
    epochs = np.concatenate(seen).reshape(3, 10)
    assert_array_equal(np.sort(epochs), [np.arange(10)] * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_statistics_of_observations(rng):
    """After normalize_steps steps a component keeps them, unless more than 1 % of the rows leave
    ten deviations. Then it gets those of all that was seen."""
    early = rng.normal([1e8, -30], [2, 1], (1000, 2))  # float32 has steps of 8 near 1e8
    late = early.copy()
    far = early.mean(axis=0) - 10.5 * early.std(axis=0)
    late[:11, 0] = far[0]
    late[:10, 1] = far[1]
    seen = np.vstack([early, late])
    agent = an_agent(obs_dim=2, normalize_steps=1000)
    ppo.observe(agent, early)
    assert_allclose([agent.obs_mean, agent.obs_std], [early.mean(axis=0), early.std(axis=0)])
    ppo.observe(agent, late)
    assert_allclose(agent.obs_mean, [seen[:, 0].mean(), early[:, 1].mean()])
    assert_allclose(agent.obs_std, [seen[:, 0].std(), early[:, 1].std()])
    assert_array_equal(agent.normalize(np.array([[1e9, -1e9]])), [[10, -10]])
    z = (early - agent.obs_mean) / agent.obs_std
    assert_allclose(agent.normalize(early), z, atol=1e-6)
    agent = an_agent(obs_dim=2, normalize_steps=0)  # nothing changes
    ppo.observe(agent, late)
    assert_array_equal(agent.normalize(np.array([[99, -99]])), [[99, -99]])


def test_a_reward_beyond_ten_deviations_stays():
    """Of 400 rewards a single one that is not 0 is 20 deviations large."""
    agent = an_agent(gamma=0)
    rewards = np.zeros((400, 1))
    rewards[7] = 3
    ppo.scale_rewards(agent, rewards, rewards > 9, rewards < 9, np.zeros(1))
    assert rewards.max() == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("name", ["theta", "phi", "obs_std"])
def test_a_run_that_diverges_stops(name):
    """A parameter or statistic that is not finite ends the run."""
    agent = an_agent()
    learning = ppo.learn(agent, Script())
    next(learning)
    getattr(agent, name)[0] = np.inf
    with pytest.raises(FloatingPointError, match="diverged: try a smaller lr"):
        next(learning)


SIZES = ["lr", "clip", "kl_target", "max_grad_norm"]
LEAST = dict.fromkeys(SIZES, 1e-300) | dict(gamma=0, lam=0, log_std_init=-100, hidden=())
MOST = dict.fromkeys([*SIZES, "ent_coef"], 1e12) | dict(gamma=1, lam=1, log_std_init=100)
HASTY = dict(lr=1, ent_coef=1e3, epochs=20, minibatch_size=3, log_std_init=-40)


@pytest.mark.parametrize("chosen", [LEAST, MOST, HASTY], ids=["least", "most", "hasty"])
def test_extreme_settings_keep_the_parameters_finite(chosen):
    """Two iterations end with finite parameters, or with an error."""
    for env in ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"]:
        for objective in ["pg", "is", "trpo", "kl", "clip"]:
            agent = ppo.new_agent(env, objective=objective, num_steps=6, total_steps=24, **chosen)
            with contextlib.suppress(FloatingPointError), np.errstate(all="ignore"):
                list(ppo.learn(agent, ppo.make_envs(env, 2)))
                assert np.isfinite([*agent.theta, *agent.phi]).all()


# E  The ends of episodes --------------------------------------------


class Toy(gym.Env):
    """Random observations of any space, and reward 1 for every legal action.

    Its episodes end truly after a number of steps in ends, or at a time limit after one in limits.
    Gymnasium cannot collect its info.
    """

    metadata = {"render_modes": ["human"], "render_fps": 50}
    ends = ()
    limits = (10,)

    def __init__(self, spaces, render_mode=None):
        self.observation_space, self.action_space = spaces
        self.render_mode = render_mode
        self.episode = 0
        self.number = Toy.num_open
        Toy.num_open += 1
        Toy.most_open = max(Toy.most_open, Toy.num_open)

    def close(self):
        Toy.num_open -= 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            Toy.seeds.append(seed)
        self.episode += 1
        self.t = 0
        self.length = self.choose_length()
        self.obs = self.observation_space.sample()
        return self.obs, {"it": np.zeros(self.number)}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), action
        Toy.transitions.append((self.obs, action))
        reward = self.reward(action)
        self.t += 1
        self.obs = self.observation_space.sample()
        is_over = self.t == self.length
        terminated = is_over and self.length in self.ends
        truncated = is_over and self.length in self.limits
        return self.obs, reward, terminated, truncated, {"it": np.zeros(self.number)}

    def choose_length(self):
        return self.np_random.choice([*self.ends, *self.limits])

    def reward(self, action):
        return 1.0


def toy(obs_space=BOX, action_space=THREE, name="Toy-v0", **own):
    """Register it anew, with some attributes of its own, and return its name."""
    Toy.seeds = []
    Toy.transitions = []  # observation and action of every step
    Toy.num_open = Toy.most_open = 0
    gym.registry.pop(name, None)
    gym.register(name, type("Toy", (Toy,), own), kwargs={"spaces": (obs_space, action_space)})
    return name


SMALL = dict(num_envs=2, num_steps=8, minibatch_size=8, total_steps=32, eval_episodes=2)
SMALL_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.fixture
def run(capsys):
    """Run a command line after some flags, check its exit status, return what it printed."""

    def run(command, status=0, flags=SMALL_FLAGS):
        with pytest.raises(SystemExit) as stopped:
            sys.exit(ppo.main([*flags, *command.split()]))
        assert stopped.value.code == status
        out, err = capsys.readouterr()
        assert re.fullmatch("ppo.py: .*\n" if status == 2 else "", err)
        return out + err

    return run


@pytest.mark.parametrize(("ends", "limits", "value"), [((), [10], 10), ([10], (), 4.138)])
def test_a_time_limit_is_no_end(ends, limits, value):
    """A state is worth 1/(1-γ) = 10 if only time limits interrupt its rewards of 1.

    With true ends after ten steps it is worth 10 - 9 (1 - γ^10) on average.
    """
    env = toy(gym.spaces.Box(0, 1, (1,)), ends=ends, limits=limits)
    chosen = dict(num_steps=66, total_steps=15_000, gamma=0.9, lam=1.0, lr=3e-3, seed=300)
    agent, _ = ppo.train(env, **chosen)
    inputs = agent.normalize(np.linspace(0, 1, 11)[:, None])
    values, _ = ppo.mlp_forward(agent.critic, inputs)
    _, variance, _ = agent.return_moments
    assert values.mean() * variance**0.5 == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize(("num_envs", "num_steps"), [(3, 17), (2, 1)])
def test_every_transition_is_learned_from_once(num_envs, num_steps, monkeypatch):
    """No reset is. The action is the sample, of which the environment received twice as much."""
    calls = watch(monkeypatch, "update")
    env = toy(BOX, gym.spaces.Box(-2, 2, (2,)), ends=(2, 4, 6), limits=(1, 3, 5, 7))
    chosen = dict(num_envs=num_envs, num_steps=num_steps, normalize_steps=0, log_std_init=0.0)
    ppo.train(env, total_steps=459, **chosen)
    learned = []
    for call in calls:
        assert len(call["actions"]) > 0  # some rollouts of one step consist of resets only
        learned += np.hstack([call["inputs"], (2 * call["actions"]).clip(-2, 2)]).tolist()
    played = [[*obs.tolist(), *action.tolist()] for obs, action in Toy.transitions]
    assert len(played) > 300
    assert sorted(learned) == sorted(played)


def test_the_mean_return_is_that_of_the_last_hundred_episodes():
    """Before the first one ends it is nan. Here episode i has the reward i."""
    env = toy(limits=(1,), reward=lambda env, action: float(len(Toy.transitions)))
    _, history = ppo.train(env, num_envs=1, num_steps=50, total_steps=300)
    assert [record["episodes"] for record in history] == [25, 50, 75, 100, 125, 150]
    assert [record["mean_return"] for record in history[3:]] == [50.5, 75.5, 100.5]
    _, history = ppo.train(toy(), **SMALL)
    assert np.isnan(history[0]["mean_return"])


# F  The tasks -------------------------------------------------------

WIDE = gym.spaces.Box(0, 50, (2,))
NUMBERED = gym.spaces.Discrete(5, start=-2)
SPACES = [
    (gym.spaces.Box(-1, 1, (2,), np.int8), WIDE),
    (gym.spaces.Box(0, 1, (), np.float64), THREE),
    (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), WIDE),
    (gym.spaces.Dict(a=gym.spaces.Text(5), b=gym.spaces.Dict(c=BOX)), THREE),
    (gym.spaces.Tuple([THREE, THREE]), WIDE),
    (gym.spaces.MultiBinary(3), THREE),
    (NUMBERED, WIDE),
    (NUMBERED, THREE),
]


@pytest.mark.parametrize(("observations", "actions"), SPACES, ids=str)
def test_spaces(observations, actions):
    """All that can be flattened is observed. Discrete with Discrete actions is a table."""
    agent, _ = ppo.train(toy(observations, actions), **SMALL)
    is_table = observations == NUMBERED and actions == THREE
    assert (len(agent.actor) == 2) == is_table
    assert (agent.settings.hidden == ()) == is_table
    Toy.transitions = []
    assert_array_equal(ppo.evaluate(agent), [10, 10])
    for obs, action in Toy.transitions:
        assert_allclose(agent.act(obs), action, rtol=1e-4)


def test_many_numbered_states_take_little_memory():
    """20,000 of them do not take 20,000 × 20,000 numbers, which are 1.6 GB."""
    tracemalloc.start()
    ppo.make_envs(toy(gym.spaces.Discrete(20_000)), 2).reset(seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


class Halves(gym.vector.VectorObservationWrapper):
    """CartPole of which one sees the angle and its speed."""

    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, num_envs=1):
        super().__init__(CartPoleVectorEnv(num_envs))

    def observations(self, obs):
        return obs[:, 2:]


def test_vector_environments_may_be_wrapped():
    """The observations that count are those of the wrapper."""
    gym.register("Halves-v0", vector_entry_point=Halves)
    agent, _ = ppo.train("Halves-v0", **SMALL)
    assert agent.actor[0].shape == (2, 64)
    assert ppo.evaluate(agent).min() > 1


def test_xor_of_two_bits_is_learned():
    """It needs a hidden layer: the best linear policy gets 7.5 of 10."""

    def reward(env, action):
        return float(action == env.obs[0] ^ env.obs[1])

    env = toy(gym.spaces.MultiBinary(2), TWO, reward=reward)
    means = []
    for seed in range(3):  # about one seed in twelve stays behind
        agent, _ = ppo.train(env, total_steps=12_000, num_steps=32, seed=seed)
        means.append(ppo.evaluate(agent, 20).mean())
    assert np.median(means) == 10


HUGE = np.finfo(np.float32).max  # stands for infinity
LOW = np.float32([-0.5, 0, -HUGE, -np.inf])
HIGH = np.float32([0.5, np.inf, HUGE, np.inf])
INT32 = gym.spaces.Discrete(3, start=7)
INT32.dtype = np.dtype(np.int32)
LEGAL = [  # a space, what the policy wants, what the environment receives
    (INT32, [0, 5, 1], 8),
    (gym.spaces.Box(-1, 3, (2, 2), np.float64), [0.5, -3, 7, 0.25], [[2, -1], [3, 1.5]]),
    (gym.spaces.Box(LOW, HIGH), [0.5, -9, 9, -9], [0.25, 0, 9, -9]),
    (gym.spaces.Box(0, 255, (), np.uint8), [0.999], 255),
    (gym.spaces.Box(-5, 5, (3,), np.int64), [0.5, -0.5, 0.55], [2, -2, 3]),
    (gym.spaces.Box(-np.inf, np.inf, (2,), np.int32), [1, -1], [1, -1]),
    # float64 rounds such limits: then the largest number would become the smallest
    (gym.spaces.Box(0, 2**63 - 1, (2,), np.int64), [1, -9], [1, 0]),
    (gym.spaces.Box(0, 2**64 - 1, (2,), np.uint64), [1, -9], [1, 0]),
]


@pytest.mark.parametrize(("space", "wanted", "received"), LEGAL, ids=str)
def test_actions_are_legal(space, wanted, received):
    """-1 ... 1 becomes low ... high of a bounded component. All are clipped, integers rounded."""
    agent = ppo.new_agent(toy(BOX, space))
    agent.theta[:] = 0
    agent.actor[5][:] = wanted  # the last b: with W = 0 the policy wants it in every state
    action = agent.act(np.zeros(2, np.float32))
    assert_array_equal(action, received)
    assert action.dtype == space.dtype


def test_settings_are_chosen_by_kind_and_by_name():
    """Chosen wins over Gymnasium's own task, the task over its kind, the kind over the default."""
    toy(BOX, gym.spaces.Box(-2, 2, (1,)), name="Pendulum-v0")
    gym.register("Pendulum-vertical", "gymnasium.envs.classic_control:PendulumEnv")
    names = ["Pendulum-v1", "Pendulum", "gymnasium.envs:Pendulum-v1"]
    names += ["Pendulum-v0", "Pendulum-vertical"]
    for name, lr in zip(names, [1e-3, 1e-3, 1e-3, 6e-4, 6e-4], strict=True):
        chosen = ppo.new_agent(name, epochs=7).settings
        assert [chosen.epochs, chosen.lr, chosen.gamma, chosen.clip] == [7, lr, 0.99, 0.2]


def test_settings_may_be_numpy_scalars(folder):
    """They become Python's numbers, also in a file."""
    chosen = dict(num_envs=np.int32(2), num_steps=np.uint8(8), total_steps=np.int64(32))
    agent, _ = ppo.train(**chosen, lr=np.float64(0.5), hidden=np.array([4, 3]))
    ppo.save("p.npz", agent)
    plain = ppo.Settings(num_envs=2, num_steps=8, total_steps=32, lr=0.5, hidden=(4, 3))
    assert repr(agent.settings) == repr(ppo.load("p.npz").settings) == repr(plain)


TASKS = [  # task, steps, mean return
    ("CartPole-v1", 25_000, 200),
    ("Acrobot-v1", 20_000, -200),
    ("MountainCar-v0", 30_000, -185),
    ("MountainCarContinuous-v0", 20_000, 80),
    ("Pendulum-v1", 30_000, -600),
    ("FrozenLake-v1", 60_000, 0.3),
    ("CliffWalking", 30_000, -20),
]


@pytest.mark.parametrize(("task", "steps", "enough"), TASKS)
def test_tasks_are_learned(task, steps, enough):
    """A short run comes far above what a broken learner reaches."""
    agent, _ = ppo.train(task, total_steps=steps, seed=300)
    assert ppo.evaluate(agent, 20).mean() >= enough


def test_evaluation_plays_whole_episodes(capsys):
    """Each of ten environments plays one a round, to its end. Rewards after it do not count.

    If an episode is cut off, the round is the last, and a line says so.
    """
    one_two_three = dict(limits=range(11), choose_length=lambda env: env.number + 1)
    agent = ppo.new_agent(toy(**one_two_three))
    assert_array_equal(ppo.evaluate(agent, 13), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3])
    toy(**one_two_three, reward=lambda env, action: 1.0 if env.episode == 1 else np.inf)
    assert_array_equal(ppo.evaluate(agent, 3), [1, 2, 3])
    assert capsys.readouterr().out == ""
    toy(**one_two_three | dict(limits=range(10)))  # the tenth environment never ends
    assert_array_equal(ppo.evaluate(agent, 35, max_steps=50), [1, 2, 3, 4, 5, 6, 7, 8, 9, 50])
    assert "cut off after 50 steps" in capsys.readouterr().out


def test_seeds_and_number_of_environments():
    """Seeds are below 2**31, depend on --seed, and are others in the evaluation. At most num_envs
    environments are open, there too, and none at the end."""
    runs = []
    for seed in [0, 2**32 - 1, 2**32 - 1]:
        agent, _ = ppo.train(toy(), **SMALL, seed=seed)
        ppo.evaluate(agent, 40)
        runs.append(Toy.seeds)
        assert [Toy.most_open, Toy.num_open] == [2, 0]
    assert runs[1] == runs[2]
    different = {*runs[0], *runs[1]}
    assert len(different) == 2 * (2 + 40)
    assert max(different) < 2**31


# G  The command line and the README ---------------------------------

ROOT = Path(ppo.__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def printed_steps(out):
    """Return the first column of the rows that a run printed."""
    rows = re.findall(r"^ +([\d,]+)(?: +[^ #|]+){6}$", out, re.M)
    return [int(steps.replace(",", "")) for steps in rows]


toy(gym.spaces.Sequence(BOX), name="Words-v0")
toy(BOX, gym.spaces.MultiBinary(3), name="Bits-v0")
REFUSED = [
    ("--hidden 64 0", "hidden must be"),
    ("--gamma 1.01", "gamma must be"),
    ("--lr nan", "lr must be"),
    ("--epochs many", "--epochs"),
    ("--objective ppo", "pg, is, trpo, kl or clip"),
    ("--env HalfCheetah-v3", "v3"),
    ("--env Mine-v0", "module:Name-v0"),
    ("--env missing:Mine-v0", "'missing'"),
    ("--env .x:Y", ".x:Y"),
    ("--env Words-v0", r"observations .*Sequence\(Box(?!.*Discrete)"),
    ("--env Bits-v0", r"actions .*MultiBinary\(3\)(?!.*Box)"),
    ("--render", "pygame"),
    ("--play missing.npz", "missing.npz"),
    ("--play pole.npz --env Acrobot-v1", "of CartPole-v1, .* not fit"),
    ("--load pole.npz --hidden 32", r"hidden \[64, 64\].* not fit"),
    ("--save missing/p.npz", "missing/p.npz"),
    ("--log missing/run.csv", "missing/run.csv"),
    ("--load pole.npz --log ./pole.npz", "--log"),
]


@pytest.mark.parametrize(("command", "clue"), REFUSED)
def test_what_cannot_work_is_refused_at_once(command, clue, run, folder, monkeypatch):
    """One line says what to change, before anything is printed or written. All is closed."""
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    ppo.save("pole.npz", ppo.new_agent("CartPole-v1"))
    assert re.fullmatch(f"ppo.py: .*{clue}.*\n", run(command, status=2))
    assert os.listdir() == ["pole.npz"]
    ppo.load("pole.npz")
    assert Toy.num_open == 0


ERRORS = [FloatingPointError, MemoryError, gym.error.Error, ImportError]
ERRORS += [TypeError, ValueError, OSError, KeyError]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_an_environment_keep_their_traceback(error, run):
    """What its constructor or a step raises comes out of main."""

    def broken(*args, **kwargs):
        raise error("a bug")

    for method in ["__init__", "step"]:
        with pytest.raises(error, match="a bug"):
            run(f"--env {toy(**{method: broken})}")


def test_a_module_that_cannot_be_compiled_keeps_its_traceback(folder, run, monkeypatch):
    """It is the user's, although none of its code has run."""
    monkeypatch.syspath_prepend(os.getcwd())
    Path("unfinished.py").write_text("import gymnasium as")
    with pytest.raises(SyntaxError, match="unfinished.py"):
        run("--env unfinished:Mine-v0")


def test_about_twenty_rows_and_the_last_are_printed(run):
    """If there are as many iterations."""
    for total_steps, least in [(3, 1), (331, 19), (1280, 19)]:
        steps = printed_steps(run(f"--total-steps {total_steps}"))
        assert total_steps <= steps[-1] < total_steps + 2
        assert least <= len(steps) <= 22


def test_a_terminal_shows_progress_before_the_first_row(run, monkeypatch):
    """A live line shows steps, speed and time left from the first steps on. All is ASCII."""
    clock = iter(range(10**6))  # a second passes whenever somebody looks
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run("")
    assert re.search(r"\b4 steps, 2 steps/s, 14 s left *\r", out.split("mean_return")[0])
    assert (out + run("--help")).isascii()


def test_a_run_prints_and_logs_what_it_does(run, folder):
    """Numbers have four significant digits. The log has a CSV row for each iteration."""
    env = toy(reward=lambda env, action: 0.00041237)
    out = run(f"--env {env} --log run.csv --save p.npz")
    assert printed_steps(out) == [16, 32]
    assert re.search(r"^ +32 +2 +0\.004124 ", out, re.M)
    assert "---" not in out  # a flat curve shows nothing
    assert "\r" not in out  # for terminals
    assert re.search(r"\n.* s, [\d,]+ steps/s\n.*ppo\.py --play p\.npz --render\n", out)
    assert "\ngreedy evaluation over 2 episodes: mean 0.004124, std 0, min 0.004124" in out
    rows = Path("run.csv").read_text().splitlines()
    assert rows[0] == "steps,episodes,mean_return,kl,clipped,entropy,explained"
    assert [row.split(",")[0] for row in rows[1:]] == ["16", "32"]


COMMANDS = [
    "--env Toy-v0 --total-steps 64 --num-steps 4 --epochs 2 --objective kl --kl-target 0.1",
    "--env FrozenLake-v1 --total-steps 1024 --num-envs 16 --normalize-steps 1",  # the defaults
    "--env Pendulum-v1 --total-steps 600 --num-steps 50 --log-std-init -0.25 --hidden 9 9",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_repeats_a_run_and_a_file_its_last(command, run, folder):
    """The flags are all that differ from the task's. --play and evaluate say what the run said."""
    toy(reward=lambda env, action: env.obs[0])
    first, *others = run(f"{command} --eval-episodes 2 --save p.npz", flags=[]).splitlines()
    again = run(first.removeprefix("python ppo.py"), flags=[]).splitlines()
    *rows, _, saved, last = others
    assert [first, *rows, last] == [*again[:-2], again[-1]]
    assert max(len(row) for row in rows) <= 79
    assert run("--play p.npz", flags=[]) == last + "\n"
    agent = ppo.load("p.npz")
    assert f"--lr {agent.settings.lr}" in first or agent.settings.lr == ppo.Settings.lr
    mean = ppo.evaluate(agent).mean()
    assert f"over 2 episodes: mean {mean:.4g} std" in last.replace(",", "")


@pytest.mark.parametrize("returns", [[-1511, -190], [0.0125, 0.0131], [9.5, 500], [-2e7, 1e7]])
def test_the_curve_has_round_ticks(returns, capsys):
    """They are 1, 2 or 5 times a power of ten apart. A # stands where a tick is reached."""
    history = [dict(steps=9, episodes=0, mean_return=math.nan)]
    history += [dict(steps=mean, episodes=1, mean_return=mean) for mean in returns]
    ppo.print_curve(history)
    *bars, axis, _ = capsys.readouterr().out.splitlines()
    ticks = np.array([float(line.split()[0].replace(",", "")) for line in [*bars, axis]])
    distance = ticks[0] - ticks[1]
    assert f"{distance:.2e}"[:4] in ("1.00", "2.00", "5.00")
    assert_allclose(np.diff(ticks), -distance)
    line = np.linspace(*returns, 60)
    assert [bar.count("#") for bar in bars] == [sum(line >= tick) for tick in ticks[:-1]]
    assert 3 <= len(bars) <= 15
    assert ticks[-1] <= returns[0] < ticks[-2]
    assert ticks[0] + distance > returns[1]


def test_a_warm_start_learns_on(folder, monkeypatch):
    """Policy, critic and statistics are the file's, bit for bit. The learning rate starts again.

    Random numbers go on, so that episodes are new, unless a seed is chosen.
    """
    env = toy()
    trained, _ = ppo.train(env, **SMALL)
    ppo.save("p.npz", trained)
    rates = []
    monkeypatch.setattr(ppo.Adam, "step", lambda adam, gradient, lr: rates.append(lr))
    for chosen, are_new in [(dict(), True), (dict(seed=1), True), (dict(seed=0), False)]:
        agent = ppo.load("p.npz", total_steps=64, **chosen)
        for name in ["theta", "phi", "obs_mean", "obs_std", "obs_moments", "return_moments"]:
            assert_array_equal(getattr(agent, name), getattr(trained, name))
        assert len(list(ppo.learn(agent, ppo.make_envs(env, 2)))) == 4
        assert [rates[0], rates[-1]] == [2e-3, 2e-3 / 4]
        assert (Toy.seeds[-2:] != Toy.seeds[:2]) == are_new
    assert ppo.load("p.npz").rng.random() == trained.rng.random()


def test_a_full_disk_leaves_the_earlier_file(run, folder, monkeypatch):
    """A save that fails half-way, while another process saves, is reported in one line."""
    agent = ppo.new_agent()
    savez = np.savez

    def fail(file, **arrays):
        file.write(b"half")
        monkeypatch.setattr(np, "savez", savez)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        ppo.save("p.npz", agent)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    assert "No space left on device" in run("--save p.npz", status=2)
    assert os.listdir() == ["p.npz"]
    ppo.load("p.npz")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_files_that_are_no_policies_are_refused(run, folder):
    """In one line, which names another version as a cause. Nothing in them is executed."""
    ppo.save("good.npz", ppo.new_agent())
    with np.load("good.npz") as file:
        good = dict(file)
    settings = str(good["settings"])
    Path("run.csv").write_text("steps,episodes\n16,1\n")
    Path("half.npz").write_bytes(Path("good.npz").read_bytes()[:9999])
    Path("pickle.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez("bomb.npz", **good | {"settings": np.array([Bomb()], object)})
    np.savez("nan.npz", **good | {"phi": np.nan * good["phi"]})
    np.savez("newer.npz", **good | {"settings": settings.replace("seed", "spin")})
    np.savez("older.npz", theta=good["theta"], settings=settings)
    np.savez("short.npz", **good | {"obs_std": good["obs_std"][:1]})
    for name in {*os.listdir()} - {"good.npz"}:
        for flag in ["--load", "--play"]:
            err = run(f"{flag} {name}", status=2)
            assert name in err
            assert ("does not fit" if name == "short.npz" else "version of ppo.py") in err
    assert not os.path.exists("exploded")


def test_an_interrupted_run_keeps_its_policy(run, folder, monkeypatch):
    """Ctrl-C in the third update: status 130, curve printed, no evaluation, policy saved."""
    critic_loss = ppo.critic_loss
    calls = iter(range(1, 100))

    def interrupted(*args):
        if next(calls) == 30:
            raise KeyboardInterrupt
        return critic_loss(*args)

    monkeypatch.setattr(ppo, "critic_loss", interrupted)
    env = toy(limits=(7,), reward=lambda env, action: len(Toy.transitions))
    out = run(f"--env {env} --total-steps 100000 --save p.npz", status=130)
    assert re.search(r"---\n +16 +32 steps\n", out)
    assert "greedy" not in out
    _, _, count = ppo.load("p.npz").obs_moments
    assert_array_equal(count, 14 + 14)  # each rollout of 16 steps has two resets


def test_a_run_that_breaks_off_keeps_its_policy(run, folder):
    """One line says what happened. The file has a policy from before."""
    env = toy(reward=lambda env, action: np.nan if len(Toy.transitions) == 20 else 1.0)
    breaks = [("--env Pendulum-v1 --lr 1e12", "smaller lr"), (f"--env {env}", "not finite")]
    for command, clue in breaks:
        assert clue in run(f"{command} --save p.npz", status=2)
        assert np.isfinite(ppo.load("p.npz").theta).all()


def test_render_shows_episodes(run, folder):
    """The evaluation is shown, five episodes long if not told otherwise."""
    shown = []
    env = toy(reward=lambda env, action: shown.append(env.render_mode) or 1.0)
    last = "greedy evaluation over 2 episodes: mean 10, std 0, min 10, max 10\n"
    assert run(f"--env {env} --save p.npz --render").endswith("\n" + last)
    assert shown.count("human") == 20
    assert run("--play p.npz --render", flags=[]) == last.replace("2 episodes", "5 episodes")
    assert "render mode" in run(f"--env {toy(metadata={})} --render", status=2)


IMPORTS = """
import os
os.environ["OMP_NUM_THREADS"] = "2"
import ppo, importlib
print(os.environ.pop("OMP_NUM_THREADS"))
importlib.reload(ppo)
print(os.environ["OMP_NUM_THREADS"])
"""


def test_importing_sets_the_number_of_threads_unless_you_did():
    """It prints nothing."""
    argv = [sys.executable, "-c", IMPORTS]
    assert subprocess.check_output(argv, cwd=ROOT, stderr=subprocess.STDOUT) == b"2\n1\n"


def test_a_reader_may_leave_early():
    """python ppo.py | head -1 ends quietly."""
    argv = [sys.executable, ppo.__file__, *SMALL_FLAGS, "--total-steps=5000"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(argv, **pipes) as process:
        assert process.stdout.readline().startswith("python ppo.py")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_the_python_of_the_readme_runs(run, folder, monkeypatch):
    """Its blocks run one after the other. What registers environments goes to my_module.py, too."""
    monkeypatch.syspath_prepend(os.getcwd())
    run("--save policy.npz --log run.csv")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    small = re.sub(r"total_steps=[\d_]+", "total_steps=2_000", readme)
    namespace = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```", small, re.M | re.S):
        if "gym.register(" in code:
            with open("my_module.py", "a", encoding="utf-8") as module:
                module.write(code)
        exec(compile(code, "README.md", "exec"), namespace)
    assert os.path.exists("my_module.py")
    for env in set(re.findall(r"my_module:[\w-]+", readme)):
        run(f"--env {env}")
