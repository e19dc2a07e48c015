"""Finetune LoRA adapters on reward-weighted denoising.

    accelerate launch training/finetune_reward_weighted.py --config training/configs/smoke/finetune_reward_weighted.yaml

Needs a pipeline, a reward model and real images. Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes pytorch_lora_weights.safetensors in diffusers' format, and samples;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.trainers.reward_weighted import align


def main() -> None:
    config, output_dir = parse_config(RewardWeightedConfig, "runs/adapter")
    align(config, output_dir)


if __name__ == "__main__":
    main()
