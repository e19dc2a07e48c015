"""What must not leave with an artefact: names, addresses, paths of a machine, tokens, metadata of pictures, pickles.

What can be taken out without a loss is taken out of the staged copy; anything else is a problem that names the file.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pathalign.schema import Grade

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack")
TEXT = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".csv", ".html", ".svg", ".py")
PICTURES = (".png", ".jpg", ".jpeg")
OTHERS = (".safetensors", ".parquet")
SHORTENED = (".json", ".jsonl", ".yaml", ".yml", ".csv", ".html")  # where a path becomes its last part

_ROOTS = "home|Users|root|mnt|media|tmp|var|data|work|workspace|scratch|opt|srv|private|Volumes|content|gpfs|nfs|lustre"
_REST = r"[^\s\"'<>|,;:)\]}]"
PATHS = re.compile(
    rf"(?<![\w/.+])/(?:{_ROOTS})/{_REST}+|file://{_REST}+|(?<![\w/])~/{_REST}+|\b[A-Za-z]:\\{{1,2}}{_REST}+"
)
TOKENS = re.compile(r"\b(?:hf_|api_org_)[A-Za-z0-9]{16,}\b")
ADDRESSES = re.compile(r"[A-Za-z0-9][\w.+-]*@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,}\b")
# What `grading.access`, simulated graders and imports call a grader; or a role with a number or a letter.
PSEUDONYMS = re.compile(
    r"(?:grader|simulated|imported|reader|rater|expert|annotator|pathologist|voter|r|g)\d{0,6}"
    r"(?:[-_](?:[0-9a-f]{8}|\d{1,6}|[a-z]))*",
    re.IGNORECASE,
)
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_PNG_CHUNKS = {
    b"IHDR",
    b"PLTE",
    b"IDAT",
    b"IEND",
    b"tRNS",
    b"gAMA",
    b"cHRM",
    b"sRGB",
    b"iCCP",
    b"sBIT",
    b"bKGD",
    b"pHYs",
}
_JPEG_SEGMENTS = {0xE0, 0xE2, 0xEE}  # JFIF, colour profile, Adobe's colour transform: needed to show the picture right


def problems_of_graders(grades: Iterable[Grade]) -> list[str]:
    """Graders who are called by what may be a name."""
    names = sorted({grade.grader for grade in grades})
    wrong = [name for name in names if not PSEUDONYMS.fullmatch(name)]
    if not wrong:
        return []
    return [
        f"grades: {len(wrong)} of {len(names)} graders are called by what may be a name ({_hidden(wrong[0])}); give "
        "graders a `pseudonym` such as reader-1 in the study, or let `pathalign grade export` number them"
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
    if suffix in PICKLES:
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
        return (
            []
            if _readable(path.read_bytes())
            else [f"{name}: is neither PNG nor JPEG, so that nobody knows what is in it"]
        )
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
        if (plain := without_metadata(content)) != content:
            path.write_bytes(plain)
            return ["metadata taken out of pictures"]
    elif suffix == ".parquet":
        return _clean_table(path)
    return []


def last_part(path: str) -> str:
    """Name at the end of a path of either system."""
    text = path.removeprefix("file://").rstrip("/\\")
    return (PureWindowsPath(text) if "\\" in text else PurePosixPath(text)).name


def without_metadata(picture: bytes) -> bytes:
    """The same picture without EXIF, comments, times and other text; pixels are not touched.

    Anything but PNG and JPEG comes back as it is.
    """
    if picture.startswith(_PNG):
        return _plain_png(picture)
    return _plain_jpeg(picture) if picture.startswith(_JPEG) else picture


def _readable(picture: bytes) -> bool:
    """Whether `without_metadata` knows what is in it."""
    return picture.startswith((_PNG, _JPEG))


def _plain_png(picture: bytes) -> bytes:
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(picture):
        length, name = struct.unpack(">I4s", picture[place : place + 8])
        if name in _PNG_CHUNKS:
            kept.append(picture[place : place + 12 + length])
        place += 12 + length
        if name == b"IEND":  # what stands behind the end is no part of the picture
            break
    return b"".join(kept)


def _plain_jpeg(picture: bytes) -> bytes:
    kept, place = [picture[:2]], 2
    while place + 4 <= len(picture) and picture[place] == 0xFF:
        marker = picture[place + 1]
        if marker == 0xDA:  # the pixels begin
            end = picture.rfind(b"\xff\xd9")
            return b"".join(kept) + picture[place : end + 2 if end > 0 else None]
        end = place + 2 + int.from_bytes(picture[place + 2 : place + 4], "big")
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or marker in _JPEG_SEGMENTS:
            kept.append(picture[place:end])
        place = end
    return picture


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
    if re.fullmatch(r"(/|~/|\.\./)[^\n]+", value):
        return last_part(value)
    return PATHS.sub(lambda hit: last_part(hit[0]), value)


def _clean_table(path: Path) -> list[str]:
    """Pictures without metadata and names, and text without paths; the file stays as it is if there is neither."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    done: set[str] = set()
    for index, field in enumerate(table.schema):
        if _is_picture(field.type):
            rows = table.column(index).to_pylist()
            plain = [
                row and {**row, "bytes": row["bytes"] and without_metadata(row["bytes"]), "path": None} for row in rows
            ]
            word = "metadata taken out of pictures"
        elif pyarrow.types.is_string(field.type):
            rows = table.column(index).to_pylist()
            plain = [row and PATHS.sub(lambda hit: last_part(hit[0]), row) for row in rows]
            word = "paths of this machine shortened"
        else:
            continue
        if plain != rows:
            table = table.set_column(index, field, pyarrow.chunked_array([pyarrow.array(plain, field.type)]))
            done.add(word)
    if done:
        pyarrow.parquet.write_table(table, path)
    return sorted(done)


def _is_picture(kind: Any) -> bool:
    """Whether a column's type is that of `datasets.Image`."""
    import pyarrow

    return pyarrow.types.is_struct(kind) and {"bytes", "path"} <= {part.name for part in kind}


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
        if _is_picture(field.type):
            rows = [row["bytes"] for row in table.column(index).to_pylist() if row and row["bytes"]]
            if odd := sum(not _readable(row) for row in rows):
                found.append(f"{name}, column {field.name}: {odd} pictures are neither PNG nor JPEG")
        if pyarrow.types.is_string(kind):
            for row in table.column(index).to_pylist():
                text.write(f"{row}\n")
            found += problems_of_text(f"{name}, column {field.name}", text.getvalue(), secret)
    return found


def _hidden(found: str) -> str:
    """Enough of it to find it, not enough to give it away."""
    return f"{found[:3]}..., {len(found)} characters"
