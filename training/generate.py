"""Sample a candidate set from a pipeline, with or without an adapter.

    accelerate launch training/generate.py --config training/configs/smoke/generate.yaml

Needs a pipeline that `training/pretrain.py` wrote. Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes an image set, each image with its seed, class, model and adapter;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.generate import generate
from pathalign.settings.generate import GenerateConfig


def main() -> None:
    config, output_dir = parse_config(GenerateConfig, "runs/candidates")
    generate(config, output_dir)


if __name__ == "__main__":
    main()
