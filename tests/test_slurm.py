"""The scripts for Slurm, without Slurm: their syntax, what they name, and what they do under a stand-in for srun."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner

from pathalign.cli import main
from pathalign.config import build, read_yaml
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import RunRecord
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.score import ScoreConfig

PROJECT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((PROJECT / "training" / "slurm").glob("*.sbatch"))
COMMANDS = {"align": (0, 1), "generate": (2, 0)}  # how often each says `pathalign`, and `accelerate launch`
CONFIGS = {"finetune_ddpo": DDPOConfig, "generate_shards": GenerateConfig, "score_shards": ScoreConfig}
# What `man sbatch` of Slurm 24 lists, as far as a script here may need it.
SBATCH = "job-name nodes ntasks-per-node gpus-per-node gpus-per-task cpus-per-task time requeue output array".split()
# One machine plays several: srun starts all tasks at once, each with its own numbers, and fails if one of them does.
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_NODEID=$((task / TASKS_PER_NODE)) SLURM_LOCALID=$((task % TASKS_PER_NODE)) "$@" &
    tasks[$task]=$!
done
failed=0
for task in "${tasks[@]}"; do wait "$task" || failed=1; done
exit $failed
"""


def without_comments(path: Path) -> str:
    return re.sub(r"\\\n\s*", " ", re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE))


def sbatch(script: str, folder: Path, nodes: int, tasks_per_node: int, **more: str) -> subprocess.CompletedProcess:
    """Run a script as Slurm would, on this machine, with the configurations in `folder`."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    python = f'#!/bin/bash\nexec {sys.executable} -m {{}} "$@"\n'
    programs = {"srun": SRUN, "scontrol": "#!/bin/bash\necho 127.0.0.1\necho elsewhere\n"}
    programs |= {
        "pathalign": python.format("pathalign.cli"),
        "accelerate": python.format("accelerate.commands.accelerate_cli"),
    }
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    variables = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "CONFIGS": str(folder),
    }
    variables |= {"SLURM_NNODES": str(nodes), "SLURM_NTASKS": str(nodes * tasks_per_node), "SLURM_CPUS_PER_TASK": "1"}
    variables |= {
        "TASKS_PER_NODE": str(tasks_per_node),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    path = PROJECT / "training" / "slurm" / f"{script}.sbatch"
    return subprocess.run(["bash", path], env=variables, cwd=PROJECT, capture_output=True, text=True, timeout=300)


def test_there_are_two_scripts():
    assert [path.stem for path in SCRIPTS] == ["align", "generate"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_is_valid_and_stands_in_the_table(path: Path):
    subprocess.run(["bash", "-n", path], check=True)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=\S+)?$", path.read_text(), flags=re.MULTILINE)
    assert len(options) == path.read_text().count("#SBATCH") and set(options) <= set(SBATCH)
    assert f"sbatch training/slurm/{path.name}" in (PROJECT / "training" / "README.md").read_text()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_option_of_a_command_exists(path: Path):
    text = without_comments(path)
    commands = re.findall(r"pathalign ((?:[a-z]+ )+)--", text)
    launches = re.findall(r"accelerate launch (.*?) training/\w+\.py", text)
    assert (len(commands), len(launches)) == COMMANDS[path.stem]
    for command in commands:
        result = CliRunner().invoke(main, [*command.split(), "--help"])
        assert result.exit_code == 0 and "--config" in result.output
    known = {option for action in launch_command_parser()._actions for option in action.option_strings}
    for launch in launches:
        used = re.findall(r"--\w+", launch)
        assert len(used) > 5 and set(used) <= known
    for script in re.findall(r"training/\w+\.py", text):
        assert (PROJECT / script).is_file()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_configuration_that_is_named_is_accepted(path: Path):
    names = re.findall(r"\$CONFIGS/(\w+)\.yaml", without_comments(path))
    assert names
    for name in names:
        values = read_yaml(PROJECT / "training" / "configs" / "multi-node" / f"{name}.yaml")
        assert values.pop("output_dir").startswith("runs/multi-node/")
        build(CONFIGS[name], values)


def test_each_configuration_reads_what_the_one_before_writes():
    configs = PROJECT / "training" / "configs" / "multi-node"
    align, draw, score = (read_yaml(configs / f"{name}.yaml") for name in CONFIGS)
    assert (draw["adapter"], draw["model"]) == (align["output_dir"], align["base_model"])
    assert (score["candidates"], score["reward_model"]) == (draw["output_dir"], align["reward_model"])
    assert len(draw["classes"]) * draw["images_per_class"] == 1_000_000


@pytest.mark.slow
def test_generate_draws_and_scores_with_one_process_for_each_task(tiny_pipeline, tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path / "model")
    model = RewardModel(RewardModelConfig(class_names=["a", "b", "c"], criteria=[], convnet_channels=[8, 8]))
    model.save_with_processor(tmp_path / "reward")
    draw = {"model": f"{tmp_path}/model", "images_per_class": 4, "images_per_shard": 3, "inference_steps": 1}
    score = {"candidates": f"{tmp_path}/set", "reward_model": f"{tmp_path}/reward", "output_dir": f"{tmp_path}/scores"}
    (tmp_path / "generate_shards.yaml").write_text(yaml.safe_dump({**draw, "output_dir": f"{tmp_path}/set"}))
    (tmp_path / "score_shards.yaml").write_text(yaml.safe_dump(score))
    done = sbatch("generate", tmp_path, nodes=1, tasks_per_node=2)
    assert done.returncode == 0, done.stderr
    assert [len(part) for part in ImageSet.shards(tmp_path / "set")] == [3, 3, 3, 3]
    assert RunRecord.load(tmp_path / "scores").metrics["n"] == 12
    assert done.stdout.split() == [f"{tmp_path}/set", f"{tmp_path}/scores"]  # the first process speaks for all


@pytest.mark.slow
def test_align_trains_one_adapter_with_two_machines(tiny_pipeline, tiny_images: ImageSet, tmp_path: Path):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    tiny_images.save(tmp_path / "data")
    model = RewardModel(RewardModelConfig(class_names=["a", "b", "c"], criteria=[], convnet_channels=[8, 8]))
    model.save_with_processor(tmp_path / "reward")
    values = {name: f"{tmp_path}/{name.removesuffix('_model')}" for name in ("base_model", "reward_model", "data")}
    values |= {"output_dir": f"{tmp_path}/adapter", "epochs": 1, "images_per_class": 4, "batch_size": 12}
    values |= {"inference_steps": 3, "train_steps": 1, "lora_rank": 2, "check_images_per_class": 2}
    (tmp_path / "finetune_ddpo.yaml").write_text(yaml.safe_dump(values))
    more = {"SLURM_GPUS_ON_NODE": "1", "PORT": str(free_port()), "MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    done = sbatch("align", tmp_path, nodes=2, tasks_per_node=1, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "reward" in row] == [1]
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
