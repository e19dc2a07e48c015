"""One way to configure a stage: a dataclass, a YAML file, and overrides on top.

A field is documented once, by the `help` of `option`; the command line's help, the YAML keys and the checks come from
it. All wrong fields are reported together, before anything is loaded. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from pathalign.schema import InputError

# What a folder or Hub repo can hold that a stage reads; `remote.py` tells them apart.
PIPELINE, ADAPTER, REWARD_MODEL = "a pipeline", "a LoRA adapter", "a reward model"
GRADER, BACKBONE, DATASET = "a simulated grader", "a transformers model", "a dataset"


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    holds: str | None = None,
    revision: str | None = None,
) -> Any:
    """A documented field of a stage's configuration; a list default is copied for each instance.

    Args:
        default: Value of the field where none is given.
        help: What the command line says of it.
        minimum: Least number.
        maximum: Largest number.
        holds: What must be found at the folder or Hub id that the field takes, one of the kinds above.
        revision: The field with its Hub revision, if there is one; `OWNER/NAME@REVISION` says the same anywhere.
    """
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "holds": holds, "revision": revision}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class StageConfig:
    """Base of all stage configurations.

    Attributes:
        incidental: Settings that decide nothing about what is made, such as how long to wait.

    Raises:
        InputError: On construction, with one line for each field that cannot be used.
    """

    incidental: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        problems = [
            text for item in fields(self) if (text := _problem(item, hints[item.name], getattr(self, item.name)))
        ]
        problems = problems or self.problems()
        if problems:
            raise ConfigError(type(self).__name__, problems)

    def problems(self) -> list[str]:
        """What is wrong across fields, one sentence each; a stage adds its own."""
        return []


class ConfigError(InputError):
    """A configuration with everything that is wrong in it."""

    def __init__(self, title: str, problems: Iterable[str]) -> None:
        self.title, self.problems = title, list(problems)
        super().__init__(f"{title} cannot be used:\n" + "\n".join(f"- {text}" for text in self.problems))


Config = TypeVar("Config", bound=StageConfig)


def build(config_class: type[Config], values: Mapping[str, Any], title: str | None = None) -> Config:
    """Make a configuration from a mapping.

    Raises:
        ConfigError: Names every unknown key (with the nearest known one) and every value of a wrong type or range.
    """
    known = [item.name for item in fields(config_class)]
    problems = [unknown_key(key, known) for key in values if key not in known]
    try:
        config = config_class(**{key: value for key, value in values.items() if key in known})
    except ConfigError as error:
        raise ConfigError(title or error.title, [*problems, *error.problems]) from error
    if problems:
        raise ConfigError(title or config_class.__name__, problems)
    return config


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Say that `key` is unknown and which known one is nearest to it."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"`{key}` is not known; " + (f"did you mean `{near[0]}`?" if near else f"use one of {', '.join(known)}.")


def unknown_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """Say what a setting may be, and which of these is nearest to its value."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"`{name}` is {value!r}; use one of {', '.join(map(repr, choices))}.{hint}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: If the file is missing, is not YAML, or is not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(str(path), ["there is no such file; give the path of a YAML file with settings."])
    try:
        content = yaml.load(path.read_text(), Loader=_Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"it is not valid YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise ConfigError(str(path), [f"it holds a {type(content).__name__}; it must hold `key: value` lines."])
    return content


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML follows 1.1, where `1e-3` is text for want of a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_overrides(pairs: Iterable[str]) -> dict[str, Any]:
    """`["reward.steps=100"]` to nested mappings, values read as YAML.

    Raises:
        ConfigError: With every pair that lacks `=`, whose value is not YAML, or whose key holds another pair's value.
    """
    result: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, value = pair.partition("=")
        *parents, last = key.split(".")
        level = result
        for parent in parents:
            level = level.setdefault(parent, {}) if isinstance(level, dict) else level
        if not equals or not isinstance(level, dict):
            problems.append(f"`--set {pair}`: write `--set stage.key=value`, once for each key.")
            continue
        try:
            level[last] = yaml.load(value, Loader=_Loader)
        except yaml.YAMLError:
            problems.append(f"`--set {pair}`: {value!r} is not valid YAML.")
    if problems:
        raise ConfigError("Overrides", problems)
    return result


def parse_config(
    config_class: type[Config], output_dir: str, arguments: Sequence[str] | None = None
) -> tuple[Config, Path]:
    """Configuration of a script in `training/`: `--config FILE.yaml` and `--key value` on top, by trl's parser.

    Args:
        config_class: The stage's configuration.
        output_dir: Where the artefact goes, unless the file or the command line names an `output_dir`.
        arguments: Command line without the program; `sys.argv` by default.

    Raises:
        SystemExit: With code 2 and all that is wrong on stderr.
    """
    from trl import TrlParser

    hints = get_type_hints(config_class)
    # A plain copy of the dataclass: the parser hands a field's whole metadata to argparse, which knows no `minimum`.
    arguments_class = make_dataclass(
        config_class.__name__,
        [("output_dir", str, _argument(output_dir, "Folder that the artefact becomes."))]
        + [
            (item.name, hints[item.name], _argument(default_of(item), item.metadata["help"]))
            for item in fields(config_class)
        ],
    )
    parser = TrlParser(dataclass_types=[arguments_class], allow_abbrev=False)
    try:
        parsed, from_file, from_command = parser.parse_args_and_config(
            arguments, return_remaining_strings=True, separate_remaining_strings=True
        )
        unknown = [text[2:].partition("=")[0] for text in [*from_file, *from_command] if text.startswith("--")]
        values = vars(parsed)
        folder = Path(values.pop("output_dir"))
        return build(config_class, {**dict.fromkeys(unknown), **values}), folder
    except (InputError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from error


def _argument(default: Any, help: str) -> Any:
    metadata = {"help": help.replace("%", "%%")}  # argparse formats its help texts
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: Any) -> Any:
    """Default value of a dataclass field, or `MISSING`."""
    return item.default_factory() if item.default_factory is not MISSING else item.default


def plain_type(hint: Any) -> tuple[Any, bool, tuple[Any, ...]]:
    """Resolve a field's type to `(type, optional, choices)`; for lists the type is `list`."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not type(None)]
        optional = len(members) < len(get_args(hint))
        hint = members[0]
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), optional, get_args(hint)
    if get_origin(hint) is list:
        return list, optional, ()
    return hint, optional, ()


def _problem(item: Any, hint: Any, value: Any) -> str | None:
    kind, optional, choices = plain_type(hint)
    if value is None:
        return None if optional else f"`{item.name}` is empty; give a value: {item.metadata['help']}"
    if choices and value not in choices:
        return unknown_choice(item.name, value, choices)
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if not fits or (isinstance(value, bool) and kind is not bool):
        return f"`{item.name}` is {value!r}; it must be of type {kind.__name__}. {item.metadata['help']}"
    low, high = item.metadata.get("minimum"), item.metadata.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = (
            f"from {low} to {high}"
            if None not in (low, high)
            else f"at least {low}"
            if high is None
            else f"at most {high}"
        )
        return f"`{item.name}` is {value}; it must be {limits}. {item.metadata['help']}"
    return None
