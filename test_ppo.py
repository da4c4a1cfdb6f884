import ppo
import csv, dataclasses, io, json, os, pickle, resource, signal, subprocess, sys, zipfile
import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
# ---- E. Ends of episodes -------------------------------------------------------------------------


class Constant(gym.Env):
    """Reward 1 for ever, from a state that never changes. kind says how an episode of 10 ends."""

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def __init__(self, kind):
        self.kind = kind

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.t += 1
        over = self.t == 10
        return np.ones(1, np.float32), 1.0, over and self.kind == "end", over and self.kind == "limit", {}


for kind in ("end", "limit"):
    gym.register(f"Constant-{kind}-v0", Constant, kwargs={"kind": kind})


def learned_value(kind):
    agent, _ = ppo.train(env=f"Constant-{kind}-v0", total_steps=30_000, gamma=0.9, lr=3e-3)
    return ppo.mlp_forward(agent.critic, np.ones((1, 1), np.float32))[0].item()


def test_a_time_limit_is_no_end():
    """Reward 1 for ever is worth 1/(1-γ) = 10, however often a time limit interrupts it."""
    assert learned_value("limit") == pytest.approx(10, rel=0.03)


def test_a_true_end_is_an_end():
    """The same rewards with true ends after 10 steps are worth Σ γ^k over what is left: below 6.52."""
    assert learned_value("end") < 6.52


class Diary(gym.Env):
    """Every observation occurs once; true ends and time limits alternate at odd lengths."""

    observation_space = gym.spaces.Box(0, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    transitions, clock = [], 0

    def see(self):
        Diary.clock += 1
        self.obs = np.array([Diary.clock], np.float32)
        return self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.length = 0, self.np_random.integers(1, 8)
        return self.see(), {}

    def step(self, action):
        before = self.obs.item()
        self.t += 1
        over, even = self.t == self.length, self.length % 2 == 0
        Diary.transitions.append((before, action.item(), self.see().item()))
        return self.obs, 1.0, over and even, over and not even, {}


gym.register("Diary-v0", Diary)


def test_the_learner_sees_each_transition_once_and_nothing_else(monkeypatch):
    """Reset rows never reach the learner; the rows of both kinds of last steps do, exactly once."""
    following, learned = {}, []
    true_rollout, true_update = ppo.rollout, ppo.update

    def rollout(*args):
        result = true_rollout(*args)
        observations = result[0][:, :, 0]
        following.update(zip(observations[:-1].ravel(), observations[1:].ravel(), strict=True))
        return result

    def update(agent, obs, actions, *rest):
        learned.extend(
            (o, a, following[o])
            for o, a in zip(obs[:, 0], actions[:, 0].clip(-1, 1), strict=True)
        )
        return true_update(agent, obs, actions, *rest)

    monkeypatch.setattr(ppo, "rollout", rollout)
    monkeypatch.setattr(ppo, "update", update)
    Diary.transitions.clear()
    ppo.train(env="Diary-v0", num_envs=3, num_steps=17, total_steps=3 * 17 * 9, minibatch_size=16)
    assert len(learned) == len(Diary.transitions) > 300
    assert sorted(learned) == sorted(Diary.transitions)


def test_an_episode_return_is_the_sum_of_its_rewards_across_rollouts():
    """Diary pays 1 a step, so returns are lengths: their sum is the number of steps in them."""
    Diary.transitions.clear()
    agent, history = ppo.train(
        env="Diary-v0", num_envs=2, num_steps=5, total_steps=100, minibatch_size=5
    )
    lengths_mean = history[-1]["mean_return"]
    inside = lengths_mean * agent.episodes
    assert len(Diary.transitions) - 14 <= inside <= len(Diary.transitions)
    assert inside == pytest.approx(round(inside))


# ---- F. Tasks ------------------------------------------------------------------------------------


class Odd(gym.Env):
    """Observations and actions of any space; reward 1 for an action that is inside its space."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.t += 1
        return self.observation_space.sample(), 1.0, False, self.t == 5, {}


gym.register("Odd-v0", Odd)
BOX, TWO = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)


@pytest.mark.parametrize(
    ("observation_space", "action_space"),
    [
        (gym.spaces.Box(0, 255, (3,), np.uint8), TWO),
        (gym.spaces.Box(-1, 1, (3,), np.float64), TWO),
        (gym.spaces.Box(-1, 1, ()), TWO),
        (gym.spaces.Box(0, 255, (4, 4, 3), np.uint8), TWO),
        (gym.spaces.Discrete(5, start=-2), TWO),
        (gym.spaces.MultiBinary(4), TWO),
        (gym.spaces.MultiDiscrete([3, 2]), TWO),
        (gym.spaces.Tuple([TWO, BOX]), TWO),
        (gym.spaces.Dict(a=BOX, b=gym.spaces.Discrete(3)), TWO),
        (BOX, gym.spaces.Discrete(3, start=7)),
        (BOX, gym.spaces.Box(-np.inf, np.inf, (2,))),
        (BOX, gym.spaces.Box(0, 1, ())),
        (BOX, gym.spaces.Box(-1, 1, (2, 2), np.float64)),
        (BOX, gym.spaces.Box(0, 9, (3,), np.int64)),
    ],
    ids=str,
)
def test_spaces(observation_space, action_space):
    """Whatever Gymnasium can flatten is observed; actions arrive inside their space."""
    gym.register("Odd-v0", Odd, kwargs=dict(observation_space=observation_space, action_space=action_space))
    agent, history = ppo.train(
        env="Odd-v0", num_envs=2, num_steps=8, total_steps=32, minibatch_size=8, normalize_obs=True
    )
    assert history[-1]["mean_return"] == 5
    assert all(np.isfinite(p).all() for p in agent.actor + agent.critic)
    assert (ppo.evaluate(agent, episodes=3) == 5).all()


def test_statistics_of_observations_and_rewards():
    """normalize_obs shows the networks mean 0 and deviation 1; scale_rewards divides by √Var(Σγr)."""
    agent, _ = ppo.train(
        env="Diary-v0", num_envs=4, num_steps=64, total_steps=2048, minibatch_size=64,
        normalize_obs=True, scale_rewards=True, gamma=0.5,
    )  # fmt: skip
    seen = np.array([t[0] for t in Diary.transitions[-1900:]])
    assert agent.obs_stats.count == pytest.approx(len(seen), abs=200)
    assert np.abs(agent.observe(np.array([[agent.obs_stats.mean.item()]]))) < 1e-6
    assert 1 < agent.return_stats.mean < 2  # Σ 0.5^k, over episodes of 1 to 7 steps


def test_module_prefix(tmp_path, monkeypatch, capsys):
    """module:Env-v0 imports the module first, as everywhere in Gymnasium."""
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Mine-v0', 'gymnasium.envs.classic_control.cartpole:CartPoleEnv',"
        " max_episode_steps=20)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert ppo.main(["--env", "my_envs:Mine-v0", *TINY]) == 0
    assert "min" in capsys.readouterr().out


class Broken(gym.Env):
    """Returns a number that is not finite at its 40th step (or reset)."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def __init__(self, quantity, value, continuous):
        self.action_space = BOX if continuous else TWO
        self.quantity, self.value, self.t = quantity, value, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(2, self.value if self.quantity == "reset" else 0.5), {}

    def step(self, action):
        assert np.isfinite(action).all()
        self.t += 1
        obs, reward = np.zeros(2), 1.0
        if self.t == 40 and self.quantity == "observation":
            obs[1] = self.value
        if self.t == 40 and self.quantity == "reward":
            reward = self.value
        return obs, reward, False, False, {}


gym.register("Broken-v0", Broken)


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("quantity", ["observation", "reward"])
def test_numbers_that_are_not_finite_stop_the_run(quantity, value, continuous, tmp_path, capsys):
    """One line names the quantity and the step; what was saved before stays as it was."""
    kwargs = dict(quantity=quantity, value=value, continuous=continuous)
    gym.register("Broken-v0", Broken, kwargs=kwargs)
    path = tmp_path / "policy.npz"
    flags = ["--num-envs", "1", "--num-steps", "16", "--minibatch-size", "16", "--save", str(path)]
    assert ppo.main(["--env", "Broken-v0", *flags, "--save-every", "1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert quantity in message and "step 7 of a rollout, 32 steps into the run" in message
    _, state = ppo.load(str(path))
    assert json.loads(str(state["rest"]))["steps"] == 32


# ---- G. Command line -----------------------------------------------------------------------------

TINY = ["--num-envs", "2", "--num-steps", "8", "--minibatch-size", "8", "--total-steps", "32", "--episodes", "2"]


def refused(argv, capsys):
    """The one line with which the command line refuses argv."""
    assert ppo.main(argv) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ppo.py: ") and err.count("\n") == 1 and "Traceback" not in out + err
    return err


NUMBERS = [f for f in dataclasses.fields(ppo.Settings) if f.metadata["low"] is not None]


@pytest.mark.parametrize("name", [f.name for f in NUMBERS])
@pytest.mark.parametrize("wrong", ["below", "above", "text", "", "nan", "inf", "-inf", "1e999"])
def test_wrong_numbers(name, wrong, capsys):
    """Each number below and above its range, or no number at all: refused, and the flag is named."""
    (f,) = (f for f in NUMBERS if f.name == name)
    value = {"below": f.metadata["low"] - 1, "above": f.metadata["high"] + 1}.get(wrong, wrong)
    flag = "--" + name.replace("_", "-")
    assert flag in refused([f"{flag}={value}"], capsys)


@pytest.mark.parametrize(
    ("argv", "clue"),
    [
        (["--env", "CartPole-v9"], "v1"),
        (["--env", "CartPol-v1"], "CartPole"),
        (["--env", ""], "cannot make"),
        (["--env", "no_such_module:Env-v0"], "no_such_module"),
        (["--env", "ALE/Pong-v5"], "ALE"),
        (["--env", "Wide-v0"], "MultiBinary(3)"),
        (["--objective", "trpo"], "pg, is, kl, clip"),
        (["--minibatch-size", "1025", "--num-envs", "8", "--num-steps", "128"], "8 environments x 128 steps"),
        (["--hidden"], "--hidden"),
        (["--hidden", "64", "x"], "--hidden"),
        (["--normalize-obs", "yes"], "yes"),
        (["--gama", "0.9"], "--gama"),
        (["CartPole-v1"], "CartPole-v1"),
        (["--lr"], "--lr"),
        (["--episodes", "0"], "--episodes"),
        (["--save-every", "0", "--save", "x.npz"], "--save-every"),
        (["--save-every", "3"], "--save FILE"),
        (["--render"], "--play"),
        (["--play", "x.npz", "--lr", "0.1"], "--play"),
        (["--play", "x.npz", "--load", "y.npz"], "--play"),
        (["--play", "missing.npz"], "missing.npz"),
        (["--load", "missing.npz"], "missing.npz"),
        (["--save", "missing/folder/p.npz"], "missing/folder"),
        (["--save", "/"], "not a file"),
        (["--save", "/dev/null"], "not a file"),
        (["--log", "missing/folder/l.csv"], "missing/folder"),
        (["--num-steps", "1000000", "--num-envs", "4096", "--env", "Huge-v0", "--total-steps", "999999999999"], "allocate"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_command_lines(argv, clue, capsys):
    """What cannot work is refused before anything starts, with what to change."""
    assert clue in refused(argv, capsys)


gym.register(
    "Wide-v0", Odd, kwargs=dict(observation_space=BOX, action_space=gym.spaces.MultiBinary(3))
)
gym.register(
    "Huge-v0",
    Odd,
    kwargs=dict(observation_space=gym.spaces.Box(-1, 1, (10_000,)), action_space=TWO),
)


def test_a_missing_extra_package_is_named(monkeypatch, capsys):
    """Gymnasium knows what to install; its hint is passed on."""
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d.lunar_lander", raising=False)
    monkeypatch.delitem(sys.modules, "gymnasium.envs.box2d", raising=False)
    assert "gymnasium[box2d]" in refused(["--env", "LunarLander-v3"], capsys)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_settings_keep_the_parameters_finite(data):
    """Any valid settings run two iterations; no parameter becomes NaN or infinite."""
    small = {
        "num_envs": st.integers(1, 3),
        "num_steps": st.integers(1, 6),
        "epochs": st.integers(1, 3),
        "hidden": st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
        "objective": st.sampled_from(list(ppo.OBJECTIVES)),
        "normalize_obs": st.booleans(),
        "scale_rewards": st.booleans(),
        "env": st.sampled_from(["CartPole-v1", "Pendulum-v1", "Diary-v0"]),
        "seed": st.integers(0, 2**32 - 1),
    }
    wide = {
        f.name: st.floats(f.metadata["low"], f.metadata["high"])
        for f in NUMBERS
        if f.type is float
    }
    chosen = data.draw(st.fixed_dictionaries({**small, **wide}))
    rows = chosen["num_envs"] * chosen["num_steps"]
    chosen |= {"total_steps": 2 * rows, "minibatch_size": data.draw(st.integers(1, rows))}
    with np.errstate(all="ignore"):
        agent, _ = ppo.train(**chosen)
    assert agent.steps == 2 * rows
    assert all(np.isfinite(p).all() for p in agent.actor + agent.critic)


def test_a_hundred_task_seeds():
    """No seed crashes or yields NaN."""
    for seed in range(1000, 1100):
        agent, history = ppo.train(
            seed=seed, num_envs=2, num_steps=32, minibatch_size=32, total_steps=128
        )
        assert np.isfinite(agent.actor_adam.theta).all() and np.isfinite(history[-1]["kl"])


def test_a_run_prints_and_logs_what_it_does(tmp_path, capsys):
    """The settings, a row per report, the curve, the evaluation; the CSV has a row per iteration."""
    log = tmp_path / "run.csv"
    assert ppo.main([*TINY, "--log", str(log)]) == 0
    out = capsys.readouterr().out
    assert "--num-envs=2" in out and "--gamma" in out
    assert "mean return over" in out
    assert "greedy evaluation over 2 episodes: mean" in out
    assert "\r" not in out and "\x1b" not in out and "beta" not in out
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps"] for row in rows] == ["16", "32"]
    assert float(rows[-1]["entropy"]) == pytest.approx(np.log(2), abs=0.1)
    assert ppo.main([*TINY, "--objective", "kl"]) == 0
    assert "beta" in capsys.readouterr().out


def test_a_saved_policy_plays_and_goes_on(tmp_path, capsys):
    """A file holds all that learning needs: --play evaluates it, --load continues the schedule."""
    path = str(tmp_path / "policy.npz")
    assert ppo.main([*TINY, "--save", path]) == 0
    evaluation = capsys.readouterr().out.splitlines()[-1]
    assert ppo.main(["--play", path, "--episodes", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == evaluation
    assert "already trained" in refused(["--load", path], capsys)
    assert ppo.main(["--load", path, "--total-steps", "64", "--save", path, "--episodes", "1"]) == 0
    settings, state = ppo.load(path)
    rest = json.loads(str(state["rest"]))
    assert (settings.total_steps, rest["steps"], rest["adam_t"]) == (64, 64, 2 * rest["adam_t"] // 2)
    assert sorted(os.listdir(tmp_path)) == ["policy.npz"]


def test_packing_is_exact():
    """An agent unpacked from another one's state continues bit for bit as that one does."""
    chosen = dict(env="Pendulum-v1", num_envs=2, num_steps=16, minibatch_size=8, normalize_obs=True)
    first, _ = ppo.train(**chosen, total_steps=64)
    second, _ = ppo.train(**chosen, total_steps=32, seed=5)
    ppo.unpack(second, ppo.pack(first))
    obs, actions = np.ones((16, 3), np.float32), np.ones((16, 1), np.float32)
    advantages = np.linspace(-1, 1, 16, dtype=np.float32)
    for agent in (first, second):
        ppo.update(agent, obs, actions, advantages, advantages, 1e-3)
    assert (first.actor_adam.theta == second.actor_adam.theta).all()
    assert (first.critic_adam.theta == second.critic_adam.theta).all()
    assert (first.observe(obs) == second.observe(obs)).all()


def test_stopping_and_going_on_learns_as_well(tmp_path, capsys):
    """CartPole in two halves, with a file between them, is solved like in one go."""
    path = str(tmp_path / "policy.npz")
    halves = ["--total-steps", "50000", "--episodes", "10", "--save", path]
    ppo.main(halves)
    ppo.main(["--load", path, "--total-steps", "100000", "--episodes", "10"])
    assert "mean 500.00" in capsys.readouterr().out.splitlines()[-1]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def hostile_files(folder):
    """Name and content of files that are no policies."""
    ppo.main([*TINY, "--save", str(folder / "good.npz")])
    good = (folder / "good.npz").read_bytes()
    yield "empty", b""
    yield "truncated", good[: len(good) // 2]
    yield "text", b"not a policy"
    yield "foreign", _npz(weights=np.ones(3))
    yield "pickle", pickle.dumps(Bomb())
    yield "pickled_array", _npz(rest=np.array([Bomb()], object))
    state = dict(np.load(folder / "good.npz"))
    yield "broken_settings", _npz(**{**state, "rest": np.array("{}")})
    yield "missing_array", _npz(**{k: v for k, v in state.items() if k != "actor_2"})
    yield "wrong_shape", _npz(**{**state, "critic_0": np.ones((3, 3))})
    yield "not_finite", _npz(**{**state, "actor_1": np.full(64, np.nan, np.float32)})
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)}
    )
    oversized = io.BytesIO()
    with zipfile.ZipFile(oversized, "w") as archive:
        archive.writestr("actor_0.npy", header.getvalue())
    yield "oversized", oversized.getvalue()


def _npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("flag", ["--play", "--load"])
def test_files_that_are_no_policies(flag, tmp_path, monkeypatch, capsys):
    """One line, status 2, and nothing in the file is executed."""
    monkeypatch.chdir(tmp_path)
    for name, content in hostile_files(tmp_path):
        (tmp_path / name).write_bytes(content)
        capsys.readouterr()
        assert name in refused([flag, name], capsys)
    assert not os.path.exists("exploded")


def test_policies_that_do_not_fit(tmp_path, capsys):
    """Another environment or other layers: the line says which two things do not fit."""
    path = str(tmp_path / "p.npz")
    ppo.main([*TINY, "--save", path])
    capsys.readouterr()
    line = refused(["--play", path, "--env", "Acrobot-v1"], capsys)
    assert "CartPole-v1" in line and "Acrobot-v1" in line
    line = refused(["--load", path, "--hidden", "32"], capsys)
    assert "(64, 64)" in line and "(32,)" in line


def start(*argv, **kwargs):
    return subprocess.Popen(
        [sys.executable, ppo.__file__, *argv],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs,
    )  # fmt: skip


def test_ctrl_c_keeps_the_policy(tmp_path):
    """SIGINT: policy saved, curve and evaluation printed, exit status 130, no traceback."""
    path = str(tmp_path / "p.npz")
    process = start("--total-steps", "10000000", "--save", path)
    while "1,024" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == ""
    assert "mean return over" in out and "greedy evaluation over 5 episodes" in out
    assert ppo.main(["--play", path, "--episodes", "1"]) == 0


def test_a_closed_pipe_ends_quietly(tmp_path):
    """| head: the run ends with the policy saved, and nothing on standard error."""
    path = str(tmp_path / "p.npz")
    process = start("--total-steps", "200000", "--save", path)
    while "1,024" not in process.stdout.readline():
        pass
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=20) == 141
    assert ppo.main(["--play", path, "--episodes", "1"]) == 0


def test_a_full_disk_leaves_the_earlier_file_whole(tmp_path):
    """A save that fails says so, the run goes on, and the file on disk stays what it was."""
    path = tmp_path / "p.npz"
    ppo.main([*TINY, "--save", str(path)])
    before = path.read_bytes()
    limit = 1000  # bytes that this process may write to one file
    process = start(
        "--load", str(path), "--save", str(path), "--total-steps", "320",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    out, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "cannot save" in err and "Traceback" not in err
    assert "320" in out
    assert path.read_bytes() == before


def test_importing_has_no_side_effects():
    """Importing ppo prints nothing and only sets the documented thread default."""
    code = "import os; before = dict(os.environ); import ppo; print(dict(os.environ).items() ^ before.items())"
    for given, expected in ({}, "{('OMP_NUM_THREADS', '1')}"), ({"OMP_NUM_THREADS": "2"}, "set()"):
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | given
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=os.path.dirname(ppo.__file__), env=environment,
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert (result.stdout.strip(), result.stderr) == (expected, "")
