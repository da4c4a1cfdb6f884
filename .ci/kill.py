"""Kill runs that save again and again, 40 times at random moments.

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

# Short runs, one after the other, of 20 iterations each. A policy is saved after each iteration.
LOOP = """
import sys, ppo
while True:
    argv = ["--num-envs=4", "--num-steps=8", "--total-steps=640", "--eval-episodes=1"]
    ppo.main([*argv, "--save", sys.argv[1]])
"""


def kill_once(moment: float) -> bool:
    """Start, kill after so many seconds, and use the policy that is there, if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.npz"
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, path], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(moment)
        process.kill()
        process.wait()
        if not path.exists():
            return False
        assert len(ppo.evaluate(ppo.load(str(path)), episodes=1)) == 1
        return True


if __name__ == "__main__":
    rng = random.Random(0)
    moments = [rng.uniform(0.2, 1.5) for _ in range(40)]
    with ThreadPoolExecutor(2) as pool:
        saved = sum(pool.map(kill_once, moments))
    print(f"40 kills: {saved} files; all load and play")
    assert saved >= 10, "too few runs lived long enough to save: the machine is too slow"
