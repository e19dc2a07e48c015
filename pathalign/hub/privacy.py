"""What must not leave with an artefact: names, addresses, paths of a machine, tokens, metadata of pictures, pickles.

What can be taken out without a loss is taken out of the staged copy; anything else is a problem that names the file.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pathalign.hub.columns import is_picture
from pathalign.hub.pictures import without_metadata
from pathalign.pinning import PICKLES
from pathalign.schema import PSEUDONYM, PSEUDONYMS_WANTED, Grade

UNSAFE = (*PICKLES, ".h5", ".msgpack")  # the last two hold weights that only an exact version of their library reads
TEXT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".csv", ".html", ".svg", ".py")
PICTURES = (".png", ".jpg", ".jpeg")
NO_PICTURE = "is neither PNG nor JPEG, or damaged, animated or of 16 bits a colour, so that nobody knows what is in it"
SHORTENED = (".json", ".jsonl", ".yaml", ".yml", ".csv", ".html")  # where a path becomes its last part

_ROOTS = (
    "Users|root|mnt|media|tmp|var|data|work|workspace|scratch|gscratch|opt|srv|private|Volumes|content|gpfs|nfs|lustre|"
    "cluster|export|storage|project|projects|groups|usr|etc|run|dev|proc|afs|vol|net|shared|(?:[\\w.-]+/){0,3}home"
)
_REST = r"[^\s\"'<>|,;:)\]}]"
PATHS = re.compile(
    rf"(?<![\w/.+])/(?:{_ROOTS})/{_REST}+|file://{_REST}+|(?<![\w/])~(?:[A-Za-z][\w.-]*)?/{_REST}+|"
    rf"\b[A-Za-z]:(?:\\{{1,2}}|/(?!/)){_REST}+|(?<![\w\\])\\{{2,4}}[\w.$-]+\\{{1,2}}{_REST}+"
)
TOKENS = re.compile(
    r"\b(?:(?:hf_|api_org_)[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|"
    r"AKIA[0-9A-Z]{16})\b"
)
ADDRESSES = re.compile(r"[A-Za-z0-9][\w.+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")


def problems_of_graders(grades: Iterable[Grade]) -> list[str]:
    """Graders who are called by what may be a name."""
    names = sorted({grade.grader for grade in grades})
    wrong = [name for name in names if not PSEUDONYM.fullmatch(name)]
    if not wrong:
        return []
    return [
        f"grades: {len(wrong)} of {len(names)} graders are called by what may be a name ({_hidden(wrong[0])}); "
        f"{PSEUDONYMS_WANTED} passes. `pathalign grade export` numbers all others"
    ]


def problems_of_text(where: str, text: str, secret: str | None) -> list[str]:
    """What must not be in a text, each find with its place but without what was found."""
    found = []
    for what, pattern in (("a token", TOKENS), ("an e-mail address", ADDRESSES), ("a path of a machine", PATHS)):
        if hit := pattern.search(text):
            line = text.count("\n", 0, hit.start()) + 1
            found.append(f"{where}:{line}: {what} ({_hidden(hit[0])})")
    if secret and secret in text:
        found.append(f"{where}: the token that you are logged in with")
    return found


def problems_of_file(path: Path, name: str, secret: str | None) -> list[str]:
    """What is wrong with a staged file, after it was cleaned."""
    suffix = path.suffix.lower()
    if suffix in UNSAFE:
        return [
            f"{name}: weights and arrays go as safetensors only, since a {suffix} file may run code when it is loaded"
        ]
    if suffix in TEXT:
        return problems_of_text(name, path.read_text(errors="replace"), secret)
    if suffix == ".safetensors":
        return problems_of_text(name, safetensors_header(path), secret)
    if suffix == ".parquet":
        return _problems_of_table(path, name, secret)
    if suffix in PICTURES:
        content = path.read_bytes()
        return [] if without_metadata(content) == content else [f"{name}: {NO_PICTURE}"]
    return [f"{name}: nobody here knows what is in a {suffix or 'file without a suffix'}; move it out of the folder"]


def safetensors_header(path: Path) -> str:
    """Names, shapes and metadata of a safetensors file as text; empty if it is damaged."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return file.read(min(length, 10**8)).decode(errors="replace")


def clean(path: Path) -> list[str]:
    """Take out of a staged file what can be taken out without a loss; says what was."""
    suffix = path.suffix.lower()
    if suffix in SHORTENED:
        text = path.read_text()
        shorter = _shorten_json(text) if suffix == ".json" else PATHS.sub(lambda hit: last_part(hit[0]), text)
        if shorter != text:
            path.write_text(shorter)
            return ["paths of this machine shortened"]
    elif suffix in PICTURES:
        content = path.read_bytes()
        if (plain := without_metadata(content)) not in (None, content):
            path.write_bytes(plain)
            return ["metadata taken out of pictures"]
    elif suffix == ".parquet":
        return _clean_table(path)
    return []


def last_part(path: str) -> str:
    """Name at the end of a path of either system."""
    text = path.removeprefix("file://").rstrip("/\\")
    return (PureWindowsPath(text) if "\\" in text else PurePosixPath(text)).name


def _shorten_json(text: str) -> str:
    """The same JSON with paths of a machine as their last part; laid out as before if nothing was found."""
    content = json.loads(text)
    shorter = _shorten(content)
    return text if shorter == content else json.dumps(shorter, indent=2, sort_keys=True) + "\n"


def _shorten(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shorten(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_shorten(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if re.fullmatch(r"(/|~|\.\./|\\\\|[A-Za-z]:[\\/](?!/))[^\n]+", value):
        return last_part(value)
    return PATHS.sub(lambda hit: last_part(hit[0]), value)


def _clean_table(path: Path) -> list[str]:
    """Pictures without metadata and names, and text without paths; the file stays as it is if there is neither."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    done: set[str] = set()
    for index, field in enumerate(table.schema):
        if is_picture(field.type):
            rows = table.column(index).to_pylist()
            plain = [row and {"bytes": _plain(row["bytes"]), "path": None} for row in rows]
            word = "metadata taken out of pictures"
        elif pyarrow.types.is_string(field.type):
            rows = table.column(index).to_pylist()
            plain = [row and PATHS.sub(lambda hit: last_part(hit[0]), row) for row in rows]
            word = "paths of this machine shortened"
        else:
            continue
        if plain != rows:
            kind = (
                pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}.items())
                if is_picture(field.type)
                else field.type
            )
            table = table.set_column(index, field.with_type(kind), pyarrow.chunked_array([pyarrow.array(plain, kind)]))
            done.add(word)
    if done:
        pyarrow.parquet.write_table(table, path)
    return sorted(done)


def _problems_of_table(path: Path, name: str, secret: str | None) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    metadata = {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, value in (table.schema.metadata or {}).items()
    }
    found = problems_of_text(f"{name}, its metadata", json.dumps(metadata), secret)
    for index, field in enumerate(table.schema):
        text = io.StringIO()
        kind = field.type.value_type if pyarrow.types.is_list(field.type) else field.type
        if is_picture(field.type):
            rows = [row["bytes"] for row in table.column(index).to_pylist() if row and row["bytes"]]
            if odd := sum(without_metadata(row) != row for row in rows):
                found.append(f"{name}, column {field.name}, {odd} pictures: {NO_PICTURE}")
        if pyarrow.types.is_string(kind):
            for row in table.column(index).to_pylist():
                text.write(f"{row}\n")
            found += problems_of_text(f"{name}, column {field.name}", text.getvalue(), secret)
    return found


def _plain(picture: bytes | None) -> bytes | None:
    """Without metadata; what is not understood stays as it is, and is a problem later."""
    return (without_metadata(picture) or picture) if picture else picture


def _hidden(found: str) -> str:
    """Enough of it to find it, not enough to give it away."""
    return f"{found[:3]}..., {len(found)} characters"
