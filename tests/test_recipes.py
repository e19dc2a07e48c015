"""Every YAML file of the recipes and of training/ is one that its stage accepts."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from pathalign import workflow
from pathalign.config import build, parse_config, read_yaml
from pathalign.settings.pretrain import PretrainConfig
from pathalign.stages import METHODS, STAGES, load

PROJECT = Path(__file__).resolve().parents[1]
CONFIGS = PROJECT / "training" / "configs"
RECIPES = sorted(workflow.RECIPES.glob("*.yaml"))
# What each file in training/configs/*/ configures: stage, and the folder of a run that it is for.
FILES = {
    "data": ("data", "data"),
    "pretrain": ("pretrain", "base"),
    "grader": ("graders", "grader"),
    "judge": ("graders", "judge"),
    "generate": ("generate", "candidates"),
    "grade": ("grade", "grades"),
    "build_feedback": ("feedback", "feedback"),
    "train_reward": ("reward", "reward"),
    "finetune_reward_weighted": ("align", "adapter"),
    "control": ("control", "control"),
    "sample": ("sample", "samples_before"),
    "evaluate": ("evaluate", "evaluation"),
}
# Reward models of the policy trainers: their folder, and that of the step in a run by such a method.
GUARD_FILES = {"train_reward_even": ("reward_even", "reward"), "train_held_out_reward": ("held_out_reward",) * 2}
METHOD_FILES = {f"finetune_{name}": name for name in ("ddpo", "grpo", "draft", "dpo", "concepts")}
GPU_FILES = ["multi-gpu/accelerate", "multi-gpu/finetune_ddpo", "multi-node/accelerate", "multi-node/finetune_ddpo"]
GPU_FILES += ["single-gpu/finetune_ddpo", "multi-node/generate_shards", "multi-node/score_shards"]
METHODS_BY_NAME = {method.name: method for method in METHODS}


def stage(name):
    return next(item for item in STAGES if item.name == name)


def test_there_are_two_recipes_and_two_full_sets_of_training_configurations():
    assert [path.stem for path in RECIPES] == ["demo_phantom", "demo_real"]
    found = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
    sets = [f"{folder}/{name}" for folder in ("smoke", "reference") for name in (*FILES, *GUARD_FILES, *METHOD_FILES)]
    assert found == sorted(f"{name}.yaml" for name in (*sets, *GPU_FILES))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_configures_all_stages_at_any_length(path, tmp_path):
    values = read_yaml(path)
    assert values["minutes"] > 0
    for minutes in (None, 0.1, 1000):
        jobs = workflow.plan(workflow.recipe(path.stem, minutes), tmp_path)
        assert len(jobs) == 15


def test_minutes_scale_steps_and_images_and_nothing_else():
    nominal = workflow.recipe("demo_real")
    double = workflow.recipe("demo_real", 2 * nominal["minutes"])
    assert double["pretrain"]["steps"] == 2 * nominal["pretrain"]["steps"]
    assert double["sample"]["images_per_class"] == 2 * nominal["sample"]["images_per_class"]
    assert double["sample"]["best_of_n"] == nominal["sample"]["best_of_n"]
    assert double["data"] == nominal["data"]
    assert workflow.recipe("demo_real", 0.001)["pretrain"]["steps"] == workflow.FLOORS["steps"]


def configurations(names):
    return [path for path in sorted(CONFIGS.rglob("*.yaml")) if path.stem in names]


@pytest.mark.parametrize("path", configurations(METHOD_FILES), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_methods_configuration_is_accepted_and_has_a_folder_of_its_own(path):
    values, name = read_yaml(path), METHOD_FILES[path.stem]
    run_dir = f"runs/{path.parent.name}"
    assert values.pop("output_dir") == f"{run_dir}/adapter_{name}"
    config = build(load(METHODS_BY_NAME[name].settings), values)
    if path.parent.name not in ("smoke", "reference"):
        return
    assert (config.reward_model, config.data) == (f"{run_dir}/reward_even", f"{run_dir}/data")
    if name != "concepts":
        assert config.held_out_reward_model == f"{run_dir}/held_out_reward"
    if path.parent.name == "reference":  # all else as it is by default
        inputs = {"base_model", "reward_model", "held_out_reward_model", "data", "feedback", "subtypes"}
        plain = asdict(type(config)())
        assert {key: value for key, value in asdict(config).items() if key not in inputs} == {
            key: value for key, value in plain.items() if key not in inputs
        }


@pytest.mark.parametrize("path", configurations(["accelerate"]), ids=lambda path: path.parent.name)
def test_accelerate_understands_its_files(path):
    config = load_config_from_file(str(path))
    assert config.distributed_type == "MULTI_GPU" and config.num_processes > 1 and config.mixed_precision == "bf16"


@pytest.mark.parametrize("path", configurations(FILES), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_training_configuration_is_accepted_and_writes_where_the_next_one_reads(path):
    stage_name, folder = FILES[path.stem]
    values = read_yaml(path)
    run_dir = f"runs/{path.parent.name}"
    assert values.pop("output_dir") == f"{run_dir}/{folder}"
    config = asdict(build(load(stage(stage_name).settings), values))
    step = next(step for step in stage(stage_name).steps if step.folder == folder)
    read = {name: config[name] for name in step.inputs if name in config}
    assert {name: value[0] if isinstance(value, list) else value for name, value in read.items()} == {
        name: f"{run_dir}/{source}" for name, source in step.inputs.items() if name in config
    }


@pytest.mark.parametrize("name", FILES)
def test_the_reference_settings_are_those_of_the_demo_on_real_cells(name):
    _, folder = FILES[name]
    jobs = workflow.plan(workflow.recipe("demo_real"), Path("runs/reference"))
    wanted = asdict(next(job.config for job in jobs if job.folder.name == folder))
    values = read_yaml(CONFIGS / "reference" / f"{name}.yaml")
    values.pop("output_dir")
    if name == "data":
        wanted["source"] = values["source"]  # the demo gets it from --data
    job = next(job for job in jobs if job.folder.name == folder)
    assert asdict(build(type(job.config), values)) == wanted


@pytest.mark.parametrize("path", configurations(GUARD_FILES), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_guard_and_what_it_guards_are_those_of_a_run_by_a_policy_trainer(path):
    values, (folder, step) = read_yaml(path), GUARD_FILES[path.stem]
    run_dir = f"runs/{path.parent.name}"
    assert values.pop("output_dir") == f"{run_dir}/{folder}"
    recipe = workflow.merge(workflow.recipe("demo_real"), {"align": {"method": "ddpo"}})
    wanted = next(job.config for job in workflow.plan(recipe, Path(run_dir)) if job.folder.name == step)
    assert build(type(wanted), values) == replace(wanted, epochs=values["epochs"])
    if path.parent.name == "reference":
        assert values["epochs"] == wanted.epochs


def test_every_script_is_in_the_table_and_in_the_smoke_run():
    scripts = sorted(path.name for path in (PROJECT / "training").glob("*.py"))
    assert len(scripts) == 11
    table = (PROJECT / "training" / "README.md").read_text()
    smoke = (PROJECT / "training" / "run_smoke.sh").read_text()
    looped = re.search(r"for method in (.*?);", smoke)[1].split()
    assert looped == list(METHOD_FILES.values())
    for script in scripts:
        assert f"`{script}`" in table
        assert f"training/{script}" in smoke or ("training/finetune_$method.py" in smoke and script[9:-3] in looped)
    used = set(re.findall(r"\$configs/(\w+)\.yaml", smoke))
    assert used == {*FILES, *GUARD_FILES}


def test_no_script_hides_a_library_that_the_package_imports():
    # Python looks in the folder of the script first: `import evaluate` would find a training/evaluate.py.
    text = "\n".join(path.read_text() for path in (PROJECT / "pathalign").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:import|from) (\w+)", text, flags=re.MULTILINE))
    assert {"torch", "click"} <= imported
    assert not imported & {path.stem for path in (PROJECT / "training").glob("*.py")}


def test_scripts_take_a_file_and_override_it(tmp_path):
    path = tmp_path / "pretrain.yaml"
    path.write_text(
        "output_dir: there\nsteps: 7\nlearning_rate: 1e-4\nblock_out_channels: [8, 16]\nattention_levels: []\n"
    )
    arguments = ["--config", str(path), "--steps", "9", "--zero_terminal_snr", "--prediction-type", "v_prediction"]
    config, output_dir = parse_config(PretrainConfig, "here", arguments)
    assert output_dir == Path("there")
    assert config == PretrainConfig(
        steps=9, learning_rate=1e-4, block_out_channels=[8, 16], attention_levels=[], zero_terminal_snr=True
    )
    assert parse_config(PretrainConfig, "here", [])[1] == Path("here")


def test_scripts_name_all_wrong_keys_at_once_and_exit_with_2(tmp_path, capsys):
    path = tmp_path / "pretrain.yaml"
    path.write_text(yaml.safe_dump({"stepz": 3, "ema_decay": 2.0}))
    with pytest.raises(SystemExit) as exit_info:
        parse_config(PretrainConfig, "here", ["--config", str(path), "--lerning_rate", "1"])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    for text in ("`stepz` is not known; did you mean `steps`?", "did you mean `learning_rate`?", "`ema_decay` is 2.0"):
        assert text in message


def test_scripts_explain_a_missing_file(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_config(PretrainConfig, "here", ["--config", "no/such.yaml"])
    assert exit_info.value.code == 2
    assert "no/such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("entry", STAGES, ids=lambda entry: entry.name)
def test_trls_parser_understands_the_settings_of_every_stage(entry):
    config_class = load(entry.settings)
    needed = ["--data", "a", "--before", "b", "--after", "c", "--judge", "d"] if entry.name == "evaluate" else []
    config, _ = parse_config(config_class, "here", needed)
    assert config.seed == 0
