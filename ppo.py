# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26"]
# ///
"""Proximal Policy Optimization (PPO) in one file, with numpy and gymnasium.

    python ppo.py --env CartPole-v1

Every gradient is written by hand. Read from top to bottom, with the lectures beside it.
`Eq. 9` stands above the code of this formula. README.md lists all 19.

The algorithm (Eq. 19)
    create the actor θ and the critic φ (§1, §2)
    repeat until all steps are used up (§8)
        play T steps in N environments with the policy π_θ (§3)
        judge: advantages Â by GAE, and returns R̂ = Â + V_φ (§4, §8)
        learn: K passes for θ, then K for φ, B rows at a time
            move θ against the gradient of the actor's loss (§5, §6, §7)
            move φ against the gradient of the critic's loss (§6, §7)

While θ moves, the data stay those of the θ that played: in the lectures θ_k or θ', in
names _old.

Names
    N, T, K        num_envs, num_steps, epochs
    n, d, P, B     numbers of actions, of an action's components, of parameters, of rows
    s, a, Â, R̂, ρ  observations, actions, advantages, returns, ratio
    θ, φ           theta, phi: vectors (P,); actor, critic: the same as lists of arrays
    γ, λ, ε, β, c  gamma, lam, clip or epsilon, beta, ent_coef
"""

import os

# Small networks run fastest on one thread. numpy reads this on import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import math
import sys
import time
import traceback
from contextlib import closing
from dataclasses import dataclass, field, fields
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete, flatdim
from gymnasium.wrappers.vector import FlattenObservation, TransformAction, TransformObservation

# §1  Networks
# Actor and critic are networks of layers x W + b, with tanh between them. A network is a
# list of arrays [W1, b1, W2, b2, ...]. Adam (§7) and TRPO (§9) see it as one long vector.


def flatten(arrays):
    """Join the numbers of all arrays into one vector (P,)."""
    return np.concatenate(arrays, axis=None)


def unflatten(vector, arrays):
    """Cut the vector (P,) into views shaped like these arrays. They change when it does."""
    views = []
    for array in arrays:
        views.append(vector[: array.size].reshape(array.shape))
        vector = vector[array.size :]
    return views


def init_mlp(sizes, rng, out_gain=1.0, dtype=np.float32):
    """Return new parameters for layers of these sizes, e.g. [4, 64, 64, 2].

    Each W (fan_in, fan_out) is an orthogonal matrix, which keeps the size of signals
    (Saxe et al. 2014), times √2, or times out_gain in the last layer. Each b is 0.
    """
    params = []
    gains = [math.sqrt(2)] * (len(sizes) - 2) + [out_gain]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains):
        noise = rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out)))
        q, r = np.linalg.qr(noise)
        q *= np.sign(np.diag(r))  # qr alone favours some matrices
        W = q if fan_in >= fan_out else q.T
        params.append((gain * W).astype(dtype))
        params.append(np.zeros(fan_out, dtype))
    return params


def mlp_forward(params, inputs):
    """Return outputs (B, out_dim) for inputs (B, in_dim), and a cache: each layer's input."""
    cache = []
    x = inputs
    for W, b in zip(params[0::2], params[1::2]):  # zip leaves out a last log_std (§2)
        if cache:  # not the first layer
            x = np.tanh(x)
        cache.append(x)
        x = x.dot(W) + b  # .dot is faster than @ for small arrays
    return x, cache


def mlp_backward(params, cache, d_outputs):
    """Return the gradients [dW1, db1, ...], from ∂loss/∂outputs = d_outputs (B, out_dim)."""
    grads = []
    for W, x in reversed(list(zip(params[0::2], cache))):
        # outputs = x W + b:   ∂loss/∂W = xᵀ d_outputs,   ∂loss/∂b = Σ_rows d_outputs
        dW = x.T.dot(d_outputs)
        db = np.ones(len(x), x.dtype).dot(d_outputs)  # .sum(axis=0), but faster
        grads = [dW, db, *grads]
        if x is not cache[0]:
            # ∂loss/∂x = d_outputs Wᵀ;   x = tanh(z), so ∂x/∂z = 1 - x²
            dx = d_outputs.dot(W.T)
            d_outputs = dx * (1 - x * x)
    return grads


# §2  Policies
# A policy is a distribution over actions for each state of a batch. log_prob and entropy
# return a number for each state (B,), and its gradients: [∂/∂logits], or
# [∂/∂mean, ∂/∂log_std].


def log_softmax(logits):
    """Return log π(·|s) (B, n) for logits (B, n)."""
    logits = np.asfortranarray(logits)  # the same numbers, stored by columns: faster
    shifted = logits - logits.max(axis=-1, keepdims=True)  # exp cannot overflow
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Categorical:
    """A choice among n actions: π(a|s) = softmax(logits)_a, given logits (B, n)."""

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
        assert actions.shape == self.logits.shape[:1]
        assert (actions >= 0).all()  # -1 would be the last
        log_probs = log_softmax(self.logits)
        rows = np.arange(len(actions))
        # log π(a) = logits_a - log Σ exp(logits). So ∂log π(a)/∂logits = onehot(a) - π,
        # the first factor of ∇log π (Eq. 4).
        grad_logits = -np.exp(log_probs)
        grad_logits[rows, actions] += 1
        return log_probs[rows, actions], [grad_logits]

    def entropy(self):
        """Return H(π) (B,), and its gradients [(B, n)]."""
        log_probs = log_softmax(self.logits)
        probs = np.exp(log_probs)
        # Eq. 17   H = -Σ π log π
        entropy = -(probs * log_probs).sum(axis=-1)
        # Eq. 3   ∂π_a/∂logits = π_a (onehot(a) - π) sums to 0 over a: the 1 drops out.
        #         ∂H/∂logits = -Σ_a (log π_a + 1) ∂π_a/∂logits = -π (log π + H)
        grad_logits = -probs * (log_probs + entropy[:, None])
        return entropy, [grad_logits]


class Gaussian:
    """Independent normal actions N(mean, exp(log_std)²), of mean (B, d), log_std (d,)."""

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
        assert actions.shape == self.mean.shape
        z = (actions - self.mean) / self.std
        # log π = -Σ (½z² + log std + ½ log 2π)
        log_prob = -(0.5 * z * z + self.log_std + 0.5 * math.log(2 * math.pi)).sum(axis=-1)
        # ∂log π/∂mean = z / std,   ∂log π/∂log_std = z² - 1
        return log_prob, [z / self.std, z * z - 1]

    def entropy(self):
        """Return H(π) (B,), and its gradients [(B, d), (B, d)]."""
        # Eq. 17   H = Σ (log std + ½ log 2πe) in every state;   ∂H/∂log_std = 1
        zeros = np.zeros_like(self.mean)
        entropy = (zeros + self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(axis=-1)
        return entropy, [zeros, np.ones_like(self.mean)]


def policy_forward(actor, inputs):
    """Return the policy for inputs (B, obs_dim), and the cache of mlp_forward.

    It is Gaussian if actor ends in a log_std (d,), otherwise Categorical.
    """
    outputs, cache = mlp_forward(actor, inputs)
    if len(actor) % 2 == 1:
        return Gaussian(outputs, actor[-1]), cache
    return Categorical(outputs), cache


# §3  Trajectory


def rollout(envs, act, obs, num_steps):
    """Play num_steps steps in N environments. act maps observations to actions (N, ...).

    envs is a Gymnasium vector environment, obs (N, obs_dim) its last observation. Returns
    observations (T+1, N, obs_dim) in float32, or float64 if obs needs it, actions (T, N, ...),
    rewards in float32, terminated and truncated (T, N).

    An episode is terminated at a true end, truncated at a time limit. The step after
    either only resets (Gymnasium's NEXT_STEP): learn (§8) leaves out its row.

        t   observations[t]   actions[t]   rewards[t]   terminated[t]
        6   s_7               a_7          r_7          True            the episode ends
        7   s_8, the last     ignored      0            False           the reset
        8   s_1               a_1          r_1          False           the next episode
    """
    observations = np.empty((num_steps + 1, *obs.shape), np.result_type(obs, np.float32))
    rewards = np.empty((num_steps, len(obs)), np.float32)
    terminated = np.empty(rewards.shape, bool)
    truncated = np.empty(rewards.shape, bool)
    actions = []
    # Eq. 1   τ = (s_1, a_1, r_1, s_2, ...) is drawn from
    #         p_θ(τ) = p(s_1) Π π_θ(a_t|s_t) p(s_{t+1}|s_t, a_t)
    observations[0] = obs
    for t in range(num_steps):
        actions.append(act(observations[t]))  # a_t ~ π_θ(·|s_t), the only factor with θ
        observations[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
    if not (np.isfinite(observations).all() and np.isfinite(rewards).all()):
        raise FloatingPointError("the environment returned a number that is not finite")
    return observations, np.stack(actions), rewards, terminated, truncated


# §4  Advantage
# How much better was the action than the critic expected in that state?


def gae(rewards, values, terminated, truncated, gamma, lam):
    """Generalized Advantage Estimation (Schulman et al. 2016): return Â (T, N).

    rewards, terminated and truncated (booleans or 0/1) are (T, N), values (T+1, N). Step
    t led to the state of values[t+1], also where an episode ends. Ignore Â in rows of resets.
    """
    shapes = {rewards.shape, terminated.shape, truncated.shape, values[1:].shape}
    if rewards.ndim != 2 or len(shapes) > 1:
        raise ValueError("all must be (T, N), for one environment (T, 1), and values (T+1, N)")
    gamma = float(gamma)  # a numpy scalar would widen float32 arrays
    # Eq. 7   Q(s_t, a_t) = r_t + γ V(s_{t+1}), from one sample of s_{t+1}
    # V(s_{t+1}) is 0 after a true end. At a time limit or the rollout's end it stays.
    q_values = rewards + gamma * np.where(terminated, 0.0, values[1:])
    # Eq. 7, 8   A = Q - V; with this one-step Q it is the TD error δ_t
    deltas = q_values - values[:-1]
    ended = np.logical_or(terminated, truncated)
    advantages = np.zeros(values.shape, deltas.dtype)  # the last row stays 0
    for t in reversed(range(len(rewards))):
        # After either ending, no later step belongs to this episode.
        next_advantage = np.where(ended[t], 0, advantages[t + 1])
        # Eq. 5   If λ = 1 and a true end follows, Â_t + V(s_t) = R_t = r_t + γ R_{t+1}.
        # Eq. 9   Â_t = δ_t + γλ Â_{t+1}
        advantages[t] = deltas[t] + gamma * lam * next_advantage
    return advantages[:-1]


# §5  Objectives
# Each loss takes log_prob, log_prob_old and advantages (B,), and returns two arrays (B,): the
# loss, whose mean is minimised, and its slope ∂loss/∂log π. At θ_k, where ρ = 1, the slope is
# -Â (of KL it is 0).


def policy_gradient(log_prob, log_prob_old, advantages):
    """The policy gradient (Eq. 4, 6), valid for one step."""
    # Eq. 4, 6   loss = -log π Â;   ∂loss/∂log π = -Â
    loss = -log_prob * advantages
    slope = -advantages
    return loss, slope


def importance_sampling(log_prob, log_prob_old, advantages):
    """The surrogate (Eq. 12): data of π_θ_k, reweighted by importance sampling (Eq. 11).

    The ratio corrects the actions, but the states and Â are still those of π_θ_k. This error
    and the variance of Eq. 11 grow as θ moves away. So the objectives below keep θ close.
    """
    # Eq. 3, 11, 12   loss = -ρ Â, ρ = π_θ(a|s) / π_θ_k(a|s);   ∇π = π ∇log π, so ∂ρ/∂log π = ρ
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
    return kl, ratio_minus_1


def kl_penalty(log_prob, log_prob_old, advantages, beta):
    """PPO1 (Eq. 15): the surrogate, and beta as the price of moving away from π_θ_k."""
    beta = float(beta)
    loss, slope = importance_sampling(log_prob, log_prob_old, advantages)
    kl, kl_slope = kl_divergence(log_prob, log_prob_old)
    # Eq. 15   loss = -(ρ Â - β KL)
    return loss + beta * kl, slope + beta * kl_slope


def adapt_beta(beta, kl, target):
    """Return the next β, given this iteration's KL (Eq. 15; Schulman et al. 2017)."""
    # Eq. 15   KL > KL_max: β grows;   KL < KL_min: β shrinks
    if kl > 1.5 * target:
        return min(2 * beta, 1e4)
    if kl < target / 1.5:
        return max(beta / 2, 1e-4)
    return beta


def clip(log_prob, log_prob_old, advantages, epsilon):
    """PPO2 (Eq. 16): the surrogate, but moving ρ beyond 1 ± epsilon gains nothing.

    Without the min, rows that moved the wrong way could not come back.
    """
    epsilon = float(epsilon)
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


# §6  Losses
# The chain rule: slope (§5) times ∂log π/∂outputs (§2), sent back through the layers (§1).


def actor_loss(actor, objective, ent_coef, inputs, actions, log_prob_old, advantages):
    """Return the actor's mean loss over B rows, and its gradient (P,).

    objective is a function of §5. inputs are (B, obs_dim), actions (B,) or (B, d),
    log_prob_old and advantages (B,).
    """
    B = len(inputs)
    policy, cache = policy_forward(actor, inputs)
    log_prob, log_prob_grads = policy.log_prob(actions)
    if not (log_prob_old.shape == advantages.shape == (B,)):
        raise ValueError(f"log_prob_old and advantages must be ({B},)")
    loss, slope = objective(log_prob, log_prob_old, advantages)
    # ∂loss/∂logits = ∂loss/∂log π · ∂log π/∂logits; likewise for mean and log_std
    d_policy = [slope[:, None] * grad for grad in log_prob_grads]
    if ent_coef > 0:
        # Eq. 17   loss - c H(π_θ)
        c = float(ent_coef)
        entropy, entropy_grads = policy.entropy()
        loss = loss - c * entropy
        d_policy = [d - c * grad for d, grad in zip(d_policy, entropy_grads)]
    d_outputs = d_policy[0] / B  # the loss is a mean over rows
    grads = mlp_backward(actor, cache, d_outputs)
    if len(d_policy) == 2:  # Gaussian: all rows use one log_std, so its gradients add up
        grads.append(d_policy[1].sum(axis=0) / B)
    return loss.sum() / B, flatten(grads)


def critic_loss(critic, inputs, returns):
    """Return the mean loss, and its gradient (P,), for inputs (B, obs_dim), returns (B,)."""
    B = len(inputs)
    outputs, cache = mlp_forward(critic, inputs)
    if returns.shape != (B,):
        raise ValueError(f"returns must be ({B},)")
    # Eq. 18   loss = (V - R̂)²;   ∂loss/∂V = 2 (V - R̂)
    error = outputs[:, 0] - returns
    d_outputs = 2 * error[:, None] / B
    return error @ error / B, flatten(mlp_backward(critic, cache, d_outputs))


# §7  Adam


def clip_by_global_norm(gradient, max_norm):
    """Return the gradient (P,), scaled down to the length max_norm if it is longer."""
    norm = float(np.sqrt(gradient @ gradient))
    if norm == math.inf:
        return gradient * math.nan  # it overflowed, and scaling would give 0
    if norm > max_norm:
        return gradient * float(max_norm / norm)
    return gradient


class Adam:
    """Adam (Kingma & Ba 2015) for a vector theta (P,); step moves it in place."""

    def __init__(self, theta):
        self.theta = theta
        self.m = np.zeros_like(theta)
        self.v = np.zeros_like(theta)
        self.t = 0

    def step(self, gradient, lr, beta1=0.9, beta2=0.999, eps=1e-5):
        """Move theta against the gradient (P,): each number by about lr."""
        assert gradient.shape == self.theta.shape
        self.t += 1
        # m and v are running means of g and g²:   m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
        self.m += (1 - beta1) * (gradient - self.m)
        self.v += (1 - beta2) * (gradient * gradient - self.v)
        # They start at 0. m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ) correct that.
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        # θ ← θ - lr m̂ / (√v̂ + eps)
        self.theta -= lr * m_hat / (np.sqrt(v_hat) + eps)


# §8  PPO


def setting(default, help):
    """A field of Settings that is a flag."""
    return field(default=default, metadata={"help": f"{help}; default {default}"})


@dataclass(frozen=True)
class Settings:
    """All settings of a run. Each is a flag."""

    env: str = setting("CartPole-v1", "name in Gymnasium, or module:Name-v0")
    seed: int = setting(0, "seed of all random numbers")
    total_steps: int = setting(500_000, "environment steps, resets included")
    num_envs: int = setting(16, "N, environments side by side")
    num_steps: int = setting(128, "T, steps of each in a rollout")
    epochs: int = setting(6, "K, passes over the same data, Eq. 10")
    minibatch_size: int = setting(128, "rows in a gradient step, at most")
    lr: float = setting(2e-3, "learning rate; falls to 0")
    actor_lr: float = setting(None, "learning rate of the actor, if not lr")
    gamma: float = setting(0.995, "discount, Eq. 5")
    lam: float = setting(0.95, "lambda of GAE, Eq. 9")
    objective: str = setting("clip", "pg, is, trpo, kl or clip: Eq. 4, 12, 14, 15, 16")
    clip: float = setting(0.2, "epsilon of clip, Eq. 16")
    kl_target: float = setting(0.01, "delta of trpo, Eq. 14; aim of kl, Eq. 15")
    ent_coef: float = setting(0.0, "c, entropy bonus, Eq. 17; falls to 0")
    max_grad_norm: float = setting(0.5, "longer gradients are shortened")
    hidden: tuple = setting((64, 64), "sizes of the hidden layers")
    normalize_steps: int = setting(1, "normalise by the first N steps; 0: do not")
    log_std_init: float = setting(-0.5, "log_std of a new policy")
    eval_episodes: int = setting(100, "episodes of the greedy evaluation")


class Agent:
    """Actor and critic with their optimisers, and statistics of what they have seen."""

    def __init__(self, envs, settings):
        self.settings = settings
        self.rng = np.random.default_rng(settings.seed)
        self.obs_space = envs.obs_space  # not flattened (§11)
        self.action_space = envs.single_action_space
        obs_dim = flatdim(self.obs_space)
        act_dim = flatdim(self.action_space)

        # The small gain makes π about the same in all states at first.
        actor = init_mlp([obs_dim, *settings.hidden, act_dim], self.rng, out_gain=0.01)
        if isinstance(self.action_space, Box):
            actor.append(np.full(act_dim, settings.log_std_init, np.float32))
        # Without hidden layers, as for a table (§11), V starts at 0.
        gain = 1.0 if settings.hidden else 0.0
        critic = init_mlp([obs_dim, *settings.hidden, 1], self.rng, gain)

        self.theta = flatten(actor)
        self.phi = flatten(critic)
        self.actor = unflatten(self.theta, actor)  # views: write into θ, do not replace it
        self.critic = unflatten(self.phi, critic)
        self.obs_mean = np.zeros(obs_dim)
        self.obs_std = np.ones(obs_dim)
        self.obs_moments = np.zeros((3, obs_dim))  # mean, variance, number (§10)
        self.return_moments = np.array([0, 1, 1e-4])  # almost no weight
        self.actor_adam = Adam(self.theta)
        self.critic_adam = Adam(self.phi)
        self.beta = 1.0

    def __setstate__(self, state):
        """After copying: copies of views are no views. Make views again."""
        vars(self).update(state)
        self.actor = unflatten(self.theta, self.actor)
        self.critic = unflatten(self.phi, self.critic)

    def normalize(self, obs):
        """Return observations (..., obs_dim), shifted, scaled and clipped to ±10 (§10)."""
        if self.settings.normalize_steps == 0:
            return obs.astype(np.float32)
        return ((obs - self.obs_mean) / self.obs_std).clip(-10, 10).astype(np.float32)

    def policy(self, obs):
        """Return the policy for observations (B, obs_dim)."""
        if obs.shape[1:] != self.obs_mean.shape:
            raise ValueError(f"observations must be (B, {len(self.obs_mean)})")
        policy, _ = policy_forward(self.actor, self.normalize(obs))
        return policy

    def act(self, obs):
        """Return the likeliest action for one observation, as env.step accepts it."""
        space = self.obs_space
        if space.shape is not None and np.shape(obs) != space.shape:
            raise ValueError(f"an observation must be {space.shape}")
        policy = self.policy(gym.spaces.flatten(space, obs)[None])
        return legal_actions(self.action_space, policy.mode())[0]  # §11


def fit(agent, adam, loss_of, num_rows, lr):
    """Take K epochs of gradient steps. loss_of(rows) returns the mean loss and its gradient."""
    num_minibatches = math.ceil(num_rows / agent.settings.minibatch_size)
    for _ in range(agent.settings.epochs):  # Eq. 10: the same data again
        order = agent.rng.permutation(num_rows)
        for rows in np.array_split(order, num_minibatches):
            _, gradient = loss_of(rows)
            adam.step(clip_by_global_norm(gradient, agent.settings.max_grad_norm), lr)


def update(agent, inputs, actions, advantages, returns, remaining):
    """Learn from transitions (B, ...), and return a report (§10).

    remaining, the share of the run to come, scales the learning rates and the entropy bonus.
    """
    settings = agent.settings
    actor_lr = (settings.actor_lr or settings.lr) * remaining
    ent_coef = settings.ent_coef * remaining
    objective = {
        "pg": policy_gradient,
        "is": importance_sampling,
        "trpo": importance_sampling,
        "kl": partial(kl_penalty, beta=agent.beta),
        "clip": partial(clip, epsilon=settings.clip),
    }[settings.objective]

    # Eq. 6: the mean is a baseline, too. Dividing (not in the lectures) makes the scale 1.
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_old, _ = policy_forward(agent.actor, inputs)  # θ is still θ_k
    log_prob_old, _ = policy_old.log_prob(actions)
    data = [inputs, actions, log_prob_old, normalized]

    def loss_of_actor(rows):
        return actor_loss(agent.actor, objective, ent_coef, *[array[rows] for array in data])

    def loss_of_critic(rows):
        return critic_loss(agent.critic, inputs[rows], returns[rows])

    if settings.objective == "pg":
        # Eq. 10: another step would need data of the new θ.
        _, gradient = loss_of_actor(slice(None))  # all rows
        agent.actor_adam.step(clip_by_global_norm(gradient, settings.max_grad_norm), actor_lr)
    elif settings.objective == "trpo":
        trpo(agent.theta, agent.actor, objective, ent_coef, data, settings.kl_target)  # §9
    else:
        fit(agent, agent.actor_adam, loss_of_actor, len(inputs), actor_lr)
    fit(agent, agent.critic_adam, loss_of_critic, len(inputs), settings.lr * remaining)

    figures = report(agent, inputs, actions, log_prob_old, advantages, returns)  # §10
    agent.beta = adapt_beta(agent.beta, figures["kl"], settings.kl_target)
    return figures


def sums_so_far(rewards, ended, gamma, before):
    """Return the sums of each episode's rewards so far (T, N), and those that go on (N,).

    gamma discounts older rewards. before (N,) is what the previous call returned, or 0.
    """
    sums = rewards.astype(float)
    factor = gamma * (1 - ended)  # 0 after an end
    sums[0] += gamma * before
    for t in range(1, len(rewards)):
        # g_t = r_t + γ g_{t-1}: Eq. 5, but looking back
        sums[t] += factor[t - 1] * sums[t - 1]
    return sums, (1 - ended[-1]) * sums[-1]


def learn(agent, envs):
    """The PPO loop (Eq. 19), for total_steps steps. Yields a record of each update.

    envs come from make_envs (§11). Raises FloatingPointError if a number is not finite.
    """
    settings = agent.settings

    def sample(obs):
        return agent.policy(obs).sample(agent.rng)

    N = envs.num_envs
    # These go on from rollout to rollout, as episodes do.
    steps = 0
    totals = []
    ended_before = np.zeros(N, bool)
    return_so_far = 0
    discounted_so_far = 0

    seed = int(agent.rng.integers(2**31 - N))  # the last may get seed + N - 1
    obs, _ = envs.reset(seed=seed)  # (N, obs_dim)
    while steps < settings.total_steps:
        # Eq. 19, play: T steps in each environment with θ_k.
        steps_left = settings.total_steps - steps
        T = min(settings.num_steps, math.ceil(steps_left / N))
        observations, actions, rewards, terminated, truncated = rollout(envs, sample, obs, T)
        obs = observations[-1]  # (N, obs_dim)
        ended = terminated | truncated  # (T, N)
        # The step after an end only resets.
        is_transition = ~np.vstack([ended_before, ended[:-1]])  # (T, N)
        ended_before = ended[-1]

        # Eq. 2   With γ = 1, an episode's last sum is R(τ) = Σ r_t. Its mean estimates J(θ).
        sums, return_so_far = sums_so_far(rewards, ended, 1, return_so_far)  # (T, N), (N,)
        totals.extend(sums[ended])
        mean_return = float(np.mean(totals[-100:])) if totals else math.nan
        steps += T * N
        if not is_transition.any():
            continue  # a rollout of one step may be resets only

        # Eq. 19, judge: Â and R̂ with φ_k. Scaling the rewards first keeps V small (§10).
        sums, discounted_so_far = sums_so_far(rewards, ended, settings.gamma, discounted_so_far)
        scale_rewards(agent, rewards, sums[is_transition])
        inputs = agent.normalize(observations)  # (T+1, N, obs_dim)
        values, _ = mlp_forward(agent.critic, inputs.reshape((T + 1) * N, -1))
        values = values.reshape(T + 1, N)
        advantages = gae(rewards, values, terminated, truncated, settings.gamma, settings.lam)
        returns = advantages + values[:-1]  # (T, N)   Eq. 18   R̂ = Â + V_φ_k(s)

        # Eq. 19, learn: K epochs on the same data make θ_{k+1} and φ_{k+1}.
        arrays = [inputs[:-1], actions, advantages, returns]
        batch = [array[is_transition] for array in arrays]  # (T, N, ...) -> (B, ...)
        figures = update(agent, *batch, remaining=steps_left / settings.total_steps)
        observe(agent, observations[:-1][is_transition])  # for the next rollout (§10)
        yield {"steps": steps, "episodes": len(totals), "mean_return": mean_return, **figures}


# To learn PPO, a student may stop here. TRPO follows, then what the lectures leave out.

# §9  TRPO
# TRPO (Eq. 14; Schulman et al. 2015) is what PPO replaces. Of all steps Δ with KL ≤ δ it
# takes the one with the lowest loss. Near θ_k this changes by gᵀΔ, where g = ∇loss, and KL
# is ½ΔᵀFΔ with the Fisher matrix F = E[∇log π ∇log πᵀ]. loss_of and kl are functions of
# theta that return (mean, gradient).


def fisher_product(kl, theta, v, damping=0.1):
    """Return F v + damping v (P,). F v is how ∇KL changes along v (P,); F can be singular."""
    # Eq. 14   F v ≈ (∇KL(θ_k + hv) - ∇KL(θ_k - hv)) / 2h
    # hv is 2 ∛eps long: a shorter one drowns in rounding, a longer one is not local.
    h = 2 * float(np.finfo(theta.dtype).eps) ** (1 / 3) / float(np.linalg.norm(v))
    _, ahead = kl(theta + h * v)
    _, behind = kl(theta - h * v)
    return (ahead - behind) / (2 * h) + float(damping) * v


def conjugate_gradients(product, g, iterations=10):
    """Return x (P,) with F x ≈ g (P,), given only product(v) = F v (Hestenes & Stiefel 1952).

    The directions are chosen so that no step undoes an earlier one.
    """
    x = np.zeros_like(g)
    residual = g
    direction = g
    for _ in range(iterations):
        F_direction = product(direction)
        residual_squared = residual @ residual
        step_size = residual_squared / (direction @ F_direction)
        x = x + step_size * direction
        residual = residual - step_size * F_direction
        if residual @ residual <= 1e-10 * (g @ g):
            break
        direction = residual + (residual @ residual / residual_squared) * direction
    return x


def trust_region_step(theta, loss_of, kl, delta):
    """Move theta (P,) in place, if a step makes the loss fall and keeps kl at most delta."""
    loss_old, g = loss_of(theta)
    if g @ g == 0:
        return
    x = conjugate_gradients(lambda v: fisher_product(kl, theta, v), g)
    # Eq. 14   Δ = -√(2δ / xᵀFx) x, where F x = g (damped), so xᵀFx = xᵀg
    step = -float(np.sqrt(2 * delta / (x @ g))) * x
    for _ in range(10):  # Δ is right only near θ_k: halve it until both conditions hold
        kl_new, _ = kl(theta + step)
        loss_new, _ = loss_of(theta + step)
        if kl_new <= delta and loss_new < loss_old:
            theta += step
            return
        step = step / 2


def trpo(theta, actor, objective, ent_coef, data, delta):
    """Take a trust_region_step; data are inputs, actions, log_prob_old and advantages."""

    def loss_of(theta):
        return actor_loss(unflatten(theta, actor), objective, ent_coef, *data)

    def kl(theta):
        return actor_loss(unflatten(theta, actor), kl_divergence, 0, *data)

    trust_region_step(theta, loss_of, kl, delta)


# §10  Statistics
# Networks learn best from numbers of about size 1. Moments (3, ...) are mean, variance and
# number of what was seen.


def update_moments(moments, rows):
    """Add rows (B, ...) to moments (3, ...), in place."""
    new = [rows.mean(axis=0), rows.var(axis=0), len(rows)]
    moments[:] = gym.wrappers.utils.update_mean_var_count_from_moments(*moments, *new)


def scale_rewards(agent, rewards, sums):
    """Divide rewards, in place, by the deviation of all sums seen, these (B,) too."""
    update_moments(agent.return_moments, sums)
    rewards /= np.sqrt(agent.return_moments[1] + 1e-8)


def observe(agent, obs):
    """Update the statistics from observations (B, obs_dim).

    A component's mean and std are renewed until normalize_steps steps are counted, and
    later only if the clip to ±10 hid over 1 % of its values.
    """
    if agent.settings.normalize_steps == 0:
        return
    _, _, count = agent.obs_moments
    share_outside = (abs(obs - agent.obs_mean) > 10 * agent.obs_std).mean(axis=0)
    outdated = (count < agent.settings.normalize_steps) | (share_outside > 0.01)
    update_moments(agent.obs_moments, obs.astype(np.float64))
    mean, var, _ = agent.obs_moments
    agent.obs_mean[outdated] = mean[outdated]
    agent.obs_std[outdated] = np.sqrt(var[outdated] + 1e-8)


def report(agent, inputs, actions, log_prob_old, advantages, returns):
    """Return figures on an update with B rows."""
    policy, _ = policy_forward(agent.actor, inputs)  # θ is now θ_{k+1}
    log_prob, _ = policy.log_prob(actions)
    entropy, _ = policy.entropy()
    kl, ratio_minus_1 = kl_divergence(log_prob, log_prob_old)
    if not np.isfinite(np.hstack([agent.theta, agent.phi, agent.obs_std, kl])).all():
        raise FloatingPointError("diverged: try a smaller lr")
    return {
        "kl": float(kl.mean()),
        "clipped": float((abs(ratio_minus_1) > agent.settings.clip).mean()),
        "entropy": float(entropy.mean()),
        "explained": float(1 - advantages.var() / (returns.var() + 1e-8)),  # Â = R̂ - V
    }


# §11  Tasks
# Settings that differ from the defaults, by the kind of task and by the task.

CONTINUOUS = dict(total_steps=1_000_000, lr=6e-4, gamma=0.99, normalize_steps=10**12)
TABLE = dict(num_envs=32, num_steps=32, minibatch_size=256, lr=3e-2, lam=0.8, ent_coef=0.3)
FEW_STEPS = dict(total_steps=100_000, epochs=10)
TASKS = {
    "CartPole": dict(total_steps=100_000),
    "CliffWalking": dict(FEW_STEPS, num_envs=16, minibatch_size=128, lr=0.1),
    "HalfCheetah": dict(num_envs=32, num_steps=64, lam=0.9, log_std_init=-1.0),
    "LunarLanderContinuous": dict(total_steps=500_000, epochs=20, gamma=0.999, normalize_steps=1),
    "Pendulum": dict(FEW_STEPS, num_envs=8, minibatch_size=64, lr=1e-3, lam=0.8, normalize_steps=0),
    "Swimmer": dict(num_envs=4, num_steps=1024, gamma=0.9999, lam=0.98, log_std_init=0.0),
}


class UsageError(ValueError):
    """Something that the user can put right."""


def is_of_user(error):
    """Return whether code of the user took part in an error."""
    trace = traceback.walk_tb(error.__traceback__)
    modules = {frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in trace}
    return not modules <= {__name__.split(".")[0], "gymnasium", "importlib", "numpy", "zipfile"}


def check(settings):
    """Raise UsageError if a setting cannot work."""
    for name, value in vars(settings).items():
        if isinstance(value, str | None) or name == "log_std_init":
            continue
        sign = ">=" if name in ("seed", "gamma", "lam", "ent_coef", "normalize_steps") else ">"
        most = 1 if name in ("gamma", "lam") else 1e12
        for number in np.ravel(value):
            if not (0 < number <= most or number == 0 and sign == ">="):
                raise UsageError(f"{name} must be {sign} 0 and <= {most:g}, not {number}")
    if settings.objective not in ("pg", "is", "trpo", "kl", "clip"):
        raise UsageError("objective must be pg, is, trpo, kl or clip")


def new_agent(env=Settings.env, **chosen):
    """Return a new agent. Settings not chosen are those of the task or its kind."""
    envs = make_envs(env, 1)
    envs.close()  # its spaces are enough
    is_numbered = isinstance(envs.obs_space, Discrete)
    if isinstance(envs.single_action_space, Discrete):
        # Without hidden layers W is a table: a row of logits, or a value, for each state.
        kind = dict(TABLE, hidden=(), normalize_steps=0) if is_numbered else {}
    elif flatdim(envs.single_action_space) == 1 and not is_numbered:
        kind = dict(CONTINUOUS, log_std_init=0.8, epochs=8)
    else:
        kind = CONTINUOUS
    tasks = TASKS if str(envs.spec.entry_point).startswith("gymnasium.") else {}
    # Numbers of numpy become Python's.
    chosen = {name: np.asarray(value).tolist() for name, value in chosen.items()}
    settings = Settings(env, **kind | tasks.get(envs.spec.name, {}) | chosen)
    check(settings)
    return Agent(envs, settings)


class WithoutInfo(gym.Wrapper):
    """Drops info, which Gymnasium cannot always stack."""

    def reset(self, **options):
        return self.env.reset(**options)[0], {}

    def step(self, action):
        return *self.env.step(action)[:4], {}


def make_envs(env, num_envs, render=False):
    """Return N environments with observations (N, obs_dim) that take a policy's actions."""
    options = dict(vectorization_mode="sync", render_mode="human") if render else {}
    try:
        envs = gym.make_vec(env, num_envs=num_envs, **options)
        if render:
            envs.call("reset", seed=0)  # opens the window
    except Exception as error:  # Gymnasium has many kinds, and raises some anew
        if isinstance(error, SyntaxError) or is_of_user(error.__context__ or error):
            raise
        raise UsageError(f"cannot make {env}: {error} (your own is module:Name-v0)") from error
    obs_space = envs.single_observation_space
    action_space = envs.single_action_space
    problem = ""
    if not isinstance(action_space, Discrete | Box):
        problem = f"actions must be Discrete or Box, not {action_space}"
    elif not obs_space.is_np_flattenable:
        problem = f"observations must have a fixed size, not {obs_space}"
    elif "NEXT" not in str(envs.metadata.get("autoreset_mode", "NEXT")).upper():
        problem = "resets must come in the next step"
    elif render and not {"human", "rgb_array"} & {*envs.metadata.get("render_modes", [])}:
        problem = "it has no render mode human"
    if problem:
        envs.close()
        raise UsageError(f"{env}: {problem:.150}")
    inner = envs.unwrapped
    if isinstance(inner, gym.vector.SyncVectorEnv):
        inner.envs = [WithoutInfo(one) for one in inner.envs]
    if isinstance(obs_space, Discrete):
        states = obs_space.start + np.arange(obs_space.n)
        envs = TransformObservation(envs, lambda obs: obs[:, None] == states)
    elif obs_space.shape != (flatdim(obs_space),):
        envs = FlattenObservation(envs)
    envs = TransformAction(envs, partial(legal_actions, action_space))
    envs.obs_space = obs_space  # not flattened
    return envs


def legal_actions(space, actions):
    """Return a policy's actions (N,) or (N, d) in the form that env.step accepts.

    In a Box, -1 ... 1 is mapped onto low ... high where these are finite; all are clipped.
    """
    if isinstance(space, Discrete):
        return (space.start + actions).astype(space.dtype)
    # A wider Box is meant to have no bounds, and float64 would round its integers.
    is_narrow = space.high.astype(float) - space.low < 2**53
    is_bounded = space.bounded_below & space.bounded_above & is_narrow
    low = np.where(is_bounded, space.low, -1.0)
    high = np.where(is_bounded, space.high, 1.0)
    actions = (high + low) / 2 + (high - low) / 2 * actions.reshape(-1, *space.shape)
    if space.dtype.kind != "f":
        actions = np.rint(actions)
    return actions.clip(space.low, space.high).astype(space.dtype)


# §12  The program


def train(env=Settings.env, **chosen):
    """Train from Python. Return the agent and a record of each iteration."""
    agent = new_agent(env, **chosen)
    with closing(make_envs(env, agent.settings.num_envs)) as envs:
        return agent, list(learn(agent, envs))


def train_and_print(agent, args):
    """Train, print about twenty rows and the curve, save after each iteration."""
    settings = agent.settings
    if args.save and not os.path.isfile(args.save):
        save(args.save, agent)  # fail early
    log = open(args.log or os.devnull, "w")
    flags = ["--load", args.load] if args.load else []
    usual = settings if args.load else Settings(env="")
    for name, value in vars(settings).items():
        if hasattr(args, name) or value != getattr(usual, name):
            flags += ["--" + name.replace("_", "-"), *np.ravel(value)]
    print("python ppo.py", *flags)  # repeats the run
    points = []
    num_rows = 0
    steps = 0
    shown = 0
    start = time.monotonic()

    def live_line(actions):
        nonlocal steps, shown
        steps += len(actions)
        seconds = time.monotonic() - start
        if seconds > shown + 0.5:
            shown = seconds
            left = (settings.total_steps / steps - 1) * seconds
            line = f"{steps:,} steps, {steps / seconds:,.0f} steps/s, {left:,.0f} s left"
            print(f"{line:<60}", end="\r", flush=True)
        return actions

    envs = make_envs(settings.env, settings.num_envs)
    if sys.stdout.isatty():
        envs = TransformAction(envs, live_line)
    try:
        for record in learn(agent, envs):
            if num_rows == 0:
                print(*record, sep=",", file=log)
                print(ROW.format(*record))
            if record["episodes"] > 0:
                points.append((record["steps"], record["mean_return"]))
            print(*record.values(), sep=",", file=log, flush=True)
            if 20 * record["steps"] >= num_rows * settings.total_steps:
                num_rows += 1
                print(ROW.format(*map(four_digits, record.values())), flush=True)
            if args.save:
                save(args.save, agent)
    finally:
        print()  # after the live line
        print_curve(points)
        log.close()
        envs.close()
    seconds = time.monotonic() - start
    print(f"trained in {seconds:.1f} s, {settings.total_steps / seconds:,.0f} steps/s")
    if args.save:
        print(f"to watch it: python ppo.py --play {args.save} --render")


ROW = "{:>10}{:>10}{:>12}" + "{:>11}" * 4


def four_digits(number):
    """Write a number with four significant digits."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e8 else f"{number:.4g}"


def print_curve(points):
    """Draw a curve through points (steps, return), if it is not flat."""
    steps, returns = np.array(points or [(0, 0)]).T
    spread = np.ptp(returns)
    if spread == 0:
        return
    tick = 10.0 ** math.floor(math.log10(spread))
    if spread < 3 * tick:
        tick /= 5
    columns = np.interp(np.linspace(steps[0], steps[-1], 60), steps, returns / tick)
    bottom = math.floor(columns.min())
    for level in range(math.floor(columns.max()), bottom, -1):
        bars = "".join(np.where(columns >= level, "#", " "))
        print(f"{level * tick:>12,.9g} |{bars}")
    print(f"{bottom * tick:>12,.9g} +{'-' * 60}")
    print(f"{steps[0]:>20,.0f}{steps[-1]:>48,.0f} steps")


def evaluate(agent, episodes=None, render=False, max_steps=100_000):
    """Play greedy episodes on seeds of their own; return their returns (episodes,).

    In a round every environment plays one episode. Taking the first to finish would favour
    short ones. A round that is cut off, at max_steps, is the last.
    """
    settings = agent.settings
    episodes = episodes or (5 if render else settings.eval_episodes)
    num_envs = 1 if render else min(episodes, settings.num_envs, 10)
    rng = np.random.default_rng([settings.seed, 1])
    returns = []
    with closing(make_envs(settings.env, num_envs, render)) as envs:
        while len(returns) < episodes:
            obs, _ = envs.reset(seed=int(rng.integers(2**31 - num_envs)))
            totals = np.zeros(num_envs)
            is_playing = np.ones(num_envs, bool)
            for _ in range(max_steps):
                obs, rewards, terminated, truncated, _ = envs.step(agent.policy(obs).mode())
                totals[is_playing] += rewards[is_playing]
                is_playing &= ~np.logical_or(terminated, truncated)
                if not is_playing.any():
                    break
            returns.extend(totals)
            if is_playing.any():
                print(f"the last episodes were cut off after {max_steps:,} steps")
                break
    return np.array(returns[:episodes])


def arrays_of(agent):
    """Return all that an agent has learned: its arrays, by name."""
    return {name: x for name, x in vars(agent).items() if isinstance(x, np.ndarray)}


def save(path, agent):
    """Write a policy file, whole or not at all."""
    state = json.dumps([vars(agent.settings), agent.rng.bit_generator.state])
    temporary = f"{path}.{os.getpid()}.npz"  # no other process writes to it
    try:
        np.savez(temporary, state=state, **arrays_of(agent))
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path, **chosen):
    """Return the agent in a policy file. Chosen settings win over those of the file.

    Its random numbers go on, unless a seed is chosen. Its optimisers and β start afresh.
    """
    try:
        arrays = dict(np.load(path, allow_pickle=False))
        values, rng_state = json.loads(str(arrays.pop("state")))
        settings = Settings(**values)
        assert np.isfinite(flatten([*arrays.values()])).all()
    except OSError:
        raise
    except Exception as error:  # files break in many ways
        raise UsageError(f"{path} is no policy file of this version of ppo.py") from error
    agent = new_agent(**vars(settings) | chosen)
    for name, array in arrays_of(agent).items():
        if np.shape(arrays.get(name)) != array.shape:
            raise UsageError(f"{path} ({settings.env}, hidden {settings.hidden}) does not fit")
        array[:] = arrays[name]
    if "seed" not in chosen:
        agent.rng.bit_generator.state = rng_state
    return agent


def run(argv):
    """Do what the arguments say."""
    parser = argparse.ArgumentParser(epilog="Some tasks have other defaults. A run prints them.")
    parser.error = lambda message: parser.exit(2, f"ppo.py: {message}\n")
    add = parser.add_argument
    add("--save", help="policy file to write")
    add("--load", help="policy file to start from")
    add("--play", help="policy file to evaluate only")
    add("--log", help="CSV file with a row for each iteration")
    add("--render", action="store_true", help="evaluate in a window")
    for f in fields(Settings):
        options = {"type": int, "nargs": "*"} if f.type is tuple else {"type": f.type}
        add("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options, **f.metadata)
    args = parser.parse_args(argv)
    chosen = {name: value for name, value in vars(args).items() if hasattr(Settings, name)}

    policies = [os.path.realpath(path) for path in (args.save, args.load) if path]
    if args.log and os.path.realpath(args.log) in policies:
        raise UsageError("--log needs a file of its own")
    path = args.play or args.load
    agent = load(path, **chosen) if path else new_agent(**chosen)
    if args.render:
        make_envs(agent.settings.env, 1, render=True).close()  # fail early
    if not args.play:
        train_and_print(agent, args)
    returns = evaluate(agent, chosen.get("eval_episodes"), args.render)
    numbers = [four_digits(of(returns)) for of in (len, np.mean, np.std, np.min, np.max)]
    line = "greedy evaluation over {} episodes: mean {}, std {}, min {}, max {}"
    print(line.format(*numbers), flush=True)


def main(argv=None):
    """Run the command line. Return its exit status: 2 for mistakes, 130 after Ctrl-C."""
    gym.logger.min_level = gym.logger.ERROR  # its warnings take several lines
    np.seterr(all="ignore")  # learn looks for numbers that are not finite
    try:
        run(argv)
        return 0
    except KeyboardInterrupt:
        return 130
    except (UsageError, FloatingPointError, MemoryError, OSError) as error:
        if is_of_user(error):
            raise
        if isinstance(error, BrokenPipeError):
            os._exit(1)  # a last flush would fail, too
        print("ppo.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
