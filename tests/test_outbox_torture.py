"""A short torture; the long one is tests/benchmarks/outbox_torture.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).parent / "benchmarks" / "outbox_torture.py"


@pytest.mark.slow
@pytest.mark.hub
def test_four_servers_under_kills_and_a_hub_with_faults_lose_and_double_nothing():
    command = [sys.executable, TORTURE, "--rows", "250", "--kills", "4", "--wipes", "1", "--kill-every-s", "2.5"]
    variables = {"PYTHONPATH": str(TORTURE.parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["acknowledged"] >= 250
    assert (result["lost"], result["doubled"], result["altered"], result["clients_stuck"]) == (0, 0, 0, 0)
    assert (result["kills"], result["disks_wiped"]) == (4, 1)
    assert sum(result["faults"].values()) >= 5
    assert result["commits"] == result["files"]
