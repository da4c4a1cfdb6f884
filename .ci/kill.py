"""Kill runs that save again and again, 40 times within half a second of the first save.

The policy file that exists after each kill must load and play.
"""

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
argv = ["--num-envs=4", "--num-steps=8", "--total-steps=640", "--eval-episodes=1"]
while ppo.main([*argv, "--save", sys.argv[1]]) == 0:
    pass
"""


def kill_once(moment):
    """Start, kill so many seconds after the first save, and use the policy that is there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.npz"
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, path], cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while not path.exists():
            assert process.poll() is None, "the run ended before it saved"
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        process.wait()
        assert len(ppo.evaluate(ppo.load(str(path)), episodes=1)) == 1


if __name__ == "__main__":
    moments = [number / 80 for number in range(40)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(kill_once, moments))
    print("40 kills: every policy loads and plays")
