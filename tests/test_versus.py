"""Two models against each other: the same noise for both, blind sides, and votes that are kept like grades."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from test_access import hub_session
from test_results import space_module
from tiny_artefacts import reward_model

from pathalign.diffusion import lora
from pathalign.generate import load_pipeline, sample, set_scheduler
from pathalign.grading.exports import ExportOptions, export, read_recorded
from pathalign.grading.outbox import Outbox
from pathalign.grading.sinks import FolderSink
from pathalign.grading.versus import ALIGNED, BASE, NAMING, Comparison, Contender, Votes, contenders, keep_pool
from pathalign.grading.versus_rewards import ComparisonRewards
from pathalign.images import ImageSet, to_pixel_values
from pathalign.reward import load_reward_model
from pathalign.schema import DISCLAIMER, InputError

PROJECT = Path(__file__).resolve().parents[1]
COMPARE = PROJECT / "spaces" / "compare"


def save_models(folder: Path, pipeline) -> tuple[str, str]:
    """A base pipeline and an adapter that changes it, on disk."""
    pipeline.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    lora.attach(pipeline.unet, rank=2, alpha=4, convolutions=True, generator=generator)
    for name, parameter in lora.parameters(pipeline.unet).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    lora.save(pipeline.unet, folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


@pytest.fixture
def comparison(tmp_path, tiny_pipeline) -> Comparison:
    base, adapter = save_models(tmp_path, tiny_pipeline)
    return Comparison(Contender(base), Contender(base, adapter), inference_steps=2)


@pytest.fixture
def pool(comparison) -> ImageSet:
    return comparison.pool(2)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


@pytest.fixture
def outbox(tmp_path):
    box = Outbox(tmp_path / "state", FolderSink(tmp_path / "votes"), start=False)
    yield box
    box.close()


def test_both_models_start_from_the_same_noise(comparison, tmp_path):
    drawn = comparison.draw("b", (5, 6))
    plain = load_pipeline(str(tmp_path / "base"))
    set_scheduler(plain, "dpmsolver++")
    torch.testing.assert_close(drawn[BASE], sample(plain, [1, 1], [5, 6], 2))
    lora.load(plain, str(tmp_path / "adapter"))
    torch.testing.assert_close(drawn[ALIGNED], sample(plain, [1, 1], [5, 6], 2))
    assert not torch.equal(drawn[BASE], drawn[ALIGNED])
    assert comparison.draw("b", (5, 6)) is drawn  # kept


def test_images_are_drawn_once_and_before_a_gpu_is_asked_for_to_judge_them(tmp_path, tiny_pipeline):
    base, adapter = save_models(tmp_path, tiny_pipeline)
    reward_model(classes=("a", "b", "c")).save_with_processor(tmp_path / "reward")
    calls, within = [], []

    def lend(compute):
        def lent(*arguments):
            assert not within, "a GPU within another's time"
            calls.append(compute.__name__)
            within.append(compute)
            try:
                return compute(*arguments)
            finally:
                within.pop()

        return lent

    comparison = Comparison(Contender(base), Contender(base, adapter), inference_steps=2, around=lend)
    rewards = ComparisonRewards(comparison, str(tmp_path / "reward"), around=lend)
    drawn = comparison.draw("b", (5, 6))
    judged, looks = rewards.rewards("b", (5, 6)), rewards.looks("b", (5, 6))
    assert rewards.rewards("b", (5, 6)) is judged
    assert calls == ["_draw", "_judge_images", "_explain_images"]
    model = load_reward_model(str(tmp_path / "reward"))
    for role in (BASE, ALIGNED):
        expected = model.rewards(to_pixel_values(drawn[role]), torch.tensor([1, 1]))
        torch.testing.assert_close(torch.tensor([found.reward for found in judged[role]]), expected.detach())
        assert [picture[:4] for picture in looks[role]] == [b"\x89PNG"] * 2


def test_models_are_named_as_two_pipelines_or_adapters_and_nothing_named_says_how():
    assert contenders("base", None, None, "adapter") == (Contender("base"), Contender("base", "adapter"))
    assert contenders("base", "one", None, "two") == (Contender("base", "one"), Contender("base", "two"))
    assert contenders("base", "", "other", "") == (Contender("base"), Contender("other"))
    for named in ((None,) * 4, ("base", None, None, None), (None, None, "other", "adapter"), ("base", "one", "", "")):
        with pytest.raises(InputError, match="No models are named") as error:
            contenders(*named)
        assert str(error.value) == NAMING
    with pytest.raises(InputError, match="Both models are base"):
        contenders("base", None, "base", None)


def test_models_without_a_common_class_and_unknown_samplers_are_refused(tmp_path, tiny_pipeline):
    base, adapter = save_models(tmp_path, tiny_pipeline)
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(config | {"id2label": {"0": "x", "1": "y", "2": "z"}}))
    with pytest.raises(InputError, match=r"no class in common: \['a', 'b', 'c'\] against \['x', 'y', 'z'\]"):
        Comparison(Contender(base), Contender(str(other)))
    with pytest.raises(InputError, match=r"There is no sampler 'dimm'. Did you mean 'ddim'"):
        Comparison(Contender(base), Contender(base, adapter), scheduler="dimm")


def test_every_pair_comes_once_in_an_order_and_on_sides_of_chance(pool, outbox):
    votes = Votes(pool, outbox, b"secret", Clock())
    role = dict(zip(pool.image_ids, pool.columns["role"], strict=True))
    seen, orders, sides = [], [], set()
    for grader in ("grader-1", "grader-2", "grader-3"):
        order = []
        while showing := votes.next_showing(grader):
            assert {role[showing.left_id], role[showing.right_id]} == {BASE, ALIGNED}
            sides.add(role[showing.left_id])
            order.append(frozenset((showing.left_id, showing.right_id)))
            assert votes.record(grader, showing, "left", "session")
        assert votes.progress(grader) == (6, 6)
        orders.append(tuple(order))
        seen += order
    assert {len(set(order)) for order in orders} == {6}
    assert len(set(orders)) == 3
    assert sides == {BASE, ALIGNED}  # 18 sides all alike: 1 in 131,072


def test_a_vote_is_recorded_once_and_a_click_that_comes_too_soon_is_none(pool, outbox):
    clock = Clock()
    votes = Votes(pool, outbox, b"secret", clock)
    showing = votes.next_showing("grader-1")
    clock.now -= 9.9
    assert not votes.record("grader-1", showing, "left", "session")
    assert outbox.rows("preference") == []
    threads = [
        threading.Thread(target=votes.record, args=("grader-1", showing, choice, "session"))
        for choice in ("right", "right", "right", "tie")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (row,) = outbox.rows("preference")
    assert row["preference_id"] == showing.preference_id
    assert row["grader"] == "grader-1"
    assert not {"role", "seed", "model", "name"} & set(row)
    with pytest.raises(InputError, match="Did you mean 'left'"):
        votes.record("grader-1", showing, "lift", "session")


def test_votes_go_on_after_a_restart_with_an_empty_disk(pool, outbox, tmp_path):
    votes = Votes(pool, outbox, b"secret", Clock())
    for _ in range(4):
        assert votes.record("grader-1", votes.next_showing("grader-1"), "left", "session")
    assert outbox.flush()
    fresh = Outbox(tmp_path / "fresh", FolderSink(tmp_path / "votes"), start=False)
    fresh.restore()
    assert Votes(pool, fresh, b"secret").progress("grader-1") == (4, 6)
    fresh.close()


def test_votes_become_pairs_for_dpo_and_say_how_often_the_aligned_model_won(pool, outbox, tmp_path):
    folder = keep_pool(pool, FolderSink(tmp_path / "votes"))
    assert keep_pool(pool, FolderSink(tmp_path / "votes")) == folder
    votes = Votes(pool, outbox, b"secret", Clock())
    role = dict(zip(pool.image_ids, pool.columns["role"], strict=True))
    for turn in range(6):
        showing = votes.next_showing("grader-1a2b3c4d")
        aligned = "left" if role[showing.left_id] == ALIGNED else "right"
        other = "right" if aligned == "left" else "left"
        assert votes.record("grader-1a2b3c4d", showing, [aligned, aligned, aligned, other, "tie", "tie"][turn], "s")
    assert outbox.flush()
    candidates = ImageSet.load(tmp_path / "votes" / folder)
    assert candidates.image_ids == pool.image_ids
    record = export(read_recorded(tmp_path / "votes"), tmp_path / "out", ExportOptions(("preferences",)), candidates)
    found = record.metrics["preferences"]
    assert (found["pairs"], found["undecided"]) == (4, 2)
    assert (found["aligned_over_base"]["wins"]["value"], found["aligned_over_base"]["ties"]) == (0.75, 2)


def test_a_pair_of_equal_images_is_not_asked_about(pool, outbox):
    ids = list(pool.image_ids)
    ids[1] = ids[0]
    assert len(Votes(replace(pool, image_ids=tuple(ids)), outbox, b"s").pairs) == 5


def on_a_space(monkeypatch, tmp_path, pool, *arguments: str) -> tuple[Any, dict[str, Any]]:
    """The ballot as a Space opens it, and what the page calls by name: `show` and `vote`."""
    app = space_module("compare/app")
    monkeypatch.setattr(app, "ON_SPACE", True)
    monkeypatch.setattr(app.gr, "LoginButton", lambda: None)  # off a Space it would ask for a Hub account
    monkeypatch.setenv("PATHALIGN_STUDY_SECRET", "sixteen letters!")
    options = app.read_options(["--votes", str(tmp_path / "votes"), *arguments])
    comparison = SimpleNamespace(pool=lambda pairs_per_class: pool, class_names=pool.class_names)
    ballot = app.open_ballot(options, comparison)
    page = app.build_page(comparison, ballot)
    return ballot, {call.fn.__name__: call.fn for call in page.fns.values()}


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ([], {"ada", "Bea", "zoe"}),
        (["--voters", "Ada, Bea"], {"ada", "Bea"}),
        (["--voters", "Ada", "--organization", "Lab"], {"ada", "zoe"}),
        (["--organization", "Lab"], {"zoe"}),
    ],
)
def test_on_a_space_those_vote_who_are_listed_and_without_a_list_all_who_sign_in(
    monkeypatch, tmp_path, pool, arguments, allowed
):
    ballot, calls = on_a_space(monkeypatch, tmp_path, pool, *arguments)
    for name in ("ada", "Bea", "zoe", None):
        session = hub_session(name, ("lab",) if name == "zoe" else ()) if name else {}
        request = SimpleNamespace(session=session, session_hash="s")
        shown, showing = calls["show"](request)
        assert (showing is not None) == (name in allowed), name
        reason = "Sign in to vote" if name is None else f"{name} is not on the list of those who may vote here"
        assert (reason in shown) == (name not in allowed)
        before = len(ballot.votes.outbox.rows("preference"))
        handed_out = replace(ballot.votes.next_showing("grader-1"), shown_at=0)
        calls["vote"](handed_out, request)
        assert len(ballot.votes.outbox.rows("preference")) - before == (name in allowed), name
    ballot.votes.outbox.close()


def test_a_list_of_voters_that_names_nobody_does_not_let_everybody_in(capsys):
    with pytest.raises(SystemExit):
        space_module("compare/app").read_options(["--voters", " , "])
    assert "' , ' names nobody" in capsys.readouterr().err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_a_foreign_origin_gets_403_on_every_mutating_call_and_nobody_is_kept_from_looking():
    app = space_module("compare/app")
    page = app.build_page(None, problem="no models")
    page.launch = partial(page.launch, _frontend=False)
    app.launch(page, "127.0.0.1", free_port(), block=False)
    try:
        with httpx.Client(base_url=page.local_url) as client:
            own = page.local_url.rstrip("/")
            for path in ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/upload"):
                assert client.post(path, json={}, headers={"origin": own}).status_code != 403
                for origin in ("http://evil.example", "null", "http://127.0.0.1:9", f"{own}.evil.example"):
                    reply = client.post(path, json={}, headers={"origin": origin})
                    assert (reply.status_code, reply.json()["error"][:16]) == (403, "Another web site"), path
                marked = client.post(path, json={}, headers={"sec-fetch-site": "cross-site"})
                assert marked.status_code == 403
            assert client.get("/config", headers={"origin": "http://evil.example"}).status_code == 200
            pointed = client.get("/config", headers={"host": "evil.example"})
            assert pointed.status_code == 403
            assert "does not answer to the name 'evil.example', only to 127.0.0.1" in pointed.json()["error"]
    finally:
        page.close()


def test_the_space_pins_what_was_tested_and_says_what_it_is_not_for():
    data = SpaceCard.load(COMPARE / "README.md").data.to_dict()
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert (data["sdk"], data["sdk_version"], data["app_file"]) == ("gradio", pinned["gradio"], "app.py")
    assert (data["license"], data["hf_oauth"]) == ("apache-2.0", True)
    assert len(data["short_description"]) <= 60
    found = {entry.name: entry for entry in map(Requirement, (COMPARE / "requirements.txt").read_text().split())}
    assert str(found["pathalign"].specifier) == f"=={version('pathalign')}"
    assert str(found["gradio"].specifier) == f"=={pinned['gradio']}"
    assert DISCLAIMER in (COMPARE / "README.md").read_text()
    for name in ("app.py", "page.css"):
        assert not re.search(r"https?://[a-z0-9-]+\.[a-z]", (COMPARE / name).read_text()), name


def test_every_option_of_the_space_is_a_variable_too_but_for_host_and_port(monkeypatch):
    app = space_module("compare/app")
    monkeypatch.setenv("BASE_MODEL", "user/base")
    monkeypatch.setenv("INFERENCE_STEPS", "25")
    monkeypatch.setenv("HOST", "machine.of.somebody")
    options = app.read_options(["--aligned-adapter", "user/adapter"])
    assert (options.base_model, options.aligned_adapter, options.inference_steps) == ("user/base", "user/adapter", 25)
    assert options.host == "127.0.0.1"
    assert app.open_all(app.read_options(["--base-model", "base"]))[2] == NAMING
