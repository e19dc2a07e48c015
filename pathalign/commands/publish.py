"""What people type to publish: `pathalign publish FOLDER REPO`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.commands.stages import CONFIG_OPTION
from pathalign.config import build, read_yaml
from pathalign.options import given_settings, setting_options
from pathalign.schema import DISCLAIMER
from pathalign.settings.publish import PublishConfig

if TYPE_CHECKING:
    from pathalign.hub.publish import Publication

HELP = f"""Publish FOLDER as one commit to the Hub repo REPO (OWNER/NAME), with its card.

FOLDER is what a stage made: a base model, adapter, reward model, candidate set, grades or feedback, or an evaluation. A
candidate set, grades and an evaluation become private repos unless --public is given, the others public ones. Names,
paths of this machine, tokens and metadata of pictures are taken out of a copy, or the publication is refused; the
folder itself is only read. Without changes there is no commit. HF_ENDPOINT names another Hub.

{DISCLAIMER}
"""


def _publish(
    folder: Path,
    repo: str,
    config_file: Path | None,
    public: bool | None,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    values = read_yaml(config_file) if config_file else {}
    config = build(PublishConfig, {**values, **given_settings(options)}, title="pathalign publish")
    with quiet():
        from pathalign.hub.publish import publish

        result = publish(folder, repo, config, public=public, dry_run=dry_run)
    print_result(asdict(result), as_json, text_of(result))


publish_command = click.Command(
    "publish",
    params=[
        click.Argument(["folder"], type=click.Path(path_type=Path)),
        click.Argument(["repo"]),
        click.Option(
            ["--public/--private", "public"],
            default=None,
            help="Who may see a new repo.  [default: private for candidates, grades and evaluations, else public]",
        ),
        click.Option(["--dry-run"], is_flag=True, help="Print what would go, after all checks, and change nothing."),
        CONFIG_OPTION,
        *setting_options(PublishConfig),
        click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP),
    ],
    callback=_publish,
    help=HELP,
    short_help="Publish an artefact with its card to a Hub repo.",
)


def text_of(result: Publication) -> str:
    """The plan, or where it went, for people."""
    if not result.dry_run:
        if not result.changed:
            tagged = f", which has the tag {result.tag}" if result.tag else ""
            return f"{result.url}\nNothing has changed since commit {result.commit}{tagged}; no commit was made."
        return f"{result.url}\nCommit {result.commit}, {len(result.files)} files" + (
            f", tag {result.tag}" if result.tag else ""
        )
    seen = "private" if result.private else "public"
    lines = [f"{result.url} ({seen} {result.repo_type}{', would be made' if result.new else ''}): {result.kind}"]
    lines += [f"  {entry['change']:<6} {entry['size']:>12,}  {entry['path']}" for entry in result.files]
    lines += [f"- {check}" for check in result.checks]
    tagged = f" The commit would have the tag {result.tag}." if result.tag else ""
    done = "nothing was changed" if result.changed else "nothing has changed since the last commit"
    lines += [f"Dry run: {done}.{tagged}"]
    return "\n".join(lines)
