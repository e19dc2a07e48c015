"""What the loopback Hub keeps: repos, commits and who may do what in SQLite, file contents by their hash on disk."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLES = """
CREATE TABLE repos (kind TEXT, name TEXT, private INTEGER, sdk TEXT, created REAL, PRIMARY KEY (kind, name));
CREATE TABLE commits (
    number INTEGER PRIMARY KEY, kind TEXT, name TEXT, oid TEXT UNIQUE, parent TEXT, title TEXT, created REAL, tree TEXT
);
CREATE TABLE refs (kind TEXT, name TEXT, ref TEXT, oid TEXT, PRIMARY KEY (kind, name, ref));
CREATE TABLE tokens (token TEXT PRIMARY KEY, user TEXT, writes TEXT);
"""
GIT_ATTRIBUTES = b"*.parquet filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".zip", ".png", ".npy")
LARGEST_REGULAR = 10 * 2**20


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
    kind: str  # models, datasets or spaces
    name: str
    private: bool
    sdk: str | None


class HubError(Exception):
    """An answer that is no success, with the headers that clients look at."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra


class Store:
    """State of the server. One lock for all: a test's Hub has few clients."""

    def __init__(self, folder: Path) -> None:
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.lock = threading.RLock()
        self.database = sqlite3.connect(folder / "hub.sqlite", check_same_thread=False, isolation_level=None)
        self.database.execute("PRAGMA synchronous=OFF")
        self.database.executescript(TABLES)

    # --- who may do what

    def add_token(self, token: str, user: str, writes: str = "*") -> None:
        """A token of a user that may write to one repo, to all of the user's (`*`) or to none (empty)."""
        self.database.execute("INSERT OR REPLACE INTO tokens VALUES (?, ?, ?)", (token, user, writes))

    def user(self, token: str | None) -> str | None:
        """Who a token belongs to; None without a token."""
        if token is None:
            return None
        with self.lock:
            found = self.database.execute("SELECT user FROM tokens WHERE token = ?", (token,)).fetchone()
        if found is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return str(found[0])

    def may_write(self, token: str | None, name: str) -> bool:
        with self.lock:
            found = self.database.execute("SELECT user, writes FROM tokens WHERE token = ?", (token,)).fetchone()
        return bool(found) and (found[1] == name or (found[1] == "*" and name.split("/")[0] == found[0]))

    # --- repos

    def create(self, kind: str, name: str, private: bool = False, sdk: str | None = None) -> None:
        with self.lock:
            if self.database.execute("SELECT 1 FROM repos WHERE kind = ? AND name = ?", (kind, name)).fetchone():
                raise HubError(409, "You already created this repo", url=f"{kind}/{name}")
            self.database.execute("INSERT INTO repos VALUES (?, ?, ?, ?, ?)", (kind, name, private, sdk, time.time()))
            repo = Repo(kind, name, private, sdk)
            self._commit(repo, "main", None, "initial commit", {".gitattributes": self.add_file(GIT_ATTRIBUTES)})

    def delete(self, kind: str, name: str) -> None:
        with self.lock:
            for table in ("repos", "commits", "refs"):
                self.database.execute(f"DELETE FROM {table} WHERE kind = ? AND name = ?", (kind, name))

    def repo(self, kind: str, name: str, token: str | None) -> Repo:
        """A repo that the token's owner may see; to others a private one does not exist."""
        user = self.user(token)
        with self.lock:
            query = "SELECT private, sdk FROM repos WHERE kind = ? AND name = ?"
            found = self.database.execute(query, (kind, name)).fetchone()
        hidden = found is not None and found[0] and user != name.split("/")[0] and not self.may_write(token, name)
        if found is None or hidden:
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return Repo(kind, name, bool(found[0]), found[1])

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
        """Commit id of a branch, a tag or a commit."""
        with self.lock:
            query = "SELECT oid FROM refs WHERE kind = ? AND name = ? AND ref = ?"
            found = self.database.execute(query, (repo.kind, repo.name, revision)).fetchone()
            query = "SELECT oid FROM commits WHERE kind = ? AND name = ? AND oid = ?"
            found = found or self.database.execute(query, (repo.kind, repo.name, revision)).fetchone()
        if found is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return str(found[0])

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

    def commit(self, repo: Repo, branch: str, lines: list[dict[str, Any]]) -> str:
        """Apply the client's operations to a branch, all or none; returns the new commit's id."""
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.lock:
            head = self.resolve(repo, branch)
            parent = header.get("parentCommit")
            if parent and not head.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            tree = self.tree(head)
            for line in lines:
                self._apply(tree, line["key"], line["value"])
            return self._commit(repo, branch, head, header["summary"], tree)

    def _apply(self, tree: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        import base64

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

    def _commit(self, repo: Repo, branch: str, parent: str | None, title: str, tree: dict[str, Entry]) -> str:
        text = json.dumps({path: list(vars(entry).values()) for path, entry in sorted(tree.items())})
        now = time.time()
        oid = hashlib.sha1(f"{repo}{parent}{title}{now}{text}".encode()).hexdigest()
        self.database.execute("BEGIN")
        values = (repo.kind, repo.name, oid, parent, title, now, text)
        self.database.execute("INSERT INTO commits VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", values)
        self.database.execute("INSERT OR REPLACE INTO refs VALUES (?, ?, ?, ?)", (repo.kind, repo.name, branch, oid))
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
