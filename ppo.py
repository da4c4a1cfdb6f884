#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26"]
# ///
"""Proximal Policy Optimization (PPO) in one file: numpy, gymnasium and every gradient by hand.

    python ppo.py --env CartPole-v1

Read it from top to bottom with the lecture beside it. Above each line that computes a formula of
the lecture stands its label, such as L9; README.md lists the labels, test_ppo.py proves them.

The algorithm (L19)                                                               where
    initialise the actor θ and the critic φ                                         §1, §2
    repeat
        collect T steps in each of N environments with π_θ_k: a trajectory          §3
        Â from V_φ_k by GAE;  R̂ = Â + V_φ_k                                         §4
        for each of K epochs, for each minibatch of B transitions
            θ ← θ - Adam(∇ actor loss: -objective - c·entropy)                      §5, §7
            φ ← φ - Adam(∇ critic loss: (V_φ - R̂)²)                                 §6, §7
        θ_k+1 ← θ,  φ_k+1 ← φ                                                       §8

Glossary                   name                     shape
    N, T, K, B             num_envs, num_steps, epochs, minibatch_size
    s_t                    observations, obs        (T+1, N, obs_dim); (B, obs_dim)
    a_t                    actions                  (T, N) integers or (T, N, d) reals; (B, ...)
    r_t                    rewards                  (T, N)
    true end, time limit   terminated, truncated    (T, N) booleans; ended: either
    not a reset row        valid                    (T, N) booleans
    V_φ(s_t)               values                   (T+1, N); (B,)
    δ_t                    deltas                   (T, N)
    Â_t, R̂_t               advantages, returns      (T, N); (B,)
    π_θ(·|s)               head(*inputs)            inputs: logits (B, n); or mean, log_std (B, d)
    log π_θ(a|s)           log_prob                 (B,)
    ρ = π_θ / π_θ_k        ratio                    (B,)
    H(π_θ), KL(π_θ_k‖π_θ)  entropy, kl              (B,)
    θ; φ                   actor; critic            lists of arrays
    γ, λ, ε, β, c          gamma, lam, clip or epsilon, beta, ent_coef
    all that is of θ_k     ends in _old
"""

import os

# Networks this small are fastest on one BLAS thread. The variable counts when numpy is imported;
# a value that the user has set stays.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import csv
import io
import json
import math
import numbers
import sys
import textwrap
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import FlattenObservation, TransformAction

# §1  Networks -------------------------------------------------------------------------------------
# π_θ and V_φ are two separate multi-layer perceptrons. Each forward pass keeps what its backward
# pass needs; the backward pass is the chain rule, one layer at a time.


def init_mlp(
    sizes: list, rng: np.random.Generator, out_gain: float = 1.0, dtype: type = np.float32
) -> list:
    """Initial parameters [W1, b1, W2, b2, ...] of a network with these layer sizes.

    W has the shape (fan_in, fan_out) and is orthogonal (Saxe et al. 2014): its rows or columns,
    whichever are fewer, are orthogonal with length √2 in hidden layers and out_gain in the last.
    b has the shape (fan_out,) and is 0.
    """
    params = []
    gains = [2**0.5] * (len(sizes) - 2) + [out_gain]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
        normal = rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out)))
        q, r = np.linalg.qr(normal)
        q *= np.sign(np.diag(r))  # without these signs Q would not be uniformly distributed
        W = gain * (q if fan_in >= fan_out else q.T)
        params += [np.ascontiguousarray(W, dtype), np.zeros(fan_out, dtype)]
    return params


def mlp_forward(params: list, x: np.ndarray) -> tuple:
    """The network's output (B, out) for inputs x (B, in), and the input of each layer as cache."""
    cache = []
    for i in range(0, len(params), 2):
        W, b = params[i], params[i + 1]
        cache.append(x)
        x = x @ W
        x += b
        if i + 2 < len(params):  # the last layer is linear
            np.tanh(x, out=x)
    return x, cache


def mlp_backward(params: list, cache: list, dout: np.ndarray) -> list:
    """The gradient of a loss with respect to params, in their order, from dout = ∂loss/∂output."""
    grads = []
    for i in range(len(params) - 2, -1, -2):
        W, x = params[i], cache[i // 2]
        grads = [x.T @ dout, dout.sum(axis=0), *grads]
        if i > 0:
            dout = np.dot(dout, W.T)  # @ is slow where W has a single column
            dout *= 1 - x * x  # x = tanh(z), and tanh'(z) = 1 - tanh²(z)
    return grads


# §2  Policies -------------------------------------------------------------------------------------
# A head turns the network's output into a distribution over actions. Both heads offer the same:
#     noise, sample, mode      how an action is chosen
#     log_prob, entropy, kl    a number for each state (B,), and beside it, as a list, its gradient
#                              with respect to the head's inputs: logits, or mean and log_std
# so nothing below asks which head it has.


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log π(·|s) (B, n) of a categorical distribution with these logits (B, n)."""
    shifted = logits - logits.max(axis=-1, keepdims=True)  # exp cannot overflow; π is the same
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Categorical:
    """A choice among n actions, π(a|s) = softmax(logits)_a. Input: logits (B, n)."""

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple) -> np.ndarray:
        """Noise for sample, for inputs of this shape; always float32."""
        return rng.gumbel(size=shape).astype(np.float32)

    @staticmethod
    def sample(noise: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """a ~ π(·|s) (B,): adding Gumbel noise to the logits makes the argmax a fair draw."""
        return (logits + noise).argmax(axis=-1)

    @staticmethod
    def mode(logits: np.ndarray) -> np.ndarray:
        """The likeliest action (B,)."""
        return logits.argmax(axis=-1)

    @staticmethod
    def log_prob(actions: np.ndarray, logits: np.ndarray) -> tuple:
        """log π(a|s) (B,) for actions (B,), and its gradient [(B, n)]."""
        log_probs, rows = log_softmax(logits), np.arange(len(actions))
        # L3    ∇log π: ∂ log π(a) / ∂ logits = onehot(a) - π
        d_logits = -np.exp(log_probs)
        d_logits[rows, actions] += 1
        return log_probs[rows, actions], [d_logits]

    @staticmethod
    def entropy(logits: np.ndarray) -> tuple:
        """H(π) (B,), and its gradient [(B, n)]."""
        log_probs = log_softmax(logits)
        probs = np.exp(log_probs)
        # L17   H = -Σ π log π;   ∂H / ∂ logits = -π (log π + H)
        entropy = -(probs * log_probs).sum(axis=-1)
        return entropy, [-probs * (log_probs + entropy[:, None])]

    @staticmethod
    def kl(logits_old: np.ndarray, logits: np.ndarray) -> tuple:
        """KL(π_old‖π) (B,), and its gradient [(B, n)] with respect to logits."""
        log_probs_old, log_probs = log_softmax(logits_old), log_softmax(logits)
        probs_old = np.exp(log_probs_old)
        # L13   KL = Σ π_old (log π_old - log π);   ∂KL / ∂ logits = π - π_old
        kl = (probs_old * (log_probs_old - log_probs)).sum(axis=-1)
        return kl, [np.exp(log_probs) - probs_old]


class Gaussian:
    """Independent normal actions, π(a|s) = N(mean, exp(log_std)²).

    Inputs: mean (B, d), and log_std (d,) or (B, d), which does not depend on the state. Gradients
    with respect to log_std are given row by row, (B, d); their sum is the parameter's.
    """

    @staticmethod
    def noise(rng: np.random.Generator, shape: tuple) -> np.ndarray:
        """Noise for sample, for inputs of this shape; always float32."""
        return rng.standard_normal(shape, dtype=np.float32)

    @staticmethod
    def sample(noise: np.ndarray, mean: np.ndarray, log_std: np.ndarray) -> np.ndarray:
        """a ~ π(·|s) (B, d)."""
        return mean + np.exp(log_std) * noise

    @staticmethod
    def mode(mean: np.ndarray, log_std: np.ndarray) -> np.ndarray:
        """The likeliest action (B, d)."""
        return mean

    @staticmethod
    def log_prob(actions: np.ndarray, mean: np.ndarray, log_std: np.ndarray) -> tuple:
        """log π(a|s) (B,) for actions (B, d), and its gradient [(B, d), (B, d)]."""
        std = np.exp(log_std)
        z = (actions - mean) / std
        # L3    log π = Σ -½z² - log std - ½ log 2π;   ∂/∂mean = z / std, ∂/∂log_std = z² - 1
        log_prob = (-0.5 * z * z - log_std - 0.5 * float(np.log(2 * np.pi))).sum(axis=-1)
        return log_prob, [z / std, z * z - 1]

    @staticmethod
    def entropy(mean: np.ndarray, log_std: np.ndarray) -> tuple:
        """H(π) (B,), and its gradient [(B, d), (B, d)]."""
        # L17   H = Σ log std + ½ log(2πe);   ∂H / ∂log_std = 1
        log_stds = np.broadcast_to(log_std, mean.shape)
        entropy = (log_stds + 0.5 * float(np.log(2 * np.pi * np.e))).sum(axis=-1)
        return entropy, [np.zeros_like(mean), np.ones_like(mean)]

    @staticmethod
    def kl(
        mean_old: np.ndarray, log_std_old: np.ndarray, mean: np.ndarray, log_std: np.ndarray
    ) -> tuple:
        """KL(π_old‖π) (B,), and its gradient [(B, d), (B, d)] with respect to mean, log_std."""
        std, std_old = np.exp(log_std), np.exp(log_std_old)
        shift, spread = (mean - mean_old) / std, (std_old / std) ** 2
        # L13   KL = Σ log(std / std_old) + (std_old² + (mean - mean_old)²) / (2 std²) - ½;
        #       ∂KL / ∂mean = (mean - mean_old) / std²,
        #       ∂KL / ∂log_std = 1 - (std_old² + (mean - mean_old)²) / std²
        kl = (log_std - log_std_old + 0.5 * (spread + shift * shift) - 0.5).sum(axis=-1)
        return kl, [shift / std, 1 - spread - shift * shift]


def policy_forward(actor: list, obs: np.ndarray) -> tuple:
    """The head's inputs for observations (B, obs_dim), and the network's cache.

    actor holds the network's parameters, an even number of arrays, and behind them the Gaussian's
    log_std, which goes to the head as it is.
    """
    layers = len(actor) // 2 * 2
    out, cache = mlp_forward(actor[:layers], obs)
    return [out, *actor[layers:]], cache


def policy_backward(actor: list, cache: list, d_inputs: list) -> list:
    """The gradient with respect to actor, in its order, from that of the head's inputs."""
    layers = len(actor) // 2 * 2
    d_out, *d_rest = d_inputs
    return mlp_backward(actor[:layers], cache, d_out) + [d.sum(axis=0) for d in d_rest]


# §3  Trajectory -----------------------------------------------------------------------------------
# First play, then judge. While it plays, the agent needs nothing but the actor's choice; V(s) and
# log π_θ_k(a|s) follow for the whole rollout at once, in §8.


def rollout(
    envs, head, actor: list, observe, obs: np.ndarray, num_steps: int, rng: np.random.Generator
) -> tuple:
    """Play num_steps steps in each of N environments with the policy (L1).

    envs is a Gymnasium vector environment with NEXT_STEP auto-reset, obs (N, obs_dim) what it
    returned last, head Categorical or Gaussian, and observe the function that turns observations
    into the network's input. Returns observations (T+1, N, obs_dim), actions (T, N, ...), rewards,
    terminated and truncated (T, N); reals are float32.

    A step that ends an episode returns the episode's true last observation. The step after it
    resets: it ignores the action, and its row is not a transition that could be learned from.
    Raises FloatingPointError when the environment returns a number that is not finite.
    """
    observations = np.empty((num_steps + 1, *obs.shape), np.float32)
    rewards = np.empty((num_steps, len(obs)), np.float32)
    terminated, truncated = np.empty_like(rewards, bool), np.empty_like(rewards, bool)
    actions = []
    # Noise for all steps is drawn at once, which is faster; its shape is that of the head's input.
    inputs, _ = policy_forward(actor, observe(obs))
    noise = head.noise(rng, (num_steps, *inputs[0].shape))
    observations[0] = obs
    # L1    τ = (s_1, a_1, r_1, s_2, a_2, r_2, ...)
    for t in range(num_steps):
        inputs, _ = policy_forward(actor, observe(observations[t]))
        actions.append(head.sample(noise[t], *inputs))
        observations[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
        if not np.isfinite(observations[t : t + 2]).all():
            raise FloatingPointError(
                f"an observation is not finite in float32, at step {t} of a rollout"
            )
    if not np.isfinite(rewards).all():
        t = np.argwhere(~np.isfinite(rewards))[0][0]
        raise FloatingPointError(f"a reward is not finite in float32, at step {t} of a rollout")
    return observations, np.stack(actions), rewards, terminated, truncated


# §4  Advantage ------------------------------------------------------------------------------------
# How much better was an action than what the critic expected of its state?


def gae(
    rewards: np.ndarray,
    values: np.ndarray,
    terminated: np.ndarray,
    truncated: np.ndarray,
    gamma: float,
    lam: float,
) -> np.ndarray:
    """Generalized Advantage Estimation (Schulman et al. 2016): Â (T, N) (L5-L9).

    rewards, terminated and truncated are (T, N); values are (T+1, N), so that values[t + 1] is
    V(s_{t+1}), also when the rollout or a time limit stops the episode at t. What comes out in the
    rows of resets means nothing: the caller leaves them out.
    """
    ended = terminated | truncated
    # L7, L8   Q - V: δ_t = r_t + γ V(s_{t+1}) - V(s_t), and V(s_{t+1}) is 0 after a true end
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    # What comes after an ending is another episode: no credit flows back across it.
    chain = np.where(ended, 0, gamma * lam).astype(deltas.dtype)
    advantages = np.empty_like(deltas)
    advantage = np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        # L9    Â_t = δ_t + γλ Â_{t+1};   λ = 1 makes it R_t - V(s_t), with the R_t of L5
        advantage = deltas[t] + chain[t] * advantage
        advantages[t] = advantage
    return advantages


# §5  Objectives -----------------------------------------------------------------------------------
# The lecture's ladder. Each rung is a loss for every row (B,), to be minimised on average (the
# lecture's sum over steps differs by a factor, which Adam cancels), and its derivative with respect
# to that row's log π_θ(a|s). From there the head's and the network's gradients take over. All are
# called with the same arguments; **_ swallows what a rung does not use. TRPO (L14) would stand
# between L12 and L15: README.md says why it does not.


def policy_gradient(
    log_prob: np.ndarray, log_prob_old: np.ndarray, advantages: np.ndarray, **_
) -> tuple:
    """The plain policy gradient (L4), with the advantage as weight (L6). Right for θ = θ_k only."""
    # L4, L6   loss = -log π_θ(a|s) Â
    return -log_prob * advantages, -advantages


def importance_sampling(
    log_prob: np.ndarray, log_prob_old: np.ndarray, advantages: np.ndarray, **_
) -> tuple:
    """The surrogate (L12): data of π_θ_k, reweighted by importance sampling (L11)."""
    ratio = np.exp(log_prob - log_prob_old)
    # L11, L12   loss = -ρ Â, ρ = π_θ(a|s) / π_θ_k(a|s);   ∂ρ / ∂ log π = ρ
    return -ratio * advantages, -ratio * advantages


def kl_penalty(
    log_prob: np.ndarray,
    log_prob_old: np.ndarray,
    advantages: np.ndarray,
    *,
    kl: np.ndarray,
    beta: float,
    **_,
) -> tuple:
    """PPO1 (L15). kl (B,) is KL(π_θ_k‖π_θ), whose own gradient actor_loss (§8) adds."""
    ratio = np.exp(log_prob - log_prob_old)
    # L15   loss = -(ρ Â - β KL)
    return -(ratio * advantages - beta * kl), -ratio * advantages


def clip(
    log_prob: np.ndarray, log_prob_old: np.ndarray, advantages: np.ndarray, *, epsilon: float, **_
) -> tuple:
    """PPO2 (L16): beyond 1 ± epsilon there is nothing to gain, but always a way back."""
    ratio = np.exp(log_prob - log_prob_old)
    surrogate = ratio * advantages
    clipped = np.clip(ratio, 1 - epsilon, 1 + epsilon) * advantages
    # L16   loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â);   slope 0 where the clipped one is the smaller
    return -np.minimum(surrogate, clipped), np.where(surrogate <= clipped, -surrogate, 0)


def adapt_beta(beta: float, kl: float, target: float) -> float:
    """β for the next iteration, after this one moved the policy by kl on average (L15)."""
    kl_max, kl_min = 1.5 * target, target / 1.5  # the factors of Schulman et al. 2017
    # L15   KL > KL_max → β grows, KL < KL_min → β shrinks
    if kl > kl_max:
        return min(2 * beta, 1e4)
    if kl < kl_min:
        return max(beta / 2, 1e-4)
    return beta


OBJECTIVES = {"pg": policy_gradient, "is": importance_sampling, "kl": kl_penalty, "clip": clip}

# §6  Critic ---------------------------------------------------------------------------------------


def value_loss(values: np.ndarray, returns: np.ndarray) -> tuple:
    """The squared error of each row (B,), and its derivative with respect to values (B,)."""
    error = values - returns
    # L18   loss = (V_φ(s) - R̂)²
    return error * error, 2 * error


# §7  Optimiser ------------------------------------------------------------------------------------
# To the optimiser θ is one long vector, and so is its gradient. The arrays that the networks use
# are views of it: when the vector moves, they move.


def flatten(arrays: list) -> np.ndarray:
    """All elements of the arrays, one after the other, as one vector."""
    return np.concatenate(arrays, axis=None)


def unflatten(vector: np.ndarray, like: list) -> list:
    """Views of the vector with the shapes of the arrays in like: flatten's inverse."""
    ends = np.cumsum([array.size for array in like])
    pieces = np.split(vector, ends[:-1])
    return [piece.reshape(array.shape) for piece, array in zip(pieces, like, strict=True)]


def clip_by_global_norm(gradient: np.ndarray, max_norm: float) -> np.ndarray:
    """The gradient, scaled down to the length max_norm where it is longer (Pascanu et al. 2013).

    One that overflowed has lost its direction: zeros are returned for it.
    """
    norm = float(np.sqrt(gradient @ gradient))
    if not np.isfinite(norm):
        return np.zeros_like(gradient)
    return gradient * (max_norm / norm) if norm > max_norm else gradient


class Adam:
    """Adam (Kingma & Ba 2015) for the parameter vector theta (P,), which step changes in place.

    eps is larger than the paper's 1e-8: where gradients all but vanish, steps do so too.
    """

    def __init__(
        self, theta: np.ndarray, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-5
    ):
        self.theta, self.beta1, self.beta2, self.eps = theta, beta1, beta2, eps
        self.m, self.v, self.t = np.zeros_like(theta), np.zeros_like(theta), 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        """Move theta against the gradient (P,), with learning rate lr."""
        self.t += 1
        # m ← β₁ m + (1-β₁) g;   v ← β₂ v + (1-β₂) g²
        self.m += (1 - self.beta1) * (gradient - self.m)
        self.v += (1 - self.beta2) * (gradient * gradient - self.v)
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        self.theta -= lr * m_hat / (np.sqrt(v_hat) + self.eps)


# §8  PPO ------------------------------------------------------------------------------------------
# The loop of L19 needs settings, environments and an agent. Whoever is after the algorithm may skip
# them and go on at actor_loss.


class UsageError(ValueError):
    """Something that the user can put right; the message says how."""


def setting(default, help: str, low=None, high=None):
    """A field of Settings, with the help text of its flag and the range of its numbers."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run; the command line is made from these fields. Raises UsageError."""

    env: str = setting("CartPole-v1", "Gymnasium environment, also module:Env-v0")
    seed: int = setting(0, "seed of everything random", 0, 2**32 - 1)
    total_steps: int = setting(100_000, "steps to learn from, in all environments", 1, 10**12)
    num_envs: int = setting(16, "N, environments side by side", 1, 4096)
    num_steps: int = setting(64, "T, steps in each environment between updates", 1, 10**6)
    epochs: int = setting(6, "K, passes over the same data (L10)", 1, 1000)
    minibatch_size: int = setting(128, "B, transitions in one gradient step, at most", 1, 10**9)
    lr: float = setting(2e-3, "learning rate at the start; falls to 0 linearly", 1e-9, 1)
    gamma: float = setting(0.99, "γ, discount (L5)", 0, 1)
    lam: float = setting(0.95, "λ of GAE (L9)", 0, 1)
    objective: str = setting("clip", "pg (L4), is (L12), kl (L15) or clip (L16)")
    clip: float = setting(0.2, "ε of the clip objective (L16)", 1e-3, 10)
    kl_target: float = setting(0.01, "KL that β steers to in the kl objective (L15)", 1e-6, 10)
    ent_coef: float = setting(0.0, "c, entropy bonus at the start; falls to 0 like lr (L17)", 0, 10)
    max_grad_norm: float = setting(0.5, "length to which gradients are clipped", 1e-6, 1e6)
    hidden: tuple[int, ...] = setting((64, 64), "sizes of the hidden layers", 1, 8192)
    log_std_init: float = setting(0.0, "log_std of a new Gaussian policy", -5, 2)
    normalize_obs: bool = setting(False, "standardise observations with running moments")
    scale_rewards: bool = setting(False, "divide rewards by the deviation of the running return")

    def __post_init__(self):
        for f in fields(self):
            flag, low, high = "--" + f.name.replace("_", "-"), f.metadata["low"], f.metadata["high"]
            value = getattr(self, f.name)
            kind = int if isinstance(f.default, tuple) else f.type
            allowed = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
            for v in value if isinstance(value, tuple) else [value]:
                if not isinstance(v, allowed) or isinstance(v, bool) != (kind is bool):
                    raise UsageError(f"{flag} takes {kind.__name__}, not {v!r}")
                if low is not None and not low <= v <= high:
                    raise UsageError(f"{flag} must be between {low:,} and {high:,}, not {v}")
        if self.objective not in OBJECTIVES:
            raise UsageError(f"--objective must be one of {', '.join(OBJECTIVES)}")
        if self.minibatch_size > self.num_envs * self.num_steps:
            raise UsageError(
                f"--minibatch-size {self.minibatch_size} is more than a rollout holds: "
                f"{self.num_envs} environments x {self.num_steps} steps"
            )


# Settings known to work, for environments that the defaults do not serve.
# fmt: off
TOY_TEXT = dict(num_envs=32, minibatch_size=256, scale_rewards=True, ent_coef=0.2)
MUJOCO = dict(total_steps=1_000_000, num_envs=8, num_steps=256, epochs=10, lr=3e-4, gamma=0.995,
              normalize_obs=True, scale_rewards=True, log_std_init=-1.0)
TUNED = {
    "Acrobot-v1": dict(total_steps=200_000, num_envs=64, epochs=10, minibatch_size=256,
                       normalize_obs=True, scale_rewards=True),
    "MountainCar-v0": dict(total_steps=500_000, num_steps=32, lam=0.98, normalize_obs=True),
    "MountainCarContinuous-v0": dict(normalize_obs=True, log_std_init=1.0),
    "Pendulum-v1": dict(num_envs=4, num_steps=400, epochs=10, minibatch_size=64, lr=1e-3,
                        gamma=0.95, scale_rewards=True),
    "LunarLander-v3": dict(total_steps=1_000_000, num_steps=512, minibatch_size=256, lr=5e-4,
                           lam=0.98, scale_rewards=True),
    "FrozenLake-v1": dict(total_steps=200_000, **TOY_TEXT),
    "Taxi-v3": dict(total_steps=500_000, **TOY_TEXT),
    "Taxi-v4": dict(total_steps=500_000, **TOY_TEXT),
    "CliffWalking-v0": dict(num_steps=32, ent_coef=0.2),
    "CliffWalking-v1": dict(num_steps=32, ent_coef=0.2),
    "HalfCheetah-v5": MUJOCO,
    "Hopper-v5": dict(MUJOCO, gamma=0.99),
}
# fmt: on


def choose_settings(**chosen) -> Settings:
    """Settings as chosen; where nothing was chosen, those known to work for the environment."""
    return Settings(**{**TUNED.get(chosen.get("env", Settings.env), {}), **chosen})


def make_envs(env_id: str, num_envs: int, **kwargs) -> gym.vector.VectorEnv:
    """N environments with flat observations (N, obs_dim) and the actions that a head samples.

    Discrete actions count from 0. Box actions are flat; they are clipped to their bounds for the
    environment alone: learning keeps the action that was sampled, with its own log-probability.
    Raises UsageError for environments that cannot be made or have other action spaces.
    """
    try:
        envs = gym.make_vec(env_id, num_envs=num_envs, **kwargs)
    except Exception as error:  # an environment may do anything
        raise UsageError(f"cannot make {env_id}: {type(error).__name__}: {error}") from error
    mode = envs.metadata.get("autoreset_mode")
    if mode is not None and mode.value != "NextStep":
        raise UsageError(f"{env_id} resets by {mode}; only AutoresetMode.NEXT_STEP is supported")
    obs_space, space = envs.single_observation_space, envs.single_action_space
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = FlattenObservation(envs)
        if not isinstance(envs.single_observation_space, gym.spaces.Box):
            raise UsageError(f"{env_id} observes {obs_space}, which has no fixed size")
    if isinstance(space, gym.spaces.Discrete):
        return TransformAction(envs, lambda a: a + space.start) if space.start else envs
    if isinstance(space, gym.spaces.Box):
        low, high, shape = space.low.ravel(), space.high.ravel(), (num_envs, *space.shape)
        return TransformAction(
            envs, lambda a: np.clip(a, low, high).reshape(shape).astype(space.dtype)
        )
    raise UsageError(f"{env_id} has the action space {space}; only Discrete and Box are supported")


class Agent:
    """Both networks, their optimisers, running statistics, β and counters."""

    def __init__(self, envs: gym.vector.VectorEnv, settings: Settings):
        s = self.settings = settings
        self.rng = np.random.default_rng(s.seed)
        (obs_dim,) = envs.single_observation_space.shape
        space = envs.single_action_space
        if isinstance(space, gym.spaces.Discrete):
            self.head, size, log_std = Categorical, int(space.n), []
        else:
            self.head, size = Gaussian, int(np.prod(space.shape))
            log_std = [np.full(size, s.log_std_init, np.float32)]
        # A small last layer: at first no action is preferred in any state.
        actor = init_mlp([obs_dim, *s.hidden, size], self.rng, out_gain=0.01) + log_std
        critic = init_mlp([obs_dim, *s.hidden, 1], self.rng)
        self.actor_adam, self.critic_adam = Adam(flatten(actor)), Adam(flatten(critic))
        self.actor = unflatten(self.actor_adam.theta, actor)
        self.critic = unflatten(self.critic_adam.theta, critic)
        self.obs_stats, self.return_stats = RunningMeanStd(shape=(obs_dim,)), RunningMeanStd()
        self.beta = 1.0 if s.objective == "kl" else 0.0
        self.steps = self.episodes = 0

    def observe(self, obs: np.ndarray) -> np.ndarray:
        """What the networks see of observations (..., obs_dim)."""
        if not self.settings.normalize_obs:
            return obs
        std = np.sqrt(self.obs_stats.var + 1e-8)
        return ((obs - self.obs_stats.mean) / std).clip(-10, 10).astype(np.float32)

    def act(self, obs: np.ndarray) -> np.ndarray:
        """The greedy actions for observations (N, obs_dim)."""
        inputs, _ = policy_forward(self.actor, self.observe(np.asarray(obs, np.float32)))
        return self.head.mode(*inputs)


def actor_loss(
    head,
    actor: list,
    obs: np.ndarray,
    actions: np.ndarray,
    log_prob_old: np.ndarray,
    advantages: np.ndarray,
    inputs_old: list,
    objective,
    epsilon: float,
    beta: float,
    ent_coef: float,
) -> tuple:
    """The actor's loss for each row of a minibatch (B,), and the gradient of its mean."""
    inputs, cache = policy_forward(actor, obs)
    log_prob, d_log_prob = head.log_prob(actions, *inputs)
    kl, d_kl = head.kl(*inputs_old, *inputs) if beta else (0, None)
    loss, d_loss = objective(log_prob, log_prob_old, advantages, kl=kl, beta=beta, epsilon=epsilon)
    d_inputs = [d_loss[:, None] * d for d in d_log_prob]
    if beta:
        # L15   loss + β KL
        d_inputs = [d + beta * d_term for d, d_term in zip(d_inputs, d_kl, strict=True)]
    if ent_coef:
        # L17   loss - c H(π_θ)
        entropy, d_entropy = head.entropy(*inputs)
        loss = loss - ent_coef * entropy
        d_inputs = [d - ent_coef * d_term for d, d_term in zip(d_inputs, d_entropy, strict=True)]
    return loss, policy_backward(actor, cache, [d / len(obs) for d in d_inputs])


def critic_loss(critic: list, obs: np.ndarray, returns: np.ndarray) -> tuple:
    """The critic's loss for each row of a minibatch (B,), and the gradient of its mean (L18)."""
    values, cache = mlp_forward(critic, obs)
    loss, d_loss = value_loss(values[:, 0], returns)
    return loss, mlp_backward(critic, cache, d_loss[:, None] / len(obs))


def update(
    agent: Agent,
    obs: np.ndarray,
    actions: np.ndarray,
    advantages: np.ndarray,
    returns: np.ndarray,
    left: float,
) -> dict:
    """K epochs of gradient steps on the same transitions (L19); returns how the policy moved.

    left is the share of the run that is left, from 1 to 0: with it fall the learning rate, and the
    entropy bonus, because exploring pays only while there is time to use what it finds.
    """
    s, head = agent.settings, agent.head
    lr, ent_coef = s.lr * left, s.ent_coef * left
    # θ_k is θ before the first step. log_std is repeated for each row, and copied: Adam is about to
    # change it in place.
    inputs, _ = policy_forward(agent.actor, obs)
    inputs_old = [np.array(np.broadcast_to(x, inputs[0].shape)) for x in inputs]
    log_prob_old, _ = head.log_prob(actions, *inputs_old)
    # L10, L19   K epochs on the same data, in minibatches of equal size
    for _ in range(s.epochs):
        shuffled = agent.rng.permutation(len(obs))
        for rows in np.array_split(shuffled, math.ceil(len(obs) / s.minibatch_size)):
            obs_batch = obs[rows]
            _, grads = actor_loss(
                head,
                agent.actor,
                obs_batch,
                actions[rows],
                log_prob_old[rows],
                advantages[rows],
                [x[rows] for x in inputs_old],
                OBJECTIVES[s.objective],
                s.clip,
                agent.beta,
                ent_coef,
            )
            agent.actor_adam.step(clip_by_global_norm(flatten(grads), s.max_grad_norm), lr)
            _, grads = critic_loss(agent.critic, obs_batch, returns[rows])
            agent.critic_adam.step(clip_by_global_norm(flatten(grads), s.max_grad_norm), lr)
    inputs, _ = policy_forward(agent.actor, obs)
    log_prob, _ = head.log_prob(actions, *inputs)
    kl = float(head.kl(*inputs_old, *inputs)[0].mean())
    if agent.beta:
        agent.beta = adapt_beta(agent.beta, kl, s.kl_target)
    return {
        "kl": kl,
        "clip_fraction": float((abs(np.exp(log_prob - log_prob_old) - 1) > s.clip).mean()),
        "entropy": float(head.entropy(*inputs)[0].mean()),
        "beta": agent.beta,
    }


def episode_returns(rewards: np.ndarray, ended: np.ndarray, so_far: np.ndarray) -> tuple:
    """R(τ) of the episodes that end in a rollout (L2), and what the open ones have so far (N,).

    rewards and ended are (T, N); so_far (N,) is what episodes had collected before the rollout.
    """
    totals = so_far + np.cumsum(rewards, axis=0, dtype=float)
    finished, before = [], np.zeros(len(so_far))
    for t, i in np.argwhere(ended):
        finished.append(totals[t, i] - before[i])
        before[i] = totals[t, i]
    return finished, totals[-1] - before


def discounted_sums(
    rewards: np.ndarray, ended: np.ndarray, gamma: float, so_far: np.ndarray
) -> tuple:
    """Σ γ^k r_{t-k} over the episode up to each step (T, N), and (N,) to go on from."""
    sums = np.empty(rewards.shape)
    for t in range(len(rewards)):
        sums[t] = rewards[t] + gamma * so_far
        so_far = sums[t] * ~ended[t]
    return sums, so_far


def learn(agent: Agent, envs: gym.vector.VectorEnv) -> Iterator[dict]:
    """The PPO loop (L19), until settings.total_steps; yields a record after each iteration."""
    s, N = agent.settings, envs.num_envs
    obs, _ = envs.reset(seed=int(agent.rng.integers(2**31)))
    ended_last = np.zeros(N, bool)
    so_far, discounted = np.zeros(N), np.zeros(N)
    recent = deque(maxlen=100)
    while agent.steps < s.total_steps:
        # Play with θ_k.
        left = 1 - agent.steps / s.total_steps
        T = min(s.num_steps, math.ceil((s.total_steps - agent.steps) / N))
        observations, actions, rewards, terminated, truncated = rollout(
            envs, agent.head, agent.actor, agent.observe, obs, T, agent.rng
        )
        obs, ended = observations[-1], terminated | truncated
        # The row after an ending is the reset, no transition: nothing learns from it.
        valid = ~np.vstack([ended_last, ended[:-1]])
        ended_last = ended[-1]
        # L2    R(τ) of the episodes that ended
        episodes, so_far = episode_returns(rewards, ended, so_far)
        recent.extend(episodes)
        agent.steps += T * N
        agent.episodes += len(episodes)
        if not valid.any():
            continue  # with T = 1, all rows may be resets

        # Judge with φ_k. Observations are seen as they were during play; only then do their
        # statistics change.
        x = agent.observe(observations)
        if s.normalize_obs:
            agent.obs_stats.update(observations[:-1][valid].astype(float))
        if s.scale_rewards:
            sums, discounted = discounted_sums(rewards, ended, s.gamma, discounted)
            agent.return_stats.update(sums[valid])
            rewards = rewards / np.float32(np.sqrt(agent.return_stats.var + 1e-8))
        values = mlp_forward(agent.critic, x.reshape((T + 1) * N, -1))[0].reshape(T + 1, N)
        advantages = gae(rewards, values, terminated, truncated, s.gamma, s.lam)[valid]
        # L18   R̂ = Â + V_φ_k(s)
        returns = advantages + values[:-1][valid]

        # Learn. L6: a mean is a baseline, too. Dividing by the deviation is not in the lecture: it
        # makes lr independent of the size of the rewards.
        weights = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        metrics = update(agent, x[:-1][valid], actions[valid], weights, returns, left)
        yield {
            "steps": agent.steps,
            "episodes": agent.episodes,
            # L2    J(θ) ≈ the mean of R(τ), over the last 100 episodes
            "mean_return": float(np.mean(recent)) if recent else math.nan,
            **metrics,
            "explained_variance": float(1 - advantages.var() / (returns.var() + 1e-8)),
        }


def train(**chosen) -> tuple:
    """Train from Python: train(env="CartPole-v1", seed=1, ...), with the names of Settings.

    Returns the agent (agent.act(obs) acts greedily, agent.actor are its parameters) and the
    history, one record for each iteration. Raises UsageError for settings that cannot work.
    """
    settings = choose_settings(**chosen)
    with contextlib.closing(make_envs(settings.env, settings.num_envs)) as envs:
        agent = Agent(envs, settings)
        return agent, list(learn(agent, envs))


# §9  Command line ---------------------------------------------------------------------------------
# Nothing below belongs to the algorithm: a student may stop here.


def evaluate(
    agent: Agent, episodes: int = 100, render: bool = False, seconds: float = math.inf
) -> np.ndarray:
    """The returns of greedy episodes on seeds of their own, as many as end within seconds."""
    end, env_id = time.monotonic() + seconds, agent.settings.env
    kwargs = {"vectorization_mode": "sync", "render_mode": "human"} if render else {}
    with contextlib.closing(make_envs(env_id, 1)) as envs:
        spec = envs.spec
    if spec.max_episode_steps is None and spec.entry_point:
        # Without a time limit, a greedy policy that walks in circles would never come to an end.
        kwargs |= {"vectorization_mode": "sync", "max_episode_steps": 1000}
    n = 1 if render else min(episodes, 10)
    envs = make_envs(env_id, n, **kwargs)
    # Each environment plays a fixed number of episodes: to take the first to end favours the short.
    left = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
    returns, so_far = [], np.zeros(n)
    with contextlib.closing(envs):
        seed = np.random.SeedSequence([agent.settings.seed, 1]).generate_state(1)[0]
        obs, _ = envs.reset(seed=int(seed))
        while left.any() and time.monotonic() < end:
            obs, rewards, terminated, truncated, _ = envs.step(agent.act(obs))
            so_far += rewards
            for i in np.flatnonzero(terminated | truncated):
                if left[i]:
                    returns.append(so_far[i])
                    left[i] -= 1
                so_far[i] = 0
    return np.array(returns)


def pack(agent: Agent) -> dict[str, np.ndarray]:
    """A copy of all that learning has changed, as plain arrays."""
    rest = {
        "settings": asdict(agent.settings),
        "steps": agent.steps,
        "episodes": agent.episodes,
        "beta": agent.beta,
        "adam_t": agent.actor_adam.t,
        "obs_count": agent.obs_stats.count,
        "return_stats": [float(x) for x in vars(agent.return_stats).values()],
        "rng": agent.rng.bit_generator.state,
    }
    return {
        **{f"actor_{i}": array.copy() for i, array in enumerate(agent.actor)},
        **{f"critic_{i}": array.copy() for i, array in enumerate(agent.critic)},
        "actor_m": agent.actor_adam.m.copy(),
        "actor_v": agent.actor_adam.v.copy(),
        "critic_m": agent.critic_adam.m.copy(),
        "critic_v": agent.critic_adam.v.copy(),
        "obs_mean": agent.obs_stats.mean,
        "obs_var": agent.obs_stats.var,
        "rest": np.array(json.dumps(rest)),
    }


def unpack(agent: Agent, state: dict[str, np.ndarray]) -> None:
    """Put an agent into the state that pack has copied."""
    rest = json.loads(str(state["rest"]))
    counts = [rest[name] for name in ("steps", "episodes", "beta", "adam_t", "obs_count")]
    if not all(0 <= x < 1e18 for x in [*counts, *rest["return_stats"][1:]]):
        raise ValueError("its counters are out of range")
    for name in ("actor", "critic"):
        for i, array in enumerate(getattr(agent, name)):
            array[:] = state[f"{name}_{i}"]
        adam = getattr(agent, f"{name}_adam")
        adam.m[:], adam.v[:] = state[f"{name}_m"], state[f"{name}_v"]
    agent.steps, agent.episodes, agent.beta = rest["steps"], rest["episodes"], rest["beta"]
    agent.actor_adam.t = agent.critic_adam.t = rest["adam_t"]
    agent.obs_stats.mean, agent.obs_stats.var = state["obs_mean"], state["obs_var"]
    agent.obs_stats.count = rest["obs_count"]
    stats = agent.return_stats
    stats.mean, stats.var, stats.count = rest["return_stats"]
    agent.rng.bit_generator.state = rest["rng"]


def save(path: str, state: dict[str, np.ndarray]) -> None:
    """Write a policy file: whole or not at all, whatever happens meanwhile. Raises UsageError."""
    buffer = io.BytesIO()
    np.savez(buffer, **state)
    try:
        with open(path + ".tmp", "wb") as file:
            file.write(buffer.getvalue())
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")  # a full disk needs the room
        raise UsageError(f"cannot save {path}: {error.strerror}") from error


def load(path: str) -> tuple[Settings, dict[str, np.ndarray]]:
    """Read a policy file. Raises UsageError for anything else, and never runs what is in it."""
    try:
        if not os.path.isfile(path):
            raise ValueError("there is no such file")
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > 2**30:
                raise ValueError("it is larger than 1 GiB")
        with np.load(path, allow_pickle=False) as file:
            state = dict(file)
        chosen = json.loads(str(state["rest"]))["settings"]
        settings = Settings(**{**chosen, "hidden": tuple(chosen["hidden"])})
        # Looked at before networks of these sizes are made.
        sizes = tuple(state[f"actor_{2 * i + 1}"].size for i in range(len(settings.hidden)))
        if sizes != settings.hidden:
            raise ValueError(f"its settings say hidden {settings.hidden}, its arrays {sizes}")
        return settings, state
    except Exception as error:
        raise UsageError(f"cannot read {path} as a policy: {error}") from error


def draw_curve(history: list[dict[str, float]], width: int = 72, height: int = 8) -> str:
    """Mean return over steps, drawn with text."""
    ended = [r for r in history if not math.isnan(r["mean_return"])]
    if not ended:
        return "no episode has ended yet"
    steps, values = (np.array([r[name] for r in ended]) for name in ("steps", "mean_return"))
    values = np.interp(np.linspace(steps[0], steps[-1], width), steps, values)
    low, high = values.min(), values.max()
    eighths = np.round((values - low) / (high - low or 1) * (8 * height - 1)).astype(int) + 1
    lines = []
    for row in reversed(range(height)):
        label = f"{high:10.1f}" if row == height - 1 else f"{low:10.1f}" if row == 0 else " " * 10
        bars = np.clip(eighths - 8 * row, 0, 8)
        lines.append(label + " |" + "".join(" ▁▂▃▄▅▆▇█"[k] for k in bars))
    lines.append(f"mean return over {steps[0]:,} to {steps[-1]:,} steps")
    return "\n".join(lines)


class Display:
    """A row now and then; on a terminal also a live line below it."""

    def __init__(self, agent: Agent):
        self.total, self.first = agent.settings.total_steps, agent.steps
        self.start = self.last_live = time.monotonic()
        self.next_row = 0
        self.clear = "\r\x1b[K" if sys.stdout.isatty() else ""
        self.columns = {  # what stands in the record: heading, format
            "steps": ("steps", ",.0f"),
            "episodes": ("episodes", ",.0f"),
            "mean_return": ("return", ".2f"),
            "kl": ("KL", ".4f"),
            "clip_fraction": ("clipped", ".3f"),
            "entropy": ("entropy", ".3f"),
            "explained_variance": ("expl.var", ".3f"),
            **({"beta": ("beta", ".3g")} if agent.beta else {}),
        }
        print("".join(f"{heading:>11}" for heading, _ in self.columns.values()), flush=True)

    def show(self, record: dict[str, float]) -> None:
        """Show the record of an iteration, if it is time to."""
        steps, now = record["steps"], time.monotonic()
        if steps >= self.next_row or steps == self.total:
            row = (f"{record[name]:>11{form}}" for name, (_, form) in self.columns.items())
            print(self.clear + "".join(row), flush=True)
            self.next_row = steps + self.total // 20
        if self.clear and now > self.last_live + 0.1:
            speed = (steps - self.first) / (now - self.start)
            left = (self.total - steps) / speed
            line = f"{steps / self.total:5.0%}  {speed:,.0f} steps/s  {left:,.0f} s left"
            line += f"  return {record['mean_return']:.2f}"
            print(self.clear + line, end="", flush=True)
            self.last_live = now


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The options of the command line itself, and the settings that were chosen."""
    parser = Parser(prog="ppo.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    group = parser.add_argument_group("settings")
    for f in fields(Settings):
        options = {"default": argparse.SUPPRESS, "help": f"{f.metadata['help']} ({f.default})"}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif isinstance(f.default, tuple):
            options |= {"type": int, "nargs": "+", "metavar": "SIZE"}
        else:
            options |= {"type": f.type, "metavar": f.type.__name__.upper()}
        group.add_argument(f"--{f.name.replace('_', '-')}", **options)
    group = parser.add_argument_group("files")
    group.add_argument("--save", metavar="FILE", help="keep the policy in this file")
    group.add_argument(
        "--save-every", type=int, metavar="INT", help="iterations between saves (10)"
    )
    group.add_argument("--load", metavar="FILE", help="go on training the policy in this file")
    group.add_argument("--log", metavar="FILE", help="write one CSV row for each iteration")
    group = parser.add_argument_group("watching a policy")
    group.add_argument("--play", metavar="FILE", help="evaluate this policy without training")
    group.add_argument("--episodes", type=int, metavar="INT", help="episodes of evaluation (100)")
    group.add_argument("--render", action="store_true", help="show them in a window")
    args = parser.parse_args(argv)
    chosen = {k: v for k, v in vars(args).items() if k in Settings.__dataclass_fields__}
    if "hidden" in chosen:
        chosen["hidden"] = tuple(chosen["hidden"])
    for flag in ("save", "load", "log", "play"):
        if getattr(args, flag) == "":
            raise UsageError(f"--{flag} needs the name of a file")
    if args.log and args.log in (args.save, args.load):
        raise UsageError(f"--log {args.log} is the policy file: give the log another name")
    for flag, value in ("--episodes", args.episodes), ("--save-every", args.save_every):
        if value is not None and value < 1:
            raise UsageError(f"{flag} must be at least 1, not {value}")
    if args.save_every and not args.save:
        raise UsageError("--save-every needs --save FILE")
    if args.render and not args.play:
        raise UsageError("--render needs --play FILE")
    if args.play and (args.load or args.save or args.log or chosen.keys() - {"env", "seed"}):
        raise UsageError(
            "--play does not train: it goes with --episodes, --render, --env and --seed only"
        )
    return args, chosen


def as_flags(settings: Settings) -> str:
    """The flags with which the command line makes these settings."""
    flags = []
    for name, value in asdict(settings).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            flags += [f"--{flag}", *map(str, value)]
        else:
            flags.append(f"--{flag}={value}")
    return " ".join(flags)


def restore(path: str, chosen: dict) -> tuple[Agent, gym.vector.VectorEnv]:
    """The agent in a policy file, and environments to go on in."""
    settings, state = load(path)
    for name in ("env", "hidden", "objective", "normalize_obs", "scale_rewards"):
        old = getattr(settings, name)
        if chosen.get(name, old) != old:
            raise UsageError(f"{path} was trained with {name} {old}: it cannot be {chosen[name]}")
    settings = replace(settings, **chosen)
    envs = make_envs(settings.env, settings.num_envs)
    agent = Agent(envs, settings)
    try:
        for name, array in pack(agent).items():
            if name != "rest" and state[name].shape != array.shape:
                raise ValueError(f"its {name} has the shape {state[name].shape}, not {array.shape}")
            if name != "rest" and not (
                state[name].dtype.kind == "f" and np.isfinite(state[name]).all()
            ):
                raise ValueError(f"its {name} does not hold finite reals alone")
        unpack(agent, state)
    except Exception as error:
        raise UsageError(f"{path} does not fit {settings.env}: {error}") from error
    return agent, envs


def report(agent: Agent, episodes: int, render: bool = False, seconds: float = math.inf) -> None:
    """Print a greedy evaluation."""
    try:
        returns = evaluate(agent, episodes, render, seconds)
    except Exception as error:
        if not render:
            raise
        raise UsageError(f"cannot show {agent.settings.env}: {error}") from error
    line = f"greedy evaluation over {len(returns)} episodes"
    if len(returns):
        line += f": mean {returns.mean():.2f} ± {returns.std():.2f}"
        line += f", min {returns.min():.2f}, max {returns.max():.2f}"
    print(line)


def run(args: argparse.Namespace, chosen: dict) -> int:
    """Train, watch and keep the agent; the exit status."""
    if args.load:
        agent, envs = restore(args.load, chosen)
    else:
        settings = choose_settings(**chosen)
        envs = make_envs(settings.env, settings.num_envs)
        agent = Agent(envs, settings)
    s = agent.settings
    if agent.steps >= s.total_steps:
        raise UsageError(
            f"{args.load} is already trained for {agent.steps} steps: give more --total-steps"
        )
    if args.save:
        if os.path.exists(args.save) and not os.path.isfile(args.save):
            raise UsageError(f"--save {args.save} is not a file")
        try:
            open(args.save + ".tmp", "wb").close()
            os.remove(args.save + ".tmp")
        except OSError as error:
            raise UsageError(f"cannot save {args.save}: {error.strerror}") from error
    log = open(args.log, "a" if args.load else "w", newline="") if args.log else None
    text = f"settings: {as_flags(s)}"
    print(textwrap.fill(text, 100, subsequent_indent="    ", break_on_hyphens=False))
    start, state, history, interrupted = pack(agent), None, [], False
    display = Display(agent)
    try:
        for record in learn(agent, envs):
            history.append(record)
            state = pack(agent)
            display.show(record)
            if log:
                writer = csv.DictWriter(log, record.keys())
                if log.tell() == 0:
                    writer.writeheader()
                writer.writerow(record)
                log.flush()
            if args.save and len(history) % (args.save_every or 10) == 0:
                try:
                    save(args.save, state)
                except UsageError as error:
                    print(f"ppo.py: {error}; the run goes on", file=sys.stderr)
    except KeyboardInterrupt:
        interrupted = True
        unpack(agent, state or start)  # the end of the last whole iteration
    except FloatingPointError as error:
        raise UsageError(
            f"{error}, {agent.steps} steps into the run. Look for a division by 0 or a simulation "
            "that diverges; a smaller --lr or tighter action bounds may keep the agent from there"
        ) from error
    finally:
        envs.close()
        if args.save and state:
            save(args.save, state)
    print(display.clear + draw_curve(history))
    if interrupted:
        report(agent, 5, seconds=0.5)
        return 130
    report(agent, args.episodes or 100)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Do what the command line says; the exit status."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    sys.stdout.reconfigure(errors="replace")  # for terminals without block characters
    gym.logger.min_level = gym.logger.ERROR  # its warnings come on several lines
    try:
        args, chosen = parse(argv)
        # What is not finite is looked for where it matters; numpy's warnings would add nothing.
        with np.errstate(all="ignore"):
            if not args.play:
                return run(args, chosen)
            agent, envs = restore(args.play, chosen)
            envs.close()
            report(agent, args.episodes or 100, args.render)
            return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on (| head). Python flushes at exit: that must find a place, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UsageError, OSError, MemoryError) as error:
        print("ppo.py:", textwrap.shorten(str(error), 400), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
