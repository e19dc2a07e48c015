"""Train a class-conditional diffusion model on real images.

    accelerate launch training/pretrain.py --config training/configs/smoke/pretrain.yaml

Needs the folder that `pathalign data` wrote. Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes a pipeline in diffusers' layout with log.jsonl and a sample sheet;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.pretrain import pretrain


def main() -> None:
    config, output_dir = parse_config(PretrainConfig, "runs/base")
    pretrain(config, output_dir)


if __name__ == "__main__":
    main()
