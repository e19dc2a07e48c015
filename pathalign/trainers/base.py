"""The life of a training run: where it runs, what it logs, how it goes on after an interruption. No algorithms."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor

from pathalign.artefacts import write_atomically
from pathalign.progress import say
from pathalign.schema import InputError
from pathalign.settings.adapter import AdapterConfig
from pathalign.settings.pretrain import PretrainConfig

Config = TypeVar("Config", bound=PretrainConfig | AdapterConfig)
CHECKPOINT = re.compile(r"step-(\d+)\.pt")


def cosine_rate(step: int, steps: int, warmup_steps: int) -> float:
    """Factor of the learning rate: linear warm-up to 1, then half a cosine to 0."""
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def require_finite(loss: Tensor, step: int, learning_rate: float) -> None:
    """Stop a run whose loss is no number any more.

    Raises:
        InputError: If `loss` is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise InputError(
            f"The loss is {loss.item()} at step {step} with learning rate {learning_rate:g}: the run was stopped and "
            "its checkpoints are kept. Lower `learning_rate`, or use `mixed_precision: no`."
        )


class RunFolder:
    """Log, trackers and checkpoints of one run, inside the working folder of its artefact.

    Args:
        folder: Working folder; checkpoints go to `checkpoints` below it.
        accelerator: Only its main process writes.
        config: Resolved configuration: a checkpoint of another one is not used.
        trackers: Names of trackers beside `log.jsonl`: tensorboard, trackio.
        keep_checkpoints: Newest checkpoints that are kept.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        config: dict[str, Any],
        trackers: list[str],
        keep_checkpoints: int = 2,
    ) -> None:
        self.folder, self.accelerator, self.config = folder, accelerator, config
        self.keep_checkpoints = keep_checkpoints
        self.trackers = trackers
        (folder / "checkpoints").mkdir(exist_ok=True)
        if trackers:
            flat = {
                key: value if isinstance(value, (int, float, str, bool)) else str(value)
                for key, value in config.items()
            }
            accelerator.init_trackers("pathalign", config=flat)

    def log(self, step: int, **figures: float) -> None:
        """Append one line to `log.jsonl`, and tell the trackers."""
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **figures}) + "\n")
        if self.trackers:
            self.accelerator.log(figures, step=step)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint whole, then remove the oldest."""
        if not self.accelerator.is_main_process:
            return
        path = self.folder / "checkpoints" / f"step-{step:07d}.pt"
        temporary = path.with_suffix(".tmp")
        torch.save({"step": step, "config": self.config, **state}, temporary)
        temporary.replace(path)
        for old in self._checkpoints()[: -self.keep_checkpoints]:
            old.unlink()

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint of the same configuration, or None; log lines written after it are dropped."""
        for path in reversed(self._checkpoints()):
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state["config"] == self.config:
                say(f"Going on at step {state['step']}.")
                self._truncate_log(state["step"])
                return dict(state)
        self._truncate_log(-1)
        return None

    def close(self) -> None:
        """Finish the trackers."""
        if self.trackers:
            self.accelerator.end_training()

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.folder / "checkpoints").iterdir() if CHECKPOINT.fullmatch(path.name))

    def _truncate_log(self, step: int) -> None:
        path = self.folder / "log.jsonl"
        if path.is_file() and self.accelerator.is_main_process:
            kept = [
                line
                for line in path.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            write_atomically(path, "".join(line + "\n" for line in kept))


def computes_in_bf16(device_type: str) -> bool:
    """Whether devices of this type, as they are here, have instructions for bfloat16: emulated it is slow."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu":
        can = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return False


def with_precision(config: Config) -> Config:
    """The same configuration with `mixed_precision: auto` resolved for the device at hand."""
    if config.mixed_precision != "auto":
        return config
    return replace(config, mixed_precision="bf16" if computes_in_bf16(PartialState().device.type) else "no")


def accelerator_for(mixed_precision: str, trackers: list[str], folder: Path) -> Accelerator:
    """An Accelerator that logs below `folder`; the device is the GPU where there is one."""
    AcceleratorState._reset_state()  # an earlier stage in this process may have had another precision
    return Accelerator(mixed_precision=mixed_precision, log_with=trackers or None, project_dir=str(folder / "trackers"))
