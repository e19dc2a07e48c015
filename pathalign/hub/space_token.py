"""The token that a grading Space writes with: for one dataset only, and never somebody's own."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from pathalign.remote import endpoint
from pathalign.schema import InputError

TOKEN_VARIABLE = "PATHALIGN_SPACE_TOKEN"
READ, WRITE = "repo.content.read", "repo.write"  # names of the Hub's permissions


def how_to_make(dataset: str, inputs: Iterable[tuple[str, str]] = ()) -> str:
    """What to do to get such a token."""
    reads = "".join(f", and reading of {name}" for _, name in inputs)
    return (
        f"Make one at {endpoint()}/settings/tokens/new?tokenType=fineGrained: under repositories choose "
        f"datasets/{dataset}, allow reading and writing it{reads}, and nothing else. Then set {TOKEN_VARIABLE} to it "
        "and run the same command again."
    )


def fingerprint(token: str) -> str:
    """12 hex digits that tell tokens apart, and from which none can be found."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def check_token(token: str, dataset: str, inputs: Iterable[tuple[str, str]] = ()) -> None:
    """See that a token can write one dataset, read what the study reads, and do nothing else.

    Args:
        token: The one that the Space shall have.
        dataset: `OWNER/NAME` of the dataset for the grades.
        inputs: Kind and id of the repos that the study reads on the Hub.

    Raises:
        InputError: If it is one's own, not fine-grained, or does more or less than that; says how to make one.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    inputs = tuple(inputs)
    advice = how_to_make(dataset, inputs)
    if token == get_token():
        raise InputError(f"The Space's token is that of your own login, which a Space must not have. {advice}")
    try:
        who = HfApi().whoami(token)
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 401:
            raise InputError(f"{endpoint()} does not know the Space's token. {advice}") from None
        raise
    described = (who.get("auth") or {}).get("accessToken") or {}
    if described.get("role") != "fineGrained":
        raise InputError(
            f"The Space's token has the role {described.get('role')!r} and reaches everything of {who['name']}; it "
            f"must be a fine-grained one. {advice}"
        )
    problems = _problems(described.get("fineGrained") or {}, dataset, inputs)
    if problems:
        raise InputError(f"The Space's token {'; it '.join(problems)}. {advice}")
    for kind, name in inputs:
        try:
            HfApi(token=token).auth_check(name, repo_type=kind)
        except HfHubHTTPError:
            raise InputError(
                f"The Space's token cannot read the {kind} {name}, which the study shows. {advice}"
            ) from None


def _problems(permissions: dict[str, Any], dataset: str, inputs: tuple[tuple[str, str], ...]) -> list[str]:
    """What is wrong with a fine-grained token's permissions."""
    allowed = {(kind, name): {READ} for kind, name in inputs} | {("dataset", dataset): {READ, WRITE}}
    found: set[str] = set()
    problems = []
    if permissions.get("global"):
        problems.append(f"may {', '.join(permissions['global'])} everywhere")
    for scope in permissions.get("scoped") or []:
        key = (scope["entity"]["type"], scope["entity"].get("name"))
        given = set(scope["permissions"])
        if key == ("dataset", dataset):
            found = given
        if more := sorted(given - allowed.get(key, set())):
            problems.append(f"may also {', '.join(more)} on the {key[0]} {key[1]}")
    if WRITE not in found:
        problems.insert(0, f"cannot write the dataset {dataset}")
    return problems
