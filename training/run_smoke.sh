#!/usr/bin/env bash
# The whole loop in its order: the executable table of contents of this folder.
#
#   training/run_smoke.sh                                      drawn images, minutes on a CPU
#   training/run_smoke.sh reference                            the settings behind the README's numbers, on real cells
#   LAUNCH="accelerate launch" training/run_smoke.sh           each script by Accelerate
set -euo pipefail
cd "$(dirname "$0")/.."

name=${1:-smoke}
configs=training/configs/$name
runs=runs/$name
launch=${LAUNCH:-python}

pathalign data --config "$configs/data.yaml"
$launch training/pretrain.py --config "$configs/pretrain.yaml"
pathalign grade fit --config "$configs/grader.yaml"
pathalign grade fit --config "$configs/judge.yaml"
$launch training/generate.py --config "$configs/generate.yaml"
pathalign grade simulate --config "$configs/grade.yaml"
$launch training/build_feedback.py --config "$configs/build_feedback.yaml"
$launch training/train_reward.py --config "$configs/train_reward.yaml"
$launch training/finetune_reward_weighted.py --config "$configs/finetune_reward_weighted.yaml"
# Further adapters of the same base model, side by side: four by methods that a held-out reward model guards, and one
# that splits a class by subtype marks.
$launch training/train_reward.py --config "$configs/train_reward_even.yaml"
$launch training/train_reward.py --config "$configs/train_held_out_reward.yaml"
for method in ddpo grpo draft dpo concepts; do
  $launch "training/finetune_$method.py" --config "$configs/finetune_$method.yaml"
done
$launch training/pretrain.py --config "$configs/control.yaml"
$launch training/generate.py --config "$configs/sample.yaml"
$launch training/generate.py --config "$configs/sample.yaml" --adapter "$runs/adapter" --output_dir "$runs/samples_after"
$launch training/generate.py --config "$configs/sample.yaml" --model "$runs/control" --output_dir "$runs/samples_control"
$launch training/generate.py --config "$configs/sample.yaml" --best_of 4 --reward_model "$runs/reward" \
  --output_dir "$runs/samples_best_of_n"
$launch training/run_evaluation.py --config "$configs/evaluate.yaml"
