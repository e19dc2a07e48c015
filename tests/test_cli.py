"""The command: help without torch, suggestions, exit codes, and stdout that holds results only."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from pathalign import cli
from pathalign.cli import main
from pathalign.commands import stages
from pathalign.schema import InputError, RunRecord
from pathalign.stages import STAGES, stage_names

PROJECT = Path(__file__).resolve().parents[1]
STAGE_COMMANDS = ["data", "pretrain", "generate", "grade fit", "grade simulate", "feedback", "reward", "reward score"]
STAGE_COMMANDS += ["align", "evaluate"]
COMMANDS = [
    *STAGE_COMMANDS,
    "run",
    "demo",
    "experiment",
    "publish",
    "grade",
    "grade serve",
    "grade invite",
    "grade export",
    "grade import",
]
COMMANDS += ["feedback compact", "feedback pull"]
COMMANDS += ["space", "space deploy", "space logs", "space restart", "space pause"]
COMMANDS += ["study", "study next", "study replay"]
COMMANDS += ["jobs", "jobs run", "jobs logs", "jobs cancel", "jobs execute"]


def invoke(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


@pytest.fixture
def fake_stage(monkeypatch):
    """Replaces the function of every stage; yields what they were called with."""
    calls: list[tuple] = []
    module = types.ModuleType("fake_entry")

    def stage(config, output_dir):
        print("a library talks on stdout")
        calls.append((config, output_dir))
        error = getattr(module, "error", None)
        if error is not None:
            raise error
        return RunRecord(stage="fake", config={}, metrics={"loss": float("nan"), "n": 3})

    module.stage, module.calls = stage, calls
    module.summary_table = lambda metrics: f"plausible {metrics['metrics']['after']['plausible_share']}"
    load = stages.load
    monkeypatch.setattr(
        stages, "load", lambda reference: stage if not reference.endswith("Config") else load(reference)
    )
    return module


def test_every_command_is_there():
    names = [f"{name} {sub}" for name, command in main.commands.items() for sub in getattr(command, "commands", {})]
    assert sorted([*main.commands, *names]) == sorted(COMMANDS)


def test_help_of_every_command_imports_no_heavy_library():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom pathalign.cli import main\n"
        f"for name in {['', *COMMANDS]!r}:\n"
        "    result = CliRunner().invoke(main, [*name.split(), '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage:' in result.output, name\n"
        "heavy = {'torch', 'datasets', 'transformers', 'trl', 'diffusers', 'numpy', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert result.stdout.strip() == "[]"


def test_the_package_imports_without_torch_and_offers_its_names():
    code = "import pathalign, sys; assert 'torch' not in sys.modules; print(pathalign.RunRecord.__name__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert result.stdout.strip() == "RunRecord"


def test_help_lists_each_setting_with_its_default():
    text = " ".join(invoke("pretrain", "--help").output.split())
    assert "--learning-rate FLOAT" in text and "[default: 0.001]" in text
    assert "--prediction-type [v_prediction|epsilon]" in text
    assert "--zero-terminal-snr / --no-zero-terminal-snr" in text
    assert ", ".join(stage_names()) == " ".join(text_of_stages().split())


def text_of_stages() -> str:
    return invoke("run", "--help").output.split("Stages:")[1].split("\n\n")[0]


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["pretrian"], "Did you mean 'pretrain'?"),
        (["grade", "simulat"], "Did you mean 'simulate'?"),
        (["pretrain", "--lerning-rate", "1"], "--learning-rate"),
        (["align", "--method", "ddp"], "'reward-weighted'"),
        (["pretrain", "--prediction-type", "velocity"], "'v_prediction'"),
        (["pretrain", "--steps", "many"], "not a valid integer"),
        (["pretrain", "--attention-levels", "1,x"], "no list of int"),
        (["demo", "--minutes", "0"], "0.0"),
    ],
)
def test_wrong_usage_exits_with_2_and_a_suggestion(arguments, suggestion):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert suggestion in result.stderr
    assert result.stdout == ""


def test_all_wrong_settings_are_reported_at_once_with_exit_code_2(tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("stepz: 3\nbatch_size: 0\nprediction_type: velocity\n")
    result = invoke("pretrain", "--config", str(path), "--ema-decay", "2")
    assert result.exit_code == 2
    for text in ("did you mean `steps`", "`batch_size` is 0", "'velocity'", "`ema_decay` is 2.0"):
        assert text in result.stderr


def test_a_run_configuration_with_wrong_keys_and_stages_exits_with_2(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("pretrian: {}\nreward: {epoch: 3}\n")
    result = invoke("run", str(path), "--set", "align.sede=3", "--output-dir", str(tmp_path / "run"))
    assert result.exit_code == 2
    for text in ("did you mean `pretrain`", "did you mean `epochs`", "did you mean `seed`", str(path)):
        assert text in result.stderr
    path.write_text("{}")
    result = invoke("run", str(path), "--from", "aling", "--output-dir", str(tmp_path / "run"))
    assert result.exit_code == 2 and "did you mean `align`" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_missing_configuration_is_explained():
    result = invoke("run", "no/such.yaml")
    assert result.exit_code == 2
    assert "no/such.yaml cannot be used:\n- there is no such file" in result.stderr


def test_options_override_the_file_and_reach_the_stage(fake_stage, tmp_path):
    path = tmp_path / "stage.yaml"
    path.write_text("steps: 3\nlearning_rate: 1e-4\noutput_dir: from_file\n")
    arguments = [
        "pretrain",
        "--config",
        str(path),
        "--steps",
        "5",
        "--attention-levels",
        "0,1",
        "--attention-levels",
        "2",
    ]
    result = invoke(*arguments, "--zero-terminal-snr")
    assert result.exit_code == 0
    (config, output_dir), *_ = fake_stage.calls
    assert (config.steps, config.learning_rate, config.attention_levels) == (5, 1e-4, [0, 1, 2])
    assert config.zero_terminal_snr and str(output_dir) == "from_file"
    assert result.stdout == "from_file\n"
    invoke("pretrain", "--attention-levels", "", "--output-dir", "x")
    assert fake_stage.calls[-1][0].attention_levels == []


def test_graders_are_written_where_their_role_says(fake_stage):
    invoke("grade", "fit", "--role", "judge", "--architecture", "regnet")
    assert fake_stage.calls[-1][1] == Path("runs/judge")


@pytest.mark.parametrize("command", STAGE_COMMANDS)
def test_json_is_all_that_a_stage_prints_on_stdout(fake_stage, command):
    needed = ["--data", "a", "--before", "b", "--after", "c", "--judge", "d"] if command == "evaluate" else []
    result = invoke(*command.split(), "--json", "--output-dir", "there", *needed)
    assert result.exit_code == 0
    printed = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert printed["metrics"] == {"loss": None, "n": 3}
    assert printed["output_dir"] == "there"
    assert "a library talks on stdout" in result.stderr


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("Name the folder."), 1, "Error: Name the folder.\n"),
        (MemoryError(), 1, "The memory is full"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 1, "The memory is full"),
        (OSError(28, "No space left on device"), 1, "The disk is full"),
        (KeyError("x"), 1, "KeyError: 'x' (`pathalign --debug ...` shows the traceback)"),
        (KeyboardInterrupt(), 130, "Run the same command again"),
    ],
)
def test_errors_are_one_message_and_an_exit_code(fake_stage, error, code, message):
    fake_stage.error = error
    result = invoke("pretrain", "--json")
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_debug_shows_the_traceback(fake_stage):
    fake_stage.error = KeyError("x")
    assert isinstance(invoke("--debug", "pretrain").exception, KeyError)


@pytest.fixture
def fake_execute(monkeypatch, fake_stage):
    """Replaces the work of `run` and `demo`: the evaluation's files appear; yields the jobs."""
    seen: dict = {}

    def execute(jobs, run_dir, start=None, until=None, new_grades=False, reuse=None):
        seen.update(jobs={job.step.folder: job.config for job in jobs}, run_dir=run_dir, start=start, until=until)
        print("a library talks on stdout")
        (run_dir / "evaluation").mkdir(parents=True)
        metrics = {"metrics": {"after": {"plausible_share": 0.8}}, "reward": {"roc_auc": 0.9, "ece": 0.05}}
        metrics |= {"gap_closed": 0.4, "plausible_gain_ci": [0.1, float("inf")]}
        (run_dir / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
        return [cli.StepResult("evaluate", run_dir / "evaluation", "kept", 3.0, 1e6)]

    monkeypatch.setattr(cli, "execute", execute)
    load = cli.load
    fakes = {"pathalign.evaluate:summary_table": fake_stage.summary_table}
    monkeypatch.setattr(cli, "load", lambda reference: fakes.get(reference) or load(reference))
    return seen


def test_demo_prints_one_json_object_with_cost_and_metrics(fake_execute, tmp_path):
    run_dir = tmp_path / "demo"
    result = invoke("demo", "--data", "some/cells", "--seed", "4", "--output-dir", str(run_dir), "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["simulated"] is True
    assert printed["report"] == str(run_dir / "evaluation" / "report.html")
    assert printed["reward"] == {"roc_auc": 0.9, "ece": 0.05}
    assert printed["metrics"]["after"]["plausible_share"] == 0.8
    assert printed["plausible_gain_ci"] == [0.1, None]
    assert printed["wall_s"] >= 0 and printed["peak_rss_mb"] == 1e6
    assert fake_execute["jobs"]["data"].source == "some/cells"
    assert fake_execute["jobs"]["base"].seed == 4


def test_demo_aligns_by_the_method_that_is_named(fake_execute, tmp_path):
    result = invoke("demo", "--method", "draft", "--output-dir", str(tmp_path / "demo"))
    assert result.exit_code == 0, result.stderr
    assert fake_execute["jobs"]["adapter"].method == "draft"
    assert fake_execute["jobs"]["adapter"].held_out_reward_model == str(tmp_path / "demo" / "held_out_reward")


def test_demo_without_arguments_uses_the_phantom_and_ends_with_the_table(fake_execute, tmp_path):
    result = invoke("demo", "--minutes", "1", "--output-dir", str(tmp_path / "demo"))
    assert result.exit_code == 0, result.stderr
    assert fake_execute["jobs"]["data"].source == "phantom"
    assert fake_execute["jobs"]["adapter"].method == "reward-weighted"
    assert result.stdout.startswith("plausible 0.8\n")
    assert "report.html" in result.stdout and "Never for diagnosis" in result.stdout


def test_run_takes_overrides_and_stages_and_prints_json(fake_execute, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"output_dir: {tmp_path / 'there'}\npretrain: {{steps: 5}}\n")
    overrides = ["--set", "pretrain.learning_rate=1e-4", "--set", "sample.best_of_n.best_of=2"]
    result = invoke("run", str(path), *overrides, "--from", "align", "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["output_dir"] == str(tmp_path / "there")
    assert printed["evaluation"]["gap_closed"] == 0.4
    assert printed["steps"][0]["status"] == "kept"
    jobs = fake_execute["jobs"]
    assert (jobs["base"].steps, jobs["base"].learning_rate, jobs["samples_best_of_n"].best_of) == (5, 1e-4, 2)
    assert (fake_execute["start"], fake_execute["until"]) == ("align", None)


def test_run_takes_rounds_and_the_grades_to_wait_for(fake_execute, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("grade: {method: pull, source: lab/grades}\n")
    result = invoke(
        "run", str(path), "--output-dir", str(tmp_path / "r"), "--rounds", "2", "--min-grades", "7", "--json"
    )
    assert result.exit_code == 0, result.stderr
    jobs = fake_execute["jobs"]
    assert (jobs["round-2/grades"].min_grades, jobs["round-2/grades"].source) == (7, "lab/grades")
    path.write_text("{}")
    for option in (["--min-grades", "7"], ["--new-grades"]):
        result = invoke("run", str(path), "--output-dir", str(tmp_path / "r"), *option)
        assert result.exit_code == 2 and "set `grade.method=pull`" in result.stderr and option[0] in result.stderr


def test_every_stage_has_a_command_or_is_one_of_another_stage():
    without = {stage.name for stage in STAGES} - set(main.commands)
    # `grade fit`, `pretrain --initial-model`, `generate`, `study replay`
    assert without == {"graders", "control", "sample", "select"}
