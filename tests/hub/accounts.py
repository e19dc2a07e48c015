"""Who is who on the loopback Hub: users, organizations, and what each token may do, told as `whoami-v2` tells it."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.errors import HubError

TABLES = """
CREATE TABLE users (name TEXT PRIMARY KEY, pro INTEGER, pays INTEGER);
CREATE TABLE organizations (name TEXT PRIMARY KEY, plan TEXT);
CREATE TABLE members (organization TEXT, user TEXT, role TEXT, PRIMARY KEY (organization, user));
CREATE TABLE tokens (token TEXT PRIMARY KEY, user TEXT, role TEXT, fine_grained TEXT, title TEXT);
"""
READ, WRITE = "repo.content.read", "repo.write"
WRITERS = ("write", "admin", "contributor")  # roles in an organization
CREATED = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Token:
    """Attributes:
    role: `read`, `write` or `fineGrained`.
    fine_grained: `global`, `scoped` and `canReadGatedRepos`, of a fine-grained one.
    """

    user: str
    role: str
    fine_grained: dict[str, Any]
    title: str


def scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    """What a fine-grained token may do with a `model`, `dataset`, `space` or `bucket`, or all of a `user` or `org`."""
    return {"entity": {"_id": f"{kind}:{name}", "type": kind, "name": name}, "permissions": list(permissions)}


class Accounts:
    """Users, organizations and tokens."""

    def __init__(self, database: sqlite3.Connection, lock: threading.RLock) -> None:
        self.database, self.lock = database, lock
        database.executescript(TABLES)

    def add_user(self, name: str, pro: bool = True, pays: bool = True) -> None:
        """A user; without `pro` no free Gradio or Docker Space, without `pays` no hardware that costs."""
        self.database.execute("INSERT OR REPLACE INTO users VALUES (?, ?, ?)", (name, pro, pays))

    def add_organization(self, name: str, members: Mapping[str, str], plan: str | None = "team") -> None:
        """An organization, with its members' roles: `read`, `contributor`, `write` or `admin`."""
        self.database.execute("INSERT OR REPLACE INTO organizations VALUES (?, ?)", (name, plan))
        rows = [(name, user, role) for user, role in members.items()]
        self.database.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?)", rows)

    def add_token(
        self,
        token: str,
        user: str,
        role: str = "write",
        scopes: Iterable[dict[str, Any]] = (),
        everywhere: Iterable[str] = (),
        title: str = "loopback",
    ) -> None:
        """A token; `scopes` (see `scope`) and `everywhere` are the permissions of a fine-grained one."""
        with self.lock:
            if not self.database.execute("SELECT 1 FROM users WHERE name = ?", (user,)).fetchone():
                self.add_user(user)
            fine = {"canReadGatedRepos": False, "global": list(everywhere), "scoped": list(scopes)}
            values = (token, user, role, json.dumps(fine), title)
            self.database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?, ?, ?)", values)

    def token(self, token: str | None) -> Token | None:
        """What is known of a token; None without one.

        Raises:
            HubError: 401 for a token that nobody has.
        """
        if token is None:
            return None
        with self.lock:
            query = "SELECT user, role, fine_grained, title FROM tokens WHERE token = ?"
            found = self.database.execute(query, (token,)).fetchone()
        if found is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return Token(found[0], found[1], json.loads(found[2]), found[3])

    def role_in(self, user: str, namespace: str) -> str | None:
        """`admin` in one's own namespace, the role in an organization, None elsewhere."""
        if user == namespace:
            return "admin"
        with self.lock:
            query = "SELECT role FROM members WHERE organization = ? AND user = ?"
            found = self.database.execute(query, (namespace, user)).fetchone()
        return found[0] if found else None

    def permits(self, token: str | None, kind: str, name: str, permission: str) -> bool:
        """Whether a token may read or write a private repo (or, for `name` without a slash, all of a namespace)."""
        found = self.token(token)
        if found is None:
            return False
        namespace = name.split("/")[0]
        role = self.role_in(found.user, namespace)
        if role is None or (permission == WRITE and role not in WRITERS):
            return False
        if found.role != "fineGrained":
            return permission == READ or found.role == "write"
        covering = ((kind.removesuffix("s"), name), ("user", namespace), ("org", namespace))
        return any(
            (entry["entity"]["type"], entry["entity"]["name"]) in covering
            and (permission in entry["permissions"] or WRITE in entry["permissions"])
            for entry in found.fine_grained["scoped"]
        )

    def pays_for(self, namespace: str) -> tuple[bool, bool]:
        """Whether Spaces on free hardware, and whether hardware that costs, are to be had by a namespace."""
        with self.lock:
            user = self.database.execute("SELECT pro, pays FROM users WHERE name = ?", (namespace,)).fetchone()
            query = "SELECT plan FROM organizations WHERE name = ?"
            organization = self.database.execute(query, (namespace,)).fetchone()
        return (bool(user[0]), bool(user[1])) if user else (organization[0] is not None,) * 2

    def whoami(self, token: str | None) -> dict[str, Any]:
        """The answer of `whoami-v2`."""
        found = self.token(token)
        if found is None:
            raise HubError(401, "Invalid username or password.")
        with self.lock:
            pro, pays = self.database.execute("SELECT pro, pays FROM users WHERE name = ?", (found.user,)).fetchone()
            query = (
                "SELECT organization, role, plan FROM members JOIN organizations ON organization = name WHERE user = ?"
            )
            organizations = self.database.execute(query, (found.user,)).fetchall()
        described: dict[str, Any] = {"displayName": found.title, "role": found.role, "createdAt": CREATED}
        if found.role == "fineGrained":
            described["fineGrained"] = found.fine_grained
        return {
            "type": "user",
            "id": f"user:{found.user}",
            "name": found.user,
            "fullname": found.user,
            "isPro": bool(pro),
            "canPay": bool(pays),
            "orgs": [
                {"type": "org", "id": f"org:{name}", "name": name, "fullname": name, "plan": plan, "roleInOrg": role}
                for name, role, plan in organizations
            ],
            "auth": {"type": "access_token", "accessToken": described},
        }


def whoami(request: Request) -> Response:
    header = request.headers.get("authorization", "")
    token = header.removeprefix("Bearer ").strip() if header.startswith("Bearer ") else None
    return JSONResponse(request.app.state.store.accounts.whoami(token))


def routes() -> list[Route]:
    return [Route("/api/whoami-v2", whoami)]
