"""The learning results in README.md: runs ppo.py over several seeds and prints Markdown.

    python .ci/results.py tasks [ENV ...]      the table of tasks, five seeds each (CartPole: 20)
    python .ci/results.py ladder               the four objectives, seeds 0-9, two sets of settings
    python .ci/results.py curve                the learning curve of CartPole-v1, seeds 0-19
    python .ci/results.py resume               CartPole-v1 stopped half-way and continued, seeds 0-4

Every run is a process of its own, as a user would start it; --jobs N of them at a time.
"""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PPO = Path(__file__).resolve().parent.parent / "ppo.py"

TASKS = [  # seeds that were not used to choose the settings
    ("CartPole-v1", 100_000, range(20)),
    ("Acrobot-v1", 200_000, range(5, 10)),
    ("MountainCar-v0", 500_000, range(5)),
    ("Pendulum-v1", 100_000, range(5)),
    ("MountainCarContinuous-v0", 100_000, range(5)),
    ("LunarLander-v3", 500_000, range(5)),
    ("LunarLander-v3", 1_000_000, range(5)),
    ("FrozenLake-v1", 200_000, range(5)),
    ("Taxi-v4", 500_000, range(5)),
    ("CliffWalking-v1", 100_000, range(5, 10)),
    ("HalfCheetah-v5", 1_000_000, range(5)),
    ("Hopper-v5", 1_000_000, range(5, 10)),
]
HARD = ["--epochs=40", "--lr=0.003"]


def run(flags: list[str]) -> dict:
    """One run: what its last line says, its log as columns, and its wall time in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "log.csv")
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, str(PPO), *flags, "--log", log], capture_output=True, text=True
        )
        seconds = time.monotonic() - start
        if result.returncode != 0:
            raise RuntimeError(f"{flags}: {result.stderr}")
        with open(log, newline="") as file:
            rows = list(csv.DictReader(file))
    last = result.stdout.splitlines()[-1]
    mean, low = (float(re.search(rf"{word} (-?[\d.]+)", last)[1]) for word in ("mean", "min"))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return {"mean": mean, "min": low, "seconds": seconds, **columns}


def run_seeds(pool: ThreadPoolExecutor, seeds: range, flags: list[str]) -> list[dict]:
    return list(pool.map(lambda seed: run([*flags, f"--seed={seed}"]), seeds))


def tasks(pool: ThreadPoolExecutor, names: list[str]) -> None:
    print("| task | steps | seeds | mean | worst seed | each seed | seconds a run |")
    print("|---|---|---|---|---|---|---|")
    for env, steps, seeds in TASKS:
        if not names or env in names:
            results = run_seeds(pool, seeds, [f"--env={env}", f"--total-steps={steps}"])
            means = [r["mean"] for r in results]
            each = ", ".join(f"{m:g}" for m in means) if len(seeds) <= 5 else ""
            span = f"{seeds[0]}-{seeds[-1]}"
            print(
                f"| {env} | {steps:,} | {span} | {np.mean(means):.2f} | {min(means):.2f} "
                f"| {each} | {np.median([r['seconds'] for r in results]):.1f} |",
                flush=True,
            )


def ladder(pool: ThreadPoolExecutor) -> None:
    for title, flags in ("default settings", []), (" ".join(HARD), HARD):
        print(f"\n{title}\n")
        print("| objective | mean | worst seed | solved | median steps to solve | largest KL |")
        print("|---|---|---|---|---|---|")
        for objective in ("pg", "is", "kl", "clip"):
            results = run_seeds(pool, range(10), [f"--objective={objective}", *flags])
            means = [r["mean"] for r in results]
            solved = [r["steps"][r["mean_return"] >= 475][:1] for r in results]
            solved = np.concatenate(solved)
            median = f"{np.median(solved):,.0f}" if len(solved) else "-"
            print(
                f"| {objective} | {np.mean(means):.1f} | {min(means):.1f} | {len(solved)} of 10 "
                f"| {median} | {max(np.nanmax(r['kl']) for r in results):.3g} |",
                flush=True,
            )


def curve(pool: ThreadPoolExecutor) -> None:
    results = run_seeds(pool, range(20), ["--env=CartPole-v1"])
    at = np.arange(5_000, 100_001, 5_000)
    returns = np.array([np.interp(at, r["steps"], r["mean_return"]) for r in results])
    print("```mermaid\nxychart-beta")
    print(
        '    title "CartPole-v1, 20 seeds: worst, median and best return of the last 100 episodes"'
    )
    print(f'    x-axis "thousand steps" [{", ".join(str(x // 1000) for x in at)}]')
    print('    y-axis "return" 0 --> 500')
    for values in returns.min(axis=0), np.median(returns, axis=0), returns.max(axis=0):
        print(f"    line [{', '.join(f'{v:.0f}' for v in values)}]")
    print("```")


def resume(pool: ThreadPoolExecutor) -> None:
    def interrupted(seed: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "policy.npz")
            process = subprocess.Popen(
                [sys.executable, str(PPO), f"--seed={seed}", "--save", path],
                stdout=subprocess.PIPE,
                text=True,
            )
            while not re.match(r" *5\d,", process.stdout.readline()):
                pass  # until the row of the first report after 50,000 steps
            process.send_signal(signal.SIGINT)
            process.communicate()
            return run(["--load", path])["mean"]

    means = list(pool.map(interrupted, range(5)))
    print(f"stopped by Ctrl-C after half of 100,000 steps and continued: {means}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["tasks", "ladder", "curve", "resume"])
    parser.add_argument("envs", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        if args.what == "tasks":
            tasks(pool, args.envs)
        else:
            {"ladder": ladder, "curve": curve, "resume": resume}[args.what](pool)
