"""Settings of the `pretrain` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import DATASET, PIPELINE, StageConfig, option


@dataclass
class PretrainConfig(StageConfig):
    """Train a class-conditional diffusion model on real images."""

    data: str = option(
        "runs/data",
        "Folder or Hub dataset with splits `train` and `validation`, made by `pathalign data`.",
        holds=DATASET,
        revision="revision",
    )
    revision: str | None = option(None, "Hub revision of `data`.")
    initial_model: str | None = option(
        None, "Pipeline whose weights training starts from (continued pretraining).", holds=PIPELINE
    )
    block_out_channels: list[int] = option([32, 64, 96], "Channels of the UNet's levels, from the finest.")
    layers_per_block: int = option(1, "Residual layers in each level.", minimum=1)
    attention_levels: list[int] = option([2], "Levels with self-attention, counted from 0 at full resolution.")
    prediction_type: Literal["v_prediction", "epsilon"] = option("v_prediction", "What the UNet predicts.")
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear"] = option(
        "squaredcos_cap_v2", "Noise schedule over 1000 training timesteps."
    )
    zero_terminal_snr: bool = option(False, "Rescale the schedule to zero terminal SNR (needs v_prediction).")
    steps: int = option(4000, "Optimizer steps.", minimum=1)
    batch_size: int = option(8, "Images in a micro-batch, per device.", minimum=1)
    gradient_accumulation_steps: int = option(1, "Micro-batches in one optimizer step.", minimum=1)
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW; cosine decay to zero.", minimum=0.0)
    warmup_steps: int = option(100, "Steps of linear warm-up.", minimum=0)
    weight_decay: float = option(0.01, "Decoupled weight decay.", minimum=0.0)
    ema_decay: float = option(
        0.995, "Decay of the weights' moving average, which is what is saved.", minimum=0.0, maximum=1.0
    )
    class_dropout: float = option(0.1, "Share of images trained without class, for guidance.", minimum=0.0, maximum=1.0)
    augment: Literal["flips_rotations", "none"] = option(
        "flips_rotations", "Random flips and quarter turns, or nothing."
    )
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = option(
        "no", "Precision of the forward pass, by Accelerate; `auto` is bf16 where the device computes in it, else no."
    )
    validate_every_steps: int = option(
        200, "Steps between validations; the best validated weights are kept.", minimum=1
    )
    checkpoint_every_steps: int = option(200, "Steps between checkpoints.", minimum=1)
    keep_checkpoints: int = option(2, "Newest checkpoints that are kept.", minimum=1)
    sample_every_steps: int = option(0, "Steps between sample sheets; 0 draws one at the end.", minimum=0)
    trackers: list[str] = option([], "Trackers beside log.jsonl: tensorboard, trackio.")
    seed: int = option(0, "Seed of the weights, batches and noise.", minimum=0)

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = []
        if not self.block_out_channels or any(channels % 8 for channels in self.block_out_channels):
            found.append(f"`block_out_channels` is {self.block_out_channels}; use multiples of 8.")
        if any(not 0 <= level < len(self.block_out_channels) for level in self.attention_levels):
            found.append(f"`attention_levels` is {self.attention_levels}; use 0 to {len(self.block_out_channels) - 1}.")
        if self.zero_terminal_snr and self.prediction_type != "v_prediction":
            found.append(
                "`zero_terminal_snr` needs `prediction_type: v_prediction`: pure noise has no epsilon to learn from."
            )
        return found + tracker_problems(self.trackers)


def tracker_problems(trackers: list[str]) -> list[str]:
    """Say which trackers are unknown."""
    unknown = sorted(set(trackers) - {"tensorboard", "trackio"})
    return [f"`trackers` names {unknown}; use tensorboard or trackio."] if unknown else []
