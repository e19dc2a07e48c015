"""The subcommand of a stage: its options are made from its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from inspect import cleandoc
from pathlib import Path
from typing import Any

import click

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.config import ConfigError, StageConfig, build, read_yaml, unknown_choice
from pathalign.options import given_settings, setting_options
from pathalign.schema import DISCLAIMER, RunRecord
from pathalign.stages import STAGES, Stage, load

REVISIONS = "A Hub id may end in @REVISION: a branch, a tag or a commit."
CONFIG_OPTION = click.Option(
    ["--config", "config_file"], type=click.Path(path_type=Path), help="YAML file with settings."
)


def stage_command(name: str, stage: str, output_dir: str) -> click.Command:
    """Make the subcommand of a stage.

    Args:
        name: What the user types; a method's name makes the command of that method.
        stage: Its name in `STAGES`.
        output_dir: Default folder of what it makes; `{role}` is filled in from the settings.
    """
    entry = next(item for item in STAGES if item.name == stage)
    if name in {method.name for method in entry.methods}:
        return command_of(name, entry.by(name), output_dir)
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
    about = cleandoc(config_class.__doc__ or "")

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
        with quiet():
            record: RunRecord = load(stage.entry)(config, target)
        print_result({**asdict(record), "output_dir": str(target)}, as_json, f"{target}")

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
        help=f"{about}\n\nOptions override the values in --config. {REVISIONS} {DISCLAIMER}",
        short_help=about.split("\n")[0],
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
        with quiet():
            estimate = load("pathalign.trainers.cost:estimate")(config)
            text = load("pathalign.trainers.cost:table")(estimate)
        print_result(asdict(estimate), as_json, text)
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
