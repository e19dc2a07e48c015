"""What a job does on a rented machine: one stage or a whole run, whose result becomes one commit of a Hub repo.

Its configuration travels in the environment variable `PATHALIGN_JOB`, readable on the job's page, and holds no secret.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pathalign.config import ConfigError, StageConfig, build, plain_type
from pathalign.hub import jobs as hub
from pathalign.hub.commits import MANIFEST, HubRepo, sha256_of
from pathalign.hub.kinds import kind_of_stage
from pathalign.ledger import LEDGER_NAME
from pathalign.schema import InputError
from pathalign.settings.adapter import is_function, weighted_source
from pathalign.stages import SCORE, STAGES, Stage, load
from pathalign.workflow import TOP_KEYS, execute, plan

VARIABLE = "PATHALIGN_JOB"
RUN = "run"  # all stages
STAGE_NAMES = (*(stage.name for stage in STAGES), SCORE.name)
SETS = ("data", "generate", "grade", "feedback", "sample", "score")  # their results are datasets
FOLDER = Path("result")
LEFT_OUT = ("checkpoints", "trackers", ".lock")
REPLACEABLE = (".gitattributes", "README.md")  # what a new repo may hold
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")


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

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Settings that name a folder, a file or a repo, with their values; what a run makes itself is no input."""
        names = {"encoder", *(name for stage in (*STAGES, SCORE) for name in stage.files)}
        names |= {name for stage in (*STAGES, SCORE) for step in stage.steps for name in step.inputs}
        names |= {"candidates", "reward_model"}
        found: dict[tuple[str, str], None] = {}
        for config in self.configs():
            hints = {name: plain_type(hint) for name, hint in _hints(type(config)).items()}
            for name in names & set(hints):
                value = getattr(config, name)
                several = value if isinstance(value, list) else [value]
                if not hints[name][2]:  # no choice of words
                    found |= {(name, str(each)): None for each in several if each}
        own = f"{FOLDER}/"
        yield from sorted(pair for pair in found if not (self.stage == RUN and pair[1].startswith(own)))

    def require_hub_inputs(self) -> None:
        """Look for every input on the Hub.

        Raises:
            InputError: With all that are folders or files of this machine, and all that the Hub does not have.
        """
        owner = self.output_repo.split("/")[0]
        problems = []
        for name, value in self.inputs():
            source = weighted_source(value)[0] if name == "other_rewards" else value
            where = Path(source)
            if where.is_dir():
                publish = f"pathalign publish {source} {owner}/{where.name}"
                problems.append(
                    f"`{name}` is the folder {source}, which the job does not see: `{publish}`, and name that."
                )
            elif where.exists() or is_function(source):
                problems.append(f"`{name}` is {source}, of this machine, which the job does not see; leave it out.")
            elif "/" in source and not hub.exists(source):
                problems.append(
                    f"`{name}` is {source}, which is neither a folder here nor a repo that your token sees: check the "
                    f"spelling, or set it to what `pathalign publish FOLDER {owner}/NAME` made."
                )
        if problems:
            raise InputError("A job's inputs must be on the Hub:\n" + "\n".join(f"- {text}" for text in problems))

    def require_free_repo(self) -> bool | None:
        """Whether the output repo is private, or None if there is none yet.

        Raises:
            InputError: If it holds something else than an earlier result.
        """
        found = hub.holds(self.output_repo, self.repo_type)
        if found is None:
            return None
        files, private = found
        others = [path for path in files if path not in REPLACEABLE]
        if others and not {"run.json", LEDGER_NAME} & set(others):
            raise InputError(
                f"The {self.repo_type} {self.output_repo} holds files that pathalign did not make, such as "
                f"{others[0]}. Choose another `--output-repo`."
            )
        return private


def _hints(config_class: type[StageConfig]) -> dict[str, Any]:
    from typing import get_type_hints

    return get_type_hints(config_class)


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
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in paths}
    files = {name: path for name, path in files.items() if not set(LEFT_OUT) & set(name.split("/"))}
    manifest = folder / MANIFEST
    known = kind_of_stage(spec.stage)
    held = {"kind": known.name if known else spec.stage, "files": {name: sha256_of(files[name]) for name in files}}
    manifest.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n")
    repo = HubRepo(spec.output_repo, spec.repo_type)
    title = f"Result of {spec.stage} {sha256_of(manifest)[:12]}"
    commit, _ = repo.commit({**files, MANIFEST: manifest}, title, lambda head: None)  # looked at before the job began
    return f"{repo.url}/commit/{commit}"
