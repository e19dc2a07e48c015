"""What a job does on a rented machine: one stage or a whole run, whose result becomes one commit of a Hub repo.

Its configuration travels in the environment variable `PATHALIGN_JOB`, readable on the job's page, and holds no secret.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pathalign.config import DATASET, ConfigError, StageConfig, build
from pathalign.grading.sinks import HUB_PREFIX
from pathalign.hub import jobs as hub
from pathalign.hub.commits import MANIFEST, Head, HubRepo, sha256_of
from pathalign.hub.kinds import SCRATCH, kind_of_stage
from pathalign.pinning import commit_of
from pathalign.remote import is_repo_id, parse
from pathalign.schema import InputError
from pathalign.settings.adapter import is_function, weighted_source
from pathalign.settings.pull import CollectConfig
from pathalign.stages import SCORE, STAGES, Stage, load
from pathalign.workflow import TOP_KEYS, execute, plan

VARIABLE = "PATHALIGN_JOB"
RUN = "run"  # all stages
STAGE_NAMES = (*(stage.name for stage in STAGES), SCORE.name)
SETS = ("data", "generate", "grade", "feedback", "select", "sample", "score")  # their results are datasets
FOLDER = Path("result")
GRADED = ("grade", "feedback", "select")  # what experts said, and about which images
REPLACEABLE = (".gitattributes", "README.md")  # what a new repo may hold
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


@dataclass(frozen=True)
class Input:
    """A setting that names a folder, a file or a repo.

    Attributes:
        name: Of the setting.
        value: What it names, as it was given.
        source: The folder, file or repo in it, without the weight or the prefix that it may have.
        holds: The kind of `config.py` that must be there; None of what has no one kind.
        revision: Of the repo, where another setting gives it.
    """

    name: str
    value: str
    source: str
    holds: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class JobSpec:
    """What a job is to do.

    Attributes:
        stage: One of `STAGE_NAMES`, or `RUN`.
        values: Configuration of the stage, or of all.
        output_repo: `OWNER/NAME` of the repo that the result goes to.
        repo_type: Its kind, `model` or `dataset`.
    """

    stage: str
    values: dict[str, Any]
    output_repo: str
    repo_type: str

    @classmethod
    def make(cls, stage: str, values: Mapping[str, Any], output_repo: str) -> JobSpec:
        """A job whose configuration was checked.

        Raises:
            ConfigError: With everything that is wrong in `values`.
            InputError: If `values` hold what looks like a token.
        """
        kept = {key: value for key, value in values.items() if key != "output_dir"}
        spec = cls(stage, kept, output_repo, "dataset" if stage in SETS else "model")
        if TOKEN.search(spec.to_json()):
            raise InputError("The configuration holds a token, and anyone who sees the job could read it: take it out.")
        spec.configs()
        return spec

    def to_json(self) -> str:
        """For the environment of the job."""
        return json.dumps(asdict(self), sort_keys=True)

    def configs(self) -> list[StageConfig]:
        """Configuration of the stage, or of all.

        Raises:
            ConfigError: With everything that is wrong.
        """
        if self.stage == RUN:
            return [job.config for job in plan(self.values, FOLDER)]
        return [self._stage()[1]]

    def _stage(self) -> tuple[Stage, StageConfig]:
        stage = next(stage for stage in (*STAGES, SCORE) if stage.name == self.stage)
        values = dict(self.values)
        if stage.methods and "method" in values:
            names = [method.name for method in stage.methods]
            if values["method"] not in names:
                raise ConfigError(self.stage, [f"`method` is {values['method']!r}; use one of {', '.join(names)}."])
            stage = stage.by(values.pop("method"))
        sections = [key for key in values if key in {*TOP_KEYS, *STAGE_NAMES} and isinstance(values[key], dict)]
        if sections:
            hint = f"it has a section `{sections[0]}`: leave `--stage` out to run all stages."
            raise ConfigError(f"The configuration of {self.stage}", [hint])
        return stage, build(load(stage.settings), values, title=f"The configuration of {self.stage}")

    @property
    def kind(self) -> str:
        """What the result is called in its repo's manifest, as `pathalign publish` calls it where it knows it."""
        known = kind_of_stage(self.stage)
        return known.name if known else self.stage

    def awaited(self) -> list[CollectConfig]:
        """Grades of experts that the job waits for."""
        return [config for config in self.configs() if isinstance(config, CollectConfig)]

    def inputs(self) -> list[Input]:
        """What the job reads; what a run makes itself is no input."""
        named = {name for stage in (*STAGES, SCORE) for name in stage.files}
        named |= {name for stage in STAGES for step in stage.steps for name in (*step.inputs, *step.from_last)}
        found: dict[Input, None] = {}
        for config in self.configs():
            for item in fields(config):
                holds = item.metadata.get("holds") or (DATASET if item.name == "references" else None)
                if holds is None and item.name not in named:
                    continue
                apart = item.metadata.get("revision") or ("revision" if item.name == "source" else None)
                revision = getattr(config, apart) if apart else None
                value = getattr(config, item.name)
                for text in value if isinstance(value, list) else [value]:
                    if text:
                        source = weighted_source(text)[0] if item.name == "other_rewards" else text
                        found[Input(item.name, text, source.removeprefix(HUB_PREFIX), holds, revision)] = None
        own = f"{FOLDER}/"
        return sorted(
            (each for each in found if not (self.stage == RUN and each.source.startswith(own))),
            key=lambda each: (each.name, each.value),
        )

    def require_hub_inputs(self) -> None:
        """Look for every input on the Hub, and for grades where experts can send them.

        Raises:
            InputError: With all that a job does not see, that the Hub does not have, or that is no input of its kind.
        """
        problems, unreachable = [], set()
        for config in self.awaited():
            if not is_repo_id(parse(config.source.removeprefix(HUB_PREFIX)).name):
                unreachable.add(config.source)
                problems.append(
                    f"`source` of the stage grade is {config.source!r}, and experts cannot reach a folder of the job's "
                    "machine: give OWNER/NAME of the Hub dataset that grades gather in, which `pathalign space deploy` "
                    "makes."
                )
        for each in self.inputs():
            if each.name == "source" and each.value in unreachable:
                continue
            try:
                problem = self._problem(each)
            except InputError as error:
                problem = f"`{each.name}`: {error}"
            if problem:
                problems.append(problem)
        if problems:
            listed = "\n".join(f"- {text}" for text in dict.fromkeys(problems))
            raise InputError(f"A job's inputs must be on the Hub:\n{listed}")

    def _problem(self, each: Input) -> str | None:
        """What is wrong with an input, if it is not said by an error."""
        owner, where = self.output_repo.split("/")[0], Path(each.source)
        if where.is_dir():
            publish = f"pathalign publish {each.source} {owner}/{where.name}"
            return f"`{each.name}` is the folder {each.source}, which the job does not see: `{publish}`, and name that."
        if where.exists() or is_function(each.source):
            return f"`{each.name}` is {each.source}, of this machine, which the job does not see; leave it out."
        reference = parse(each.source, each.revision)
        if not is_repo_id(reference.name):
            if "/" not in each.source:
                return None  # a word, such as `phantom`
            return f"`{each.name}` is {each.value}, which is neither a folder here nor OWNER/NAME on the Hub."
        if reference.name == self.output_repo:
            return f"`{each.name}` is {each.value}, which the result would replace: choose another `--output-repo`."
        if each.holds:
            commit_of(reference, each.holds)
        elif each.name == "source":  # of images in any form, or of grades
            hub.require_dataset(reference)
        else:
            instead = {"grades": "; a run takes grades from the Hub by `method: pull` in its section `grade`"}
            return (
                f"`{each.name}` is {each.value}, and must be a file or folder, which a job does not see"
                f"{instead.get(each.name, '; leave it out')}."
            )
        return None

    def require_free_repo(self) -> bool | None:
        """Whether the output repo is private, or None if there is none yet.

        Raises:
            InputError: As `check_replaceable`.
        """
        head = HubRepo(self.output_repo, self.repo_type).head()
        if head is None:
            return None
        self.check_replaceable(head)
        return head.private

    def check_replaceable(self, head: Head) -> None:
        """See that what the output repo holds is an earlier result of this kind, and that whoever sees it may.

        Raises:
            InputError: If it holds something else, or is public and the result holds grades of experts.
        """
        where = f"The {self.repo_type} {self.output_repo}"
        known = kind_of_stage(head.stage or "")
        found = head.manifest.get("kind") or (known.name if known else head.stage)
        others = [path for path in head.files if path not in REPLACEABLE]
        if found is None and others:
            raise InputError(
                f"{where} holds files that pathalign did not make, such as {others[0]}. Choose another `--output-repo`."
            )
        if found not in (None, self.kind):
            raise InputError(
                f"{where} holds something of the kind {found}, and the result is of the kind {self.kind}. Choose "
                "another `--output-repo`."
            )
        if not head.private and (self.stage in GRADED or self.awaited()):
            raise InputError(
                f"{where} is PUBLIC, and the result holds what graders said. Make it private on its settings page, or "
                "choose another `--output-repo`: a new one is private."
            )


def command(package: str) -> list[str]:
    """What the machine runs. `package`: what pip installs, with its extras."""
    return ["uv", "run", "--python", hub.PYTHON, "--with", package, "pathalign", "jobs", "execute"]


def package(source: str | None) -> str:
    """The requirement that installs pathalign: this version from PyPI, or what a URL of a repository or wheel holds.

    Raises:
        InputError: If `source` is no such URL, or holds a password.
    """
    from importlib.metadata import version

    if source is None:
        return f"pathalign[eval,encoders]=={version('pathalign')}"
    if not re.match(r"(git\+)?(https|ssh)://", source):
        raise InputError(
            f"`--package` is {source!r}; give the URL of a wheel, or git+https://HOST/OWNER/NAME@REVISION."
        )
    if (login := re.match(r"[^/]*//([^/@]*)@", source)) and login[1] != "git":
        raise InputError(
            "`--package` holds a password or token, which anyone who sees the job could read. Take it out."
        )
    return f"pathalign[eval,encoders] @ {source}"


def run(environment: Mapping[str, str] = os.environ) -> str:
    """Do, in the current folder, what `PATHALIGN_JOB` says, and push the result. Returns the commit's address.

    Raises:
        InputError: If the variable is missing, or the stage or the Hub refuses something.
    """
    if VARIABLE not in environment:
        raise InputError(f"{VARIABLE} is not set: `pathalign jobs run` starts jobs.")
    spec = JobSpec(**json.loads(environment[VARIABLE]))
    if spec.stage == RUN:
        execute(plan(spec.values, FOLDER), FOLDER)
    else:
        stage, config = spec._stage()
        load(stage.entry)(config, FOLDER)
    return push(FOLDER, spec)


def push(folder: Path, spec: JobSpec) -> str:
    """Make the repo hold what `folder` holds, by one commit. Returns the commit's address.

    Raises:
        InputError: If the Hub refuses it, or cannot be reached for minutes.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        # What is hidden is scratch too: locks, and raw grades as they were fetched, with comments and names.
        if path.is_file() and not any(part.startswith(".") or part in SCRATCH for part in parts):
            files["/".join(parts)] = path
    manifest = folder / MANIFEST
    held = {"kind": spec.kind, "files": {name: sha256_of(files[name]) for name in files}}
    manifest.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")
    repo = HubRepo(spec.output_repo, spec.repo_type)
    title = f"Result of {spec.stage} {sha256_of(manifest)[:12]}"
    commit, _ = repo.commit({**files, MANIFEST: manifest}, title, spec.check_replaceable)
    return f"{repo.url}/commit/{commit}"
