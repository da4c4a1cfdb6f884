# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[box2d,mujoco]>=1.0", "matplotlib>=3.8", "numpy>=1.26"]
# ///
"""The learning results in README.md: trains with several seeds and prints Markdown tables.

    uv run .ci/results.py tasks    every task on fresh seeds, beside others' results
    uv run .ci/results.py ladder   five objectives, six step sizes, and the pictures
    uv run .ci/results.py try      the commands of "Try it"
    uv run .ci/results.py path     the changes of "Learn PPO with this file"

Runs are kept in tasks.jsonl, ladder.jsonl and try.jsonl, and are not repeated. To measure again,
delete their lines, or use another file: --keep FILE.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np

HERE = Path(__file__).resolve().parent
PPO = (HERE.parent / "ppo.py").read_text(encoding="utf-8")

TASKS = [  # name, million steps, number of seeds from 300, RL Zoo and CleanRL (see README.md)
    ("CartPole-v1", 0.1, 10, "500 (0.1M)", "490 ± 6"),
    ("Acrobot-v1", 0.2, 10, "-73.5 (1M)", "-86.4 ± 1.3"),
    ("MountainCar-v0", 0.5, 10, "-110 (1M)", "-200 ± 0"),
    ("MountainCarContinuous-v0", 0.1, 10, "88.3 (0.02M)", "-"),
    ("Pendulum-v1", 0.1, 10, "-172 (0.1M)", "-"),
    ("FrozenLake-v1", 0.2, 10, "-", "-"),
    ("FrozenLake8x8-v1", 0.3, 10, "-", "-"),
    ("Taxi-v4", 0.5, 10, "-", "-"),
    ("CliffWalking-v1", 0.1, 10, "-", "-"),
    ("CliffWalkingSlippery-v1", 0.2, 10, "-", "-"),
    ("LunarLander-v3", 0.5, 5, "242 (1M)", "-"),
    ("LunarLanderContinuous-v3", 0.5, 5, "271 (1M)", "-"),
    ("BipedalWalker-v3", 1, 5, "288 (5M)", "-"),
    ("InvertedDoublePendulum-v5", 1, 5, "-", "-"),
    ("Reacher-v5", 1, 5, "-", "-"),
    ("Swimmer-v5", 1, 5, "282 (1M)", "-"),
    ("Hopper-v5", 1, 5, "2,410 (1M)", "2,383 ± 272"),
    ("HalfCheetah-v5", 1, 5, "5,819 (1M)", "1,443 ± 46"),
    ("Walker2d-v5", 1, 5, "3,479 (1M)", "2,288 ± 572"),
    ("Ant-v5", 1, 5, "1,327 (1M)", "-"),
    ("Humanoid-v5", 1, 5, "-", "716 ± 49"),
]

LADDER = [("CartPole-v1", 100_000, 10), ("LunarLander-v3", 300_000, 5)]  # seeds from 0
STEP_SIZES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the actor's learning rate; for trpo, delta
# In the order of the lectures.
COLOURS = {"pg": "gray", "is": "chocolate", "trpo": "purple", "kl": "green", "clip": "royalblue"}

TRY = [
    "",
    "--lam 0",
    "--lam 1",
    "--gamma 0.9",
    "--clip 0.02",
    "--clip 2",
    "--epochs 1",
    "--epochs 40",
    "--ent-coef 0.1",
    "--num-envs 1",
    "--lr 0.02",
    "--env LunarLander-v3 --total-steps 100000",
]
PATH = [  # flags, a text that ppo.py has once, what to write instead, a return
    ("--lr 0.005", "dx * (1 - x * x)", "dx", 475),
    ("--objective pg --actor-lr 0.01", "(self.logits + noise)", "self.logits", 475),
    ("--lam 0.8", "q_values - values[:-1]", "q_values", 475),
    ("--objective is --actor-lr 0.0005", "slope = -ratio * advantages", "slope = -advantages", 475),
    ("--actor-lr 0.02 --clip 0.05", "surrogate <= clipped", "abs(ratio - 1) <= epsilon", 475),
    ("--env FrozenLake-v1 --total-steps 100000", "d - c * grad", "d + c * grad", 0.5),
    (
        "",
        "np.where(surrogate <= clipped, -surrogate, 0)",
        "-surrogate + abs(advantages) * (ratio - 1) * ratio / epsilon",
        475,
    ),
]
CORES = ("", "Haswell")  # sums as this processor rounds them, and as one without AVX-512 does


def tasks(args):
    """Print every task beside others' results."""
    experiments = []
    for env, steps, num_seeds, _, _ in TASKS:
        flags = f"--env {env} --total-steps {round(steps * 1e6)}"
        if optimum(env) != "-":
            flags += " --eval-episodes 1000"  # they are quick, and their returns differ a lot
        experiments.append((flags, range(300, 300 + num_seeds), "", "", ""))
    results = play(args, experiments, ["greedy", "training"])
    print_header("task", "steps", "greedy", "RL Zoo", "training", "CleanRL", "optimum")
    for (env, steps, _, zoo, cleanrl), greedy, training in zip(TASKS, *results, strict=True):
        cells = cell(greedy), zoo, cell(training), cleanrl
        print_row(env, f"{steps}M", *cells, optimum(env))


def optimum(name):
    """Return the highest expected return where states are numbered, by value iteration."""
    env = gym.make(name)
    if not hasattr(env.unwrapped, "P"):  # the table of transitions
        return "-"

    def expected(outcomes):
        return sum(p * (r + values[next_s] * (not end)) for p, next_s, r, end in outcomes)

    values = np.zeros(env.observation_space.n)
    for _ in range(env.spec.max_episode_steps or 1000):
        # V_h(s), the best return of h steps, is max_a E[r + V_h-1(s')].
        table = env.unwrapped.P.values()
        values = np.array([max(map(expected, actions.values())) for actions in table])
    return number(env.unwrapped.initial_state_distrib @ values)


def ladder(args):
    """Print two tables for each environment, and draw its picture."""
    for env, steps, num_seeds in LADDER:
        experiments = []
        for objective in COLOURS:
            flag = "--kl-target" if objective == "trpo" else "--actor-lr"
            for size in STEP_SIZES:
                flags = f"--env {env} --total-steps {steps} --objective {objective} {flag} {size}"
                experiments.append((flags, range(num_seeds), "", "", ""))
        names = ["training", "greedy"]
        results = np.array(play(args, experiments, names))
        results = results.reshape(2, len(COLOURS), len(STEP_SIZES), -1)
        title = f"{env}: return after {steps:,} steps"
        for name, returns in zip(names, results, strict=True):
            print(f"\n{title}, {name}")
            print_header("", *map(str, STEP_SIZES))
            for objective, row in zip(COLOURS, returns, strict=True):
                print_row(f"`{objective}`", *map(cell, row))
        draw(title, results[0], HERE / f"ladder-{env.partition('-')[0].lower()}.svg")


def draw(title, returns, path):
    """Draw returns (objectives, sizes, seeds), for a width of 402 pixels."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ppo", "font.size": 12})
    figure, axes = plt.subplots(figsize=(402 / 72, 330 / 72))
    figure.subplots_adjust(left=0.115, right=0.87, top=0.83, bottom=0.14)
    title += f"\nsampled episodes; mean, worst and best of {returns.shape[-1]} seeds"
    figure.text(0.015, 0.88, title, linespacing=1.5)
    means = returns.mean(axis=-1)  # nan where a run diverged
    for index, colour in enumerate(COLOURS.values()):
        x = np.arange(len(STEP_SIZES)) + 0.07 * (index - 2)  # equal values stand side by side
        axes.plot(x, means[index], color=colour, linewidth=2, marker="o", markersize=5)
        axes.vlines(x, returns[index].min(axis=-1), returns[index].max(axis=-1), colour, alpha=0.5)
    axes.set_xticks(range(len(STEP_SIZES)), STEP_SIZES)
    axes.set_xlabel("step size: learning rate of the actor, for trpo δ")
    axes.grid(axis="y", color="#d8dee4")
    axes.spines[["top", "right"]].set_visible(False)
    apart = np.ptp(axes.get_ylim()) / 15  # so that labels do not overlap
    label_y = -np.inf
    for y, (objective, colour) in sorted(zip(means[:, -1], COLOURS.items(), strict=True)):
        label_y = max(y, label_y + apart)
        axes.text(5.25, label_y, objective, color=colour, weight="bold", va="center")
    figure.savefig(path, metadata={"Date": None})


def effects(args):
    """Print the table of "Try it", or of the changes. Ranges are those of the two cores."""
    rows = [(flags, "", "", 475) for flags in TRY]
    if args.what == "path":
        rows = []
        for flags, old, new, limit in PATH:
            assert PPO.count(old) == 1, old
            rows += [(flags, "", "", limit), (flags, old, new, limit)]
    experiments = []
    for flags, old, new, _ in rows:
        experiments += [(flags, range(10), core, old, new) for core in CORES]
    results = np.array(play(args, experiments, ["greedy", "solved"]))
    results = results.reshape(2, len(rows), len(CORES), -1)
    print_header("flags", "change", "mean", "worst", "below", "solved", "median steps")
    for (flags, _, new, limit), greedy, solved in zip(rows, *results, strict=True):
        print_row(
            f"`{flags}`",
            f"`{new}`",
            span(greedy.mean(axis=1)),
            number(greedy.min()),
            f"{span((~(greedy >= limit)).sum(axis=1))} below {limit}",  # nan, too
            span(np.isfinite(solved).sum(axis=1)),
            span(np.median(np.nan_to_num(solved, nan=np.inf), axis=1)),
        )


def play(args, experiments, names):
    """Return for each name an array over seeds of each experiment. Run what is missing."""
    args.keep.touch()
    kept = {}
    for line in args.keep.read_text().splitlines():
        record = json.loads(line)
        kept[record["run"]] = record
    records = []
    missing = []
    for flags, seeds, core, old, new in experiments:
        run_name = "; ".join([flags, new, core])
        empty = {"run": run_name, "seeds": [], **{name: [] for name in names}}
        record = kept.setdefault(run_name, empty)
        records.append(record)
        for seed in seeds:
            if seed not in record["seeds"]:
                missing.append((record, seed, f"{flags} --seed {seed}", core, old, new))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (record, seed, *_), result in zip(missing, pool.map(run, missing), strict=True):
            print(record["run"], seed, result, file=sys.stderr)
            record["seeds"].append(seed)
            for name in names:
                record[name].append(result[name])
            lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in kept.values()]
            args.keep.write_text("".join(lines))
    return [[np.array(record[name], float) for record in records] for name in names]


def run(task):
    """Run ppo.py as a user would. Return its results, None if it diverged.

    greedy and training are mean returns, of the evaluation and of the last 100 training episodes.
    solved is the step at which the latter reached what the environment asks for.
    """
    _, _, flags, core, old, new = task
    environment = dict(os.environ)
    if core:
        environment["OPENBLAS_CORETYPE"] = core
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "ppo.py").write_text(PPO.replace(old, new), encoding="utf-8")
        command = [sys.executable, "ppo.py", *flags.split(), "--log", "log.csv"]
        options = dict(cwd=folder, env=environment, capture_output=True, text=True)
        process = subprocess.run(command, **options)
        if re.search("ppo.py: (diverged|the environment)", process.stderr):
            return dict(greedy=None, training=None, solved=None)
        if process.returncode != 0:
            raise RuntimeError(f"{flags}: {process.stderr[-1000:]}")
        log = np.genfromtxt(Path(folder, "log.csv"), dtype=None, delimiter=",", names=True)
    greedy = re.search(r": mean (\S+),", process.stdout)[1]
    threshold = gym.spec(re.search(r"--env (\S+)", process.stdout)[1]).reward_threshold
    is_solved = (log["episodes"] >= 100) & (log["mean_return"] >= (threshold or np.inf))
    return {
        "greedy": float(greedy.replace(",", "")),
        "training": float(f"{log['mean_return'][-1]:.5g}"),
        "solved": min(log["steps"][is_solved].tolist(), default=None),
    }


def number(x):
    if np.isnan(x):
        return "diverged"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def cell(values):
    """Return a cell with the mean, and the worst seed if it differs."""
    mean = number(values.mean())  # nan if a run diverged
    worst = number(values.min())
    return mean if worst == mean else f"{mean} ({worst})"


def span(values):
    """Return a cell with the range of values."""
    low = number(min(values))
    high = number(max(values))
    return low if low == high else f"{low} to {high}"


def print_row(*cells):
    print("|", " | ".join(cells), "|")


def print_header(*cells):
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


if __name__ == "__main__":
    commands = {"tasks": tasks, "ladder": ladder, "try": effects, "path": effects}
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=commands)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    file = "try" if args.what == "path" else args.what
    args.keep = args.keep or HERE / f"{file}.jsonl"
    commands[args.what](args)
