"""What people type around a grading Space: `pathalign space deploy`, `logs`, `restart` and `pause`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.commands.serving import spaces_dir
from pathalign.hub.space_plan import VISIBILITIES
from pathalign.hub.space_token import TOKEN_VARIABLE
from pathalign.schema import InputError

SPACE = "ORG/NAME"
KEEP = "[default: as it is; {} if new]"


@click.group()
def space() -> None:
    """A grading Space on the Hub: put a study there, see what it prints, restart or pause it."""


@space.command("deploy")
@click.argument("name", metavar=SPACE)
@click.option("--study", required=True, type=click.Path(path_type=Path), help="YAML file of the study.")
@click.option("--dataset", metavar=SPACE, help="Private dataset for the grades.  [default: the study's; NAME-grades]")
@click.option(
    "--visibility",
    type=click.Choice(VISIBILITIES),
    help="`protected`: graders reach the page, and only you its files.  " + KEEP.format("protected"),
)
@click.option("--hardware", metavar="NAME", help="Machine that it runs on.  " + KEEP.format("cpu-basic"))
@click.option(
    "--package",
    metavar="WHEEL_OR_REQUIREMENT",
    help="What installs pathalign there; a wheel goes along.  [default: this version, from the package index]",
)
@click.option(
    "--wait-minutes",
    type=click.FloatRange(min=0),
    default=20,
    show_default=True,
    help="How long to wait until it runs; 0 for not at all.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def deploy_command(
    name: str, study: Path, wait_minutes: float, yes: bool, dry_run: bool, as_json: bool, **options: str | None
) -> None:
    """Put STUDY on the Hub as a Space where experts sign in and grade.

    Shows first what there will be and what it costs. What is so already stays: the same command again changes nothing,
    and after an interruption goes on. Grades gather in a private dataset; images that lie in folders here go into the
    Space's files. Its token is a fine-grained one for that dataset only, in the variable PATHALIGN_SPACE_TOKEN or asked
    for; your own stays here.
    """
    token = (os.environ.get(TOKEN_VARIABLE) or "").strip() or None
    with quiet():
        from pathalign.grading.study import default_state_dir
        from pathalign.hub.space import deploy
        from pathalign.hub.space_plan import Wish, plan

        wish = Wish(_full_name(name), study, spaces_dir() / "grade", token=token, **options)
        planned = plan(wish)
    if dry_run:
        print_result({"plan": planned.summary()}, as_json, planned.text())
        return
    click.echo(planned.text(), err=True)
    if planned.changes and not yes:
        if not sys.stdin.isatty():
            raise InputError("Nothing was done: nobody can be asked here. Add `--yes` if that is what you want.")
        click.confirm("Go ahead?", abort=True, err=True)
    with quiet():
        commit = deploy(planned, wish, default_state_dir(study), _ask_token)
        found = _running(name, commit, wait_minutes, planned.visibility)
    summary = {"plan": planned.summary(), "space": name, "dataset": planned.dataset, "commit": commit, **found}
    print_result(summary, as_json, _told(planned.changes, found, name, planned.dataset))


def _full_name(name: str) -> str:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise InputError("A Space has a name such as my-clinic/blood-cells: its owner, a slash, and letters, - and _.")
    return name


def _ask_token(advice: str) -> str | None:
    """Ask for the Space's token without showing it; None where nobody can answer."""
    if not sys.stdin.isatty():
        return None
    click.echo(f"The Space needs a token of its own. {advice}", err=True)
    answer: str = click.prompt("Its token (not shown)", hide_input=True, default="", show_default=False, err=True)
    return answer.strip() or None


def _running(name: str, commit: str, wait_minutes: float, visibility: str) -> dict[str, Any]:
    """Stage and addresses, when it runs."""
    from pathalign.hub.space import page_address, probe, wait_until_running
    from pathalign.remote import endpoint

    found: dict[str, Any] = {"url": f"{endpoint()}/spaces/{name}", "page": None, "stage": None}
    if not wait_minutes:
        return found
    try:
        found["stage"] = wait_until_running(name, commit, wait_minutes)
    except KeyboardInterrupt:
        click.echo(f"{name} goes on; `pathalign space logs {name} --build --follow` shows how.", err=True)
        raise
    found["page"] = page_address(name)
    if found["page"] and found["stage"] == "RUNNING" and visibility != "private":
        probe(name, found["page"])
    return found


def _told(changes: list[str], found: dict[str, Any], name: str, dataset: str) -> str:
    done = f"Done: {'; '.join(changes)}." if changes else "Nothing to change: all is so already."
    stage = f"It is {found['stage']}" if found["stage"] else "It is being built"
    if found["stage"] == "PAUSED":
        stage += f"; `pathalign space restart {name}` starts it"
    return (
        f"{done}\n{stage}: {found['url']}\n"
        f"Graders open {found['page'] or 'that address'} and sign in; their grades gather in {dataset}.\n"
        f"What it prints: pathalign space logs {name} --follow"
    )


@space.command("logs")
@click.argument("name", metavar=SPACE)
@click.option("--build", is_flag=True, help="How it was built, in place of what it prints.")
@click.option("--follow", is_flag=True, help="Go on as lines come; Ctrl-C ends it.")
@click.option("--lines", type=click.IntRange(min=1), default=100, show_default=True, help="Last lines to begin with.")
def logs_command(name: str, build: bool, follow: bool, lines: int) -> None:
    """Print the last lines of a Space's log."""
    from collections import deque

    from pathalign.hub.space import space_logs

    if follow:
        with suppress(KeyboardInterrupt):
            for line in space_logs(_full_name(name), build, follow):
                click.echo(line)
        return
    for line in deque(space_logs(_full_name(name), build, follow), maxlen=lines):
        click.echo(line)


@space.command("restart")
@click.argument("name", metavar=SPACE)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def restart_command(name: str, as_json: bool) -> None:
    """Start a Space anew, also a paused one. Its disk is empty then; grades are safe in their dataset."""
    from pathalign.hub.space import restart

    stage = restart(_full_name(name))
    print_result({"space": name, "stage": stage}, as_json, f"{name}: {stage}")


@space.command("pause")
@click.argument("name", metavar=SPACE)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def pause_command(name: str, as_json: bool) -> None:
    """Stop a Space: nothing is billed and nobody can grade until `pathalign space restart`."""
    from pathalign.hub.space import pause

    stage = pause(_full_name(name))
    print_result({"space": name, "stage": stage}, as_json, f"{name}: {stage}")
