"""What people type to take grades out of a study, to bring others in, and to gather many small files in one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.config import ConfigError, build
from pathalign.options import given_settings, setting_options
from pathalign.schema import DISCLAIMER, VERDICTS
from pathalign.settings.pull import PullConfig

if TYPE_CHECKING:
    from pathalign.schema import RunRecord

FORMATS = ("jsonl", "csv", "parquet", "images", "paper", "preferences")
LAYOUTS = ("auto", "paper", "label-studio", "table")
SET = "PATH_OR_REPO_ID"


def _output_dir(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option that names the folder a command makes."""
    return click.option(
        "--output-dir",
        "folder",
        type=click.Path(path_type=Path),
        default=default,
        show_default=True,
        help="Folder that is made.",
    )


@click.command("export", epilog=DISCLAIMER)
@click.argument("source", metavar="STUDY_OR_GRADES")
@click.option("--candidates", metavar=SET, help="Images that were graded; a study names its own.")
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    help="Give it once for each. `images`: what was graded, as a candidate set for `pathalign feedback`; `paper`: "
    "CLASS/normal and CLASS/abnormal; `preferences`: pairs for DPO.  "
    "[default: jsonl, csv, parquet; of a study images too]",
)
@click.option("--simulated", is_flag=True, help="Simulated grades too; every file then says so.")
@click.option("--comments/--no-comments", default=True, show_default=True, help="The graders' free text too.")
@_output_dir("runs/export")
def export_command(
    source: str, candidates: str | None, formats: tuple[str, ...], simulated: bool, comments: bool, folder: Path
) -> tuple[RunRecord, Path]:
    """Write grades and pairwise choices for others, by pseudonyms only.

    STUDY_OR_GRADES is a study's YAML file, the folder or hf://datasets/USER/REPO where its grades go, or a .jsonl file.
    """
    from pathalign.grading.exports import TABLES, ExportOptions, export_from

    is_study = Path(source).suffix.lower() in (".yaml", ".yml")
    chosen = tuple(dict.fromkeys(formats)) or (*TABLES, *(("images",) if is_study else ()))
    options = ExportOptions(chosen, simulated, comments)
    return export_from(source, folder, options, candidates), folder


@click.command("import", epilog=DISCLAIMER)
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="auto",
    show_default=True,
    help="`paper`: CLASS/normal and CLASS/abnormal, or a CSV whose label 1 means implausible. `table`: an export.",
)
@click.option("--candidates", metavar=SET, help="The candidate set that was graded, if there is one.")
@click.option("--images", type=click.Path(path_type=Path), help="Folder of the images that Label Studio names.")
@click.option("--verdict-field", metavar="NAME", help="Label Studio's choices that hold the verdict.  [default: found]")
@click.option("--verdict", "words", multiple=True, metavar="CHOICE=VERDICT", help="What a choice means.")
@click.option("--criteria-field", metavar="NAME", default="failed_criteria", help="The choices that name criteria.")
@click.option("--grader", default="imported", show_default=True, help="Pseudonym, where the source names nobody.")
@click.option("--rubric-version", default="", help="Checklist that the verdicts were given against.")
@_output_dir("runs/imported")
def import_command(
    source: Path,
    layout: str,
    candidates: str | None,
    images: Path | None,
    verdict_field: str | None,
    words: tuple[str, ...],
    criteria_field: str,
    grader: str,
    rubric_version: str,
    folder: Path,
) -> tuple[RunRecord, Path]:
    """Read grades from elsewhere: the paper's folders, a Label Studio JSON export, or a table of `grade export`.

    Makes a folder with `grades.jsonl`, and with the images where they came along, for `pathalign feedback`.
    """
    from pathalign.grading.imports import import_grades
    from pathalign.grading.label_studio import Reading

    reading = Reading(verdict_field, criteria_field, parse_words(words))
    record = import_grades(source, folder, layout, candidates, images, reading, grader, rubric_version)
    return record, folder


def parse_words(pairs: Iterable[str]) -> dict[str, str]:
    """`["Looks real=plausible"]` to a mapping.

    Raises:
        ConfigError: With every pair that lacks `=` or does not end in a verdict.
    """
    found = {choice: verdict for choice, _, verdict in (pair.rpartition("=") for pair in pairs)}
    wrong = [pair for pair in pairs if "=" not in pair or pair.rpartition("=")[2] not in VERDICTS]
    if wrong:
        wanted = f"write `--verdict 'CHOICE=VERDICT'` with one of {', '.join(VERDICTS)}."
        raise ConfigError("Choices", [f"`--verdict {pair}`: {wanted}" for pair in wrong])
    return found


@click.command("compact", short_help="Many small files of grades to one Parquet file.")
@click.argument("source", metavar="SINK")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file that is made or added to.")
@click.option("--kind", type=click.Choice(["grade", "preference", "session"]), default="grade", show_default=True)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def compact_command(source: str, output: Path, kind: str, as_json: bool) -> None:
    """Write all rows of SINK into one Parquet file; a row that was sent twice is in it once.

    SINK is the folder or hf://datasets/USER/REPO where a study's grades go, or any folder with .jsonl files of grades.
    It is not touched. Rows of an earlier file at --output stay in it.
    """
    with quiet():
        from pathalign.grading.compact import compact

        made = compact(source, output, kind)
    print_result(asdict(made), as_json, f"{made.rows} rows, {made.duplicates} duplicates left out: {made.path}")


def _pull(source: str, folder: Path, as_json: bool, **options: Any) -> None:
    config = build(PullConfig, {"source": source, **given_settings(options)}, title="pathalign feedback pull")
    with quiet():
        from pathalign.grading.pull import next_command, pull, summary

        record = pull(config, folder)
    result = {**asdict(record), "output_dir": str(folder), "next": next_command(record, folder)}
    print_result(result, as_json, f"{summary(record, folder)}\nNext: {result['next']}")


pull_command = click.Command(
    "pull",
    callback=_pull,
    params=[
        click.Argument(["source"], metavar="REPO_OR_FOLDER"),
        *(option for option in setting_options(PullConfig) if option.name != "source"),
        click.Option(
            ["--output-dir", "folder"],
            type=click.Path(path_type=Path),
            default="runs/grades",
            show_default=True,
            help="Folder that is made, or made anew with what has come since.",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP),
    ],
    help=f"""Merge the grades that graders have sent into one folder for `pathalign feedback --grades`.

    REPO_OR_FOLDER is where a study's grades go: OWNER/NAME or hf://datasets/OWNER/NAME of a Hub dataset, or a folder.
    The files of all servers are read at one commit, and only those that are new are fetched. A row that was sent twice
    counts once, and a correction replaces what it corrects. With `--min-grades` it waits. Run it again for what has
    come since.

    Graders are named by pseudonyms. The files as they were sent, comments among them, stay beside the folder, hidden
    and readable by you only, for the next pull. {DISCLAIMER}""",
    short_help="Merge the grades of all servers of a study, from the Hub or a folder.",
)
