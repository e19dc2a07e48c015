"""`pathalign experiment`: the studies of the method, each by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.config import ConfigError
from pathalign.schema import DISCLAIMER
from pathalign.stages import load


@click.command("experiment")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--list", "only_list", is_flag=True, help="Say what there is, and end.")
@click.option("--data", metavar="PATH_OR_REPO_ID", help="Labelled real images.")
@click.option("--seeds", metavar="S,S,...", help="Seeds of the runs, in place of the experiment's own.")
@click.option("--scale", type=click.Choice(["cpu", "full"]), default="cpu", show_default=True, help="How much is run.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Scale each run to about so long.")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="Runs at a time.")
@click.option("--output-dir", type=click.Path(path_type=Path), default="runs/experiments", show_default=True)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def experiment_command(
    names: tuple[str, ...],
    only_list: bool,
    data: str | None,
    seeds: str | None,
    scale: str,
    minutes: float | None,
    workers: int,
    output_dir: Path,
    as_json: bool,
) -> None:
    """Run studies of the method: each compares a few arms over several seeds and writes a result page.

    NAME is one that `--list` names, `all`, or a YAML file of your own like those in `pathalign/recipes/experiments`.
    Runs share what they can with each other and with those of earlier experiments in the same output directory.
    After an interruption the same command goes on. Results are in OUTPUT_DIR/NAME: `index.html`, `results.json`,
    `results.md` and `figures/`.
    """
    with quiet():
        if only_list:
            found = load("pathalign.experiments.recipe:catalogue")(scale)
            text = "\n".join(f"{entry['name']:<20}{entry['question']}" for entry in found)
            print_result({"experiments": found}, as_json, text)
            return
        if not names:
            raise click.UsageError("Name an experiment, or `all`; `pathalign experiment --list` says what there is.")
        results: dict[str, Any] = load("pathalign.experiments.study:run")(
            names, output_dir, data=data, seeds=_numbers(seeds), scale=scale, minutes=minutes, workers=workers
        )
    text = "\n\n".join(result["table"] for result in results.values())
    print_result({"experiments": results}, as_json, f"{text}\n\n{DISCLAIMER}")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0:
        raise ConfigError("--seeds", [f"{text!r} is no list of whole numbers from 0, such as 0,1,2."])
    return found
