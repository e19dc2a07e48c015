"""What it takes to have a grading Space: seen before anything is done, and only what is not so already.

Secrets cannot be read back; the token's fingerprint in its description tells it from another one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathalign.grading.sinks import HUB_PREFIX
from pathalign.grading.study import SECRET_VARIABLE, Study
from pathalign.hub.errors import ZERO_GPU, speaking_of
from pathalign.hub.space_files import STUDY_FILE, Content, SpaceFiles, collect_files, is_same, size_of
from pathalign.hub.space_token import check_token, fingerprint
from pathalign.remote import endpoint
from pathalign.schema import InputError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

VISIBILITIES = ("protected", "private", "public")
FREE_HARDWARE = "cpu-basic"
TOKEN_SECRET = "HF_TOKEN"  # what the page's sink reads
OWN_FOLDERS = ("candidates/", "references/", "reward_model/")  # of the Space's repo: what is not planned there goes


@dataclass(frozen=True)
class Wish:
    """What somebody asks for; None leaves it as it is, or takes the default for what is new.

    Attributes:
        space: `OWNER/NAME`.
        study: YAML file.
        page: Folder of the grading page.
        dataset: `OWNER/NAME` for the grades; the study's sink, or the Space's name and `-grades`.
        visibility: One of `VISIBILITIES`; `protected` if new.
        hardware: A name that the Hub knows; the free one if new.
        package: Requirement or wheel that installs pathalign.
        token: The Space's own, if it is at hand.
    """

    space: str
    study: Path
    page: Path
    dataset: str | None = None
    visibility: str | None = None
    hardware: str | None = None
    package: str | None = None
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Plan:
    """What there will be, and what has to be done for it.

    Attributes:
        usd_per_hour: Of the hardware; None if the Hub does not tell.
        people: Who may grade, for reading.
        new_visibility: Whether a Space that is there has another one.
        new_hardware: Whether it has another one.
        secrets: Name -> `set` or `keep`.
        variables: Name -> value, of those to set.
        upload: Path -> content of files that the Space's repo lacks or has otherwise.
        delete: Paths of that repo that are no longer of use.
        head: Commit of the Space's repo that this was planned for; None if there is no repo.
    """

    space: str
    title: str
    dataset: str
    visibility: str
    hardware: str
    usd_per_hour: float | None
    people: str
    new_space: bool
    new_dataset: bool
    new_visibility: bool
    new_hardware: bool
    secrets: dict[str, str]
    variables: dict[str, str]
    files: SpaceFiles
    upload: dict[str, Content]
    delete: tuple[str, ...]
    head: str | None

    @property
    def changes(self) -> list[str]:
        """What would be done, for reading; empty if all is so already."""
        upload, delete = f"upload {len(self.upload)} files", f"delete {len(self.delete)} files"
        return [
            *[f"make the Space {self.space}"] * self.new_space,
            *[f"make the dataset {self.dataset}"] * self.new_dataset,
            *[f"make it {self.visibility}"] * self.new_visibility,
            *[f"ask for {self.hardware}"] * self.new_hardware,
            *(f"set the secret {name}" for name, what in self.secrets.items() if what == "set"),
            *(f"set {name}={value}" for name, value in self.variables.items()),
            *[upload] * bool(self.upload),
            *[delete] * bool(self.delete),
        ]

    def summary(self) -> dict[str, Any]:
        """For printing as JSON; no file's content and no secret is in it."""
        return {
            "space": self.space,
            "dataset": self.dataset,
            "visibility": self.visibility,
            "hardware": self.hardware,
            "usd_per_hour": self.usd_per_hour,
            "graders": self.people,
            "secrets": self.secrets,
            "variables": self.variables,
            "installs": self.files.requirement,
            "travelling": {key: str(folder) for key, folder in self.files.travelling.items()},
            "upload": {path: size_of(content) for path, content in self.upload.items()},
            "delete": list(self.delete),
            "changes": self.changes,
        }

    def text(self) -> str:
        """For reading."""
        new = {True: "new", False: "there already"}
        cost = "cost unknown" if self.usd_per_hour is None else f"{self.usd_per_hour:.2f} USD an hour"
        cost = "free of charge" if self.usd_per_hour == 0 else cost
        page = {
            "protected": "whoever the study names signs in to its page; its files are the owner's only",
            "private": "only the owner's account or organization reaches its page and its files",
            "public": "whoever the study names signs in to its page; its files are for all to read",
        }[self.visibility]
        images = ", ".join(f"{key} from {folder}" for key, folder in self.files.travelling.items())
        lines = [
            f"{self.title}: a grading Space on {endpoint()}",
            f"  Space      {self.space} ({new[self.new_space]}, {self.visibility}: {page})",
            f"  hardware   {self.hardware} ({cost})",
            f"  grades     dataset {self.dataset} ({new[self.new_dataset]}, private)",
            f"  graders    {self.people}",
            f"  installs   {self.files.requirement}",
            f"  secrets    {', '.join(f'{name} ({what})' for name, what in self.secrets.items())}",
        ]
        if self.variables:
            lines.append(f"  variables  {', '.join(f'{name}={value}' for name, value in self.variables.items())}")
        if images:
            lines.append(f"  images     {images}: {_size(self.files.travelling_bytes)} go into the Space's files")
        if self.upload:
            size = _size(sum(map(size_of, self.upload.values())))
            lines.append(f"  upload     {len(self.upload)} files, {size}: {', '.join(self.upload)}")
        if self.delete:
            lines.append(f"  delete     {', '.join(self.delete)}")
        return "\n".join([*lines, f"  to do      {'; '.join(self.changes) or 'nothing, all is so already'}"])


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1000:.0f} kB"


def plan(wish: Wish) -> Plan:
    """See what is there and what is to be done. Changes nothing.

    Raises:
        InputError: If the study cannot be graded like that, the Hub refuses, or the token is not one for a Space.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from pathalign.grading.catalogue import Catalogue

    study = Study.load(wish.study)
    dataset = _dataset(wish, study)
    api = HfApi()
    with speaking_of(wish.space):
        user = _check_owner(api, wish.space)
        try:
            info = api.space_info(wish.space)
        except RepositoryNotFoundError:
            info = None
        visible = _visibility(api, info, user)
    runtime = info.runtime if info else None
    there = (runtime.requested_hardware or runtime.hardware) if runtime else None
    hardware = wish.hardware or there or FREE_HARDWARE
    visibility = wish.visibility or visible or VISIBILITIES[0]
    files = collect_files(wish.page, wish.study, dataset, wish.package, hardware == ZERO_GPU)
    shown = [*files.travelling, *(["the graders' names"] if study.people else [])]
    if visibility == "public" and shown:
        raise InputError(
            f"The files of a public Space are for all to read, and {', '.join(shown)} would be in them: choose "
            "`--visibility protected`, or name Hub datasets and an `organization` in the study."
        )
    new_dataset, usd_per_hour = _dataset_is_new(api, dataset), _usd_per_hour(api, hardware)
    for kind, name in files.inputs:
        with speaking_of(name, kind):
            api.auth_check(name, repo_type=kind)
    if files.travelling:
        Catalogue.load(study)
    if wish.token:
        with speaking_of(dataset, "dataset"):
            check_token(wish.token, dataset, files.inputs)
    upload, delete = _difference(api, wish.space, files.contents) if info else (files.contents, ())
    return Plan(
        space=wish.space,
        title=study.title,
        dataset=dataset,
        visibility=visibility,
        hardware=hardware,
        usd_per_hour=usd_per_hour,
        people=_people(study, wish.space),
        new_space=info is None,
        new_dataset=new_dataset,
        new_visibility=info is not None and visible != visibility,
        new_hardware=info is not None and wish.hardware is not None and wish.hardware != there,
        secrets=_secrets(api, wish, info is not None),
        variables=_variables(api, wish, info is not None),
        files=files,
        upload=upload,
        delete=delete,
        head=info.sha if info else None,
    )


def _dataset(wish: Wish, study: Study) -> str:
    sink = study.sink.removeprefix(HUB_PREFIX) if study.sink.startswith(HUB_PREFIX) else None
    if sink and wish.dataset not in (None, sink):
        raise InputError(f"The study's `sink` is {study.sink}: leave out `--dataset {wish.dataset}`, or change `sink`.")
    return wish.dataset or sink or f"{wish.space}-grades"


def _check_owner(api: HfApi, space: str) -> str:
    """The user's name, who may own such a Space."""
    who = api.whoami()
    owner, mine = space.split("/")[0], [who["name"], *(org["name"] for org in who.get("orgs") or [])]
    if owner not in mine:
        raise InputError(f"{who['name']} is logged in and may make Spaces for {', '.join(mine)}, not for {owner!r}.")
    return str(who["name"])


def _visibility(api: HfApi, info: Any, user: str) -> str | None:
    """Of a Space that is there. `space_info` calls a protected one private; the owner's list of repos knows better."""
    from huggingface_hub.errors import HfHubHTTPError

    if info is None or not info.private:
        return "public" if info else None
    owner = info.id.split("/")[0]
    try:
        repos = api.list_user_repos(None if owner == user else owner)
        return next(repo.visibility for repo in repos if (repo.type, repo.id) == ("space", info.id))
    except (HfHubHTTPError, StopIteration):  # a token without the right to see that list
        return "private"


def _dataset_is_new(api: HfApi, dataset: str) -> bool:
    from huggingface_hub.errors import RepositoryNotFoundError

    with speaking_of(dataset, "dataset"):
        try:
            found = api.dataset_info(dataset)
        except RepositoryNotFoundError:
            return True
    if not found.private:
        raise InputError(
            f"The dataset {dataset} is public, and grades are not: make it private at {endpoint()}/datasets/{dataset}"
            "/settings, or name another one with `--dataset`."
        )
    return False


def _secrets(api: HfApi, wish: Wish, exists: bool) -> dict[str, str]:
    """A token is set if it is another one, the study's secret only once: pseudonyms come from it."""
    found: dict[str, Any] = {}
    if exists:
        with speaking_of(wish.space):
            found = api.get_space_secrets(wish.space)
    token = found.get(TOKEN_SECRET)
    same = token and (wish.token is None or fingerprint(wish.token) in (token.description or ""))
    return {TOKEN_SECRET: "keep" if same else "set", SECRET_VARIABLE: "keep" if SECRET_VARIABLE in found else "set"}


def _variables(api: HfApi, wish: Wish, exists: bool) -> dict[str, str]:
    """What a Space of a self-hosted Hub has to be told, as it is told to this command, and has not been told yet."""
    from huggingface_hub import constants

    if endpoint() == constants._HF_DEFAULT_ENDPOINT:
        return {}
    wanted = {"HF_ENDPOINT": endpoint()}
    if constants.HF_HUB_DISABLE_XET:
        wanted["HF_HUB_DISABLE_XET"] = "1"
    if not exists:
        return wanted
    with speaking_of(wish.space):
        found = {name: variable.value for name, variable in api.get_space_variables(wish.space).items()}
    return {name: value for name, value in wanted.items() if found.get(name) != value}


def _difference(api: HfApi, space: str, contents: dict[str, Content]) -> tuple[dict[str, Content], tuple[str, ...]]:
    """Files to upload and paths to delete."""
    from huggingface_hub import RepoFile

    with speaking_of(space):
        entries = api.list_repo_tree(space, recursive=True, repo_type="space")
        there = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
    if STUDY_FILE not in there and (others := sorted(set(there) - {".gitattributes", "README.md"})):
        raise InputError(f"The Space {space} holds something else ({', '.join(others[:3])}): choose another name.")
    upload = {
        path: content for path, content in contents.items() if path not in there or not is_same(content, there[path])
    }
    left = set(there) - set(contents)
    return upload, tuple(sorted(path for path in left if path.startswith(OWN_FOLDERS) or path.endswith(".whl")))


def _usd_per_hour(api: HfApi, hardware: str) -> float | None:
    """Cost of a hardware, 0 for none, None where the Hub does not tell."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        known = {machine.name: machine for machine in api.list_spaces_hardware()}
    except (HfHubHTTPError, KeyError, ValueError):  # a self-hosted Hub may have no such list
        return 0.0 if hardware in (FREE_HARDWARE, ZERO_GPU) else None
    if hardware not in known:
        if hardware in (FREE_HARDWARE, ZERO_GPU):
            return 0.0
        raise InputError(f"{endpoint()} has no hardware {hardware!r} for Spaces; it has {', '.join(known)}.")
    per = {"minute": 60, "hour": 1, "second": 3600}.get(known[hardware].unit_label)
    return known[hardware].unit_cost_usd * per if per else None


def _people(study: Study, space: str) -> str:
    named = [person.name for person in study.people] + [f"members of {study.organization}"] * bool(study.organization)
    return ", ".join(named) or f"{space.split('/')[0]} alone, since the study names no `graders` or `organization`"
