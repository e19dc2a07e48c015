"""Jobs on the Hub's machines: what they cost, how they are started and followed, and what their errors mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, JobInfo, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    JobNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from pathalign.config import DATASET
from pathalign.pinning import unusable
from pathalign.remote import Reference, endpoint
from pathalign.schema import InputError
from pathalign.trainers import gpus

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"  # Debian with uv, which installs pathalign when the job starts
PYTHON = "3.12"
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
HOUR_S = {"second": 3600.0, "minute": 60.0, "hour": 1.0}  # price units in an hour


@dataclass(frozen=True)
class Flavor:
    """A machine that can be rented: `gpu` is the accelerator's model or None, `gpus` how many of it there are."""

    name: str
    description: str
    gpu: str | None
    gpus: int
    usd_per_hour: float


@dataclass(frozen=True)
class Cost:
    """What a job may cost in US dollars: at most, if it runs into its time limit, and about, where that is known."""

    at_most_usd: float
    expected_hours: tuple[float, float] | None = None
    expected_usd: tuple[float, float] | None = None


@contextmanager
def explained(what: str, again: str = "run the same command again") -> Iterator[None]:
    """Turn errors of the Hub's client into one line with the next command.

    Args:
        what: What was being done, such as `start a job as lab`.
        again: What to do once the reason is gone.
    """
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError(_no_token()) from error
    except JobNotFoundError as error:
        raise InputError(
            f"Cannot {what}: there is no such job there. `hf jobs ps --all` lists yours; `--namespace` names an "
            "organization."
        ) from error
    except HfHubHTTPError as error:
        raise InputError(_refused(what, again, error)) from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"Cannot {what}: {endpoint()} cannot be reached. Check your connection (and HF_ENDPOINT, HF_HUB_OFFLINE), "
            f"then {again}."
        ) from error


def _no_token() -> str:
    return "You are not logged in, and jobs are paid for by an account. Log in with `hf auth login`, or set HF_TOKEN."


def _refused(what: str, again: str, error: HfHubHTTPError) -> str:
    status, said = error.response.status_code, " ".join((error.server_message or "").split())
    where, said = endpoint(), f": {said}" if said else ""
    if status == 401:
        return f"{where} refused your token (401{said}). Log in with `hf auth login`, or set HF_TOKEN."
    if status == 402:
        return (
            f"Cannot {what} without pre-paid credits (402{said}). Add some on {where}/settings/billing, then {again}."
        )
    if status == 403:
        return (
            f"Your token may not {what} (403{said}). Give it the permission on {where}/settings/tokens, see that there "
            f"are credits on {where}/settings/billing, then {again}."
        )
    if status == 404:
        return f"Cannot {what}: {where} does not know it (404{said}). Check the spelling."
    later = f"Try later: {again}." if status == 429 or status >= 500 else "Change what it names."
    return f"Cannot {what}: {where} answered {status}{said}. {later}"


def account() -> str:
    """Who the token belongs to.

    Raises:
        InputError: If there is no token, or the Hub refuses it or cannot be reached.
    """
    if get_token() is None:
        raise InputError(_no_token())
    with explained("see who you are"):
        return str(HfApi().whoami()["name"])


def flavors() -> dict[str, Flavor]:
    """Machines by name, as the Hub lists them now.

    Raises:
        InputError: If the Hub cannot be reached.
    """
    with explained("list machines"):
        listed = HfApi().list_jobs_hardware()
    found = {}
    for each in listed:
        gpu = each.accelerator
        machine = f"{each.pretty_name}: {each.cpu}, {each.ram}" + (f", {gpu.quantity} x {gpu.model}" if gpu else "")
        price = each.unit_cost_usd * HOUR_S.get(each.unit_label, 60.0)
        found[each.name] = Flavor(
            each.name, machine, gpu.model if gpu else None, int(gpu.quantity) if gpu else 0, price
        )
    return found


def flavor(name: str) -> Flavor:
    """One machine.

    Raises:
        InputError: If there is none of that name; names all there are.
    """
    known = flavors()
    if name not in known:
        listed = ", ".join(f"{each.name} (${each.usd_per_hour:.2f} an hour)" for each in known.values())
        raise InputError(f"There is no flavor {name!r}. Choose one of {listed}.")
    return known[name]


def seconds(text: str) -> int:
    """`90m`, `2h` or `300` to seconds.

    Raises:
        InputError: If it is no such time, or none at all.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    value = int(float(found[1]) * UNITS_S[found[2] or "s"]) if found else 0
    if value < 1:
        raise InputError(f"`--timeout` is {text!r}; write a time such as 90m, 2h or 1d.")
    return value


def cost(machine: Flavor, timeout_s: int, gpu_hours: Mapping[str, tuple[float, float] | None] | None = None) -> Cost:
    """What a job may cost.

    Args:
        machine: With its price.
        timeout_s: After this the job is ended.
        gpu_hours: Expected hours by the name of a GPU, as `pathalign align --estimate` has them.
    """
    known = gpus.named(machine.gpu or "")
    hours = (gpu_hours or {}).get(known.name) if known else None
    usd = (hours[0] * machine.usd_per_hour, hours[1] * machine.usd_per_hour) if hours else None
    return Cost(machine.usd_per_hour * timeout_s / 3600, hours, usd)


def start(
    namespace: str, command: list[str], environment: dict[str, str], machine: str, timeout_s: int, name: str
) -> JobInfo:
    """Start a job; the token that the client is logged in with goes along as its secret `HF_TOKEN`.

    Raises:
        InputError: If the Hub refuses it.
    """
    with explained(f"start a job as {namespace}"):
        return HfApi().run_job(
            image=IMAGE,
            command=command,
            env=environment,
            secrets={"HF_TOKEN": get_token()},
            flavor=machine,
            timeout=timeout_s,
            labels={"made-by": "pathalign", "name": name},
            namespace=namespace,
        )


def logs(job_id: str, namespace: str | None) -> Iterator[str]:
    """Lines of a job's log, until it ends.

    Raises:
        InputError: If there is no such job, or it may not be seen.
    """
    with explained(f"follow the job {job_id}", _later(job_id)):
        yield from HfApi().fetch_job_logs(job_id=job_id, namespace=namespace, follow=True)


def ended(job_id: str, namespace: str | None) -> JobInfo:
    """Wait for a job's end, and say how it ended: `status.stage` is COMPLETED, ERROR, CANCELED or DELETED.

    Raises:
        InputError: If there is no such job, or it may not be seen.
    """
    with explained(f"look at the job {job_id}", _later(job_id)):
        return HfApi().wait_for_job(job_id, namespace=namespace)


def _later(job_id: str) -> str:
    return f"follow it by `pathalign jobs logs {job_id}`; the job goes on"


def cancel(job_id: str, namespace: str | None) -> None:
    """End a job.

    Raises:
        InputError: If there is no such job, or it may not be ended.
    """
    with explained(f"cancel the job {job_id}"):
        HfApi().cancel_job(job_id=job_id, namespace=namespace)


def require_dataset(reference: Reference) -> None:
    """See that the token may read a dataset of any form.

    Raises:
        InputError: If it may not, there is no such dataset or revision, or the Hub cannot be reached.
    """
    api = HfApi()
    try:
        api.repo_info(reference.name, repo_type="dataset", revision=reference.revision)
        api.auth_check(reference.name, repo_type="dataset")  # a gated one shows what it holds to anybody
    except Exception as error:  # of httpx, of the client, of the operating system: `unusable` tells them apart
        raise unusable(error, reference, DATASET) from error


def make_repo(repo_id: str, repo_type: str) -> str:
    """Make a private repo, unless there is one. Returns the address of its page.

    Raises:
        InputError: If the token may not.
    """
    with explained(f"write to the {repo_type} {repo_id}"):
        return str(HfApi().create_repo(repo_id, repo_type=repo_type, private=True, exist_ok=True))


def described(info: JobInfo) -> dict[str, Any]:
    """A job as JSON: nothing of its environment or secrets."""
    return {"id": info.id, "url": info.url, "stage": str(getattr(info.status.stage, "value", info.status.stage))}
