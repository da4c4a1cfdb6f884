# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26", "pytest", "hypothesis"]
# ///
"""The lecture's second half: what each formula claims, checked on ppo.py's own functions.

    python test_ppo.py -k eq9_

A  The lecture            Eq. 1 to 19, in worlds small enough to be exact
B  The gradients          written by hand, against finite differences
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
import copy
import dataclasses
import inspect
import io
import math
import os
import pickle
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

pytestmark = pytest.mark.filterwarnings("ignore:.*latest versioned", "ignore:.*[Aa]utoreset")

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
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (obs_dim,))
        self.single_action_space = action_space
        self.num_envs = 3
        self.t = 0
        self.unwrapped = self

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
    records = list(ppo.learn(agent, Script()))
    # Inputs are the observations, then normalised as what was seen first, and clipped.
    seen = Script.obs[:3][Script.is_transition[:3]]
    inputs = [Script.obs[:4], ((Script.obs[3:6] - seen.mean()) / seen.std()).clip(-10, 10)]
    return records, judged, learned, inputs


def test_eq2_mean_return_of_the_episodes(played):
    """R(τ) adds up an episode's rewards, over rollouts too. Each episode counts once."""
    returns = [100, 1 + 2, 10 + 20 + 30]
    [first, second], _, _, _ = played
    assert [first["steps"], first["episodes"]] == [9, 3]
    assert first["mean_return"] == pytest.approx(np.mean(returns))
    assert [second["steps"], second["episodes"]] == [15, 4]
    assert second["mean_return"] == pytest.approx(np.mean([*returns, 200 + 300 + 400]))


def test_eq19_learn_judges(played):
    """gae gets scaled rewards, and the value of every state that was seen, the last ones too."""
    _, judged, _, inputs = played
    # Rewards are divided by the deviation of the discounted sums so far. Resets do not count.
    sums = [1, 2.5, 10, 25, 42.5, 100, 200]
    more = [3, 5.5, 40, 300 + 200 / 2, 400 + 300 / 2 + 200 / 4]
    deviations = [np.std(sums), np.std(sums + more)]
    for i, rows in enumerate([slice(0, 3), slice(3, 5)]):
        call = judged[i]
        assert_allclose(call["rewards"], Script.rewards[rows] / deviations[i], rtol=1e-4)
        assert_allclose(call["values"], 2 * inputs[i][:, :, 0] + 1, rtol=1e-4)
        assert_array_equal(call["terminated"], Script.terminated[rows])
        assert_array_equal(call["truncated"], Script.truncated[rows])
        assert [call["gamma"], call["lam"]] == [0.5, 0.8]


def test_eq18_eq19_learn_learns(played):
    """update gets the rows that are no resets, with Â from gae and R̂ = Â + V."""
    _, judged, learned, inputs = played
    for i, rows in enumerate([slice(0, 3), slice(3, 5)]):
        call = learned[i]
        is_transition = Script.is_transition[rows]
        x = inputs[i][:-1][is_transition]
        advantages = judged[i]["result"][is_transition]
        assert_allclose(call["inputs"], x, rtol=1e-4)
        assert_array_equal(call["actions"], x[:, 0] > 0)
        assert_array_equal(call["advantages"], advantages)
        # Eq. 18   R̂ = Â + V_φ_k(s)
        assert_allclose(call["returns"], advantages + 2 * x[:, 0] + 1, rtol=1e-4)
        assert call["remaining"] == [1, 5 / 14][i]


both_spaces = pytest.mark.parametrize("space", [TWO, BOX], ids=POLICIES)


def test_eq14_trpo_measures_kl_without_entropy_bonus(monkeypatch):
    """The bonus belongs to the surrogate. With it, the KL would not be a distance."""
    losses = watch(monkeypatch, "actor_loss")
    list(ppo.learn(an_agent(objective="trpo", ent_coef=0.3), Script()))
    kinds = {(call["objective"].__name__, call["ent_coef"] > 0) for call in losses}
    assert kinds == {("importance_sampling", True), ("kl_divergence", False)}


@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_eq19_update(space, objective, rng):
    """Three epochs of one minibatch, written out for a twin, with 0.2 of the run still to come."""
    chosen = dict(epochs=3, lr=0.1, actor_lr=0.05, max_grad_norm=0.01, ent_coef=0.3, clip=0.1)
    agent = an_agent(space, objective=objective, kl_target=1e-3, **chosen)
    agent.beta = 0.7
    twin = copy.deepcopy(agent)
    inputs = rng.standard_normal((12, 1), np.float32)
    advantages, returns = rng.normal(5, [[2], [9]], (2, 12)).astype(np.float32)
    policy, _ = ppo.policy_forward(twin.actor, inputs)
    actions = policy.sample(rng)
    log_prob_old, _ = policy.log_prob(actions)
    record = ppo.update(agent, inputs, actions, advantages, returns, remaining=0.2)

    # Eq. 6   the mean is a baseline
    normalized = (advantages - advantages.mean()) / advantages.std()
    data = [inputs, actions, log_prob_old, normalized]
    own = {"kl": partial(ppo.kl_penalty, beta=0.7), "clip": partial(ppo.clip, epsilon=0.1)}
    loss = (OBJECTIVES | own).get(objective)
    if objective == "trpo":
        ppo.trpo(twin.theta, twin.actor_shapes, 0.3 * 0.2, data, delta=1e-3)
    else:
        for _ in range(1 if objective == "pg" else 3):  # Eq. 10
            _, gradient = ppo.actor_loss(twin.actor, loss, 0.3 * 0.2, *data)
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
    for layer, squared_length in enumerate([2, 2, 1]):
        W = params[2 * layer]
        product = W.T @ W if W.shape[0] >= W.shape[1] else W @ W.T
        assert_allclose(product, squared_length * np.eye(len(product)), atol=1e-6)
        assert not params[2 * layer + 1].any()
    positive = np.mean([ppo.init_mlp([3, 2], rng)[0] > 0 for _ in range(1000)], axis=0)
    assert_allclose(positive, 0.5, atol=0.07)


def test_log_prob_of_known_policies():
    """It is right even where exp would overflow."""
    policy = ppo.Categorical(np.array([[1e4, 1e4, -1e4], np.log([1, 2, 5])]))
    log_prob, _ = policy.log_prob(np.array([1, 2]))
    assert_allclose(log_prob, np.log([1 / 2, 5 / 8]))
    assert policy.mode()[1] == 2
    # log N(1 | 0, 2²) = -½ (1/2)² - log 2 - ½ log 2π
    log_prob, _ = ppo.Gaussian(np.zeros((1, 1)), np.log([2.0])).log_prob(np.ones((1, 1)))
    assert_allclose(log_prob, -1 / 8 - np.log(2) - 0.9189385332046727)


def test_clip_by_global_norm():
    """Longer gradients are scaled down, shorter ones stay. What is not finite does not vanish."""
    assert_allclose(ppo.clip_by_global_norm(np.array([3.0, 4.0]), 1.0), [0.6, 0.8])
    assert_array_equal(ppo.clip_by_global_norm(np.array([3.0, 4.0]), 5.0), [3, 4])
    assert np.isnan(ppo.clip_by_global_norm(np.array([np.nan, 1.0]), 5.0)).any()


def test_adam():
    """Three steps, as the paper writes them, for gradients of ordinary size and tiny ones."""
    theta = np.array([7.0, 7.0])
    adam = ppo.Adam(theta)
    wanted = theta.copy()
    m = 0
    v = 0
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
        lambda: ppo.Gaussian(column, np.zeros(1)).log_prob(np.zeros(16)),
        lambda: ppo.Categorical(np.zeros((16, 3))).log_prob(column),
        lambda: ppo.critic_loss([np.ones((1, 1)), np.zeros(1)], column, column),
        lambda: loss(inputs, actions, log_prob_old, column),
        lambda: loss(inputs, actions, log_prob_old[:1], log_prob_old),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="must be"):
            call()


BROKEN = [("obs", 0, np.nan), ("obs", 6, np.inf), ("rewards", 5, -np.inf)]


@pytest.mark.parametrize(("name", "t", "number"), BROKEN)
def test_a_rollout_must_be_finite(name, t, number):
    """Observations are checked, the first and the last too, and rewards."""
    envs = Script()
    setattr(envs, name, getattr(Script, name).astype(float))
    getattr(envs, name)[t, 1] = number
    with pytest.raises(FloatingPointError, match="not finite"):
        ppo.rollout(envs, lambda obs: obs, envs.obs[0], 6)


SECTIONS = Path(ppo.__file__).read_text(encoding="utf-8").split("\n# §")
DEFINITIONS = ast.parse("\n# ".join(["", *SECTIONS[1:8], SECTIONS[9]])).body  # §1-§7 and §9


@pytest.mark.parametrize("scale", [0, 1e-6, 1e6])
@pytest.mark.parametrize("objective", ["pg", "is", "trpo", "kl", "clip"])
@both_spaces
def test_each_definition_runs_alone_and_keeps_float32(space, objective, scale, monkeypatch):
    """Each definition of §1-§7 and §9, pasted with those that it names, carries learn in float32.

    No number overflows, for constant, tiny and huge rewards.
    """
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
    hidden = (4,) if scale > 0 else ()  # a table, in which all values are 0
    agent = an_agent(space, objective=objective, minibatch_size=1, hidden=hidden)
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


def test_a_seed_gives_the_same_run_bit_for_bit():
    """Another seed gives another run."""
    first, _ = ppo.train(**SMALL, seed=1)
    again, _ = ppo.train(**SMALL, seed=1)
    other, _ = ppo.train(**SMALL, seed=2)
    assert_array_equal(first.theta, again.theta)
    assert (first.theta != other.theta).any()


def test_a_copy_of_an_agent_learns_on():
    """Copied or pickled in the middle of its life, it learns what the original learns."""
    agent = an_agent(BOX)
    list(ppo.learn(agent, Script()))
    twins = [copy.deepcopy(agent), pickle.loads(pickle.dumps(agent))]
    records = list(ppo.learn(agent, Script()))
    assert records[0]["kl"] > 0
    for twin in twins:
        assert list(ppo.learn(twin, Script())) == records
        assert_array_equal(twin.theta, agent.theta)


def test_fit_shows_every_row_once_an_epoch():
    """Minibatches have equal sizes, at most B. Each epoch has another order. Rows stay whole."""
    seen = []

    def loss(x, y):
        assert_array_equal(x, -y)
        seen.append(x)
        return 0, np.zeros(2)

    rows = np.arange(10)
    agent = an_agent(epochs=3, minibatch_size=4)
    ppo.fit(agent, ppo.Adam(np.zeros(2)), loss, [rows, -rows], lr=0.1)
    assert [len(x) for x in seen] == [4, 3, 3] * 3
    epochs = np.concatenate(seen).reshape(3, 10)
    assert_array_equal(np.sort(epochs), [rows, rows, rows])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_statistics_of_observations(rng):
    """After normalize_steps steps a component keeps them, unless more than 1 % of the rows leave
    ten deviations. Then it gets those of all that was seen."""
    early = rng.normal([50, -30], [2, 1], (1000, 2))
    late = early.copy()
    far = early.mean(axis=0) - 10.5 * early.std(axis=0)
    late[:11, 0] = far[0]
    late[:10, 1] = far[1]
    seen = np.vstack([early, late])
    agent = an_agent(obs_dim=2, normalize_steps=1000)
    agent.observe(early)
    assert_allclose([agent.obs_mean, agent.obs_std], [early.mean(axis=0), early.std(axis=0)])
    agent.observe(late)
    assert_allclose(agent.obs_mean, [seen[:, 0].mean(), early[:, 1].mean()])
    assert_allclose(agent.obs_std, [seen[:, 0].std(), early[:, 1].std()])
    assert_array_equal(agent.normalize(np.array([[1e9, -1e9]])), [[10, -10]])
    agent = an_agent(obs_dim=2, normalize_steps=0)
    agent.observe(seen)
    assert_allclose(agent.normalize(seen), seen, rtol=1e-6)


def test_large_offsets_cost_no_digits(monkeypatch):
    """Observations of float64 with an offset of 1e8, where float32 has steps of 8, stay apart."""
    learned = watch(monkeypatch, "update")
    for offset in (0, 1e8):
        envs = Script()
        envs.obs = Script.obs.astype(np.float64) + offset
        list(ppo.learn(an_agent(), envs))
    _, plain, _, shifted = [call["inputs"] for call in learned]
    assert_allclose(shifted, plain, atol=1e-6)


def test_the_mean_return_is_that_of_the_last_hundred_episodes(monkeypatch):
    """Before the first one ends it is nan. A reward beyond ten deviations is not clipped."""
    judged = watch(monkeypatch, "gae")
    returns = [*range(1, 120), 1e6]
    envs = Script()
    envs.num_envs = 1
    envs.obs = np.zeros((249, 1, 1), np.float32)
    envs.rewards = np.zeros((248, 1))
    envs.rewards[9::2, 0] = returns
    envs.terminated = envs.rewards > 0  # the steps between are resets
    envs.truncated = envs.rewards < 0
    records = list(ppo.learn(an_agent(num_steps=1, total_steps=248, gamma=0, epochs=1), envs))
    assert np.isnan(records[0]["mean_return"])
    assert [records[-1]["steps"], records[-1]["episodes"]] == [248, 120]
    assert records[-1]["mean_return"] == pytest.approx(np.mean(returns[-100:]))
    deviation = np.std([*np.zeros(9), *returns])
    assert judged[-1]["rewards"].max() == pytest.approx(1e6 / deviation)


@pytest.mark.parametrize("name", ["theta", "phi", "obs_std"])
def test_a_run_that_diverges_stops(name):
    """A parameter or statistic that is not finite ends the run."""
    agent = an_agent()
    learning = ppo.learn(agent, Script())
    next(learning)
    getattr(agent, name)[0] = np.inf
    with pytest.raises(FloatingPointError, match="diverged before step 18"):
        next(learning)


# E  The ends of episodes --------------------------------------------


class Toy(gym.Env):
    """Random observations of any space, and reward 1 for every legal action.

    Its episodes end truly after a number of steps in ends, or at a time limit after one in limits.
    """

    metadata = {"render_modes": ["human"], "render_fps": 50}
    transitions = []  # observation and action of every step
    seeds = []  # every seed that reset received

    def __init__(self, spaces, ends=(), limits=(10,), render_mode=None):
        self.observation_space, self.action_space = spaces
        self.ends = ends
        self.limits = limits
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
            Toy.seeds.append(seed)
        self.t = 0
        self.length = self.np_random.choice([*self.ends, *self.limits])
        self.obs = self.observe()
        return self.obs, self.info(0)

    def step(self, action):
        assert self.action_space.contains(np.asarray(action)), action
        Toy.transitions.append((self.obs, action))
        reward = self.reward(action)
        self.t += 1
        self.obs = self.observe()
        is_over = self.t == self.length
        terminated = is_over and self.length in self.ends
        truncated = is_over and self.length in self.limits
        return self.obs, reward, terminated, truncated, self.info(action)

    def observe(self):
        return self.observation_space.sample()

    def reward(self, action):
        return 1.0

    def info(self, action):
        return {}


def toy(obs_space=BOX, action_space=THREE, env=Toy, name="Toy-v0", **kwargs):
    """Register such an environment, and return its name."""
    gym.registry.pop(name, None)
    gym.register(name, env, kwargs={"spaces": (obs_space, action_space), **kwargs})
    return name


SMALL = dict(num_envs=2, num_steps=8, minibatch_size=8, total_steps=32, eval_episodes=2)


def run(command, capsys, status=0):
    """Run a command line with these settings, check its exit status, return what it printed."""
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(ppo.main([*small, *command.split()]))
    assert stopped.value.code == status
    out, err = capsys.readouterr()
    assert re.fullmatch("ppo.py: .*\n" if status == 2 else "", err)
    return out, err


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
    assert values.mean() * agent.return_stats.var**0.5 == pytest.approx(value, rel=0.03)


@pytest.mark.parametrize(("num_envs", "num_steps"), [(3, 17), (2, 1)])
def test_every_transition_is_learned_from_once(num_envs, num_steps, monkeypatch):
    """No reset is. The action is the sample, of which the environment received twice as much."""
    update = ppo.update
    learned = []

    def watched_update(agent, inputs, actions, *rest, **more):
        assert len(actions) > 0  # some rollouts of one step consist of resets only
        learned.extend(np.hstack([inputs, (2 * actions).clip(-2, 2)]).tolist())
        return update(agent, inputs, actions, *rest, **more)

    monkeypatch.setattr(ppo, "update", watched_update)
    Toy.transitions = []
    env = toy(BOX, gym.spaces.Box(-2, 2, (2,)), ends=(2, 4, 6), limits=(1, 3, 5, 7))
    chosen = dict(num_envs=num_envs, num_steps=num_steps, normalize_steps=0, log_std_init=0.0)
    ppo.train(env, total_steps=459, **chosen)
    played = [[*obs.tolist(), *action.tolist()] for obs, action in Toy.transitions]
    assert len(played) > 300
    assert sorted(learned) == sorted(played)


# F  The tasks -------------------------------------------------------

OBSERVATIONS = [
    gym.spaces.Box(0, 255, (3,), np.uint8),
    gym.spaces.Box(-1, 1, (2,), np.int8),
    gym.spaces.Box(0, 1, (), np.float64),
    gym.spaces.Box(0, 255, (4, 4, 3), np.uint8),
    gym.spaces.Dict(a=gym.spaces.Text(5), b=gym.spaces.Dict(c=BOX)),
    gym.spaces.Tuple([THREE, THREE]),
    gym.spaces.MultiDiscrete([3, 2]),
    gym.spaces.MultiBinary(3),
    gym.spaces.Discrete(5, start=-2),
]


@pytest.mark.parametrize("action_space", [THREE, gym.spaces.Box(0, 50, (2,))], ids=str)
@pytest.mark.parametrize("observation_space", OBSERVATIONS, ids=str)
def test_spaces(observation_space, action_space):
    """All that can be flattened is observed. Discrete with Discrete actions is a table."""
    agent, _ = ppo.train(toy(observation_space, action_space), **SMALL)
    is_table = isinstance(observation_space, gym.spaces.Discrete) and action_space == THREE
    assert (len(agent.actor) == 2) == is_table
    assert (agent.settings.hidden == ()) == is_table
    Toy.transitions = []
    assert_array_equal(ppo.evaluate(agent), [10, 10])
    for obs, action in Toy.transitions:
        assert_allclose(agent.act(obs), action, rtol=1e-4)


def test_xor_of_two_bits_is_learned(monkeypatch):
    """It needs a hidden layer: the best linear policy gets 7.5 of 10."""
    monkeypatch.setattr(Toy, "reward", lambda env, action: float(action == env.obs[0] ^ env.obs[1]))
    env = toy(gym.spaces.MultiBinary(2), TWO)
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
    (THREE, [0, 5, 1], 1),
    (INT32, [0, 5, 1], 8),
    (gym.spaces.Box(-1, 3, (2, 2), np.float64), [0.5, -3, 7, 0.25], [[2, -1], [3, 1.5]]),
    (gym.spaces.Box(LOW, HIGH), [0.5, -9, 9, -9], [0.25, 0, 9, -9]),
    (gym.spaces.Box(0, 255, (), np.uint8), [0.999], 255),
    (gym.spaces.Box(-5, 5, (3,), np.int64), [0.5, -0.5, 0.55], [2, -2, 3]),
    (gym.spaces.Box(-np.inf, np.inf, (2,), np.int64), [1, -1], [1, -1]),
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
    """Chosen wins over the task, the task over its kind, the kind over the default."""
    for env in ["Pendulum-v1", "Pendulum", "gymnasium.envs.classic_control:Pendulum-v1"]:
        chosen = ppo.new_agent(env, lam=0.125).settings
        assert chosen.lam == 0.125
        assert chosen.lr == 1e-3  # the task's
        assert chosen.gamma == 0.99  # that of its kind
        assert chosen.clip == 0.2  # the default


def test_what_is_wrong_in_python_is_said():
    """And what to write instead."""
    with pytest.raises(ValueError, match=r"is_slippery.*gym\.register"):
        ppo.train("FrozenLake-v1", is_slippery=False)
    with pytest.raises(ValueError, match="env must be a name, CartPole-v1"):
        ppo.train(gym.make("CartPole-v1"))
    with pytest.raises(ValueError, match="hidden must be a list"):
        ppo.train(hidden=64)
    agent = ppo.new_agent("CartPole-v1")
    for obs in [np.zeros(3), np.zeros((1, 4)), 0.0]:
        with pytest.raises(ValueError, match=r"an observation must be \(4,\)"):
            agent.act(obs)
    with pytest.raises(ValueError, match="must be"):
        agent.policy(np.zeros((5, 1)))


def test_what_comes_late_in_an_episode_is_seen(monkeypatch):
    """A number that leaves ±10 gets new statistics. Others keep those of the first rollout."""

    def observe(env):
        return np.array([env.np_random.normal(), max(env.t - 200, 0)], np.float32)

    monkeypatch.setattr(Toy, "observe", observe)
    env = toy(gym.spaces.Box(-np.inf, np.inf, (2,)), limits=(300,))
    obs = np.array([[1, 0], [1, 50], [1, 100]])
    first, _ = ppo.train(env, num_envs=2, num_steps=64, total_steps=128)
    assert_array_equal(first.normalize(obs)[:, 1], [0, 10, 10])
    last, _ = ppo.train(env, num_envs=2, num_steps=64, total_steps=1280)
    assert_array_equal(last.normalize(obs)[:, 0], first.normalize(obs)[:, 0])
    assert np.diff(last.normalize(obs)[:, 1]).min() > 0.5


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


class Uneven(gym.vector.VectorEnv):
    """Reward 1 for ever. Episodes of environment i have i + shortest steps."""

    def __init__(self, num_envs, shortest=1):
        self.num_envs = num_envs
        self.single_observation_space = BOX
        self.single_action_space = THREE
        self.action_space = gym.spaces.MultiDiscrete([3] * num_envs)
        self.lengths = np.arange(num_envs) + shortest
        self.obs = np.zeros((num_envs, 2), np.float32)

    def reset(self, *, seed=None, options=None):
        self.t = np.zeros(self.num_envs)
        return self.obs, {}

    def step(self, actions):
        is_reset = self.t == self.lengths
        self.t = np.where(is_reset, 0, self.t + 1)
        return self.obs, 1.0 - is_reset, self.t == self.lengths, self.t < 0, {}


gym.register("Uneven-v0", vector_entry_point=Uneven)
gym.register("Endless-v0", vector_entry_point=Uneven, kwargs={"shortest": np.inf})


def test_evaluation_plays_whole_episodes(capsys):
    """Each of ten environments plays one a round, to its end or to 100,000 steps, as is printed."""
    agent = ppo.new_agent("Uneven-v0")
    assert_array_equal(ppo.evaluate(agent, 13), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 3])
    agent = ppo.new_agent(toy(ends=(2000,), limits=()))
    assert_array_equal(ppo.evaluate(agent, 1), [2000])
    out, _ = run("--env Endless-v0 --hidden --normalize-steps 0", capsys)
    assert "greedy evaluation over 2 episodes: mean 100,000, std 0," in out
    assert "2 cut off after 100,000 steps" in out


class Single(Toy):
    """A simulator of which only one may exist at a time."""

    exists = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        assert not Single.exists
        Single.exists = True

    def close(self):
        Single.exists = False


def test_no_more_environments_than_num_envs_are_open(capsys):
    """With --num-envs 1 there is one at a time, in the evaluation, too."""
    run(f"--env {toy(env=Single)} --num-envs 1", capsys)
    assert not Single.exists


def test_seeds_of_environments():
    """They are below 2**31, depend on --seed, and are others in the evaluation."""
    runs = []
    for seed in [0, 2**32 - 1, 2**32 - 1]:
        Toy.seeds = []
        agent, _ = ppo.train(toy(), **SMALL, seed=seed)
        ppo.evaluate(agent, 40)
        runs.append(Toy.seeds)
    assert runs[1] == runs[2]
    different = {*runs[0], *runs[1]}
    assert len(different) == 2 * (2 + 40)
    assert max(different) < 2**31


INFOS = [
    lambda env, action: {"growing": np.arange(env.t)},
    lambda env, action: {"number or text": 3.0 if env.t % 2 else "none"},
    lambda env, action: {"of two shapes": np.zeros(action + 1)},
    lambda env, action: {"number or None": None if action else 1},
]


@pytest.mark.parametrize("info", INFOS)
def test_info_may_be_anything(info, monkeypatch):
    """ppo.py never reads it, so Gymnasium does not collect it."""
    monkeypatch.setattr(Toy, "info", info)
    _, history = ppo.train(toy(), **SMALL)
    assert history[-1]["mean_return"] == 10


# G  The command line and the README ---------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)


def printed_steps(out):
    """Return the first column of the rows that a run printed."""
    rows = re.findall(r"^ +([\d,]+)(?: +\S+){6}$", out, re.M)
    return [int(steps.replace(",", "")) for steps in rows]


ROOT = Path(ppo.__file__).parent
toy(BOX, gym.spaces.MultiBinary(3), name="Wide-v0")


@pytest.mark.parametrize(
    ("command", "clue"),
    [
        ("--num-envs 0", "num_envs must be"),
        ("--gamma 1.01", "gamma must be"),
        ("--seed 4294967296", "seed must be"),
        ("--hidden 64 0", "hidden must be"),
        ("--lr nan", "lr must be"),
        ("--epochs many", "--epochs"),
        ("--num-envs 1 --num-steps 1", "2 or more"),
        ("--objective ppo", "pg, is, trpo, kl or clip"),
        ("--env CartPole-v9", "v1"),
        ("--env Mine-v0", "module:Name-v0"),
        ("--env a:b:c", "a:b:c"),
        ("--env Wide-v0", "MultiBinary(3)"),
        ("--env HalfCheetah-v3", "-v3"),
        ("--play missing.npz", "missing.npz"),
        ("--play pole.npz --env Acrobot-v1", "does not fit Acrobot-v1"),
        ("--play pole.npz --save p.npz", "--play only"),
        ("--play pole.npz --load p.npz", "--play only"),
        ("--play pole.npz --log run.csv", "--play only"),
        ("--save=", "name"),
        ("--save missing/", "missing/"),
        ("--save missing/p.npz", "missing/p.npz"),
        ("--log missing/run.csv", "missing/run.csv"),
        ("--save p.npz --log p.npz", "of its own"),
        ("--render", "pygame"),
    ],
)
def test_what_cannot_work_is_refused_at_once(command, clue, folder, monkeypatch, capsys):
    """One line says what to change, before anything is printed or written."""
    monkeypatch.setitem(sys.modules, "pygame", None)  # as if it were not installed
    ppo.save("pole.npz", ppo.new_agent("CartPole-v1"))
    out, err = run(command, capsys, 2)
    assert clue in err
    assert out == ""
    assert os.listdir() == ["pole.npz"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyError])
def test_errors_of_an_environment_keep_their_traceback(error, monkeypatch, capsys):
    """The exception comes out of main, with its file and line."""

    def step(env, action):
        raise error("a bug")

    monkeypatch.setattr(Toy, "step", step)
    with pytest.raises(error, match="a bug"):
        run(f"--env {toy()}", capsys)


FLOATS = [f for f in dataclasses.fields(ppo.Settings) if f.type is float]
RANDOM = {f.name: st.floats(f.metadata["low"], f.metadata["high"]) for f in FLOATS}
RANDOM["seed"] = st.integers(0, 2**32 - 1)
RANDOM |= dict.fromkeys(["num_envs", "num_steps", "epochs", "minibatch_size"], st.integers(2, 6))
RANDOM["hidden"] = st.lists(st.integers(1, 6), max_size=3)
RANDOM["objective"] = st.sampled_from(["pg", "is", "trpo", "kl", "clip"])
RANDOM["env"] = st.sampled_from(["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.fixed_dictionaries(RANDOM))
def test_random_settings_keep_the_parameters_finite(chosen):
    """Two iterations with any valid settings end with finite parameters, or with an error."""
    total_steps = 2 * chosen["num_envs"] * chosen["num_steps"]
    try:
        with np.errstate(all="ignore"):
            agent, _ = ppo.train(**chosen, total_steps=total_steps)
    except FloatingPointError:
        return
    assert np.isfinite(agent.theta).all()
    assert np.isfinite(agent.phi).all()


def test_a_run_prints_and_logs_what_it_does(folder, monkeypatch, capsys):
    """Numbers have four significant digits. The log has a CSV row for each iteration."""
    monkeypatch.setattr(Toy, "reward", lambda env, action: 0.00041237)
    out, _ = run(f"--env {toy()} --log run.csv", capsys)
    assert out.startswith("Settings(env='Toy-v0', seed=0, total_steps=32, num_envs=2,")
    assert printed_steps(out) == [16, 32]
    assert re.search(r"^ +32 +2 +0\.004124 ", out, re.M)
    assert "\ngreedy evaluation over 2 episodes: mean 0.004124, std 0, min 0.004124" in out
    assert out.isascii()
    assert "\r" not in out  # for terminals
    rows = Path("run.csv").read_text().splitlines()
    assert rows[0] == "steps,episodes,mean_return,kl,clipped,entropy,explained"
    assert [row.split(",")[0] for row in rows[1:]] == ["16", "32"]


def test_standard_output_may_be_any_object(monkeypatch, capsys):
    """Notebooks and IDLE have their own. The help is ASCII, too."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    run("", capsys)
    assert printed_steps(out.getvalue()) == [16, 32]
    run("--help", capsys)
    assert out.getvalue().isascii()


def test_a_terminal_shows_progress_before_the_first_row(monkeypatch, capsys):
    """A live line shows steps, speed and time left from the first steps on."""

    def slow_reward(env, action):
        time.sleep(0.06)
        return 1.0

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(Toy, "reward", slow_reward)
    out, _ = run(f"--env {toy()}", capsys)
    before_the_rows = out.split("mean_return")[0]
    assert re.search(r"\d steps, \d+ steps/s, \d s left *\r", before_the_rows)


@pytest.mark.parametrize(("total_steps", "least"), [(3, 1), (63, 1), (5136, 19), (20_001, 19)])
def test_twenty_rows_and_the_last_are_printed(total_steps, least, capsys):
    """About twenty, if it has as many iterations."""
    out, _ = run(f"--num-envs 16 --num-steps 16 --total-steps {total_steps}", capsys)
    steps = printed_steps(out)
    assert total_steps <= steps[-1] < total_steps + 16
    assert least <= len(steps) <= 22


@pytest.mark.parametrize("env", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_a_policy_file_plays_as_the_run_ended(env, folder, capsys):
    """The last line of a run, of --play with its file, and evaluate say the same."""
    trained, _ = run(f"--env {env} --save p.npz", capsys)
    played, _ = run("--play p.npz", capsys)
    assert trained.endswith("\n" + played)
    mean = ppo.evaluate(ppo.load("p.npz")).mean()
    assert f"over 2 episodes: mean {mean:.4g} std" in played.replace(",", "")


def test_a_warm_start_learns_on(folder, monkeypatch):
    """Policy, critic and statistics are the file's, bit for bit. The learning rate starts again."""
    trained, _ = ppo.train(**SMALL)
    ppo.save("p.npz", trained)
    agent = ppo.load("p.npz", total_steps=64)
    assert_array_equal(agent.theta, trained.theta)
    assert_array_equal(agent.phi, trained.phi)
    assert_array_equal(agent.normalize(np.eye(4)), trained.normalize(np.eye(4)))
    np.testing.assert_equal(vars(agent.obs_stats), vars(trained.obs_stats))
    np.testing.assert_equal(vars(agent.return_stats), vars(trained.return_stats))

    rates = []
    monkeypatch.setattr(ppo.Adam, "step", lambda adam, gradient, lr: rates.append(lr))
    history = list(ppo.learn(agent, ppo.make_envs("CartPole-v1", 2)))
    assert len(history) == 4
    assert rates[0] == 2e-3
    assert rates[-1] == 2e-3 / 4


SAVE_OFTEN = """
import ppo
agent = ppo.new_agent()
for _ in range(200):
    ppo.save("p.npz", agent)
"""


def test_two_processes_save_to_one_file(folder, monkeypatch):
    """Neither fails, and what is left is one whole file."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = [subprocess.Popen([sys.executable, "-c", SAVE_OFTEN]) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert os.listdir() == ["p.npz"]
    ppo.load("p.npz")


def test_a_full_disk_leaves_the_earlier_file(folder, monkeypatch, capsys):
    """A save that fails half-way is reported in one line, and leaves no other file."""
    ppo.save("p.npz", ppo.new_agent())
    before = Path("p.npz").read_bytes()

    def savez(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    _, err = run("--load p.npz --save p.npz", capsys, 2)
    assert "No space left on device" in err
    assert Path("p.npz").read_bytes() == before
    assert os.listdir() == ["p.npz"]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("flag", ["--play", "--load"])
def test_files_that_are_no_policies_are_refused(flag, folder, capsys):
    """In one line, and nothing in them is executed."""
    ppo.save("good.npz", ppo.new_agent())
    with np.load("good.npz") as file:
        good = dict(file)
    Path("text.npz").write_text("no policy")
    Path("truncated.npz").write_bytes(Path("good.npz").read_bytes()[:9999])
    Path("pickle.npz").write_bytes(pickle.dumps(Bomb()))
    np.savez("bomb.npz", **good | {"settings": np.array([Bomb()], object)})
    np.savez("shape.npz", **good | {"theta": good["theta"][:9]})
    np.savez("nan.npz", **good | {"phi": np.nan * good["phi"]})
    for name in {*os.listdir()} - {"good.npz"}:
        _, err = run(f"{flag} {name}", capsys, 2)
        assert name in err
    assert not os.path.exists("exploded")


@pytest.mark.parametrize(("name", "call"), [("rollout", 3), ("critic_loss", 30)])
def test_an_interrupted_run_keeps_its_policy(name, call, folder, monkeypatch, capsys):
    """Ctrl-C in the third iteration: status 130, curve printed, no evaluation, policy saved."""
    function = getattr(ppo, name)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*args)

    monkeypatch.setattr(ppo, name, interrupted)
    command = f"--env {toy(limits=(8,))} --total-steps 100000 --save p.npz"
    out, _ = run(command, capsys, 130)
    assert "mean return over 16 to 32 steps" in out
    assert "greedy" not in out
    assert ppo.load("p.npz").obs_stats.count == 16 + 14  # the second rollout has two resets


DIVERGING = "--env Pendulum-v1 --ent-coef 10 --lr 0.5 --num-steps 512 --total-steps 20000"
BREAKS = [(DIVERGING, "smaller lr"), ("--env Toy-v0", "not finite")]


@pytest.mark.parametrize(("command", "clue"), BREAKS)
def test_a_run_that_breaks_off_keeps_its_policy(command, clue, folder, monkeypatch, capsys):
    """One line says what happened. The file has a policy from before."""

    def reward(env, action):
        return np.nan if len(Toy.transitions) == 20 else 1.0

    monkeypatch.setattr(Toy, "reward", reward)
    Toy.transitions = []
    toy()
    _, err = run(f"{command} --save p.npz", capsys, 2)
    assert clue in err
    assert np.isfinite(ppo.load("p.npz").theta).all()


def test_render_shows_episodes(folder, capsys):
    """A run evaluates, then shows some; --play only shows five, if not told how many."""
    last = "greedy evaluation over 2 episodes: mean 10, std 0, min 10, max 10\n"
    out, _ = run(f"--env {toy()} --save p.npz --render", capsys)
    assert out.endswith(last + last)
    assert ppo.main(["--play", "p.npz", "--render"]) == 0
    assert capsys.readouterr().out == last.replace("2 episodes", "5 episodes")


@pytest.mark.parametrize(("own", "new"), [(None, "{('OMP_NUM_THREADS', '1')}"), ("2", "set()")])
def test_importing_has_no_side_effects(own, new, monkeypatch):
    """It prints nothing, and sets the number of threads unless you did."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if own:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    code = "import os; old = dict(os.environ); import ppo; print(os.environ.items() - old.items())"
    argv = [sys.executable, "-c", code]
    out = subprocess.check_output(argv, cwd=ROOT, stderr=subprocess.STDOUT, text=True)
    assert out == new + "\n"


README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = re.sub(r"^```.*?^```", "", README, flags=re.M | re.S)


def test_the_python_of_the_readme_runs(folder, monkeypatch, capsys):
    """Its blocks run one after the other. What registers environments goes to my_module.py, too."""
    monkeypatch.syspath_prepend(os.getcwd())
    run("--save policy.npz --log run.csv", capsys)
    namespace = {"__name__": "__main__"}
    small = re.sub(r"total_steps=[\d_]+", "total_steps=2_000", README)
    blocks = re.findall(r"^```python\n(.*?)^```", small, re.M | re.S)
    assert len(blocks) >= 2
    for code in blocks:
        if "gym.register(" in code:
            with open("my_module.py", "a", encoding="utf-8") as module:
                module.write(code)
        exec(compile(code, "README.md", "exec"), namespace)
    for env in set(re.findall(r"my_module:[\w-]+", README)):
        run(f"--env {env}", capsys)
    _, err = run("--env my_module:Mine-v0 --render", capsys, 2)
    assert "render mode" in err


def test_the_formulas_of_the_readme_survive_markdown():
    r"""Markdown changes a backslash before other characters than letters, as in \, and also }_."""
    text = re.sub(r"`[^`]*`", "", PROSE)
    formulas = re.findall(r"\$[^$]+\$", text)
    assert len(formulas) >= 19
    for formula in formulas:
        assert not re.search(r"\\[^A-Za-z]|\}_", formula), formula


def test_the_links_of_the_readme_lead_somewhere():
    """They lead to a heading of the page, as GitHub names it, or to a file that is there."""
    headings = re.findall(r"^#+ (.+)$", PROSE, re.M)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    links = re.findall(r"\]\(([^)\s]+)\)", PROSE)
    links += re.findall(r'src="([^"]+)"', PROSE)
    for link in links:
        path, _, anchor = link.partition("#")
        if path == "":
            assert anchor in anchors
        elif not path.startswith("https://"):
            assert (ROOT / path).exists()


def test_the_formula_map_of_the_readme_names_what_exists():
    """Every name in its last column is a function, class or method of ppo.py."""
    section = README.split("\n## Formula map")[1].split("\n## ")[0]
    rows = re.findall(r"^\| \d+ \|.*\|$", section, re.M)
    assert len(rows) == 19
    source = inspect.getsource(ppo)
    for row in rows:
        names = re.findall(r"`(?:\w+\.)?(\w+)`", row.split("|")[-2])
        assert names, row
        for name in names:
            assert re.search(rf"(def|class) {name}\b", source), name
