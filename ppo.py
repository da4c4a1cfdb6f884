#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26"]
# ///
"""Proximal Policy Optimization (PPO) in one file, with numpy and gymnasium only.

    python ppo.py --env CartPole-v1

Every gradient is written by hand. Read from top to bottom, with the lectures beside it.
`Eq. 9` in a comment is the formula that the code below it computes. README.md lists all
nineteen; test_ppo.py checks them.

The algorithm (Eq. 19)                                                where
    create the actor θ and the critic φ                               §1, §2
    repeat until all steps are used up                                §8
        play T steps in each of N environments, with the policy π_θ   §3
        judge: advantages Â from V_φ by GAE, and returns R̂ = Â + V_φ  §4
        learn, K passes each, in minibatches of B rows:
            move θ against the gradient of the actor's loss           §5, §6, §7
            move φ against the gradient of the critic's loss          §6, §7

While θ moves, the data stay those of the θ that played: in the lectures θ_k or θ', in
names _old.

Names
    N, T, K, B     num_envs, num_steps, epochs, minibatch_size; in shapes, B is any number
    n, d, P        how many actions, components of an action, parameters
    s, a, Â, R̂, ρ  observations (normalised: inputs), actions, advantages, returns, ratio
    θ, φ           theta, phi: vectors (P,); actor, critic: the same as lists of arrays
    γ, λ, ε, β, c  gamma, lam, clip or epsilon, beta, ent_coef
"""

import os

# Small networks run fastest on one thread. numpy reads this on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import csv
import json
import math
import numbers
import sys
import time
from collections import deque
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import FlattenObservation, TransformAction, TransformObservation

# §1  Networks ----------
# Actor and critic are networks of layers x W + b, with tanh between them. A network is a
# list of arrays [W1, b1, W2, b2, ...]. An optimiser sees it as one long vector.


def flatten(arrays):
    """Return the numbers of all arrays as one vector (P,)."""
    return np.concatenate(arrays, axis=None)


def unflatten(vector, shapes):
    """Cut the vector (P,) into arrays of these shapes: views, which move when it moves."""
    arrays = []
    start = 0
    for shape in shapes:
        end = start + math.prod(shape)
        arrays.append(vector[start:end].reshape(shape))
        start = end
    return arrays


def init_mlp(sizes, rng, out_gain=1.0, dtype=np.float32):
    """Return new parameters for layers of these sizes, e.g. [4, 64, 64, 2].

    Each W (fan_in, fan_out) is a random orthogonal matrix, which keeps the size of signals
    (Saxe et al. 2014), times √2, in the last layer times out_gain. Each b is 0.
    """
    params = []
    num_layers = len(sizes) - 1
    for layer in range(num_layers):
        fan_in = sizes[layer]
        fan_out = sizes[layer + 1]
        gain = out_gain if layer == num_layers - 1 else math.sqrt(2)
        noise = rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out)))
        q, r = np.linalg.qr(noise)
        q *= np.sign(np.diag(r))  # so that all matrices are equally likely
        W = q if fan_in >= fan_out else q.T
        params.append((gain * W).astype(dtype, order="C"))
        params.append(np.zeros(fan_out, dtype))
    return params


def mlp_forward(params, inputs):
    """Return outputs (B, out_dim) for inputs (B, in_dim), and a cache: each layer's input.

    A log_std (§2) at the end of params belongs to no layer.
    """
    num_layers = len(params) // 2
    cache = []
    x = inputs
    for layer in range(num_layers):
        W = params[2 * layer]
        b = params[2 * layer + 1]
        if layer > 0:
            x = np.tanh(x)
        cache.append(x)
        x = x.dot(W) + b  # .dot is twice as fast as @ where W is narrow
    return x, cache


def mlp_backward(params, cache, d_outputs):
    """Return the gradients [dW1, db1, ...], from ∂loss/∂outputs = d_outputs (B, out_dim)."""
    grads = []
    for layer in reversed(range(len(cache))):
        W = params[2 * layer]
        x = cache[layer]
        # outputs = x W + b:   ∂loss/∂W = xᵀ d_outputs,   ∂loss/∂b = Σ_rows d_outputs
        dW = x.T.dot(d_outputs)
        db = np.ones(len(x), x.dtype).dot(d_outputs)  # 3 times as fast as .sum(axis=0)
        grads = [dW, db, *grads]
        if layer > 0:
            # ∂loss/∂x = d_outputs Wᵀ;   x = tanh(z), so ∂x/∂z = 1 - x²
            dx = d_outputs.dot(W.T)
            d_outputs = dx * (1 - x * x)
    return grads


# §2  Policies ----------
# A policy is a distribution over actions for each state of a batch. log_prob and entropy
# return a number for each state (B,), and its gradients: one array for each parameter of
# the policy (the logits, or mean and log_std), with a row for each state.


def log_softmax(logits):
    """Return log π(·|s) (B, n) for logits (B, n)."""
    logits = np.asfortranarray(logits)  # long columns add up faster than short rows
    shifted = logits - logits.max(axis=-1, keepdims=True)  # exp cannot overflow
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Categorical:
    """A choice among n actions, π(a|s) = softmax(logits)_a, of logits (B, n)."""

    def __init__(self, logits):
        self.logits = logits

    def sample(self, rng):
        """Draw actions (B,): the argmax of logits + Gumbel noise follows the softmax."""
        noise = rng.gumbel(size=self.logits.shape)
        return (self.logits + noise).argmax(axis=-1)

    def mode(self):
        """Return the likeliest actions (B,)."""
        return self.logits.argmax(axis=-1)

    def log_prob(self, actions):
        """Return log π(a|s) (B,) of actions (B,), and its gradients [(B, n)]."""
        if actions.shape != self.logits.shape[:1]:
            raise ValueError(f"actions must be {self.logits.shape[:1]}, not {actions.shape}")
        log_probs = log_softmax(self.logits)
        rows = np.arange(len(actions))
        # Eq. 3, 4   ∇log π starts with ∂ log π(a) / ∂ logits = onehot(a) - π
        grad_logits = -np.exp(log_probs)
        grad_logits[rows, actions] += 1
        return log_probs[rows, actions], [grad_logits]

    def entropy(self):
        """Return H(π) (B,), and its gradients [(B, n)]."""
        log_probs = log_softmax(self.logits)
        probs = np.exp(log_probs)
        # Eq. 17   H = -Σ π log π;   ∂H / ∂ logits = -π (log π + H)
        entropy = -(probs * log_probs).sum(axis=-1)
        grad_logits = -probs * (log_probs + entropy[:, None])
        return entropy, [grad_logits]


class Gaussian:
    """Independent normal actions, N(mean, exp(log_std)²), of mean (B, d), log_std (d,)."""

    def __init__(self, mean, log_std):
        self.mean = mean
        self.log_std = log_std
        self.std = np.exp(log_std)

    def sample(self, rng):
        """Draw actions (B, d)."""
        noise = rng.standard_normal(self.mean.shape, self.mean.dtype)
        return self.mean + self.std * noise

    def mode(self):
        """Return the likeliest actions (B, d)."""
        return self.mean

    def log_prob(self, actions):
        """Return log π(a|s) (B,) of actions (B, d), and its gradients [(B, d), (B, d)]."""
        if actions.shape != self.mean.shape:
            raise ValueError(f"actions must be {self.mean.shape}, not {actions.shape}")
        z = (actions - self.mean) / self.std
        # Eq. 3, 4   log π = -Σ (½z² + log std + ½ log 2π), and ∇log π starts with
        #            ∂ log π / ∂mean = z / std,   ∂ log π / ∂log_std = z² - 1
        log_prob = -(0.5 * z * z + self.log_std + 0.5 * math.log(2 * math.pi)).sum(axis=-1)
        grad_mean = z / self.std
        grad_log_std = z * z - 1
        return log_prob, [grad_mean, grad_log_std]

    def entropy(self):
        """Return H(π) (B,), and its gradients [(B, d), (B, d)]."""
        # Eq. 17   H = Σ (log std + ½ log 2πe) in every state;   ∂H / ∂log_std = 1
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
        grad_mean = np.zeros_like(self.mean)
        grad_log_std = np.ones_like(self.mean)
        return np.full(len(self.mean), entropy), [grad_mean, grad_log_std]


def policy_forward(actor, inputs):
    """Return the policy for inputs (B, obs_dim), and the cache of mlp_forward.

    It is Gaussian if actor ends in a log_std (d,), otherwise Categorical.
    """
    outputs, cache = mlp_forward(actor, inputs)
    has_log_std = len(actor) % 2 == 1
    policy = Gaussian(outputs, actor[-1]) if has_log_std else Categorical(outputs)
    return policy, cache


# §3  Trajectory ----------


def rollout(envs, act, obs, num_steps):
    """Play num_steps steps in N environments. act maps observations to actions (N, ...).

    envs is a Gymnasium vector environment, obs (N, obs_dim) its last observation. Returns
    observations (T+1, N, obs_dim) in float32, or float64 if obs needs it, actions (T, N, ...),
    rewards (T, N) in float32, terminated and truncated (T, N). Raises FloatingPointError if a
    number is not finite.

    An episode is terminated at a true end, and truncated where a time limit stops it. The
    step after either only resets (Gymnasium's NEXT_STEP): do not learn from its row.

        t   observations[t]   actions[t]   rewards[t]   terminated[t]
        7   s_7               a_7          r_7          True            the episode ends
        8   s_8, the last     ignored      0            False           the reset
        9   s_1               a_1          r_1          False           the next episode
    """
    dtype = np.result_type(obs, np.float32)
    observations = np.empty((num_steps + 1, *obs.shape), dtype)
    rewards = np.empty((num_steps, len(obs)), np.float32)
    terminated = np.empty((num_steps, len(obs)), bool)
    truncated = np.empty((num_steps, len(obs)), bool)
    actions = []
    # Eq. 1   τ = (s_1, a_1, r_1, s_2, a_2, r_2, ...)
    observations[0] = obs
    for t in range(num_steps):
        actions.append(act(observations[t]))
        observations[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
    if not (np.isfinite(observations).all() and np.isfinite(rewards).all()):
        raise FloatingPointError("the environment returned a number that is not finite")
    return observations, np.stack(actions), rewards, terminated, truncated


# §4  Advantage ----------
# How much better was the action than the critic expected in that state?


def gae(rewards, values, terminated, truncated, gamma, lam):
    """Generalized Advantage Estimation (Schulman et al. 2016): return Â (T, N).

    rewards, terminated and truncated (booleans or 0/1) are (T, N), values (T+1, N). Rows of
    resets get meaningless numbers. Raises ValueError for other shapes.
    """
    T, N = rewards.shape
    if not (values.shape == (T + 1, N) and terminated.shape == truncated.shape == (T, N)):
        raise ValueError("rewards, terminated, truncated must be (T, N), values (T+1, N)")
    # Eq. 7, 8   Q - V = δ_t = r_t + γ V(s_{t+1}) - V(s_t)
    # V(s_{t+1}) is 0 after a true end. At a time limit or the rollout's end it stays.
    next_values = np.where(terminated, 0.0, values[1:])
    deltas = rewards + gamma * next_values - values[:-1]
    ended = np.logical_or(terminated, truncated)
    advantages = np.empty_like(deltas)
    next_advantage = np.zeros_like(deltas[0])
    for t in reversed(range(T)):
        # After either ending nothing of this episode follows.
        next_advantage = np.where(ended[t], 0, next_advantage)
        # Eq. 9   Â_t = δ_t + γλ Â_{t+1};   before a true end λ = 1 makes it R_t (Eq. 5) - V(s_t)
        advantages[t] = deltas[t] + gamma * lam * next_advantage
        next_advantage = advantages[t]
    return advantages


# §5  Objectives ----------
# Each takes log_prob, log_prob_old and advantages (B,), needed or not, and returns two arrays
# (B,): a loss, whose mean over rows is minimised, and its slope ∂loss/∂log π. TRPO is in §9.


def policy_gradient(log_prob, log_prob_old, advantages):
    """The policy gradient (Eq. 4, 6), valid for one step."""
    # Eq. 4, 6   loss = -log π Â;   ∂loss/∂log π = -Â
    loss = -log_prob * advantages
    slope = -advantages
    return loss, slope


def importance_sampling(log_prob, log_prob_old, advantages):
    """The surrogate (Eq. 12): data of π_θ_k, reweighted by importance sampling (Eq. 11).

    The ratio corrects the actions, but the states and Â are still those of π_θ_k. This
    error, and the variance of Eq. 11, grow away from θ_k. So all that follows keeps θ close.
    """
    # Eq. 11, 12   loss = -ρ Â, ρ = π_θ(a|s) / π_θ_k(a|s);   ∂ρ/∂log π = ρ
    ratio = np.exp(log_prob - log_prob_old)
    loss = -ratio * advantages
    slope = -ratio * advantages
    return loss, slope


def kl_divergence(log_prob, log_prob_old, advantages=None):
    """KL(π_θ_k‖π_θ) (Eq. 13), estimated from actions of π_θ_k.

    Adding ρ - 1, whose mean is 0, makes rows nonnegative and less noisy (Schulman 2020).
    """
    # Eq. 13   KL = E[kl], kl = log π_θ_k - log π_θ + ρ - 1;   ∂kl/∂log π = ρ - 1
    ratio_minus_1 = np.expm1(log_prob - log_prob_old)  # exact for small differences
    kl = log_prob_old - log_prob + ratio_minus_1
    slope = ratio_minus_1
    return kl, slope


def kl_penalty(log_prob, log_prob_old, advantages, beta):
    """PPO1 (Eq. 15): the surrogate, and beta as the price of moving away from π_θ_k."""
    loss, slope = importance_sampling(log_prob, log_prob_old, advantages)
    kl, kl_slope = kl_divergence(log_prob, log_prob_old)
    # Eq. 15   loss = -(ρ Â - β KL)
    return loss + beta * kl, slope + beta * kl_slope


def adapt_beta(beta, kl, target):
    """Return the next β, given this iteration's KL (Eq. 15; Schulman et al. 2017)."""
    kl_max = 1.5 * target
    kl_min = target / 1.5
    # Eq. 15   KL > KL_max: β grows;   KL < KL_min: β shrinks
    if kl > kl_max:
        return min(2 * beta, 1e4)
    if kl < kl_min:
        return max(beta / 2, 1e-4)
    return beta


def clip(log_prob, log_prob_old, advantages, epsilon):
    """PPO2 (Eq. 16): the surrogate, but moving ρ beyond 1 ± epsilon gains nothing."""
    ratio = np.exp(log_prob - log_prob_old)
    surrogate = ratio * advantages
    clipped = ratio.clip(1 - epsilon, 1 + epsilon) * advantages
    # Eq. 16   loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â), and its slope:
    #              ρ < 1-ε                      between    ρ > 1+ε
    #     Â > 0    -ρÂ: wrong way, come back    -ρÂ        0: encouraged enough
    #     Â < 0    0: discouraged enough        -ρÂ        -ρÂ: wrong way, come back
    loss = -np.minimum(surrogate, clipped)
    slope = np.where(surrogate <= clipped, -surrogate, 0)  # where the minimum is ρ Â
    return loss, slope


# §6  Losses ----------
# The chain rule: slope (§5) times ∂log π/∂outputs (§2), sent back through the layers (§1).


def actor_loss(actor, objective, ent_coef, inputs, actions, log_prob_old, advantages):
    """Return the actor's mean loss over B rows, and its gradient (P,).

    objective is a function of §5. inputs are (B, obs_dim), actions (B,) or (B, d),
    log_prob_old and advantages (B,). Raises ValueError for other shapes.
    """
    policy, cache = policy_forward(actor, inputs)
    log_prob, log_prob_grads = policy.log_prob(actions)
    if not (log_prob_old.shape == advantages.shape == log_prob.shape):
        raise ValueError(f"log_prob_old and advantages must be {log_prob.shape}")
    loss, slope = objective(log_prob, log_prob_old, advantages)
    # ∂loss/∂logits = ∂loss/∂log π · ∂log π/∂logits; likewise for mean and log_std
    d_policy = [slope[:, None] * grad for grad in log_prob_grads]
    if ent_coef > 0:
        # Eq. 17   loss - c H(π_θ)
        entropy, entropy_grads = policy.entropy()
        loss = loss - ent_coef * entropy
        for i in range(len(d_policy)):
            d_policy[i] = d_policy[i] - ent_coef * entropy_grads[i]
    grads = mlp_backward(actor, cache, d_policy[0] / len(inputs))  # the loss is a mean over rows
    if isinstance(policy, Gaussian):
        grads.append(d_policy[1].mean(axis=0))  # all rows share one log_std
    return loss.sum() / len(inputs), flatten(grads)


def critic_loss(critic, inputs, returns):
    """Return the critic's mean loss over B rows, and its gradient (P,).

    inputs are (B, obs_dim), returns (B,). Raises ValueError for other shapes.
    """
    outputs, cache = mlp_forward(critic, inputs)
    if returns.shape != outputs.shape[:1]:
        raise ValueError(f"returns must be {outputs.shape[:1]}, not {returns.shape}")
    # Eq. 18   loss = (V - R̂)²;   ∂loss/∂V = 2 (V - R̂)
    error = outputs[:, 0] - returns
    d_outputs = 2 * error[:, None] / len(inputs)  # the loss is a mean over rows
    return error @ error / len(inputs), flatten(mlp_backward(critic, cache, d_outputs))


# §7  Adam ----------


def clip_by_global_norm(gradient, max_norm):
    """Return the gradient (P,), scaled down to the length max_norm if it is longer."""
    norm = float(np.sqrt(gradient @ gradient))
    if norm > max_norm:
        return gradient * (max_norm / norm)
    return gradient


class Adam:
    """Adam (Kingma & Ba 2015) for a vector theta (P,); step moves it in place."""

    def __init__(self, theta):
        self.theta = theta
        self.m = np.zeros_like(theta)
        self.v = np.zeros_like(theta)
        self.t = 0

    # Each parameter moves by about lr, whatever its gradient's size. eps is for sizes near 0.
    def step(self, gradient, lr, beta1=0.9, beta2=0.999, eps=1e-5):
        """Move theta against the gradient (P,) with learning rate lr."""
        self.t += 1
        # m and v are running means of g and g²:   m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
        self.m += (1 - beta1) * (gradient - self.m)
        self.v += (1 - beta2) * (gradient * gradient - self.v)
        # They start at 0. m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) correct that.
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        # θ ← θ - lr m̂ / (√v̂ + eps)
        self.theta -= lr * m_hat / (np.sqrt(v_hat) + eps)


# §8  PPO ----------


def setting(default, help, low=None, high=None):
    """A field of Settings: its default, the help text of its flag, and its range."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run. The command line has a flag for each."""

    env: str = setting("CartPole-v1", "Gymnasium name; module:Name-v0 imports a module")
    seed: int = setting(0, "seed of everything random in ppo.py", 0, 2**32 - 1)
    total_steps: int = setting(500_000, "environment steps, resets included", 1, 10**12)
    num_envs: int = setting(16, "N, environments side by side", 1, 4096)
    num_steps: int = setting(128, "T, steps of each environment in a rollout", 1, 10**6)
    epochs: int = setting(6, "K, passes over the same data, Eq. 10", 1, 1000)
    minibatch_size: int = setting(128, "B, rows in a gradient step, at most", 1, 10**9)
    lr: float = setting(2e-3, "learning rate; falls to 0", 1e-9, 1)
    actor_lr: float = setting(None, "learning rate of the actor, if not lr", 1e-9, 1)
    gamma: float = setting(0.995, "discount, Eq. 5", 0, 1)
    lam: float = setting(0.95, "lambda of GAE, Eq. 9", 0, 1)
    objective: str = setting("clip", "pg, is, trpo, kl or clip: Eq. 4, 12, 14, 15, 16")
    clip: float = setting(0.2, "epsilon of clip, Eq. 16", 1e-3, 10)
    kl_target: float = setting(0.01, "delta of trpo, Eq. 14; aim of kl, Eq. 15", 1e-6, 10)
    ent_coef: float = setting(0.0, "c, entropy bonus, Eq. 17; falls to 0", 0, 10)
    max_grad_norm: float = setting(0.5, "longer gradients are shortened", 1e-6, 1e6)
    hidden: tuple = setting((64, 64), "sizes of the hidden layers, if any", 1, 8192)
    normalize_steps: int = setting(1, "steps that set the normalisation, at least", 0, 10**12)
    log_std_init: float = setting(0.0, "log_std of actions at first", -5, 2)
    eval_episodes: int = setting(100, "episodes of the greedy evaluation", 1, 10**6)


class Agent:
    """Actor and critic with their optimisers, and statistics of what they have seen."""

    def __init__(self, envs, settings):
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        self.obs_space = envs.unwrapped.single_observation_space  # before it is flattened
        self.action_space = envs.single_action_space
        obs_dim = gym.spaces.flatdim(self.obs_space)
        act_dim = gym.spaces.flatdim(self.action_space)

        # The small gain makes π about the same in all states at first.
        actor = init_mlp([obs_dim, *settings.hidden, act_dim], self.rng, out_gain=0.01)
        if isinstance(self.action_space, gym.spaces.Box):
            actor.append(np.full(act_dim, settings.log_std_init, np.float32))
        # Without hidden layers V is a table (§10). Random values would make the first Â noisy.
        critic_gain = 1.0 if settings.hidden else 0.0
        critic = init_mlp([obs_dim, *settings.hidden, 1], self.rng, critic_gain)

        self.theta = flatten(actor)
        self.phi = flatten(critic)
        self.actor_shapes = [array.shape for array in actor]
        self.critic_shapes = [array.shape for array in critic]
        self.actor_adam = Adam(self.theta)
        self.critic_adam = Adam(self.phi)
        self.beta = 1.0
        self.obs_mean = np.zeros(obs_dim)
        self.obs_std = np.ones(obs_dim)
        self.obs_stats = RunningMeanStd(epsilon=0, shape=obs_dim)
        self.return_stats = RunningMeanStd()  # of discounted sums of rewards

    @property
    def actor(self):
        """θ as the arrays of a network."""
        return unflatten(self.theta, self.actor_shapes)

    @property
    def critic(self):
        """φ as the arrays of a network."""
        return unflatten(self.phi, self.critic_shapes)

    def normalize(self, obs):
        """Return observations (..., obs_dim) as inputs of mean 0, deviation 1, within ±10.

        If normalize_steps is 0, they stay as they are.
        """
        if self.settings.normalize_steps == 0:
            return obs.astype(np.float32)
        return ((obs - self.obs_mean) / self.obs_std).clip(-10, 10).astype(np.float32)

    def observe(self, obs):
        """Update obs_stats from observations (B, obs_dim) that were played.

        obs_mean and obs_std follow it until it has counted normalize_steps steps, and later
        only where a component leaves ±10, where the clip hides its values.
        """
        if self.settings.normalize_steps == 0:
            return
        share_outside = (abs(obs - self.obs_mean) > 10 * self.obs_std).mean(axis=0)
        outdated = share_outside > 0.01
        if self.obs_stats.count < self.settings.normalize_steps:
            outdated[:] = True
        self.obs_stats.update(obs.astype(np.float64))
        self.obs_mean[outdated] = self.obs_stats.mean[outdated]
        self.obs_std[outdated] = np.sqrt(self.obs_stats.var[outdated] + 1e-8)

    def policy(self, obs):
        """Return the policy for observations (B, obs_dim). Raises ValueError for others."""
        if obs.shape[1:] != self.obs_mean.shape:
            raise ValueError(f"observations must be (B, {len(self.obs_mean)}), not {obs.shape}")
        policy, _ = policy_forward(self.actor, self.normalize(obs))
        return policy

    def act(self, obs):
        """Return the likeliest action for one observation, as env.step accepts it.

        Raises ValueError for an observation of another shape.
        """
        shape = self.obs_space.shape
        if shape is not None and np.shape(obs) != shape:
            raise ValueError(f"an observation must be {shape}, not {np.shape(obs)}")
        row = gym.spaces.flatten(self.obs_space, obs)
        return legal_actions(self.action_space, self.policy(row[None]).mode())[0]  # §10


def fit(agent, adam, loss_function, data, lr):
    """Take K epochs of gradient steps. loss_function(*minibatch) returns (mean, gradient)."""
    settings = agent.settings
    num_rows = len(data[0])
    num_minibatches = math.ceil(num_rows / settings.minibatch_size)
    for _ in range(settings.epochs):  # Eq. 10: the same data again
        order = agent.rng.permutation(num_rows)
        for rows in np.array_split(order, num_minibatches):
            minibatch = [array[rows] for array in data]
            _, gradient = loss_function(*minibatch)
            adam.step(clip_by_global_norm(gradient, settings.max_grad_norm), lr)


def update(agent, inputs, actions, advantages, returns, remaining):
    """Learn from transitions, and return a record of what changed.

    inputs are (B, obs_dim), actions (B,) or (B, d), advantages and returns (B,). remaining
    is the share of the run still to come. It scales the learning rates and the entropy bonus.
    """
    settings = agent.settings
    actor = agent.actor  # views of θ, which move with it
    lr = settings.lr * remaining
    actor_lr = lr if settings.actor_lr is None else settings.actor_lr * remaining
    ent_coef = settings.ent_coef * remaining
    # Eq. 6: the mean is a baseline, too. Dividing (not in the lectures) fixes the scale.
    normalized_advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_old, _ = policy_forward(actor, inputs)  # θ is still θ_k
    log_prob_old, _ = policy_old.log_prob(actions)
    data = [inputs, actions, log_prob_old, normalized_advantages]

    if settings.objective == "pg":
        # Eq. 10: another step would need data of the new θ.
        _, gradient = actor_loss(actor, policy_gradient, ent_coef, *data)
        gradient = clip_by_global_norm(gradient, settings.max_grad_norm)
        agent.actor_adam.step(gradient, actor_lr)
    elif settings.objective == "trpo":
        trpo(agent.theta, agent.actor_shapes, ent_coef, data, settings.kl_target)  # §9
    else:
        objectives = {
            "is": importance_sampling,
            "kl": partial(kl_penalty, beta=agent.beta),
            "clip": partial(clip, epsilon=settings.clip),
        }
        loss_function = partial(actor_loss, actor, objectives[settings.objective], ent_coef)
        fit(agent, agent.actor_adam, loss_function, data, actor_lr)
    fit(agent, agent.critic_adam, partial(critic_loss, agent.critic), [inputs, returns], lr)

    policy, _ = policy_forward(actor, inputs)
    log_prob, _ = policy.log_prob(actions)
    entropy, _ = policy.entropy()
    kl, _ = kl_divergence(log_prob, log_prob_old)
    ratio = np.exp(log_prob - log_prob_old)
    agent.beta = adapt_beta(agent.beta, kl.mean(), settings.kl_target)
    return {
        "kl": float(kl.mean()),
        "clipped": float((abs(ratio - 1) > settings.clip).mean()),
        "entropy": float(entropy.mean()),
        "explained": float(1 - advantages.var() / (returns.var() + 1e-8)),  # Â = R̂ - V
    }


class Diary:
    """What learn remembers between rollouts, because an episode may span several."""

    def __init__(self, num_envs):
        self.steps = 0
        self.episodes = 0
        self.last_returns = deque(maxlen=100)
        self.return_so_far = np.zeros(num_envs)
        self.discounted_so_far = np.zeros(num_envs)
        self.ended_before = np.zeros(num_envs, bool)

    def add(self, rewards, ended, gamma):
        """Note the rewards of a rollout, and where episodes ended, both (T, N).

        Returns is_transition (T, N), False for resets, and for each transition the discounted
        sum g of its episode's rewards so far (B,).
        """
        # The step after an ending is the reset.
        is_transition = np.empty(ended.shape, bool)
        is_transition[0] = ~self.ended_before
        is_transition[1:] = ~ended[:-1]
        self.ended_before = ended[-1]
        discounted = np.empty(ended.shape)
        has_ending = ended.any(axis=1)
        for t in range(len(rewards)):
            # g_t = r_t + γ g_{t-1} looks back. learn divides rewards by its deviation.
            self.discounted_so_far = rewards[t] + gamma * self.discounted_so_far
            discounted[t] = self.discounted_so_far
            # Eq. 2   R(τ) = Σ r_t when an episode ends;   the mean of R(τ) estimates J(θ)
            self.return_so_far += rewards[t]
            if has_ending[t]:
                self.last_returns.extend(self.return_so_far[ended[t]])
                self.return_so_far[ended[t]] = 0
                self.discounted_so_far[ended[t]] = 0
        self.steps += ended.size
        self.episodes += int(ended.sum())
        return is_transition, discounted[is_transition]

    def mean_return(self):
        """Return the mean return of the last 100 episodes, nan before the first one ends."""
        return float(np.mean(self.last_returns)) if self.last_returns else math.nan


def learn(agent, envs):
    """The PPO loop (Eq. 19), for total_steps steps. Yields a record after each iteration.

    envs come from make_envs (§10). Raises FloatingPointError if the agent diverges.
    """
    settings = agent.settings
    N = envs.num_envs
    diary = Diary(N)
    actor = agent.actor

    def act(obs):
        policy, _ = policy_forward(actor, agent.normalize(obs))
        return policy.sample(agent.rng)  # envs make it legal (§10)

    seed = int(agent.rng.integers(2**31 - N))  # separate environments get seed, seed + 1, ...
    obs, _ = envs.reset(seed=seed)  # (N, obs_dim)
    while diary.steps < settings.total_steps:
        # Eq. 19, play: T steps in each environment with θ_k.
        steps_left = settings.total_steps - diary.steps
        T = min(settings.num_steps, math.ceil(steps_left / N))
        observations, actions, rewards, terminated, truncated = rollout(envs, act, obs, T)
        obs = observations[-1]  # (T+1, N, obs_dim) -> (N, obs_dim)
        ended = terminated | truncated  # (T, N)
        is_transition, discounted = diary.add(rewards, ended, settings.gamma)  # (T, N), (B,)
        if not is_transition.any():
            continue  # a rollout of a single step may have resets only

        # Eq. 19, judge: Â and R̂ with φ_k. Scaled rewards (not in the lectures) keep V small.
        agent.return_stats.update(discounted)
        rewards /= np.sqrt(agent.return_stats.var + 1e-8)
        inputs = agent.normalize(observations)  # (T+1, N, obs_dim)
        values, _ = mlp_forward(agent.critic, inputs.reshape((T + 1) * N, -1))
        values = values.reshape(T + 1, N)
        advantages = gae(rewards, values, terminated, truncated, settings.gamma, settings.lam)
        returns = advantages + values[:-1]  # (T, N)   Eq. 18   R̂ = Â + V_φ_k(s)

        # Eq. 19, learn: K epochs on the same data make θ_{k+1} and φ_{k+1}.
        arrays = [inputs[:-1], actions, advantages, returns]
        batch = [array[is_transition] for array in arrays]  # (T, N, ...) -> (B, ...)
        changes = update(agent, *batch, remaining=steps_left / settings.total_steps)
        agent.observe(observations[:-1][is_transition])  # for the next rollout
        for result in (agent.theta, agent.phi, agent.obs_std, changes["kl"]):
            if not np.isfinite(result).all():
                hint = "try a smaller lr, or smaller observations"
                raise FloatingPointError(f"the agent diverged before step {diary.steps:,}: {hint}")
        yield {
            "steps": diary.steps,
            "episodes": diary.episodes,
            "mean_return": diary.mean_return(),
            **changes,
        }


# To learn PPO, a student may stop here. TRPO follows, then the program around it all.

# §9  TRPO ----------
# TRPO (Eq. 14; Schulman et al. 2015) is what PPO replaces. Of all steps Δ with KL ≤ δ it
# takes the one that gains most. Near θ_k the gain is gᵀΔ with g = ∇J, and KL is ½ΔᵀFΔ with
# the Fisher matrix F = E[∇log π ∇log πᵀ]. surrogate and kl are functions of theta here, which
# return (mean, gradient).


def fisher_product(kl, theta, v, damping=0.1):
    """Return F v + damping v (P,), where F v is how ∇KL changes along v (P,).

    Damping helps where F is singular.
    """
    # Eq. 14   F v ≈ (∇KL(θ_k + hv) - ∇KL(θ_k - hv)) / 2h
    machine_epsilon = float(np.finfo(theta.dtype).eps)
    h = 2 * machine_epsilon ** (1 / 3) / float(np.linalg.norm(v))
    _, gradient_ahead = kl(theta + h * v)
    _, gradient_behind = kl(theta - h * v)
    return (gradient_ahead - gradient_behind) / (2 * h) + damping * v


def conjugate_gradients(product, g, iterations=10):
    """Return x (P,) with F x ≈ g (P,), for product(v) = F v (Hestenes & Stiefel 1952)."""
    x = np.zeros_like(g)
    residual = g
    direction = g
    for _ in range(iterations):
        F_direction = product(direction)
        squared = residual @ residual
        step_size = squared / (direction @ F_direction)
        x = x + step_size * direction
        residual = residual - step_size * F_direction
        if residual @ residual < 1e-10 * (g @ g):
            break
        direction = residual + (residual @ residual / squared) * direction
    return x


def trust_region_step(theta, surrogate, kl, delta, damping=0.1):
    """Move theta (P,) in place so that the surrogate loss falls and kl is at most delta.

    If no such step is found, theta stays.
    """
    loss_old, gradient = surrogate(theta)
    if gradient @ gradient == 0:
        return
    g = -gradient  # surrogate is a loss
    x = conjugate_gradients(lambda v: fisher_product(kl, theta, v, damping), g)
    # Eq. 14   Δ = √(2δ / xᵀFx) x, where F x = g
    step = np.sqrt(2 * delta / (x @ g)) * x
    for _ in range(10):  # Δ is right only near θ_k: halve it until both conditions hold
        kl_new, _ = kl(theta + step)
        loss_new, _ = surrogate(theta + step)
        if kl_new <= delta and loss_new < loss_old:
            theta += step
            return
        step = step / 2


def trpo(theta, shapes, ent_coef, data, delta):
    """Take a trust_region_step; data are inputs, actions, log_prob_old and advantages."""

    def surrogate(theta):
        return actor_loss(unflatten(theta, shapes), importance_sampling, ent_coef, *data)

    def kl(theta):
        return actor_loss(unflatten(theta, shapes), kl_divergence, 0, *data)

    trust_region_step(theta, surrogate, kl, delta)


# §10  Tasks ----------
# Settings that differ from the defaults: first by the kind of task, then by the task.

CONTINUOUS = dict(total_steps=1_000_000, lr=6e-4, gamma=0.99, normalize_steps=10**12)
# Without hidden layers W is a table: a row of logits, or a value, for each state.
TABLE = dict(hidden=(), normalize_steps=0, lr=3e-2, lam=0.8, ent_coef=0.3)
KINDS = {
    "discrete actions": dict(),
    "continuous actions": dict(CONTINUOUS, log_std_init=-0.5),
    "one continuous action": dict(CONTINUOUS, log_std_init=0.8, epochs=8),
    "numbered states": dict(TABLE, num_envs=32, num_steps=32, minibatch_size=256),
}
SHORT = dict(total_steps=100_000, epochs=10)
TASKS = {
    "CartPole": dict(total_steps=100_000),
    "CliffWalking": dict(SHORT, num_envs=16, minibatch_size=128, lr=0.1),
    "HalfCheetah": dict(num_envs=32, num_steps=64, lam=0.9, log_std_init=-1.0),
    "LunarLanderContinuous": dict(total_steps=500_000, epochs=20, gamma=0.999, normalize_steps=1),
    "Pendulum": dict(SHORT, num_envs=8, minibatch_size=64, lr=1e-3, lam=0.8, normalize_steps=0),
}


class UsageError(ValueError):
    """Something that the user can put right."""


def kind_of(obs_space, action_space):
    """Return the kind of task, as in KINDS, that has these spaces."""
    has_numbered_states = isinstance(obs_space, gym.spaces.Discrete)
    if isinstance(action_space, gym.spaces.Discrete):
        return "numbered states" if has_numbered_states else "discrete actions"
    if has_numbered_states or gym.spaces.flatdim(action_space) > 1:
        return "continuous actions"
    return "one continuous action"


def check(settings):
    """Raise UsageError if a setting is out of range."""
    if not isinstance(settings.hidden, tuple | list):
        raise UsageError(f"hidden must be a list like [64, 64], not {settings.hidden!r}")
    for f in fields(settings):
        value = getattr(settings, f.name)
        if f.type is str or value is f.default:  # actor_lr may be None
            continue
        form = numbers.Real if f.type is float else numbers.Integral
        low = f.metadata["low"]
        high = f.metadata["high"]
        values = value if f.type is tuple else [value]
        for number in values:
            if not (isinstance(number, form) and low <= number <= high):
                whole = "a" if f.type is float else "a whole"
                span = f"{whole} number from {low} to {high}"
                raise UsageError(f"{f.name} must be {span}, not {number!r}")
    if settings.objective not in ("pg", "is", "trpo", "kl", "clip"):
        raise UsageError("objective must be pg, is, trpo, kl or clip")
    if settings.num_envs * settings.num_steps == 1:
        raise UsageError("a rollout must have 2 or more steps: raise num_envs or num_steps")


def new_agent(env=Settings.env, **chosen):
    """Return an untrained agent. Settings not chosen are those of the task or its kind.

    Raises UsageError if there is no such environment or setting.
    """
    parts = env.split(":") if isinstance(env, str) else []
    if not (len(parts) in (1, 2) and all(parts)):
        raise UsageError(f"env must be a name, CartPole-v1 or module:Name-v0, not {env!r}")
    name = parts[-1].rsplit("-v", 1)[0]
    with closing(make_envs(env, 1)) as envs:
        kind = kind_of(envs.unwrapped.single_observation_space, envs.single_action_space)
        values = KINDS[kind] | TASKS.get(name, {}) | chosen
        try:
            settings = Settings(env, **values)
        except TypeError as error:
            hint = "arguments of an environment go into gym.register"
            raise UsageError(f"{error}: no such setting; {hint}") from error
        check(settings)
        return Agent(envs, settings)


class WithoutInfo(gym.Wrapper):
    """Drops info, which nobody reads here, because Gymnasium cannot stack all of them."""

    def reset(self, **kwargs):
        obs, _ = self.env.reset(**kwargs)
        return obs, {}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return obs, reward, terminated, truncated, {}


def make_envs(env, num_envs, render=False):
    """Return N environments with observations (N, obs_dim) that take a policy's actions.

    Raises UsageError if there is no such environment, if its spaces cannot be used, or if it
    cannot be shown.
    """
    window = {}
    try:
        if render:
            window = {"vectorization_mode": "sync", "render_mode": "human"}
            with closing(gym.make(env)) as single:
                modes = single.metadata.get("render_modes", [])
            if "human" not in modes and "rgb_array" not in modes:
                raise UsageError(f"{env} cannot be shown: its metadata has no render mode human")
        envs = gym.make_vec(env, num_envs=num_envs, **window)
    except gym.error.NameNotFound as error:
        raise UsageError(f"{error} An environment of your own is module:Name-v0.") from error
    except (gym.error.Error, ImportError) as error:
        raise UsageError(f"cannot make {env}: {error}") from error
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    mode = envs.metadata.get("autoreset_mode", "NEXT_STEP")
    is_playable = isinstance(action_space, gym.spaces.Discrete | gym.spaces.Box)
    resets_next_step = "NEXT" in str(mode).upper()  # NEXT_STEP or NextStep
    if not (is_playable and resets_next_step and obs_space.is_np_flattenable):
        needs = "Discrete or Box actions, NEXT_STEP resets, observations of a fixed size"
        has = f"{action_space}, {mode}, {obs_space}"
        raise UsageError(f"{env} has {has}; needed are {needs}")
    if isinstance(envs.unwrapped, gym.vector.SyncVectorEnv):
        envs.unwrapped.envs = [WithoutInfo(one) for one in envs.unwrapped.envs]
    if isinstance(obs_space, gym.spaces.Discrete):
        one_hot = np.eye(obs_space.n, dtype=np.float32)
        envs = TransformObservation(envs, lambda obs: one_hot[obs - obs_space.start])
    elif obs_space.shape != (gym.spaces.flatdim(obs_space),):
        envs = FlattenObservation(envs)
    return TransformAction(envs, partial(legal_actions, action_space))


def legal_actions(space, actions):
    """Return a policy's actions (N,) or (N, d) in the form that env.step accepts.

    In a Box, -1 ... 1 is mapped onto low ... high where these are finite; all are clipped.
    """
    if isinstance(space, gym.spaces.Discrete):
        return (space.start + actions).astype(space.dtype)
    width = space.high.astype(float) - space.low
    is_bounded = space.bounded_below & space.bounded_above
    is_bounded &= width < np.finfo(np.float32).max  # this number often stands for infinity
    low = np.where(is_bounded, space.low, -1.0)
    high = np.where(is_bounded, space.high, 1.0)
    actions = (high + low) / 2 + (high - low) / 2 * actions.reshape(-1, *space.shape)
    if not np.issubdtype(space.dtype, np.floating):
        actions = np.rint(actions)
    return actions.clip(space.low, space.high).astype(space.dtype)


# §11  The program ----------


def train(env=Settings.env, **chosen):
    """Train from Python. Return the agent, and a list with the record of each iteration."""
    agent = new_agent(env, **chosen)
    with closing(make_envs(env, agent.settings.num_envs)) as envs:
        history = list(learn(agent, envs))
    return agent, history


def run(agent, save_path, log_path):
    """Train as the command line does. Print about twenty rows, and save after each iteration."""
    settings = agent.settings
    folder = os.path.dirname(save_path or "") or "."
    if save_path and (os.path.isdir(save_path) or not os.access(folder, os.W_OK)):
        raise UsageError(f"cannot save {save_path}: it needs a file name in a writable folder")
    try:
        log = open(log_path or os.devnull, "w", newline="")
    except OSError as error:
        raise UsageError(f"cannot write {log_path}: {error.strerror}") from error
    history = []
    num_rows = 0
    with log, closing(make_envs(settings.env, settings.num_envs)) as envs:
        writer = csv.writer(log)
        print(settings)
        if sys.stdout.isatty():
            envs = LiveLine(envs, settings.total_steps)
        try:
            for record in learn(agent, envs):
                if not history:
                    writer.writerow(record)
                    print_row(record)
                history.append(record)
                writer.writerow(record.values())
                log.flush()
                if 20 * record["steps"] >= num_rows * settings.total_steps:
                    num_rows += 1
                    print_row(short(number) for number in record.values())
                if save_path:
                    save(save_path, agent)
        finally:
            if history:
                print_curve(history)


class LiveLine(gym.vector.VectorWrapper):
    """Shows on a terminal how far a run has come, from its first second on."""

    def __init__(self, envs, total_steps):
        super().__init__(envs)
        self.total_steps = total_steps
        self.steps = 0
        self.start = time.monotonic()
        self.shown = 0

    def step(self, actions):
        self.steps += self.num_envs
        seconds = time.monotonic() - self.start
        if seconds > self.shown + 0.2:
            self.shown = seconds
            speed = self.steps / seconds
            left = (self.total_steps - self.steps) / speed
            line = f"{self.steps:,} steps, {speed:,.0f} steps/s, {left:,.0f} s left"
            print(f"{line:<60}", end="\r", flush=True)
        return self.env.step(actions)


def short(number):
    """Return a number as text, with four significant digits."""
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def print_row(texts):
    """Print a row of the table."""
    print("".join(f" {text:>11}" for text in texts), flush=True)


def print_curve(history):
    """Draw the mean return over the steps, in 72 columns and 8 lines."""
    records = [record for record in history if record["episodes"] > 0]
    if not records:
        print("no episode has ended yet")
        return
    steps = [record["steps"] for record in records]
    returns = [record["mean_return"] for record in records]
    columns = np.interp(np.linspace(steps[0], steps[-1], 72), steps, returns)
    for level in np.linspace(columns.max(), columns.min(), 8):
        bars = "".join("#" if column >= level else " " for column in columns)
        print(f"{short(level):>12} |{bars}")
    print(f"mean return over {steps[0]:,} to {steps[-1]:,} steps")


def evaluate(agent, episodes=None, render=False, verbose=False, max_steps=100_000):
    """Play greedy episodes on seeds of their own; return their returns (episodes,).

    Each environment plays one episode a round, or short ones would prevail. An endless one
    is cut off at max_steps. verbose prints a summary.
    """
    settings = agent.settings
    if episodes is None:
        episodes = settings.eval_episodes
    num_envs = 1 if render else min(episodes, settings.num_envs, 10)
    rng = np.random.default_rng([settings.seed, 1])
    returns = []
    num_cut_off = 0
    with closing(make_envs(settings.env, num_envs, render)) as envs:
        while len(returns) < episodes:
            obs, _ = envs.reset(seed=int(rng.integers(2**31 - num_envs)))
            totals = np.zeros(num_envs)
            is_playing = np.ones(num_envs, bool)
            for _ in range(max_steps):
                actions = agent.policy(obs).mode()
                obs, rewards, terminated, truncated, _ = envs.step(actions)
                totals += rewards * is_playing
                is_playing[np.logical_or(terminated, truncated)] = False
                if not is_playing.any():
                    break
            num_cut_off += is_playing[: episodes - len(returns)].sum()
            returns.extend(totals)
    returns = np.array(returns[:episodes])
    if verbose:
        line = f"mean {short(returns.mean())}, std {short(returns.std())}"
        line += f", min {short(returns.min())}, max {short(returns.max())}"
        if num_cut_off > 0:
            line += f" ({num_cut_off} cut off after {max_steps:,} steps)"
        print(f"greedy evaluation over {episodes} episodes: {line}")
    return returns


def arrays_of(agent):
    """Return what playing and a warm start need besides the settings: arrays by name."""
    seen = agent.obs_stats
    earned = agent.return_stats
    return {
        "theta": agent.theta,
        "phi": agent.phi,
        "obs_mean": agent.obs_mean,
        "obs_std": agent.obs_std,
        "obs_stats": flatten([seen.mean, seen.var, seen.count]),
        "return_stats": flatten([earned.mean, earned.var, earned.count]),
    }


def save(path, agent):
    """Write a policy file, whole or not at all. Raises UsageError if that fails."""
    text = json.dumps(asdict(agent.settings), default=lambda number: number.tolist())
    temporary = f"{path}.{os.getpid()}.tmp"  # another process may save to the same path
    try:
        with open(temporary, "wb") as file:
            np.savez(file, settings=text, **arrays_of(agent))
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(f"cannot save {path}: {error.strerror}") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path, **chosen):
    """Return the agent in a policy file. Chosen settings win over those of the file.

    Its optimisers and β start afresh. Raises UsageError if it is not a policy file, or one of
    another task.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        values = json.loads(str(arrays.pop("settings"))) | chosen
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise ValueError("it has numbers that are not finite")
    except Exception as error:  # there are many ways in which a file can be broken
        raise UsageError(f"cannot use {path} as a policy: {error}") from error
    agent = new_agent(**values)
    shapes = {name: array.shape for name, array in arrays_of(agent).items()}
    if shapes != {name: array.shape for name, array in arrays.items()}:
        raise UsageError(f"{path} does not fit {agent.settings.env}: it has other sizes")
    agent.theta[:] = arrays["theta"]
    agent.phi[:] = arrays["phi"]
    agent.obs_mean = arrays["obs_mean"]
    agent.obs_std = arrays["obs_std"]
    for name, stats in [("obs_stats", agent.obs_stats), ("return_stats", agent.return_stats)]:
        shape = stats.mean.shape
        stats.mean, stats.var, stats.count = unflatten(arrays[name], [shape, shape, ()])
    return agent


def parse_arguments(argv):
    """Return the options of the command line by name, and of the settings those chosen."""
    parser = argparse.ArgumentParser(
        epilog="The defaults depend on the task. A run prints what it uses.",
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"ppo.py: {message}\n")
    files = {
        "save": "keep the policy in this file",
        "load": "start from the policy in this file",
        "play": "only evaluate the policy in this file",
        "log": "write a CSV row for each iteration",
    }
    for name, text in files.items():
        parser.add_argument(f"--{name}", dest=f"{name}_path", metavar="FILE", help=text)
    parser.add_argument("--render", action="store_true", help="show episodes in a window")
    for f in fields(Settings):
        flag = "--" + f.name.replace("_", "-")
        form = {"type": int, "nargs": "*"} if f.type is tuple else {"type": f.type}
        text = f"{f.metadata['help']}; default {f.default}"
        parser.add_argument(flag, default=argparse.SUPPRESS, metavar="X", help=text, **form)
    return vars(parser.parse_args(argv))


def program(save_path, load_path, play_path, log_path, render, **chosen):
    """Train or play. What may fail at the end is tried at the start."""
    if "" in (save_path, load_path, play_path, log_path):
        raise UsageError("a file needs a name")
    if play_path and (load_path or save_path or log_path):
        raise UsageError("--play only evaluates: leave out --load, --save and --log")
    if log_path and log_path in (save_path, load_path):
        raise UsageError("--log needs a file of its own")
    path = play_path or load_path
    agent = load(path, **chosen) if path else new_agent(**chosen)
    if render:
        with closing(make_envs(agent.settings.env, 1, render=True)) as envs:
            envs.reset(seed=0)
    if not play_path:
        run(agent, save_path, log_path)
    if not (play_path and render):
        evaluate(agent, verbose=True)
    if render:
        evaluate(agent, chosen.get("eval_episodes", 5), render=True, verbose=True)


def main(argv=None):
    """Run the command line. Return 0, 2 for a mistake of the user, or 130 after Ctrl-C."""
    gym.logger.min_level = gym.logger.ERROR  # its warnings take several lines
    try:
        with np.errstate(all="ignore"):  # learn looks for numbers that are not finite
            program(**parse_arguments(argv))
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, gym.error.DependencyNotInstalled, FloatingPointError, MemoryError) as error:
        print("ppo.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
