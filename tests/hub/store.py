"""What the loopback Hub keeps: repos, their commits and refs in SQLite, file contents by their hash on disk."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.accounts import READ, WRITE, Accounts, scope
from hub.errors import HubError, Moved

TABLES = """
CREATE TABLE repos (
    kind TEXT, name TEXT, visibility TEXT, sdk TEXT, gated TEXT, created REAL, PRIMARY KEY (kind, name)
);
CREATE TABLE moved (kind TEXT, old TEXT, new TEXT, PRIMARY KEY (kind, old));
CREATE TABLE granted (kind TEXT, name TEXT, user TEXT, PRIMARY KEY (kind, name, user));
CREATE TABLE commits (
    number INTEGER PRIMARY KEY, kind TEXT, name TEXT, oid TEXT UNIQUE, parent TEXT, title TEXT, created REAL, tree TEXT
);
CREATE TABLE refs (kind TEXT, name TEXT, ref TEXT, oid TEXT, PRIMARY KEY (kind, name, ref));
"""
GIT_ATTRIBUTES = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".zip", ".png", ".npy")
LARGEST_REGULAR = 10 * 2**20
HEADS, TAGS = "refs/heads/", "refs/tags/"


@dataclass(frozen=True)
class Entry:
    """A file of a commit: git's hash of what git holds, and the hash of the content."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    def describe(self, path: str) -> dict[str, Any]:
        described: dict[str, Any] = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.lfs:
            pointer = len(lfs_pointer(self.sha256, self.size))
            described["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer}
        return described


@dataclass(frozen=True)
class Repo:
    """Attributes:
    kind: models, datasets or spaces.
    visibility: public, private, or protected: a Space whose page is for all and whose files are not.
    gated: auto, manual or empty.
    """

    kind: str
    name: str
    visibility: str
    sdk: str | None
    gated: str
    created: float

    @property
    def private(self) -> bool:
        return self.visibility != "public"


class Store:
    """State of the server. One lock for all: a test's Hub has few clients.

    Attributes:
        commit_takes_s: Others' commits to the same repo are refused with 409 so long.
    """

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.lock = threading.RLock()
        self.database = sqlite3.connect(folder / "hub.sqlite", check_same_thread=False, isolation_level=None)
        self.database.execute("PRAGMA synchronous=OFF")
        self.database.executescript(TABLES)
        self.accounts = Accounts(self.database, self.lock)
        self.commit_takes_s = 0.0
        self._committing: set[tuple[str, str]] = set()

    # --- who may do what

    def add_token(self, token: str, user: str, writes: str = "*") -> None:
        """A token that may write to all of a user's repos (`*`), to none (empty), or to one dataset by its name."""
        if writes in ("*", ""):
            self.accounts.add_token(token, user, "write" if writes else "read")
        else:
            self.accounts.add_token(token, user, "fineGrained", [scope("dataset", writes, READ, WRITE)])

    def user(self, token: str | None) -> str | None:
        """Who a token belongs to; None without a token."""
        found = self.accounts.token(token)
        return found.user if found else None

    def may_write(self, token: str | None, repo: Repo) -> bool:
        return self.accounts.permits(token, repo.kind, repo.name, WRITE)

    def check_gate(self, repo: Repo, token: str | None) -> None:
        """Refuse files of a gated repo to those who are not let in."""
        user = self.user(token)
        if not repo.gated or self.accounts.permits(token, repo.kind, repo.name, READ):
            return
        with self.lock:
            query = "SELECT 1 FROM granted WHERE kind = ? AND name = ? AND user = ?"
            if self.database.execute(query, (repo.kind, repo.name, user)).fetchone():
                return
        message = f"Access to {repo.name} is restricted and you are not in the authorized list."
        raise HubError(401 if user is None else 403, message, "GatedRepo")

    def grant(self, repo: Repo, user: str) -> None:
        """Let a user into a gated repo."""
        self.database.execute("INSERT OR REPLACE INTO granted VALUES (?, ?, ?)", (repo.kind, repo.name, user))

    # --- repos

    def create(
        self, kind: str, name: str, private: bool = False, sdk: str | None = None, visibility: str | None = None
    ) -> None:
        with self.lock:
            if self.database.execute("SELECT 1 FROM repos WHERE kind = ? AND name = ?", (kind, name)).fetchone():
                raise HubError(409, "You already created this repo", url=f"{kind}/{name}")
            repo = Repo(kind, name, visibility or ("private" if private else "public"), sdk, "", time.time())
            values = (kind, name, repo.visibility, sdk, repo.gated, repo.created)
            self.database.execute("INSERT INTO repos VALUES (?, ?, ?, ?, ?, ?)", values)
            self.database.execute("DELETE FROM moved WHERE kind = ? AND old = ?", (kind, name))
            files = {".gitattributes": self.add_file(GIT_ATTRIBUTES)}
            self.add_commit(repo, f"{HEADS}main", None, "initial commit", files)

    def delete(self, kind: str, name: str) -> None:
        with self.lock:
            for table in self._tables_of_repos():
                self.database.execute(f"DELETE FROM {table} WHERE kind = ? AND name = ?", (kind, name))

    def move(self, kind: str, old: str, new: str) -> None:
        """Give a repo another name; the old one leads to it."""
        with self.lock:
            if self.database.execute("SELECT 1 FROM repos WHERE kind = ? AND name = ?", (kind, new)).fetchone():
                raise HubError(409, f"{new} exists already")
            for table in self._tables_of_repos():
                query = f"UPDATE {table} SET name = ? WHERE kind = ? AND name = ?"
                self.database.execute(query, (new, kind, old))
            self.database.execute("INSERT OR REPLACE INTO moved VALUES (?, ?, ?)", (kind, old, new))

    def _tables_of_repos(self) -> list[str]:
        query = """SELECT tables.name FROM sqlite_master tables, pragma_table_info(tables.name) columns
                   WHERE columns.name IN ('kind', 'name') GROUP BY tables.name HAVING COUNT(*) = 2"""
        return [table for (table,) in self.database.execute(query).fetchall()]

    def configure(self, repo: Repo, **settings: str) -> None:
        """Change `visibility` or `gated`."""
        for column, value in settings.items():
            query = f"UPDATE repos SET {column} = ? WHERE kind = ? AND name = ?"
            self.database.execute(query, (value, repo.kind, repo.name))

    def repo(self, kind: str, name: str, token: str | None) -> Repo:
        """A repo that the token's owner may see; to others a private one does not exist."""
        user = self.user(token)
        with self.lock:
            query = "SELECT * FROM repos WHERE kind = ? AND name = ?"
            found = self.database.execute(query, (kind, name)).fetchone()
            moved = self.database.execute("SELECT new FROM moved WHERE kind = ? AND old = ?", (kind, name)).fetchone()
        repo = Repo(*found) if found else None
        if repo is None and moved:
            raise Moved(name, moved[0])
        if repo is None or (repo.private and not self.accounts.permits(token, kind, name, READ)):
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def all_repos(self, kind: str) -> list[Repo]:
        """All repos of a kind, newest first."""
        with self.lock:
            query = "SELECT * FROM repos WHERE kind = ? ORDER BY created DESC"
            return [Repo(*row) for row in self.database.execute(query, (kind,)).fetchall()]

    def repos(self, kind: str, token: str | None) -> list[Repo]:
        """Those that the token's owner may see."""
        found = self.all_repos(kind)
        return [repo for repo in found if not repo.private or self.accounts.permits(token, kind, repo.name, READ)]

    # --- contents

    def add_blob(self, content: bytes) -> str:
        """Keep bytes; returns their SHA-256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.has_blob(sha256):
            (self.blobs / sha256).write_bytes(content)
        return sha256

    def has_blob(self, sha256: str) -> bool:
        return (self.blobs / sha256).is_file()

    def blob(self, sha256: str) -> bytes:
        return (self.blobs / sha256).read_bytes()

    def add_file(self, content: bytes) -> Entry:
        return Entry(git_oid(content), len(content), self.add_blob(content), False)

    def lfs_file(self, sha256: str) -> Entry:
        if not self.has_blob(sha256):
            raise HubError(400, f"LFS object {sha256} was not uploaded")
        size = (self.blobs / sha256).stat().st_size
        return Entry(git_oid(lfs_pointer(sha256, size)), size, sha256, True)

    # --- commits

    def resolve(self, repo: Repo, revision: str) -> str:
        """Commit id of a branch, a tag, a pull request (`refs/pr/1`) or a commit, which may be cut to 7 digits."""
        names = (revision,) if revision.startswith("refs/") else (HEADS + revision, TAGS + revision)
        with self.lock:
            for name in names:
                query = "SELECT oid FROM refs WHERE kind = ? AND name = ? AND ref = ?"
                if found := self.database.execute(query, (repo.kind, repo.name, name)).fetchone():
                    return str(found[0])
            if re.fullmatch("[0-9a-f]{7,40}", revision):
                query = "SELECT oid FROM commits WHERE kind = ? AND name = ? AND oid LIKE ?"
                if found := self.database.execute(query, (repo.kind, repo.name, f"{revision}%")).fetchone():
                    return str(found[0])
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def refs(self, repo: Repo) -> dict[str, str]:
        """Full name of each ref, such as `refs/heads/main`, and its commit id."""
        with self.lock:
            query = "SELECT ref, oid FROM refs WHERE kind = ? AND name = ? ORDER BY rowid"
            return dict(self.database.execute(query, (repo.kind, repo.name)).fetchall())

    def add_ref(self, repo: Repo, ref: str, oid: str) -> None:
        with self.lock:
            if ref in self.refs(repo):
                raise HubError(409, f"Reference {ref} exists already")
            self.database.execute("INSERT INTO refs VALUES (?, ?, ?, ?)", (repo.kind, repo.name, ref, oid))

    def delete_ref(self, repo: Repo, ref: str) -> None:
        with self.lock:
            if ref not in self.refs(repo):
                raise HubError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
            query = "DELETE FROM refs WHERE kind = ? AND name = ? AND ref = ?"
            self.database.execute(query, (repo.kind, repo.name, ref))

    def tree(self, oid: str) -> dict[str, Entry]:
        with self.lock:
            (tree,) = self.database.execute("SELECT tree FROM commits WHERE oid = ?", (oid,)).fetchone()
        return {path: Entry(*entry) for path, entry in json.loads(tree).items()}

    def history(self, repo: Repo, oid: str) -> list[tuple[str, str, float]]:
        """Id, title and time of a commit and those before it, newest first."""
        commits = []
        with self.lock:
            while oid:
                query = "SELECT parent, title, created FROM commits WHERE oid = ?"
                parent, title, created = self.database.execute(query, (oid,)).fetchone()
                commits.append((oid, title, created))
                oid = parent
        return commits

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]], ref: str | None = None) -> str:
        """Apply the client's operations to a branch, all or none; returns the new commit's id.

        Args:
            repo: Where.
            branch: What is committed to.
            lines: Of the request.
            ref: Where the commit goes if not to the branch: a pull request's.
        """
        header = next(line["value"] for line in lines if line["key"] == "header")
        key = (repo.kind, repo.name)
        with self.lock:
            if key in self._committing:
                raise HubError(409, "Another commit to this repo is in progress. Please retry.")
            self._committing.add(key)
        try:
            time.sleep(self.commit_takes_s)
            with self.lock:
                head = self.resolve(repo, branch)
                parent = header.get("parentCommit")
                if parent and not head.startswith(parent):
                    raise HubError(412, "A commit has happened since. Please refresh and try again.")
                tree = self.tree(head)
                for line in lines:
                    self._apply(tree, line["key"], line["value"])
                ref = ref or (branch if branch.startswith("refs/") else HEADS + branch)
                if ref.startswith(HEADS) and ref not in self.refs(repo):
                    raise HubError(400, f"{branch} is no branch")
                return self.add_commit(repo, ref, head, header["summary"], tree)
        finally:
            with self.lock:
                self._committing.discard(key)

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            tree[value["path"]] = self.add_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            tree[value["path"]] = self.lfs_file(value["oid"])
        elif key == "deletedFile":
            if tree.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            prefix = value["path"].rstrip("/") + "/"
            for path in [path for path in tree if path.startswith(prefix)]:
                del tree[path]
        elif key != "header":
            raise HubError(400, f"Unknown operation {key}")

    def add_commit(self, repo: Repo, ref: str, parent: str | None, title: str, tree: dict[str, Entry]) -> str:
        """Put a commit with these files on a ref."""
        text = json.dumps({path: list(vars(entry).values()) for path, entry in sorted(tree.items())})
        now = time.time()
        oid = hashlib.sha1(f"{repo}{parent}{title}{now}{text}".encode()).hexdigest()
        self.database.execute("BEGIN")
        values = (repo.kind, repo.name, oid, parent, title, now, text)
        self.database.execute("INSERT INTO commits VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", values)
        self.database.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?, ?)", (repo.kind, repo.name, ref, oid))
        self.database.execute("COMMIT")
        return oid


def git_oid(content: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git holds in place of a large file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def upload_mode(path: str, size: int) -> str:
    """How the client must send a file: inside the commit, or to the large file storage first."""
    return "lfs" if path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR else "regular"
