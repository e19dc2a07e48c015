"""Base against aligned model: the same class and seeds side by side, and a blind vote whose rows are kept like grades.

    python spaces/compare/app.py --base-model runs/demo/base --aligned-adapter runs/demo/adapter --votes votes

`--reward-model runs/demo/reward` adds what a reward model says of each criterion, and where in the images it looks.
On a Space the same is said by variables: BASE_MODEL, BASE_ADAPTER, ALIGNED_MODEL, ALIGNED_ADAPTER, VOTES and so on.
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Nothing that is shown or done here leaves the machine; before gradio is imported, since it reads these then.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # before torch: it stands in for CUDA until a GPU is lent

import gradio as gr
from starlette.middleware import Middleware
from torch import Tensor

from pathalign.grading.access import Access, Door, HubDoor, SingleDoor, Visitor
from pathalign.grading.gate import LOCAL_HOSTS, SameSite, space_names
from pathalign.grading.outbox import Outbox, install_sigterm
from pathalign.grading.pictures import data_url, png_url
from pathalign.grading.sinks import open_sink
from pathalign.grading.study import check_lasting_secret, study_secret
from pathalign.grading.versus import ALIGNED, BASE, Comparison, Showing, Votes, contenders, keep_pool, seeds_from
from pathalign.grading.versus_rewards import ComparisonRewards, Rewards
from pathalign.schema import DISCLAIMER, InputError

HERE = Path(__file__).resolve().parent
ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
ON_SPACE = bool(os.environ.get("SPACE_ID"))
PAIRS_SHOWN = 6
CHOICES = {"left": "A is more plausible", "right": "B is more plausible", "tie": "Equal", "both_bad": "Both bad"}
LEGEND = (
    "<p>Where the reward model looks: <strong>blue in a whole line</strong> raised the reward, <strong>orange in a "
    "dashed line</strong> lowered it, the stronger the more, against a plain image of the same colour.</p>"
)
TITLES = {BASE: "Base", ALIGNED: "Aligned"}


def names(text: str) -> tuple[str, ...]:
    """Names with commas between them."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names nobody; write names with commas between them")
    return found


OPTIONS = {  # name on the command line, in capitals of a variable (not host and port) -> type, default, help
    "base_model": (str, None, "Base pipeline: a folder or Hub id."),
    "base_adapter": (str, None, "LoRA adapter on the base pipeline."),
    "aligned_model": (str, None, "Pipeline to compare with; by default the base pipeline."),
    "aligned_adapter": (str, None, "LoRA adapter on it."),
    "reward_model": (str, None, "Reward model: a folder or Hub id. Without it no rewards are shown."),
    "scheduler": (str, "dpmsolver++", "Sampler of both."),
    "inference_steps": (int, 10, "Denoising steps of both."),
    "guidance_scale": (float, 1.0, "Classifier-free guidance of both; 1 is none."),
    "votes": (str, None, "Where blind votes go: a folder or hf://datasets/USER/REPO. Without it there is no vote."),
    "voters": (names, None, "Who may vote on a Space: Hugging Face names with commas between them."),
    "organization": (str, None, "Hub organization whose members may vote. With neither, anybody who signs in may."),
    "pairs_per_class": (int, 20, "Pairs of each class to vote on."),
    "state_dir": (Path, None, "Folder of votes on their way.  [default: beside the votes, with the ending .state]"),
    "host": (str, "0.0.0.0" if ON_SPACE else "127.0.0.1", "Address to listen on."),
    "port": (int, 7860, "Port to listen on."),
}


@dataclass(frozen=True)
class Ballot:
    """Blind votes, and who may vote."""

    votes: Votes
    access: Access
    folder: str

    def visitor(self, request: gr.Request) -> Visitor | None:
        """Who asks; None for a stranger. Off a Space there is one voter, and no session."""
        return self.access.visitor({}, (getattr(request, "session", None) if ON_SPACE else None) or {})


def gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Ask for a GPU around a function where the hardware is ZeroGPU, else do nothing."""
    return spaces.GPU(function) if ZERO_GPU else function


@gpu
def nothing() -> None:
    """A ZeroGPU Space does not start without a GPU function, not even to say that no models are named."""


def build_page(
    comparison: Comparison | None,
    ballot: Ballot | None = None,
    problem: str = "",
    rewards: ComparisonRewards | None = None,
) -> gr.Blocks:
    """The page; with a `problem` it says only that."""
    with gr.Blocks(title="Base against aligned", analytics_enabled=False) as page:
        gr.HTML(_wrapped(f"<h1>Base against aligned</h1><p class='notice'><strong>{DISCLAIMER}</strong></p>"))
        if comparison is None:
            gr.HTML(_wrapped(f"<h2>No comparison yet</h2><p role='alert'>{_code(problem)}</p>"))
            return page
        if ballot is None:
            _side_by_side(page, comparison, rewards)
            return page
        with gr.Tab("Side by side"):
            _side_by_side(page, comparison, rewards)
        with gr.Tab("Blind vote"):
            _blind_vote(page, comparison, ballot)
    return page


def _side_by_side(page: gr.Blocks, comparison: Comparison, rewards: ComparisonRewards | None) -> None:
    state = gr.State((comparison.class_names[0], 0))
    with gr.Row():
        buttons = [gr.Button(name.replace("_", " "), min_width=120) for name in comparison.class_names]
    gr.HTML(_wrapped(about_rewards(rewards)))
    pairs = gr.HTML()
    with gr.Row():
        other = gr.Button("Other seeds", variant="secondary")
        can_look = rewards is not None and not rewards.cannot_look
        look = gr.Button("Show where the reward model looks", variant="secondary", visible=can_look)

    def show(class_label: str, first_seed: int, looking: bool = False) -> tuple[str, tuple[str, int]]:
        seeds = seeds_from(first_seed, PAIRS_SHOWN)
        judged = rewards.rewards(class_label, seeds) if rewards else {}
        looks = rewards.looks(class_label, seeds) if rewards and looking else {}
        criteria = rewards.criteria if rewards else ()
        drawn = comparison.draw(class_label, seeds)
        return pairs_html(class_label, seeds, drawn, criteria, judged, looks), (class_label, first_seed)

    def of_class(class_label: str) -> Callable[..., Any]:
        return lambda shown: show(class_label, shown[1])

    def of_other_seeds(shown: tuple[str, int]) -> tuple[str, tuple[str, int]]:
        return show(shown[0], shown[1] + PAIRS_SHOWN)

    def with_looks(shown: tuple[str, int]) -> tuple[str, tuple[str, int]]:
        return show(*shown, looking=True)

    for name, button in zip(comparison.class_names, buttons, strict=True):
        button.click(of_class(name), state, [pairs, state], api_visibility="private")
    other.click(of_other_seeds, state, [pairs, state], api_visibility="private")
    look.click(with_looks, state, [pairs, state], api_visibility="private", concurrency_limit=1)
    page.load(lambda: show(comparison.class_names[0], 0), None, [pairs, state], api_visibility="private")


def _blind_vote(page: gr.Blocks, comparison: Comparison, ballot: Ballot) -> None:
    state: gr.State = gr.State(None)  # stays on the server: it knows the sides
    if ON_SPACE:
        gr.LoginButton()
    pair = gr.HTML()
    with gr.Row():
        buttons = {choice: gr.Button(text, min_width=120) for choice, text in CHOICES.items()}

    def show(request: gr.Request) -> tuple[str, Showing | None]:
        visitor = ballot.visitor(request)
        if visitor is None:
            return _wrapped("<p>Sign in to vote: a vote is kept under a pseudonym.</p>"), None
        if not visitor.is_grader:
            return _wrapped(f"<p>{html.escape(visitor.name)} is not on the list of those who may vote here.</p>"), None
        showing = ballot.votes.next_showing(visitor.pseudonym)
        done, total = ballot.votes.progress(visitor.pseudonym)
        return showing_html(ballot.votes, showing, done, total), showing

    def voting(choice: str) -> Callable[..., Any]:
        def vote(showing: Showing | None, request: gr.Request) -> tuple[Any, Any]:
            visitor = ballot.visitor(request)
            if showing is None or visitor is None or not visitor.is_grader:
                return show(request)
            if not ballot.votes.record(visitor.pseudonym, showing, choice, str(request.session_hash)):
                return gr.skip(), gr.skip()
            return show(request)

        return vote

    for choice, button in buttons.items():
        button.click(voting(choice), state, [pair, state], api_visibility="private", concurrency_limit=1)
    page.load(show, None, [pair, state], api_visibility="private")


def about_rewards(rewards: ComparisonRewards | None) -> str:
    """What the numbers below the pairs are, or why there are none."""
    if rewards is None:
        return "<p>No reward model is named, so no rewards are shown. " + _code("`REWARD_MODEL` names one.") + "</p>"
    text = (
        "<p><strong>Reward</strong>: how sure the reward model is, from 0 to 1, that an expert would find the image "
        "plausible. Below it the same for each point of the checklist. A network guesses here, no expert speaks.</p>"
    )
    problem = rewards.cannot_look
    return text + (f"<p>Where it looks cannot be shown. {_code(problem)}</p>" if problem else "")


def pairs_html(
    class_label: str,
    seeds: Sequence[int],
    drawn: dict[str, Tensor],
    criteria: Sequence[str] = (),
    rewards: Mapping[str, Sequence[Rewards]] = {},
    looks: Mapping[str, Sequence[bytes]] = {},
) -> str:
    """Base and aligned image of each seed beside each other, with their rewards and where the reward model looks."""
    name = html.escape(class_label.replace("_", " "))
    items = []
    for row, seed in enumerate(seeds):
        figures = "".join(
            _figure(title, f"{title}: synthetic {name}, seed {seed}", drawn[role][row], f"{role} {seed}")
            for role, title in TITLES.items()
        )
        if looks:
            figures += "".join(
                _picture("Where it looks", f"{title}, seed {seed}: where it looks", png_url(looks[role][row]))
                for role, title in TITLES.items()
            )
        table = _rewards_table(seed, criteria, [rewards[role][row] for role in TITLES]) if rewards else ""
        items.append(f"<li>{figures}<p>seed {seed}</p>{table}</li>")
    legend = LEGEND if looks else ""
    return _wrapped(f"<h2>{name}, same seeds</h2>{legend}<ul class='pairs'>{''.join(items)}</ul>")


def _rewards_table(seed: int, criteria: Sequence[str], pair: Sequence[Rewards]) -> str:
    heading = "".join(f"<th scope='col'>{title}</th>" for title in TITLES.values())
    lines = [("Reward", [image.reward for image in pair])]
    lines += [
        (name.replace("_", " "), [image.criteria[place] for image in pair]) for place, name in enumerate(criteria)
    ]
    body = "".join(
        f"<tr><th scope='row'>{html.escape(name)}</th>{''.join(f'<td>{value:.2f}</td>' for value in values)}</tr>"
        for name, values in lines
    )
    return (
        f"<table class='rewards'><caption>Rewards, seed {seed}</caption><thead><tr><td></td>{heading}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
    )


def showing_html(votes: Votes, showing: Showing | None, done: int, total: int) -> str:
    """A pair without any hint at which model drew which image."""
    if showing is None:
        return _wrapped(f"<h2>Thank you</h2><p role='status'>All {total} pairs are judged, every vote is recorded.</p>")
    name = html.escape(showing.class_label.replace("_", " "))
    place = {image_id: row for row, image_id in enumerate(votes.pool.image_ids)}
    figures = "".join(
        _figure(side, f"Image {side}", votes.pool.images[place[image_id]], f"{showing.preference_id} {side}")
        for side, image_id in (("A", showing.left_id), ("B", showing.right_id))
    )
    return _wrapped(
        f"<h2>Which is the more plausible {name}?</h2><ul class='pairs blind'><li>{figures}</li></ul>"
        f"<p role='status'>{done} of {total} votes recorded.</p>"
    )


def _figure(title: str, alt: str, image: Tensor, key: str) -> str:
    return _picture(title, alt, data_url(image.permute(1, 2, 0).numpy(), key))


def _picture(title: str, alt: str, url: str) -> str:
    return f"<figure><img src='{url}' alt='{alt}'><figcaption>{title}</figcaption></figure>"


def _wrapped(content: str) -> str:
    return f"<div class='pathalign'>{content}</div>"


def _code(text: str) -> str:
    """Text as HTML, what stands in backquotes as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options from the command line, else from variables of the same name in capitals."""
    parser = argparse.ArgumentParser(description="Compare two models. " + DISCLAIMER)
    for name, (kind, default, text) in OPTIONS.items():
        value = default if name in ("host", "port") else os.environ.get(name.upper()) or default
        shown = "" if default is None else f"  [default: {default}]"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=text + shown)
    return parser.parse_args(arguments)


def open_comparison(options: argparse.Namespace) -> Comparison:
    """Load both models.

    Raises:
        InputError: If none are named, with how to name them; or if they cannot be loaded.
    """
    first, second = contenders(options.base_model, options.base_adapter, options.aligned_model, options.aligned_adapter)
    return Comparison(first, second, options.scheduler, options.inference_steps, options.guidance_scale, gpu)


def open_rewards(options: argparse.Namespace, comparison: Comparison) -> ComparisonRewards | None:
    """Load the reward model; None if none is named.

    Raises:
        InputError: If it cannot be loaded, or does not know the classes.
    """
    return ComparisonRewards(comparison, options.reward_model, gpu) if options.reward_model else None


def open_ballot(options: argparse.Namespace, comparison: Comparison) -> Ballot | None:
    """Draw what is voted on and read back earlier votes; None if no place for votes is named."""
    if not options.votes:
        return None
    local = Path(options.votes if "://" not in options.votes else HERE / "votes")
    state_dir = options.state_dir or local.with_suffix(".state")
    if ON_SPACE:
        check_lasting_secret(options.votes)
    sink = open_sink(options.votes)
    pool = comparison.pool(options.pairs_per_class)
    folder = keep_pool(pool, sink)
    outbox = Outbox(state_dir, sink)
    outbox.restore()
    secret = study_secret(state_dir)
    door: Door = HubDoor() if ON_SPACE else SingleDoor()
    access = Access(door, secret, graders=options.voters, organization=options.organization)
    return Ballot(Votes(pool, outbox, secret), access, folder)


def open_all(
    options: argparse.Namespace,
) -> tuple[Comparison | None, Ballot | None, str, ComparisonRewards | None]:
    """What `build_page` takes: models, votes and rewards, or what is wrong with them."""
    try:
        comparison = open_comparison(options)
        rewards = open_rewards(options, comparison)
        return comparison, open_ballot(options, comparison), "", rewards
    except InputError as error:
        print(error, file=sys.stderr)
        return None, None, str(error), None


def launch(page: gr.Blocks, host: str, port: int, block: bool = True) -> None:
    """Serve the page to its own site only, with the fonts of the visitor's own system."""
    hosts = LOCAL_HOSTS if host in LOCAL_HOSTS and not ON_SPACE else None
    same_site = Middleware(SameSite, hosts=hosts, origins=space_names() if ON_SPACE else None)
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    page.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=(HERE / "page.css").read_text(),
        footer_links=[],
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        max_file_size=1,
        app_kwargs={"middleware": [same_site]},
        prevent_thread_lock=not block,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Build and serve; models that are missing are named on the page too, so that a Space shows what it lacks."""
    options = read_options(arguments)
    comparison, ballot, problem, rewards = open_all(options)
    if ballot is not None:
        install_sigterm(ballot.votes.outbox)
        print(f"Votes go to {options.votes}, their images to {ballot.folder} in it.", file=sys.stderr)
    try:
        launch(build_page(comparison, ballot, problem, rewards), options.host, options.port)
    finally:
        if ballot is not None:
            ballot.votes.outbox.close()


if __name__ == "__main__":
    main()
