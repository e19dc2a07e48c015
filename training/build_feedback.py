"""Turn raw grades into a feedback dataset.

    accelerate launch training/build_feedback.py --config training/configs/smoke/build_feedback.yaml

Needs a candidate set, and grades of it from the Space or from `pathalign grade simulate`. Hardware: one CPU core.
Writes a dataset with splits train, validation and test, and agreement.json;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.feedback import build
from pathalign.settings.feedback import FeedbackConfig


def main() -> None:
    config, output_dir = parse_config(FeedbackConfig, "runs/feedback")
    build(config, output_dir)


if __name__ == "__main__":
    main()
