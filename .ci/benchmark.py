# /// script
# requires-python = ">=3.10"
# dependencies = ["stable-baselines3", "torch", "gymnasium>=1.0", "numpy>=1.26"]
# ///
"""How fast is ppo.py, and where does its time go? Prints Markdown tables of medians.

Every measurement has a process of its own and one thread; those that are compared take turns,
A B A B. Ratios are made pair by pair and quoted as their median (smallest-largest).
"""

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.
import argparse
import ast
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from math import inf
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
ENV = "CartPole-v1"
SAME = {"num_envs": 4, "num_steps": 128, "minibatch_size": 128, "epochs": 4, "lr": 2.5e-4}
SAME |= {"gamma": 0.99, "lam": 0.95, "clip": 0.2, "ent_coef": 0.01, "max_grad_norm": 0.5}
SAME |= {"hidden": (64, 64)}
# SB3 as RL Zoo runs it; there lr and clip fall to 0 linearly. The rest is the same.
ZOO = SAME | {"num_envs": 8, "num_steps": 32, "minibatch_size": 256, "epochs": 20, "lr": 1e-3}
ZOO |= {"gamma": 0.98, "lam": 0.8, "ent_coef": 0.0}
OWN = {"total_steps": 100_000}  # and all else as ppo.py chooses


def seconds(f, times=1, clock=time.perf_counter):
    start = clock()
    for _ in range(times):
        f()
    return (clock() - start) / times


def load(modules, seed):
    return {"seconds": seconds(lambda: [__import__(name) for name in modules])}


def step_envs(settings, seed, mode=None):
    """Steps per second of the environment alone, with random actions drawn beforehand."""
    import ppo

    n = ppo.choose_settings(**{"env": ENV} | settings).num_envs
    envs = ppo.gym.make_vec(ENV, num_envs=n, vectorization_mode=mode)
    envs.reset(seed=seed)
    actions = ppo.np.random.default_rng(seed).integers(0, 2, (100_000 // n, n))
    return {"rate": actions.size / seconds(lambda: [envs.step(a) for a in actions])}


def train_ppo(settings, seed, mode=None, solve=False):
    """Steps per second after a first iteration to warm up; with solve, it stops when solved."""
    import ppo

    settings = ppo.choose_settings(**{"env": ENV, "seed": seed} | settings)
    envs = ppo.make_envs(ENV, settings.num_envs, vectorization_mode=mode)
    iterations = ppo.learn(ppo.Agent(envs, settings), envs)
    warm, start = next(iterations)["steps"], time.perf_counter()
    for record in iterations:
        solved = record["episodes"] >= 100 and bool(record["mean_return"] >= 475)
        if solve and solved:
            break
    return {"rate": (record["steps"] - warm) / (time.perf_counter() - start), "solved": solved}


def train_sb3(settings, seed, total_steps, solve=False):
    """The same with Stable-Baselines3."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    names = {"num_steps": "n_steps", "minibatch_size": "batch_size", "epochs": "n_epochs"}
    s = {(names | {"lam": "gae_lambda"}).get(name, name): v for name, v in settings.items()}
    num_envs, hidden, lr, clip = (s.pop(name) for name in ("num_envs", "hidden", "lr", "clip"))
    s |= {"learning_rate": lambda left: left * lr, "policy_kwargs": {"net_arch": list(hidden)}}
    s |= {"clip_range": (lambda left: left * clip) if solve else clip}
    sb3 = PPO("MlpPolicy", make_vec_env(ENV, num_envs, seed), seed=seed, device="cpu", **s)
    if solve:  # as no episode returns more than 500, this takes 95 of them or more
        sb3.learn(total_steps, lambda *_: bool(sum(e["r"] for e in sb3.ep_info_buffer) < 47_500))
        return {"solved": sb3.num_timesteps < total_steps}
    sb3.learn(num_envs * s["n_steps"])  # warms up
    return {"rate": total_steps / seconds(lambda: sb3.learn(total_steps))}


def gradient_step(batch, width, seed):
    """Microseconds of one step of actor and critic, and of its matrix products and tanh alone."""
    import ppo

    np = ppo.np
    s = ppo.choose_settings(**SAME | {"env": ENV, "seed": seed, "hidden": (width, width)})
    agent = ppo.Agent(ppo.make_envs(ENV, 1), s)
    obs = agent.rng.standard_normal((batch, 4), np.float32)
    numbers = agent.rng.standard_normal(batch, np.float32)  # which ones does not change the time
    rest = [obs, agent.rng.integers(0, 2, batch), numbers, numbers, []]
    rest += [ppo.OBJECTIVES["clip"], s.clip, 0.0, s.ent_coef]
    lr = 0.0  # costs the same and leaves the networks as they are

    def step():
        _, actor = ppo.actor_loss(agent.head, agent.actor, *rest)
        _, critic = ppo.critic_loss(agent.critic, obs, numbers)
        for adam, grads in (agent.actor_adam, actor), (agent.critic_adam, critic):
            adam.step(ppo.clip_by_global_norm(ppo.flatten(grads), s.max_grad_norm), lr)

    def floor():
        for W1, _, W2, _, W3, _ in agent.actor, agent.critic:
            h1 = np.tanh(np.dot(obs, W1))
            h2 = np.tanh(np.dot(h1, W2))
            d3 = np.dot(h2, W3)  # any array of this shape
            d2 = np.dot(d3, W3.T)  # @ is slow where W3 has one column
            np.dot(h2.T, d3), np.dot(h1.T, d2), np.dot(obs.T, np.dot(d2, W2.T))

    pairs = [[1e6 * seconds(f, 20, time.process_time) for f in (step, floor)] for _ in range(15)]
    return dict(zip(("step", "floor"), map(median, zip(*pairs, strict=True)), strict=True))


def take_turns(runs, sides):
    """Each worker's results, with peak MB and wall seconds; the seed is the number of the run."""
    results = {name: [] for name in sides}
    for seed in range(runs):
        for name, (worker, options) in sides.items():
            task = repr((worker.__name__, options | {"seed": seed}))
            start = time.perf_counter()
            out = subprocess.check_output([sys.executable, __file__, "--worker", task])
            results[name].append(json.loads(out) | {"wall": time.perf_counter() - start})
    return results


def mid(results, key, form=",.0f"):
    return format(median(result[key] for result in results), form)


def ratio(above, below, key, key_below=None, form=".1f"):
    pairs = [(a[key], b[key_below or key]) for a, b in zip(above, below, strict=True)]
    ratios = [a / b for a, b in pairs if min(a, b) < inf] or [inf]  # none where both failed
    return "{} ({}-{})".format(*(format(f(ratios), form) for f in (median, min, max)))


def table(title, header, rows):
    print(f"\n### {title}\n\n| {header} |\n|---|" + "---:|" * header.count("|"))
    print("\n".join(f"| {row} |" for row in rows), flush=True)


@functools.cache
def same_settings(runs):
    """What tables 1, 2 and 5 compare."""
    ours, alone = {"settings": SAME | {"total_steps": 100_000}}, {"settings": SAME}
    sb3 = (train_sb3, {"settings": SAME, "total_steps": 60 * 512})
    sides = {"ppo.py": (train_ppo, ours), "SB3": sb3, "environment alone": (step_envs, alone)}
    sides["ppo.py, `sync`"] = (train_ppo, ours | {"mode": "sync"})
    sides["environment alone, `sync`"] = (step_envs, alone | {"mode": "sync"})
    return take_turns(runs, sides)


def table_1(runs):
    sides = same_settings(runs)
    rows = [f"{n} | {mid(s, 'rate')} | {ratio(s, sides['SB3'], 'rate')}" for n, s in sides.items()]
    table(f"1. Training {ENV} with the same settings", " | steps/s | of SB3's", rows)


def table_2(runs):
    same = same_settings(runs)
    own = {"train": (train_ppo, {"settings": OWN}), "alone": (step_envs, {"settings": OWN})}
    pairs = {"settings of table 1": (same["ppo.py"], same["environment alone"])}
    pairs["ppo.py's own settings"] = take_turns(runs, own).values()
    rows = [f"{name} | {ratio(*pair, 'rate', form='.0%')}" for name, pair in pairs.items()]
    table("2. What the environment alone would take", " | of training's time", rows)


def table_3(runs, title="3. One gradient step of actor and critic", sizes=((128, 64),)):
    sides, rows = {f"{b} | {w}": (gradient_step, {"batch": b, "width": w}) for b, w in sizes}, []
    for name, s in take_turns(runs, sides).items():
        rows += [f"{name} | {mid(s, 'step')} | {mid(s, 'floor')} | {ratio(s, s, 'step', 'floor')}"]
    table(title, "minibatch | hidden | step (µs) | its products and tanh (µs) | ratio", rows)


def table_4(_):
    sides = {"ppo.py": (train_ppo, {"settings": OWN, "solve": True})}
    sides["SB3, RL Zoo's settings"] = (train_sb3, {"settings": ZOO, "solve": True} | OWN)
    sides, rows = take_turns(10, sides), []
    for name, side in sides.items():
        for result in side:
            result["wall"] += 0 if result["solved"] else inf
        numbers = f"{mid(side, 'wall', '.1f')} | {sum(result['solved'] for result in side)} of 10"
        rows += [f"{name} | {numbers} | {ratio(side, sides['ppo.py'], 'wall')}"]
    title = f"4. Wall seconds from process start until {ENV} is solved, seeds 0-9"
    table(title, " | median | solved | of ppo.py's time", rows)


def table_5(runs):
    names = ("numpy gymnasium", "ppo", "stable_baselines3")
    sides = take_turns(runs, {f"import {n}": (load, {"modules": n.split()}) for n in names})
    rows = [f"{n} | {mid(s, 'seconds', '.2f')} | {mid(s, 'peak')}" for n, s in sides.items()]
    rows += [f"{n}, table 1 | | {mid(same_settings(runs)[n], 'peak')}" for n in ("ppo.py", "SB3")]
    table("5. Import time and peak memory", " | seconds | peak MB", rows)


def table_6(runs):
    sides, sizes = {}, [(n, 2048 // n) for n in (1, 4, 16, 64, 256)]
    for n, t in [*sizes, (16, 512), (16, 2048), (16, 8192)]:
        settings = {"num_envs": n, "num_steps": t, "total_steps": max(2 * n * t, 40_960)}
        settings |= {"epochs": 4, "minibatch_size": 512}
        sides[f"{n} | {t} | {n * t:,}"] = (train_ppo, {"settings": settings})
    sides = take_turns(runs, sides)
    rows = [f"{name} | {mid(s, 'rate')} | {mid(s, 'peak')}" for name, s in sides.items()]
    table("6a. Growth: rollout", "environments | steps | together | steps/s | peak MB", rows)
    table_3(runs, "6b. Growth: hidden layers", [(128, w) for w in (32, 64, 128, 256, 512)])
    table_3(runs, "6c. Growth: minibatch", [(b, 64) for b in (32, 128, 512, 2048, 4096)])


def table_7(runs):
    sides = {"ppo.py": (train_ppo, {"settings": SAME | {"total_steps": 500_000}})}
    rows = [f"{name} | {mid(s, 'wall', '.1f')}" for name, s in take_turns(runs, sides).items()]
    table("7. From process start to 500,000 steps, settings of table 1", " | wall seconds", rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of all but table 4 (%(default)s)")
    parser.add_argument("--only", default="1,2,3,4,5,6,7", help="tables to print (%(default)s)")
    if sys.argv[1:2] == ["--worker"]:
        name, options = ast.literal_eval(sys.argv[2])
        result = globals()[name](**options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KB
        peak /= 2**20 if sys.platform == "darwin" else 2**10
        return print(json.dumps(result | {"peak": peak}))
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    # Compiles every module and brings it into the disk's cache, which no measurement shall pay for.
    take_turns(1, {"all": (load, {"modules": ["ppo", "stable_baselines3"]})})
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().partition("model name\t: ")[2].split("\n")[0] if info.exists() else ""
    packages = [f"{p} {version(p)}" for p in ("numpy", "gymnasium", "torch", "stable-baselines3")]
    cores, python = f"{os.cpu_count()} cores", f"python {platform.python_version()}"
    print(cpu or platform.machine(), cores, python, *packages, sep=", ")
    for number in args.only.split(","):
        globals()[f"table_{number}"](args.runs)


if __name__ == "__main__":
    main()
