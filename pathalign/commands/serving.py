"""What people type around a grading study: `pathalign grade serve` and `pathalign grade invite`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import click

from pathalign.schema import DISCLAIMER, InputError

if TYPE_CHECKING:
    from pathalign.grading.access import Access
    from pathalign.grading.study import Study

EXAMPLE_DIR = Path("runs/grading_example")
LOCAL_ADDRESSES = ("127.0.0.1", "localhost")
STATE_HELP = "Folder of invitations and of grades on their way.  [default: beside STUDY, with the ending .state]"


def spaces_dir() -> Path:
    """Folder of the Spaces: inside an installed wheel, else beside the package in a checkout."""
    packaged = Path(str(files("pathalign"))) / "spaces"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "spaces"


def space_app(name: str) -> ModuleType:
    """The module `app.py` of a Space.

    Raises:
        InputError: If gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("This page needs gradio: install it with `pip install 'pathalign[space]'`.")
    spec = importlib.util.spec_from_file_location(f"pathalign_{name}_app", spaces_dir() / name / "app.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@click.command("serve")
@click.argument("study", required=False, type=click.Path(path_type=Path))
@click.option("--single-user", is_flag=True, help="One grader, without invitations: whoever reaches the page.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(1, 65535), help="Port to listen on.")
@click.option("--allow-host", "names", multiple=True, help="A name under which browsers reach this machine.")
@click.option("--state-dir", type=click.Path(path_type=Path), help=STATE_HELP)
def serve_command(
    study: Path | None, single_user: bool, host: str, port: int, names: tuple[str, ...], state_dir: Path | None
) -> None:
    """Open the grading page of STUDY.yaml in a local server; without STUDY, of an example made in place.

    Everyone comes in with an own link from `pathalign grade invite`. Folders in, folders out; nothing leaves this
    machine.
    """
    from pathalign.grading.gate import LOCAL_HOSTS
    from pathalign.grading.study import Study, default_state_dir

    path = study or _make_example(EXAMPLE_DIR)
    loaded = Study.load(path)
    folder = state_dir or default_state_dir(path)
    alone = single_user or study is None
    if alone and host not in LOCAL_ADDRESSES:
        raise InputError(f"With `--single-user` anybody at {host} could grade; leave out `--host`, or invite people.")
    access = local_access(loaded, folder, single_user=alone)
    app_module = space_app("grade")
    service = app_module.open_service(loaded, folder)
    app = app_module.create_app(service, access, hosts=(*LOCAL_HOSTS, host, *names))
    where = "Open" if alone else "Each grader opens an own link from `pathalign grade invite`; the server is"
    click.echo(f"{where} http://{host}:{port}/", err=True)
    if not (alone or loaded.owners):
        click.echo("Nobody may see the results: name somebody as `owners` in the study, and invite them.", err=True)
    click.echo(f"Grades go to {loaded.sink}. {DISCLAIMER} Ctrl-C ends it.", err=True)
    app_module.serve(app, service, host, port)


@click.command("invite")
@click.argument("study", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("--address", default="http://127.0.0.1:7860", show_default=True, help="Where graders reach the server.")
@click.option("--state-dir", type=click.Path(path_type=Path), help=STATE_HELP)
def invite_command(study: Path, name: str, address: str, state_dir: Path | None) -> None:
    """Print a link that lets NAME grade STUDY.yaml. A newer link for the same name replaces the older one.

    The link is a password: hand it to that person only. It is not stored, and cannot be shown again.
    """
    from pathalign.grading.access import Invites, check_invitable
    from pathalign.grading.study import Study, default_state_dir

    loaded = Study.load(study)
    check_invitable(name, [person.name for person in loaded.people], loaded.owners)
    token = Invites((state_dir or default_state_dir(study)) / "invites.json").create(name)
    click.echo(f"{address.rstrip('/')}/enter#{token}")


def local_access(study: Study, state_dir: Path, single_user: bool = False) -> Access:
    """Who may come in on one's own machine.

    Raises:
        InputError: If nobody is invited and it is not for a single user.
    """
    from pathalign.grading.access import Access, InviteDoor, Invites, SingleDoor
    from pathalign.grading.study import study_secret

    if single_user:
        return Access(SingleDoor(), study_secret(state_dir))
    invites = Invites(state_dir / "invites.json")
    secret = study_secret(state_dir)
    graders = [person.name for person in study.people] or None
    return Access(InviteDoor(invites, secret), secret, graders, study.owners, None, study.pseudonyms)


def _make_example(folder: Path) -> Path:
    from pathalign.grading.example import make_images

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    folder.mkdir(parents=True, exist_ok=True)
    make_images(folder)
    path = folder / "study.yaml"
    if not path.is_file():
        shutil.copy(spaces_dir() / "grade" / "study.yaml", path)
    return path
