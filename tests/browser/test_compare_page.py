"""The compare page in a real browser: same seeds side by side, blind votes that are recorded, or a clear message."""

from __future__ import annotations

import base64
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from test_results import space_module
from test_versus import free_port, save_models

from pathalign.grading.exports import read_recorded
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig, explain
from pathalign.reward.explanation import overlay

SERIOUS = ("serious", "critical")
WAIT_MS = 90_000  # a loaded machine is slow, not wrong


class Recorder:
    """Keeps the headers and the body of everything that the server sends, an entry of `sent` for each request.

    A browser cannot be asked for this afterwards: Gradio's client aborts its stream of answers as soon as the last one
    is in, and of an aborted request no body is left. Here bytes are kept before they are sent.
    """

    def __init__(self, app: ASGIApp, sent: list[bytearray]) -> None:
        self.app, self.sent = app, sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = bytearray()
        self.sent.append(kept)

        async def keep_and_send(message: Message) -> None:
            for part in (*(part for header in message.get("headers", ()) for part in header), message.get("body", b"")):
                kept.extend(part)
            await send(message)

        await self.app(scope, receive, keep_and_send)


@dataclass
class Server:
    address: str
    page: Any
    ballot: Any
    votes: Path
    sent: list[bytearray]
    comparison: Any


def serve(app: ModuleType, arguments: list[str]) -> Server:
    """What `main` does, without blocking and with a record of what is sent."""
    options = app.read_options([*arguments, "--port", str(free_port())])
    comparison, ballot, problem, rewards = app.open_all(options)
    page = app.build_page(comparison, ballot, problem, rewards)
    sent: list[bytearray] = []
    launch = page.launch

    def launch_recorded(app_kwargs: dict[str, Any], **rest: Any) -> None:
        app_kwargs["middleware"].append(Middleware(Recorder, sent=sent))
        # without Gradio's look at its own page, which fails where that takes longer than 3 s
        launch(app_kwargs=app_kwargs, _frontend=False, **rest)

    page.launch = launch_recorded
    app.launch(page, options.host, options.port, block=False)
    return Server(f"http://{options.host}:{options.port}", page, ballot, Path(options.votes or ""), sent, comparison)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    from pathalign.settings.pretrain import PretrainConfig
    from pathalign.trainers.pretrain import new_pipeline

    folder = tmp_path_factory.mktemp("compare")
    pipeline = new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1]), 16, ("a_b", "c<d"))
    base, adapter = save_models(folder, pipeline)
    app = space_module("compare/app")
    arguments = ["--base-model", base, "--aligned-adapter", adapter, "--inference-steps", "2"]
    arguments += ["--votes", str(folder / "votes"), "--pairs-per-class", "3", "--reward-model", str(folder / "reward")]
    reward_model().save_with_processor(folder / "reward")
    served = serve(app, arguments)
    yield served
    served.page.close()
    served.ballot.votes.outbox.close()


def reward_model() -> RewardModel:
    """Knows the classes in another order; its rewards differ between images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"class_names": ["c<d", "a_b"], "criteria": ["nucleus_shape", "granules"]}
        return RewardModel(RewardModelConfig(**names, image_size_px=16, convnet_channels=[8, 16])).eval()


def new_page(browser: Browser, width: int = 1440, scheme: str = "light") -> Page:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT_MS)
    return page


def opened(browser: Browser, address: str, width: int = 1440, scheme: str = "light") -> Page:
    page = new_page(browser, width, scheme)
    page.goto(address)
    page.locator("figure img").first.wait_for()
    return page


def pictures(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('figure img')].filter(i => i.offsetParent).map(i => i.src)")


def without_pictures(text: str) -> str:
    """Base64 may spell any word by chance."""
    return re.sub(r"data:image/png;base64,[\w+/=]+", "", text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1440])
def test_both_tabs_fit_the_screen_and_have_no_serious_accessibility_fault(browser, server, width, scheme):
    page = opened(browser, server.address, width, scheme)
    page.get_by_role("button", name="Show where the reward model looks").click()
    page.locator("figcaption", has_text="where it looks").first.wait_for()
    for tab in ("Side by side", "Blind vote"):
        page.get_by_role("tab", name=tab).click()
        page.locator("figure img").locator("visible=true").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
        found = Axe().run(page).response["violations"]
        assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found if fault["impact"] in SERIOUS] == [], tab
    page.close()


def test_a_class_is_chosen_by_its_button_and_shown_with_the_same_seeds(browser, server):
    page = opened(browser, server.address)
    assert page.locator(".pathalign h2").first.inner_text() == "a b, same seeds"
    first = pictures(page)
    assert len(first) == 12
    assert page.locator("figcaption").all_inner_texts()[:4] == ["Base", "Aligned", "Base", "Aligned"]
    assert page.locator(".pairs p").all_inner_texts()[:6] == [f"seed {n}" for n in range(6)]
    page.get_by_role("button", name="c<d").click()
    page.get_by_text("c<d, same seeds").wait_for()
    assert set(pictures(page)).isdisjoint(first)
    page.get_by_role("button", name="Other seeds").click()
    page.get_by_text("seed 11", exact=True).wait_for()
    assert page.locator(".pathalign h2").first.inner_text() == "c<d, same seeds"
    page.close()


def table_of(page: Page, seed: int) -> dict[str, list[str]]:
    """Rows of the rewards of one pair, as they are shown."""
    rows = page.get_by_role("table", name=f"Rewards, seed {seed}").locator("tbody tr")
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows.all()}


def test_each_pair_has_the_rewards_of_both_images_and_of_every_criterion(browser, server):
    page = opened(browser, server.address)
    page.get_by_role("button", name="c<d").click()
    page.get_by_text("c<d, same seeds").wait_for()
    model, seeds = reward_model(), tuple(range(6))
    drawn = server.comparison.draw("c<d", seeds)
    expected: dict[str, list[Any]] = {"Reward": [], "nucleus shape": [], "granules": []}
    for images in drawn.values():
        with torch.no_grad():
            output = model(images.float() / 127.5 - 1, torch.zeros(6, dtype=torch.int64))
        parts = (output.rewards, *torch.sigmoid(output.criteria_logits).T)
        for name, values in zip(expected, parts, strict=True):
            expected[name].append([f"{value:.2f}" for value in values.tolist()])
    for seed in seeds:
        assert table_of(page, seed) == {name: [role[seed] for role in values] for name, values in expected.items()}
    assert len({tuple(values[0]) for values in expected.values()}) == 3  # the rewards are not all the same
    page.close()


def test_where_the_reward_model_looks_is_shown_on_demand_once_for_each_pair_and_computed_once(browser, server):
    page = opened(browser, server.address)
    page.get_by_text("a b, same seeds").wait_for()
    assert "where it looks" not in page.inner_text(".pairs").lower()
    page.get_by_role("button", name="Other seeds").click()
    page.get_by_text("seed 6", exact=True).wait_for()
    for _ in range(2):
        page.get_by_role("button", name="Show where the reward model looks").click()
        page.get_by_alt_text("Aligned, seed 11: where it looks").wait_for()
    shown = page.get_by_alt_text(re.compile(r"^(Base|Aligned), seed \d+: where it looks$")).all()
    assert len(shown) == 12
    found = [Image.open(io.BytesIO(base64.b64decode(str(image.get_attribute("src")).split(",")[1]))) for image in shown]
    model, images = reward_model(), server.comparison.draw("a_b", tuple(range(6, 12)))
    looked = explain(model, [image.permute(1, 2, 0).numpy() for image in torch.cat(list(images.values()))], "a_b")
    expected = overlay(images["aligned"][0].permute(1, 2, 0).numpy(), looked.saliency[6], looked.scale)
    assert np.array_equal(np.asarray(found[1]), np.asarray(Image.open(io.BytesIO(expected))))
    assert "blue in a whole line raised the reward" in page.inner_text("body")
    page.get_by_role("button", name="a b").click()
    page.get_by_text("blue in a whole line").wait_for(state="hidden")
    page.close()


@pytest.mark.parametrize(
    ("named", "captum", "message"),
    [
        (False, True, "No reward model is named, so no rewards are shown. REWARD_MODEL names one."),
        (
            True,
            False,
            "Where it looks cannot be shown. Captum, which finds where the reward model looks, is not installed",
        ),
    ],
)
def test_the_page_works_without_a_reward_model_and_without_captum_and_says_so(
    browser, tmp_path, monkeypatch, named, captum, message
):
    from pathalign.settings.pretrain import PretrainConfig
    from pathalign.trainers.pretrain import new_pipeline

    if not captum:
        monkeypatch.setitem(sys.modules, "captum.attr", None)
    pipeline = new_pipeline(PretrainConfig(block_out_channels=[8, 16], attention_levels=[1]), 16, ("a_b", "c<d"))
    base, adapter = save_models(tmp_path, pipeline)
    reward_model().save_with_processor(tmp_path / "reward")
    arguments = ["--base-model", base, "--aligned-adapter", adapter, "--inference-steps", "2"]
    served = serve(space_module("compare/app"), arguments + ["--reward-model", str(tmp_path / "reward")] * named)
    page = opened(browser, served.address, 390)
    page.get_by_text(message).wait_for()
    assert len(pictures(page)) == 12 and page.get_by_role("table").count() == 6 * named
    assert not page.get_by_role("button", name="Show where the reward model looks").is_visible()
    page.close()
    served.page.close()


def test_a_vote_is_recorded_under_a_pseudonym_and_tells_the_browser_nothing_of_the_sides(browser, server):
    page = new_page(browser)
    outside: list[str] = []
    page.on("request", lambda request: outside.append(request.url))
    page.on("websocket", lambda socket: outside.append(socket.url))  # is not recorded, so there must be none
    earlier = len(server.sent)
    page.goto(server.address)
    page.get_by_role("tab", name="Blind vote").click()
    shown = []
    for number, button in enumerate(("A is more plausible", "B is more plausible", "Equal", "Both bad")):
        page.get_by_text(f"{number} of 6 votes recorded.").wait_for()
        page.wait_for_timeout(400)
        blind = page.locator(".blind").inner_html()
        assert "Image A" in blind and "Image B" in blind
        assert not [word for word in ("base", "aligned", "seed") if word in without_pictures(blind).lower()]
        shown += pictures(page)
        page.get_by_role("button", name=button).click()
    page.get_by_text("4 of 6 votes recorded.").wait_for()
    assert len(set(shown)) == 8
    received = b"\n".join(server.sent[earlier:]).decode("utf-8", "replace")
    assert [picture for picture in shown if picture not in received] == []
    messages = [line for line in received.splitlines() if "votes recorded" in line]  # the other tab names its images
    told = without_pictures("\n".join(messages)).lower()
    assert re.findall(r"(\d+) of 6 votes recorded", told) == ["0", "1", "2", "3", "4"]
    rows = server.ballot.votes.outbox.rows("preference")
    kept = [row[key] for row in rows for key in ("left_image_id", "right_image_id", "preference_id", "grader")]
    assert len(kept) == 16
    assert [word for word in kept if word in received] == []
    assert [word for word in ("aligned", "seed") if word in told] == []
    server.ballot.votes.outbox.flush()
    rows = read_recorded(server.votes).preferences
    assert [row.choice for row in rows] == ["left", "right", "tie", "both_bad"]
    assert len({row.preference_id for row in rows}) == 4
    assert {row.grader for row in rows} == {rows[0].grader}
    assert rows[0].grader.startswith("grader-")
    candidates = ImageSet.load(server.votes / server.ballot.folder)
    assert {row.left_image_id for row in rows} <= set(candidates.image_ids)
    local = (server.address, "data:", "blob:")
    assert [url for url in outside if not url.startswith(local)] == []
    page.close()


def test_two_quick_clicks_are_one_vote_and_the_end_says_so(browser, server):
    page = new_page(browser)
    page.goto(server.address)
    page.get_by_role("tab", name="Blind vote").click()
    done = int(page.get_by_text("votes recorded.").inner_text().split()[0])
    page.wait_for_timeout(400)
    page.get_by_role("button", name="A is more plausible").dblclick()
    page.get_by_text(f"{done + 1} of 6 votes recorded.").wait_for()
    page.wait_for_timeout(800)
    assert page.get_by_text(f"{done + 1} of 6 votes recorded.").is_visible()
    for number in range(done + 1, 6):
        page.get_by_text(f"{number} of 6 votes recorded.").wait_for()
        page.wait_for_timeout(400)
        page.get_by_role("button", name="Equal").click()
    page.get_by_text("All 6 pairs are judged").wait_for()
    page.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No models are named"),
        (["--base-model", "nowhere/x/y", "--aligned-adapter", "z"], "No pipeline can be loaded"),
    ],
)
def test_without_models_the_page_says_how_to_name_them(browser, arguments, message):
    app = space_module("compare/app")
    served = serve(app, arguments)
    page = new_page(browser, 390)
    page.goto(served.address)
    page.get_by_text(message).wait_for()
    assert "Never for diagnosis" in page.inner_text("body")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    if not arguments:
        assert "--base-model runs/demo/base --aligned-adapter runs/demo/adapter" in page.inner_text("body")
    page.close()
    served.page.close()
