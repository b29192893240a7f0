"""A sample of the wrong command lines, configurations and damaged folders of `tests/fuzz.py`."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_wrong_input_is_answered_in_one_line():
    """In a process of its own, which has no threads when it forks. The seed is fixed: a failure can be repeated."""
    command = [sys.executable, "-m", "tests.fuzz", "--lines", "60", "--damages", "9", "--configs", "12", "--seed", "12"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
