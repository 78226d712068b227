"""The cost of a study's estimates is linear in its rows, and memory does not run away."""

import json
import subprocess
import sys

import pytest

DRAWS = 200  # few: what grows faster than the rows would show as well


def cost(times):
    command = [sys.executable, "-m", "benchmarks.estimates", f"times={times}", f"draws={DRAWS}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
def test_four_times_the_items_cost_no_more_than_five_times_as_much():
    one, four = cost(1), cost(4)
    assert four["rows"] == 4 * one["rows"] and four["estimates"] == one["estimates"]
    assert four["cpu_seconds"] < 5 * one["cpu_seconds"]
    assert four["peak_mib"] < 2048
