"""What people type to run stages on rented machines: `pathalign jobs run`, `logs` and `cancel`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import click
import yaml

from pathalign.commands.printing import JSON_HELP, print_result, quiet
from pathalign.config import parse_overrides, read_yaml
from pathalign.schema import DISCLAIMER, InputError
from pathalign.stages import SCORE, STAGES, load
from pathalign.workflow import merge

if TYPE_CHECKING:
    from pathalign.hub.jobs import Cost, Flavor
    from pathalign.jobs import JobSpec
    from pathalign.settings.pull import CollectConfig

ALL = "run"
STAGE_NAMES = [ALL, *(stage.name for stage in STAGES), SCORE.name]
NAMESPACE = click.option("--namespace", metavar="NAME", help="User or organization that pays.  [default: you]")
AFTERWARDS = "Follow it by `pathalign jobs logs {id}`, end it by `pathalign jobs cancel {id}`."


@dataclass(frozen=True)
class Plan:
    """All that a job will be, before it is started."""

    spec: JobSpec
    namespace: str
    machine: Flavor
    timeout_s: int
    cost: Cost
    image: str
    command: list[str]
    private: bool
    new: bool
    url: str  # of the output repo

    def as_json(self) -> dict[str, Any]:
        """For `--json`; holds no secret."""
        return {**asdict(self), "secrets": ["HF_TOKEN"]}


@click.group()
def jobs() -> None:
    """Run stages on machines of the Hugging Face Hub, paid by the minute."""


@jobs.command("run", epilog=DISCLAIMER, short_help="Run a stage, or all of them, on a rented machine.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--flavor", required=True, metavar="NAME", help="Machine, such as t4-small; a wrong name lists all.")
@click.option("--output-repo", required=True, metavar="OWNER/NAME", help="Repo that the result goes to.")
@click.option("--stage", type=click.Choice(STAGE_NAMES), default=ALL, show_default=True, help="What CONFIG is of.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value of CONFIG.")
@click.option("--timeout", default="2h", show_default=True, help="The job is ended after this: 90m, 2h, 1d.")
@click.option("--package", metavar="URL", help="Wheel or git+https URL of pathalign.  [default: this version on PyPI]")
@NAMESPACE
@click.option("--detach", is_flag=True, help="Start it and end; do not follow its log.")
@click.option("--yes", is_flag=True, help="Do not ask before it is started.")
@click.option("--dry-run", is_flag=True, help="Print the plan, after all checks, and end.")
@click.option("--json", "as_json", is_flag=True, help=JSON_HELP)
def run_command(
    config: Path,
    flavor: str,
    output_repo: str,
    stage: str,
    overrides: tuple[str, ...],
    timeout: str,
    package: str | None,
    namespace: str | None,
    detach: bool,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Run CONFIG.yaml as a job on a machine of the Hub.

    CONFIG is that of `pathalign run`, or of one --stage. Its inputs must be on the Hub. What will run, where, for how
    much and where the result goes is printed first. The result is one commit of the output repo (private, if it is new)
    at the end: a job that fails leaves nothing there, and the same command starts from the beginning. The job gets your
    token as its secret HF_TOKEN, and CONFIG as a variable that its page shows. Ctrl-C leaves it running.

    Ends with 0 if the job completes.
    """
    from pathalign.jobs import JobSpec

    values = merge(read_yaml(config), parse_overrides(overrides))
    with quiet():
        spec = JobSpec.make(stage, values, output_repo)
        plan = planned(spec, flavor, timeout, package, namespace)
    if dry_run:
        print_result(plan.as_json(), as_json, text_of(plan))
        return
    click.echo(text_of(plan), err=True)
    if not yes:
        click.confirm("Start it?", abort=True, err=True)
    job = started(plan)
    click.echo(f"Started {job['url']}. {AFTERWARDS.format(id=job['id'])}", err=True)
    if not detach:
        job = followed(job["id"], plan.namespace, err=True)
    result = {"job": job, "output_repo": output_repo, "repo_type": spec.repo_type, "plan": plan.as_json()}
    print_result(result, as_json, job["id"] if detach else plan.url)


def planned(spec: JobSpec, flavor: str, timeout: str, package: str | None, namespace: str | None) -> Plan:
    """Check everything that can be checked without paying.

    Raises:
        InputError: If the machine, an input, the output repo or the account is not there or cannot be used.
    """
    from pathalign import jobs as work
    from pathalign.hub import jobs as hub
    from pathalign.hub.commits import HubRepo
    from pathalign.remote import is_repo_id

    timeout_s, command = hub.seconds(timeout), work.command(work.package(package))
    if not is_repo_id(spec.output_repo):
        raise InputError(f"`--output-repo` is {spec.output_repo!r}; write OWNER/NAME of a repo on the Hub.")
    user = hub.account()
    machine = hub.flavor(flavor)
    if machine.gpus > 1:
        raise InputError(f"{flavor} has {machine.gpus} GPUs, and a job uses one: choose a flavor with one.")
    spec.require_hub_inputs()
    private = spec.require_free_repo()
    hours = expected_hours(spec) if machine.gpu else None
    cost = hub.cost(machine, timeout_s, hours)
    return Plan(
        spec=spec,
        namespace=namespace or user,
        machine=machine,
        timeout_s=timeout_s,
        cost=cost,
        image=hub.IMAGE,
        command=command,
        private=private is not False,
        new=private is None,
        url=HubRepo(spec.output_repo, spec.repo_type).url,
    )


def expected_hours(spec: JobSpec) -> Mapping[str, tuple[float, float] | None] | None:
    """What `pathalign align --estimate` says of a training run; None of anything else, or where it does not know."""
    if spec.stage != "align":
        return None
    (config,) = spec.configs()
    try:
        hours: Mapping[str, tuple[float, float] | None] = load("pathalign.trainers.cost:estimate")(config).gpu_hours
    except (InputError, OSError, ValueError):
        return None
    return hours


def text_of(plan: Plan) -> str:
    """A plan for people."""
    spec, cost, machine = plan.spec, plan.cost, plan.machine
    about = "not known"
    if cost.expected_hours and cost.expected_usd:
        low, high = cost.expected_hours
        about = f"${cost.expected_usd[0]:.2f} to ${cost.expected_usd[1]:.2f}: {low:.2f} to {high:.2f} h, an assumption"
    place = "new, private" if plan.new else f"{'private' if plan.private else 'PUBLIC'}, its files are replaced"
    rows = [
        ("job", f"{'all stages' if spec.stage == ALL else spec.stage}, as {plan.namespace}"),
        ("machine", f"{machine.name} ({machine.description}), ${machine.usd_per_hour:.2f} an hour"),
        ("image", plan.image),
        ("command", " ".join(plan.command)),
        ("at most", f"{plan.timeout_s / 3600:g} h, ${cost.at_most_usd:.2f}"),
        ("cost", about),
        ("secret", "HF_TOKEN, the token that you are logged in with"),
        *[("waits", text) for text in dict.fromkeys(map(waiting, spec.awaited())) if text],
        ("result", f"{spec.repo_type} {spec.output_repo} ({place})"),
        ("settings", indent(yaml.safe_dump(spec.values, sort_keys=False), " " * 12).strip()),
    ]
    return "\n".join(f"  {name:<9} {text}" for name, text in rows)


def waiting(config: CollectConfig) -> str | None:
    """What it means for whoever pays that a job waits for experts; None if it does not."""
    from pathalign.jobs import FOLDER

    wanted = [f"{config.min_grades} grades"] if config.min_grades else []
    wanted += [f"{config.min_grades_per_class} grades of each class"] if config.min_grades_per_class else []
    if not wanted:
        return None
    text = f"for {' and '.join(wanted)} in {config.source}; the machine is paid for while it waits"
    if str(config.candidates).startswith(f"{FOLDER}/"):
        hint = "Experts cannot see candidates that the job draws: give the stages grade and feedback a set on the Hub."
        text += f"\n{' ' * 12}{hint}"
    return text


def started(plan: Plan) -> dict[str, Any]:
    """Make the output repo and start the job. Returns it as JSON.

    Raises:
        InputError: If the Hub refuses either.
    """
    from pathalign import jobs as work
    from pathalign.hub import jobs as hub

    spec = plan.spec
    hub.make_repo(spec.output_repo, spec.repo_type)
    environment = {work.VARIABLE: spec.to_json(), "PYTHONUNBUFFERED": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    name = f"pathalign-{spec.stage}"
    return hub.described(hub.start(plan.namespace, plan.command, environment, plan.machine.name, plan.timeout_s, name))


def followed(job_id: str, namespace: str | None, err: bool) -> dict[str, Any]:
    """Print a job's log until it ends. Returns the job as JSON.

    Args:
        job_id: Of the job.
        namespace: Who pays for it.
        err: Print to stderr, as what is no result.

    Raises:
        InputError: If it did not complete.
        Exit: With code 130 after Ctrl-C.
    """
    from pathalign.hub import jobs as hub

    stream = sys.stderr if err else sys.stdout
    try:
        with quiet():
            for line in hub.logs(job_id, namespace):
                click.echo(line, file=stream)
            info = hub.ended(job_id, namespace)
    except KeyboardInterrupt as interrupt:
        click.echo(f"\nThe job goes on. {AFTERWARDS.format(id=job_id)}", err=True)
        raise click.exceptions.Exit(130) from interrupt
    job = hub.described(info)
    if job["stage"] != "COMPLETED":
        message = f": {info.status.message}" if info.status.message else ""
        raise InputError(
            f"The job {job_id} ended as {job['stage']}{message}. Nothing was written to its output repo. "
            f"Its log again: `pathalign jobs logs {job_id}`."
        )
    return job


@jobs.command("logs")
@click.argument("job_id")
@NAMESPACE
def logs_command(job_id: str, namespace: str | None) -> None:
    """Print a job's log until it ends; ends with 0 if it completes. Ctrl-C leaves it running."""
    followed(job_id, namespace, err=False)


@jobs.command("cancel")
@click.argument("job_id")
@NAMESPACE
def cancel_command(job_id: str, namespace: str | None) -> None:
    """End a job. Nothing of its result is kept."""
    from pathalign.hub import jobs as hub

    with quiet():
        hub.cancel(job_id, namespace)
    click.echo(f"Cancelled {job_id}.")


@jobs.command("execute", hidden=True)
def execute_command() -> None:
    """Do what a job was started for. For `pathalign jobs run`, which types it on the machine."""
    from pathalign.jobs import run

    with quiet():
        address = run()
    click.echo(f"Result: {address}")
