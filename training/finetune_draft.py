"""Finetune LoRA adapters by the gradient of the reward through the last sampling steps (DRaFT).

    accelerate launch training/finetune_draft.py --config training/configs/smoke/finetune_draft.yaml

Needs a pipeline, a reward model (no Python function: it has no gradient) and real images.
Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes pytorch_lora_weights.safetensors in diffusers' format, and a sample sheet for each check;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.draft import DraftConfig
from pathalign.trainers.draft import align


def main() -> None:
    config, output_dir = parse_config(DraftConfig, "runs/adapter")
    align(config, output_dir)


if __name__ == "__main__":
    main()
