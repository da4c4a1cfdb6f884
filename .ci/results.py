"""The learning results in README.md: runs ppo.py over several seeds and prints Markdown.

    python .ci/results.py tasks [ENV ...]    every task, beside the optimum of the tabular ones
    python .ci/results.py rows [ENV ...]     what a task's own settings gain over those of its kind
    python .ci/results.py ladder             the lectures' ladder of objectives, and "Try it"

Each run is a process of its own, as a user would start it, --jobs N of them at a time. Seconds
count from the start of the process: leave the machine alone while they are measured.

--keep FILE appends each run to a file as it ends, and does not repeat the runs it finds there. It
finds them by their settings: start a new file when ppo.py learns or evaluates differently.
"""

import argparse
import csv
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import numpy as np

PPO = Path(__file__).resolve().parent.parent / "ppo.py"
sys.path.insert(0, str(PPO.parent))
import ppo

# fmt: off
TASKS = [  # with steps, and the number of seeds: 20 where a run takes half a minute or less
    ("CartPole-v1", 100_000, 20), ("Acrobot-v1", 200_000, 20), ("MountainCar-v0", 500_000, 20),
    ("MountainCarContinuous-v0", 100_000, 20), ("Pendulum-v1", 100_000, 20),
    ("LunarLander-v3", 500_000, 5), ("LunarLander-v3", 1_000_000, 5),
    ("LunarLanderContinuous-v3", 500_000, 5), ("BipedalWalker-v3", 1_000_000, 5),
    ("FrozenLake-v1", 200_000, 20), ("FrozenLake8x8-v1", 300_000, 20), ("Taxi-v4", 500_000, 20),
    ("CliffWalking-v1", 100_000, 20), ("CliffWalkingSlippery-v1", 200_000, 20),
    ("HalfCheetah-v5", 1_000_000, 5), ("Hopper-v5", 1_000_000, 5), ("Walker2d-v5", 1_000_000, 5),
    ("Swimmer-v5", 1_000_000, 5), ("Ant-v5", 1_000_000, 5), ("Reacher-v5", 1_000_000, 5),
    ("InvertedDoublePendulum-v5", 1_000_000, 5), ("Humanoid-v5", 1_000_000, 5),
]
TABULAR = ("FrozenLake", "FrozenLake8x8", "Taxi", "CliffWalking", "CliffWalkingSlippery")
LADDER = [
    dict(objective="pg"),
    dict(objective="pg", epochs=1, minibatch_size=2048),  # one step for each rollout
    dict(objective="is"), dict(objective="trpo"), dict(objective="kl"), dict(objective="clip"),
]
# fmt: on
# What a row of the ladder sets wins: one step for each rollout stays one step, with this lr. For
# trpo these settings only change how the critic is fitted.
HARD = dict(epochs=40, lr=0.003)
TRY = [  # settings, and what the lectures say will happen
    (dict(), "learns on every seed"),
    (dict(lam=0), "Eq. 9: only δ_t counts; little variance, but biased by V's errors"),
    (dict(lam=1), "Eq. 9: Â is R_t - V(s_t); no bias, but much variance"),
    (dict(gamma=0.9), "Eq. 5: it looks about 10 steps ahead; less variance, short-sighted"),
    (dict(clip=0.02), "Eq. 16: the policy stays very close to π_θ_k; safe, but slow"),
    (dict(clip=2), "Eq. 16: ρ may reach 3; hardly a limit, so as unstable as Eq. 12"),
    (dict(epochs=1), "Eq. 10: data used once; safe, but wasteful"),
    (dict(epochs=40), "Eq. 10: data used 40 times; only the clip keeps π_θ near π_θ_k"),
    (dict(ent_coef=0.1), "Eq. 17: it explores more"),
    (dict(num_envs=1), "Eq. 4: 128 steps for each estimate, not 2,048; much variance"),
    (dict(lr=0.02), "Eq. 13: a small change of θ may change behaviour a lot"),
]


def tasks(args):
    header("task", "steps", "seeds", "mean", "worst seed", "optimum", "every seed", "seconds a run")
    chosen = [t for t in TASKS if not args.envs or t[0] in args.envs]
    experiments = [(task(env, steps), range(n)) for env, steps, n in chosen]
    for (env, steps, _), results in zip(chosen, play(args, experiments), strict=True):
        seeds = column(column(results, "settings"), "seed")
        means, seconds = column(results, "mean"), median(results, "seconds", ".1f")
        best = number(optimum(env)) if name(env) in TABULAR else "-"
        each = ", ".join(map(number, means))
        row(env, f"{steps:,}", f"{seeds[0]}-{seeds[-1]}", *mean_worst(means), best, each, seconds)


def rows(args):
    header("task", "its own settings", "mean", "worst seed", "kind alone", "worst seed", "gain")
    for env, steps, _ in TASKS:
        own = {k: v for k, v in ppo.TASKS.get(name(env), {}).items() if k != "total_steps"}
        if own and (not args.envs or env in args.envs):
            kind = ppo.KINDS[ppo.kind_of(ppo.make_envs(env, 1))]
            alone = {k: kind.get(k, getattr(ppo.Settings, k)) for k in own}
            experiments = [(task(env, steps) | choice, range(10)) for choice in (own, alone)]
            with_row, without = (column(results, "mean") for results in play(args, experiments))
            gain = number(np.mean(with_row) - np.mean(without))
            row(env, f"`{flags(own)}`", *mean_worst(with_row), *mean_worst(without), gain)


def ladder(args):
    columns = "mean", "worst seed", "solved", "median steps to solve"
    for base in {}, HARD:
        print(f"\nWith `{flags(base)}`:" if base else "\nWith default settings:")
        header("objective", *columns, "median seconds to solve", "largest KL")
        experiments = [(base | rung, range(10)) for rung in LADDER]
        for rung, results in zip(LADDER, play(args, experiments), strict=True):
            seconds = median(results, "solved_seconds", ".1f")
            largest_kl = f"{max(column(results, 'largest_kl')):.3g}"
            row(f"`{flags(rung)}`", *learned(results), seconds, largest_kl)
    print("\nTry it:")
    header("command", "what the lectures say", *columns)
    experiments = [(chosen, range(10)) for chosen, _ in TRY]
    for (chosen, says), results in zip(TRY, play(args, experiments), strict=True):
        row(f"`{f'python ppo.py {flags(chosen)}'.strip()}`", says, *learned(results))


def play(args, experiments):
    """For each (chosen settings, seeds), in order: a list with the result of each seed."""
    kept = args.keep.read_text().splitlines() if args.keep and args.keep.exists() else []
    done = {json.dumps(result["settings"]): result for result in map(json.loads, kept)}

    def one(chosen, settings):
        key = json.dumps(asdict(settings))
        if key in done:
            return done[key]
        command = flags(chosen | {"seed": settings.seed})
        result = {"flags": command, "settings": asdict(settings), **run(command.split())}
        if args.keep:
            with open(args.keep, "a") as file:
                file.write(json.dumps(result) + "\n")
        return result

    pool, futures = ThreadPoolExecutor(args.jobs), []
    for chosen, seeds in experiments:
        settings = ppo.new_agent(**chosen).settings
        every = [replace(settings, seed=seed) for seed in args.seeds or seeds]
        futures.append([pool.submit(one, chosen, settings) for settings in every])
    try:
        for each in futures:
            yield [future.result() for future in each]
    finally:
        pool.shutdown(cancel_futures=True)


def run(command):
    """One run of ppo.py: what its evaluation says, and a summary of its log.

    ppo.py writes a row to the log at the end of each iteration. Reading along gives the second at
    which CartPole was solved: a mean return of 475 over 100 episodes. Never is inf.
    """
    with tempfile.TemporaryDirectory() as folder:
        log, out, lines, seconds = Path(folder, "log.csv"), Path(folder, "out"), [], []
        log.touch()
        with open(log) as log_file, open(out, "w") as out_file:
            start, running = time.perf_counter(), True
            process = subprocess.Popen(
                [sys.executable, PPO, *command, "--log", log], stdout=out_file, stderr=out_file
            )
            while running:  # and once more after the end
                time.sleep(0.01)
                running = process.poll() is None
                lines += log_file.readlines()
                seconds += [time.perf_counter() - start] * (len(lines) - len(seconds))
            total = time.perf_counter() - start
        text = out.read_text()
    if process.returncode != 0:
        raise RuntimeError(f"{command}: {text[-500:]}")
    last, records = text.splitlines()[-1], list(csv.DictReader(lines))
    result = {w: float(re.search(rf"{w} (-?[\d.]+)", last)[1]) for w in ("mean", "min", "max")}
    steps, episodes, returns, kl = (
        np.array(column(records, key), float) for key in ("steps", "episodes", "mean_return", "kl")
    )
    solved = np.flatnonzero((episodes >= 100) & (returns >= 475))
    return result | {
        "seconds": total,
        "solved_steps": steps[solved[0]] if len(solved) else math.inf,
        "solved_seconds": seconds[solved[0] + 1] if len(solved) else math.inf,  # [0] is the heading
        "largest_kl": kl.max(),
    }


def optimum(env_id):
    """The highest expected return, by value iteration over the environment's transition table.

    V_h(s), the best return of h steps, is max_a E[r + V_h-1(s')], and V(s') is 0 after a true end.
    A task without a time limit is evaluated for 1,000 steps.
    """
    env = gym.make(env_id)
    shape = env.observation_space.n, env.action_space.n
    rewards, transitions = np.zeros(shape), np.zeros((*shape, shape[0]))
    for s, actions in env.unwrapped.P.items():
        for a, outcomes in actions.items():
            for probability, next_s, reward, terminated in outcomes:
                rewards[s, a] += probability * reward
                transitions[s, a, next_s] += probability * (not terminated)
    values = np.zeros(shape[0])
    for _ in range(env.spec.max_episode_steps or 1000):
        values = (rewards + transitions @ values).max(axis=1)
    return env.unwrapped.initial_state_distrib @ values


def name(env_id):
    """The name of a task without its version."""
    return env_id.rsplit("-v", 1)[0]


def task(env_id, steps):
    """The settings that a run of a task chooses."""
    episodes = dict(episodes=1000) if name(env_id) in TABULAR else {}
    return dict(env=env_id, total_steps=steps, **episodes)


def flags(chosen):
    """Settings as on the command line."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in chosen.items())


def column(results, key):
    return [result[key] for result in results]


def number(x):
    """A number with no more digits than it deserves."""
    return f"{round(x, 3 if abs(x) < 10 else 2 if abs(x) < 1000 else 0) + 0.0:.7g}"


def mean_worst(means):
    return number(np.mean(means)), number(min(means))


def median(results, key, form):
    """The median; - if it is inf, as where half of the runs or more never solved."""
    middle = np.median(column(results, key))
    return f"{middle:{form}}" if middle < math.inf else "-"


def learned(results):
    """Mean, worst seed, how many runs solved CartPole, and the median steps to it."""
    solved = sum(steps < math.inf for steps in column(results, "solved_steps"))
    steps = median(results, "solved_steps", ",.0f")
    return *mean_worst(column(results, "mean")), f"{solved} of {len(results)}", steps


def row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def header(*cells):
    print()
    row(*cells)
    row(*["---"] * len(cells))


def seed_range(text):
    first, last = map(int, text.split("-"))
    return range(first, last + 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tasks", "rows", "ladder"])
    parser.add_argument("envs", nargs="*", metavar="ENV", help="only these tasks")
    parser.add_argument("--seeds", type=seed_range, metavar="A-B", help="these seeds instead")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep finished runs in this file")
    args = parser.parse_args()
    {"tasks": tasks, "rows": rows, "ladder": ladder}[args.what](args)
