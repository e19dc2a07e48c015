"""Pictures without what does not belong to their pixels: they are written anew, from what was understood of them.

Nothing is copied that is not needed to show them, so that a name cannot ride along in a part that nobody here knows.
"""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
END, SCAN, JFIF, ADOBE = 0xD9, 0xDA, 0xE0, 0xEE
# What a JPEG is decoded by: frames, Huffman and arithmetic tables, quantization, lines, restarts.
_TABLES = {*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDB, 0xDC, 0xDD}


def without_metadata(picture: bytes) -> bytes | None:
    """The same picture without EXIF, comments, colour profiles, times and other text; its pixels are the same.

    Args:
        picture: A PNG, which Pillow decodes and writes, or a JPEG, whose coefficients are kept as they are.

    Returns:
        None if it is neither, is damaged, or cannot be written without a loss (more than 8 bits a colour, animations).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of what is strange about a file
            plain = _plain_png(picture) if picture.startswith(PNG) else _plain_jpeg(picture)
            same = plain == picture or _pixels(plain) == _pixels(picture)
    except Exception:  # of Pillow's readers: whatever they stumble over, the picture is not understood
        return None
    return plain if same else None


def _plain_png(picture: bytes) -> bytes:
    from PIL import Image

    depth, colours = picture[24:26]
    if depth == 16 and colours:
        raise ValueError("Pillow keeps 8 of its 16 bits")
    with Image.open(io.BytesIO(picture), formats=["PNG"]) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("it is an animation")
        image.load()
        image.info = {key: value for key, value in image.info.items() if key == "transparency"}
        made = io.BytesIO()
        image.save(made, "PNG")
        return made.getvalue()


def _plain_jpeg(picture: bytes) -> bytes:
    """Tables and scans in their order; the end is written by us, and nothing comes after it."""
    if not picture.startswith(JPEG):
        raise ValueError("it is no JPEG")
    kept, place = [JPEG], 2
    while True:
        marker, place = _marker(picture, place)
        if marker == END:
            return b"".join([*kept, b"\xff\xd9"])
        (length,) = struct.unpack(">H", picture[place : place + 2])
        content = picture[place + 2 : place + length]
        if length < 2 or len(content) != length - 2:
            raise ValueError("it ends in a segment")
        place += length
        if marker == JFIF and content.startswith(b"JFIF\0"):
            content = content[:12] + b"\0\0"  # without its thumbnail
        elif marker == ADOBE and content.startswith(b"Adobe"):
            content = content[:12]
        elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
            continue
        elif marker not in _TABLES and marker != SCAN:
            raise ValueError(f"it has a segment {marker:x}")
        kept.append(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content)
        if marker == SCAN:
            end = _end_of_scan(picture, place)
            kept.append(picture[place:end])
            place = end


def _marker(picture: bytes, place: int) -> tuple[int, int]:
    """The marker at a place, which any number of fill bytes may precede, and where its segment begins."""
    if picture[place] != 0xFF:
        raise ValueError("there is something between its segments")
    while picture[place] == 0xFF:
        place += 1
    return picture[place], place + 1


def _end_of_scan(picture: bytes, place: int) -> int:
    """Where the next marker is that does not belong to the scan, as restarts and stuffed zeros do."""
    while True:
        place = picture.index(b"\xff", place)
        if picture[place + 1] != 0 and not 0xD0 <= picture[place + 1] <= 0xD7:
            return place
        place += 2


def _pixels(picture: bytes) -> tuple[Any, ...]:
    """What is seen of it."""
    from PIL import Image

    with Image.open(io.BytesIO(picture), formats=["PNG", "JPEG"]) as image:
        image.load()
        shown = image.convert("RGBA") if image.format == "PNG" and image.mode[0] != "I" else image
        return image.mode, image.size, image.tobytes(), shown.tobytes()
