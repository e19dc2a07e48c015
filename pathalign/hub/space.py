"""A grading Space: made as planned, waited for, and looked after. The same twice changes nothing the second time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pathalign.grading.study import SECRET_VARIABLE, study_secret
from pathalign.hub.errors import speaking_of
from pathalign.hub.space_plan import TOKEN_SECRET, Plan, Wish
from pathalign.hub.space_token import check_token, fingerprint, how_to_make
from pathalign.progress import say
from pathalign.schema import InputError

if TYPE_CHECKING:
    from huggingface_hub import HfApi, SpaceRuntime

POLL_S, LONGEST_POLL_S, PROBE_S = 0.5, 5.0, 60.0
FAILED = ("BUILD_ERROR", "RUNTIME_ERROR", "CONFIG_ERROR", "NO_APP_FILE")
UNDER_WAY = ("BUILDING", "RUNNING_BUILDING", "APP_STARTING", "RUNNING_APP_STARTING")


def deploy(planned: Plan, wish: Wish, state_dir: Path, ask_token: Callable[[str], str | None]) -> str:
    """Do what was planned; returns the commit that the Space then has.

    Args:
        planned: By `plan`.
        wish: What it was planned for.
        state_dir: Folder of the study's secret, which is made if there is none.
        ask_token: Asks for the Space's token, given how to make it; None if there is nobody to ask.

    Raises:
        InputError: If there is no token, or the Hub refuses; what was done by then stays, and the same command goes on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi

    api = HfApi()
    with speaking_of(planned.space):  # the Space first: where a plan does not pay for it, nothing is left behind
        if planned.new_space:
            api.create_repo(
                planned.space,
                repo_type="space",
                space_sdk="gradio",
                visibility=planned.visibility,  # type: ignore[arg-type]
                space_hardware=planned.hardware,  # type: ignore[arg-type]
                exist_ok=True,
            )
        elif planned.new_visibility:
            api.update_repo_settings(planned.space, visibility=planned.visibility, repo_type="space")  # type: ignore[arg-type]
    if planned.new_dataset:
        with speaking_of(planned.dataset, "dataset"):
            api.create_repo(planned.dataset, repo_type="dataset", private=True, exist_ok=True)
            say(f"Made the private dataset {planned.dataset}.")
    _set_secrets(api, planned, wish, state_dir, ask_token)
    with speaking_of(planned.space):
        for name, value in planned.variables.items():
            api.add_space_variable(planned.space, name, value)
        if planned.new_hardware:
            api.request_space_hardware(planned.space, planned.hardware)  # type: ignore[arg-type]
        if not (planned.upload or planned.delete):
            return str(planned.head)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
            *(CommitOperationDelete(path_in_repo=path) for path in planned.delete),
            *(CommitOperationAdd(path, content) for path, content in planned.upload.items()),
        ]
        message = f"Grade {planned.title!r}"
        made = api.create_commit(
            planned.space, operations, commit_message=message, repo_type="space", parent_commit=planned.head
        )
        say(f"Uploaded {len(planned.upload)} files to {planned.space}.")
    return str(made.oid)


def _set_secrets(
    api: HfApi, planned: Plan, wish: Wish, state_dir: Path, ask_token: Callable[[str], str | None]
) -> None:
    """The study's secret, then the token, which may have to be made first."""
    if planned.secrets[SECRET_VARIABLE] == "set":
        with speaking_of(planned.space):
            secret = study_secret(state_dir).decode()
            api.add_space_secret(planned.space, SECRET_VARIABLE, secret, description="Pseudonyms come from it")
    if planned.secrets[TOKEN_SECRET] == "keep":
        return
    token = wish.token
    if token is None:
        advice = how_to_make(planned.dataset, planned.files.inputs)
        token = ask_token(advice)
        if not token:
            raise InputError(f"The Space has no token yet to write grades to {planned.dataset}. {advice}")
        with speaking_of(planned.dataset, "dataset"):
            check_token(token, planned.dataset, planned.files.inputs)
    with speaking_of(planned.space):
        description = f"Writes {planned.dataset} only; fingerprint {fingerprint(token)}"
        api.add_space_secret(planned.space, TOKEN_SECRET, token, description=description)


def wait_until_running(space: str, commit: str, minutes: float) -> str:
    """Wait for a Space to run a commit; returns its stage.

    Raises:
        InputError: If it does not come up, or not in time. Waiting alone is given up: the Space goes on.
    """
    from huggingface_hub import HfApi

    api, began, shown, pause_s = HfApi(), time.monotonic(), "", POLL_S
    while True:
        with speaking_of(space):
            runtime = api.get_space_runtime(space)
        stage = _stage(runtime)
        if stage != shown:
            say(f"{space}: {stage} after {time.monotonic() - began:.0f} s")
            shown = stage
        # right after a commit the Hub may still tell of the one that ran before
        current = runtime.raw.get("sha") in (None, commit)
        if stage in FAILED and current:
            raise InputError(_failure(space, stage, runtime))
        if stage not in UNDER_WAY and current:
            return stage
        if time.monotonic() - began > minutes * 60:
            raise InputError(
                f"{space} is not running after {minutes:g} minutes ({stage}); it goes on without this command. "
                f"`pathalign space logs {space} --build --follow` shows how."
            )
        time.sleep(pause_s)
        pause_s = min(LONGEST_POLL_S, pause_s * 1.5)


def _failure(space: str, stage: str, runtime: SpaceRuntime) -> str:
    reason = runtime.raw.get("errorMessage")
    build = " --build" if stage in ("BUILD_ERROR", "CONFIG_ERROR", "NO_APP_FILE") else ""
    return (
        f"{space} does not run ({stage}{f': {reason}' if reason else ''}). `pathalign space logs {space}{build}` shows "
        "why; then mend it and run the same command again."
    )


def page_address(space: str) -> str | None:
    """Where a Space's page is, as the Hub tells; None if it does not."""
    from huggingface_hub import HfApi

    with speaking_of(space):
        host = HfApi().space_info(space).host
    return f"{host.rstrip('/')}/" if host else None


def probe(space: str, address: str) -> None:
    """See that the page answers somebody who is not signed in; no token is sent to it.

    Raises:
        InputError: If it does not.
    """
    from huggingface_hub.utils import get_session

    until, found = time.monotonic() + PROBE_S, "nothing"
    while time.monotonic() < until:
        try:
            status = get_session().get(address, timeout=10).status_code
        except Exception as error:
            found = type(error).__name__
        else:
            if status in (200, 401, 403):  # strangers see the door
                return
            found = str(status)
        time.sleep(POLL_S)
    raise InputError(f"{space} runs, but its page answers {found}: see `pathalign space logs {space}`.")


def space_logs(space: str, build: bool, follow: bool) -> Iterator[str]:
    """Lines of what a Space printed, or of how it was built; with `follow` as they come, until the Hub closes."""
    from huggingface_hub import HfApi

    with speaking_of(space):
        for text in HfApi().fetch_space_logs(space, build=build, follow=follow):
            yield from text.splitlines()


def restart(space: str) -> str:
    """Start a Space anew, also a paused one; returns its stage."""
    from huggingface_hub import HfApi

    with speaking_of(space):
        return _stage(HfApi().restart_space(space))


def pause(space: str) -> str:
    """Stop a Space until it is restarted: nothing is billed, and nobody can grade; returns its stage."""
    from huggingface_hub import HfApi

    with speaking_of(space):
        return _stage(HfApi().pause_space(space))


def _stage(runtime: SpaceRuntime) -> str:
    return str(getattr(runtime.stage, "value", runtime.stage))
