"""What is found, and what is taken out, before something is published."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pathalign.config import ConfigError
from pathalign.grading.exports import pseudonyms_for
from pathalign.grading.study import Study
from pathalign.hub import privacy
from pathalign.hub.commits import waiting_time_s
from pathalign.schema import Grade


def picture(form: str, mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(made, form, **options)
    return made.getvalue()


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x013B], made[0x0132] = "Ada Lovelace", "2026:01:02 03:04:05"
    return made


def pixels(picture: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(picture)))


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


DIRTY = {
    "png": picture("PNG", exif=exif()) + b"behind the end: Ada",
    "png colour profile": picture("PNG", icc_profile=b"Ada Lovelace" * 30),
    "png unknown chunk": picture("PNG").replace(b"\0\0\0\0IEND", chunk(b"adaX", b"Ada") + b"\0\0\0\0IEND"),
    "png behind its pixels": None,
    "jpeg": picture("JPEG", exif=exif(), comment=b"seen by Ada") + b"behind the end: Ada",
    "jpeg with progressive scans": picture("JPEG", exif=exif(), progressive=True, quality=90),
    "jpeg colour profile": picture("JPEG", icc_profile=b"Ada Lovelace" * 30),
    "jpeg fill bytes": picture("JPEG", exif=exif()).replace(b"\xff\xe1", b"\xff\xff\xff\xe1", 1),
    "jpeg second picture": picture("JPEG") + picture("JPEG", exif=exif()),
    "jpeg end in the text": picture("JPEG") + b"Ada Lovelace\xff\xd9",
    "jpeg thumbnail": picture("JPEG").replace(
        b"\xff\xe0\0\x10" + picture("JPEG")[6:20], b"\xff\xe0\0\x13" + picture("JPEG")[6:18] + b"\1\1Ada", 1
    ),
    "jpeg in 4 colours": picture("JPEG", mode="CMYK", exif=exif()),
}
DIRTY["png behind its pixels"] = b"".join(
    [picture("PNG")[:33], chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes(72) for _ in range(24))) + b"Ada")]
    + [chunk(b"IEND", b"")]
)


@pytest.mark.parametrize("form", DIRTY)
def test_metadata_goes_and_pixels_stay_to_the_last_bit(form):
    dirty = DIRTY[form]
    assert b"Ada" in dirty or "profile" in form
    clean = privacy.without_metadata(dirty)
    assert clean and b"Ada" not in clean and b"2026:01:02" not in clean
    assert np.array_equal(pixels(dirty), pixels(clean))
    left = Image.open(io.BytesIO(clean))
    assert not left.getexif() and not {"icc_profile", "comment", "Author"} & left.info.keys()
    assert privacy.without_metadata(clean) == clean


def test_the_second_picture_of_a_jpeg_goes():
    made = io.BytesIO()
    first = Image.open(io.BytesIO(picture("JPEG")))
    first.save(made, "MPO", save_all=True, append_images=[first], exif=exif())
    clean = privacy.without_metadata(made.getvalue())
    assert clean and clean.count(b"\xff\xd8\xff") == 1 and b"Ada" in made.getvalue() and b"Ada" not in clean


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_keeps_its_pixels_and_what_is_see_through(mode):
    if mode == "I;16":
        image = Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100)
    else:
        image = Image.open(io.BytesIO(picture("PNG"))).convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    made = io.BytesIO()
    image.save(made, "PNG", exif=exif(), **options)
    clean = privacy.without_metadata(made.getvalue())
    assert clean and np.array_equal(pixels(clean), pixels(made.getvalue()))
    assert Image.open(io.BytesIO(clean)).info.get("transparency") == options.get("transparency")


def test_a_picture_without_metadata_keeps_its_bytes():
    assert privacy.without_metadata(picture("PNG")) == picture("PNG")
    assert privacy.without_metadata(picture("JPEG")) == picture("JPEG")


def test_a_picture_that_is_not_understood_to_its_end_is_none():
    deep = picture("PNG")[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    deep += chunk(b"IDAT", zlib.compress(bytes(7))) + chunk(b"IEND", b"")
    frames = io.BytesIO()
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    first.save(frames, "PNG", save_all=True, append_images=[second])
    jpeg, at = picture("JPEG"), picture("JPEG").index(b"\xff\xdb")
    for odd in (
        b"no picture", b"", picture("PNG")[:-30], jpeg[:-200], jpeg[:at] + b"Ada" + jpeg[at:],
        jpeg[:at] + b"\xff\xf5\0\x05Ada" + jpeg[at:], deep, frames.getvalue(), picture("TIFF"),
        b"\xff\xd8", b"\xff\xd8\xff\xff",
    ):  # fmt: skip
        assert privacy.without_metadata(odd) is None


@pytest.mark.parametrize(
    "text",
    [
        "/home/ada/cells", "see /mnt/scanner/7/a.png.", "file:///etc/hosts", "~/runs/x", r"C:\Users\ada\x", '"/tmp/x"',
        "(/Users/ada/x)", "PATH=/scratch/ada", "a /var/lib/x", r"\\nas01\users\ada\x", r'"\\\\nas01\\users\\ada"',
        "/cluster/home/ada/x", "/export/home/ada", "/storage/ada/x", "see /gscratch/ada", "/a/b/home/ada", "~ada/x",
        "/projects/ada/x", "C:/Users/ada", "ghp_" + "aB3" * 12, "github_pat_" + "aB_3" * 9, "glpat-" + "a-B3" * 5,
        "AKIA" + "AB23" * 4, "hf_" + "aB3" * 11,
    ],
)  # fmt: skip
def test_paths_of_a_machine_and_tokens_are_seen(text):
    assert privacy.problems_of_text("notes", text, None), text


@pytest.mark.parametrize(
    "text",
    [
        "https://hub.org/home/ada", "runs/demo/base", "lab/cells@main", "data/train-00000.parquet", "a/b", "1/2",
        "https://arxiv.org/abs/2306.12438", "hf_hub_download", "cells@v1.0", "https://x.org/data/y", "PNG;base64,/9j/4",
        "lab@3f2a1b", "and/or", "/results/", "s3://lab/x", "https://hub.org/cluster/home/ada", "~5/10", r"\d+\w",
        "a: /",
    ],
)  # fmt: skip
def test_what_is_no_path_address_or_token_is_let_through(text):
    assert privacy.problems_of_text("notes", text, None) == []


def test_json_keeps_its_layout_unless_a_path_is_shortened(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"b":1,  "a":"runs/x"}')
    assert privacy.clean(path) == [] and path.read_text() == '{"b":1,  "a":"runs/x"}'
    content = {"a": "/home/ada/cells", "b": ["../other/base", "x=/data/ada/y.png, 3"], "c": r"D:\cells\base", "d": "/"}
    content |= {"e": r"\\nas01\users\ada l\base", "f": "/cluster/home/ada/base", "g": "C:/Users/ada l/base", "h": "~5"}
    path.write_text(json.dumps(content))
    assert privacy.clean(path) == ["paths of this machine shortened"]
    assert json.loads(path.read_text()) == {
        "a": "cells", "b": ["base", "x=y.png, 3"], "c": "base", "d": "/", "e": "base", "f": "base", "g": "base",
        "h": "~5",
    }  # fmt: skip


def test_weights_with_a_path_in_their_metadata_are_refused(tmp_path: Path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors", metadata={"from": "/home/ada/x"})
    (problem,) = privacy.problems_of_file(tmp_path / "model.safetensors", "model.safetensors", None)
    assert "a path of a machine" in problem and "ada" not in problem


def test_what_only_looks_like_a_picture_is_refused(tmp_path: Path):
    (tmp_path / "scan.png").write_bytes(picture("TIFF", tiffinfo={315: "Ada Lovelace"}))
    (problem,) = privacy.problems_of_file(tmp_path / "scan.png", "scan.png", None)
    assert "is neither PNG nor JPEG" in problem
    rows = pa.array([{"bytes": picture("TIFF"), "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pyarrow.parquet.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    (problem,) = privacy.problems_of_file(tmp_path / "a.parquet", "a.parquet", None)
    assert "column image, 1 pictures: is neither" in problem


def test_only_pseudonyms_pass_as_graders():
    good = [
        "grader-0a1b2c3d",
        "grader-12",
        "simulated-3",
        "imported-0a1b2c3d-2",
        "imported",
        "reader-1",
        "R2",
        "rater-b",
        "haematologist-1",
        "Dr-B",
        "reader-two",
    ]
    bad = [
        "Ada",
        "ada.lovelace",
        "ada@x.org",
        "expert-ada",
        "grader Ada Lovelace",
        "Dr. B",
        "reader-1-ada",
        "rob",
        "lovelace-1",
        "ada1",
        "",
    ]
    bad.append("reader" + "-1" * 20)
    grades = [Grade(str(name), "i", "a", "plausible", name) for name in good]
    assert privacy.problems_of_graders(grades) == []
    for name in bad:
        assert privacy.problems_of_graders([*grades, Grade("x", "i", "a", "plausible", name)]), name


@pytest.mark.parametrize("name", ["haematologist-1", "Dr-B", "lovelace-1", "Ada", "ada@x.org", "Dr. B"])
def test_a_study_takes_as_pseudonym_what_exports_keep_and_publications_take(name):
    takes = privacy.problems_of_graders([Grade("x", "i", "a", "plausible", name)]) == []
    assert takes == (pseudonyms_for([name])[name] == name) == (name in ("haematologist-1", "Dr-B"))
    numbered = pseudonyms_for([name]).values()
    assert privacy.problems_of_graders([Grade("x", "i", "a", "plausible", given) for given in numbered]) == []
    people = [{"name": "Ada Lovelace", "pseudonym": name}]
    if takes:
        assert Study(references="real", graders=people).pseudonyms == {"Ada Lovelace": name}
    else:
        with pytest.raises(
            ConfigError, match="may be a name; write a role with a number or a letter, such as reader-1"
        ):
            Study(references="real", graders=people)


def test_the_hub_decides_how_long_to_wait_and_refusals_are_not_waited_out():
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    def error(status: int, **headers: str) -> HfHubHTTPError:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        request = httpx2.Request("POST", "http://hub/api")
        return HfHubHTTPError("no", response=httpx2.Response(status, headers=names, request=request))

    assert waiting_time_s(error(429, Retry_After="7"), 0) == 7
    assert waiting_time_s(error(429, RateLimit='"api";r=0;t=55'), 0) == 56
    for status in (409, 412, 500, 502, 503):
        assert 0.2 < (waiting_time_s(error(status), 0) or 0) < 0.8
        assert 15 <= (waiting_time_s(error(status), 9) or 0) <= 45
    assert [waiting_time_s(error(status), 0) for status in (400, 401, 403, 404, 422)] == [None] * 5
    assert waiting_time_s(OfflineModeIsEnabled("offline"), 0) is None
    assert (waiting_time_s(httpx2.ReadError("cut"), 0) or 0) > 0
    cut = RuntimeError("Error while uploading")
    cut.__cause__ = httpx2.WriteError("cut")
    assert (waiting_time_s(cut, 0) or 0) > 0 and waiting_time_s(KeyError("ours"), 0) is None
