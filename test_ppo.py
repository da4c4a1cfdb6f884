# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26", "pytest"]
# ///
"""The lecture's second half: what each formula claims, checked on ppo.py's own functions.

    python test_ppo.py -k eq9_

Part A is the lecture, Eq. 1 to 19, in worlds small enough to be exact. B to G check what is
built around it.
"""

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "-q", *sys.argv[1:]]))

import ppo  # before numpy, which reads the thread default that ppo sets

# isort: split
import ast
import copy
import math
import os
import re
import runpy
import shlex
import subprocess
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.vector import ReshapeObservation
from numpy.testing import assert_allclose, assert_equal

TWO = gym.spaces.Discrete(2)
THREE = gym.spaces.Discrete(3)
BOX = gym.spaces.Box(-1, 1, (2,))

# A  The lecture ----------
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


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Work in an empty folder, from which modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


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
    # T is a true end, L a time limit, r a reset.
    ends = np.array([[*row] for row in ("..L", "T.r", "rL.", ".r.", "..L", "T.r")])  # (T, N)
    terminated = ends == "T"
    truncated = ends == "L"
    is_transition = ends != "r"

    def __init__(self, action_space=TWO, obs_dim=1):
        self.obs_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.single_action_space = action_space
        self.num_envs = 3
        self.t = 0

    def reset(self, seed):
        return self.obs[0], {}

    def step(self, actions):
        t = self.t
        self.t += 1
        return self.obs[t + 1], self.rewards[t], self.terminated[t], self.truncated[t], {}


def test_eq1_rows_belong_together():
    """Row t holds s_t, the action chosen from it, its reward and how it ended. s_t+1 follows."""
    played = ppo.rollout(Script(), lambda obs: -obs, Script.obs[0].astype(float), 6)
    script = [Script.obs, -Script.obs[:6], Script.rewards, Script.terminated, Script.truncated]
    for returned, written in zip(played, script, strict=True):
        assert_equal(returned, written)
    assert played[0].dtype == float  # large offsets would cost float32 its digits


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
    """Return weights, actions, log π and ∇log π. weights @ f(actions) is E_a~π[f(a)]."""
    if len(x) == 3:
        weights = softmax(x)
        actions = np.arange(3)
    else:
        nodes, areas = np.polynomial.hermite_e.hermegauss(20)  # Gauss-Hermite quadrature
        weights = areas / np.sqrt(2 * np.pi)
        actions = x[0] + np.exp(x[1]) * nodes[:, None]
    log_pi, gradients = policy_of(x, len(actions)).log_prob(actions)
    return weights, actions, log_pi, np.hstack(gradients)


def expected(objective, x, weights, actions, log_prob_old, advantages=None):
    """Return the expectation of an objective of §5, and its gradient by x."""
    log_prob, gradients = policy_of(x, len(actions)).log_prob(actions)
    loss, slope = objective(log_prob, log_prob_old, advantages)
    return weights @ loss, (weights * slope) @ np.hstack(gradients)


@both_policies
def test_eq3_log_derivative_trick_and_eglp_gradient(x):
    """∇p = p ∇log p, and the expectation of ∇log p is 0."""
    weights, actions, _, nabla_log_p = all_actions(x)

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
    terminated, truncated = np.indices([2] * 8).reshape(2, 4, 256)
    sums = np.zeros((4, 256))
    for t, n in np.ndindex(4, 256):
        for i in range(t, 4):
            next_value = 0 if terminated[i, n] else values[i + 1, n]
            delta = rewards[i, n] + 0.9 * next_value - values[i, n]
            sums[t, n] += (0.9 * 0.8) ** (i - t) * delta
            if terminated[i, n] or truncated[i, n]:
                break
    advantages = ppo.gae(rewards, values, terminated, truncated, gamma=0.9, lam=0.8)
    assert_allclose(advantages, sums, atol=1e-14)
    r = np.ones((2, 1), int)  # Â of integers is not rounded
    assert_equal(ppo.gae(r, np.ones((3, 1), int), 0 * r, 0 * r, 1, 0.5), [[1.5], [1]])


def test_eq2_sums_so_far_mirror_gae(rng):
    """With time reversed they are what gae adds up with V = 0 and λ = 1, for all 16 patterns of
    endings. Two rollouts are as one."""
    rewards = rng.standard_normal((4, 16))
    ended = np.indices([2] * 4).reshape(4, 16)
    begins = np.vstack([np.ones(16), ended[:-1]])[::-1]
    mirrored = ppo.gae(rewards[::-1], np.zeros((5, 16)), begins, begins, 0.9, 1)
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
    weights, actions, log_prob_old, _ = all_actions(x)

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
    weights, actions, log_pi, nabla_log_pi = all_actions(x)
    # Eq. 14   F = E[∇log π ∇log πᵀ]
    F = (weights * nabla_log_pi.T) @ nabla_log_pi

    def kl(x):
        return expected(ppo.kl_divergence, x, weights, actions, log_pi)

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
    assert_equal(ppo.conjugate_gradients(np.eye(5).dot, g), g)  # one is enough


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

    theta = np.zeros(2)
    ppo.trust_region_step(theta, surrogate, kl, delta=5 / 8)
    x = g / [1.1, 4.1]  # the diagonal of F, with damping
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


def test_eq16_clip_table(rng):
    """The lecture's six cases, ε = 0.2: nothing to gain beyond 1 ± ε, but always a way back."""
    # Eq. 16   loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â)
    log_ratio = np.log([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantages = np.array([2.0, 2.0, 2.0, -2.0, -2.0, -2.0])
    loss, slope = ppo.clip(log_ratio, np.zeros(6), advantages, epsilon=0.2)
    assert_allclose(loss, [-1.0, -2.0, -2.4, 1.6, 2.0, 3.0])
    assert_allclose(slope, [-1.0, -2.0, 0, 0, 2.0, 3.0])
    # No row inside 1 ± ε has slope 0, though a numpy ε is wider than the rows of float32.
    inside = rng.uniform(-0.2, 0.18, 1000).astype(np.float32)
    advantages = rng.standard_normal(1000).astype(np.float32)
    _, slope = ppo.clip(inside, 0 * inside, advantages, np.float64(0.2))
    assert_equal(slope, -np.exp(inside) * advantages)


@both_policies
def test_eq17_entropy_and_samples(x, rng):
    """H is what -log π is on average. Draws have the first two moments of the policy."""
    weights, actions, log_pi, _ = all_actions(x)
    entropy, _ = policy_of(x, 1).entropy()
    # Eq. 17   H = -E_a~π[log π(a|s)]
    assert_allclose(entropy, -weights @ log_pi)
    draws = policy_of(x, 100_000).sample(rng)
    assert draws.mean() == pytest.approx(weights @ actions, abs=0.01)
    assert (draws**2).mean() == pytest.approx(weights @ actions**2, abs=0.02)


def an_agent(action_space=TWO, obs_dim=1, **chosen):
    """Return an agent that plays the script in two rollouts of three steps."""
    chosen = dict(hidden=(4,), num_steps=3, total_steps=18) | chosen
    return ppo.Agent(Script(action_space, obs_dim), ppo.Settings(**chosen))


def watch(monkeypatch, name):
    """Note arguments and result of every later call of this function of ppo."""
    function = getattr(ppo, name)
    calls = []

    def watched(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append((*args, *kwargs.values(), result))
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
        rewards, values, terminated, truncated, gamma, lam, advantages = judged[i]
        V = 2 * inputs[i][:, :, 0] + 1
        assert_allclose(rewards, Script.rewards[rows] / deviations[i], rtol=1e-4)
        assert_allclose(values, V, rtol=1e-4)
        assert_equal(terminated, Script.terminated[rows])
        assert_equal(truncated, Script.truncated[rows])
        assert [gamma, lam] == [0.5, 0.8]
        is_transition = Script.is_transition[rows]
        x = inputs[i][:-1][is_transition]
        # Eq. 18   R̂ = Â + V_φ_k(s)
        R = advantages + V[:-1]
        batch = [x, x[:, 0] > 0, advantages[is_transition], R[is_transition], [1, 5 / 14][i]]
        for passed, wanted in zip(learned[i][1:6], batch, strict=True):
            assert_allclose(passed, wanted, rtol=1e-4)


both_spaces = pytest.mark.parametrize("space", [TWO, BOX], ids=POLICIES)


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_eq14_eq19_update(space, objective, rng):
    """Three epochs of one minibatch, written out for a twin, with 0.2 of the run still to come."""
    chosen = dict(epochs=3, lr=0.1, actor_lr=0.05, max_grad_norm=0.01, ent_coef=0.3, clip=0.1)
    twin = an_agent(space, objective=objective, kl_target=1e-3, **chosen)
    twin.beta = 0.7
    agent = copy.deepcopy(twin)  # its networks move with its own θ and φ
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
        actor = ppo.unflatten(theta, twin.actor)
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


# B  The gradients ----------


@pytest.mark.parametrize("ent_coef", [0.0, 0.1])
@pytest.mark.parametrize("objective", [*OBJECTIVES.values(), ppo.kl_divergence])
@both_spaces
def test_eq17_actor_loss_and_its_gradient(space, objective, ent_coef, rng):
    """Objective, entropy, policy and network together, in every case of the clip table."""
    agent = an_agent(space, obs_dim=3)
    theta = 0.5 * rng.standard_normal(len(agent.theta))
    inputs = rng.standard_normal((16, 3))
    actor = ppo.unflatten(theta, agent.actor)
    policy, _ = ppo.policy_forward(actor, inputs)
    actions = policy.sample(rng)
    log_prob, _ = policy.log_prob(actions)
    # Each of four ratios meets each of four advantages.
    log_prob_old = log_prob - np.log(np.tile([0.5, 0.95, 1.05, 1.5], 4))
    advantages = np.repeat([2.0, 0.3, -0.5, -1.0], 4)

    def loss(theta):
        policy, _ = ppo.policy_forward(ppo.unflatten(theta, agent.actor), inputs)
        log_prob, _ = policy.log_prob(actions)
        rows, _ = objective(log_prob, log_prob_old, advantages)
        entropy, _ = policy.entropy()
        return (rows - ent_coef * entropy).mean()  # Eq. 17

    data = [inputs, actions, log_prob_old, advantages]
    mean, gradient = ppo.actor_loss(actor, objective, ent_coef, *data)
    assert_allclose(mean, loss(theta))
    assert_allclose(gradient, numerical_gradient(loss, theta), rtol=1e-6, atol=1e-9)


def test_eq18_critic_loss_and_its_gradient(rng):
    """The loss is the mean of (V - R̂)². Its gradient passes three layers with biases."""
    critic = ppo.init_mlp([3, 5, 4, 1], rng)
    phi = rng.standard_normal(49)
    inputs = rng.standard_normal((8, 3))
    returns = rng.standard_normal(8)

    def loss(phi):
        values, _ = ppo.mlp_forward(ppo.unflatten(phi, critic), inputs)
        return ((values[:, 0] - returns) ** 2).mean()  # Eq. 18

    mean, gradient = ppo.critic_loss(ppo.unflatten(phi, critic), inputs, returns)
    assert_allclose(mean, loss(phi))
    assert_allclose(gradient, numerical_gradient(loss, phi), rtol=1e-6, atol=1e-9)


# C  The components ----------


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
    """They are right even where exp would overflow. log_std may be (B, d)."""
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
    assert_equal(ppo.clip_by_global_norm(g, 5.0), g)
    with np.errstate(over="ignore"):
        huge = ppo.clip_by_global_norm(np.float32(1e20 * g), 1.0)
    assert np.isnan(huge).all() or np.allclose(huge, [0.6, 0.8])


def test_adam():
    """Three steps as the paper writes them, for ordinary and tiny gradients."""
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
    """They would give wrong numbers and no error."""
    r = np.zeros((4, 2))
    V = np.zeros((5, 2))
    column = np.zeros((3, 1))
    layer = [np.zeros((1, 1)), np.zeros(1)]
    rows = np.zeros(3, int)
    agent = an_agent(obs_dim=3)
    wrong = [
        lambda: ppo.gae(r, V, r[:1], r, 1, 1),
        lambda: ppo.gae(r[:, 0], V[:, 0], r[:, 0], r[:, 0], 1, 1),
        lambda: ppo.Gaussian(column, np.zeros(1)).log_prob(rows),
        lambda: ppo.Categorical(column).log_prob(rows[:, None]),
        lambda: ppo.Categorical(column).log_prob(rows - [0, 0, 1]),  # the last action
        lambda: ppo.actor_loss(layer, ppo.policy_gradient, 0, column, rows, rows[:1], rows),
        lambda: ppo.critic_loss(layer, column, rows[:1]),
        lambda: ppo.Adam(np.zeros(2)).step(np.ones(1), lr=0.1),
        lambda: agent.policy(column),
        lambda: agent.act(column.T),
    ]
    for call in wrong:
        with pytest.raises((ValueError, AssertionError)):
            call()


def test_a_rollout_must_be_finite():
    """Rewards and observations are checked, to the last."""
    for name in ("rewards", "obs"):
        envs = Script()
        array = getattr(envs, name).astype(float)
        array[-1, 0] = np.inf
        setattr(envs, name, array)
        with pytest.raises(FloatingPointError, match="not finite"):
            ppo.rollout(envs, lambda obs: obs, envs.obs[0], 6)


SECTIONS = Path(ppo.__file__).read_text(encoding="utf-8").split("\n# §")
DEFINITIONS = ast.parse("\n# ".join(["", *SECTIONS[1:8], SECTIONS[9]])).body  # §1-§7 and §9
COEFFICIENTS = ["lr", "gamma", "lam", "clip", "kl_target", "max_grad_norm"]


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_each_definition_runs_alone_and_keeps_float32(space, objective, monkeypatch):
    """Definitions of §1-§7 and §9, pasted with what they name, carry learn in float32, with
    np.float64 as coefficients. Nothing overflows, for constant, tiny or huge rewards."""
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
    chosen = dict.fromkeys(COEFFICIENTS, np.float64(0.1))
    for scale in (0, 1e-6, 1e6):
        agent = an_agent(space, objective=objective, ent_coef=np.float64(scale), **chosen)
        agent.phi[:] = 0  # if scale is 0, all gradients are
        agent.beta = np.float64(1)
        envs = Script()
        envs.rewards = scale * Script.rewards
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            list(ppo.learn(agent, envs))
    for *_, result in sum(watched, []):
        for x in result if isinstance(result, tuple | list) else [result]:
            assert not isinstance(x, np.ndarray) or x.dtype != np.float64


# D  The agent ----------


def test_a_new_agent():
    """Its actions are almost equally likely, log_std is as chosen, a table of values is 0."""
    agent = an_agent(BOX, log_std_init=-1.5)
    W = agent.actor[2]
    assert_allclose(W.T @ W, 0.01**2 * np.eye(2), atol=1e-8)
    assert_equal(agent.actor[4], [-1.5, -1.5])
    assert_allclose(np.linalg.norm(agent.critic[2]), 1, rtol=1e-6)
    assert_equal(an_agent(hidden=()).phi, [0, 0])
    assert agent.beta == 1


def test_fit_shows_every_row_once_an_epoch():
    """Minibatches have equal sizes, at most B. Each epoch has another order."""
    seen = []
    agent = an_agent(epochs=3, minibatch_size=4)
    adam = ppo.Adam(np.zeros(2))
    ppo.fit(agent, adam, lambda rows: (seen.append(rows), np.zeros(2)), 10, lr=0.1)
    assert [len(rows) for rows in seen] == [4, 3, 3] * 3
    epochs = np.concatenate(seen).reshape(3, 10)
    assert_equal(np.sort(epochs), [np.arange(10)] * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_statistics_of_observations(rng):
    """After normalize_steps steps a component keeps them, unless more than 1 % of it leaves ±10.
    Then it gets those of all that was seen."""
    early = rng.normal([1e8, -30], [2, 1], (1000, 2))  # float32 has steps of 8 near 1e8
    mean = early.mean(axis=0)
    std = early.std(axis=0)
    agent = an_agent(obs_dim=2, normalize_steps=1000)
    ppo.observe(agent, early)
    assert_allclose([agent.obs_mean, agent.obs_std], [mean, std])
    assert_allclose(agent.normalize(early), (early - mean) / std, atol=1e-6)
    late = early.copy()
    late[:11, 0] = mean[0] - 10.5 * std[0]
    late[:10, 1] = mean[1] - 10.5 * std[1]
    ppo.observe(agent, late)
    seen = np.append(early[:, 0], late[:, 0])
    assert_allclose(agent.obs_mean, [seen.mean(), mean[1]])
    assert_allclose(agent.obs_std, [seen.std(), std[1]])
    agent = an_agent(normalize_steps=0)
    assert agent.normalize(np.array([99])) == 99


@pytest.mark.parametrize("name", ["theta", "phi", "obs_std"])
def test_a_run_that_diverges_stops(name):
    """A parameter or statistic that is not finite ends the run."""
    agent = an_agent()
    learning = ppo.learn(agent, Script())
    next(learning)
    getattr(agent, name)[0] = np.inf
    with pytest.raises(FloatingPointError, match="diverged: try a smaller lr"):
        next(learning)


# E  The ends of episodes ----------


class Toy(gym.Env):
    """Random observations of any space, and reward 1 for every legal action.

    An episode ends truly after a number of steps in ends, or at a time limit in limits.
    Gymnasium cannot collect its info.
    """

    metadata = {"render_modes": ["human"]}
    ends = ()
    limits = (10,)

    def __init__(self, spaces, render_mode=None):
        self.observation_space, self.action_space = spaces
        self.render_mode = render_mode
        self.number = Toy.num_open
        Toy.num_open += 1

    def close(self):
        Toy.num_open -= 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            Toy.seeds.append(seed)
            self.episode = 0
        self.episode += 1  # since the last seed
        self.t = 0
        self.length = self.np_random.choice([*self.ends, *self.limits])
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

    def reward(self, action):
        return 1.0


def toy(obs_space=BOX, action_space=THREE, name="Toy-v0", **own):
    """Register it anew, with attributes of its own. Return its name."""
    Toy.seeds = []
    Toy.transitions = []  # observation and action of every step
    Toy.num_open = 0
    gym.registry.pop(name, None)
    gym.register(name, type("Toy", (Toy,), own), kwargs={"spaces": (obs_space, action_space)})
    return name


SMALL = dict(num_envs=2, num_steps=8, minibatch_size=8, total_steps=32, eval_episodes=2)
SMALL_FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


@pytest.mark.parametrize(("ends", "value"), [((), 10), ((10,), 10 - 9 * (1 - 0.9**10))])
def test_a_time_limit_is_no_end(ends, value):
    """A state is worth 1 / (1 - γ) = 10, although time limits interrupt its rewards of 1.

    With true ends after ten steps it is worth less, on average.
    """
    env = toy(gym.spaces.Box(0, 1, (1,)), ends=ends)
    chosen = dict(num_steps=66, total_steps=15_000, gamma=0.9, lam=1.0, lr=3e-3, seed=300)
    agent, _ = ppo.train(env, **chosen)
    inputs = agent.normalize(np.linspace(0, 1, 11)[:, None])
    values, _ = ppo.mlp_forward(agent.critic, inputs)
    _, variance, _ = agent.return_moments
    assert values.mean() * variance**0.5 == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize("num_steps", [17, 1])
def test_every_transition_is_learned_from_once(num_steps, monkeypatch):
    """No reset is. The action is the sample; the environment received twice as much."""
    calls = watch(monkeypatch, "update")
    env = toy(BOX, gym.spaces.Box(-2, 2, (2,)), ends=(2, 4, 6), limits=(1, 3, 5, 7))
    chosen = dict(num_envs=2, num_steps=num_steps, normalize_steps=0, log_std_init=0.0)
    ppo.train(env, total_steps=300, **chosen)
    learned = []
    for _, inputs, actions, *_ in calls:
        assert len(actions) > 0  # some rollouts of one step are resets only
        learned += np.hstack([inputs, (2 * actions).clip(-2, 2)]).tolist()
    played = [np.append(obs, action).tolist() for obs, action in Toy.transitions]
    assert sorted(learned) == sorted(played)


def test_mean_return_of_the_last_hundred_episodes():
    """Here episode i has the reward i."""
    env = toy(limits=(1,), reward=lambda env, action: float(len(Toy.transitions)))
    _, history = ppo.train(env, num_envs=1, num_steps=50, total_steps=300)
    assert [record["mean_return"] for record in history[3:]] == [50.5, 75.5, 100.5]


# F  The tasks ----------

WIDE = gym.spaces.Box(0, 50, (2,))
NUMBERED = gym.spaces.Discrete(5, start=-2)
SPACES = [
    (gym.spaces.Box(0, 1, (), np.float64), THREE),
    (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), WIDE),
    (gym.spaces.Tuple([BOX, gym.spaces.Dict(a=gym.spaces.Text(5), b=THREE)]), THREE),
    (NUMBERED, WIDE),
    (NUMBERED, THREE),
]


@pytest.mark.parametrize(("observations", "actions"), SPACES, ids=str)
def test_spaces(observations, actions):
    """All that can be flattened is observed, by act as well."""
    agent, _ = ppo.train(toy(observations, actions), **SMALL)
    Toy.transitions = []
    assert_equal(ppo.evaluate(agent), [10, 10])
    for obs, action in Toy.transitions:
        assert_allclose(agent.act(obs), action, rtol=1e-4)


def test_a_million_numbered_states_fit_into_memory():
    """They do not take n × n numbers, which are 4 TB."""
    obs, _ = ppo.make_envs(toy(gym.spaces.Discrete(10**6)), 2).reset(seed=0)
    assert_equal(obs.sum(axis=1), [1, 1])


def test_vector_environments_may_be_wrapped(run, monkeypatch):
    """The observations that count are those of the wrapper. Resets must come in the next step."""

    def square(num_envs):
        return ReshapeObservation(gym.make_vec("CartPole-v1", num_envs), (2, 2))

    gym.register("Square-v0", vector_entry_point=square)
    agent, _ = ppo.train("Square-v0", **SMALL)
    assert ppo.evaluate(agent).min() > 1
    monkeypatch.setitem(gym.make_vec("CartPole-v1").metadata, "autoreset_mode", "SameStep")
    assert "next step" in run("", status=2)


def test_xor_of_two_bits_is_learned():
    """It needs a hidden layer: the best linear policy gets 7.5 of 10."""

    def reward(env, action):
        return float(action == env.obs[0] ^ env.obs[1])

    env = toy(gym.spaces.MultiBinary(2), TWO, reward=reward)
    means = []
    for seed in range(3):  # one in twelve stays behind
        agent, _ = ppo.train(env, total_steps=12_000, num_steps=32, seed=seed)
        means.append(ppo.evaluate(agent, 20).mean())
    assert np.median(means) == 10


LOW = np.float32([-0.5, 0, -3e38, -np.inf])  # so low stands for infinity
HIGH = np.float32([0.5, np.inf, 3e38, np.inf])
LEGAL = [  # a space, what the policy wants, what the environment receives
    (gym.spaces.Discrete(3, start=7), [0, 5, 1], 8),
    (gym.spaces.Box(-1, 3, (2, 2), np.float64), [0.5, -3, 7, 0.25], [[2, -1], [3, 1.5]]),
    (gym.spaces.Box(LOW, HIGH), [0.5, -9, 9, -9], [0.25, 0, 9, -9]),
    (gym.spaces.Box(-5, 5, (3,), np.int64), [0.5, -0.5, 0.55], [2, -2, 3]),
    (gym.spaces.Box(-np.inf, np.inf, (2,), np.int32), [1, -1], [1, -1]),
    # float64 rounds these limits up: the largest would become the smallest
    (gym.spaces.Box(0, 2**63 - 1, (2,), np.int64), [1, -9], [1, 0]),
    (gym.spaces.Box(0, 2**64 - 1, (2,), np.uint64), [1, -9], [1, 0]),
]


@pytest.mark.parametrize(("space", "wanted", "received"), LEGAL, ids=str)
def test_actions_are_legal(space, wanted, received):
    """-1 ... 1 becomes low ... high of a bounded component. All are clipped, integers rounded."""
    agent = ppo.new_agent(toy(BOX, space))
    agent.theta[:] = 0
    agent.actor[5][:] = wanted  # the last b; W is 0
    assert_equal(agent.act(np.zeros(2, np.float32)), received)


def test_settings_are_chosen_by_kind_and_by_name():
    """Chosen wins over Gymnasium's own task, the task over its kind, the kind over the default."""
    toy(BOX, gym.spaces.Box(-2, 2, (1,)), name="Pendulum-v0")
    for name, lr in [("Pendulum-v1", 1e-3), ("Pendulum", 1e-3), ("Pendulum-v0", 6e-4)]:
        chosen = ppo.new_agent(name, epochs=7).settings
        assert [chosen.epochs, chosen.lr, chosen.gamma, chosen.clip] == [7, lr, 0.99, 0.2]
    # Scalars of numpy become Python's numbers, also in a file.
    agent = ppo.new_agent(num_envs=np.int32(2), lr=np.float64(0.5), hidden=np.array([4, 3]))
    ppo.save("p.npz", agent)
    plain = ppo.new_agent(num_envs=2, lr=0.5, hidden=(4, 3)).settings
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
    """A short run gets far above a broken learner."""
    agent, _ = ppo.train(task, total_steps=steps, seed=300)
    assert ppo.evaluate(agent, 20).mean() >= enough


def test_evaluation_plays_whole_episodes(capsys):
    """Each of ten environments plays one a round, to its end. Rewards after it do not count.

    A round that is cut off is the last, and a line says so.
    """

    def reward(env, action):
        return 1.0 if env.episode == 1 else np.inf

    env = toy(limits=property(lambda env: [env.number + 1]), reward=reward)
    agent = ppo.new_agent(env)
    assert_equal(ppo.evaluate(agent, 13), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3])
    assert capsys.readouterr().out == ""
    assert_equal(ppo.evaluate(agent, 35, max_steps=5), [1, 2, 3, 4, 5, 5, 5, 5, 5, 5])
    assert "cut off after 5 steps" in capsys.readouterr().out


def test_seeds():
    """They depend on --seed, and differ in the evaluation."""
    runs = []
    for seed in [0, 2**32 - 1, 2**32 - 1]:
        agent, _ = ppo.train(toy(), **SMALL, seed=seed)
        ppo.evaluate(agent, 40)
        runs.append(Toy.seeds)
    assert runs[1] == runs[2]
    assert len({*runs[0], *runs[1]}) == 2 * (2 + 40)


# G  The command line and the README ----------


@pytest.fixture
def run(capsys):
    """Run a command line, check its exit status, return what it printed."""

    def run(command, status=0, flags=SMALL_FLAGS):
        with pytest.raises(SystemExit) as stopped:
            sys.exit(ppo.main([*flags, *command.split()]))
        assert stopped.value.code == status
        out, err = capsys.readouterr()
        assert re.fullmatch("ppo.py: .*\n" if status == 2 else "", err)
        return out + err

    return run


toy(gym.spaces.Sequence(BOX), name="Words-v0")
toy(BOX, gym.spaces.MultiBinary(3), name="Bits-v0")
REFUSED = [
    ("--lr nan", "lr must be"),
    ("--gamma 1.01", "gamma must be"),
    ("--epochs many", "--epochs"),
    ("--objective ppo", "pg, is, trpo, kl or clip"),
    ("--env HalfCheetah-v3", "v3"),
    ("--env Mine-v0", "module:Name-v0"),
    ("--env missing:Mine-v0", "'missing'"),
    ("--env .x:Y", ".x:Y"),
    ("--env Words-v0", "observations .*Sequence"),
    ("--env Bits-v0", "actions .*MultiBinary"),
    ("--render", "pygame"),
    ("--play missing.npz", "missing.npz"),
    ("--load pole.npz --hidden 32", "pole.npz .*not fit"),
    ("--save missing/p.npz", "missing/p.npz"),
    ("--save pole.npz --log missing/run.csv", "missing/run.csv"),
    ("--load pole.npz --log ./pole.npz", "--log"),
]


@pytest.mark.parametrize(("command", "clue"), REFUSED)
def test_what_cannot_work_is_refused_at_once(command, clue, run, monkeypatch):
    """One line says what to change, before anything is printed or written. All is closed."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    ppo.save("pole.npz", ppo.new_agent(seed=9))
    assert re.fullmatch(f"ppo.py: .*{clue}.*\n", run(command, status=2))
    assert os.listdir() == ["pole.npz"]
    assert ppo.load("pole.npz").settings.seed == 9
    assert Toy.num_open == 0


ERRORS = [FloatingPointError, MemoryError, gym.error.Error, ImportError, BrokenPipeError]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_of_an_environment_keep_their_traceback(error, run):
    """What its constructor or a step raises comes out of main."""

    def broken(*args, **kwargs):
        raise error("a bug")

    for method in ["__init__", "step"]:
        with pytest.raises(error, match="a bug"):
            run(f"--env {toy(**{method: broken})}")


@pytest.mark.parametrize("line", ["import gymnasium as", "import forgotten"])
def test_an_unfinished_module_keeps_its_traceback(line, run):
    """It is the user's, although Gymnasium imports it."""
    Path("unfinished.py").write_text(line)
    with pytest.raises((SyntaxError, ModuleNotFoundError), match="unfinished.py|forgotten"):
        run("--env unfinished:Mine-v0")


def test_a_terminal_shows_progress_before_the_first_row(run, monkeypatch):
    """A live line shows steps, speed and time left. All is ASCII."""
    clock = iter(range(10**6))  # each look takes a second
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out = run("")
    assert "4 steps, 2 steps/s, 14 s left" in out.split("mean_return")[0]
    assert (out + run("--help")).isascii()


def test_a_run_prints_and_logs_what_it_does(run):
    """About twenty rows are printed, the last among them. The log has all 80."""
    env = toy(reward=lambda env, action: 0.00041237)
    out = run(f"--env {env} --total-steps 1280 --log run.csv")
    rows = re.findall(r"^ +[\d,]+ +\d+ +0\.004124 .*", out, re.M)
    assert 19 <= len(rows) <= 22
    assert rows[-1].split()[0] == "1,280"
    assert "\ngreedy evaluation over 2 episodes: mean 0.004124, std 0," in out
    header, *rows = Path("run.csv").read_text().splitlines()
    assert header == "steps,episodes,mean_return,kl,clipped,entropy,explained"
    assert [row.split(",")[0] for row in rows] == [str(16 * i) for i in range(1, 81)]


COMMANDS = [
    "--env FrozenLake-v1 --total-steps 1024 --num-envs 16 --normalize-steps 1",
    "--env Pendulum-v1 --total-steps 600 --num-steps 50 --log-std-init -0.25 --hidden 9 9",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_first_line_repeats_a_run_and_a_file_its_last(command, run):
    """Its flags are what was chosen or is no default. --play says what the run said."""
    first, *others = run(f"{command} --eval-episodes 2 --save p.npz", flags=[]).splitlines()
    again = run(first.removeprefix("python ppo.py"), flags=[]).splitlines()
    *rows, _, saved, last = others
    assert [first, *rows, last] == [*again[:-2], again[-1]]
    assert run("--play p.npz", flags=[]) == last + "\n"
    command = "--load p.npz --epochs 3"
    assert run(command, flags=[]).startswith(f"python ppo.py {command}\n")
    assert f"--lr {ppo.load('p.npz').settings.lr}" in first


def test_the_curve_has_round_ticks(capsys):
    """They are 1, 2 or 5 times a power of ten apart."""
    for end in (25, 50):
        ppo.print_curve([(10, 10), (end, end)])
    ticks = re.findall(r"(\d+) [|+]", capsys.readouterr().out)
    assert [int(tick) for tick in ticks] == [*range(24, 8, -2), *range(50, 0, -10)]


def test_a_warm_start_learns_on():
    """Policy, critic and statistics are the file's, and log_std_init is of a new policy.

    Random numbers go on, so that episodes are new, unless a seed is chosen.
    """
    env = toy(BOX, BOX)
    trained, _ = ppo.train(env, **SMALL)
    ppo.save("p.npz", trained)
    for chosen, are_new in [(dict(), True), (dict(seed=1), True), (dict(seed=0), False)]:
        agent = ppo.load("p.npz", log_std_init=9, **chosen)
        assert_equal(ppo.arrays_of(agent), ppo.arrays_of(trained))
        next(ppo.learn(agent, ppo.make_envs(env, 2)))
        assert (Toy.seeds[-2:] != Toy.seeds[:2]) == are_new
    assert ppo.load("p.npz").rng.random() == trained.rng.random()


def test_a_full_disk_leaves_the_earlier_file(monkeypatch):
    """Half a file is removed. Another process writes its own."""

    def fail(path, **arrays):
        assert str(os.getpid()) in path
        Path(path).write_text("half")
        raise OSError("No space left on device")

    agent = ppo.new_agent()
    ppo.save("p.npz", agent)
    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space"):
        ppo.save("p.npz", agent)
    assert os.listdir() == ["p.npz"]
    ppo.load("p.npz")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_files_that_are_no_policies_are_refused(run):
    """In one line that names another version as a cause. Nothing in them runs."""
    ppo.save("good.npz", ppo.new_agent())
    with np.load("good.npz") as file:
        good = dict(file)
    Path("run.csv").write_text("steps,episodes\n16,1\n")
    np.savez("bomb.npz", **good | {"state": np.array([Bomb()], object)})
    np.savez("nan.npz", **good | {"phi": np.nan * good["phi"]})
    np.savez("newer.npz", **good | {"state": str(good["state"]).replace("seed", "spin")})
    for name in {*os.listdir()} - {"good.npz"}:
        assert re.search(f"{name}.* version", run(f"--load {name}", status=2))
    assert not os.path.exists("exploded")


def test_an_interrupted_run_keeps_its_policy(run):
    """Ctrl-C in the third rollout: status 130, curve printed, no evaluation, policy saved."""

    def reward(env, action):
        if len(Toy.transitions) == 40:
            raise KeyboardInterrupt
        return len(Toy.transitions)

    env = toy(limits=(7,), reward=reward)
    out = run(f"--env {env} --total-steps 100 --save p.npz", status=130)
    assert re.search(r"---\n +16 +32 steps\n", out)
    assert "greedy" not in out
    _, _, count = ppo.load("p.npz").obs_moments
    assert_equal(count, 14 + 14)  # each rollout of 16 steps has two resets


def test_a_run_that_diverges_keeps_its_policy(run):
    """One line says so. The file has a policy from before."""
    assert "try a smaller lr" in run("--env Pendulum-v1 --lr 1e12 --save p.npz", status=2)
    ppo.load("p.npz")


def test_render_shows_episodes(run):
    """The evaluation is shown. Five episodes are usual."""
    env = toy(reward=lambda env, action: float(env.render_mode == "human"))
    last = "greedy evaluation over 2 episodes: mean 10, std 0, min 10, max 10\n"
    assert run(f"--env {env} --save p.npz --render").endswith("\n" + last)
    assert run("--play p.npz --render", flags=[]) == last.replace("2 episodes", "5 episodes")
    assert "render mode" in run(f"--env {toy(metadata={})} --render", status=2)


def test_importing_sets_one_thread_unless_you_did(monkeypatch):
    """Small networks run fastest on one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    runpy.run_path(ppo.__file__)
    assert os.environ.pop("OMP_NUM_THREADS") == "2"
    runpy.run_path(ppo.__file__)
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_a_reader_may_leave_early():
    """python ppo.py | head -1 ends quietly."""
    argv = [sys.executable, ppo.__file__, *SMALL_FLAGS, "--total-steps=5000"]
    command = shlex.join(argv) + " | head -1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert process.stdout.startswith("python ppo.py")
    assert process.stderr == ""


def test_the_python_of_the_readme_runs(run):
    """They run in their order. Environments go into my_module.py, too."""
    run("--save policy.npz --log run.csv")
    readme = Path(ppo.__file__).with_name("README.md").read_text(encoding="utf-8")
    small = re.sub(r"total_steps=[\d_]+", "total_steps=2_000", readme)
    namespace = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```", small, re.M | re.S):
        if "gym.register(" in code:
            with open("my_module.py", "a", encoding="utf-8") as module:
                module.write(code)
        exec(code, namespace)
    for env in set(re.findall(r"my_module:[\w-]+", readme)):
        run(f"--env {env}")
