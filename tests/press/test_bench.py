"""The stopwatch of the benchmarks."""

import os
import sys

import pytest

from paperbook.bench import timed
from paperbook.errors import PressError

# A parent that waits for a child with 150 MB: the sum over both counts.
FAMILY = """
import subprocess, sys
subprocess.run([sys.executable, "-S", "-c", "import time; x = bytearray(150_000_000); time.sleep(0.6)"])
"""


def test_seconds_and_the_memory_of_the_whole_family(tmp_path):
    spent, peak = timed([sys.executable, "-S", "-c", FAMILY], tmp_path, dict(os.environ))
    assert 0.6 < spent < 20
    assert 150e6 < peak < 400e6


def test_a_command_that_fails_is_no_measurement(tmp_path):
    with pytest.raises(PressError, match="no such book"):
        timed([sys.executable, "-S", "-c", "raise SystemExit('no such book')"], tmp_path, dict(os.environ))
