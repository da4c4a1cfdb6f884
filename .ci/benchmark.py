# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "numpy==2.4.6", "gymnasium[box2d]==1.4.0", "torch==2.13.0", "stable-baselines3==2.9.2",
#     "matplotlib",
# ]
# ///
"""How fast is ppo.py? Prints two tables of the runs in speed.jsonl, and draws learning.svg.

    python .ci/benchmark.py
    python .ci/benchmark.py --measure 1 2 --cleanrl PYTHON FOLDER --purejaxrl PYTHON FOLDER

1. CartPole-v1, 500,000 steps from a cold start, the same settings on all sides.
2. Until a task is solved, with the settings that each side recommends. The picture has these runs.

--measure (on Linux) appends to speed.jsonl: delete that table's old lines first, and leave the
machine alone. The sides take turns, and a ratio compares two of the same turn. Each run is a
process of its own with OMP_NUM_THREADS=1, which only JAX does not heed.

CleanRL's and PureJaxRL's published scripts run from the FOLDER of their ppo.py, in a PYTHON with

    torch==2.13.0 gymnasium==0.29.1 "numpy<2" tyro tensorboard    (it would learn from later resets)
    jax==0.10.2 flax==0.12.8 optax==0.2.8 distrax==0.1.9 gymnax==0.0.8
"""

# Nothing heavy is imported here: on Linux a new process inherits its parent's peak memory.
import argparse
import ast
import json
import os
import re
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean, median
from time import perf_counter

START = perf_counter()  # of this process, some 20 ms after its very start
HERE = Path(__file__).resolve().parent
KEPT = HERE / "speed.jsonl"

# fmt: off
# Table 1: the settings of CleanRL's and PureJaxRL's scripts, as the others call them.
SAME = dict(
    num_envs=4, num_steps=128, minibatch_size=128, epochs=4, lr=2.5e-4, gamma=0.99, lam=0.95,
    clip=0.2, ent_coef=0.01, max_grad_norm=0.5, hidden=[64, 64],
)
SAME_SB3 = dict(  # its networks and max_grad_norm are the same by default
    n_envs=4, n_steps=128, batch_size=128, n_epochs=4, gamma=0.99, gae_lambda=0.95,
    learning_rate=lambda remaining: remaining * 2.5e-4, clip_range=0.2, ent_coef=0.01,
)
# Table 2: a task is solved when the last 100 training episodes return this on average.
TARGETS = {"CartPole-v1": 475, "Acrobot-v1": -85, "LunarLander-v3": 200}
# RL Zoo's settings: hyperparams/ppo.yml of rl-baselines3-zoo, where LunarLander is still -v2. What
# it does not mention is left to Stable-Baselines3.
ZOO = {
    "CartPole-v1": dict(
        n_timesteps=100_000, n_envs=8, n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98,
        n_epochs=20, ent_coef=0.0, learning_rate=lambda remaining: remaining * 0.001,
        clip_range=lambda remaining: remaining * 0.2,
    ),
    "Acrobot-v1": dict(
        n_timesteps=1_000_000, normalize=True, n_envs=16, n_steps=256, gae_lambda=0.94, gamma=0.99,
        n_epochs=4, ent_coef=0.0,
    ),
    "LunarLander-v3": dict(
        n_timesteps=1_000_000, n_envs=16, n_steps=1024, batch_size=64, gae_lambda=0.98, gamma=0.999,
        n_epochs=4, ent_coef=0.01,
    ),
}
# fmt: on


# Each side gets total_steps for table 1, but not for table 2.


class Watch:
    """Keeps the curve of a run from here on, and notices when the task is solved."""

    def __init__(self, env):
        self.target = TARGETS[env]
        self.start = perf_counter()
        self.solved = False
        self.curve = []

    def see(self, episodes, mean_return, now=None):
        """Add the mean return of the last 100 episodes. Return whether the task is solved."""
        if episodes:
            self.curve.append((now or perf_counter(), mean_return))
            self.solved = episodes >= 100 and mean_return >= self.target
        return self.solved

    def report(self, steps):
        end = self.curve[-1][0]
        every = -(-len(self.curve) // 30)  # 30 points are enough, the last among them
        points = self.curve[::-every][::-1]
        return {
            "solved": self.solved,
            "steps": steps,
            "rate": round(steps / (end - self.start)),
            "seconds": round(end - START, 2),
            "at": [float(f"{now - START:.3g}") for now, _ in points],
            "returns": [round(mean_return) for _, mean_return in points],
        }


def run_ppo(seed, env, total_steps=None):
    import ppo

    if total_steps:
        ppo.train(env, seed=seed, total_steps=total_steps, **SAME)
        return None
    agent = ppo.new_agent(env, seed=seed)
    envs = ppo.make_envs(env, agent.settings.num_envs)
    watch = Watch(env)
    for record in ppo.learn(agent, envs):
        if watch.see(record["episodes"], record["mean_return"]):
            break
    return watch.report(record["steps"])


def run_sb3(seed, env, total_steps=None):
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    settings = SAME_SB3 if total_steps else ZOO[env]
    zoo_steps = settings.pop("n_timesteps", None)
    envs = make_vec_env(env, settings.pop("n_envs"), seed)
    if settings.pop("normalize", False):  # as RL Zoo does it
        envs = VecNormalize(envs, gamma=settings["gamma"])
    agent = PPO("MlpPolicy", envs, seed=seed, device="cpu", **settings)
    if total_steps:
        agent.learn(total_steps)
        return None
    watch = Watch(env)

    def keep_going(*_):  # it asks after every step
        returns = [episode["r"] for episode in agent.ep_info_buffer]
        return not watch.see(len(returns), fmean(returns or [0]))

    agent.learn(zoo_steps, keep_going)
    return watch.report(agent.num_timesteps)


def run_cleanrl(seed, env, total_steps):
    """Run CleanRL's script as it is, with its defaults."""
    script = str(Path(sys.path[0], "ppo.py"))
    sys.argv = [script, f"--total-timesteps={total_steps}", f"--seed={seed}"]
    runpy.run_path(script, run_name="__main__")


def run_purejaxrl(seed, env, total_steps=None):
    """Run PureJaxRL's training with its script's settings, but without printing every episode."""

    class Nothing:  # Its wrappers import Brax and Navix for other environments.
        envs = EpisodeWrapper = AutoResetWrapper = None

    training = "brax.envs.wrappers.training"
    for name in ["navix", "brax", "brax.envs", "brax.envs.wrappers", training]:
        sys.modules[name] = Nothing
    import jax

    jax.tree_map = jax.tree_util.tree_map  # JAX has dropped the name by which gymnax calls it
    import ppo

    script = Path(ppo.__file__).read_text()
    settings = ast.literal_eval(re.search(r"config = (\{.*?\})", script, re.DOTALL)[1])
    settings |= {"TOTAL_TIMESTEPS": total_steps or 500_000, "DEBUG": False}
    key = jax.random.PRNGKey(seed)
    train = jax.jit(ppo.make_train(settings)).lower(key).compile()
    watch = Watch(env)
    metrics = jax.device_get(train(key)["metrics"])  # (updates, steps, envs) each
    if total_steps:
        return None

    # A compiled run cannot be watched. Its updates do the same work, so each took its share.
    returns = metrics["returned_episode_returns"]
    share = (perf_counter() - watch.start) / len(returns)
    last = []
    for update, ended in enumerate(metrics["returned_episode"]):
        last = [*last, *returns[update][ended].tolist()][-100:]
        now = watch.start + share * (update + 1)
        if watch.see(len(last), fmean(last or [0]), now):
            break
    return watch.report(ended.size * (update + 1))


def step_envs(seed, env, total_steps):
    """Step the environment alone, with random actions drawn beforehand."""
    import gymnasium
    import numpy

    num_envs = SAME["num_envs"]
    envs = gymnasium.make_vec(env, num_envs)
    envs.reset(seed=seed)
    shape = (total_steps // num_envs, num_envs)
    for action in numpy.random.default_rng(seed).integers(0, 2, shape, "int8"):
        envs.step(action)


SIDES = {
    "ppo.py": run_ppo,
    "Stable-Baselines3": run_sb3,
    "CleanRL": run_cleanrl,
    "PureJaxRL": run_purejaxrl,
    "the environment alone": step_envs,
}


def work(task):
    """Run a side as measure asks, and print its result."""
    folder, side, options = json.loads(task)
    sys.path.insert(0, folder)
    result = SIDES[side](**options) or {}
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # on Linux
    print(json.dumps(result))


def measure(side, place, **options):
    """Run a side in a new process. Return its result, with the seconds it took."""
    python, folder = place
    task = json.dumps([os.path.abspath(folder), side, options])
    command = [python, "-Wignore", __file__, "--worker", task]
    start = perf_counter()
    with tempfile.TemporaryDirectory() as logs:  # of CleanRL's script
        output = subprocess.check_output(command, cwd=logs)
    seconds = round(perf_counter() - start, 2)
    return {**options, "seconds": seconds, **json.loads(output.splitlines()[-1])}


def machine():
    info = Path("/proc/cpuinfo").read_text()
    name = re.search("model name\t: (.*)", info)[1]
    avx512 = "with" if " avx512f" in info else "without"
    return f"{name} {avx512} AVX-512, {os.cpu_count()} cores, Python {sys.version.split()[0]}"


def keep(**record):
    with KEPT.open("a") as file:
        print(json.dumps(record, separators=(",", ":")), file=file)


def measure_table(table, args):
    here = [sys.executable, HERE.parent]
    places = dict.fromkeys(SIDES, here) | {"CleanRL": args.cleanrl, "PureJaxRL": args.purejaxrl}
    options = {"total_steps": 500_000}
    tasks = {"CartPole-v1": SIDES}
    if table == 2:
        options = {}
        tasks = {env: ["ppo.py", "Stable-Baselines3"] for env in TARGETS}
        tasks["CartPole-v1"].append("PureJaxRL")
    keep(table=table, machine=machine())
    for env, sides in tasks.items():
        sides = [side for side in sides if places[side]]
        # A first run compiles modules and fills the disk's cache. It does not count.
        for side in sides:
            measure(side, places[side], env=env, seed=0, total_steps=2048)
        for seed in range(300, 303):
            for side in sides:
                run = measure(side, places[side], env=env, seed=seed, **options)
                keep(table=table, side=side, **run)


def select(records, **wanted):
    return [record for record in records if wanted.items() <= record.items()]


def show_cold_start(runs):
    print("| | seconds | ratio to ppo.py's | peak MB |\n|---|---:|---:|---:|")
    seconds_ppo = [run["seconds"] for run in select(runs, side="ppo.py")]
    for side in dict.fromkeys(run["side"] for run in runs):
        turns = select(runs, side=side)
        seconds = [run["seconds"] for run in turns]
        ratios = [a / b for a, b in zip(seconds, seconds_ppo, strict=True)]
        ratio = f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        peak = median(run["peak_mb"] for run in turns)
        print(f"| {side} | {median(seconds):.1f} | {ratio} | {peak:.0f} |")


def show_until_solved(runs):
    print("| | | steps | steps/s | seconds | each seed |\n|---|---|---:|---:|---:|---:|")
    for env, side in dict.fromkeys((run["env"], run["side"]) for run in runs):
        turns = select(runs, env=env, side=side)
        middle = sorted(turns, key=lambda run: run["seconds"])[len(turns) // 2]
        numbers = f"{middle['steps']:,} | {middle['rate']:,} | {seconds_of(middle)}"
        each_seed = ", ".join(seconds_of(run) for run in turns)
        print(f"| {env} ({TARGETS[env]}) | {side} | {numbers} | {each_seed} |")


def seconds_of(run):
    return f"{run['seconds']:.1f}" if run["solved"] else f"not in {run['seconds']:.0f}"


def draw(runs):
    """Draw the curves of table 2, legible at half their size on a phone and on a dark page."""
    from matplotlib import pyplot

    pyplot.rc("font", size=21)
    pyplot.rc("svg", fonttype="none", hashsalt="ppo.py")
    figure, panels = pyplot.subplots(1, 2, figsize=(11.4, 5.2), layout="constrained")
    figure.suptitle("Return by seconds since the start (log scale)")
    looks = {"ppo.py": ("#0550ae", (0.27, 0.7)), "Stable-Baselines3": ("#bc4c00", (1, 0.03))}
    ticks = {"CartPole-v1": [0, 250, 475], "LunarLander-v3": [-100, 0, 100, 200]}
    for panel, env in zip(panels, ticks, strict=True):
        panel.axhline(ticks[env][-1], color="gray", linestyle=":")
        panel.text(0.02, 0.87, "solved", transform=panel.transAxes)
        for side, (colour, place) in looks.items():
            name = side.replace("-", "-\n")
            panel.annotate(name, place, xycoords="axes fraction", color=colour, ha="right")
            for run in select(runs, env=env, side=side):
                panel.plot(run["at"], run["returns"], color=colour, linewidth=2.5)
                if run["solved"]:
                    panel.plot(run["at"][-1], run["returns"][-1], "o", color=colour)
        panel.set(title=env, xscale="log", yticks=ticks[env])
        panel.minorticks_off()
        panel.xaxis.set_major_formatter("{x:g} s")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "learning.svg", metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--measure", type=int, nargs="+", choices=[1, 2], default=[])
    for flag in ["--cleanrl", "--purejaxrl"]:
        parser.add_argument(flag, nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    for table in args.measure:
        measure_table(table, args)
    kept = [json.loads(line) for line in KEPT.read_text().splitlines()]
    for table, show in (1, show_cold_start), (2, show_until_solved):
        records = select(kept, table=table)
        if records:
            print(f"\n### {table}. {records[0]['machine']}\n")
            show(records[1:])
    draw(select(kept, table=2))


if __name__ == "__main__":
    main()
