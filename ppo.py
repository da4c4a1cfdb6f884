#!/usr/bin/env -S uv run --script
# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium>=1.0", "numpy>=1.26"]
# ///
"""Proximal Policy Optimization (PPO) in one file: numpy, gymnasium and every gradient by hand.

    python ppo.py --env CartPole-v1

Read it from top to bottom with the lectures beside it. `Eq. 9` above a line is the formula that the
line computes: README.md lists all nineteen, test_ppo.py proves them.

The algorithm (Eq. 19)                                                                where
    initialise the actor θ and the critic φ                                           §1
    repeat, with θ_k, φ_k the values that θ, φ have now (in names: _old)              §8
        play T steps in each of N environments with π_θ_k: a trajectory               §2, §3
        Â from V_φ_k by GAE;  R̂ = Â + V_φ_k                                           §4, §8
        in K epochs, for each minibatch of B rows:  θ ← θ - Adam(∇ actor_loss)        §5, §6, §7
        likewise for the critic:                    φ ← φ - Adam(∇ critic_loss)       §6, §7

Glossary                    name                         shape
    N, T, K                 num_envs, num_steps, epochs
    B                       minibatch_size               in shapes: any number of rows
    n, d, P                                              actions, action components, parameters
    s_t                     observations, obs            (T+1, N, obs_dim); (N, obs_dim)
    s_t, normalised         inputs                       (T+1, N, obs_dim); (B, obs_dim)
    a_t                     actions                      (T, N) or (T, N, d); (B,) or (B, d)
    r_t                     rewards                      (T, N)
    true end, time limit    terminated, truncated        (T, N) booleans; ended: either
    V_φ(s_t)                values                       (T+1, N); (B,)
    δ_t, Â_t, R̂_t           deltas, advantages, returns  (T, N); (B,)
    π_θ(·|s)                policy                       of logits (B, n) or mean (B, d), log_std
    log π_θ(a|s), H(π_θ)    log_prob, entropy            (B,)
    ρ = π_θ / π_θ_k         ratio                        (B,)
    θ, φ                    theta, phi: vectors (P,); actor, critic: the same as lists of arrays
    γ, λ, ε, β, c           gamma, lam, clip or epsilon, beta, ent_coef; δ of TRPO: kl_target, delta
"""

import os

# Small networks run fastest on one BLAS thread. numpy reads this on import; your own value wins.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
from collections import deque
from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.wrappers.utils import RunningMeanStd

# §1  Networks -------------------------------------------------------------------------------------
# π_θ and V_φ are two separate multi-layer perceptrons. The forward pass keeps what the backward
# pass needs, and the backward pass is the chain rule, one layer at a time.


def init_mlp(sizes, rng, out_gain=1.0, dtype=np.float32):
    """Initial parameters [W1, b1, W2, b2, ...] of a network with these layer sizes.

    W (fan_in, fan_out) is orthogonal (Saxe et al. 2014): its rows or columns, whichever are fewer,
    are orthogonal and have length √2 in hidden layers, out_gain in the last. b (fan_out,) is 0.
    """
    params = []
    gains = [2**0.5] * (len(sizes) - 2) + [out_gain]
    for fan_in, fan_out, gain in zip(sizes[:-1], sizes[1:], gains, strict=True):
        q, r = np.linalg.qr(rng.standard_normal((max(fan_in, fan_out), min(fan_in, fan_out))))
        q *= np.sign(np.diag(r))  # without these signs q would not be uniformly distributed
        W = gain * (q if fan_in >= fan_out else q.T)
        params += [np.ascontiguousarray(W, dtype), np.zeros(fan_out, dtype)]
    return params


def mlp_forward(params, inputs):
    """The output (B, out) for inputs (B, in), and as cache what each layer received."""
    out, cache = inputs, []
    for W, b in zip(params[0::2], params[1::2], strict=False):  # log_std, if any, is no layer
        cache.append(np.tanh(out) if cache else out)  # tanh between layers
        out = cache[-1].dot(W)  # for matrices this small twice as fast as @
        out += b
    return out, cache


def mlp_backward(params, cache, dout):
    """The gradients [dW1, db1, ...] of a loss, from dout (B, out) = ∂loss/∂output."""
    grads = []
    for i in reversed(range(len(cache))):
        W, x = params[2 * i], cache[i]
        # out = x W + b: ∂loss/∂W = xᵀ dout, ∂loss/∂b adds up dout's rows, and ∂loss/∂x = dout Wᵀ
        grads = [x.T.dot(dout), np.ones(len(dout), dout.dtype).dot(dout), *grads]
        if i > 0:
            dout = dout.dot(W.T)
            dout *= 1 - x * x  # x = tanh(z), and tanh'(z) = 1 - tanh²(z)
    return grads


# §2  Policies -------------------------------------------------------------------------------------
# A policy is a distribution over actions. Both kinds offer sample, mode, log_prob and entropy. The
# last two return a number for each state (B,) and, as a list, its gradient with respect to what the
# policy was made from: logits, or mean and log_std (of that one, too, a row for each state).


class Categorical:
    """A choice among n actions, π(a|s) = softmax(logits)_a, of logits (B, n)."""

    def __init__(self, logits):
        self.logits, self._log_probs = logits, None

    @property
    def log_probs(self):
        """log π(·|s) (B, n), computed when first asked for: sampling does not need it."""
        if self._log_probs is None:
            logits = np.asfortranarray(self.logits)  # sums over short rows are slow otherwise
            shifted = logits - logits.max(axis=-1, keepdims=True)  # exp cannot overflow
            self._log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
        return self._log_probs

    def sample(self, rng):
        """a ~ π(·|s) (B,): the argmax of logits + Gumbel noise is distributed as their softmax."""
        return (self.logits + rng.gumbel(size=self.logits.shape)).argmax(axis=-1)

    def mode(self):
        """The likeliest action (B,)."""
        return self.logits.argmax(axis=-1)

    def log_prob(self, actions):
        """log π(a|s) (B,) for actions (B,), and its gradient [(B, n)]."""
        rows, grad_logits = np.arange(len(actions)), -np.exp(self.log_probs)
        # For Eq. 3   ∂ log π(a) / ∂ logits = onehot(a) - π
        grad_logits[rows, actions] += 1
        return self.log_probs[rows, actions], [grad_logits]

    def entropy(self):
        """H(π) (B,), and its gradient [(B, n)]."""
        probs = np.exp(self.log_probs)
        # Eq. 17   H = -Σ π log π;   ∂H / ∂ logits = -π (log π + H)
        entropy = -(probs * self.log_probs).sum(axis=-1)
        return entropy, [-probs * (self.log_probs + entropy[:, None])]


class Gaussian:
    """Independent normal actions, π(a|s) = N(mean, exp(log_std)²), of mean (B, d), log_std (d,)."""

    def __init__(self, mean, log_std):
        self.mean, self.log_std, self.std = mean, log_std, np.exp(log_std)

    def sample(self, rng):
        """a ~ π(·|s) (B, d)."""
        return self.mean + self.std * rng.standard_normal(self.mean.shape, self.mean.dtype)

    def mode(self):
        """The likeliest action (B, d)."""
        return self.mean

    def log_prob(self, actions):
        """log π(a|s) (B,) for actions (B, d), and its gradient [(B, d), (B, d)]."""
        z = (actions - self.mean) / self.std
        # For Eq. 3   log π = -Σ (½z² + log std + ½ log 2π);   ∂/∂mean = z/std, ∂/∂log_std = z² - 1
        log_prob = -(0.5 * z * z + self.log_std + 0.5 * float(np.log(2 * np.pi))).sum(axis=-1)
        return log_prob, [z / self.std, z * z - 1]

    def entropy(self):
        """H(π) (B,), and its gradient [(B, d), (B, d)]."""
        # Eq. 17   H = Σ (log std + ½ log 2πe), the same in every state;   ∂H / ∂log_std = 1
        H = (self.log_std + 0.5 * float(np.log(2 * np.pi * np.e))).sum()
        return np.full(len(self.mean), H), [np.zeros_like(self.mean), np.ones_like(self.mean)]


def policy_forward(actor, inputs):
    """π_θ(·|s) for inputs (B, obs_dim), Gaussian if actor ends in a log_std; and the cache."""
    out, cache = mlp_forward(actor, inputs)
    return (Gaussian(out, actor[-1]) if len(actor) % 2 else Categorical(out)), cache


# §3  Trajectory -----------------------------------------------------------------------------------
# First play, then judge: while it plays, the agent only chooses actions. V(s) and log π_θ_k(a|s)
# follow for the whole rollout at once, in §8.


def rollout(envs, act, obs, num_steps):
    """Play num_steps steps in each of N environments; act maps observations to actions (N, ...).

    envs is a Gymnasium vector environment with NEXT_STEP auto-reset, obs (N, obs_dim) what it
    returned last. Returns observations (T+1, N, obs_dim), actions (T, N, ...), rewards, terminated
    and truncated (T, N). The step that ends an episode returns its true last observation. The step
    after it only resets: it ignores the action, and its row is no transition.
    Raises FloatingPointError when an observation or a reward is not finite.
    """
    observations = np.empty((num_steps + 1, *obs.shape), np.float32)
    rewards = np.empty((num_steps, len(obs)), np.float32)
    terminated, truncated = np.empty_like(rewards, bool), np.empty_like(rewards, bool)
    observations[0], actions = obs, []
    # Eq. 1   τ = (s_1, a_1, r_1, s_2, a_2, r_2, ...)
    for t in range(num_steps):
        actions.append(act(observations[t]))
        observations[t + 1], rewards[t], terminated[t], truncated[t], _ = envs.step(actions[t])
        if not (np.isfinite(observations[t : t + 2]).all() and np.isfinite(rewards[t]).all()):
            raise FloatingPointError(f"step {t} of a rollout returned a number that is not finite")
    return observations, np.stack(actions), rewards, terminated, truncated


# §4  Advantage ------------------------------------------------------------------------------------
# How much better was an action than what the critic expected of its state?


def gae(rewards, values, terminated, truncated, gamma, lam):
    """Generalized Advantage Estimation (Schulman et al. 2016): Â (T, N) (Eq. 5-9).

    rewards, terminated and truncated are (T, N), values (T+1, N): values[t + 1] is V(s_{t+1}), also
    where the rollout or a time limit stops an episode. Reset rows come out meaningless: drop them.
    """
    # Eq. 7, 8   Q - V: δ_t = r_t + γ V(s_{t+1}) - V(s_t), and V(s_{t+1}) is 0 after a true end
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    # After either ending comes another episode: no credit flows back from it.
    chain = np.where(terminated | truncated, 0, gamma * lam).astype(deltas.dtype)
    advantages, advantage = np.empty_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        # Eq. 9   Â_t = δ_t + γλ Â_{t+1};   λ = 1: R_t (Eq. 5, plus V at a cut) - V(s_t)
        advantages[t] = advantage = deltas[t] + chain[t] * advantage
    return advantages


# §5  Objectives -----------------------------------------------------------------------------------
# The lectures' objectives, in their order. Each returns for every row (B,) a loss, to be minimised
# on average, and its slope ∂loss / ∂log π_θ(a|s). The lectures' sums differ by a factor, which Adam
# all but cancels. TRPO (Eq. 14) works with Eq. 12 and 13; what is new in it is the step, in §7.


def policy_gradient(log_prob, log_prob_old, advantages):
    """The policy gradient (Eq. 4, 6): right for one step only. log_prob_old is not used."""
    # Eq. 4, 6   loss = -log π_θ(a|s) Â
    return -log_prob * advantages, -advantages


def importance_sampling(log_prob, log_prob_old, advantages):
    """The surrogate (Eq. 12): data of π_θ_k, reweighted by importance sampling (Eq. 11)."""
    ratio = np.exp(log_prob - log_prob_old)
    # Eq. 11, 12   loss = -ρ Â, ρ = π_θ(a|s) / π_θ_k(a|s);   ∂ρ / ∂ log π = ρ
    return -ratio * advantages, -ratio * advantages


def kl_divergence(log_prob, log_prob_old, advantages=None):
    """Rows (B,) whose mean estimates KL(π_θ_k‖π_θ) (Eq. 13), for actions of π_θ_k. Adding ρ - 1, on
    average 0, makes them nonnegative and less noisy (Schulman 2020). advantages is not used."""
    ratio_minus_1 = np.expm1(log_prob - log_prob_old)  # exact for small differences, too
    # Eq. 13   KL = E[log π_θ_k - log π_θ] = E[log π_θ_k - log π_θ + ρ - 1];   ∂/∂ log π = ρ - 1
    return log_prob_old - log_prob + ratio_minus_1, ratio_minus_1


def kl_penalty(log_prob, log_prob_old, advantages, beta):
    """PPO1 (Eq. 15): the surrogate, and beta as the price of moving away from π_θ_k."""
    loss, slope = importance_sampling(log_prob, log_prob_old, advantages)
    kl, kl_slope = kl_divergence(log_prob, log_prob_old)
    # Eq. 15   loss = -(ρ Â - β KL)
    return loss + beta * kl, slope + beta * kl_slope


def adapt_beta(beta, kl, target):
    """β for the next iteration, after this one moved the policy by kl (Eq. 15)."""
    # Eq. 15   KL > KL_max → β grows, KL < KL_min → β shrinks; factors of Schulman et al. 2017
    if kl > 1.5 * target:
        return min(2 * beta, 1e4)
    return max(beta / 2, 1e-4) if kl < target / 1.5 else beta


def clip(log_prob, log_prob_old, advantages, epsilon):
    """PPO2 (Eq. 16): a ratio beyond 1 ± epsilon gains no more, but a wrong one is pulled back."""
    ratio = np.exp(log_prob - log_prob_old)
    surrogate, clipped = ratio * advantages, ratio.clip(1 - epsilon, 1 + epsilon) * advantages
    # Eq. 16   loss = -min(ρ Â, clip(ρ, 1-ε, 1+ε) Â);   slope 0 where the clipped one is smaller
    return -np.minimum(surrogate, clipped), np.where(surrogate <= clipped, -surrogate, 0)


# §6  Losses ---------------------------------------------------------------------------------------


def actor_loss(actor, objective, ent_coef, inputs, actions, log_prob_old, advantages):
    """The actor's loss for each row (B,), and the gradients of its mean, in the order of actor.
    objective is one of §5 as a function of (log_prob, log_prob_old, advantages), all (B,)."""
    policy, cache = policy_forward(actor, inputs)
    log_prob, grad_log_prob = policy.log_prob(actions)
    loss, slope = objective(log_prob, log_prob_old, advantages)
    d_policy = [slope[:, None] * grad for grad in grad_log_prob]  # the chain rule
    if ent_coef:
        # Eq. 17   loss - c H(π_θ)
        entropy, grad_entropy = policy.entropy()
        loss = loss - ent_coef * entropy
        d_policy = [d - ent_coef * grad for d, grad in zip(d_policy, grad_entropy, strict=True)]
    dout, *dlog_std = [d / len(inputs) for d in d_policy]  # of the mean over rows
    return loss, mlp_backward(actor, cache, dout) + [d.sum(axis=0) for d in dlog_std]


def critic_loss(critic, inputs, returns):
    """The critic's loss for each row (B,), and the gradients of its mean, as actor_loss does."""
    out, cache = mlp_forward(critic, inputs)
    error = out[:, 0] - returns
    # Eq. 18   loss = (V_φ(s) - R̂)²
    return error * error, mlp_backward(critic, cache, 2 * error[:, None] / len(inputs))


# §7  Optimisers -----------------------------------------------------------------------------------
# To an optimiser θ is one long vector, and so is its gradient. The arrays that the networks use are
# views of it: when the vector moves, they move.


def unflatten(vector, like):
    """Pieces of the vector (P,), as views with the shapes of the arrays in like."""
    pieces = np.split(vector, np.cumsum([array.size for array in like])[:-1])
    return [piece.reshape(array.shape) for piece, array in zip(pieces, like, strict=True)]


def clip_by_global_norm(gradient, max_norm):
    """The gradient (P,), scaled down to max_norm where longer; zeros if it overflowed."""
    norm = float(np.sqrt(gradient @ gradient))
    return gradient * min(1, max_norm / norm) if 0 < norm < np.inf else np.zeros_like(gradient)


class Adam:
    """Adam (Kingma & Ba 2015) for a parameter vector theta (P,), which step moves in place."""

    # The paper's eps is 1e-8. With a larger one, steps vanish where gradients all but vanish.
    def __init__(self, theta, beta1=0.9, beta2=0.999, eps=1e-5):
        self.theta, self.beta1, self.beta2, self.eps = theta, beta1, beta2, eps
        self.m, self.v, self.t = np.zeros_like(theta), np.zeros_like(theta), 0

    def step(self, gradient, lr):
        """Move theta against the gradient (P,), with learning rate lr."""
        self.t += 1
        # m ← β₁ m + (1-β₁) g,   v ← β₂ v + (1-β₂) g²
        self.m += (1 - self.beta1) * (gradient - self.m)
        self.v += (1 - self.beta2) * (gradient * gradient - self.v)
        # θ ← θ - lr m̂ / (√v̂ + eps), with m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ)
        m_scale, v_scale = lr / (1 - self.beta1**self.t), 1 / (1 - self.beta2**self.t)
        self.theta -= m_scale * self.m / (np.sqrt(v_scale * self.v) + self.eps)


# TRPO is the step that PPO replaces; a first reading may skip to §8. Among the steps Δ with KL ≤ δ
# it wants the one that gains most. Near θ_k the gain is gᵀΔ with g = ∇J, and KL is ½ΔᵀFΔ with the
# Fisher matrix F = E[∇log π ∇log πᵀ]. Here surrogate (a loss) and kl map theta to (mean, gradient).


def fisher_product(kl, theta, v, damping=0.1):
    """(F + damping) v (P,) at θ_k = theta; F v is how ∇KL changes in the direction v (P,)."""
    h = 2 * float(np.finfo(theta.dtype).eps) ** (1 / 3) / float(np.linalg.norm(v))
    # Eq. 14   F v ≈ (∇KL(θ_k + hv) - ∇KL(θ_k - hv)) / 2h
    return (kl(theta + h * v)[1] - kl(theta - h * v)[1]) / (2 * h) + damping * v


def conjugate_gradients(product, g, iterations=10):
    """x (P,) with F x ≈ g (P,), for product(v) = F v (Hestenes & Stiefel 1952)."""
    x, residual, direction = np.zeros_like(g), g, g
    for _ in range(iterations):
        F_direction, squared = product(direction), residual @ residual
        length = squared / (direction @ F_direction)
        x, residual = x + length * direction, residual - length * F_direction
        if residual @ residual < 1e-10 * (g @ g):
            break
        direction = residual + (residual @ residual / squared) * direction
    return x


def trust_region_step(theta, surrogate, kl, delta, damping=0.1):
    """TRPO (Eq. 14; Schulman et al. 2015): move theta (P,) in place so that the surrogate loss
    (Eq. 12) falls and kl (Eq. 13) is at most delta; where no such step is found, stay."""
    loss_old, gradient = surrogate(theta)
    if not gradient.any():
        return
    x = conjugate_gradients(lambda v: fisher_product(kl, theta, v, damping), -gradient)
    # Eq. 14   Δ = √(2δ / xᵀFx) x with F x = g = -gradient, so that xᵀFx = xᵀg
    step = np.sqrt(2 * delta / (x @ -gradient)) * x
    for _ in range(10):  # all this is approximate: halve the step until both conditions hold
        if kl(theta + step)[0] <= delta and surrogate(theta + step)[0] < loss_old:
            theta += step
            return
        step = step / 2


# §8  PPO ------------------------------------------------------------------------------------------


class Agent:
    """Actor and critic with their optimisers and running statistics; settings are those of §9."""

    def __init__(self, envs, settings):
        s, self.settings, self.rng = settings, settings, np.random.default_rng(settings.seed)
        self.obs_space, self.action_space = envs.single_observation_space, envs.single_action_space
        obs_dim, act_dim = gym.spaces.flatdim(self.obs_space), gym.spaces.flatdim(self.action_space)
        # At first no action is preferred. Without hidden layers, V = 0: no noise to learn from.
        actor = init_mlp([obs_dim, *s.hidden, act_dim], self.rng, out_gain=0.01)
        if isinstance(self.action_space, gym.spaces.Box):
            actor.append(np.full(act_dim, s.log_std_init, np.float32))
        critic = init_mlp([obs_dim, *s.hidden, 1], self.rng, out_gain=1.0 if s.hidden else 0.0)
        self.theta, self.phi = np.concatenate(actor, axis=None), np.concatenate(critic, axis=None)
        self.actor, self.critic = unflatten(self.theta, actor), unflatten(self.phi, critic)
        self.actor_adam, self.critic_adam = Adam(self.theta), Adam(self.phi)
        self.return_stats, self.beta = RunningMeanStd(), 1.0
        self.obs_stats = RunningMeanStd(shape=(obs_dim,), dtype=np.float32)
        self.obs_std = np.ones(obs_dim, np.float32)

    def normalize(self, obs):
        """Observations (..., obs_dim) as network input: mean 0, deviation 1, within ±10."""
        return ((obs - self.obs_stats.mean) / self.obs_std).clip(-10, 10)

    def policy(self, obs):
        """π_θ(·|s) for observations (N, obs_dim)."""
        return policy_forward(self.actor, self.normalize(obs))[0]

    def act(self, obs):
        """The likeliest action as env.step takes it (§9), for one observation or for a batch."""
        rows, single = flat(self.obs_space, obs)
        actions = legal(self.action_space, self.policy(rows).mode())
        return actions[0] if single else actions


def fit(agent, adam, loss, data, lr):
    """K epochs of gradient steps; loss maps a minibatch of the arrays in data to (_, gradients)."""
    s, num_rows = agent.settings, len(data[0])
    # Minibatches of at most B rows, equal to within one row.
    edges = np.linspace(0, num_rows, math.ceil(num_rows / s.minibatch_size) + 1).astype(int)
    for _ in range(s.epochs):
        order = agent.rng.permutation(num_rows)
        shuffled = [array[order] for array in data]
        for start, end in zip(edges[:-1], edges[1:], strict=True):
            _, grads = loss(*(array[start:end] for array in shuffled))
            adam.step(clip_by_global_norm(np.concatenate(grads, axis=None), s.max_grad_norm), lr)


def update(agent, inputs, actions, advantages, returns, remaining):
    """Learn from the transitions of a rollout (B, ...) (Eq. 10, 19); return what it changed.
    remaining, the fraction of the run still to come, scales lr and the entropy bonus."""
    s, actor = agent.settings, agent.actor
    lr, ent_coef = s.lr * remaining, s.ent_coef * remaining
    # Eq. 6: a mean is a baseline, too. The division lets c, β and max_grad_norm fit any rewards.
    normalized_advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    log_prob_old, _ = policy_forward(actor, inputs)[0].log_prob(actions)  # θ is still θ_k
    data = [inputs, actions, log_prob_old, normalized_advantages]

    def mean_loss(objective, ent_coef, theta):
        loss, grads = actor_loss(unflatten(theta, actor), objective, ent_coef, *data)
        return loss.mean(), np.concatenate(grads, axis=None)

    if s.objective == "trpo":
        surrogate = partial(mean_loss, importance_sampling, ent_coef)
        trust_region_step(agent.theta, surrogate, partial(mean_loss, kl_divergence, 0), s.kl_target)
    else:
        objectives = {"pg": policy_gradient, "is": importance_sampling}
        objectives["kl"] = partial(kl_penalty, beta=agent.beta)
        objectives["clip"] = partial(clip, epsilon=s.clip)
        loss = partial(actor_loss, actor, objectives[s.objective], ent_coef)
        fit(agent, agent.actor_adam, loss, data, lr)
    fit(agent, agent.critic_adam, partial(critic_loss, agent.critic), [inputs, returns], lr)

    policy, _ = policy_forward(actor, inputs)
    kl, ratio_minus_1 = kl_divergence(policy.log_prob(actions)[0], log_prob_old)
    agent.beta = adapt_beta(agent.beta, kl.mean(), s.kl_target)  # for the objective "kl"
    return {
        "kl": float(kl.mean()),
        "clipped": float((abs(ratio_minus_1) > s.clip).mean()),
        "entropy": float(policy.entropy()[0].mean()),
        "explained": float(1 - advantages.var() / (returns.var() + 1e-8)),  # of var R̂, by V_φ_k
    }


def learn(agent, envs):
    """The PPO loop (Eq. 19), for settings.total_steps; yields a record after each iteration."""
    s, N, steps, episodes = agent.settings, envs.num_envs, 0, 0
    ended_last, so_far, discounted_so_far = np.zeros(N, bool), np.zeros(N), np.zeros(N)
    recent = deque(maxlen=100)
    obs, _ = envs.reset(seed=int(agent.rng.integers(2**31)))
    while steps < s.total_steps:
        # Play with θ_k.
        remaining = 1 - steps / s.total_steps
        T = min(s.num_steps, math.ceil((s.total_steps - steps) / N))
        trajectory = rollout(envs, lambda obs: agent.policy(obs).sample(agent.rng), obs, T)
        observations, actions, rewards, terminated, truncated = trajectory
        obs, ended, steps = observations[-1], terminated | truncated, steps + T * N
        # The row after an ending is the reset, no transition: nothing learns from it.
        valid, ended_last = ~np.vstack([ended_last, ended[:-1]]), ended[-1]
        # Eq. 2   R(τ) of episodes that ended (running_sums, below); J(θ) ≈ the mean of the last 100
        totals, so_far = running_sums(rewards, ended, 1, so_far)
        recent.extend(totals[ended])
        episodes, J = episodes + int(ended.sum()), float(np.mean(recent)) if recent else math.nan
        discounted, discounted_so_far = running_sums(rewards, ended, s.gamma, discounted_so_far)
        if not valid.any():
            continue  # with T = 1, all rows may be resets

        # Judge with φ_k; normalise as in play. Statistics change after it, up to normalize_steps.
        inputs = agent.normalize(observations)
        if agent.obs_stats.count < s.normalize_steps:
            agent.obs_stats.update(observations[:-1][valid])
            agent.obs_std = np.sqrt(agent.obs_stats.var + 1e-8)
        # Not in the lectures: rewards divided by the deviation of their discounted sums so far.
        agent.return_stats.update(discounted[valid])
        rewards /= np.sqrt(agent.return_stats.var + 1e-8)
        values = mlp_forward(agent.critic, inputs.reshape((T + 1) * N, -1))[0].reshape(T + 1, N)
        advantages = gae(rewards, values, terminated, truncated, s.gamma, s.lam)[valid]
        # Eq. 18   R̂ = Â + V_φ_k(s)
        returns = advantages + values[:-1][valid]

        changes = update(agent, inputs[:-1][valid], actions[valid], advantages, returns, remaining)
        yield {"steps": steps, "episodes": episodes, "mean_return": J, **changes}


def running_sums(rewards, ended, gamma, so_far):
    """r_t + γ r_{t-1} + γ² r_{t-2} + ... of the episode, for each t (T, N); and the next so_far.
    It looks back: the mirror image of the reward-to-go (Eq. 5). With γ = 1 it is R(τ) where an
    episode ends. rewards and ended are (T, N); so_far (N,) is what the last call returned, or 0."""
    keep, sums = gamma * ~ended, np.empty(rewards.shape)
    for t in range(len(rewards)):
        sums[t] = rewards[t] + so_far
        so_far = keep[t] * sums[t]
    return sums, so_far


# The rest makes a program of it. A student may stop here.

import argparse
import contextlib
import io
import json
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field, fields

from gymnasium.wrappers.vector import TransformAction, TransformObservation

# §9  Settings and environments --------------------------------------------------------------------


class UsageError(ValueError):
    """Something that the user can put right; the message says how."""


def setting(default, help, low=None, high=None):
    """A field of Settings, with the help text of its flag and the range of its numbers."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


@dataclass(frozen=True)
class Settings:
    """Every setting of a run; the command line is made from these fields. Raises UsageError."""

    env: str = setting("CartPole-v1", "Gymnasium environment; module:Env-v0 imports a module first")
    seed: int = setting(0, "seed of everything random", 0, 2**32 - 1)
    total_steps: int = setting(500_000, "steps to learn from, in all environments", 1, 10**12)
    num_envs: int = setting(16, "N, environments side by side", 1, 4096)
    num_steps: int = setting(128, "T, steps in each environment between updates", 1, 10**6)
    epochs: int = setting(6, "K, passes over the same data, Eq. 10", 1, 1000)
    minibatch_size: int = setting(128, "B, transitions in one gradient step, at most", 1, 10**9)
    lr: float = setting(2e-3, "learning rate at the start; falls to 0", 1e-9, 1)
    gamma: float = setting(0.995, "γ, discount, Eq. 5", 0, 1)
    lam: float = setting(0.95, "λ of GAE, Eq. 9", 0, 1)
    objective: str = setting("clip", "pg, is, trpo, kl or clip: Eq. 4, 12, 14, 15, 16")
    clip: float = setting(0.2, "ε of clip, Eq. 16", 1e-3, 10)
    kl_target: float = setting(0.01, "δ of trpo, Eq. 14; where β steers kl, Eq. 15", 1e-6, 10)
    ent_coef: float = setting(0.0, "c, entropy bonus at the start; falls to 0, Eq. 17", 0, 10)
    max_grad_norm: float = setting(0.5, "length to which gradients are clipped", 1e-6, 1e6)
    hidden: tuple = setting((64, 64), "sizes of the hidden layers, if any", 1, 8192)
    normalize_steps: int = setting(1, "steps to learn observation statistics in; 0 none", 0, 10**12)
    log_std_init: float = setting(0.0, "log std of real actions at the start", -5, 2)
    episodes: int = setting(100, "episodes of the greedy evaluation", 1, 10**6)

    def __post_init__(self):
        for f in fields(self):
            value, low, high = getattr(self, f.name), f.metadata["low"], f.metadata["high"]
            x, kinds = np.asarray(value), "iuf" if f.type is float else "iu"
            fits = (x.dtype.kind in kinds or not x.size) and x.ndim == (f.type is tuple)
            if low is not None and not (fits and (low <= x).all() and (x <= high).all()):
                raise UsageError(f"{f.name}: {f.type.__name__} from {low} to {high}, not {value}")
        if self.objective not in ("pg", "is", "trpo", "kl", "clip"):
            raise UsageError(f"objective must be pg, is, trpo, kl or clip, not {self.objective}")


# What differs from these defaults by kind of task, and by task: there mostly how long it takes.
# fmt: off
REAL = dict(total_steps=1_000_000, lr=6e-4, gamma=0.99, normalize_steps=10**12)
KINDS = {
    "discrete actions": dict(),
    "real actions": dict(REAL, log_std_init=-0.5),
    "one real action": dict(REAL, epochs=8, log_std_init=0.8),
    # Without hidden layers, W is a table: a row of logits and a value for each state.
    "one-hot observations": dict(num_envs=32, num_steps=32, minibatch_size=256, lr=3e-2, lam=0.8,
                                 ent_coef=0.3, hidden=(), normalize_steps=0),
}
TASKS = {
    "CartPole": dict(total_steps=100_000), "MountainCarContinuous": dict(total_steps=100_000),
    "Acrobot": dict(total_steps=200_000), "FrozenLake": dict(total_steps=200_000),
    "CliffWalkingSlippery": dict(total_steps=200_000), "FrozenLake8x8": dict(total_steps=300_000),
    "LunarLander": dict(total_steps=1_000_000),
    "CliffWalking": dict(total_steps=100_000, num_envs=16, epochs=10, minibatch_size=128, lr=0.1),
    "HalfCheetah": dict(num_envs=32, num_steps=64, lam=0.9, log_std_init=-1.0),
    "LunarLanderContinuous": dict(total_steps=500_000, epochs=20, gamma=0.999, normalize_steps=1),
    "Pendulum": dict(total_steps=100_000, num_envs=8, epochs=10, minibatch_size=64, lr=1e-3,
                     lam=0.8, normalize_steps=0, log_std_init=1.0),
}
# fmt: on


def kind_of(envs):
    """The kind of task, as in KINDS, that the spaces of a vector environment show."""
    obs, action = gym.spaces.flatten_space(envs.single_observation_space), envs.single_action_space
    if obs.dtype.kind in "iub" and obs.high.max() == 1:
        return "one-hot observations"
    if isinstance(action, gym.spaces.Discrete):
        return "discrete actions"
    return "one real action" if gym.spaces.flatdim(action) == 1 else "real actions"


def new_agent(env=Settings.env, **chosen):
    """An untrained agent; settings not chosen are those of its kind of task and of the task."""
    name = env.split(":")[-1].rsplit("-v", 1)[0]
    with contextlib.closing(make_envs(env, 1)) as envs:
        return Agent(envs, Settings(env, **KINDS[kind_of(envs)] | TASKS.get(name, {}) | chosen))


def make_envs(env_id, num_envs, **kwargs):
    """N environments side by side, with observations (N, obs_dim) and actions as a policy samples
    them. What a task receives is legal, but learning keeps the sampled action with its own log π.
    Raises UsageError where that cannot work."""
    try:
        envs = gym.make_vec(env_id, num_envs=num_envs, **kwargs)
        obs_space, action_space = envs.single_observation_space, envs.single_action_space
        fixed = obs_space.is_np_flattenable and not isinstance(obs_space, gym.spaces.OneOf)
    except Exception as error:  # an environment may do anything
        raise UsageError(f"cannot use {env_id}: {type(error).__name__}: {error}") from error
    playable = isinstance(action_space, gym.spaces.Discrete | gym.spaces.Box)
    mode = envs.metadata.get("autoreset_mode")
    if not (playable and fixed and getattr(mode, "value", mode) in (None, "NextStep")):
        needs = "Discrete or Box actions, NextStep auto-reset and observations of a fixed size"
        raise UsageError(f"needed are {needs}; {env_id} has {action_space}, {mode}, {obs_space}")
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        envs = TransformObservation(envs, lambda obs: flat(obs_space, obs)[0])
    if isinstance(action_space, gym.spaces.Box) or action_space.start:
        envs = TransformAction(envs, partial(legal, action_space))
    return envs


def flat(space, obs):
    """Observations as float32 rows (N, obs_dim), and whether obs was a single one, no batch."""
    leaf, value = space, obs
    while hasattr(leaf, "spaces"):  # a Dict or a Tuple: its first part tells
        key = next(iter(leaf)) if isinstance(leaf, gym.spaces.Dict) else 0
        leaf, value = leaf[key], value[key]
    single = np.ndim(value) == len(leaf.shape or ())
    batch = [obs] if single else gym.vector.utils.iterate(gym.vector.utils.batch_space(space), obs)
    return np.stack([gym.spaces.flatten(space, x) for x in batch]).astype(np.float32), single


def legal(space, actions):
    """A policy's actions (N,) or (N, d) as env.step takes them: counted from start, or in the
    shape, bounds and dtype of the box, whole numbers rounded."""
    if isinstance(space, gym.spaces.Discrete):
        return actions + space.start
    actions = np.rint(actions) if space.dtype.kind in "iu" else actions
    return actions.reshape(-1, *space.shape).clip(space.low, space.high).astype(space.dtype)


def train(env=Settings.env, verbose=False, **chosen):
    """Train from Python, with the names of Settings; verbose prints what the command line prints.
    Returns the agent, whose act(obs) is greedy, and a list of one record for each iteration."""
    agent = new_agent(env, **chosen)
    return agent, list(run(agent, verbose))


# §10  The program ---------------------------------------------------------------------------------


def evaluate(agent, episodes=None, render=False):
    """The returns of settings.episodes greedy episodes, or so many, on seeds not trained on.
    Each environment plays one episode a round: counting whichever finish first would favour short
    episodes. A task without a time limit gets one of 1,000 steps."""
    s, episodes, returns = agent.settings, episodes or agent.settings.episodes, []
    num_envs = 1 if render else min(episodes, 10)
    kwargs = {"vectorization_mode": "sync", "render_mode": "human"} if render else {}
    with contextlib.closing(make_envs(s.env, num_envs, **kwargs)) as envs:
        seed = int(np.random.SeedSequence([s.seed, 1]).generate_state(1)[0])
        while len(returns) < episodes:
            obs, _ = envs.reset(seed=None if returns else seed)
            total, playing, steps = np.zeros(num_envs), np.ones(num_envs, bool), 0
            while playing.any() and steps < (envs.spec.max_episode_steps or 1000):
                actions = agent.policy(np.float32(obs)).mode()
                obs, rewards, terminated, truncated, _ = envs.step(actions)
                total, steps = total + rewards * playing, steps + 1
                playing &= ~(terminated | truncated)
            returns.extend(total)
    return np.array(returns[:episodes])


def state(agent):
    """What playing and a warm start need besides the settings, as arrays by name."""
    parts = {"actor": dict(enumerate(agent.actor)), "critic": dict(enumerate(agent.critic))}
    parts |= {"obs": vars(agent.obs_stats), "return": vars(agent.return_stats)}
    return {f"{part}_{k}": np.asarray(x) for part, xs in parts.items() for k, x in xs.items()}


def save(path, agent):
    """Write a policy file, whole or not at all, whatever happens meanwhile. Raises UsageError."""
    buffer = io.BytesIO()
    settings = json.dumps(asdict(agent.settings), default=lambda x: x.tolist())
    np.savez(buffer, settings=settings, **state(agent))
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "it is not a file")
        with open(f"{path}.tmp", "wb") as file:
            file.write(buffer.getvalue())
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")  # a full disk needs the room
        raise UsageError(f"cannot save {path}: {error.strerror}") from error


def load(path, **chosen):
    """The agent in a policy file; chosen settings win over the file's. Raises UsageError for any
    other file, and never runs what is in one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        # The sizes of its arrays, not those that it claims, are what is made room for.
        hidden = tuple(x.size for name, x in arrays.items() if name.startswith("critic"))[1:-2:2]
        settings = json.loads(str(arrays["settings"])) | {"hidden": hidden} | chosen
        if ":" in settings["env"] and "env" not in chosen:
            raise ValueError(f"it asks for a module; allow that by --env {settings['env']}")
        agent = new_agent(**settings)
        for name, own in state(agent).items():
            np.stack([arrays[name]], out=own[None], casting="same_kind")  # copyto would broadcast
            if not np.isfinite(np.sqrt(own) if name.endswith(("var", "count")) else own).all():
                raise ValueError(f"{name} is out of range")
        agent.obs_stats.count = float(arrays["obs_count"])
        agent.return_stats.count = float(arrays["return_count"])
        agent.obs_std = np.sqrt(agent.obs_stats.var + 1e-8)
        return agent
    except Exception as error:
        raise UsageError(f"cannot use {path} as a policy: {error!r}") from error


def print_curve(history, width=72, height=8):
    """Draw the mean return over steps with text; the numbers are the tops of the rows."""
    points = [(record["steps"], record["mean_return"]) for record in history if record["episodes"]]
    if not points:
        return print(f"{'no episode has ended yet':<60}")
    steps, returns = np.array(points).T
    returns = np.interp(np.linspace(steps[0], steps[-1], width), steps, returns)
    low, span = returns.min(), np.ptp(returns) or 1
    eighths = 1 + np.round((returns - low) / span * (8 * height - 1)).astype(int)
    for row in reversed(range(height)):
        bars = "".join(" ▁▂▃▄▅▆▇█"[k] for k in np.clip(eighths - 8 * row, 0, 8))
        print(f"{low + span * (row + 1) / height:12,.1f} |{bars}")
    print(f"mean return over {steps[0]:,.0f} to {steps[-1]:,.0f} steps")


def run(agent, verbose=True, save_path=None):
    """Learn, and yield each record. Now and then, print it and save the policy."""
    s, start, next_row = agent.settings, time.monotonic(), 0
    with contextlib.closing(make_envs(s.env, s.num_envs)) as envs:
        if verbose:
            print(textwrap.fill(f"{kind_of(envs)}: {s}", 100, subsequent_indent="    "))
        for record in learn(agent, envs):
            steps, seconds = record["steps"], time.monotonic() - start
            if steps >= min(next_row, s.total_steps):
                if save_path:
                    save(save_path, agent)
                texts = [f"{x:,}" if isinstance(x, int) else f"{x:,.4g}" for x in record.values()]
                if record["explained"] < 0:  # as where all returns are alike: nothing to explain
                    texts[-1] = "-"
                for line in ([texts] if next_row else [record, texts]) * verbose:
                    print("".join(f"{text:>12}" for text in line), flush=True)
                next_row = steps + s.total_steps // 20
            if verbose and getattr(sys.stdout, "isatty", bool)():
                done, left = steps / s.total_steps, seconds * (s.total_steps / steps - 1)
                line = f"{done:6.0%}, {steps / seconds:,.0f} steps/s, {left:,.0f} s left"
                print(f"{line:<60}", end="\r", flush=True)
            yield record


def parse(argv):
    """The options of the program, and the settings chosen among them."""
    parser = argparse.ArgumentParser(
        usage="python ppo.py [--env NAME] [options]",
        epilog="Defaults are in parentheses; a run prints what it uses, which depends on its task.",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=24, width=100),
        allow_abbrev=False,
    )
    parser.error = lambda text: parser.exit(2, f"ppo.py: {textwrap.shorten(text, 400)}\n")
    group = parser.add_argument_group("files and windows")
    group.add_argument("--save", metavar="FILE", help="keep the policy in this file")
    group.add_argument("--load", metavar="FILE", help="start from the policy in this file")
    group.add_argument("--play", metavar="FILE", help="evaluate the policy in this file, no more")
    group.add_argument("--log", metavar="FILE", help="write a CSV row for each iteration")
    group.add_argument("--render", action="store_true", help="show five episodes in a window")
    group = parser.add_argument_group("settings")
    for f in fields(Settings):
        kind = {"type": int, "nargs": "*"} if f.type is tuple else {"type": f.type}
        text = f"{f.metadata['help']} ({str(f.default).strip('()').replace(',', '')})"
        flag = "--" + f.name.replace("_", "-")
        group.add_argument(flag, default=argparse.SUPPRESS, metavar="", help=text, **kind)
    args = parser.parse_args(argv)
    if "" in (args.save, args.load, args.play, args.log):
        parser.error("a file needs a name")
    return args, {name: x for name, x in vars(args).items() if hasattr(Settings, name)}


def program(args, chosen):
    """Train or play as the options say."""
    path, history = args.play or args.load, []
    agent = load(path, **chosen) if path else new_agent(**chosen)
    if not args.play:
        try:
            with open(args.log or os.devnull, "w") as log:
                for record in run(agent, True, args.save):
                    for line in [record.values()] if history else [record, record.values()]:
                        print(*line, sep=",", file=log, flush=True)
                    history.append(record)
        finally:
            if args.save and history:
                save(args.save, agent)
            print_curve(history)
    if not (args.play and args.render):
        report(evaluate(agent))
    if args.render:
        try:
            report(evaluate(agent, chosen.get("episodes", 5), render=True))
        except Exception as error:  # no display, no pygame, no such window
            raise UsageError(f"cannot show {agent.settings.env}: {error}") from error


def report(returns):
    """Print what a greedy evaluation gave."""
    mean, std, low, high = returns.mean(), returns.std(), returns.min(), returns.max()
    numbers = f"mean {mean:.2f} ± {std:.2f}, min {low:.2f}, max {high:.2f}"
    print(f"greedy evaluation over {len(returns)} episodes: {numbers}")


def main(argv=None):
    """Run the command line; return the exit status, unless argparse exits."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it is closed
    sys.stdout.reconfigure(errors="replace")  # for terminals without block characters
    gym.logger.min_level = gym.logger.ERROR  # its warnings take several lines
    try:
        with np.errstate(all="ignore"):  # what is not finite is looked for where it matters
            program(*parse(argv))
            sys.stdout.flush()
            return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Nobody reads on (| head). Python flushes at exit: that must find a place, too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (UsageError, FloatingPointError, OSError, MemoryError) as error:
        print("ppo.py:", textwrap.shorten(str(error), 400), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
