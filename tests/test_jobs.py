"""Jobs on rented machines, typed as users type them, against the loopback Hub, whose machines are processes here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml
from hub import HubServer, serve
from hub.faults import Fault
from test_hub_server import client

from pathalign import jobs
from pathalign.config import ConfigError
from pathalign.hub.jobs import seconds
from pathalign.images import ImageSet
from pathalign.jobs import JobSpec
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import InputError

pytestmark = pytest.mark.hub
TOKEN = "hf_" + "t" * 34
DATA = {"source": "phantom", "image_size_px": 16, "per_class": 4, "phantom_per_class": 24}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub") as server:
        server.store.add_token(TOKEN, "lab")
        yield server


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Settings of a stage that takes no input and little time."""
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(DATA))
    return path


def start(hub: HubServer, folder: Path, *arguments: str, **more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "pathalign.cli", "jobs", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, env=hub.variables(folder / "home", TOKEN, **more), cwd=folder, text=True, **pipes)


def pathalign(hub: HubServer, folder: Path, *arguments: str, **more: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; neither ever holds the token."""
    process = start(hub, folder, *arguments, **more)
    out, err = process.communicate(timeout=120)
    assert TOKEN not in out + err
    return process.returncode, out, err


def arguments(config: Path, *more: str, stage: str = "data") -> list[str]:
    return ["run", str(config), "--stage", stage, "--flavor", "cpu-basic", "--output-repo", "lab/cells", *more]


def ask(hub: HubServer, path: str) -> Any:
    return json.load(urlopen(Request(f"{hub.endpoint}{path}", headers={"Authorization": f"Bearer {TOKEN}"})))


def files(hub: HubServer, name: str = "lab/cells", kind: str = "datasets") -> list[str]:
    """What the output repo holds, beside what a new one holds."""
    found = ask(hub, f"/api/{kind}/{name}")["siblings"]
    return sorted(file["rfilename"] for file in found if file["rfilename"] != ".gitattributes")


def wait_for(condition: Any, limit_s: float = 60) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s
        time.sleep(0.05)


def command_lines_until(process: subprocess.Popen, text: str) -> set[str]:
    """Command lines of all processes that the tests have started, until one has this text and some time after."""
    seen: set[str] = set()
    left = 20
    while left and process.poll() is None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                seen.add(" ".join(child.cmdline()))
        left -= any(text in line for line in seen)
        time.sleep(0.05)
    return seen


def test_a_stage_runs_as_a_job_and_its_result_is_one_commit_of_a_private_repo(
    hub: HubServer, config: Path, tmp_path: Path
):
    process = start(hub, tmp_path, *arguments(config, "--yes", "--json"))
    seen = command_lines_until(process, "jobs execute")  # the client's and the job's, as anybody here may read them
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert any("jobs run" in line for line in seen) and any("jobs execute" in line for line in seen)
    assert TOKEN not in out + err + "".join(seen)
    printed = json.loads(out)
    job_id = printed["job"]["id"]
    assert printed["job"]["stage"] == "COMPLETED"
    assert (printed["output_repo"], printed["repo_type"]) == ("lab/cells", "dataset")
    for text in ("data, as lab", "$0.01 an hour", "2 h, $0.02", "new, private", f"pathalign jobs logs {job_id}"):
        assert text in err
    assert f"Result: {hub.endpoint}/datasets/lab/cells/commit/" in err  # the job's own log
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    assert files(hub) == [*names, "data_report.json", "pathalign.json", "run.json"]
    titles = [commit["title"] for commit in ask(hub, "/api/datasets/lab/cells/commits/main")]
    assert titles[0].startswith("Result of data ") and titles[1:] == ["initial commit"]
    assert ask(hub, "/api/datasets/lab/cells")["private"]
    code = "from pathalign.images import ImageSet; print(ImageSet.load('lab/cells', 'train').image_size_px)"
    assert client(hub, tmp_path, code, token=TOKEN) == "16"
    (job,) = ask(hub, "/api/jobs/lab")
    assert json.loads(job["environment"]["PATHALIGN_JOB"])["values"] == DATA
    assert job["command"][:2] == ["uv", "run"] and job["command"][-3:] == ["pathalign", "jobs", "execute"]
    assert job["secrets"] == {"HF_TOKEN": None} and TOKEN not in json.dumps(job)
    pushed = b"".join(path.read_bytes() for path in hub.store.blobs.iterdir())
    assert b'"stage": "data"' in pushed and TOKEN.encode() not in pushed
    code, out, _ = pathalign(hub, tmp_path, "logs", job_id)
    assert code == 0 and "train:" in out and "Result: " in out


def test_a_result_replaces_the_one_before_and_an_outage_is_waited_out(hub: HubServer, config: Path, tmp_path: Path):
    hub.store.create("datasets", "lab/cells")
    code = """
    import hashlib, json
    earlier = "data/train-00001-of-00002.parquet"
    held = json.dumps({"kind": "data", "files": {earlier: hashlib.sha256(b"{}").hexdigest()}}).encode()
    for name, content in ((earlier, b"{}"), ("run.json", b"{}"), ("README.md", b"{}"), ("pathalign.json", held)):
        api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="lab/cells", repo_type="dataset")
    """
    client(hub, tmp_path, code, token=TOKEN)
    hub.faults.set(Fault("POST /api/datasets/lab/cells/commit/", 503, times=1))
    code, _, err = pathalign(hub, tmp_path, *arguments(config, "--yes"))
    assert code == 0, err
    assert "PUBLIC, its files are replaced" in err and "did not take it (503); trying again" in err
    names = [f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")]
    assert files(hub) == ["README.md", *names, "data_report.json", "pathalign.json", "run.json"]
    assert ask(hub, "/api/datasets/lab/cells/commits/main")[0]["title"].startswith("Result of data ")


def test_a_job_that_fails_ends_with_1_says_why_and_leaves_the_repo_empty(hub: HubServer, config: Path, tmp_path: Path):
    hub.store.create("datasets", "lab/nothing")
    code, out, err = pathalign(hub, tmp_path, *arguments(config, "--yes", "--set", "source=lab/nothing"))
    assert (code, out) == (1, "")
    assert "'lab/nothing'" in err and "ended as ERROR: Job failed with exit code: 1" in err
    assert "Nothing was written to its output repo" in err
    assert files(hub) == []


def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_and_end_it(hub: HubServer, config: Path, tmp_path: Path):
    process = start(hub, tmp_path, *arguments(config, "--yes"))
    wait_for(lambda: hub.faults.requests and any("/logs" in request for request in hub.faults.requests))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    (job,) = ask(hub, "/api/jobs/lab")
    assert (process.returncode, out) == (130, "")
    assert f"The job goes on. Follow it by `pathalign jobs logs {job['id']}`, end it by `pathalign jobs cancel" in err
    code, out, _ = pathalign(hub, tmp_path, "logs", job["id"])
    assert code == 0 and "Result: " in out
    assert "run.json" in files(hub)


def test_a_job_that_was_left_alone_can_be_cancelled(hub: HubServer, config: Path, tmp_path: Path):
    code, job_id, err = pathalign(hub, tmp_path, *arguments(config, "--yes", "--detach"))
    assert code == 0 and "Follow it by" in err
    assert pathalign(hub, tmp_path, "cancel", job_id.strip())[:2] == (0, f"Cancelled {job_id.strip()}.\n")
    code, _, err = pathalign(hub, tmp_path, "logs", job_id.strip())
    assert code == 1 and "ended as CANCELED" in err
    assert files(hub) == []


def test_a_dry_run_checks_everything_prints_the_plan_and_starts_nothing(hub: HubServer, config: Path, tmp_path: Path):
    code, out, err = pathalign(hub, tmp_path, *arguments(config, "--dry-run", "--json", "--timeout", "90m"))
    assert code == 0, err
    plan = json.loads(out)
    assert plan["machine"]["usd_per_hour"] == pytest.approx(0.012) and plan["timeout_s"] == 5400
    assert plan["cost"] == {"at_most_usd": pytest.approx(0.018), "expected_hours": None, "expected_usd": None}
    assert (plan["spec"]["values"], plan["secrets"], plan["new"], plan["private"]) == (DATA, ["HF_TOKEN"], True, True)
    code, out, _ = pathalign(hub, tmp_path, *arguments(config, "--dry-run"))
    assert (
        code == 0
        and re.search(r"cost +not known", out)
        and re.search(r"result +dataset lab/cells \(new, private\)", out)
    )
    code, _, err = pathalign(hub, tmp_path, *arguments(config))  # nobody answers the question
    assert code == 1 and "Start it? [y/N]" in err
    assert ask(hub, "/api/jobs/lab") == []
    assert not any(request.startswith("POST") for request in hub.faults.requests)


@pytest.mark.slow
def test_the_plan_of_an_alignment_knows_its_cost_on_a_gpu(
    hub: HubServer, tiny_pipeline: Any, tiny_images: ImageSet, tmp_path: Path
):
    tiny_pipeline.save_pretrained(tmp_path / "base")
    tiny_images.save(tmp_path / "cells")
    reward = RewardModel(RewardModelConfig(class_names=["a", "b", "c"], criteria=[], convnet_channels=[8, 8]))
    reward.save_with_processor(tmp_path / "reward")
    upload = "api.create_repo('lab/{0}', repo_type='{1}'); api.upload_folder(repo_id='lab/{0}', repo_type='{1}', "
    upload += "folder_path='{0}')\n"
    repos = (("base", "model"), ("reward", "model"), ("cells", "dataset"))
    client(hub, tmp_path, "".join(upload.format(*repo) for repo in repos), token=TOKEN)
    values = {"method": "ddpo", "base_model": "lab/base", "reward_model": "lab/reward", "data": "lab/cells"}
    values |= {"epochs": 2, "images_per_class": 2}
    path = tmp_path / "ddpo.yaml"
    path.write_text(yaml.safe_dump(values))
    command = ["run", str(path), "--stage", "align", "--flavor", "t4-small", "--output-repo", "lab/adapter"]
    code, out, err = pathalign(hub, tmp_path, *command, "--dry-run", "--json")
    assert code == 0, err
    cost = json.loads(out)["cost"]
    low, high = cost["expected_hours"]
    assert 0 < low < high < 1
    assert cost["expected_usd"] == pytest.approx([0.6 * low, 0.6 * high])
    assert cost["at_most_usd"] == pytest.approx(1.2)


def test_inputs_of_this_machine_are_refused_with_the_command_that_publishes_them(
    hub: HubServer, tiny_images: ImageSet, tmp_path: Path
):
    tiny_images.save(tmp_path / "cells")
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump({"data": "cells", "feedback": "lab/feedback", "encoder": "convnet"}))
    code, _, err = pathalign(hub, tmp_path, *arguments(path, stage="reward"))
    assert code == 1
    assert "`data` is the folder cells, which the job does not see: `pathalign publish cells lab/cells`" in err
    assert "`feedback`: There is no folder lab/feedback here, and the dataset 'lab/feedback' on" in err
    assert "encoder" not in err
    assert not any("POST" in request for request in hub.faults.requests)


def test_a_repo_that_holds_something_else_is_not_written_to(hub: HubServer, config: Path, tmp_path: Path):
    hub.store.create("datasets", "lab/cells", private=True)
    code = "api.upload_file(path_or_fileobj=b'x', path_in_repo='thesis.tex', repo_id='lab/cells', repo_type='dataset')"
    client(hub, tmp_path, code, token=TOKEN)
    code, _, err = pathalign(hub, tmp_path, *arguments(config, "--yes"))
    assert code == 1 and "holds files that pathalign did not make, such as thesis.tex" in err


# What the checks of a job say, in one process that has the client's libraries in it.
CHECKING = """
import json
from pathlib import Path
from pathalign.jobs import JobSpec, push
from pathalign.schema import InputError

def make(name, repo_type, files, private=True):
    api.create_repo(name, repo_type=repo_type, private=private)
    adds = [CommitOperationAdd(path, content.encode()) for path, content in files.items()]
    api.create_commit(name, adds, commit_message="files", repo_type=repo_type)

def told(call, *given):
    try:
        return f"fine: {call(*given)}"
    except InputError as error:
        return str(error).replace("\\n", " ")
"""


def checked(hub: HubServer, folder: Path, code: str) -> list[str]:
    """Lines that a program prints, with `make` and `told` at hand."""
    project = str(Path(jobs.__file__).parents[1])
    return client(hub, folder, CHECKING + textwrap.dedent(code), token=TOKEN, PYTHONPATH=project).splitlines()


def test_a_result_never_replaces_one_of_another_kind_however_late_it_came(hub: HubServer, tmp_path: Path):
    lines = checked(
        hub,
        tmp_path,
        """
        make("lab/published", "model", {"pathalign.json": json.dumps({"kind": "base", "files": {}})})
        make("lab/made", "model", {"run.json": json.dumps({"stage": "pretrain"}), "model_index.json": "{}"})
        make("lab/earlier", "model", {"pathalign.json": json.dumps({"kind": "graders", "files": {}})})
        make("lab/empty", "model", {})
        for name in ("published", "made", "earlier", "empty"):
            print(told(JobSpec.make("graders", {}, f"lab/{name}").require_free_repo))
        print(told(JobSpec.make("pretrain", {}, "lab/made").require_free_repo))
        Path("result").mkdir()
        Path("result/grader.json").write_text("{}")
        print(told(push, Path("result"), JobSpec.make("graders", {}, "lab/made")))
        print(sorted(api.list_repo_files("lab/made")))
        """,
    )
    for line in (lines[0], lines[1], lines[5]):
        assert "holds something of the kind base, and the result is of the kind graders. Choose another" in line
    assert lines[2:5] == ["fine: True"] * 3
    assert lines[6] == "['.gitattributes', 'model_index.json', 'run.json']"


def test_what_graders_said_goes_to_no_public_repo_and_what_is_hidden_goes_nowhere(hub: HubServer, tmp_path: Path):
    lines = checked(
        hub,
        tmp_path,
        """
        for repo_type in ("model", "dataset"):
            make("lab/open", repo_type, {}, private=False)
        experts = {"grade": {"method": "pull", "source": "lab/g", "comments": True}}
        specs = [JobSpec.make(stage, {}, "lab/open") for stage in ("grade", "feedback", "data", "run")]
        for spec in [JobSpec.make("run", experts, "lab/open"), *specs]:
            print(told(spec.require_free_repo))
        result = Path("result")
        for path in ("a/b.json", ".grades.shards/grades/one.jsonl", "round-2/.grades.shards/two.jsonl", ".lock",
                     "base/checkpoints/3.pt"):
            (result / path).parent.mkdir(parents=True, exist_ok=True)
            (result / path).write_text("{}")
        print(told(push, result, JobSpec.make("run", experts, "lab/open")))
        make("lab/run", "model", {})
        print(told(push, result, JobSpec.make("run", experts, "lab/run")))
        print(sorted(api.list_repo_files("lab/run")))
        """,
    )
    for line in (*lines[:3], lines[5]):
        assert "lab/open is PUBLIC, and the result holds what graders said. Make it private" in line
    assert lines[3:5] == ["fine: False"] * 2  # a simulated grader's opinion is nobody's
    assert lines[6].startswith("fine: ") and lines[7] == "['.gitattributes', 'a/b.json', 'pathalign.json']"


def test_inputs_are_what_the_stages_take_with_revisions_and_prefixes(hub: HubServer, tmp_path: Path):
    lines = checked(
        hub,
        tmp_path,
        """
        make("lab/base", "model", {"model_index.json": "{}", "unet/a.safetensors": "x"})
        make("lab/cells", "dataset", {"data/train-00000-of-00001.parquet": "x"})
        make("lab/g", "dataset", {"grades/one.jsonl": "{}"})

        def inputs(stage, **values):
            print(told(JobSpec.make(stage, values, "lab/out").require_hub_inputs))

        inputs("generate", model="lab/base@main")
        inputs("generate", model="lab/base", revision="main")
        inputs("grade", method="pull", source="hf://datasets/lab/g", candidates="lab/cells", references=None)
        inputs("data", source="lab/g")
        inputs("generate", model="lab/g")
        inputs("generate", model="lab/base@older")
        inputs("generate", model="lab/base", adapter="lab/base")
        inputs("generate", model="lab/base@main", revision="older")
        inputs("data", source="lab/base")
        inputs("data", source="lab/g", revision="older")
        inputs("feedback", candidates="lab/cells", grades="lab/g")
        inputs("generate", model="lab/out")
        inputs("grade", method="pull", candidates="lab/cells", references=None)
        inputs("run", grade={"method": "pull"})
        """,
    )
    assert lines[:4] == ["fine: None"] * 4
    wanted = [
        "`model`: 'lab/g' on .* is a dataset; give a pipeline made by `pathalign pretrain` instead",
        "`model`: .* has no revision 'older'",
        "`adapter`: 'lab/base' on .* is a pipeline",
        "`model`: .*contradict each other",
        "`source`: 'lab/base' on .* is a model",
        "`source`: .* has no revision 'older'",
        "`grades` is lab/g, and must be a file or folder, which a job does not see; a run takes .*`method: pull`",
        "`model` is lab/out, which the result would replace: choose another `--output-repo`",
        "`source` of the stage grade is '', and experts cannot reach a folder of the job's machine: .*space deploy",
        "`source` of the stage grade is '', and experts cannot reach a folder of the job's machine: .*space deploy",
    ]
    for line, pattern in zip(lines[4:], wanted, strict=True):
        assert line.startswith("A job's inputs must be on the Hub: - ") and re.search(pattern, line), line
        assert line.count(" - ") == 1, line


def test_the_plan_says_that_the_machine_is_paid_for_while_experts_grade(hub: HubServer, tmp_path: Path):
    hub.store.create("datasets", "lab/g", private=True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"grade": {"method": "pull", "source": "lab/g", "min_grades": 40}}))
    code, out, err = pathalign(hub, tmp_path, *arguments(path, "--dry-run", stage="run"))
    assert code == 0, err
    assert re.search(r"waits +for 40 grades in lab/g; the machine is paid for while it waits\n", out)
    assert "Experts cannot see candidates that the job draws" in out


@pytest.mark.parametrize(
    ("fault", "more", "variables", "code", "messages"),
    [
        (None, [], {"HF_TOKEN": "hf_wrong"}, 1, ["refused your token (401", "`hf auth login`"]),
        (None, [], {"HF_TOKEN": ""}, 1, ["not logged in", "`hf auth login`"]),
        (402, ["--yes"], {}, 1, ["without pre-paid credits (402", "/settings/billing", "same command again"]),
        (403, ["--yes"], {}, 1, ["may not start a job as lab (403", "/settings/tokens"]),
        (500, ["--yes"], {}, 1, ["answered 500", "Try later: run the same command again"]),
        (None, ["--namespace", "clinic", "--yes"], {}, 1, ["may not start a job as clinic (403"]),
        (None, ["--flavor", "a10"], {}, 1, ["no flavor 'a10'", "cpu-basic ($0.01 an hour), t4-small ($0.60 an hour)"]),
        (None, ["--flavor", "a100x4"], {}, 1, ["has 4 GPUs, and a job uses one"]),
        (None, [], {"HF_ENDPOINT": "http://127.0.0.1:9"}, 1, ["127.0.0.1:9 cannot be reached. Check your connection"]),
        (None, [], {"HF_HUB_OFFLINE": "1"}, 1, ["cannot be reached", "HF_HUB_OFFLINE"]),
        (None, ["--timeout", "soon"], {}, 1, ["`--timeout` is 'soon'; write a time such as 90m"]),
        (None, ["--output-repo", "cells"], {}, 1, ["`--output-repo` is 'cells'; write OWNER/NAME"]),
        (None, ["--set", "image_sise_px=8"], {}, 2, ["did you mean `image_size_px`?"]),
        (None, ["--set", "source=hf_" + "a" * 34], {}, 1, ["holds a token", "take it out"]),
        (None, ["--package", "git+https://me:secret@host/x"], {}, 1, ["holds a password or token"]),
        (None, ["--package", "pathalign"], {}, 1, ["give the URL of a wheel, or git+https"]),
    ],
)
def test_what_cannot_work_is_one_line_with_the_next_step_before_anything_starts(
    hub: HubServer, config: Path, tmp_path: Path, fault, more, variables, code, messages
):
    if fault:
        hub.faults.set(Fault("POST /api/jobs/", fault))
    found, out, err = pathalign(hub, tmp_path, *arguments(config, *more), **variables)
    assert (found, out) == (code, "")
    for message in messages:
        assert message in err, err
    assert "Traceback" not in err and "secret@" not in err
    assert len(err.split("Error: ")[1].splitlines()) <= 2
    assert ask(hub, "/api/jobs/lab") == []


def test_a_log_that_breaks_off_leaves_the_job_running_and_says_how_to_follow_it(
    hub: HubServer, config: Path, tmp_path: Path
):
    hub.faults.set(Fault("GET /api/jobs/.*/logs", 503))
    code, out, err = pathalign(hub, tmp_path, *arguments(config, "--yes"))
    (job,) = ask(hub, "/api/jobs/lab")
    assert (code, out) == (1, "")
    assert f"Try later: follow it by `pathalign jobs logs {job['id']}`; the job goes on." in err
    assert job["status"]["stage"] in ("SCHEDULING", "RUNNING")
    assert pathalign(hub, tmp_path, "cancel", job["id"])[0] == 0


def test_an_unknown_job_is_explained(hub: HubServer, tmp_path: Path):
    for command in ("logs", "cancel"):
        code, _, err = pathalign(hub, tmp_path, command, "0" * 24)
        assert code == 1 and "there is no such job there" in err and "hf jobs ps" in err


# Without a server.


def test_what_a_run_makes_itself_is_no_input():
    spec = JobSpec.make("run", {"data": {"source": "lab/smear"}, "generate": {"adapter": "lab/adapter"}}, "lab/run")
    assert spec.repo_type == "model"
    named = {(each.name, each.value) for each in spec.inputs() if "/" in each.value}
    assert named == {("source", "lab/smear"), ("adapter", "lab/adapter")}


def test_a_section_in_the_settings_of_a_stage_is_explained():
    with pytest.raises(ConfigError, match="it has a section `pretrain`: leave `--stage` out to run all stages"):
        JobSpec.make("pretrain", {"pretrain": {"steps": 3}}, "lab/base")


@pytest.mark.parametrize(("text", "wanted"), [("90m", 5400), ("2h", 7200), ("300", 300), ("1.5h", 5400), ("1d", 86400)])
def test_times_are_read(text: str, wanted: int):
    assert seconds(text) == wanted


@pytest.mark.parametrize("text", ["", "0", "h", "-1h", "2 weeks"])
def test_what_is_no_time_is_refused(text: str):
    with pytest.raises(InputError, match="--timeout"):
        seconds(text)


def test_a_package_is_this_version_or_what_a_url_holds():
    url = "git+https://github.com/owner/pathalign@main"
    assert jobs.package(url) == f"pathalign[eval,encoders] @ {url}"
    assert re.fullmatch(r"pathalign\[eval,encoders\]==\d+\.\d+\.\d+.*", jobs.package(None))


def test_outside_of_a_job_there_is_nothing_to_execute():
    with pytest.raises(InputError, match="PATHALIGN_JOB is not set"):
        jobs.run({})
