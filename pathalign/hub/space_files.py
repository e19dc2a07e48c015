"""What goes into a grading Space's repo: the page as it is, the study, and images that lie on this machine only."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pathalign.config import read_yaml
from pathalign.grading.proposals import NEXT, only_ids
from pathalign.grading.sinks import HUB_PREFIX
from pathalign.grading.study import Study
from pathalign.progress import say
from pathalign.remote import content_id, has_id, is_repo_id
from pathalign.schema import InputError

STUDY_FILE = "study.yaml"
TRAVELLING = ("candidates", "references", "reward_model")  # keys of a study, and folders of the Space's repo
NOT_UPLOADED = ("__pycache__", "state", "example", STUDY_FILE)  # of the page's folder
INDEX = "https://pypi.org/simple"
Content = bytes | Path


@dataclass(frozen=True)
class SpaceFiles:
    """What the repo of a Space shall hold.

    Attributes:
        contents: Path in the repo -> bytes, or a file of this machine.
        travelling: Key of the study -> folder of this machine whose files are among them.
        inputs: Kind and id of the repos that the study reads on the Hub.
        requirement: The line of `requirements.txt` that installs pathalign.
    """

    contents: dict[str, Content]
    travelling: dict[str, Path]
    inputs: tuple[tuple[str, str], ...]
    requirement: str

    @property
    def travelling_bytes(self) -> int:
        """Size of what is sent from folders of this machine."""
        folders = tuple(f"{key}/" for key in self.travelling)
        return sum(size_of(content) for path, content in self.contents.items() if path.startswith(folders))


def collect_files(page: Path, study_path: Path, dataset: str, package: str | None, zero_gpu: bool) -> SpaceFiles:
    """Put a Space together.

    Args:
        page: Folder of the grading page.
        study_path: YAML file of the study, which loads.
        dataset: `OWNER/NAME` of the dataset for the grades.
        package: Requirement or wheel that installs pathalign; None for the page's own.
        zero_gpu: Whether the hardware is ZeroGPU, which wants its library.

    Raises:
        InputError: If a folder lacks what a study reads from it, or pathalign cannot be installed like that.
    """
    study = Study.load(study_path)
    contents: dict[str, Content] = {
        path.relative_to(page).as_posix(): path
        for path in sorted(page.rglob("*"))
        if path.is_file() and path.relative_to(page).parts[0] not in NOT_UPLOADED and path.name[0] != "."
    }
    requirement, wheel = _requirement((page / "requirements.txt").read_text(), package)
    lines = [
        requirement if line.startswith("pathalign") else line
        for line in (page / "requirements.txt").read_text().splitlines()
    ]
    contents["requirements.txt"] = ("\n".join([*lines, *(["spaces"] if zero_gpu else [])]) + "\n").encode()
    if wheel:
        contents[wheel.name] = wheel
    values = read_yaml(study_path) | {"sink": HUB_PREFIX + dataset}
    if isinstance(values.get("rubric"), str) and isinstance(study.rubric, str) and Path(study.rubric).is_file():
        values["rubric"] = yaml.safe_load(Path(study.rubric).read_text())
    if study.proposal is not None:
        values["proposal"], contents[NEXT] = NEXT, only_ids(study.proposal)
    travelling, inputs = _images(study)
    for key, folder in travelling.items():
        values[key] = key
        contents |= {f"{key}/{path.relative_to(folder).as_posix()}": path for path in _files_of(study, key, folder)}
    contents[STUDY_FILE] = _written(values)
    return SpaceFiles(contents, travelling, inputs, requirement)


def _images(study: Study) -> tuple[dict[str, Path], tuple[tuple[str, str], ...]]:
    """What lies in folders here, and what lies on the Hub."""
    from pathalign.grading.example import CANDIDATES, REFERENCES

    found = {key: getattr(study, key) for key in TRAVELLING if getattr(study, key)}
    travelling = {key: Path(value) for key, value in found.items() if Path(value).is_dir()}
    drawn = (CANDIDATES, REFERENCES)  # the example's, which the page draws for itself where it runs
    elsewhere = {key: value for key, value in found.items() if key not in travelling and value not in drawn}
    for key, value in elsewhere.items():
        if not is_repo_id(value):
            raise InputError(f"`{key}: {value}` in the study is no folder here and no OWNER/NAME on the Hub.")
    kinds = {key: "model" if key == "reward_model" else "dataset" for key in elsewhere}
    return travelling, tuple((kinds[key], value) for key, value in elsewhere.items())


def _files_of(study: Study, key: str, folder: Path) -> list[Path]:
    """What a study reads from a folder, and nothing else of it."""
    from pathalign.images import dataset_shards

    if key == "reward_model":
        found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
        return [path for path in found if path.name != "run.json"]  # holds paths of this machine
    split = study.references_split if key == "references" else "train"
    shards = dataset_shards(folder, split)
    return [shards.path(index) for index in range(len(shards))]


def _written(values: Mapping[str, Any]) -> bytes:
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=110)
    return f"# Written by `pathalign space deploy`; change the study there and run the command again.\n{text}".encode()


def _requirement(lines: str, package: str | None) -> tuple[str, Path | None]:
    """The line that installs pathalign, and the wheel that it names."""
    if package is None:
        own = next(line for line in lines.splitlines() if line.startswith("pathalign"))
        _check_index(own)
        return own, None
    wheel = Path(package)
    if wheel.suffix == ".whl":
        if not (zipfile.is_zipfile(wheel) and wheel.name.startswith("pathalign-")):
            raise InputError(f"{package} is no wheel of pathalign; make one with `python -m build --wheel`.")
        return wheel.name, wheel
    if not package.startswith("pathalign"):
        raise InputError(
            f"`--package {package}` does not install pathalign; give a wheel's path, or a requirement such as "
            "'pathalign[space] @ git+https://HOST/REPO'."
        )
    return package, None


def _check_index(requirement: str) -> None:
    """See that a Space can install this version; an index that does not answer is not waited for."""
    from huggingface_hub.utils import get_session

    version = requirement.rpartition("==")[2]
    index = os.environ.get("PIP_INDEX_URL", INDEX).rstrip("/")
    shown = re.sub(r"//[^/@]*@", "//", index)
    try:
        answer = get_session().get(f"{index}/pathalign/", timeout=10)
    except Exception as error:
        say(f"Whether {shown} has {requirement} could not be seen ({type(error).__name__}).")
        return
    if answer.status_code == 404 or (answer.status_code == 200 and f"pathalign-{version}" not in answer.text):
        raise InputError(
            f"{shown} has no {requirement}, so the Space could not install it. Make a wheel with `python -m build "
            f"--wheel` and add `--package dist/pathalign-{version}-py3-none-any.whl`."
        )


def size_of(content: Content) -> int:
    """Bytes of a file."""
    return content.stat().st_size if isinstance(content, Path) else len(content)


def is_same(content: Content, remote: Any) -> bool:
    """Whether a repo's file (`RepoFile`) has these bytes, told by its hash."""
    if size_of(content) != remote.size:
        return False
    data = content.read_bytes() if isinstance(content, Path) else content
    return has_id(data, content_id(remote))
