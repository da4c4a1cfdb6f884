# /// script
# requires-python = ">=3.10"
# dependencies = ["stable-baselines3", "torch", "gymnasium>=1.0", "numpy>=1.26"]
# ///
"""How fast is ppo.py, and where does its time go? Prints Markdown tables of medians.

Every measurement has a process of its own with OMP_NUM_THREADS=1, which JAX alone does not heed.
Those that are compared take turns, A B A B; ratios are made pair by pair and quoted as their median
(smallest-largest).

CleanRL's and PureJaxRL's published scripts are measured too where their checkouts are given, each
in a virtual environment that is made for it in the folder for temporary files. Nothing in the
checkouts is changed; train_purejaxrl says what is put in place of modules that it lacks here.
"""

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.
import argparse
import ast
import contextlib
import io
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from importlib.metadata import distributions
from math import inf
from pathlib import Path
from statistics import median

CACHE = Path(tempfile.gettempdir(), "ppo-benchmark")
ENV = "CartPole-v1"
# The defaults of both published scripts, too, where 128 is a quarter of 4 x 128.
SAME = {"num_envs": 4, "num_steps": 128, "minibatch_size": 128, "epochs": 4, "lr": 2.5e-4}
SAME |= {"gamma": 0.99, "lam": 0.95, "clip": 0.2, "ent_coef": 0.01, "max_grad_norm": 0.5}
SAME |= {"hidden": (64, 64)}
# SB3 as RL Zoo runs it; there lr and clip fall to 0 linearly. The rest is the same.
ZOO = SAME | {"num_envs": 8, "num_steps": 32, "minibatch_size": 256, "epochs": 20, "lr": 1e-3}
ZOO |= {"gamma": 0.98, "lam": 0.8, "ent_coef": 0.0}
OWN = {"total_steps": 100_000}  # and all else as ppo.py chooses
LONG = 500_000
# A process's Python, and the folder of the ppo.py that it imports; all three scripts are called so.
OURS = (sys.executable, str(Path(__file__).resolve().parents[1]))
# CleanRL pins this Gymnasium: later ones reset in another way, and its script would learn from the
# resets; this one knows no numpy 2. PureJaxRL is of the time of this gymnax.
NEEDS = {"CleanRL": ["torch==2.13.0", "gymnasium==0.29.1", "numpy<2", "tyro", "tensorboard"]}
NEEDS |= {"PureJaxRL": ["jax", "flax", "optax", "distrax", "gymnax==0.0.8"]}
SHOWN = ("numpy", "gymnasium", "torch", "stable_baselines3", "jax", "flax", "optax", "gymnax")


def seconds(f, times=1, clock=time.perf_counter):
    start = clock()
    for _ in range(times):
        f()
    return (clock() - start) / times


# Workers: each runs in a process of its own -------------------------------------------------------


def load(modules, seed):
    stand_in_for_brax()
    versions = {d.metadata["Name"].replace("-", "_"): d.version for d in distributions()}
    versions = [f"{name} {versions[name]}" for name in SHOWN if name in versions]
    return {"versions": versions, "seconds": seconds(lambda: [__import__(m) for m in modules])}


def step_envs(num_envs, total_steps, seed):
    """Steps per second of the environment alone, with random actions drawn beforehand."""
    import gymnasium
    import numpy

    envs = gymnasium.make_vec(ENV, num_envs=num_envs)
    envs.reset(seed=seed)
    actions = numpy.random.default_rng(seed).integers(0, 2, (1000, num_envs))
    rounds = total_steps // actions.size
    return {"rate": actions.size / seconds(lambda: [envs.step(a) for a in actions], rounds)}


def train_ppo(settings, seed, solve=False):
    """Steps per second after a first iteration to warm up; with solve, it stops when solved."""
    import ppo

    agent = ppo.new_agent(ENV, seed=seed, **settings)
    envs = ppo.make_envs(ENV, agent.settings.num_envs)
    step, inside = envs.step, 0.0

    def timed_step(actions):
        nonlocal inside
        start = time.perf_counter()
        result = step(actions)
        inside += time.perf_counter() - start
        return result

    envs.step = timed_step
    iterations = ppo.learn(agent, envs)
    warm, start, inside = next(iterations)["steps"], time.perf_counter(), 0.0
    for record in iterations:
        solved = record["episodes"] >= 100 and bool(record["mean_return"] >= 475)
        if solve and solved:
            break
    took = time.perf_counter() - start
    return {"rate": (record["steps"] - warm) / took, "share": inside / took, "solved": solved}


def train_sb3(settings, seed, solve=False):
    """The same with Stable-Baselines3."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    names = {"num_steps": "n_steps", "minibatch_size": "batch_size", "epochs": "n_epochs"}
    s = {(names | {"lam": "gae_lambda"}).get(name, name): v for name, v in settings.items()}
    num_envs, total, hidden = s.pop("num_envs"), s.pop("total_steps"), s.pop("hidden")
    lr, clip = s.pop("lr"), s.pop("clip")
    s |= {"learning_rate": lambda left: left * lr, "policy_kwargs": {"net_arch": list(hidden)}}
    s |= {"clip_range": (lambda left: left * clip) if solve else clip}
    sb3 = PPO("MlpPolicy", make_vec_env(ENV, num_envs, seed), seed=seed, device="cpu", **s)
    if solve:  # as no episode returns more than 500, this takes 95 of them or more
        sb3.learn(total, lambda *_: bool(sum(e["r"] for e in sb3.ep_info_buffer) < 47_500))
        return {"solved": sb3.num_timesteps < total}
    sb3.learn(num_envs * s["n_steps"])  # warms up
    total -= sb3.num_timesteps
    return {"rate": total / seconds(lambda: sb3.learn(total))}


def train_cleanrl(seed):
    """CleanRL's script as it is, with its defaults; the last line it prints is its steps/s."""
    sys.argv = ["ppo.py", f"--total-timesteps={LONG}", f"--seed={seed}"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(f"{sys.path[0]}/ppo.py", run_name="__main__")
    return {"rate": int(out.getvalue().split()[-1])}


def stand_in_for_brax():
    """PureJaxRL's wrappers import Brax and Navix for other environments; CartPole needs neither."""
    nothing = types.SimpleNamespace(envs=None, EpisodeWrapper=None, AutoResetWrapper=None)
    training = "brax.envs.wrappers.training"
    for name in ("navix", "brax", "brax.envs", "brax.envs.wrappers", training):
        sys.modules[name] = nothing


def train_purejaxrl(seed):
    """PureJaxRL's script as it is, with its settings, but without printing every episode."""
    stand_in_for_brax()
    import jax

    jax.tree_map = jax.tree_util.tree_map  # JAX has dropped the name by which gymnax calls it
    import ppo

    config = {"LR": 2.5e-4, "NUM_ENVS": 4, "NUM_STEPS": 128, "TOTAL_TIMESTEPS": LONG}
    config |= {"UPDATE_EPOCHS": 4, "NUM_MINIBATCHES": 4, "GAMMA": 0.99, "GAE_LAMBDA": 0.95}
    config |= {"CLIP_EPS": 0.2, "ENT_COEF": 0.01, "VF_COEF": 0.5, "MAX_GRAD_NORM": 0.5}
    config |= {"ACTIVATION": "tanh", "ENV_NAME": ENV, "ANNEAL_LR": True, "DEBUG": False}
    key = jax.random.PRNGKey(seed)
    train = jax.jit(ppo.make_train(config)).lower(key).compile()  # else the first call does it
    return {"rate": LONG // 512 * 512 / seconds(lambda: jax.block_until_ready(train(key)))}


def gradient_step(batch, width, seed):
    """Microseconds of one step of actor and critic, and of its matrix products and tanh alone."""
    import ppo

    np = ppo.np
    agent = ppo.new_agent(ENV, seed=seed, **SAME | {"hidden": (width, width)})
    s, objective = agent.settings, partial(ppo.clip, epsilon=SAME["clip"])
    inputs = agent.rng.standard_normal((batch, 4), np.float32)
    numbers = agent.rng.standard_normal(batch, np.float32)  # which ones does not change the time
    data = inputs, agent.rng.integers(0, 2, batch), numbers, numbers
    lr = 0.0  # costs the same and leaves the networks as they are

    def step():
        _, actor = ppo.actor_loss(agent.actor, objective, s.ent_coef, *data)
        _, critic = ppo.critic_loss(agent.critic, inputs, numbers)
        for adam, grads in (agent.actor_adam, actor), (agent.critic_adam, critic):
            gradient = np.concatenate(grads, axis=None)
            adam.step(ppo.clip_by_global_norm(gradient, s.max_grad_norm), lr)

    def floor():
        for W1, _, W2, _, W3, _ in agent.actor, agent.critic:
            h1 = np.tanh(np.dot(inputs, W1))
            h2 = np.tanh(np.dot(h1, W2))
            d3 = np.dot(h2, W3)  # any array of this shape
            d2 = np.dot(d3, W3.T)  # @ is slow where W3 has one column
            np.dot(h2.T, d3), np.dot(h1.T, d2), np.dot(inputs.T, np.dot(d2, W2.T))

    pairs = [[1e6 * seconds(f, 20, time.process_time) for f in (step, floor)] for _ in range(15)]
    return dict(zip(("step", "floor"), map(median, zip(*pairs, strict=True)), strict=True))


# Tables -------------------------------------------------------------------------------------------


def take_turns(runs, sides):
    """Each worker's results, with peak MB and wall seconds; the seed is the number of the run."""
    results = {name: [] for name in sides}
    for seed in range(runs):
        for name, ((python, folder), worker, options) in sides.items():
            task = repr((folder, worker.__name__, options | {"seed": seed}))
            command = [python, "-Wignore", __file__, "--worker", task]
            start = time.perf_counter()
            out = subprocess.check_output(command, cwd=CACHE)  # CleanRL's writes its logs there
            results[name].append(json.loads(out) | {"wall": time.perf_counter() - start})
    return results


def mid(results, key, form=",.0f"):
    return format(median(r[key] for r in results), form) if key in results[0] else ""


def ratio(above, below, key, key_below=None):
    pairs = [(a[key], b[key_below or key]) for a, b in zip(above, below, strict=True)]
    ratios = [a / b for a, b in pairs if min(a, b) < inf] or [inf]  # none where both failed
    return f"{median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"


def table(title, header, rows):
    print(f"\n### {title}\n\n| {header} |\n|---|" + "---:|" * header.count("|"))
    print("\n".join(f"| {row} |" for row in rows), flush=True)


def table_1(runs, homes):
    settings, sb3 = {"settings": SAME | {"total_steps": LONG}}, "Stable-Baselines3"
    sides = {"ppo.py": (OURS, train_ppo, settings), sb3: (OURS, train_sb3, settings)}
    for name, home in homes.items():
        sides[f"{name}'s script"] = (home, globals()[f"train_{name.lower()}"], {})
    sides["environment alone"] = (OURS, step_envs, {"num_envs": 4, "total_steps": LONG})
    modules = {sb3: ["stable_baselines3"], "environment alone": ["numpy", "gymnasium"]}
    loads = {n: (s[0], load, {"modules": modules.get(n, ["ppo"])}) for n, s in sides.items()}
    tries = {"ppo.py": (OURS, train_ppo, {"settings": OWN, "solve": True})}
    tries[sb3] = (OURS, train_sb3, {"settings": ZOO | OWN, "solve": True})
    sides, loads, tries = take_turns(runs, sides), take_turns(runs, loads), take_turns(10, tries)
    rows = []
    for name, side in sides.items():
        row = f"{name} | {mid(side, 'wall', '.1f')} | {ratio(side, sides['ppo.py'], 'wall')}"
        row += f" | {mid(side, 'rate')} | "
        if name in tries:
            for result in tries[name]:
                result["wall"] += 0 if result["solved"] else inf
            row += f"{mid(tries[name], 'wall', '.1f')} | {sum(r['solved'] for r in tries[name])}"
            row += f" | {ratio(tries[name], tries['ppo.py'], 'wall')}"
        else:
            row += "| | "
        rows += [f"{row} | {mid(side, 'peak')} | {mid(loads[name], 'seconds', '.2f')}"]
    header = f" | {LONG:,} steps (s) | of ppo.py's | steps/s | solved (s) | of 10 | of ppo.py's"
    table(f"1. {ENV}, from a cold start", f"{header} | peak MB | import (s)", rows)
    print("\nAll on one thread, but for JAX, which takes as many as it chooses. PureJaxRL steps a")
    print("CartPole of its own in JAX. All steps/s are without imports and compilation.")


def table_2(runs, _):
    sides = {"4 x 128, as in table 1": SAME | OWN, "ppo.py's own settings": OWN}
    for n, t in [(n, 2048 // n) for n in (1, 4, 16, 64, 256)] + [(16, 512), (16, 2048), (16, 8192)]:
        settings = {"num_envs": n, "num_steps": t, "total_steps": max(2 * n * t, 40_960)}
        sides[f"{n} x {t}"] = settings | {"epochs": 4, "minibatch_size": 512}
    rows, sides = [], {n: (OURS, train_ppo, {"settings": s}) for n, s in sides.items()}
    for name, s in take_turns(runs, sides).items():
        rows += [f"{name} | {mid(s, 'rate')} | {mid(s, 'share', '.0%')} | {mid(s, 'peak')}"]
    header = "environments x steps | steps/s | time in the environment | peak MB"
    table("2. Growth with the rollout", header, rows)


def table_3(runs, _):
    sizes = [(128, w) for w in (32, 64, 128, 256, 512)] + [(b, 64) for b in (32, 512, 2048, 4096)]
    sides = {f"{b} | {w}": (OURS, gradient_step, {"batch": b, "width": w}) for b, w in sizes}
    rows = []
    for name, s in take_turns(runs, sides).items():
        rows += [f"{name} | {mid(s, 'step')} | {mid(s, 'floor')} | {ratio(s, s, 'step', 'floor')}"]
    header = "minibatch | hidden | step (µs) | its products and tanh (µs) | ratio"
    table("3. One gradient step of actor and critic", header, rows)


def make_home(name, checkout):
    """The Python of a virtual environment with what the script needs, and the script's folder."""
    subprocess.check_call([sys.executable, "-m", "venv", CACHE / name])
    python = str(CACHE / name / "bin" / "python")
    subprocess.check_call([python, "-m", "pip", "install", "-qq", *NEEDS[name]])
    return python, str(Path(checkout, name.lower()).resolve())


def main():
    if sys.argv[1:2] == ["--worker"]:
        folder, name, options = ast.literal_eval(sys.argv[2])
        sys.path.insert(0, folder)
        result = globals()[name](**options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else KB
        peak /= 2**20 if sys.platform == "darwin" else 2**10
        return print(json.dumps(result | {"peak": peak}))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="of each measurement (%(default)s)")
    parser.add_argument("--only", default="1,2,3", help="tables to print (%(default)s)")
    parser.add_argument("--cleanrl", metavar="PATH", help="checkout of vwxyzjn/cleanrl")
    parser.add_argument("--purejaxrl", metavar="PATH", help="checkout of luchris429/purejaxrl")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    CACHE.mkdir(exist_ok=True)
    homes = {name: getattr(args, name.lower()) for name in NEEDS}
    homes = {name: make_home(name, checkout) for name, checkout in homes.items() if checkout}
    info = Path("/proc/cpuinfo")
    cpu = info.read_text().partition("model name\t: ")[2].split("\n")[0] if info.exists() else ""
    print(f"{cpu or platform.machine()}, {os.cpu_count()} cores, python", platform.python_version())
    # Compiles every module and brings it into the disk's cache, which no measurement shall pay for.
    modules = {"ppo.py": ["ppo", "stable_baselines3"]}
    sides = {"ppo.py": OURS} | homes
    sides = {n: (home, load, {"modules": modules.get(n, ["ppo"])}) for n, home in sides.items()}
    for name, (result,) in take_turns(1, sides).items():
        print(f"- {name}:", ", ".join(result["versions"]), flush=True)
    for number in args.only.split(","):
        globals()[f"table_{number}"](args.runs, homes)


if __name__ == "__main__":
    main()
