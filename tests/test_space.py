"""`pathalign space`: the real command line in a process of its own, against the tests' own Hub."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import HubServer, serve
from hub.accounts import READ, WRITE, scope
from hub.spaces import add_log, control, secret_values
from hub.store import Repo
from small_study import images
from test_hub_server import client

from pathalign.grading.study import Study
from pathalign.hub.space_files import collect_files
from pathalign.images import ImageSet

pytestmark = pytest.mark.hub
PROJECT = Path(__file__).resolve().parents[1]
PAGE = PROJECT / "spaces" / "grade"
WHEEL = "pathalign-0.1.0-py3-none-any.whl"
SPACE_TOKEN = "hf_of_the_space_alone"
STUDY = """
title: Blood cells
candidates: candidates
references: real
references_per_class: 2
graders: [ada, {name: grace, pseudonym: g1}]
owners: [lab]
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub") as server:
        server.store.accounts.add_token(
            SPACE_TOKEN, "lab", "fineGrained", [scope("dataset", "lab/study-grades", READ, WRITE)]
        )
        yield server


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A study with its images in folders beside it, and a wheel."""
    images(60, 0).save(tmp_path / "candidates")
    images(45, 1).save(tmp_path / "real")
    (tmp_path / "study.yaml").write_text(STUDY)
    with zipfile.ZipFile(tmp_path / WHEEL, "w") as wheel:
        wheel.writestr("pathalign/__init__.py", "")
    return tmp_path / "study.yaml"


def environment(hub: HubServer, folder: Path, **changes: str) -> dict[str, str]:
    return hub.variables(folder / "home", **{"PATHALIGN_SPACE_TOKEN": SPACE_TOKEN, **changes})


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from pathalign.cli import main; main()", "space", *arguments]


def deploying(*arguments: str) -> tuple[str, ...]:
    return ("deploy", "lab/study", "--study", "study.yaml", "--package", WHEEL, *arguments)


def run(hub: HubServer, folder: Path, *arguments: str, code: int = 0, **changes: str) -> subprocess.CompletedProcess:
    """Run `pathalign space`; nothing that it prints may hold a token."""
    done = subprocess.run(
        command(*arguments),
        env=environment(hub, folder, **changes),
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr
    for secret in (hub.token, SPACE_TOKEN):
        assert secret not in done.stdout + done.stderr
    return done


def error_line(done: subprocess.CompletedProcess) -> str:
    """The one line of an error; nothing was printed as a result."""
    assert done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert done.stderr.endswith(line + "\n")
    return line


def repo_of(hub: HubServer, name: str = "lab/study", kind: str = "spaces") -> Repo:
    return hub.store.repo(kind, name, hub.token)


def titles(hub: HubServer) -> list[str]:
    repo = repo_of(hub)
    return [title for _, title, _ in hub.store.history(repo, hub.store.resolve(repo, "main"))]


def writes(hub: HubServer) -> list[str]:
    """Requests that may have changed something."""
    asking = ("paths-info", "preupload", "validate-yaml")
    return [line for line in hub.faults.requests if line.split()[0] != "GET" and not line.endswith(asking)]


@pytest.mark.slow
def test_a_study_becomes_a_space_and_the_same_command_again_changes_nothing(hub: HubServer, study: Path):
    folder = study.parent
    planned = json.loads(run(hub, folder, *deploying("--dry-run", "--json")).stdout)["plan"]
    assert planned["usd_per_hour"] == 0 and len(planned["changes"]) == 7
    assert writes(hub) == []

    done = json.loads(run(hub, folder, *deploying("--yes", "--json")).stdout)
    assert (done["stage"], done["dataset"]) == ("RUNNING", "lab/study-grades")
    assert done["url"] == f"{hub.endpoint}/spaces/lab/study"
    assert done["plan"] == planned
    assert repo_of(hub).visibility == "protected"
    assert repo_of(hub, "lab/study-grades", "datasets").visibility == "private"
    assert titles(hub) == ["Grade 'Blood cells'", "initial commit"]
    secret = (folder / "study.state" / "secret").read_text().strip()
    assert secret_values(hub.store, "lab/study") == {"HF_TOKEN": SPACE_TOKEN, "PATHALIGN_STUDY_SECRET": secret}

    hub.faults.requests.clear()
    again = json.loads(run(hub, folder, *deploying("--json")).stdout)
    assert again["plan"]["changes"] == [] and again["commit"] == done["commit"]
    assert writes(hub) == []


@pytest.mark.slow
def test_what_differs_is_changed_and_nothing_else(hub: HubServer, study: Path):
    folder = study.parent
    run(hub, folder, *deploying("--yes"))
    secret = secret_values(hub.store, "lab/study")["PATHALIGN_STUDY_SECRET"]
    hub.faults.requests.clear()
    assert "Nothing to change" in run(hub, folder, *deploying(), PATHALIGN_SPACE_TOKEN="").stdout
    assert writes(hub) == []
    other = "hf_a_newer_one_of_the_space"
    hub.store.accounts.add_token(other, "lab", "fineGrained", [scope("dataset", "lab/study-grades", WRITE)])
    study.write_text(STUDY.replace("Blood cells", "Cells").replace("real", "lab/real"))
    hub.store.create("datasets", "lab/real")
    parquet = next((folder / "real").rglob("*.parquet"))
    sha256 = hub.store.add_blob(parquet.read_bytes())
    line = {"key": "lfsFile", "value": {"path": f"data/{parquet.name}", "oid": sha256}}
    header = {"key": "header", "value": {"summary": "real"}}
    hub.store.commit(repo_of(hub, "lab/real", "datasets"), "main", [header, line])
    changed = run(hub, folder, *deploying("--yes", "--json", "--hardware", "cpu-upgrade"), PATHALIGN_SPACE_TOKEN=other)
    plan = json.loads(changed.stdout)["plan"]
    assert plan["changes"] == ["ask for cpu-upgrade", "set the secret HF_TOKEN", "upload 1 files", "delete 1 files"]
    assert (list(plan["upload"]), plan["usd_per_hour"]) == (["study.yaml"], 0.03)
    assert secret_values(hub.store, "lab/study") == {"HF_TOKEN": other, "PATHALIGN_STUDY_SECRET": secret}
    assert titles(hub) == ["Grade 'Cells'", "Grade 'Blood cells'", "initial commit"]


@pytest.mark.slow
def test_the_space_holds_the_page_the_study_and_its_images_and_its_grades_reach_the_dataset(
    hub: HubServer, study: Path, tmp_path: Path
):
    run(hub, tmp_path, *deploying("--yes"))
    client(hub, tmp_path, "snapshot_download('lab/study', repo_type='space', local_dir='space')")
    space = tmp_path / "space"
    for path in PAGE.iterdir():
        if path.is_file() and path.name not in ("study.yaml", "requirements.txt"):
            assert (space / path.name).read_bytes() == path.read_bytes(), path.name
    assert (space / "requirements.txt").read_text().splitlines() == [WHEEL, "gradio[oauth]==6.31.0"]
    there = Study.load(space / "study.yaml")
    assert there.sink == "hf://datasets/lab/study-grades"
    assert [person.name for person in there.people] == ["ada", "grace"]
    for key, own in (("candidates", "candidates"), ("references", "real")):
        assert Path(getattr(there, key)).is_relative_to(space)
        assert ImageSet.load(getattr(there, key)).image_ids == ImageSet.load(tmp_path / own).image_ids
    written = yaml.safe_load((space / "study.yaml").read_text())
    assert (written["candidates"], written["references"]) == ("candidates", "references")
    assert str(tmp_path) not in (space / "study.yaml").read_text()

    code = """
    from pathlib import Path
    from pathalign.grading.outbox import Outbox
    from pathalign.grading.service import GradingService
    from pathalign.grading.sinks import open_sink
    from pathalign.grading.study import Study, check_lasting_secret
    study = Study.load("space/study.yaml")
    check_lasting_secret(study.sink)
    service = GradingService(study, Path("state"), Outbox(Path("state"), open_sink(study.sink)))
    item = service.next_items("g1", "single", 1)["items"][0]
    row = {"grade_id": "one", "item_id": item["item_id"], "mode": "single", "verdict": "plausible"}
    assert service.submit("g1", [row])["refused"] == []
    assert service.outbox.flush(20)
    service.close()
    """
    secrets = secret_values(hub.store, "lab/study")
    client(
        hub, tmp_path, code, secrets["HF_TOKEN"], PYTHONPATH=str(PROJECT), PATHALIGN_STUDY_SECRET=secrets.popitem()[1]
    )
    dataset = repo_of(hub, "lab/study-grades", "datasets")
    assert any(path.startswith("grades/") for path in hub.store.tree(hub.store.resolve(dataset, "main")))


def test_a_set_in_shards_goes_to_the_space_whole(study: Path):
    folder = study.parent / "candidates"
    whole = ImageSet.load(folder)
    shutil.rmtree(folder)
    for index in range(3):
        whole.select(range(20 * index, 20 * index + 20)).save(folder, shard=(index, 3))
    contents = collect_files(PAGE, study, "lab/study-grades", str(study.parent / WHEEL), zero_gpu=False).contents
    names = [name for name in contents if name.startswith("candidates/")]
    assert names == [f"candidates/data/train-0000{index}-of-00003.parquet" for index in range(3)]
    assert all(contents[name] == study.parent / name for name in names)


def test_a_token_that_does_more_or_less_than_write_the_one_dataset_is_refused(hub: HubServer, tmp_path: Path):
    for kind, name in (("datasets", "lab/g"), ("datasets", "lab/other"), ("models", "lab/reward")):
        hub.store.create(kind, name, private=True)
    write, read = scope("dataset", "lab/g", READ, WRITE), scope("model", "lab/reward", READ)
    given: dict[str, Any] = {
        "good": {"role": "fineGrained", "scopes": [write]},
        "good, reads": {"role": "fineGrained", "scopes": [write, read]},
        "classic": {"role": "write"},
        "reader": {"role": "read"},
        "all of the user": {"role": "fineGrained", "scopes": [scope("user", "lab", READ, WRITE)]},
        "two": {"role": "fineGrained", "scopes": [write, scope("dataset", "lab/other", WRITE)]},
        "same name": {"role": "fineGrained", "scopes": [scope("model", "lab/g", WRITE)]},
        "looks": {"role": "fineGrained", "scopes": [scope("dataset", "lab/g", READ)]},
        "everywhere": {"role": "fineGrained", "scopes": [write], "everywhere": ["post.write"]},
    }
    for name, rights in given.items():
        hub.store.accounts.add_token(f"hf_{name}", "lab", **rights)
    code = f"""
    from pathalign.hub.space_token import check_token
    from pathalign.schema import InputError
    for name in {[*given, "unknown", "loopback"]}:
        for inputs in ((), (("model", "lab/reward"),)):
            try:
                check_token("hf_" + name, "lab/g", inputs)
                print(name, len(inputs), "taken")
            except InputError as error:
                assert "hf_" not in str(error).replace("/hf_", ""), error
                assert "/settings/tokens/new?tokenType=fineGrained" in str(error) and "datasets/lab/g" in str(error)
                print(name, len(inputs), str(error).split(". ")[0])
    """
    told = client(hub, tmp_path, code, PYTHONPATH=str(PROJECT)).splitlines()
    assert [line for line in told if line.endswith("taken")] == ["good 0 taken", "good, reads 1 taken"]
    reasons = dict(zip((line.split(" 0 ")[0] for line in told[::2]), told[::2], strict=True))
    for name, reason in {
        "good, reads": "may also repo.content.read on the model lab/reward",
        "classic": "role 'write'",
        "reader": "role 'read'",
        "all of the user": "cannot write the dataset lab/g; it may also repo.content.read, repo.write on the user lab",
        "two": "may also repo.write on the dataset lab/other",
        "same name": "cannot write the dataset lab/g",
        "looks": "cannot write the dataset lab/g",
        "everywhere": "may post.write everywhere",
        "unknown": "does not know the Space's token",
        "loopback": "that of your own login",
    }.items():
        assert reason in reasons[name], reasons[name]
    assert "cannot read the model lab/reward" in next(line for line in told if line.startswith("good 1"))


def test_ones_own_token_does_not_become_the_spaces(hub: HubServer, study: Path):
    done = run(hub, study.parent, *deploying("--yes"), code=1, PATHALIGN_SPACE_TOKEN=hub.token)
    assert "that of your own login, which a Space must not have" in error_line(done)
    assert writes(hub) == []


@pytest.mark.slow
def test_without_a_token_the_dataset_is_made_so_that_one_can_be_made_for_it(hub: HubServer, study: Path):
    done = run(hub, study.parent, *deploying("--yes"), code=1, PATHALIGN_SPACE_TOKEN="")
    assert f"Make one at {hub.endpoint}/settings/tokens/new?tokenType=fineGrained" in error_line(done)
    assert repo_of(hub, "lab/study-grades", "datasets").visibility == "private"
    assert titles(hub) == ["initial commit"]
    assert "HF_TOKEN" not in secret_values(hub.store, "lab/study")
    assert json.loads(run(hub, study.parent, *deploying("--yes", "--json")).stdout)["stage"] == "RUNNING"


def test_the_token_is_asked_for_and_not_shown(hub: HubServer, study: Path):
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        command(*deploying()),
        env=environment(hub, study.parent, PATHALIGN_SPACE_TOKEN=""),
        cwd=study.parent,
        stdin=end,
        stdout=end,
        stderr=end,
        start_new_session=True,
    )
    os.close(end)
    shown = ""

    def read_until(text: str) -> None:
        nonlocal shown
        while text not in shown:
            shown += os.read(terminal, 4096).decode()

    read_until("Go ahead? [y/N]")
    assert titles_or_none(hub) is None
    os.write(terminal, b"y\n")
    read_until("(not shown)")
    os.write(terminal, f"{SPACE_TOKEN}\n".encode())
    read_until("pathalign space logs lab/study --follow")
    assert process.wait(20) == 0
    os.close(terminal)
    assert SPACE_TOKEN not in shown
    assert secret_values(hub.store, "lab/study")["HF_TOKEN"] == SPACE_TOKEN


def titles_or_none(hub: HubServer) -> list[str] | None:
    return titles(hub) if hub.store.all_repos("spaces") else None


def test_nothing_is_done_unless_somebody_agrees(hub: HubServer, study: Path):
    assert "Add `--yes`" in error_line(run(hub, study.parent, *deploying(), code=1))
    assert writes(hub) == []


@pytest.mark.slow
def test_what_the_hub_refuses_is_one_line_with_the_next_command(hub: HubServer, study: Path):
    folder = study.parent
    hub.store.accounts.add_user("free", pro=False, pays=False)
    hub.store.add_token("hf_free", "free")
    free = ("deploy", "free/study", "--study", "study.yaml", "--package", WHEEL, "--yes")
    unpaid = error_line(run(hub, folder, *free, code=1, HF_TOKEN="hf_free", PATHALIGN_SPACE_TOKEN=""))
    assert "(402)" in unpaid and "--hardware zero-a10g" in unpaid and "`pathalign grade serve STUDY.yaml`" in unpaid
    assert hub.store.all_repos("spaces") == hub.store.all_repos("datasets") == []
    scopes = [scope("dataset", "free/study-grades", READ, WRITE)]
    hub.store.accounts.add_token("hf_free_one", "free", "fineGrained", scopes)
    run(hub, folder, *free, "--hardware", "zero-a10g", HF_TOKEN="hf_free", PATHALIGN_SPACE_TOKEN="hf_free_one")
    repo = hub.store.repo("spaces", "free/study", "hf_free")
    requirements = hub.store.tree(hub.store.resolve(repo, "main"))["requirements.txt"]
    assert hub.store.blob(requirements.sha256).endswith(b"\nspaces\n")
    unknown = error_line(run(hub, folder, *deploying("--yes"), code=1, HF_TOKEN="hf_wrong"))
    assert "refused your token (401)" in unknown and "`hf auth login`" in unknown
    nobody = error_line(run(hub, folder, *deploying("--yes"), code=1, HF_TOKEN=""))
    assert "Nobody is logged in" in nobody and "`hf auth login`" in nobody
    offline = error_line(run(hub, folder, *deploying("--yes"), code=1, HF_HUB_OFFLINE="1"))
    assert "unset it" in offline
    gone = error_line(run(hub, folder, "restart", "lab/study", code=1, HF_ENDPOINT="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9 cannot be reached (ConnectError)" in gone and "same command again" in gone


def test_what_would_unblind_or_publish_grades_is_refused_before_anything_is_made(hub: HubServer, study: Path):
    hub.store.create("datasets", "lab/open")
    hub.store.create("spaces", "lab/chat", sdk="gradio", private=True)
    header = {"key": "header", "value": {"summary": "chat"}}
    hub.store.commit(
        repo_of(hub, "lab/chat"), "main", [header, {"key": "file", "value": {"path": "app.py", "content": ""}}]
    )
    (study.parent / "linked.yaml").write_text("candidates: lab/no-such\nreal_control_share: 0\n")
    (study.parent / "named.yaml").write_text("candidates: lab/open\nreal_control_share: 0\ngraders: [ada]\n")
    (study.parent / "sunk.yaml").write_text("candidates: lab/open\nreal_control_share: 0\nsink: hf://datasets/a/b\n")
    reasons = {
        "lab/study --visibility public": "candidates, references, the graders' names would be in them",
        "lab/study --study named.yaml --visibility public": "the graders' names would be in them",
        "lab/study --study linked.yaml": "The dataset 'lab/no-such'",
        "lab/study --study sunk.yaml --dataset lab/g": "leave out `--dataset lab/g`",
        "lab/study --study no.yaml": "no.yaml cannot be used",
        "lab/study --dataset lab/open": "is public, and grades are not",
        "lab/study --hardware gpu-of-dreams": "it has cpu-basic, cpu-upgrade",
        "lab/study --package torch": "does not install pathalign",
        "lab/study --package no.whl": "is no wheel of pathalign",
        "lab/chat": "holds something else (app.py)",
        "clinic/study": "for lab, not for 'clinic'",
        "study": "such as my-clinic/blood-cells",
    }
    # one process for all: each would load torch anew
    code = f"""
    from click.testing import CliRunner
    from pathalign.cli import main
    for line in {list(reasons)}:
        options = ["--study", "study.yaml"] * ("--study" not in line)
        options += ["--package", "{WHEEL}"] * ("--package" not in line)
        done = CliRunner().invoke(main, ["space", "deploy", *line.split(), *options, "--yes"])
        assert done.exit_code in (1, 2) and done.stdout == "", done.output
        print(" ".join(done.stderr.split()))
    """
    printed = client(hub, study.parent, code, PYTHONPATH=str(PROJECT)).splitlines()
    for told, reason in zip(printed, reasons.values(), strict=True):
        assert reason in told, told
    assert writes(hub) == []


@pytest.mark.slow
def test_a_version_that_the_index_lacks_is_told_before_a_space_fails_to_build(hub: HubServer, study: Path):
    folder = study.parent
    (folder / "index" / "pathalign").mkdir(parents=True)
    page = folder / "index" / "pathalign" / "index.html"
    page.write_text('<a href="pathalign-0.0.9-py3-none-any.whl">pathalign-0.0.9-py3-none-any.whl</a>')
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder / "index"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    index = {"PIP_INDEX_URL": f"http://user:word@127.0.0.1:{server.server_port}"}
    plain = ("deploy", "lab/study", "--study", "study.yaml", "--dry-run")
    try:
        told = error_line(run(hub, folder, *plain, code=1, **index))
        assert "add `--package dist/pathalign-0.1.0-py3-none-any.whl`" in told and "word" not in told
        page.write_text(page.read_text().replace("0.0.9", "0.1.0"))
        assert "pathalign[space]==0.1.0" in run(hub, folder, *plain, **index).stdout
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_a_space_that_does_not_come_up_is_an_error_that_names_the_log(hub: HubServer, study: Path):
    folder = study.parent
    hub.store.create("spaces", "lab/study", sdk="gradio", visibility="protected")
    control(hub.store, "lab/study", outcome="BUILD_ERROR", build_s=0.1)
    for number in range(3):
        add_log(hub.store, "lab/study", f"line {number}", "build")
    told = error_line(run(hub, folder, *deploying("--yes"), code=1))
    assert "BUILD_ERROR" in told and "`pathalign space logs lab/study --build`" in told
    assert run(hub, folder, "logs", "lab/study", "--build", "--lines", "2").stdout == "line 1\nline 2\n"
    control(hub.store, "lab/study", outcome="RUNTIME_ERROR", error="no study", build_s=0)
    told = error_line(run(hub, folder, *deploying(), code=1))
    assert "RUNTIME_ERROR: no study" in told and "`pathalign space logs lab/study`" in told
    control(hub.store, "lab/study", outcome="RUNNING", build_s=3600)
    told = error_line(run(hub, folder, *deploying("--wait-minutes", "0.01"), code=1))
    assert "not running after 0.01 minutes" in told


@pytest.mark.slow
def test_ctrl_c_while_waiting_leaves_the_space_to_itself(hub: HubServer, study: Path):
    hub.store.create("spaces", "lab/study", sdk="gradio", visibility="protected")
    control(hub.store, "lab/study", build_s=3600)
    process = subprocess.Popen(
        command(*deploying("--yes")),
        env=environment(hub, study.parent),
        cwd=study.parent,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "BUILDING after" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(20) == 130
    assert "lab/study goes on; `pathalign space logs lab/study --build --follow` shows how." in rest
    control(hub.store, "lab/study", build_s=0)
    assert "Nothing to change" in run(hub, study.parent, *deploying()).stdout


@pytest.mark.slow
def test_logs_are_followed_and_a_space_is_paused_and_restarted(hub: HubServer, study: Path):
    folder = study.parent
    run(hub, folder, *deploying("--yes", "--wait-minutes", "0"))
    control(hub.store, "lab/study", build_s=0, open_s=3)
    add_log(hub.store, "lab/study", "serving")
    following = subprocess.Popen(
        command("logs", "lab/study", "--follow"), env=environment(hub, folder), stdout=subprocess.PIPE, text=True
    )
    assert following.stdout
    lines = iter(following.stdout)
    assert "Application Startup" in next(lines) and next(lines) == "serving\n"
    add_log(hub.store, "lab/study", "one grade recorded")
    assert next(lines) == "one grade recorded\n"
    assert following.wait(20) == 0
    assert run(hub, folder, "pause", "lab/study").stdout == "lab/study: PAUSED\n"
    assert "`pathalign space restart lab/study` starts it" in run(hub, folder, *deploying()).stdout
    assert json.loads(run(hub, folder, "restart", "lab/study", "--json").stdout)["stage"] == "RUNNING"
