"""What is graded, by whom, against which checklist: one YAML file.

Relative paths are looked for beside the file first, so that a folder with a study in it can be moved.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pathalign.config import ConfigError, StageConfig, option, read_yaml, unknown_key
from pathalign.grading.sinks import HUB_PREFIX, check_sink
from pathalign.schema import MODES, PSEUDONYM, PSEUDONYMS_WANTED, VERDICTS, InputError, Rubric

SECRET_VARIABLE = "PATHALIGN_STUDY_SECRET"
SHORTEST_SECRET = 16  # characters
LARGEST_HIDDEN_SHARE = 0.5
_PATHS = ("candidates", "references", "reward_model", "proposal", "rubric", "sink")  # may stand beside the study


@dataclass(frozen=True)
class Person:
    """Somebody who may grade: a name that stays on the server, and a chosen pseudonym, if any."""

    name: str
    pseudonym: str | None = None


@dataclass(frozen=True)
class ClassText:
    """What graders read about a class; `subtypes` are offered to those who split it."""

    display_name: str
    description: str = ""
    subtypes: tuple[str, ...] = ()


@dataclass
class Study(StageConfig):
    """A study: images, classes, checklist, graders, and how images come up."""

    title: str = option("Image grading", "Title of the page.")
    instructions: str = option("", "What graders are told before they begin.")
    candidates: str = option("candidates", "Images to grade: a folder made by `pathalign generate`, or a Hub dataset.")
    candidates_revision: str | None = option(None, "Hub revision of the candidates.")
    references: str | None = option(None, "Real images for reference pictures and hidden controls: folder or Hub id.")
    references_split: str = option("train", "Split of the references.")
    references_revision: str | None = option(None, "Hub revision of the references.")
    references_per_class: int = option(4, "Reference pictures shown beside an image.", minimum=0, maximum=12)
    classes: dict | None = option(None, "Class -> `display_name`, `description`, list of `subtypes`; all optional.")
    rubric: object = option("white_blood_cells", "Checklist: a preset's name, a YAML file, or its content.")
    reason_for: list[str] = option(["implausible"], "Verdicts that need a failed criterion or a comment.")
    real_control_share: float = option(
        0.1, "Share of hidden real images among those shown.", minimum=0.0, maximum=LARGEST_HIDDEN_SHARE
    )
    repeat_share: float = option(
        0.1, "Share of images that come up a second time.", minimum=0.0, maximum=LARGEST_HIDDEN_SHARE
    )
    repeat_distance: int = option(20, "A repeat comes so many images later, or more.", minimum=1)
    graders: list = option([], "Who may grade: names, or mappings with `name` and `pseudonym`.")
    organization: str | None = option(None, "Hub organization whose members may grade, on a Space.")
    owners: list[str] = option([], "Names of those who may see the results.")
    graders_per_image: int = option(
        1, "Graders that judge each candidate; controls may have more.", minimum=1, maximum=100
    )
    order: Literal["random", "uncertainty", "proposed"] = option("random", "Which images come first.")
    reward_model: str | None = option(None, "Reward model whose uncertainty orders the images: folder or Hub id.")
    proposal: str | None = option(None, "File `next.json` of `pathalign study next`, for `order: proposed`.")
    random_share: float = option(
        0.2, "Share drawn at random under the other orders too, for unbiased figures.", minimum=0.2, maximum=1.0
    )
    modes: list[str] = option(list(MODES), "Ways of grading that the page offers; the first one opens.")
    grid_size: int = option(20, "Most images in a grid.", minimum=2, maximum=60)
    pairs_per_class: int = option(50, "Pairs of images to compare, of each class.", minimum=1)
    microns_per_pixel: float | None = option(None, "Scale of the images.", minimum=1e-6)
    lease_minutes: float = option(30.0, "An image handed out is kept for its grader so long.", minimum=0.1)
    sink: str = option("grades", "Where grades go: a folder, or hf://datasets/USER/REPO.")
    seed: int = option(0, "Seed of the order.", minimum=0)

    def __post_init__(self) -> None:
        """Collect what is wrong in single fields and inside of them, so that all of it is reported together."""
        problems: list[str] = []
        try:
            super().__post_init__()
        except ConfigError as error:
            problems = list(error.problems)
        broken = {text.split("`")[1] for text in problems}
        for names, check in _CHECKS:
            if not broken & set(names):
                problems += check(self)
        if problems:
            raise ConfigError("Study", problems)

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read a study.

        Raises:
            ConfigError: If the file is missing, is not YAML, or anything in it cannot be used; names all of it.
        """
        path = Path(path)
        values = read_yaml(path)
        known = [item.name for item in fields(cls)]
        problems = [unknown_key(key, known) for key in values if key not in known]
        values = {key: _beside(path.parent, key, value) for key, value in values.items() if key in known}
        values.setdefault("candidates", _beside(path.parent, "candidates", "candidates"))
        values.setdefault("sink", _beside(path.parent, "sink", "grades"))
        try:
            study = cls(**values)
        except ConfigError as error:
            problems += error.problems
        if problems:
            raise ConfigError(str(path), problems)
        return study

    @cached_property
    def checklist(self) -> Rubric:
        """The checklist that graders judge against."""
        if isinstance(self.rubric, dict):
            return Rubric.from_mapping(self.rubric, "in the study")
        return Rubric.load(str(self.rubric))

    @cached_property
    def people(self) -> tuple[Person, ...]:
        """Those who may grade by name."""
        return tuple(Person(**entry) if isinstance(entry, dict) else Person(entry) for entry in self.graders)

    @property
    def pseudonyms(self) -> dict[str, str]:
        """Name -> pseudonym, of those graders whose pseudonym the study chooses itself."""
        return {person.name: person.pseudonym for person in self.people if person.pseudonym}

    def class_text(self, name: str) -> ClassText:
        """What graders read about the class `name`, also where the study does not mention it."""
        text = {"display_name": name.replace("_", " "), **((self.classes or {}).get(name) or {})}
        return ClassText(**{**text, "subtypes": tuple(text.get("subtypes") or ())})


def study_secret(state_dir: str | Path) -> bytes:
    """The secret behind item ids and pseudonyms: `PATHALIGN_STUDY_SECRET`, or the file `secret` in the state folder.

    The file is made on the first call, readable by its owner only. Where the disk is wiped on restart, the variable
    must be set: with another secret the same graders get other pseudonyms.

    Raises:
        InputError: If the variable is too short, or the folder cannot be written to.
    """
    given = os.environ.get(SECRET_VARIABLE)
    if given:
        if len(given) < SHORTEST_SECRET:
            raise InputError(
                f"{SECRET_VARIABLE} has {len(given)} characters; give at least {SHORTEST_SECRET}, such as from "
                "`python -c 'import secrets; print(secrets.token_hex(32))'`."
            )
        return given.encode()
    path = Path(state_dir) / "secret"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _create_private(path, secrets.token_hex(32))
        return path.read_text().strip().encode()
    except OSError as error:
        raise InputError(f"{path} cannot be used: {error.strerror}. Choose another state folder.") from error


def default_state_dir(study: Path) -> Path:
    """Where a study served from this machine keeps its state: beside it."""
    return study.with_suffix(".state")


def share_secret(source: Path, state_dir: Path) -> bool:
    """Give a study the secret of another one, unless it has its own, so that the same graders have the same pseudonyms.

    Args:
        source: State folder of the study that was graded before.
        state_dir: State folder of the study that is to come.

    Returns:
        Whether both have the same secret now.
    """
    if os.environ.get(SECRET_VARIABLE):
        return True
    theirs, own = source / "secret", state_dir / "secret"
    if not theirs.is_file():
        return False
    if not own.is_file():
        state_dir.mkdir(parents=True, exist_ok=True)
        _create_private(own, theirs.read_text().strip())
    return own.read_text() == theirs.read_text()


def check_lasting_secret(sink: str) -> None:
    """See that pseudonyms and item ids outlive a disk that is wiped on restart, as grades on the Hub do.

    Raises:
        InputError: If `sink` is on the Hub and `PATHALIGN_STUDY_SECRET` is not set.
    """
    if sink.startswith(HUB_PREFIX) and not os.environ.get(SECRET_VARIABLE):
        raise InputError(
            f"{SECRET_VARIABLE} is not set, and this disk is forgotten on restart: the same graders would get other "
            f"pseudonyms then. Set it as a secret of the Space, to at least {SHORTEST_SECRET} characters that never "
            "change, such as from `python -c 'import secrets; print(secrets.token_hex(32))'`."
        )


def _create_private(path: Path, content: str) -> None:
    """Make a file of mode 0600 that is whole as soon as it is there; one that is there already stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(content + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        temporary.unlink()


def _beside(folder: Path, key: str, value: Any) -> Any:
    """A path as it is meant: beside the study if it is there, or if it is yet to be made."""
    if key not in _PATHS or not isinstance(value, str):
        return value
    if key == "sink":
        return value if "://" in value else str((folder / Path(value).expanduser()).absolute())
    beside = folder / Path(value).expanduser()
    return str(beside.absolute()) if beside.exists() else value


def _class_problems(study: Study) -> list[str]:
    problems = []
    for name, text in (study.classes or {}).items():
        if not isinstance(text, dict | None):
            problems.append(
                f"`classes.{name}` is {text!r}; write `display_name`, `description` and `subtypes` below it."
            )
            continue
        for key, value in (text or {}).items():
            if key not in ClassText.__dataclass_fields__:
                problems.append(f"In `classes.{name}`: {unknown_key(str(key), ClassText.__dataclass_fields__)}")
            elif key == "subtypes" and not _is_texts(value):
                problems.append(f"`classes.{name}.subtypes` is {value!r}; it must be a list of names.")
            elif key != "subtypes" and not isinstance(value, str):
                problems.append(f"`classes.{name}.{key}` is {value!r}; it must be text.")
    return problems


def _rubric_problems(study: Study) -> list[str]:
    if not isinstance(study.rubric, dict | str):
        return [f"`rubric` is {study.rubric!r}; give a preset's name, a YAML file, or `name`, `version`, `criteria`."]
    try:
        return [] if study.checklist.criteria else ["`rubric` has no criteria; a checklist needs at least one."]
    except InputError as error:
        return [f"`rubric`: {error}"]


def _people_problems(study: Study) -> list[str]:
    problems = []
    for entry in study.graders:
        person = entry if isinstance(entry, dict) else {"name": entry}
        wrong = [unknown_key(str(key), ("name", "pseudonym")) for key in person if key not in ("name", "pseudonym")]
        problems += [f"In `graders`: {text}" for text in wrong]
        if not isinstance(person.get("name"), str) or not person["name"].strip():
            problems.append(f"`graders` has {entry!r}; write a name, or a mapping with `name` and `pseudonym`.")
        pseudonym = person.get("pseudonym")
        if pseudonym is not None and not (isinstance(pseudonym, str) and PSEUDONYM.fullmatch(pseudonym)):
            problems.append(
                f"The pseudonym {pseudonym!r} in `graders` may be a name; write {PSEUDONYMS_WANTED} instead."
            )
    if not problems:
        for what in ("name", "pseudonym"):
            counts = Counter(value for person in study.people if (value := getattr(person, what)))
            problems += [f"`graders` has the {what} {value!r} {n} times." for value, n in counts.items() if n > 1]
    return problems


def _choice_problems(study: Study) -> list[str]:
    problems = []
    for name, choices in (("modes", MODES), ("reason_for", VERDICTS)):
        values = getattr(study, name)
        problems += [f"In `{name}`: {unknown_key(str(value), choices)}" for value in values if value not in choices]
    if not study.modes:
        problems.append(f"`modes` is empty; name at least one of {', '.join(MODES)}.")
    if not _is_texts(study.owners):
        problems.append(f"`owners` is {study.owners!r}; it must be a list of names.")
    return problems


def _hidden_problems(study: Study) -> list[str]:
    problems = []
    if study.references is None and study.real_control_share > 0:
        problems.append(
            f"`real_control_share` is {study.real_control_share}, but `references` names no real images: "
            "name some, or set `real_control_share: 0`."
        )
    if study.real_control_share + study.repeat_share > LARGEST_HIDDEN_SHARE:
        problems.append(
            f"`real_control_share` and `repeat_share` come to {study.real_control_share + study.repeat_share:g}; "
            f"together they may be {LARGEST_HIDDEN_SHARE} at most, or graders see few candidates."
        )
    return problems


def _order_problems(study: Study) -> list[str]:
    problems = []
    if study.order == "uncertainty" and study.reward_model is None:
        problems.append("`order: uncertainty` needs `reward_model`: name the reward model.")
    if study.order == "random" and study.reward_model is not None:
        problems.append(
            "`reward_model` is for `order: uncertainty` or `proposed`: set `order`, or leave out `reward_model`."
        )
    if study.order == "proposed" and study.proposal is None:
        problems.append("`order: proposed` needs `proposal`: make a next.json by `pathalign study next` and name it.")
    if study.order != "proposed" and study.proposal is not None:
        problems.append("`proposal` is for `order: proposed`: set `order`, or leave out `proposal`.")
    return problems


def _sink_problems(study: Study) -> list[str]:
    try:
        check_sink(study.sink)
    except InputError as error:
        return [f"`sink`: {error}"]
    return []


def _is_texts(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


# What each check reads: it is left out where one of these is of a wrong type.
_CHECKS = (
    (("classes",), _class_problems),
    (("rubric",), _rubric_problems),
    (("graders",), _people_problems),
    (("modes", "reason_for", "owners"), _choice_problems),
    (("references", "real_control_share", "repeat_share"), _hidden_problems),
    (("order", "reward_model", "proposal"), _order_problems),
    (("sink",), _sink_problems),
)
