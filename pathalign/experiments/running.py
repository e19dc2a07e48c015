"""Runs of an experiment: one process for each arm and seed, several at a time, sharing what they can."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from pathalign.experiments.recipe import CONFIG_NAME, Arm, Experiment, features_of
from pathalign.progress import say
from pathalign.schema import InputError
from pathalign.workflow import merge

LOG_NAME = "log.txt"
SHOWN_LOG_LINES = 12
PATIENCE_S = 30  # that an interrupted run gets to end


@dataclass(frozen=True)
class Run:
    """One arm with one seed, and the directory of its run."""

    experiment: Experiment
    arm: Arm
    seed: int
    folder: Path

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.experiment.name}: {self.arm.title}, seed {self.seed}"


def runs_of(experiment: Experiment, output_dir: Path) -> list[Run]:
    """All runs, those of the first arm first: what the others take over from it is then there."""
    return [
        Run(experiment, arm, seed, output_dir / experiment.name / "runs" / arm.name / f"seed-{seed}")
        for arm in experiment.arms
        if arm.runs
        for seed in experiment.seeds
    ]


def check(runs: Iterable[Run], data: str | None, minutes: float | None) -> None:
    """Plan all runs.

    Raises:
        ConfigError: If a setting of any is wrong.
    """
    for run in runs:
        run.experiment.jobs(run.arm, run.seed, run.folder, data, minutes)


def execute(
    runs: Iterable[Run], output_dir: Path, workers: int, data: str | None, minutes: float | None
) -> Generator[tuple[Experiment, InputError | None], None, None]:
    """Do all runs that are not done, whichever experiment they belong to; the same call after an interruption goes on.

    If a run fails, those of its experiment that have begun are ended and the others left out; nothing is lost. Other
    experiments go on.

    Args:
        runs: In their order.
        output_dir: Folder of all experiments, whose runs share their steps.
        workers: Processes at a time; each gets its part of the machine's cores.
        data: Real images, in place of the recipe's.
        minutes: Scales the recipe's steps and images; None leaves them.

    Yields:
        Each experiment as soon as its runs are over, with the first failure and the end of its log.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):  # a batch system or a closed terminal: end as by Ctrl-C
            signal.signal(number, signal.default_int_handler)
    waiting, active, failures = list(runs), list[_Process](), dict[str, InputError]()
    total, done, began = len(waiting), 0, time.monotonic()
    try:
        while waiting or active:
            while waiting and len(active) < workers:
                run = waiting.pop(0)
                say(f"[{total - len(waiting)}/{total}] {run.label}")
                active.append(_Process(run, output_dir, workers, data, minutes))
            time.sleep(0.2)
            for process in [one for one in active if one.ended()]:
                active.remove(process)
                done, name = done + 1, process.run.experiment.name
                try:
                    process.check()
                except InputError as error:
                    failures.setdefault(name, error)
                    waiting = [run for run in waiting if run.experiment.name != name]
                    for other in active:
                        if other.run.experiment.name == name:
                            other.interrupt()
                else:
                    left = (time.monotonic() - began) / done * (len(waiting) + len(active))
                    say(f"{process.run.label}: done; {done} of {total} runs, about {left / 60:.0f} min left")
                if all(run.experiment.name != name for run in (*waiting, *(other.run for other in active))):
                    yield process.run.experiment, failures.get(name)
    finally:
        for process in active:
            process.interrupt()
        for process in active:
            process.wait()


class _Process:
    """`pathalign run` for one run; what it says goes to `log.txt`, and the beginning of each step to the screen."""

    def __init__(self, run: Run, output_dir: Path, workers: int, data: str | None, minutes: float | None) -> None:
        self.run, self.log = run, run.folder / LOG_NAME
        run.folder.mkdir(parents=True, exist_ok=True)
        config = run.folder / CONFIG_NAME
        values = run.experiment.values(run.arm, run.seed, data, minutes)
        values = merge({"evaluate": {"feature_cache": str(features_of(output_dir))}}, values)
        config.write_text(yaml.safe_dump(values, sort_keys=False))
        command = [sys.executable, "-m", "pathalign.cli", "run", str(config), "--output-dir", str(run.folder)]
        command += ["--until", run.arm.until, "--reuse", str(output_dir), "--json"]
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={"OMP_NUM_THREADS": threads, **os.environ},
            start_new_session=True,  # Ctrl-C comes from here, once
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.log.open("a") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                if line.startswith("[") and " -> " in line:
                    say(f"{self.run.label} {line.split(' -> ')[0]}")

    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None

    def check(self) -> None:
        """Raise an `InputError` if it failed."""
        self.reader.join()
        if self.process.returncode:
            tail = "\n".join(self.log.read_text().splitlines()[-SHOWN_LOG_LINES:])
            raise InputError(
                f"{self.run.label} failed (its whole log: {self.log}):\n{tail}\n"
                "Mend the cause and run the same command again; what is done is kept."
            )

    def interrupt(self) -> None:
        """End it as Ctrl-C would, so that it keeps its checkpoints."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> None:
        """Wait for its end, but not for ever."""
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.reader.join()
