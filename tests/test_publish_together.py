"""Publishers and grade sinks at once, on a Hub that fails: nothing lost, nothing doubled, nothing seen half-done."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hub import HubServer, serve
from hub.faults import Fault
from publications import Publisher, make_candidates, make_reward
from safetensors.torch import load as load_tensors

pytestmark = [pytest.mark.hub, pytest.mark.slow]
PUBLISHERS, SINKS, ROUNDS, FILES_EACH = 4, 4, 2, 6
FAULTS = [
    *(Fault("/commit/", status, share=0.06) for status in (409, 412, 500, 503)),
    Fault("/commit/", 429, share=0.06, headers={"Retry-After": "1"}),
    Fault("/commit/", 500, after=True, share=0.08),
    Fault("/commit/", 0, after=True, share=0.08),
    Fault("/commit/", 0, share=0.06),
    Fault("repos/create", 0, after=True, times=1),
    Fault("GET /api/", 503, share=0.03),
    Fault("models/lab/reward/commit/", 200, share=0.5, delay_s=0.7),  # time for somebody else to be quicker
]
SINK = """
import sys, time
from pathalign.grading.hub_sink import HubSink
from pathalign.grading.sinks import SinkError
sink, name, count = HubSink("lab/candidates"), sys.argv[1], int(sys.argv[2])
for number in range(count):
    while True:
        try:
            sink.put(f"grades/{name}-{number}.jsonl", f'{{"grade": "{name}-{number}"}}\\n'.encode())
            break
        except SinkError:
            time.sleep(0.2)
    time.sleep(0.2)
"""
READ = """
import json, sys, warnings
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from pathalign.reward import RewardModel
api, seen, broken = HfApi(), set(), []
def again(call):
    for _ in range(60):
        try:
            return call()
        except Exception as error:
            last = error
    raise last
print("ready", flush=True)
while not Path(sys.argv[1]).exists():
    head = again(lambda: api.model_info("lab/reward").sha)
    if head in seen:
        continue
    seen.add(head)
    folder = Path(again(lambda: snapshot_download("lab/reward", revision=head)))
    if not (folder / "config.json").exists():
        continue  # made, and nothing published yet
    model = RewardModel.from_pretrained(folder)
    marks = {model.config.temperature - 1, next(model.parameters()).flatten()[0].item()}
    marks.add(float((folder / "README.md").read_text().split("On ")[1].split(" held-out")[0]) - 160)
    if len(marks) > 1:
        broken.append([head, sorted(marks)])
print(json.dumps({"seen": len(seen), "broken": broken}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/candidates") as server:
        yield server


def commits(hub: HubServer, kind: str, name: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Id, title and all files of each commit, the newest first."""
    repo = hub.store.repo(kind, name, hub.token)
    for oid, title, _ in hub.store.history(repo, hub.store.resolve(repo, "main")):
        yield oid, title, {path: hub.store.blob(entry.sha256) for path, entry in hub.store.tree(oid).items()}


def log_of(mark: int) -> str:
    return json.dumps({"step": mark}) + "\n"


def check_reward(files: dict[str, bytes]) -> int:
    """Which reward model a commit holds, whole."""
    mark = int(json.loads(files["config.json"])["temperature"] - 1)
    weights = load_tensors(files["model.safetensors"])
    named = [tensor for tensor in weights.values() if tensor.numel() and bool((tensor == mark).all())]
    assert named, "weights of another version than the configuration"
    assert f"On {160 + mark} held-out grades" in files["README.md"].decode()
    assert json.loads(files["evaluation.json"])["overall"]["n"] == 160 + mark
    assert files.get("log.jsonl") == (log_of(mark).encode() if mark % 2 else None)
    return mark


def check_candidates(files: dict[str, bytes], ids: dict[str, int]) -> int:
    """Which candidate set a commit holds, whole."""
    table = pyarrow.parquet.read_table(io.BytesIO(files["data/train-00000-of-00001.parquet"]))
    marks = {ids[image_id] for image_id in table["image_id"].to_pylist()} | {json.loads(files["run.json"])["wall_s"]}
    assert len(marks) == 1 and len(table) == 30
    return int(marks.pop())


def test_four_publishers_and_four_sinks_lose_and_double_nothing_and_no_reader_sees_half(hub, tmp_path):
    count = PUBLISHERS * ROUNDS
    rewards = [make_reward(tmp_path / f"reward-{mark}", mark) for mark in range(1, count + 1)]
    for mark, folder in enumerate(rewards, start=1):
        if mark % 2:  # a file that comes and goes: stale operations would leave it behind
            (folder / "log.jsonl").write_text(log_of(mark))
    sets, ids = [], {}
    for mark in range(1, count + 1):
        sets.append(make_candidates(tmp_path / f"candidates-{mark}", seed=mark))
        run = json.loads((sets[-1] / "run.json").read_text())
        (sets[-1] / "run.json").write_text(json.dumps(run | {"wall_s": mark}))
        table = pyarrow.parquet.read_table(sets[-1] / "data" / "train-00000-of-00001.parquet")
        ids |= dict.fromkeys(table["image_id"].to_pylist(), mark)
    hub.store.create("models", "lab/reward")
    variables, done = hub.variables(tmp_path / "reader"), tmp_path / "done"
    reader = subprocess.Popen([sys.executable, "-c", READ, str(done)], env=variables, stdout=subprocess.PIPE, text=True)
    publishers = [Publisher(hub, tmp_path / f"home-{number}") for number in range(PUBLISHERS)]
    assert all(publisher("--help")["code"] == 0 for publisher in publishers)  # all are up before it begins
    assert reader.stdout and reader.stdout.readline() == "ready\n"
    hub.faults.set(*FAULTS)
    sinks = [
        subprocess.Popen([sys.executable, "-c", SINK, f"sink{number}", str(FILES_EACH)], env=variables)
        for number in range(SINKS)
    ]

    def work(number: int) -> list[dict[str, Any]]:
        mine = range(number, count, PUBLISHERS)
        pairs = [((rewards[at], "lab/reward"), (sets[at], "lab/candidates")) for at in mine]
        return [publishers[number].made(*call) for pair in pairs for call in pair]

    with ThreadPoolExecutor(PUBLISHERS) as pool:
        reports = [report for part in pool.map(work, range(PUBLISHERS)) for report in part]
    assert all(sink.wait(120) == 0 for sink in sinks)
    hub.faults.set()
    done.touch()
    read = json.loads(reader.communicate(timeout=120)[0])
    for publisher in publishers:
        publisher.close()
    assert read["broken"] == [] and read["seen"] >= 3, read
    assert sum(hub.faults.hits.values()) - hub.faults.hits["200"] >= 5, hub.faults.hits
    for kind, name, check in (
        ("models", "lab/reward", check_reward),
        ("datasets", "lab/candidates", lambda files: check_candidates(files, ids)),
    ):
        whole = [entry for entry in commits(hub, kind, name) if "pathalign.json" in entry[2]]
        marks = {oid: check(files) for oid, _, files in whole}  # those that sinks made are looked at too
        made = [oid for oid, title, _ in whole if title.startswith("Publish")]
        assert Counter(marks[oid] for oid in made) == Counter(range(1, count + 1)), name
        assert {report["commit"] for report in reports if report["repo"] == name} == set(made), name
    newest = next(commits(hub, "datasets", "lab/candidates"))[2]
    kept = {path for path in newest if path.startswith("grades/")}
    assert kept == {f"grades/sink{number}-{file}.jsonl" for number in range(SINKS) for file in range(FILES_EACH)}
    assert sum(title.startswith("Add 1 row") for _, title, _ in commits(hub, "datasets", "lab/candidates")) == len(kept)
