"""Who may grade: invite links on one's own machine, Hugging Face accounts on a Space; pseudonyms in the data.

Nothing here knows about HTTP beyond cookies; `gate.py` asks it for every request.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pathalign.artefacts import write_atomically
from pathalign.schema import InputError, unknown_name

LOCAL_NAME = "local"  # the one grader of a study served with --single-user
COOKIE_DAYS = 30
TOKEN_BYTES = 32


@dataclass(frozen=True)
class Claim:
    """Who a request says it is from, checked against a cookie or a session."""

    name: str
    organizations: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Visitor:
    """Who a request is from, and what this person may do. Only the pseudonym goes into the data."""

    name: str
    pseudonym: str
    is_grader: bool
    is_owner: bool


class Door(Protocol):
    """How people prove who they are."""

    kind: str

    def claim(self, cookies: Mapping[str, str], session: Mapping[str, Any]) -> Claim | None:
        """Who a request says it is from, if that is proven."""


def pseudonym_of(name: str, secret: bytes) -> str:
    """What stands for a person in everything that is stored: `grader-` and 8 hex digits, the same within a study."""
    return f"grader-{_digest(secret, 'pseudonym', name.casefold())[:8]}"


class Invites:
    """Invitations of a study: a name and the SHA-256 of its token each. A token itself is never stored.

    Args:
        path: JSON file; it is made with the first invitation, readable by its owner only.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 of the token, for everyone who is invited.

        Raises:
            InputError: If the file is no list of invitations.
        """
        if not self.path.is_file():
            return {}
        try:
            content = json.loads(self.path.read_text())
            return {str(name): str(token_hash) for name, token_hash in content.items()}
        except (ValueError, AttributeError) as error:
            raise InputError(
                f"{self.path} is no list of invitations ({error}). Remove it and invite everyone again with "
                "`pathalign grade invite STUDY.yaml NAME`."
            ) from error

    def create(self, name: str) -> str:
        """Invite someone, or again: an earlier link and what it opened stop working. Returns the new token.

        Raises:
            InputError: If the name is empty, too long or not printable.
        """
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise InputError(f"{name!r} cannot be a grader's name; use 1 to 100 printable characters.")
        token = secrets.token_urlsafe(TOKEN_BYTES)
        others = {other: value for other, value in self.hashes().items() if other.casefold() != name.casefold()}
        invited = others | {name: _token_hash(token)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(invited, indent=2, sort_keys=True) + "\n")
        self.path.chmod(0o600)
        return token

    def name_of(self, token: str) -> str | None:
        """Who was given this token; None if nobody was."""
        given, found = _token_hash(token), None
        for name, token_hash in self.hashes().items():
            if hmac.compare_digest(token_hash, given):
                found = name
        return found


class InviteDoor:
    """People come with a link that holds a token, once; a signed cookie keeps them in.

    Args:
        invites: Who is invited.
        secret: Of the study; signs the cookies.
        clock: Seconds since the epoch.
    """

    kind = "invite"
    cookie_days = COOKIE_DAYS

    def __init__(self, invites: Invites, secret: bytes, clock: Callable[[], float] = time.time) -> None:
        self.invites, self.secret, self.clock = invites, secret, clock
        # cookies do not know ports: two studies served from one machine must not share one
        self.cookie_name = f"pathalign_{_digest(secret, 'cookie name')[:8]}"

    def enter(self, token: str) -> str | None:
        """Exchange a token for the value of a cookie; None for a token that nobody was given."""
        name = self.invites.name_of(token)
        if name is None:
            return None
        issued = str(int(self.clock()))
        return ".".join([base64.urlsafe_b64encode(name.encode()).decode(), issued, self._sign(name, issued)])

    def claim(self, cookies: Mapping[str, str], session: Mapping[str, Any]) -> Claim | None:
        """Read the cookie; None if it is missing, forged, too old, or its invitation has been renewed."""
        encoded, _, rest = cookies.get(self.cookie_name, "").partition(".")
        issued, _, signature = rest.partition(".")
        try:
            name = base64.urlsafe_b64decode(encoded).decode()
            age_s = self.clock() - int(issued)
        except (ValueError, binascii.Error):
            return None
        fresh = -60 <= age_s <= COOKIE_DAYS * 86400
        genuine = hmac.compare_digest(self._sign(name, issued).encode(), signature.encode())
        return Claim(name) if name and fresh and genuine else None

    def _sign(self, name: str, issued: str) -> str:
        return _digest(self.secret, "cookie", name, issued, self.invites.hashes().get(name, "nobody"))


class SingleDoor:
    """Whoever reaches the server is the one grader: for one person on an own machine."""

    kind = "single"

    def __init__(self, name: str = LOCAL_NAME) -> None:
        self.name = name

    def claim(self, cookies: Mapping[str, str], session: Mapping[str, Any]) -> Claim | None:
        """The one grader, always."""
        return Claim(self.name)


class HubDoor:
    """People sign in with Hugging Face; Gradio's OAuth routes fill the session, whose cookie is signed."""

    kind = "hub"

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock

    def claim(self, cookies: Mapping[str, str], session: Mapping[str, Any]) -> Claim | None:
        """The account that signed in, with its organizations; None without a session, or when it has run out."""
        signed_in = session.get("oauth_info") or {}
        person = signed_in.get("userinfo") or {}
        name = person.get("preferred_username")
        if not name or float(signed_in.get("expires_at") or 0) < self.clock():
            return None
        organizations = (item.get("preferred_username") for item in person.get("orgs") or [])
        return Claim(str(name), frozenset(str(item).casefold() for item in organizations if item))


@dataclass(frozen=True)
class Access:
    """Who may do what in a study.

    Attributes:
        door: How people prove who they are.
        secret: Of the study; makes the pseudonyms.
        graders: Names of those who may grade; None, without an organization, for everyone who is invited or signs in
            and is no owner.
        owners: Names of those who may see the results.
        organization: Hub organization whose members may all grade, if any.
        pseudonyms: Those that the study gives itself, by name.
    """

    door: Door
    secret: bytes
    graders: Collection[str] | None = ()
    owners: Collection[str] = ()
    organization: str | None = None
    pseudonyms: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise InputError(problem)

    def visitor(self, cookies: Mapping[str, str], session: Mapping[str, Any]) -> Visitor | None:
        """Who a request is from; None for a stranger. Someone known but not listed may do nothing."""
        claim = self.door.claim(cookies, session)
        if claim is None:
            return None
        single, owner = self.door.kind == "single", _listed(claim.name, self.owners)
        member = bool(self.organization) and str(self.organization).casefold() in claim.organizations
        anyone = self.graders is None and not self.organization and not owner
        given = {name.casefold(): pseudonym for name, pseudonym in self.pseudonyms.items()}
        return Visitor(
            name=claim.name,
            pseudonym=given.get(claim.name.casefold()) or pseudonym_of(claim.name, self.secret),
            is_grader=single or member or anyone or _listed(claim.name, self.graders or ()),
            is_owner=single or owner,
        )

    def known_names(self) -> frozenset[str]:
        """Names of graders, owners and invited people, as far as the server has them: none of them is published."""
        invited = self.door.invites.hashes() if isinstance(self.door, InviteDoor) else {}
        return frozenset([*(self.graders or ()), *self.owners, *invited])

    def _problem(self) -> str | None:
        if isinstance(self.door, InviteDoor) and not self.door.invites.hashes():
            return (
                f"Nobody is invited yet ({self.door.invites.path} is not there). Invite each grader with "
                "`pathalign grade invite STUDY.yaml NAME`, or grade alone with `--single-user`."
            )
        if self.door.kind == "hub" and self.graders is not None and not (self.graders or self.organization):
            return (
                "The study names no `graders` and no `organization`, so that nobody could come in. "
                "List the Hugging Face names of the graders, or an organization, in the study's YAML file."
            )
        return None


def check_invitable(name: str, graders: Collection[str], owners: Collection[str]) -> None:
    """See that an invitation would be of use: where a study lists people, it must list this one.

    Raises:
        InputError: If it does not.
    """
    listed = [*graders, *owners]
    if listed and not _listed(name, listed):
        raise InputError(f"{unknown_name('grader of this study', name, listed)} Add the name to the study first.")


def _listed(name: str, names: Collection[str]) -> bool:
    return name.casefold() in {item.casefold() for item in names}


def _token_hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _digest(secret: bytes, *parts: str) -> str:
    """HMAC-SHA256 over parts that cannot run into each other, as hex."""
    return hmac.new(secret, json.dumps(parts).encode(), hashlib.sha256).hexdigest()
