"""Compare candidate sets from before and after the alignment with real images.

    accelerate launch training/run_evaluation.py --config training/configs/smoke/evaluate.yaml

Needs candidate sets made with the same seeds, a judge and real images. Hardware: one CPU core.
Writes metrics.json, report.html and its figures;
time and memory are in training/README.md. `--key value` overrides the file, `--help` lists the keys.
"""

from pathalign.config import parse_config
from pathalign.evaluate import evaluate
from pathalign.settings.evaluate import EvaluateConfig


def main() -> None:
    config, output_dir = parse_config(EvaluateConfig, "runs/evaluation")
    evaluate(config, output_dir)


if __name__ == "__main__":
    main()
