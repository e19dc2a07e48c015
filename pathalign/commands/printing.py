"""How commands print: results to stdout, as JSON if asked, and everything else to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

import click

JSON_HELP = "Print the result as one JSON object on stdout."


@contextmanager
def quiet() -> Iterator[None]:
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


def print_result(result: Mapping[str, Any], as_json: bool, text: str) -> None:
    """Print a result to stdout: as JSON, or as `text`. Of several processes only the first one does."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(json.dumps(finite(result), indent=2, sort_keys=True, default=str) if as_json else text)


def finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printed(command: click.Command) -> click.Command:
    """Let a command whose callback returns a run record and its folder print them, as JSON if asked."""
    make = command.callback
    assert make is not None

    def callback(as_json: bool, **options: Any) -> None:
        with quiet():
            record, folder = make(**options)
        print_result({**asdict(record), "output_dir": str(folder)}, as_json, f"{folder}")

    command.callback = callback
    command.params.append(click.Option(["--json", "as_json"], is_flag=True, help=JSON_HELP))
    return command
