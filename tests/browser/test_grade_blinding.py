"""Blinding: nothing that reaches a browser tells a hidden real image or a repeat from the others."""

from __future__ import annotations

import base64
import json
import math
import struct
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from grading_site import Site, chromium, make_site, settle, visit
from playwright.sync_api import Page
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.tree import DecisionTreeClassifier

from pathalign.images import ImageSet

pytestmark = pytest.mark.slow
ITEMS = 240
TELLING = "control repeat showing kind seed score reward uncertain model synthetic drawn_by".split()
WAYS = {  # of grading -> what is in front, the key that answers it, how often
    "single": (".single .stage img", "p", 120),
    "grid": (".grid .tile img", "Enter", 9),
    "pairwise": (".pairwise .side img", "ArrowLeft", 30),
}
SIGNIFICANT = 3.3  # standard errors: one false alarm in a thousand


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = make_site(tmp_path / "study", per_class=40, real_control_share=0.2, repeat_share=0.2, repeat_distance=20)
    yield made.start()
    made.stop()


def truth(site: Site) -> dict[str, str]:
    """Grade id -> what was shown; a later grade of an image is that of its repeat."""
    real = set(ImageSet.load(site.folder / "references").image_ids)
    seen, kinds = set(), {}
    for row in site.rows():
        again = row["image_id"] in seen
        kinds[row["grade_id"]] = "repeat" if again else "control" if row["image_id"] in real else "synthetic"
        seen.add(row["image_id"])
    return kinds


def chunks(png: bytes) -> list[str]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append(png[at + 4 : at + 8].decode())
        at += 12 + length
    return found


def grade(page: Page, mode: str) -> None:
    picture, key, count = WAYS[mode]
    page.click(f".modes [data-mode={mode}]")
    for _ in range(count):
        page.wait_for_selector(picture)
        before = page.get_attribute(picture, "src")
        page.keyboard.press(key)
        page.wait_for_function("([picture, src]) => document.querySelector(picture).src !== src", arg=[picture, before])


@pytest.mark.parametrize("mode", WAYS)
def test_everything_that_a_browser_received_looks_alike_for_all_kinds_of_images(site: Site, mode: str):
    received: list[tuple[str, bytes]] = []
    items: dict[str, dict[str, Any]] = {}

    def keep(response) -> None:
        if response.status == 200 and response.request.resource_type in ("document", "fetch", "xhr", "image"):
            received.append((response.url, response.body()))
        if "component_server" in response.url and response.status == 200:
            reply = response.json()
            items.update({item["item_id"]: item for item in reply.get("items", [])})

    with chromium() as browser:
        context = browser.new_context()
        context.on("response", keep)
        page = visit(context, site)
        grade(page, mode)
        settle(page, "recorded")
        page.wait_for_load_state("networkidle")
        alts = page.evaluate("[...document.querySelectorAll('.stage img, .tile img')].map(image => image.alt)")
        context.close()
    counts = Counter(truth(site).values())
    if mode == "pairwise":  # only candidates are compared, but one of them may come in several pairs
        assert len(site.rows("preference")) == WAYS[mode][2]
    else:
        assert counts["control"] >= 10
        assert counts["repeat"] >= 10
    assert {tuple(sorted(item)) for item in items.values()} <= {
        ("class_label", "image", "item_id"),
        ("class_label", "item_id", "left", "right"),
    }
    assert {len(item["item_id"]) for item in items.values()} == {32}
    assert set(alts) == {"Image to grade"}
    urls = [item[key] for item in items.values() for key in ("image", "left", "right") if key in item]
    pictures = [base64.b64decode(url.partition(",")[2]) for url in urls]
    assert len({len(picture) for picture in pictures}) == 1
    assert {tuple(chunks(picture)) for picture in pictures} == {("IHDR", "IDAT", "IEND")}
    assert len(set(urls)) == len(urls)  # a repeat has other bytes, and so has an image in its next pair
    texts = [body.decode("utf-8", "ignore") for url, body in received]
    folders = (site.folder / "candidates", site.folder / "references")
    ids = {image_id for folder in folders for image_id in ImageSet.load(folder).image_ids}
    assert not any(image_id in text for image_id in ids for text in texts)
    assert not any(image_id in url for image_id in ids for url, _ in received)
    for url, body in received:
        if "component_server" in url:
            reply = json.loads(body)
            reply.pop("study", None)  # its texts are the same for everyone
            keys = json.dumps(_keys(reply))
            assert not any(word in keys for word in TELLING), keys


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [name for key, entry in value.items() for name in (key, *_keys(entry))]
    return [name for entry in value for name in _keys(entry)] if isinstance(value, list) else []


def test_a_classifier_on_sizes_and_times_of_answers_is_no_better_than_chance(site: Site):
    times: dict[str, tuple[float, float]] = {}
    sizes: dict[str, set[int]] = defaultdict(set)
    with httpx.Client(base_url=site.url, headers={"origin": site.url}) as client:
        client.post("/enter", json={"token": site.tokens["ada"]}).raise_for_status()
        config = client.get("/config").json()
        component = next(entry["id"] for entry in config["components"] if entry["type"] == "html")

        def call(name: str, **payload: Any) -> tuple[httpx.Response, float]:
            body = {"data": payload, "component_id": component, "fn_name": name, "session_hash": "s"}
            began = time.perf_counter()
            reply = client.post("/gradio_api/component_server/", json=body)
            took = time.perf_counter() - began
            reply.raise_for_status()
            return reply, took

        for number in range(ITEMS):
            reply, fetched_s = call("next_items", mode="single", count=1, exclude=[])
            (item,) = reply.json()["items"]
            sizes[item["class_label"]].add(len(json.dumps(item)))
            row = {"grade_id": f"g{number}", "item_id": item["item_id"], "mode": "single", "verdict": "plausible"}
            _, kept_s = call("submit_rows", rows=[row])
            times[f"g{number}"] = fetched_s, kept_s
    assert all(len(found) == 1 for found in sizes.values())
    kinds = truth(site)
    names = [name for name in times if int(name[1:]) >= 20]  # the server has warmed up, and repeats are possible
    features = np.array([times[name] for name in names])
    for kind in ("control", "repeat"):
        hidden = np.array([kinds[name] == kind for name in names])
        assert hidden.sum() >= 20
        for column in features.T:
            assert_chance(hidden, column)
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        model = DecisionTreeClassifier(max_depth=3, min_samples_leaf=8, class_weight="balanced", random_state=0)
        guessed = cross_val_predict(model, features, hidden, cv=folds, method="predict_proba")[:, 1]
        assert_chance(hidden, guessed, one_sided=True)


def assert_chance(hidden: np.ndarray, score: np.ndarray, one_sided: bool = False) -> None:
    """The area under the curve lies within `SIGNIFICANT` standard errors of one half (Mann-Whitney, no difference)."""
    auc = roc_auc_score(hidden, score)
    n, m = hidden.sum(), (~hidden).sum()
    allowed = SIGNIFICANT * math.sqrt((n + m + 1) / (12 * n * m))
    assert auc - 0.5 <= allowed, f"area {auc:.3f} with {n} of {n + m}"
    assert one_sided or 0.5 - auc <= allowed, f"area {auc:.3f} with {n} of {n + m}"
