"""The `pathalign` command: a subcommand for each stage, and `run` and `demo` for all of them.

A stage's options are made from its settings; torch and its friends are imported when a stage runs, never for help.
stdout holds results only: with `--json` exactly one JSON object. Everything else goes to stderr.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pathalign.allocator import keep_freed_memory
from pathalign.commands import jobs, serving, transfer
from pathalign.commands.experiment import experiment_command
from pathalign.commands.printing import JSON_HELP, print_result, printed, quiet
from pathalign.commands.publish import publish_command
from pathalign.commands.space import space
from pathalign.commands.stages import command_of, stage_command, with_subcommands
from pathalign.commands.study import study
from pathalign.config import ConfigError, parse_overrides, read_yaml
from pathalign.schema import DISCLAIMER, InputError, peak_rss_mb
from pathalign.stages import METHODS, MOST_ROUNDS, PULL, SCORE, load
from pathalign.workflow import StepResult, execute, merge, plan, recipe

INTERRUPTED = "Interrupted. Run the same command again to go on where it was."
DEMO_METHODS = [method.name for method in METHODS if method.name != "concepts"]  # which needs marks of subtypes


class Commands(click.Group):
    """The top command: turns errors into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; 2 is for wrong usage or configuration, 130 for Ctrl-C, 1 for all else."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo(INTERRUPTED, err=True)
            return ctx.exit(130)
        except Exception as error:
            if ctx.params["debug"]:
                raise
            click.echo(f"Error: {_explain(error)}", err=True)
            return ctx.exit(2 if isinstance(error, ConfigError) else 1)


def _explain(error: Exception) -> str:
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(str(error).split())
    memory = isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "can't allocate memory" in text
    if memory:
        return "The memory is full. Lower `batch_size` or `image_size_px`, or end other programs, and run it again."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full. Free some space and run the same command again."
    return f"{type(error).__name__}: {text or 'no message'} (`pathalign --debug ...` shows the traceback)"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pathalign")
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
def main(debug: bool) -> None:
    """Align synthetic medical images with clinical knowledge by expert feedback.

    `pathalign demo` runs the whole loop. Research only, never for diagnosis.
    """
    keep_freed_memory()


@click.group()
def grade() -> None:
    """Grade candidates: experts in a browser, or simulated graders fitted on real images."""


grade.add_command(stage_command("fit", "graders", "runs/{role}"))
grade.add_command(stage_command("simulate", "grade", "runs/grades"))
grade.add_command(serving.serve_command)
grade.add_command(serving.invite_command)
grade.add_command(printed(transfer.export_command))
grade.add_command(printed(transfer.import_command))

main.add_command(stage_command("data", "data", "runs/data"))
main.add_command(stage_command("pretrain", "pretrain", "runs/base"))
main.add_command(stage_command("generate", "generate", "runs/candidates"))
main.add_command(grade)
feedback = with_subcommands(stage_command("feedback", "feedback", "runs/feedback"))
feedback.add_command(transfer.compact_command)
feedback.add_command(transfer.pull_command)
main.add_command(feedback)
reward = with_subcommands(stage_command("reward", "reward", "runs/reward"))
reward.add_command(command_of("score", SCORE, "runs/scores"))
main.add_command(reward)
main.add_command(stage_command("align", "align", "runs/adapter"))
main.add_command(stage_command("evaluate", "evaluate", "runs/evaluation"))
main.add_command(experiment_command)
main.add_command(publish_command)
main.add_command(space)
main.add_command(study)
main.add_command(jobs.jobs)


@main.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Override a value of CONFIG.")
@click.option("--output-dir", "folder", type=click.Path(path_type=Path), help="Run directory.  [default: in CONFIG]")
@click.option("--from", "start", metavar="STAGE", help="Run this stage and all after it, changed or not.")
@click.option("--until", metavar="STAGE", help="Run up to this stage.")
@click.option("--rounds", type=click.IntRange(1, MOST_ROUNDS), help="Rounds of drawing, grading, aligning.")
@click.option("--min-grades", type=click.IntRange(0), help="Grades by experts to wait for in each round.")
@click.option("--new-grades", is_flag=True, help="See whether experts have given more grades since the last look.")
@click.option(
    "--reuse",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder of other runs: steps that one of them made from the same settings and inputs are taken from there.",
)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def run_command(
    config: Path,
    overrides: tuple[str, ...],
    folder: Path | None,
    start: str | None,
    until: str | None,
    rounds: int | None,
    min_grades: int | None,
    new_grades: bool,
    reuse: Path | None,
    as_json: bool,
) -> None:
    """Run all stages of CONFIG.yaml in one run directory.

    CONFIG has `output_dir`, `seed` and a section for each stage. A stage whose settings and inputs have not changed is
    not run again; a changed one and all after it are. After an interruption the same command goes on where it was.

    \b
    Stages: data, pretrain, graders, generate, grade, feedback,
            select, reward, align, control, sample, evaluate

    Experts grade in place of the simulated grader with `grade: {method: pull, source: OWNER/NAME}` in CONFIG, or with
    a folder as `source`. The run writes a study of its candidates, says how graders reach it, and waits until
    `min_grades` (100) are there. Grades that come later are taken when you ask: with `--new-grades`, another
    `--min-grades` or another `grade.revision`; feedback and all after it run again if there are any.

    In round 2 and later the candidates come from the base with the adapter of the round before, in `round-2/` and so
    on, and the reward model learns from the grades of all rounds. `--from` and `--until` are about the last round.
    """  # noqa: D301 - click looks for this mark
    began = time.monotonic()
    values = merge(read_yaml(config), parse_overrides(overrides))
    values = merge(values, {} if rounds is None else {"rounds": rounds})
    if min_grades is not None or new_grades:
        if (values.get("grade") or {}).get("method") != PULL:
            option = "--new-grades" if min_grades is None else "--min-grades"
            raise ConfigError(option, [f"simulated graders do not come later; set `grade.method={PULL}`."])
        values = merge(values, {} if min_grades is None else {"grade": {"min_grades": min_grades}})
    run_dir = folder or Path(values.get("output_dir") or f"runs/{config.stem}")
    with quiet():
        results = execute(plan(values, run_dir, title=str(config)), run_dir, start, until, new_grades, reuse)
    last = results[-1].folder
    metrics = _metrics(last) if last.name == "evaluation" else None
    summary = {**_cost(began, results), "output_dir": str(run_dir), "evaluation": metrics}
    summary["steps"] = [asdict(result) for result in results]
    print_result(summary, as_json, _table(last, metrics) if metrics else str(run_dir))


@main.command("demo")
@click.option("--data", metavar="PATH_OR_REPO_ID", help="Labelled real images.  [default: a drawn phantom]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="About how long it may take on two cores.")
@click.option("--method", type=click.Choice(DEMO_METHODS), help="How to align, as in `align`.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything.")
@click.option("--output-dir", "run_dir", type=click.Path(path_type=Path), default="runs/demo", show_default=True)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def demo_command(
    data: str | None, minutes: float | None, method: str | None, seed: int, run_dir: Path, as_json: bool
) -> None:
    """Run the whole loop with good settings for two cores, graded by a simulated grader.

    Ends with the table of metrics before and after, and where the report lies. The same command goes on after an
    interruption. `--minutes` scales the numbers of steps and images; the result depends on it, never on the clock.
    """
    began = time.monotonic()
    values = recipe("demo_phantom" if data in (None, "phantom") else "demo_real", minutes)
    values = merge(values, {"seed": seed, "data": {"source": data} if data else {}})
    if method not in (None, values["align"].get("method", METHODS[0].name)):
        values["align"] = {"method": method}  # the recipe's other settings are those of its own method
    with quiet():
        results = execute(plan(values, run_dir, title="pathalign demo"), run_dir)
    evaluation = results[-1].folder
    metrics = _metrics(evaluation)
    report = str(evaluation / "report.html")
    summary = {**metrics, **_cost(began, results), "simulated": True, "report": report}
    print_result(summary, as_json, _table(evaluation, metrics))


def _cost(began: float, results: list[StepResult]) -> dict[str, Any]:
    """Time of this command, and memory of it and of those that made what it kept."""
    peak = max([peak_rss_mb(), *(result.peak_rss_mb for result in results)])
    return {"wall_s": round(time.monotonic() - began, 2), "peak_rss_mb": round(peak, 1)}


def _metrics(evaluation: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((evaluation / "metrics.json").read_text())
    return metrics


def _table(evaluation: Path, metrics: Mapping[str, Any]) -> str:
    with quiet():
        table = load("pathalign.evaluate:summary_table")(metrics)
    return f"{table}\n\nReport: {evaluation / 'report.html'}\n{DISCLAIMER}"


if __name__ == "__main__":
    main()
