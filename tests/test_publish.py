"""`pathalign publish` against the loopback Hub, by the real command in processes of their own."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml
from hub import HubServer, serve
from hub.faults import Fault
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from publications import (
    Publisher,
    make_adapter,
    make_all,
    make_base,
    make_candidates,
    make_evaluation,
    make_feedback,
    make_grades,
    make_real,
    make_reward,
    record,
    write_json,
)
from safetensors.torch import load_file, save_file
from small_study import images
from tiny_stable_diffusion import save_tiny_stable_diffusion

from pathalign.artefacts import fingerprint
from pathalign.diffusion import lora
from pathalign.diffusion.loading import load_base
from pathalign.diffusion.pipeline import base_hash

pytestmark = pytest.mark.hub
UNET = Path("unet/diffusion_pytorch_model.safetensors")
TYPES = ("models", "datasets", "spaces")
REPO_OF = {"base": "models", "reward": "models", "adapter": "models", "candidates": "datasets"}
REPO_OF |= {"grades": "datasets", "feedback": "datasets", "evaluation": "spaces"}
EXTRA = {"adapter": ["--base-model", "lab/base"]}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny artefact of each kind; tests that change one copy it."""
    return make_all(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with serve(tmp_path_factory.mktemp("served") / "hub") as server:
        yield server


@pytest.fixture(scope="module")
def publisher(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Publisher]:
    running = Publisher(server, tmp_path_factory.mktemp("home"))
    yield running
    running.close()


@pytest.fixture
def hub(server: HubServer) -> Iterator[HubServer]:
    """The server without repos and faults."""
    server.faults.requests.clear()
    yield server
    server.faults.set()
    server.faults.hits.clear()
    for kind in TYPES:
        for repo in server.store.all_repos(kind):
            server.store.delete(kind, repo.name)


def content(hub: HubServer, kind: str, name: str, commit: str = "main") -> dict[str, bytes]:
    """All files of a repo, as the server has them."""
    repo = hub.store.repo(kind, name, hub.token)
    tree = hub.store.tree(hub.store.resolve(repo, commit))
    return {path: hub.store.blob(entry.sha256) for path, entry in tree.items()}


def titles(hub: HubServer, kind: str, name: str) -> list[str]:
    repo = hub.store.repo(kind, name, hub.token)
    return [title for _, title, _ in hub.store.history(repo, hub.store.resolve(repo, "main"))]


def put(hub: HubServer, kind: str, name: str, **files: str | bytes) -> None:
    """What somebody else commits."""
    from base64 import b64encode

    lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": "by hand"}}]
    for path, text in files.items():
        data = text.encode() if isinstance(text, str) else text
        value = {"path": path.replace("__", "."), "content": b64encode(data).decode(), "encoding": "base64"}
        lines.append({"key": "file", "value": value})
    hub.store.commit(hub.store.repo(kind, name, hub.token), "main", lines)


def front_matter(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def writes(hub: HubServer) -> list[str]:
    """Requests that may have changed something."""
    return [r for r in hub.faults.requests if not r.startswith(("GET", "HEAD")) and "validate-yaml" not in r]


def test_every_kind_goes_out_as_one_commit_and_again_without_changes_as_none(hub, publisher, originals, tmp_path):
    names = list(REPO_OF)
    calls = [[originals[name], f"lab/{name}", *EXTRA.get(name, [])] for name in names]
    first, second = [[publisher.made(*call) for call in calls] for _ in range(2)]
    for name, made, again in zip(names, first, second, strict=True):
        kind = REPO_OF[name]
        assert len(titles(hub, kind, f"lab/{name}")) == 2 and made["changed"] and not again["changed"], name
        assert (again["commit"], again["url"]) == (made["commit"], made["url"])
        private = hub.store.repo(kind, f"lab/{name}", hub.token).private
        assert private == made["private"] == (name in ("candidates", "grades", "feedback", "evaluation")), name
        files = content(hub, kind, f"lab/{name}")
        assert {"README.md", "run.json", "pathalign.json"} <= set(files)
        assert sorted(file["path"] for file in made["files"]) == sorted(set(files) - {".gitattributes"})
        told = json.loads(files["pathalign.json"])["files"]
        assert {path: hashlib.sha256(data).hexdigest() for path, data in files.items() if path in told} == told
    base = content(hub, "models", "lab/base")
    assert not any("checkpoints" in path for path in base) and b"older card" not in base["README.md"]
    assert b"/home/" not in b"".join(base.values())
    assert "made of cells" in content(hub, "spaces", "lab/evaluation")["index.html"].decode()
    assert (originals["base"] / "README.md").read_text() == "an older card"
    assert "/home/someone" in (originals["base"] / "run.json").read_text()


@pytest.mark.slow
def test_the_snippets_of_all_cards_run_on_a_machine_that_knows_only_the_hub(hub, publisher, originals, tmp_path):
    names, stock = [name for name in REPO_OF if name != "evaluation"], []
    for name in names:
        publisher.made(originals[name], f"lab/{name}", *EXTRA.get(name, []))
    code = ""
    for name in names:
        snippet, *more = snippets(hub, REPO_OF[name], f"lab/{name}")
        result = {"base": "images", "adapter": "images", "reward": "rewards"}.get(name, "candidates")
        code += f"{snippet}\nprint({name!r}, len({result}))\n"
        stock = more or stock
    for name in ("base", "reward"):  # what is on main now has been read by nobody
        files = content(hub, "models", f"lab/{name}")
        sources = {path: data + b"\nraise SystemExit('code of main')\n" for path, data in files.items()}
        put(hub, "models", f"lab/{name}", **{path: text for path, text in sources.items() if path.endswith(".py")})
    code += UNPINNED.format('DiffusionPipeline.from_pretrained("lab/base", custom_pipeline="lab/base"')
    publisher.made(stable_diffusion_adapter(hub, tmp_path), "lab/words")
    (snippet,) = snippets(hub, "models", "lab/words")
    code += f"{snippet}\nprint('words', len(images))\n"
    code += "print(len(grades), grades[0]['grader'], agreement['measure'][0])\n"
    lines = printed(code, hub, tmp_path)
    assert lines[:4] == ["base 4", "reward 4", "adapter 4", "candidates 30"]
    assert lines[4:7] == ["grades 1", "feedback 3", "code of main"]
    assert lines[7:] == ["words 4", "90 reader-1 krippendorff_alpha"]
    code = f"{stock[0]}\nprint(type(model).__module__.split('.')[0], *judged[0])\n"
    code += UNPINNED.format('AutoModel.from_pretrained("lab/reward"')
    assert printed(code, hub, tmp_path) == ["transformers_modules label score", "code of main"]


UNPINNED = """
try:
    {}, trust_remote_code=True)
except SystemExit as ran:
    print(ran)
"""


def snippets(hub: HubServer, kind: str, name: str) -> list[str]:
    """The code of a card, with the newest commit where the reader has to name one."""
    card = content(hub, kind, name)["README.md"].decode()
    found = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return [snippet.replace("COMMIT", newest(hub, kind, name)) for snippet in found]


def printed(code: str, hub: HubServer, place: Path) -> list[str]:
    """Lines that a process prints which knows the Hub, and nothing of this one."""
    variables = hub.variables(place / "other")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def newest(hub: HubServer, kind: str, name: str) -> str:
    """The commit that `main` is at."""
    commit: str = hub.store.resolve(hub.store.repo(kind, name, hub.token), "main")
    return commit


def stable_diffusion_adapter(hub: HubServer, place: Path) -> Path:
    """An adapter on a Stable Diffusion that somebody uploaded to `lab/diffusion`."""
    save_tiny_stable_diffusion(place / "diffusion")
    upload(hub, place, place / "diffusion", "lab/diffusion")
    pipeline = load_base(str(place / "diffusion"), class_names=["red cell", "blue cell"])
    lora.attach(pipeline.unet, 2, 2.0, False, torch.Generator().manual_seed(0))
    (place / "words").mkdir()
    lora.save(pipeline.unet, place / "words")
    commit = newest(hub, "models", "lab/diffusion")
    config = {"base_model": "lab/diffusion", "base_revision": commit, "prompt": "an image of a {class_name}"}
    metrics = {"class_names": ["red cell", "blue cell"], "grading": {"simulated": False, "functions": ["score:red"]}}
    record(place / "words", "align", config=config, inputs={"base_model": f"lab/diffusion@{commit}"}, metrics=metrics)
    return place / "words"


def upload(hub: HubServer, place: Path, folder: Path, name: str) -> None:
    """What `hf upload` does."""
    code = f"from huggingface_hub import HfApi; api = HfApi(); api.create_repo({name!r})\n"
    code += f"api.upload_folder(repo_id={name!r}, folder_path={str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], env=hub.variables(place), check=True, capture_output=True)


def test_a_dry_run_makes_all_checks_prints_the_plan_and_changes_nothing(hub, publisher, originals, tmp_path):
    result = publisher(originals["feedback"], "lab/feedback", "--dry-run")
    assert result["code"] == 0 and writes(hub) == []
    for words in ("datasets/lab/feedback (private dataset, would be made): feedback", "feedback/grades.parquet"):
        assert words in result["out"]
    assert "comments stay here" in result["out"] and "graders, by pseudonyms only: 3" in result["out"]
    publisher.made(originals["base"], "lab/base")
    before = len(writes(hub))
    result = publisher(originals["base"], "lab/base", "--dry-run")
    assert "nothing has changed since the last commit" in result["out"] and len(writes(hub)) == before


def test_files_no_longer_ours_go_in_the_same_commit_and_those_of_others_stay(hub, publisher, originals, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(originals["base"], folder)
    (folder / "log.jsonl").write_text('{"step": 1}\n')
    publisher.made(folder, "lab/base")
    put(hub, "models", "lab/base", LICENSE="theirs", pipeline__py="changed by somebody")
    (folder / "log.jsonl").unlink()
    (folder / "pipeline.py").unlink()
    made = publisher.made(folder, "lab/base")
    files = content(hub, "models", "lab/base")
    assert "log.jsonl" not in files and files["LICENSE"] == b"theirs" and files["pipeline.py"] == b"changed by somebody"
    assert [file["path"] for file in made["files"] if file["change"] == "delete"] == ["log.jsonl"]
    assert len(titles(hub, "models", "lab/base")) == 4


def test_what_is_something_else_is_not_replaced(hub, publisher, originals, tmp_path):
    other_base = make_base(tmp_path / "other_base", seed=1)
    other = make_adapter(tmp_path / "other", other_base)
    classes = make_reward(tmp_path / "classes", classes=["x", "y", "z"])
    publisher.made(originals["base"], "lab/base")
    publisher.made(other_base, "lab/second")
    publisher.made(originals["reward"], "lab/reward")
    publisher.made(originals["adapter"], "lab/adapter", *EXTRA["adapter"])
    hub.store.create("models", "lab/foreign")
    put(hub, "models", "lab/foreign", config__json="{}")
    before = {name: titles(hub, "models", f"lab/{name}") for name in ("base", "reward", "adapter", "foreign")}
    for call, words in {
        (originals["reward"], "lab/base"): "of the kind base, this is of the kind reward",
        (originals["candidates"], "lab/base"): "lab/base is a model already, and this becomes a dataset",
        (other, "lab/adapter", "--base-model", "lab/second"): "an adapter of another base model, lab/base",
        (classes, "lab/reward"): "has the classes ['a', 'b', 'c'], this has ['x', 'y', 'z']",
        (originals["reward"], "lab/foreign"): "files that pathalign did not publish, such as config.json",
        (originals["adapter"], "lab/new", "--base-model", "lab/second"): "is not the base model of this adapter",
        (originals["adapter"], "lab/new", "--base-model", "lab/absent"): "does not exist, or is private",
        (originals["adapter"], "lab/new"): "readers do not have. Publish it with `pathalign publish",
        (originals["base"], "lab/new", "--base-model", "lab/base"): "`--base-model` is for adapter",
        (originals["base"], "new"): "write OWNER/NAME",
        (tmp_path / "none", "lab/new"): "There is no folder",
    }.items():
        assert words in publisher.refused(*call), call
    assert before == {name: titles(hub, "models", f"lab/{name}") for name in before}


def test_the_base_of_an_adapter_is_known_by_its_content_also_after_a_plain_upload(hub, publisher, originals, tmp_path):
    upload(hub, tmp_path, originals["base"], "lab/plain")
    made = publisher.made(originals["adapter"], "lab/adapter", "--base-model", "lab/plain")
    files = content(hub, "models", "lab/adapter")
    data = front_matter(files["README.md"])
    assert (data["base_model"], data["base_model_relation"]) == ("lab/plain", "adapter")
    config = json.loads(files["run.json"])["config"]
    assert (config["base_model"], config["base_revision"]) == ("lab/plain", newest(hub, "models", "lab/plain"))
    assert config["data"] == "data" and made["changed"]


def test_a_base_is_believed_by_its_weights_and_not_by_what_its_manifest_says(hub, publisher, originals, tmp_path):
    other, shards = make_base(tmp_path / "other", seed=1), tmp_path / "shards"
    publisher.made(originals["base"], "lab/base")
    publisher.made(originals["base"], "lab/edited")
    weights = (other / UNET).read_bytes()
    put(hub, "models", "lab/base", **{str(UNET): weights})
    call = [originals["adapter"], "lab/adapter", "--base-model"]
    error = publisher.refused(*call, "lab/base")
    wanted, found = (base_hash(load_base(str(base)).unet) for base in (originals["base"], other))
    assert f"UNet has the SHA-256 {found}, the adapter was trained on {wanted}" in error
    shutil.copytree(originals["base"], shards)
    (shards / UNET).unlink()
    load_base(str(originals["base"])).unet.save_pretrained(shards / "unet", max_shard_size="10KB")
    assert len(list((shards / "unet").glob("*-of-*.safetensors"))) > 1
    upload(hub, tmp_path, shards, "lab/shards")
    publisher.made(*call, "lab/shards")
    older = tmp_path / "older"  # which carries no hash of its base
    shutil.copytree(originals["adapter"], older)
    save_file(load_file(older / "pytorch_lora_weights.safetensors"), older / "pytorch_lora_weights.safetensors")
    put(hub, "models", "lab/edited", README__md="changed on the page")
    publisher.made(older, "lab/older", "--base-model", "lab/edited")
    put(hub, "models", "lab/edited", **{"scheduler/scheduler_config.json": "{}"})
    assert "its content has the fingerprint" in publisher.refused(older, "lab/older", "--base-model", "lab/edited")


def trained_on(adapter: Path, place: Path, commit: str) -> Path:
    """The same adapter as if `lab/base` had been read from the Hub at a commit."""
    shutil.copytree(adapter, place)
    run = json.loads((place / "run.json").read_text())
    run["config"] |= {"base_model": "lab/base", "base_revision": commit}
    run["inputs"]["base_model"] = f"lab/base@{commit}"
    write_json(place / "run.json", run)
    return place


def test_an_adapter_of_a_newer_commit_of_the_same_base_replaces_the_older_one(hub, publisher, originals, tmp_path):
    first = publisher.made(originals["base"], "lab/base")["commit"]
    publisher.made(trained_on(originals["adapter"], tmp_path / "first", first), "lab/adapter")
    put(hub, "models", "lab/base", README__md="another card")
    second = newest(hub, "models", "lab/base")
    retrained = make_adapter(tmp_path / "retrained", originals["base"], seed=3)
    made = publisher.made(trained_on(retrained, tmp_path / "second", second), "lab/adapter")
    assert made["changed"] and second != first
    card = content(hub, "models", "lab/adapter")["README.md"].decode()
    assert f'base, revision = "lab/base", "{second}"' in card
    elsewhere = make_adapter(tmp_path / "elsewhere", make_base(tmp_path / "other", seed=1))
    error = publisher.refused(trained_on(elsewhere, tmp_path / "third", second), "lab/adapter")
    assert "of another base model, lab/base with a UNet of SHA-256" in error


def test_private_things_do_not_slip_into_a_public_repo(hub, publisher, originals, tmp_path):
    controls = make_candidates(tmp_path / "controls", controls=5)
    hub.store.create("datasets", "lab/open")
    error = publisher.refused(originals["feedback"], "lab/open")
    assert "is public, and this goes out private unless you say `--public`" in error
    assert "shows real images (5) to everyone" in publisher.refused(controls, "lab/controls", "--public")
    assert "shows real images (600)" in publisher.refused(originals["evaluation"], "lab/report", "--public")
    terms = ["--data-license", "CC BY 4.0", "--consent", "for research and teaching"]
    made = publisher.made(controls, "lab/controls", "--public", *terms)
    assert not made["private"] and "real images among it: 5" in made["checks"]
    card = content(hub, "datasets", "lab/controls")["README.md"].decode()
    assert "| not stated | CC BY 4.0 | for research and teaching |" in card and "5 of them are **real**" in card
    assert "is public, and this goes out private" in publisher.refused(controls, "lab/controls", "--private")


def test_graded_real_images_go_public_only_with_licence_and_consent_and_no_card_calls_them_synthetic(
    hub, publisher, originals, tmp_path
):
    real = make_real(tmp_path / "data")
    grades = make_grades(tmp_path / "grades", real)
    record(grades, "import")
    made = {"grades": (grades, "--candidates", real), "feedback": (make_feedback(tmp_path / "f", real, grades),)}
    terms = ["--data-license", "CC BY 4.0", "--consent", "for research and teaching"]
    for name, call in made.items():
        assert "shows real images (30) to everyone" in publisher.refused(
            *call[:1], f"lab/{name}", "--public", *call[1:]
        )
        assert (
            "real images among it: 30"
            in publisher.made(*call[:1], f"lab/{name}", "--public", *terms, *call[1:])["checks"]
        )
        card = content(hub, "datasets", f"lab/{name}")["README.md"].decode()
        assert "synthetic" not in card.lower() and "30 of the graded images are **real** ones.\n" in card
    unknown = make_candidates(tmp_path / "unknown")
    without_kind(unknown)
    assert "shows real images (30) to everyone" in publisher.refused(unknown, "lab/unknown", "--public")


def test_graded_synthetic_images_go_public_also_those_of_feedback_made_before_it_kept_their_kind(
    hub, publisher, originals, tmp_path
):
    folder = tmp_path / "feedback"
    shutil.copytree(originals["feedback"], folder)
    kept = publisher.made(folder, "lab/feedback", "--public")
    without_kind(folder)
    older = publisher.made(folder, "lab/older", "--public")
    assert not any("real images" in check for check in kept["checks"] + older["checks"])
    assert "# Expert feedback on synthetic medical" in content(hub, "datasets", "lab/older")["README.md"].decode()


def without_kind(folder: Path) -> None:
    for path in (folder / "data").glob("*.parquet"):
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["kind"]), path)


def test_columns_that_pathalign_does_not_write_stay_here_in_every_shard(hub, publisher, originals, tmp_path):
    folder = tmp_path / "candidates"
    for shard in range(2):
        made = images(10, shard, 16)
        columns = {"seed": list(range(10)), "kind": ["synthetic"] * 10, "patient": ["Ada Lovelace, 1815"] * 10}
        columns |= {"source_file": ["slides/lovelace.svs"] * 10, "steps": ["Lovelace"] * 10, "failed_ada": ["x"] * 10}
        replace(made, columns=columns).save(folder, shard=(shard, 2))
    record(folder, "generate", inputs={"model": "0" * 16}, metrics={"n": 20})
    made = publisher.made(folder, "lab/candidates")
    assert "other columns stay here: failed_ada, patient, source_file, steps" in made["checks"]
    graded = publisher.made(make_grades(tmp_path / "g", make_real(tmp_path / "data")), "lab/grades")
    assert "other columns stay here: auto_area_px, source_image" in graded["checks"]
    for name, shards, known in (("candidates", 2, ["seed", "kind"]), ("grades", 1, [])):
        files = content(hub, "datasets", f"lab/{name}")
        tables = [data for path, data in files.items() if path.startswith("data/")]
        assert len(tables) == shards
        for data in tables:
            schema = pyarrow.parquet.read_schema(io.BytesIO(data))
            features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
            assert schema.names == list(features) == ["image", "image_id", "label", *known]
        assert not any(b"lovelace" in data.lower() for data in files.values())
        assert not any(word in data for data in tables for word in (b"patient", b"source_", b"failed_ada"))


def test_files_that_pathalign_does_not_write_stay_here_and_are_named(hub, publisher, originals, tmp_path):
    publisher.made(originals["base"], "lab/origin")
    for name, kind in REPO_OF.items():
        extra = ["--base-model", "lab/origin"] if name == "adapter" else []
        folder = tmp_path / name
        shutil.copytree(originals[name], folder)
        (folder / "notes").mkdir()
        (folder / "notes" / "todo.txt").write_text("ask the ward")
        (folder / "patients.csv").write_text("Ada Lovelace")
        (folder / "data").mkdir(exist_ok=True)
        shutil.copyfile(originals["grades"] / "grades.jsonl", folder / "data" / "grades.jsonl")
        before = publisher.made(originals[name], f"lab/{name}", *extra, "--dry-run")
        made = publisher.made(folder, f"lab/{name}", *extra)
        (check,) = [check for check in made["checks"] if check.startswith("other files stay here: ")]
        assert {"data/grades.jsonl", "notes/todo.txt", "patients.csv"} <= set(check.split(": ")[1].split(", ")), name
        files = set(content(hub, kind, f"lab/{name}")) - {".gitattributes"}
        assert files == {file["path"] for file in before["files"]}, name


def test_what_goes_out_private_does_not_get_into_a_repo_that_becomes_public_meanwhile(
    hub, publisher, originals, tmp_path
):
    hub.faults.set(Fault("repos/create", 200, delay_s=1.5))

    def somebody() -> None:
        while not any("repos/create" in request for request in hub.faults.requests):
            time.sleep(0.05)
        hub.store.create("datasets", "lab/race")

    with ThreadPoolExecutor(1) as others:
        quicker = others.submit(somebody)
        error = publisher.refused(originals["candidates"], "lab/race")
        quicker.result()
    assert "lab/race has become public meanwhile, and this goes out private; nothing was sent" in error
    assert len(titles(hub, "datasets", "lab/race")) == 1


def test_simulated_grades_go_out_only_marked_in_the_first_line(hub, publisher, originals, tmp_path):
    grades = make_grades(tmp_path / "grades", originals["candidates"], ("simulated-1", "reader-1"))
    error = publisher.refused(grades, "lab/grades")
    assert "30 of 60 grades are by simulated graders and would pass for expert feedback" in error
    publisher.made(grades, "lab/grades", "--simulated")
    files = content(hub, "datasets", "lab/grades")
    first = files["README.md"].decode().split("---\n", 2)[2].strip().splitlines()[0]
    assert first.startswith("**SIMULATED: 30 of 60 grades are by networks, not by experts.")
    assert "simulated-feedback" in front_matter(files["README.md"])["tags"]
    rows = pyarrow.parquet.read_table(io.BytesIO(files["feedback/grades.parquet"])).to_pylist()
    assert [row["simulated"] for row in rows].count(True) == 30
    assert all(row["simulated"] == (row["grader"] == "simulated-1") for row in rows)


def test_names_comments_paths_and_metadata_of_pictures_stay_here(hub, publisher, originals, tmp_path):
    named = make_grades(tmp_path / "named", originals["candidates"], ("Ada Lovelace", "reader-1"))
    error = publisher.refused(named, "lab/named")
    assert "1 of 2 graders are called by what may be a name (Ada..., 12 characters)" in error
    publisher.made(originals["grades"], "lab/plain")
    publisher.made(originals["grades"], "lab/talk", "--comments")
    for name, comment in (("plain", None), ("talk", "seen at the Institute")):
        rows = content(hub, "datasets", f"lab/{name}")["feedback/grades.parquet"]
        assert set(pyarrow.parquet.read_table(io.BytesIO(rows))["comment"].to_pylist()) == {comment}
    folder = make_candidates(tmp_path / "candidates")
    name = folder / "data" / "train-00000-of-00001.parquet"
    table = pyarrow.parquet.read_table(name)
    pictures = [{"bytes": with_secret(row["bytes"]), "path": "/home/ada/x.png"} for row in table["image"].to_pylist()]
    column = pyarrow.chunked_array([pyarrow.array(pictures, table.schema.field("image").type)])
    pyarrow.parquet.write_table(table.set_column(0, table.schema.field("image"), column), name)
    (folder / "samples.png").write_bytes(with_secret((folder / "samples.png").read_bytes()))
    before = name.read_bytes()
    made = publisher.made(folder, "lab/candidates")
    files = content(hub, "datasets", "lab/candidates")
    assert not any(b"Ada Lovelace" in data or b"/home/" in data for data in files.values())
    assert "metadata taken out of pictures, in 2 files" in made["checks"] and name.read_bytes() == before
    rows = pyarrow.parquet.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))["image"].to_pylist()
    for row, dirty in zip(rows, pictures, strict=True):
        assert Image.open(io.BytesIO(row["bytes"])).tobytes() == Image.open(io.BytesIO(dirty["bytes"])).tobytes()
        assert row["path"] is None and b"Ada" in dirty["bytes"]


def with_secret(picture: bytes) -> bytes:
    """The same PNG with a name in its text and its EXIF."""
    text, made = PngInfo(), io.BytesIO()
    text.add_text("Author", "Ada Lovelace")
    exif = Image.Exif()
    exif[0x013B] = "Ada Lovelace"
    Image.open(io.BytesIO(picture)).save(made, "PNG", pnginfo=text, exif=exif)
    return made.getvalue()


def test_what_cannot_be_taken_out_is_refused_by_file_and_find_and_not_repeated(hub, publisher, originals, tmp_path):
    token = "hf_" + "aBcD" * 8
    folder = tmp_path / "base"
    shutil.copytree(originals["base"], folder)
    (folder / "log.jsonl").write_text(f"ask ada@institute.org\nor use {token}\n")
    (folder / "pipeline.py").write_text("cells = '/home/ada/cells'\n")
    (folder / "unet" / "model.bin").write_bytes(b"x")
    assert "model.bin: weights and arrays go as safetensors only" in publisher.refused(folder, "lab/base")
    (folder / "unet" / "model.bin").unlink()
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "final.png").write_bytes(b"x")
    error = publisher.refused(folder, "lab/base")
    for words in (
        "log.jsonl:1: an e-mail address",
        "log.jsonl:2: a token",
        "pipeline.py:1: a path",
        "final.png: is nei",
    ):
        assert words in error
    assert token not in error and "ada@institute" not in error and writes(hub) == []


@pytest.mark.parametrize(
    "fault",
    [
        Fault("/commit/", 409, times=2),
        Fault("/commit/", 412, times=1),
        Fault("/commit/", 429, times=1, headers={"Retry-After": "1"}),
        Fault("/commit/", 503, times=1),
        Fault("/commit/", 500, after=True, times=1),
        Fault("/commit/", 0, times=1),
        Fault("/commit/", 0, after=True, times=1),
        Fault("repos/create", 0, after=True, times=1),
        Fault("/tag/", 0, after=True, times=1),
        Fault("GET /api/models/lab/reward$", 502, times=2),
    ],
    ids=lambda fault: f"{fault.match.split('/')[-2 if fault.match.endswith('/') else -1]}-{fault.name}",
)
def test_a_fault_is_waited_out_and_the_commit_is_there_once(hub, publisher, originals, tmp_path, fault):
    hub.faults.set(fault)
    made = publisher.made(originals["reward"], "lab/reward", "--revision-tag", "v1")
    assert hub.faults.hits[fault.name] >= 1
    assert [title.split()[0] for title in titles(hub, "models", "lab/reward")] == ["Publish", "initial"]
    repo = hub.store.repo("models", "lab/reward", hub.token)
    assert hub.store.resolve(repo, "v1") == hub.store.resolve(repo, "main") == made["commit"]


def test_a_hub_that_refuses_is_not_asked_again(hub, publisher, originals, tmp_path):
    hub.faults.set(Fault("/commit/", 403))
    assert "refused your token (403): it lacks the right" in publisher.refused(originals["reward"], "lab/reward")
    assert hub.faults.hits["403"] == 1


def test_where_nobody_answers_the_error_says_so_and_what_to_do(originals, hub, tmp_path):
    code = "from pathalign.hub import commits; commits.UNREACHABLE_PATIENCE_S = 0.0\n"
    code += f"from pathalign.cli import main; main(['publish', {str(originals['reward'])!r}, 'lab/reward'])"
    variables = hub.variables(tmp_path, HF_ENDPOINT="http://127.0.0.1:1")
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert (
        "The model 'lab/reward' on http://127.0.0.1:1 cannot be reached (ConnectError). Check your con" in done.stderr
    )
    assert "HF_ENDPOINT, and run the same command again" in done.stderr


def test_a_tag_stays_where_it_is(hub, publisher, originals, tmp_path):
    folder = make_reward(tmp_path / "reward")
    first, again = [publisher.made(folder, "lab/r", "--revision-tag", "v1") for _ in range(2)]
    assert first["commit"] == again["commit"] and not again["changed"]
    newer = make_reward(tmp_path / "newer", mark=1)
    error = publisher.refused(newer, "lab/r", "--revision-tag", "v1")
    assert f"'v1' of lab/r is at commit {first['commit'][:8]} already" in error
    assert len(titles(hub, "models", "lab/r")) == 2
    second = publisher.made(newer, "lab/r", "--revision-tag", "v2")
    dry, again = (publisher(newer, "lab/r", "--revision-tag", "v3", *more)["out"] for more in (["--dry-run"], []))
    assert "nothing has changed since the last commit. The commit would have the tag v3." in dry
    assert f"Nothing has changed since commit {second['commit']}, which has the tag v3; no commit was made." in again
    repo = hub.store.repo("models", "lab/r", hub.token)
    assert [hub.store.resolve(repo, tag) for tag in ("v1", "v2", "v3")] == [first["commit"], *[second["commit"]] * 2]


def test_figures_are_the_reports_own_in_table_front_matter_and_eval_results(hub, publisher, originals, tmp_path):
    publisher.made(originals["base"], "lab/base")
    hub.store.create("datasets", "lab/cells")
    cells = hub.store.repo("datasets", "lab/cells", hub.token)
    commit = newest(hub, "datasets", "lab/cells")
    hub.store.add_ref(cells, "refs/tags/v3", commit)
    put(hub, "datasets", "lab/cells", later__txt="not measured")
    call = [originals["adapter"], "lab/adapter", *EXTRA["adapter"], "--report", originals["evaluation"]]
    assert "has no revision 'v4'" in publisher.refused(*call, "--dataset", "lab/cells@v4")
    assert "The dataset 'lab/absent' on" in publisher.refused(*call, "--dataset", "lab/absent@v3")
    publisher.made(*call, "--dataset", "lab/cells@v3", "--license", "mit")
    files = content(hub, "models", "lab/adapter")
    data = front_matter(files["README.md"])
    (result,) = data["model-index"][0]["results"]
    assert data["model-index"][0]["name"] == "lab/adapter" and data["license"] == "mit"
    assert result["dataset"] == {"name": "lab/cells", "type": "lab/cells", "split": "test", "revision": commit}
    assert data["datasets"] == ["lab/cells"]
    report = json.loads((originals["evaluation"] / "metrics.json").read_text())["metrics"]["after"]
    shown = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert shown == {name: report[name] for name in ("plausible_share", "kid")}
    assert result["metrics"][0]["args"] == {"n": 500, "interval": report["plausible_ci"]}
    entries = yaml.safe_load(files[".eval_results/pathalign.yaml"])
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == shown
    assert entries[0]["dataset"] == {"id": "lab/cells", "task_id": "plausible_share", "revision": commit}
    assert "n = 500, interval 0.67 to 0.75; split test" in entries[0]["notes"]
    card = files["README.md"].decode()
    assert "| plausible, by the judge | 0.54 (0.5 to 0.58) | 0.71 (0.67 to 0.75) | 0.9 |" in card
    for name in ("before", "after"):
        assert f"](images/samples_{name}.png)" in card and f"images/samples_{name}.png" in files
    assert data["widget"][0]["output"]["url"] == "images/samples_after.png"
    assert "- recall: 0.61 to 0.57" in card and "no near-copy of one: not measured" in card
    assert "Criteria: nucleus." in card and "| 90 | 3 | 0.7 |" in card
    publisher.made(*call, "--dataset", "lab/cells")
    card = content(hub, "models", "lab/adapter")["README.md"].decode()
    assert f"`lab/cells`, revision {newest(hub, 'datasets', 'lab/cells')}, as the publisher states." in card


def test_a_rewards_figures_name_the_feedback_that_they_were_measured_on_and_no_other(
    hub, publisher, originals, tmp_path
):
    feedback = publisher.made(originals["feedback"], "lab/feedback")
    call = [make_reward(tmp_path / "reward"), "lab/reward", "--dataset", f"lab/feedback@{feedback['commit']}"]
    assert "The figures were not measured on lab/feedback@" in publisher.refused(*call)
    inputs = {"feedback": fingerprint(originals["feedback"])}
    record(tmp_path / "reward", "reward", config={"feedback": str(originals["feedback"])}, inputs=inputs)
    publisher.made(*call)
    files = content(hub, "models", "lab/reward")
    entries = yaml.safe_load(files[".eval_results/pathalign.yaml"])
    (result,) = front_matter(files["README.md"])["model-index"][0]["results"]
    assert result["dataset"]["revision"] == entries[0]["dataset"]["revision"] == feedback["commit"]
    assert [entry["value"] for entry in entries] == [metric["value"] for metric in result["metrics"]] == [0.913, 0.04]
    assert f"`lab/feedback`, revision {feedback['commit']}." in files["README.md"].decode()
    put(hub, "datasets", "lab/feedback", **{"feedback/grades.parquet": "other grades"})
    publisher.made(*call[:3], "lab/feedback")  # its manifest says the same, and is no longer true
    assert "as the publisher states." in content(hub, "models", "lab/reward")["README.md"].decode()


def test_an_evaluation_of_repos_at_commits_is_a_report_on_what_they_held(hub, publisher, originals, tmp_path):
    base = publisher.made(originals["base"], "lab/base")["commit"]
    call = [originals["adapter"], "lab/adapter", *EXTRA["adapter"]]
    commit = publisher.made(*call)["commit"]
    hub.store.create("datasets", "lab/cells")
    cells = newest(hub, "datasets", "lab/cells")
    evaluation = make_evaluation(tmp_path / "evaluation", originals["adapter"])

    def measured(**inputs: str) -> Path:
        record(evaluation, "evaluate", config=inputs, inputs={"data": f"lab/cells@{cells}", **inputs})
        return evaluation

    publisher.made(*call, "--report", measured(adapter=f"lab/adapter@{commit}"))
    files = content(hub, "models", "lab/adapter")
    (result,) = front_matter(files["README.md"])["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["dataset"]["revision"]) == ("lab/cells", cells)
    assert b".eval_results" in b" ".join(path.encode() for path in files)
    publisher.made(originals["base"], "lab/base", "--report", measured(model=f"lab/base@{base}"))
    samples = make_candidates(tmp_path / "samples")
    record(samples, "generate", inputs={"model": f"lab/base@{base}"})
    seen = f"lab/samples@{publisher.made(samples, 'lab/samples')['commit']}"
    publisher.made(originals["base"], "lab/base", "--report", measured(before=seen))
    assert "Nothing tells which adapter" in publisher.refused(*call, "--report", measured(after=seen))
    put(hub, "datasets", "lab/cells", more__txt="more")
    error = publisher.refused(*call, "--report", measured(adapter=f"lab/adapter@{commit}"), "--dataset", "lab/cells")
    assert f"but on lab/cells@{cells}, which the records name; leave out `--dataset`" in error
    put(hub, "models", "lab/adapter", **{"pytorch_lora_weights.safetensors": "something else"})
    changed = f"lab/adapter@{newest(hub, 'models', 'lab/adapter')}"
    assert f"another adapter ({changed}, finger" in publisher.refused(*call, "--report", measured(adapter=changed))


def test_a_report_about_something_else_is_refused(hub, publisher, originals, tmp_path):
    publisher.made(originals["base"], "lab/base")
    other = make_adapter(tmp_path / "other", originals["base"], seed=1)
    call = [originals["adapter"], "lab/adapter", *EXTRA["adapter"], "--report"]
    error = publisher.refused(*call, make_evaluation(tmp_path / "other_evaluation", other))
    assert "measured another adapter" in error
    phantom = make_evaluation(tmp_path / "phantom", originals["adapter"], phantom=True)
    assert "measured drawn phantoms" in publisher.refused(*call, phantom, "--dataset", "lab/cells")
    assert "is no evaluation" in publisher.refused(*call, originals["reward"])


def test_a_card_that_the_hub_does_not_take_stops_everything(hub, publisher, originals, tmp_path):
    hub.faults.set(Fault("validate-yaml", 400))
    assert "does not take the card of lab/reward" in publisher.refused(originals["reward"], "lab/reward")
    assert writes(hub) == []


def test_a_licence_that_the_hub_takes_only_with_more_is_refused_with_what_to_give_instead(hub, publisher, originals):
    error = publisher.refused(originals["reward"], "lab/reward", "--license", "other")
    assert "Give the licence's own identifier, such as cc-by-nc-4.0" in error and "put a file LICENSE into" in error
    assert hub.faults.requests == []


def test_the_token_is_in_no_output_no_file_and_no_commit(hub, originals, tmp_path):
    token = "hf_" + "xYz9" * 8
    hub.store.add_token(token, "lab")
    hub.faults.set(Fault("/commit/", 503, times=1))
    leak = tmp_path / "leak"
    shutil.copytree(originals["reward"], leak)
    (leak / "log.jsonl").write_text(f"token={token}")
    publisher = Publisher(hub, tmp_path / "home", token)
    calls = [(originals["base"], "lab/base"), (originals["base"], "lab/base", "--json"), (leak, "lab/leak")]
    printed = json.dumps([publisher(*call) for call in [*calls, (originals["reward"], "nobody/reward")]])
    publisher.close()
    assert "403" in printed and "a token" in printed and "trying again" in printed and token not in printed
    files = content(hub, "models", "lab/base")
    assert len(files) > 5 and not any(token.encode() in data for data in files.values())
    assert token not in str(titles(hub, "models", "lab/base"))
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert kept and not any(token.encode() in path.read_bytes() for path in kept)


def test_grades_go_with_the_images_and_the_agreement_that_belong_to_them(hub, publisher, originals, tmp_path):
    lost = tmp_path / "feedback"
    shutil.copytree(originals["feedback"], lost)
    run = json.loads((lost / "run.json").read_text())
    write_json(lost / "run.json", run | {"config": run["config"] | {"grades": "/nowhere/grades"}})
    assert "are not at /nowhere/grades; name them with `--grades`" in publisher.refused(lost, "lab/feedback")
    other = make_grades(tmp_path / "grades", originals["candidates"], ("reader-1", "reader-9"))
    assert "does not hold the grades that" in publisher.refused(lost, "lab/feedback", "--grades", other)
    made = publisher.made(lost, "lab/feedback", "--grades", originals["grades"])
    shutil.rmtree(tmp_path / "grades")
    shutil.copytree(originals["grades"], tmp_path / "grades")  # the run was moved as a whole: they lie beside it
    assert publisher.made(lost, "lab/feedback")["changed"] is False
    files = content(hub, "datasets", "lab/feedback")
    agreement = pyarrow.parquet.read_table(io.BytesIO(files["feedback/agreement.parquet"])).to_pylist()
    report = json.loads((originals["feedback"] / "agreement.json").read_text())
    assert agreement[0]["value"] == report["krippendorff_alpha"]["value"] and agreement[0]["n"] == 30
    assert {row["measure"] for row in agreement} == {
        "krippendorff_alpha", "fleiss_kappa", "cohen_kappa", "intra_rater_kappa",
    }  # fmt: skip
    configs = {entry["config_name"]: entry for entry in front_matter(files["README.md"])["configs"]}
    assert set(configs) == {"candidates", "grades", "agreement"} and configs["candidates"]["default"]
    assert b"/nowhere" not in b"".join(files.values()) and made["changed"]
    bare = make_grades(tmp_path / "bare", originals["candidates"])
    record(bare, "import")
    assert "name them with `--candidates`" in publisher.refused(bare, "lab/bare")
