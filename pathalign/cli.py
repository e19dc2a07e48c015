"""The `pathalign` command: a subcommand for each stage, and `run` and `demo` for all of them.

A stage's options are made from its settings; torch and its friends are imported when a stage runs, never for help.
stdout holds results only: with `--json` exactly one JSON object. Everything else goes to stderr.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pathalign import commands, transfer
from pathalign.config import ConfigError, StageConfig, build, parse_overrides, read_yaml, unknown_choice
from pathalign.options import given_settings, setting_options
from pathalign.schema import DISCLAIMER, InputError, RunRecord
from pathalign.stages import METHODS, STAGES, Stage, load
from pathalign.workflow import StepResult, execute, merge, peak_rss_mb, plan, recipe

INTERRUPTED = "Interrupted. Run the same command again to go on where it was."


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


JSON_HELP = "Print the result as one JSON object on stdout."
CONFIG_OPTION = click.Option(
    ["--config", "config_file"], type=click.Path(path_type=Path), help="YAML file with settings."
)


def stage_command(name: str, stage: str, output_dir: str) -> click.Command:
    """Make the subcommand of a stage.

    Args:
        name: What the user types.
        stage: Its name in `STAGES`.
        output_dir: Default folder of what it makes; `{role}` is filled in from the settings.
    """
    entry = next(item for item in STAGES if item.name == stage)
    if entry.methods:
        return MethodCommand(name, entry, output_dir)
    return command_of(name, entry, output_dir)


def command_of(
    name: str,
    stage: Stage,
    output_dir: str,
    extra: tuple[click.Parameter, ...] = (),
    instead: Callable[[StageConfig, bool, Mapping[str, Any]], bool] = lambda config, as_json, options: False,
) -> click.Command:
    """Make the command that does `stage` as it stands.

    Args:
        name: What the user types.
        stage: What is done.
        output_dir: Default folder of what it makes.
        extra: Further options, which are not settings.
        instead: Gets the configuration and these options; True says that there is nothing more to do.
    """
    config_class: type[StageConfig] = load(stage.settings)

    def callback(config_file: Path | None, folder: Path | None, as_json: bool, **options: Any) -> None:
        others = {parameter.name: options.pop(parameter.name or "") for parameter in extra}
        values = read_yaml(config_file) if config_file else {}
        named = values.pop("output_dir", None)
        if stage.methods:
            values.pop("method", None)
        config = build(config_class, {**values, **given_settings(options)}, title=f"pathalign {name}")
        if instead(config, as_json, others):
            return
        target = folder or Path(named or output_dir.format(**asdict(config)))
        with _quiet():
            record: RunRecord = load(stage.entry)(config, target)
        _print({**asdict(record), "output_dir": str(target)}, as_json, f"{target}")

    shared: list[click.Parameter] = [
        CONFIG_OPTION,
        click.Option(
            ["--output-dir", "folder"],
            type=click.Path(path_type=Path),
            help=f"Folder that is made.  [default: {output_dir.replace('{role}', 'ROLE')}]",
        ),
        click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP),
    ]
    return click.Command(
        name,
        params=[*extra, *shared, *setting_options(config_class)],
        callback=callback,
        help=f"{config_class.__doc__}\n\nOptions override the values in --config. {DISCLAIMER}",
        short_help=(config_class.__doc__ or "").split("\n")[0],
    )


class MethodCommand(click.Command):
    """A stage with a choice of methods: options and help are those of the one that `--method` or the file names.

    Args:
        name: What the user types.
        stage: The stage, with its methods.
        output_dir: Default folder of what it makes.
    """

    def __init__(self, name: str, stage: Stage, output_dir: str) -> None:
        self.stage, self.output_dir = stage, output_dir
        self.methods = [method.name for method in stage.methods]
        super().__init__(name, short_help=f"{name.capitalize()} a model by one of {', '.join(self.methods)}.")

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Context of the command of the method that the arguments name."""
        method = click.Option(
            ["--method"],
            type=click.Choice(self.methods),
            default=self.stage.method,
            show_default=True,
            help="How it is done; each method has its own options, which `--method NAME --help` lists.",
        )
        estimate = click.Option(["--estimate"], is_flag=True, help="Print what this run would cost, and end.")
        chosen = self.stage.by(self.chosen(list(args)))
        command = command_of(self.name or "", chosen, self.output_dir, (method, estimate), print_estimate)
        return command.make_context(info_name, args, parent, **extra)

    def chosen(self, args: list[str]) -> str:
        """The method that the command line names, or else the file of `--config`, or else the default.

        Raises:
            click.UsageError: If there is no such method.
            ConfigError: If the file names one that does not exist.
        """
        look = click.Command(
            self.name,
            params=[click.Option(["--method"]), CONFIG_OPTION],
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        found = look.make_context(self.name, args, resilient_parsing=True).params
        if found["method"] is not None:
            if found["method"] not in self.methods:
                raise click.UsageError(unknown_choice("--method", found["method"], self.methods))
            return str(found["method"])
        path = found["config_file"]
        name = read_yaml(path).get("method", self.stage.method) if path else self.stage.method
        if name not in self.methods:
            raise ConfigError(str(path), [unknown_choice("method", name, self.methods)])
        return str(name)


def print_estimate(config: StageConfig, as_json: bool, options: Mapping[str, Any]) -> bool:
    """With `--estimate`: print what a training run would cost, in place of the run."""
    if options["estimate"]:
        with _quiet():
            estimate = load("pathalign.trainers.cost:estimate")(config)
            text = load("pathalign.trainers.cost:table")(estimate)
        _print(asdict(estimate), as_json, text)
    return bool(options["estimate"])


def with_subcommands(command: click.Command) -> click.Group:
    """A stage that others stand beside: without a subcommand it runs as ever."""
    run = command.callback
    assert run is not None

    def callback(**options: Any) -> None:
        context = click.get_current_context()
        if context.invoked_subcommand is None:
            run(**options)
        elif given := given_settings({key: value for key, value in options.items() if value is not False}):
            name = next(iter(given)).replace("_", "-")
            raise click.UsageError(f"Give the options of `{context.invoked_subcommand}` after its name; see --{name}.")

    return click.Group(
        command.name,
        params=command.params,
        callback=callback,
        help=command.help,
        short_help=command.short_help,
        invoke_without_command=True,
        subcommand_metavar="[COMMAND]",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what libraries print to stderr, and switch off their progress bars and warnings; ours remain."""
    for name in ("TRANSFORMERS", "DIFFUSERS", "DATASETS", "HF_HUB"):
        os.environ.setdefault(f"{name}_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    context = click.get_current_context().find_root()
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        if not context.params["debug"]:
            warnings.simplefilter("ignore")
        yield


def _print(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    click.echo(json.dumps(_finite(result), indent=2, sort_keys=True, default=str) if as_json else text)


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printed(command: click.Command) -> click.Command:
    """Let a command whose callback returns a run record and its folder print them, as JSON if asked."""
    make = command.callback
    assert make is not None

    def callback(as_json: bool, **options: Any) -> None:
        with _quiet():
            record, folder = make(**options)
        _print({**asdict(record), "output_dir": str(folder)}, as_json, f"{folder}")

    command.callback = callback
    command.params.append(click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP))
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="pathalign")
@click.option("--debug", is_flag=True, help="Show tracebacks and the warnings of libraries.")
def main(debug: bool) -> None:
    """Align synthetic medical images with clinical knowledge by expert feedback.

    `pathalign demo` runs the whole loop. Research only, never for diagnosis.
    """


@click.group()
def grade() -> None:
    """Grade candidates: experts in a browser, or simulated graders fitted on real images."""


grade.add_command(stage_command("fit", "graders", "runs/{role}"))
grade.add_command(stage_command("simulate", "grade", "runs/grades"))
grade.add_command(commands.serve_command)
grade.add_command(commands.invite_command)
grade.add_command(printed(transfer.export_command))
grade.add_command(printed(transfer.import_command))

main.add_command(stage_command("data", "data", "runs/data"))
main.add_command(stage_command("pretrain", "pretrain", "runs/base"))
main.add_command(stage_command("generate", "generate", "runs/candidates"))
main.add_command(grade)
feedback = with_subcommands(stage_command("feedback", "feedback", "runs/feedback"))
main.add_command(feedback)
main.add_command(stage_command("reward", "reward", "runs/reward"))
main.add_command(stage_command("align", "align", "runs/adapter"))
main.add_command(stage_command("evaluate", "evaluate", "runs/evaluation"))


@feedback.command("compact", short_help="Many small files of grades to one Parquet file.")
@click.argument("source", metavar="SINK")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Parquet file that is made or added to.")
@click.option("--kind", type=click.Choice(["grade", "preference", "session"]), default="grade", show_default=True)
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def compact_command(source: str, output: Path, kind: str, as_json: bool) -> None:
    """Write all rows of SINK into one Parquet file; a row that was sent twice is in it once.

    SINK is the folder or hf://datasets/USER/REPO where a study's grades go, or any folder with .jsonl files of grades.
    It is not touched. Rows of an earlier file at --output stay in it.
    """
    with _quiet():
        made = load("pathalign.grading.compact:compact")(source, output, kind)
    _print(asdict(made), as_json, f"{made.rows} rows, {made.duplicates} duplicates left out: {made.path}")


@main.command("run")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Override a value of CONFIG.")
@click.option("--output-dir", "folder", type=click.Path(path_type=Path), help="Run directory.  [default: in CONFIG]")
@click.option("--from", "start", metavar="STAGE", help="Run this stage and all after it, changed or not.")
@click.option("--until", metavar="STAGE", help="Run up to this stage.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def run_command(
    config: Path, overrides: tuple[str, ...], folder: Path | None, start: str | None, until: str | None, as_json: bool
) -> None:
    r"""Run all stages of CONFIG.yaml in one run directory.

    CONFIG has `output_dir`, `seed` and a section for each stage. A stage whose settings and inputs have not changed is
    not run again; a changed one and all after it are. After an interruption the same command goes on where it was.

    \b
    Stages: data, pretrain, graders, generate, grade, feedback,
            reward, align, control, sample, evaluate
    """
    began = time.monotonic()
    values = merge(read_yaml(config), parse_overrides(overrides))
    run_dir = folder or Path(values.get("output_dir") or f"runs/{config.stem}")
    with _quiet():
        results = execute(plan(values, run_dir, title=str(config)), run_dir, start, until)
    evaluated = results[-1].folder.name == "evaluation"
    metrics = _metrics(run_dir) if evaluated else None
    summary = {**_cost(began, results), "output_dir": str(run_dir), "evaluation": metrics}
    summary["steps"] = [asdict(result) for result in results]
    _print(summary, as_json, _table(run_dir, metrics) if metrics else str(run_dir))


@main.command("demo")
@click.option("--data", metavar="PATH_OR_REPO_ID", help="Labelled real images.  [default: a drawn phantom]")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="About how long it may take on two cores.")
@click.option("--method", type=click.Choice([method.name for method in METHODS]), help="How to align, as in `align`.")
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
    with _quiet():
        results = execute(plan(values, run_dir, title="pathalign demo"), run_dir)
    metrics = _metrics(run_dir)
    report = str(run_dir / "evaluation" / "report.html")
    summary = {**metrics, **_cost(began, results), "simulated": True, "report": report}
    _print(summary, as_json, _table(run_dir, metrics))


def _cost(began: float, results: list[StepResult]) -> dict[str, Any]:
    """Time of this command, and memory of it and of those that made what it kept."""
    peak = max([peak_rss_mb(), *(result.peak_rss_mb for result in results)])
    return {"wall_s": round(time.monotonic() - began, 2), "peak_rss_mb": round(peak, 1)}


def _metrics(run_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    return metrics


def _table(run_dir: Path, metrics: Mapping[str, Any]) -> str:
    with _quiet():
        table = load("pathalign.evaluate:summary_table")(metrics)
    return f"{table}\n\nReport: {run_dir / 'evaluation' / 'report.html'}\n{DISCLAIMER}"


if __name__ == "__main__":
    main()
