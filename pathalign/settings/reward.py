"""Settings of the `reward` stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pathalign.config import BACKBONE, DATASET, StageConfig, option
from pathalign.settings.pretrain import tracker_problems


@dataclass
class RewardConfig(StageConfig):
    """Train the reward model on graded images and real pairs."""

    feedback: str = option(
        "runs/feedback",
        "Feedback dataset with splits `train`, `validation`, `test`: a folder or Hub id.",
        holds=DATASET,
        revision="feedback_revision",
    )
    feedback_revision: str | None = option(None, "Hub revision of `feedback`.")
    data: str = option(
        "runs/data",
        "Real images, split `train`, for matched and mismatched pairs: a folder or Hub id.",
        holds=DATASET,
        revision="data_revision",
    )
    data_revision: str | None = option(None, "Hub revision of `data`.")
    encoder: str = option(
        "convnet",
        "`convnet` or `densenet` (from scratch), `efficientnet-lite0`, or a transformers backbone: Hub id or folder.",
        holds=BACKBONE,
        revision="encoder_revision",
    )
    encoder_revision: str | None = option(None, "Hub revision of `encoder`.")
    grades: Literal["all", "even", "odd"] = option(
        "all", "Graded training images to learn from: all, or every second one of each class and verdict."
    )
    freeze_encoder: bool = option(False, "Train the heads only, on a pretrained encoder.")
    image_size_px: int | None = option(
        None, "Size that images get first; if empty, the encoder's own or that of the feedback.", minimum=16
    )
    num_members: int = option(
        1, "Independently started networks (heads on a pretrained encoder) that are averaged.", minimum=1, maximum=16
    )
    real_share: float = option(
        0.5,
        "Share of real pairs in each batch; the rest are graded images. At 1 no grade is learned from, nor chosen by: "
        "real pairs of split `validation` choose the epoch; grades only test.",
        minimum=0.0,
        maximum=1.0,
    )
    criteria_weight: float = option(0.3, "Weight of the criterion heads in the loss.", minimum=0.0)
    augment: Literal["full", "flips_rotations", "none"] = option(
        "full", "`full` adds shifts, brightness, contrast, colour balance and noise to flips and quarter turns."
    )
    label_smoothing: float = option(
        0.02, "Share of the way to 0.5 that training labels are moved.", minimum=0.0, maximum=0.5
    )
    epochs: int = option(
        40, "Passes over the graded images; after each the model is validated and a checkpoint saved.", minimum=1
    )
    max_steps: int | None = option(None, "Optimizer steps, in place of `epochs`.", minimum=1)
    batch_size: int = option(64, "Images in a batch, per device.", minimum=4)
    learning_rate: float = option(2e-3, "Peak learning rate of AdamW; warm-up, then cosine decay to zero.", minimum=0.0)
    weight_decay: float = option(0.05, "Decoupled weight decay.", minimum=0.0)
    select_by: Literal["roc_auc", "nll"] = option("roc_auc", "Validation figure whose best epoch is kept.")
    patience_epochs: int = option(10, "Stop after this many epochs without a better `select_by`.", minimum=1)
    min_graded: int = option(20, "Fewest graded training images that a reward model is trained on.", minimum=2)
    trackers: list[str] = option([], "Trackers beside log.jsonl: tensorboard, trackio.")
    seed: int = option(0, "Seed of the weights, pairs and augmentation.", minimum=0)

    def problems(self) -> list[str]:
        """Checks across fields."""
        found = []
        if self.freeze_encoder and self.encoder in ("convnet", "densenet"):
            found.append(
                "`freeze_encoder` needs a pretrained encoder such as efficientnet-lite0; "
                f"`{self.encoder}` starts from scratch."
            )
        return found + tracker_problems(self.trackers)
