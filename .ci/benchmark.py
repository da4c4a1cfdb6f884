# /// script
# requires-python = ">=3.10"
# dependencies = ["stable-baselines3", "torch", "gymnasium[box2d]>=1.0", "numpy>=1.26"]
# ///
"""How fast is ppo.py? Prints two Markdown tables.

    python .ci/benchmark.py --cleanrl PATH --purejaxrl PATH

1. CartPole-v1, 500,000 steps from a cold start, the same settings on all sides.
2. Seconds until a task is solved, with the settings that each side recommends.

Each measurement is a process of its own with OMP_NUM_THREADS=1, which only JAX does not heed. The
sides take turns, and a ratio compares two of the same turn. Leave the machine alone meanwhile.

CleanRL's and PureJaxRL's published scripts are measured if their checkouts are given. Each gets a
virtual environment in the folder for temporary files. Nothing in the checkouts is changed.
"""

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.
import argparse
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
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

START = perf_counter()  # of this process; --cap counts from here
ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(tempfile.gettempdir(), "ppo-benchmark")

# fmt: off
# Table 1: the defaults of CleanRL's and PureJaxRL's scripts, as each side calls them.
SAME = dict(
    num_envs=4, num_steps=128, minibatch_size=128, epochs=4, lr=2.5e-4, gamma=0.99, lam=0.95,
    clip=0.2, ent_coef=0.01, max_grad_norm=0.5, hidden=[64, 64],
)
SAME_SB3 = dict(  # its networks and max_grad_norm are the same by default
    n_envs=4, n_steps=128, batch_size=128, n_epochs=4, gamma=0.99, gae_lambda=0.95,
    learning_rate=lambda remaining: remaining * 2.5e-4, clip_range=0.2, ent_coef=0.01,
)
SAME_PUREJAXRL = dict(
    NUM_ENVS=4, NUM_STEPS=128, NUM_MINIBATCHES=4, UPDATE_EPOCHS=4, LR=2.5e-4, ANNEAL_LR=True,
    GAMMA=0.99, GAE_LAMBDA=0.95, CLIP_EPS=0.2, ENT_COEF=0.01, VF_COEF=0.5, MAX_GRAD_NORM=0.5,
    ACTIVATION="tanh", ENV_NAME="CartPole-v1", DEBUG=False,
)
# Table 2: a task is solved when the last 100 training episodes return this on average.
TARGETS = {"CartPole-v1": 475, "Acrobot-v1": -85, "LunarLander-v3": 200}
# RL Zoo's settings: hyperparams/ppo.yml of rl-baselines3-zoo, where LunarLander is still -v2. What
# it does not mention is left to Stable-Baselines3.
ZOO_STEPS = {"CartPole-v1": 100_000, "Acrobot-v1": 1_000_000, "LunarLander-v3": 1_000_000}
ZOO = {
    "CartPole-v1": dict(
        n_envs=8, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20, ent_coef=0.0,
        learning_rate=lambda remaining: remaining * 0.001,
        clip_range=lambda remaining: remaining * 0.2,
    ),
    "Acrobot-v1": dict(
        normalize=True, n_envs=16, n_steps=256, gae_lambda=0.94, gamma=0.99, n_epochs=4,
        ent_coef=0.0,
    ),
    "LunarLander-v3": dict(
        n_envs=16, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999, n_epochs=4,
        ent_coef=0.01,
    ),
}
# fmt: on

# CleanRL pins this Gymnasium, which does not know numpy 2. Later ones reset in another way, and the
# script would learn from the resets. PureJaxRL is as old as this gymnax.
NEEDS = {
    "cleanrl": ["torch==2.13.0", "gymnasium==0.29.1", "numpy<2", "tyro", "tensorboard"],
    "purejaxrl": ["jax", "flax", "optax", "distrax", "gymnax==0.0.8"],
}
PACKAGES = ["numpy", "gymnasium", "torch", "stable_baselines3", "jax", "flax", "optax", "gymnax"]


# Workers ------------------------------
# Each runs in a process of its own. "rate" is in steps/s, without imports and compilation.


def step_envs(seed, total_steps):
    """Step the environment alone, with random actions drawn beforehand."""
    import gymnasium
    import numpy

    num_envs = SAME["num_envs"]
    envs = gymnasium.make_vec("CartPole-v1", num_envs=num_envs)
    envs.reset(seed=seed)
    actions = numpy.random.default_rng(seed).integers(0, 2, (1000, num_envs))
    start = perf_counter()
    for step in range(total_steps // num_envs):
        envs.step(actions[step % 1000])
    return {"rate": total_steps / (perf_counter() - start)}


def train_ppo(seed, total_steps):
    import ppo

    start = perf_counter()
    ppo.train("CartPole-v1", seed=seed, total_steps=total_steps, **SAME)
    return {"rate": total_steps / (perf_counter() - start)}


def solve_ppo(seed, env, target, **chosen):
    """Train with ppo.py and its own settings until the task is solved."""
    import ppo

    agent = ppo.new_agent(env, seed=seed, **chosen)
    envs = ppo.make_envs(env, agent.settings.num_envs)
    for record in ppo.learn(agent, envs):
        mean_return = record["mean_return"]
        solved = record["episodes"] >= 100 and mean_return >= target
        if solved:
            break
    return {"solved": solved, "steps": record["steps"], "mean_return": mean_return}


def make_sb3(seed, env, n_envs, normalize=False, **settings):
    """Return an agent of Stable-Baselines3, made as RL Zoo makes it."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    envs = make_vec_env(env, n_envs, seed)
    if normalize:
        envs = VecNormalize(envs, gamma=settings["gamma"])
    return PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)


def train_sb3(seed, total_steps):
    agent = make_sb3(seed, "CartPole-v1", **SAME_SB3)
    start = perf_counter()
    agent.learn(total_steps)
    return {"rate": agent.num_timesteps / (perf_counter() - start)}


def solve_sb3(seed, env, target, total_steps, cap):
    """Train with Stable-Baselines3 until the task is solved, for cap seconds at most."""
    agent = make_sb3(seed, env, **ZOO[env])

    def mean_return():
        returns = [episode["r"] for episode in agent.ep_info_buffer]
        return sum(returns) / 100 if len(returns) == 100 else -inf

    def keep_going(*_):
        return mean_return() < target and perf_counter() - START < cap

    agent.learn(total_steps, keep_going)  # it asks after every step
    mean = mean_return()
    return {"solved": mean >= target, "steps": agent.num_timesteps, "mean_return": mean}


def train_cleanrl(seed, total_steps):
    """Run CleanRL's script as it is, with its defaults. The last word it prints is its steps/s."""
    script = str(Path(sys.path[0], "ppo.py"))
    sys.argv = [script, f"--total-timesteps={total_steps}", f"--seed={seed}"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(script, run_name="__main__")
    return {"rate": float(output.getvalue().split()[-1])}


def train_purejaxrl(seed, total_steps):
    """Run PureJaxRL's script as it is, with its settings, but do not print every episode."""
    # Its wrappers import Brax and Navix for other environments.
    nothing = types.SimpleNamespace(envs=None, EpisodeWrapper=None, AutoResetWrapper=None)
    training = "brax.envs.wrappers.training"
    for name in ["navix", "brax", "brax.envs", "brax.envs.wrappers", training]:
        sys.modules[name] = nothing
    import jax

    jax.tree_map = jax.tree_util.tree_map  # JAX has dropped the name by which gymnax calls it
    import ppo

    config = {**SAME_PUREJAXRL, "TOTAL_TIMESTEPS": total_steps}
    key = jax.random.PRNGKey(seed)
    train = jax.jit(ppo.make_train(config)).lower(key).compile()
    start = perf_counter()
    jax.block_until_ready(train(key))
    return {"rate": total_steps // 512 * 512 / (perf_counter() - start)}


WORKERS = [step_envs, train_ppo, solve_ppo, train_sb3, solve_sb3, train_cleanrl, train_purejaxrl]


def work(task):
    """Run a worker in this process, as measure asks, and print its result."""
    folder, name, options = json.loads(task)
    sys.path.insert(0, folder)
    workers = {worker.__name__: worker for worker in WORKERS}
    result = workers[name](**options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result["peak_mb"] = peak / (2**20 if sys.platform == "darwin" else 2**10)  # else it is in KB
    imported = [package for package in PACKAGES if package in sys.modules]
    result["versions"] = [f"{package} {version(package)}" for package in imported]
    print(json.dumps(result))


# Measuring ------------------------------


@dataclass
class Side:
    """A worker with its options, its Python, and the folder of its ppo.py."""

    worker: Callable
    options: dict
    python: str = sys.executable
    folder: str = str(ROOT)


def measure(side, **options):
    """Run the side's worker in a new process. Return its result, and the seconds it took in all."""
    task = json.dumps([side.folder, side.worker.__name__, {**side.options, **options}])
    command = [side.python, "-Wignore", str(Path(__file__).resolve()), "--worker", task]
    start = perf_counter()
    output = subprocess.check_output(command, cwd=CACHE)  # CleanRL's script writes its logs there
    seconds = perf_counter() - start
    return {"seconds": seconds, **json.loads(output)}


def take_turns(sides, args):
    """Return each side's results."""
    # The first run of a side compiles modules and fills the disk's cache. It does not count.
    for side in sides.values():
        measure(side, seed=0, total_steps=2048)
    results = {name: [] for name in sides}
    for seed in range(args.seed, args.seed + args.runs):
        for name, side in sides.items():
            result = measure(side, seed=seed)
            results[name].append(result)
            if args.keep:
                record = {"side": name, "seed": seed, **side.options, **result}
                with open(args.keep, "a") as file:
                    print(json.dumps(record), file=file)
    return results


def make_peer(worker, checkout, options):
    """Return a published script's side, with a virtual environment that has what it needs."""
    name = worker.__name__.removeprefix("train_")
    python = str(CACHE / name / "bin" / "python")
    subprocess.check_call([sys.executable, "-m", "venv", str(CACHE / name)])
    subprocess.check_call([python, "-m", "pip", "install", "-qq", *NEEDS[name]])
    return Side(worker, options, python, str(Path(checkout, name).resolve()))


def processor():
    """Return the processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = text.partition("model name\t: ")[2].partition("\n")[0]
    return name or platform.machine()


# Tables ------------------------------


def print_table(title, header, rows):
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("|---|" + "---:|" * (len(header) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def column(results, key):
    return [result[key] for result in results]


def seconds_to_solve(result):
    seconds = result["seconds"]
    return f"{seconds:.1f}" if result["solved"] else f"not in {seconds:.0f} s"


def cold_start(sides, args):
    """Table 1."""
    results = take_turns(sides, args)
    seconds_ppo = column(results["ppo.py"], "seconds")
    rows = []
    for name, runs in results.items():
        seconds = column(runs, "seconds")
        ratios = [a / b for a, b in zip(seconds, seconds_ppo, strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        rate = median(column(runs, "rate"))
        peak = median(column(runs, "peak_mb"))
        rows.append([name, f"{median(seconds):.1f}", ratio, f"{rate:,.0f}", f"{peak:.0f}"])
    header = ["", "seconds", "ratio to ppo.py's", "steps/s", "peak MB"]
    print_table(f"1. CartPole-v1, {args.steps:,} steps from a cold start", header, rows)
    print("\nSeconds include imports and compilation, steps/s do not. All but JAX use one thread.")
    print("ppo.py and the environment alone use Gymnasium's vectorised CartPole, PureJaxRL its own")
    print("in JAX; the others step one environment after the other. Versions:\n")
    for name, runs in results.items():
        print(f"- {name}: {', '.join(runs[0]['versions'])}", flush=True)


def until_solved(args):
    """Table 2."""
    rows = []
    for env, target in TARGETS.items():
        task = {"env": env, "target": target}
        ours = Side(solve_ppo, task)
        theirs = Side(solve_sb3, {**task, "total_steps": ZOO_STEPS[env], "cap": args.cap})
        row = [f"{env} ({target})"]
        for runs in take_turns({"ppo.py": ours, "Stable-Baselines3": theirs}, args).values():
            best_first = sorted(runs, key=lambda run: (not run["solved"], run["seconds"]))
            row.append(seconds_to_solve(best_first[len(runs) // 2]))
            row.append(", ".join(seconds_to_solve(run) for run in runs))
        rows.append(row)
    header = ["", "ppo.py", "each seed", "Stable-Baselines3", "each seed"]
    print_table("2. Seconds until solved, with own settings", header, rows)
    print("\nMedians, imports included. A task is solved when the mean return of the last 100")
    print("training episodes reaches the number in parentheses. Stable-Baselines3 has RL Zoo's")
    print(f"settings, and stops at the end of their steps or after {args.cap} s.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="of each side (%(default)s)")
    parser.add_argument("--seed", type=int, default=300, help="of the first run (%(default)s)")
    parser.add_argument("--steps", type=int, default=500_000, help="of table 1 (%(default)s)")
    parser.add_argument("--cap", type=int, default=300, help="seconds, of table 2 (%(default)s)")
    parser.add_argument("--table", type=int, choices=[1, 2], help="print only this one")
    parser.add_argument("--cleanrl", metavar="PATH", help="checkout of vwxyzjn/cleanrl")
    parser.add_argument("--purejaxrl", metavar="PATH", help="checkout of luchris429/purejaxrl")
    parser.add_argument("--keep", metavar="FILE", help="append each measurement to it, in JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    CACHE.mkdir(exist_ok=True)

    steps = {"total_steps": args.steps}
    sides = {"ppo.py": Side(train_ppo, steps), "Stable-Baselines3": Side(train_sb3, steps)}
    if args.cleanrl:
        sides["CleanRL's script"] = make_peer(train_cleanrl, args.cleanrl, steps)
    if args.purejaxrl:
        sides["PureJaxRL's script"] = make_peer(train_purejaxrl, args.purejaxrl, steps)
    sides["the environment alone"] = Side(step_envs, steps)

    print(f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}", flush=True)
    if args.table != 2:
        cold_start(sides, args)
    if args.table != 1:
        until_solved(args)


if __name__ == "__main__":
    main()
