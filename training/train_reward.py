"""Train the reward model on graded images and real pairs.

    accelerate launch training/train_reward.py --config training/configs/smoke/train_reward.yaml

Needs a feedback dataset and real images. Hardware: two CPU cores for 32x32 pixels; a GPU for more.
Writes a transformers model with its image processor, and evaluation.json;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.settings.reward import RewardConfig
from pathalign.trainers.reward import train_reward


def main() -> None:
    config, output_dir = parse_config(RewardConfig, "runs/reward")
    train_reward(config, output_dir)


if __name__ == "__main__":
    main()
