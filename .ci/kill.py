"""Kill a run that saves after every iteration, 100 times at random moments.

Whatever policy file exists after each kill must load and play.
"""

import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ppo


def kill_once(moment: float) -> int | None:
    """Start, kill after so many seconds, and load what is there: the steps in it, or None."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.npz"
        flags = ["--num-envs=4", "--num-steps=8", "--minibatch-size=32", "--save-every=1"]
        process = subprocess.Popen(
            [sys.executable, ROOT / "ppo.py", *flags, "--total-steps=10000000", "--save", path],
            stdout=subprocess.DEVNULL,
        )
        time.sleep(moment)
        process.kill()
        process.wait()
        if not path.exists():
            return None
        agent, envs = ppo.restore(str(path), {})
        envs.close()
        assert len(ppo.evaluate(agent, episodes=1)) == 1
        return agent.steps


if __name__ == "__main__":
    rng = random.Random(0)
    moments = [rng.uniform(0.2, 1.5) for _ in range(100)]
    with ThreadPoolExecutor(2) as pool:
        steps = list(pool.map(kill_once, moments))
    saved = [s for s in steps if s is not None]
    print(
        f"100 kills: {len(saved)} files, at {min(saved)} to {max(saved)} steps; all load and play"
    )
    assert len(saved) >= 30, "too few runs lived long enough to save: the machine is too slow"
