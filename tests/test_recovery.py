"""A run that is killed ten times, at any moment, ends as one that nobody touched."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_loop import FOLDERS, write_config

from pathalign.images import ImageSet
from pathalign.ledger import LEDGER_NAME
from pathalign.schema import RunRecord

KILLS = 10
COMMAND = "import torch; torch.set_num_threads(1); from pathalign.cli import main; main()"


class Run:
    """`pathalign run` in a process of its own; knows which step it is at."""

    def __init__(self, config: Path, run_dir: Path) -> None:
        arguments = ["run", str(config), "--output-dir", str(run_dir)]
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.reached = [threading.Event() for _ in FOLDERS]
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            place = line.partition("/")[0].lstrip("\r[")
            if line.startswith("[") and place.isdigit():
                self.reached[int(place) - 1].set()

    def kill(self, step: int, delay_s: float) -> bool:
        """Kill it `delay_s` after it has reached a step; returns whether it was still running."""
        while not self.reached[step].wait(0.05) and self.process.poll() is None:
            pass
        time.sleep(delay_s)
        running = self.process.poll() is None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        return running

    def finish(self) -> None:
        assert self.process.wait() == 0, "".join(self.lines[-30:])
        self.reader.join()


def moments(run_dir: Path) -> list[tuple[int, float]]:
    """Ten moments (step, seconds after its beginning), one at random in each tenth of an undisturbed run."""
    ledger = json.loads((run_dir / LEDGER_NAME).read_text())["steps"]
    durations = [ledger[folder]["wall_s"] for folder in FOLDERS]
    generator, found = random.Random(0), []
    for tenth in range(KILLS):
        left = (tenth + generator.random()) / KILLS * sum(durations)
        step = 0
        while left > durations[step] and step < len(durations) - 1:
            left -= durations[step]
            step += 1
        found.append((step, left))
    return found


def check_folders(run_dir: Path) -> set[str]:
    """Every visible folder is whole: its record loads, and so do its images, weights and figures."""
    visible = {path.name for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert visible <= set(FOLDERS)
    for name in visible:
        folder = run_dir / name
        assert RunRecord.load(folder).stage
        assert not (folder / "checkpoints").exists() and not list(folder.rglob("*.tmp"))
        for table in folder.glob("data/*.parquet"):
            assert len(ImageSet.load(folder, table.name.split("-0")[0]))
        for path in folder.rglob("*.json"):
            json.loads(path.read_text())
        for path in folder.rglob("*.safetensors"):
            content = path.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            assert 8 + int.from_bytes(content[:8], "little") + max(ends) == len(content)
    return visible


def made_of(run_dir: Path) -> dict[str, object]:
    """All weights and images of a run, by file. Times and the run's own place, which other files tell, may differ."""
    weights = {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*.safetensors")}
    tables = {
        str(path.relative_to(run_dir)): ImageSet.load(path.parents[1], path.name.split("-0")[0]).image_ids
        for path in run_dir.rglob("*.parquet")
    }
    assert len(weights) == 6 and len(tables) == 15
    return weights | tables


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_ten_times_ends_as_an_undisturbed_one(tmp_path):
    config = write_config(tmp_path)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    Run(config, straight).finish()
    counts, hits = [], 0
    for step, delay_s in moments(straight):
        hits += Run(config, killed).kill(step, delay_s)
        counts.append(len(check_folders(killed)))
    assert hits == KILLS and counts == sorted(counts)
    assert 0 <= counts[0] < counts[-1] <= len(FOLDERS)
    Run(config, killed).finish()
    assert check_folders(killed) == set(FOLDERS)
    assert not list(killed.glob(".*.partial"))
    expected, found = (json.loads((path / "evaluation" / "metrics.json").read_text()) for path in (straight, killed))
    assert found == expected
    assert made_of(killed) == made_of(straight)
