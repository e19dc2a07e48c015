"""What people type to decide what to grade: `pathalign study next` and `pathalign study replay`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.commands.stages import stage_command
from pathalign.config import build
from pathalign.options import given_settings, setting_options
from pathalign.schema import DISCLAIMER
from pathalign.settings.next_grades import NextConfig

SHOWN = 20  # images in the printed table; all are in the file
ABOUT_NOTHING = 0.001  # nats of log loss


@click.group()
def study() -> None:
    """Decide what to grade: propose images of a study, or replay how grades might have been gathered."""


def _next(path: str, folder: Path | None, as_json: bool, **options: Any) -> None:
    config = build(NextConfig, {**given_settings(options), "study": path}, title="pathalign study next")
    target = folder or Path(path).with_suffix(".next")
    with quiet():
        from pathalign.trainers.next_grades import NEXT, propose

        propose(config, target)
        content = json.loads((target / NEXT).read_text())
    expected = expectation(content["expected"], len(content["images"]))
    text = [table(content), expected, use(target / NEXT, Path(path))]
    print_result({**content, "output_dir": str(target)}, as_json, "\n\n".join(text))


def table(content: Mapping[str, Any]) -> str:
    """The first images of a proposal, one a line."""
    images = content["images"]
    width = max(len("class"), *(len(row["class"]) for row in images))
    lines = [f"{'':>4}  {'image':16}  {'class':{width}}  {'score':>6}  why"]
    lines += [
        f"{place:>4}  {row['image_id']:16}  {row['class']:{width}}  {row['score']:6.3f}  {row['why']}"
        for place, row in enumerate(images[:SHOWN], 1)
    ]
    if len(images) > SHOWN:
        lines.append(f"      and {len(images) - SHOWN} more")
    return "\n".join(lines)


def expectation(expected: Mapping[str, Any], count: int) -> str:
    """What grading these images is expected to bring, and how far to trust that."""
    lines = [
        f"By the criterion ({expected['criterion']}) these {count} images tell at most {expected['bits_proposed']:.2f} "
        f"bits, {count} drawn at random {expected['bits_at_random']:.2f}."
    ]
    gain, doubled = expected["log_loss"], expected["log_loss_doubled"]
    if gain is None:
        return "\n".join([*lines, f"No learning curve: {expected['reason']}"])
    lines.append("Small reward models on parts of the grades, on the same held-out images:")
    lines += [
        f"  {point['training_images']:>6} training images: log loss {point['log_loss']:.3f}, "
        f"ROC AUC {point['roc_auc']:.3f}"
        for point in expected["learning_curve"]
    ]
    lines.append(
        f"By the power law through them {expected['more_grades']} more grades lower the log loss from "
        f"{gain['now']:.3f} by {gain['gain']:.4f} (95 % interval {gain['low']:.4f} to {gain['high']:.4f}, over "
        f"refits and {expected['held_out_images']} held-out images); twice as many grades lower it by "
        f"{doubled['gain']:.3f} ({doubled['low']:.3f} to {doubled['high']:.3f})."
    )
    if doubled["low"] < ABOUT_NOTHING:
        lines.append("The interval reaches 0: these grades do not tell whether more of them would help.")
    lines.append(
        "The law knows the grades that are there, not which ones come next: chosen ones may bring more or less, and "
        "beyond the last point it is a guess."
    )
    return "\n".join(lines)


def use(path: Path, study: Path) -> str:
    """What to write into the study, so that its page shows these images first."""
    beside = path.absolute().is_relative_to(study.parent.absolute())
    named = path.absolute().relative_to(study.parent.absolute()) if beside else path.absolute()
    return (
        f"Written: {path}, and a contact sheet in the same order beside it. To show these images first, write\n"
        f"    order: proposed\n    proposal: {named}\ninto {study} and start its page anew. {DISCLAIMER}"
    )


next_command = click.Command(
    "next",
    callback=_next,
    params=[
        click.Argument(["path"], metavar="STUDY.yaml"),
        *(option for option in setting_options(NextConfig) if option.name != "study"),
        click.Option(
            ["--output-dir", "folder"],
            type=click.Path(path_type=Path),
            help="Folder that is made, or made anew.  [default: beside STUDY, with the ending .next]",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP),
    ],
    help=f"""Propose which images of a study to grade next, and say what that is expected to bring.

    Reads the candidates of STUDY.yaml and the grades that are there, has reward models rank the others, and writes
    `next.json` and a contact sheet. Images that the study shows at random in any case are not proposed.

    What is expected: bits by the criterion, and a learning curve of small reward models, trained on parts of the
    grades, with an interval. With too few grades it says how many are needed.

    The page shows the proposed images first with `order: proposed` and `proposal: NEXT.json` in the study; graders see
    no difference, and `random_share` of the candidates still come at random. {DISCLAIMER}""",
    short_help="Propose which images of a study to grade next.",
)
study.add_command(next_command)
study.add_command(stage_command("replay", "select", "runs/selection"))
