"""One minute of the soak; see soak.py for what it asserts."""

import subprocess
import sys
from pathlib import Path


def test_no_row_is_lost_or_doubled_in_a_minute_of_faults():
    command = [sys.executable, str(Path(__file__).with_name("soak.py")), "--minutes", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
