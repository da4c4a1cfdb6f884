# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[box2d,mujoco]>=1.0", "numpy>=1.26"]
# ///
"""The learning results in README.md: runs ppo.py over several seeds and prints Markdown.

    python .ci/results.py tasks [ENV ...]    every task, on seeds that no setting was chosen with
    python .ci/results.py rows [ENV ...]     what a task's own settings gain over those of its kind
    python .ci/results.py ladder [ENV ...]   every objective with six step sizes
    python .ci/results.py try                the commands of "Try it"

Each run is a process of its own, as a user would start it. --jobs N of them run at a time. Seconds
count from the start of the process, so leave the machine alone while they are measured.

--keep FILE appends each run to a file as it ends, and does not repeat the runs that it finds there.
It finds them by their settings. Start a new file when ppo.py learns or evaluates differently.
tasks.jsonl, beside this file, has the runs of the table of tasks.
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
DRAWING = Path(__file__).resolve().parent / "ladder.svg"
sys.path.insert(0, str(PPO.parent))
import ppo

TUNING_SEEDS = range(10)
FRESH_SEEDS = range(300, 310)  # where a run takes less than half a minute
FEWER_FRESH_SEEDS = range(300, 305)  # where it takes longer
TASKS = [
    ("CartPole-v1", 100_000, FRESH_SEEDS),
    ("Acrobot-v1", 200_000, FRESH_SEEDS),
    ("MountainCar-v0", 500_000, FRESH_SEEDS),
    ("MountainCarContinuous-v0", 100_000, FRESH_SEEDS),
    ("Pendulum-v1", 100_000, FRESH_SEEDS),
    ("FrozenLake-v1", 200_000, FRESH_SEEDS),
    ("FrozenLake8x8-v1", 300_000, FRESH_SEEDS),
    ("Taxi-v4", 500_000, FRESH_SEEDS),
    ("CliffWalking-v1", 100_000, FRESH_SEEDS),
    ("CliffWalkingSlippery-v1", 200_000, FRESH_SEEDS),
    ("LunarLander-v3", 500_000, FEWER_FRESH_SEEDS),
    ("LunarLanderContinuous-v3", 500_000, FEWER_FRESH_SEEDS),
    ("BipedalWalker-v3", 1_000_000, FEWER_FRESH_SEEDS),
    ("InvertedDoublePendulum-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Reacher-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Swimmer-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Hopper-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("HalfCheetah-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Walker2d-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Ant-v5", 1_000_000, FEWER_FRESH_SEEDS),
    ("Humanoid-v5", 1_000_000, FEWER_FRESH_SEEDS),
]

LADDER = [
    ("CartPole-v1", 100_000, range(10)),
    ("LunarLander-v3", 300_000, range(3)),
]
OBJECTIVES = ("pg", "is", "trpo", "kl", "clip")  # in the order of the lectures
STEP_SIZES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # the actor's learning rate; for trpo, delta

TRY = [
    (dict(), "the defaults learn on every seed"),
    (dict(lam=0), "Eq. 9: Â is δ_t; little variance, but V's errors mislead the policy"),
    (dict(lam=1), "Eq. 9: Â is R_t - V(s_t); no bias, more variance"),
    (dict(gamma=0.9), "Eq. 5: the agent looks about 10 steps ahead"),
    (dict(clip=0.02), "Eq. 16: π_θ stays very close to π_θ_k, and learns slowly"),
    (dict(clip=2), "Eq. 16: ρ may reach 3, which is hardly a limit"),
    (dict(epochs=1), "Eq. 10: the data are used once"),
    (dict(epochs=40), "Eq. 10: only the clip keeps π_θ near π_θ_k"),
    (dict(ent_coef=0.1), "Eq. 17: the agent explores more"),
    (dict(num_envs=1), "Eq. 4: 128 steps in each rollout, not 2,048"),
    (dict(lr=0.02), "Eq. 13: steps of θ are ten times as large"),
]


# The tables ---------------------------------------------------------


def tasks(args):
    """Print the table of all tasks, and below it the result of each seed, in their order."""
    chosen_tasks = [task for task in TASKS if not args.envs or task[0] in args.envs]
    experiments = [(choose(env_id, steps), seeds) for env_id, steps, seeds in chosen_tasks]
    print_header("task", "steps", "mean", "worst seed", "optimum")
    lines = []
    for (env_id, steps, _), results in zip(chosen_tasks, play(args, experiments), strict=True):
        best = number(optimum(env_id)) if is_table(env_id) else "-"
        print_row(env_id, f"{steps / 1e6:g}M", *mean_and_worst(results), best)
        means = " ".join(rounded(result["mean"]) for result in results)
        lines.append(f"{name(env_id)}: {means}")
    print("\n```text")
    print("\n".join(lines))
    print("```")


def rows(args):
    """Print what the settings of each row of ppo.TASKS gain."""
    print_header("task", "its own settings", "mean", "worst", "kind alone", "worst", "gain")
    for env_id, steps, _ in TASKS:
        own = dict(ppo.TASKS.get(name(env_id), {}))
        own.pop("total_steps", None)
        if not own or (args.envs and env_id not in args.envs):
            continue
        of_kind = ppo.KINDS[kind(env_id)]
        alone = {key: of_kind.get(key, getattr(ppo.Settings, key)) for key in own}
        experiments = [
            (choose(env_id, steps) | own, TUNING_SEEDS),
            (choose(env_id, steps) | alone, TUNING_SEEDS),
        ]
        results, results_alone = play(args, experiments)
        gain = number(mean(results, "mean") - mean(results_alone, "mean"))
        cells = mean_and_worst(results) + mean_and_worst(results_alone)
        print_row(env_id, f"`{flags(own)}`", *cells, gain)


def ladder(args):
    """Print two tables for each environment, and draw the results."""
    chosen_tasks = [task for task in LADDER if not args.envs or task[0] in args.envs]
    experiments = []
    for env_id, steps, seeds in chosen_tasks:
        for objective in OBJECTIVES:
            for size in STEP_SIZES:
                step_size = {"kl_target" if objective == "trpo" else "actor_lr": size}
                chosen = choose(env_id, steps) | dict(objective=objective) | step_size
                experiments.append((chosen, seeds))
    results = play(args, experiments)
    sweeps = {}
    for env_id, steps, _ in chosen_tasks:
        print(f"\n{env_id}, {steps:,} steps: greedy mean (worst seed)")
        print_header("objective", *[f"{size:g}" for size in STEP_SIZES])
        sweeps[env_id] = {}
        for objective in OBJECTIVES:
            sweep = [next(results) for _ in STEP_SIZES]
            sweeps[env_id][objective] = sweep
            label = "`trpo` (δ)" if objective == "trpo" else f"`{objective}`"
            print_row(label, *[cell(same_size) for same_size in sweep])
        print(f"\n{env_id}, each objective at its best step size")
        print_header(
            "objective", "step size", "training return", "greedy mean (worst seed)", "solved",
            "median steps to solve", "median seconds to solve", "largest KL",
        )  # fmt: skip
        for objective in OBJECTIVES:
            sweep = sweeps[env_id][objective]
            best = best_size(sweep)
            largest_kl = max(result["largest_kl"] for result in sweep[best])
            print_row(
                f"`{objective}`",
                f"{STEP_SIZES[best]:g}",
                number(mean(sweep[best], "training_return")),
                cell(sweep[best]),
                solved(sweep[best]),
                median(sweep[best], "solved_steps", ",.0f"),
                median(sweep[best], "solved_seconds", ".1f"),
                f"{largest_kl:.3g}",
            )
    if not args.envs:
        DRAWING.write_text(draw(sweeps))


def try_it(args):
    """Print the table of "Try it"."""
    print_header("command", "what to expect", "mean (worst seed)", "solved", "median steps")
    experiments = [(chosen, TUNING_SEEDS) for chosen, _ in TRY]
    for (chosen, expected), results in zip(TRY, play(args, experiments), strict=True):
        command = f"python ppo.py {flags(chosen)}".strip()
        steps = median(results, "solved_steps", ",.0f")
        print_row(f"`{command}`", expected, cell(results), solved(results), steps)


def best_size(sweep):
    """Return the index of the step size with the highest training return at the end.

    The mean over the seeds counts, rounded to a whole number. Of several equal ones, it is the one
    in the middle, or the smaller of the two in the middle. A size with a run that diverged loses.
    """
    returns = []
    for results in sweep:
        training_return = mean(results, "training_return")
        returns.append(-math.inf if math.isnan(training_return) else round(training_return))
    best = [index for index, value in enumerate(returns) if value == max(returns)]
    return best[(len(best) - 1) // 2]


# The runs -----------------------------------------------------------


def play(args, experiments):
    """Yield, for each (chosen settings, seeds) in order, a list with the result of each seed."""
    kept = {}
    if args.keep and args.keep.exists():
        for line in args.keep.read_text().splitlines():
            result = json.loads(line)
            kept[json.dumps(result["settings"])] = result

    def one(chosen, settings):
        key = json.dumps(asdict(settings))
        if key in kept:
            return kept[key]
        command = flags(chosen | dict(seed=settings.seed))
        result = {"flags": command, "settings": asdict(settings), **run(settings.env, command)}
        if args.keep:
            with open(args.keep, "a") as file:
                file.write(json.dumps(result) + "\n")
        return result

    pool = ThreadPoolExecutor(args.jobs)
    futures = []
    for chosen, seeds in experiments:
        settings = ppo.new_agent(**chosen).settings
        every = [replace(settings, seed=seed) for seed in args.seeds or seeds]
        futures.append([pool.submit(one, chosen, with_seed) for with_seed in every])
    try:
        for of_one_experiment in futures:
            yield [future.result() for future in of_one_experiment]
    finally:
        pool.shutdown(cancel_futures=True)


def run(env_id, command):
    """Run ppo.py once. Return what its evaluation says, and a summary of its log.

    ppo.py writes a row to the log at the end of each iteration. Reading along shows in which second
    the task was solved. A task that was not solved has inf for the steps and the seconds to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log.csv")
        log.touch()
        output = Path(folder, "output.txt")
        contents = ""
        seconds = []  # when each line was complete
        with open(log) as log_file, open(output, "w") as output_file:
            start = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, PPO, *command.split(), "--log", log],
                stdout=output_file,
                stderr=output_file,
            )
            is_running = True
            while is_running:  # and read once more after the end
                time.sleep(0.01)
                is_running = process.poll() is None
                contents += log_file.read()
                num_new = contents.count("\n") - len(seconds)
                seconds.extend([time.perf_counter() - start] * num_new)
            total_seconds = time.perf_counter() - start
        text = output.read_text()

    if process.returncode == 2 and re.search("diverged|not finite", text):
        return {
            "diverged": True,
            "mean": math.nan,
            "min": math.nan,
            "max": math.nan,
            "training_return": math.nan,
            "largest_kl": math.inf,
            "solved_steps": math.inf,
            "solved_seconds": math.inf,
            "seconds": total_seconds,
        }
    if process.returncode != 0:
        raise RuntimeError(f"{command}: {text[-500:]}")

    records = list(csv.DictReader(contents.splitlines()))
    result = {
        "diverged": False,
        **evaluation(text),
        "training_return": float(records[-1]["mean_return"]),
        "largest_kl": max(float(record["kl"]) for record in records),
        "solved_steps": math.inf,
        "solved_seconds": math.inf,
        "seconds": total_seconds,
    }
    threshold = gym.spec(env_id).reward_threshold  # 475 for CartPole-v1, 200 for LunarLander-v3
    if threshold is None:
        return result
    for record, second in zip(records, seconds[1:], strict=True):  # the first line is the heading
        if int(record["episodes"]) >= 100 and float(record["mean_return"]) >= threshold:
            result["solved_steps"] = int(record["steps"])
            result["solved_seconds"] = second
            break
    return result


def evaluation(text):
    """Return the mean, min and max that ppo.py printed in the end."""
    lines = [line for line in text.splitlines() if line.startswith("greedy evaluation")]
    result = {}
    for word in "mean", "min", "max":
        found = re.search(rf" {word} (\S+?),?( |$)", lines[-1])  # such as " mean 2,000, "
        result[word] = float(found[1].replace(",", ""))
    return result


def optimum(env_id):
    """Return the highest expected return, by value iteration over the table of transitions.

    V_h(s), the best return of h steps, is max_a E[r + V_h-1(s')], and V(s') is 0 after a true end.
    A task without a time limit gets 1,000 steps. More do not change the result.
    """
    env = gym.make(env_id)
    num_states = env.observation_space.n
    num_actions = env.action_space.n
    rewards = np.zeros((num_states, num_actions))
    transitions = np.zeros((num_states, num_actions, num_states))
    for s, actions in env.unwrapped.P.items():
        for a, outcomes in actions.items():
            for probability, next_s, reward, terminated in outcomes:
                rewards[s, a] += probability * reward
                transitions[s, a, next_s] += probability * (not terminated)
    values = np.zeros(num_states)
    for _ in range(env.spec.max_episode_steps or 1000):
        values = (rewards + transitions @ values).max(axis=1)
    return env.unwrapped.initial_state_distrib @ values


def name(env_id):
    """Return the name of a task without its version."""
    return env_id.rsplit("-v", 1)[0]


def kind(env_id):
    """Return the kind of a task, as in ppo.KINDS."""
    env = gym.make(env_id)
    return ppo.kind_of(env.observation_space, env.action_space)


def is_table(env_id):
    """Return whether the states of a task are numbered."""
    return kind(env_id) == "numbered states"


def choose(env_id, steps):
    """Return the settings that every run of a task chooses."""
    chosen = dict(env=env_id, total_steps=steps)
    if is_table(env_id):
        chosen["eval_episodes"] = 1000  # they are quick, and their returns differ a lot
    return chosen


def flags(chosen):
    """Return settings as on the command line."""
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in chosen.items())


# The cells ----------------------------------------------------------


def number(x):
    """Return a number as text, with no more digits than it deserves."""
    if math.isnan(x):
        return "diverged"
    if abs(x) >= 1000:
        return f"{x:,.0f}"
    digits = 3 if abs(x) < 10 else 2
    return f"{round(x, digits) + 0.0:g}"  # + 0.0 turns -0.0 into 0.0


def rounded(x):
    """Return a number as text, as a whole number or with three digits."""
    return f"{x:,.0f}" if abs(x) >= 10 else f"{x:.3g}"


def mean(results, key):
    """Return the mean over the seeds. It is nan if a run diverged."""
    return float(np.mean([result[key] for result in results]))


def median(results, key, form):
    """Return the median as text: - if it is inf, because half of the runs or more never solved."""
    middle = np.median([result[key] for result in results])
    return f"{middle:{form}}" if middle < math.inf else "-"


def mean_and_worst(results):
    """Return two cells: the mean and the worst seed, or how many runs diverged."""
    num_diverged = sum(result["diverged"] for result in results)
    if num_diverged > 0:
        return f"diverged {num_diverged} of {len(results)}", "-"
    return number(mean(results, "mean")), number(min(result["mean"] for result in results))


def cell(results):
    """Return one cell with the mean and, if it differs, the worst seed, as whole numbers."""
    num_diverged = sum(result["diverged"] for result in results)
    if num_diverged > 0:
        return f"diverged {num_diverged} of {len(results)}"
    whole = f"{round(mean(results, 'mean')):,}"
    worst = f"{round(min(result['mean'] for result in results)):,}"
    return whole if worst == whole else f"{whole} ({worst})"


def solved(results):
    """Return how many runs solved the task in training, as text."""
    num_solved = sum(result["solved_steps"] < math.inf for result in results)
    return f"{num_solved} of {len(results)}"


def print_row(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def print_header(*cells):
    print()
    print_row(*cells)
    print_row(*["---"] * len(cells))


# The drawing --------------------------------------------------------

TITLE = "Staying close to the old policy (kl, clip, trpo) makes the step size matter less"
NOTE = (
    "Mean return of greedy episodes after training. Thick: mean of the seeds, thin: one seed. "
    "Equal lines lie side by side."
)
COLOURS = {
    "pg": "#6e7781",
    "is": "#bc4c00",
    "trpo": "#8250df",
    "kl": "#1a7f37",
    "clip": "#0969da",
}
LABELS = {"kl": "kl (PPO1)", "clip": "clip (PPO2)"}
LOWEST = {"CartPole-v1": 0, "LunarLander-v3": -400}  # what is below is drawn here
HIGHEST = {"CartPole-v1": 500, "LunarLander-v3": 300}
PANEL_WIDTH = 410
LEFT = 50  # LEFT to BOTTOM: where the lines of a panel are
RIGHT = 310
TOP = 66
BOTTOM = 256


def draw(sweeps):
    """Return the drawing as SVG: return against step size, with a panel for each environment."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 820 324" font-family="sans-serif" '
        'font-size="13" fill="#424a53">',
        '<rect width="820" height="324" fill="#fff"/>',  # for pages with a dark background
        f'<text x="16" y="24" font-size="16" font-weight="600" fill="#1f2328">{TITLE}</text>',
    ]
    for panel, (env_id, sweep) in enumerate(sweeps.items()):
        parts.append(f'<g transform="translate({panel * PANEL_WIDTH} 0)">')
        parts.extend(draw_axes(env_id, len(sweep["pg"][0])))
        parts.extend(draw_lines(env_id, sweep))
        parts.append("</g>")
    parts.append(f'<text x="16" y="318">{NOTE}</text>')
    parts.append("</svg>\n")
    return "\n".join(parts)


def place_x(index):
    """Return where a step size is drawn. The sizes are evenly spaced on a logarithmic axis."""
    return LEFT + (RIGHT - LEFT) * index / (len(STEP_SIZES) - 1)


def place_y(env_id, value):
    """Return where a return is drawn."""
    lowest = LOWEST[env_id]
    share = (max(value, lowest) - lowest) / (HIGHEST[env_id] - lowest)
    return BOTTOM - (BOTTOM - TOP) * share


def draw_axes(env_id, num_seeds):
    """Return the parts of a panel that do not depend on the results."""
    middle = (LEFT + RIGHT) / 2
    parts = [f'<text x="{LEFT}" y="50" font-weight="600">{env_id}, {num_seeds} seeds</text>']
    for value in range(LOWEST[env_id], HIGHEST[env_id] + 1, 100):
        y = place_y(env_id, value)
        label = f"{value}".replace("-", "−")
        parts.append(f'<path d="M{LEFT} {y:.0f}H{RIGHT}" stroke="#d8dee4"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{label}</text>')
    for index, size in enumerate(STEP_SIZES):
        x = place_x(index)
        parts.append(f'<text x="{x:.0f}" y="{BOTTOM + 20}" text-anchor="middle">{size:g}</text>')
    label = "step size: learning rate of the actor, for trpo δ"
    parts.append(f'<text x="{middle:.0f}" y="{BOTTOM + 42}" text-anchor="middle">{label}</text>')
    return parts


def draw_lines(env_id, sweep):
    """Return the lines of a panel, thin for a seed and thick for the mean, and their labels."""
    thin = []
    thick = []
    ends = []
    for index, (objective, sizes) in enumerate(sweep.items()):
        colour = COLOURS[objective]
        shift = 2.5 * (index - 2)  # lines with the same values lie side by side
        for of_one_seed in zip(*sizes, strict=True):
            points = draw_points(env_id, [result["mean"] for result in of_one_seed], shift)
            thin.append(f'<polyline points="{points}" stroke="{colour}"/>')
        means = [mean(results, "mean") for results in sizes]
        points = draw_points(env_id, means, shift)
        thick.append(f'<polyline points="{points}" stroke="{colour}"/>')
        y = BOTTOM if math.isnan(means[-1]) else place_y(env_id, means[-1]) + shift
        ends.append((y, objective))
    labels = []
    ends.sort()
    label_y = TOP - 20
    for index, (y, objective) in enumerate(ends):
        room = 16 * (len(ends) - 1 - index)  # for the labels that follow
        label_y = min(max(y, label_y + 16), BOTTOM - room)
        place = f'x="{RIGHT + 8}" y="{label_y + 4:.0f}"'
        label = LABELS.get(objective, objective)
        labels.append(f'<text {place} fill="{COLOURS[objective]}">{label}</text>')
    return [
        '<g fill="none" stroke-opacity="0.3">', *thin, "</g>",
        '<g fill="none" stroke-width="2.5">', *thick, "</g>",
        '<g font-weight="600">', *labels, "</g>",
    ]  # fmt: skip


def draw_points(env_id, values, shift):
    """Return the points of a line. Where a run diverged there is none."""
    points = []
    for index, value in enumerate(values):
        if not math.isnan(value):
            points.append(f"{place_x(index):.0f},{place_y(env_id, value) + shift:.1f}")
    return " ".join(points)


def seed_range(text):
    """Return the seeds A to B for the text A-B."""
    first, last = text.split("-")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    commands = {"tasks": tasks, "rows": rows, "ladder": ladder, "try": try_it}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("envs", nargs="*", metavar="ENV", help="only these tasks")
    parser.add_argument("--seeds", type=seed_range, metavar="A-B", help="these seeds instead")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (2)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep finished runs in this file")
    args = parser.parse_args()
    commands[args.what](args)
