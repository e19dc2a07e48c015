"""Finetune LoRA adapters on pairs of images (Diffusion-DPO).

    accelerate launch training/finetune_dpo.py --config training/configs/smoke/finetune_dpo.yaml

Needs a pipeline, a reward model, real images and, unless it draws its own pairs, graded images or preferences.
Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes pytorch_lora_weights.safetensors in diffusers' format, and a sample sheet for each check;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.dpo import DPOConfig
from pathalign.trainers.dpo import align


def main() -> None:
    config, output_dir = parse_config(DPOConfig, "runs/adapter")
    align(config, output_dir)


if __name__ == "__main__":
    main()
