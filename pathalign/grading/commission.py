"""A run's candidates on their way to graders: the study that it writes for them, and what to type for it."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pathalign.artefacts import write_atomically
from pathalign.config import read_yaml
from pathalign.grading.pull import pull, summary
from pathalign.grading.shards import referred
from pathalign.grading.sinks import HUB_PREFIX
from pathalign.grading.study import SECRET_VARIABLE, Study, default_state_dir, share_secret
from pathalign.images import ImageSet
from pathalign.progress import say
from pathalign.schema import RunRecord
from pathalign.settings.pull import STUDY, CollectConfig

SINK = "expert_grades"
PATHS = ("references", "reward_model", "proposal", "rubric")  # keys of a study that may name what stands beside it
HEADER = """\
# Written by `pathalign run` for the graders of its candidates, and not written again: add `graders`, `owners`,
# `instructions` and texts of the `classes` before grading starts. All keys: pathalign/grading/study.py.
"""


def collect(config: CollectConfig, output_dir: str | Path) -> RunRecord:
    """Hand the candidates to graders and wait for their grades.

    Beside `output_dir` stands `study.yaml`, which names candidates and sink; it is written unless it is there. Graders
    of the study that it is made from, such as the last round's, keep their pseudonyms if that one's state is here.

    A run knows the grades that it used by the content of `output_dir`: taking another state of them makes feedback and
    all after it run again, and what has come since does not.

    Args:
        config: Without a `source` grades gather in the folder `expert_grades` beside `output_dir`.
        output_dir: Folder of the grades, see `pull`.

    Raises:
        InputError: As `pull`, or if a study cannot be used.
    """
    output_dir = Path(output_dir)
    path = output_dir.parent / STUDY
    own = output_dir.parent.absolute() / SINK  # absolute: `run/expert_grades` could be a dataset's name too
    source = referred(config.source or str(own), config.revision)
    config = replace(config, source=source.name, revision=source.revision)
    on_hub = source.name.startswith(HUB_PREFIX)
    sink = source.name if on_hub else str(Path(source.name).absolute())
    if not path.is_file():
        write_study(path, config, sink)
    study = Study.load(path)
    if study.sink != sink:
        say(f"{path} sends grades to {study.sink}, but this run waits for {sink}: mend one of them.")
    name = shlex.quote(str(path))
    say("The candidates wait for graders. In another terminal, on this machine:")
    say(f"  pathalign grade invite {name} NAME    # once for each grader")
    say(f"  pathalign grade serve {name}")
    if on_hub:
        say(f"or as a Space:\n  pathalign space deploy ORG/NAME --study {name}")
    _say_if_too_few(config, study)
    last = config.study
    if last is not None and not share_secret(default_state_dir(Path(last)), default_state_dir(path)):
        say(f"Whoever has graded {last} keeps a pseudonym only if {SECRET_VARIABLE} is the same here as it was there.")
    record = pull(config, output_dir)
    say(summary(record, output_dir))
    return record


def _say_if_too_few(config: CollectConfig, study: Study) -> None:
    """Repeats and other studies may bring more, so this is no error."""
    count = len(ImageSet.load(str(config.candidates)))
    if count * study.graders_per_image < config.min_grades:
        say(
            f"The study asks for {study.graders_per_image} x {count} grades, fewer than `min_grades` "
            f"({config.min_grades}): lower that, or raise `graders_per_image` in the study."
        )


def write_study(path: Path, config: CollectConfig, sink: str) -> None:
    """Write the study of a run's candidates; paths in it are relative, so that the run directory can be moved.

    Raises:
        ConfigError: If `config.study` cannot be used.
    """
    here = path.parent.absolute()
    values: dict[str, Any] = {"title": "Image grading", "rubric": config.rubric, "references": config.references}
    if config.references is None:
        del values["references"]
        values["real_control_share"] = 0
    origin = Path()
    if config.study is not None:
        Study.load(config.study)  # says what is wrong in it, by its name
        values, origin = read_yaml(config.study), Path(config.study).parent
    values |= {"candidates": str(config.candidates), "sink": sink}
    for key in PATHS:
        if isinstance(values.get(key), str) and (origin / values[key]).exists():
            values[key] = os.path.relpath(origin / values[key], here)
    for key in ("candidates", "sink"):
        if not values[key].startswith(HUB_PREFIX) and (key == "sink" or Path(values[key]).exists()):
            values[key] = os.path.relpath(values[key], here)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
    write_atomically(path, HEADER + text)
