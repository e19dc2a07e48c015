"""Finetune LoRA adapters by policy gradient (DDPO).

    accelerate launch training/finetune_ddpo.py --config training/configs/smoke/finetune_ddpo.yaml

Needs a pipeline, a reward model and real images.
Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes pytorch_lora_weights.safetensors in diffusers' format, and a sample sheet for each check;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.ddpo import DDPOConfig
from pathalign.trainers.ddpo import align


def main() -> None:
    config, output_dir = parse_config(DDPOConfig, "runs/adapter")
    align(config, output_dir)


if __name__ == "__main__":
    main()
