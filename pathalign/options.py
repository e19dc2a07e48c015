"""A stage's settings as options of its command, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import chain
from typing import Any, get_args, get_type_hints

import click

from pathalign.config import StageConfig, default_of, plain_type


class CommaSeparated(click.ParamType):
    """A list in one word: `a,b`. Values `element` turns text into."""

    def __init__(self, element: type) -> None:
        self.element = element
        self.name = f"{element.__name__},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        """Split at commas; an empty word is an empty list."""
        try:
            return [self.element(word.strip()) for word in value.split(",") if word.strip()]
        except ValueError:
            self.fail(f"{value!r} is no list of {self.element.__name__}, such as 1,2.", param, ctx)


def setting_options(config_class: type[StageConfig]) -> list[click.Parameter]:
    """One option for each field, named and explained as the field is; what is not given stays None or empty."""
    hints = get_type_hints(config_class)
    options: list[click.Parameter] = []
    for item in fields(config_class):
        kind, _, choices = plain_type(hints[item.name])
        default = default_of(item)
        shown = ",".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)
        flag = f"--{item.name.replace('_', '-')}"
        help_text = f"{item.metadata['help']}  [default: {shown or 'none'}]"
        if kind is bool:
            options.append(click.Option([f"{flag}/--no-{flag[2:]}"], default=None, help=help_text))
        elif kind is list:
            element = CommaSeparated(get_args(hints[item.name])[0])
            options.append(click.Option([flag], type=element, multiple=True, help=help_text))
        else:
            options.append(click.Option([flag], type=click.Choice(choices) if choices else kind, help=help_text))
    return options


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the command line names; repeated lists are joined."""
    named = {key: value for key, value in options.items() if value is not None and value != ()}
    return {key: list(chain(*value)) if isinstance(value, tuple) else value for key, value in named.items()}
