"""What is found, and what is taken out, before something is published."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from pathalign.hub import privacy
from pathalign.hub.commits import waiting_time_s
from pathalign.schema import Grade


def picture(form: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    made = io.BytesIO()
    Image.fromarray(pixels).save(made, form, **options)
    return made.getvalue()


def exif() -> Image.Exif:
    made = Image.Exif()
    made[0x013B], made[0x0132] = "Ada Lovelace", "2026:01:02 03:04:05"
    return made


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_metadata_goes_and_pixels_stay_to_the_last_bit(form):
    dirty = picture(form, exif=exif(), **({"comment": b"seen by Ada"} if form == "JPEG" else {}))
    dirty += b"behind the end: Ada Lovelace"
    clean = privacy.without_metadata(dirty)
    assert b"Ada" in dirty and b"Ada" not in clean and b"2026:01:02" not in clean
    before, after = Image.open(io.BytesIO(dirty)), Image.open(io.BytesIO(clean))
    assert np.array_equal(np.asarray(before), np.asarray(after)) and not after.getexif()
    assert privacy.without_metadata(clean) == clean


def test_a_picture_without_metadata_keeps_its_bytes_and_other_files_are_let_be():
    assert privacy.without_metadata(picture("PNG")) == picture("PNG")
    assert privacy.without_metadata(b"no picture") == b"no picture"


@pytest.mark.parametrize(
    "text",
    [
        "/home/ada/cells", "see /mnt/scanner/7/a.png.", "file:///etc/hosts", "~/runs/x", r"C:\Users\ada\x", '"/tmp/x"',
        "(/Users/ada/x)", "PATH=/scratch/ada", "a /var/lib/x",
    ],
)  # fmt: skip
def test_paths_of_a_machine_are_seen(text):
    assert privacy.problems_of_text("notes", text, None), text


@pytest.mark.parametrize(
    "text",
    [
        "https://hub.org/home/ada", "runs/demo/base", "lab/cells@main", "data/train-00000.parquet", "a/b", "1/2",
        "https://arxiv.org/abs/2306.12438", "hf_hub_download", "cells@v1.0", "https://x.org/data/y", "PNG;base64,/9j/4",
        "lab@3f2a1b", "and/or", "/results/",
    ],
)  # fmt: skip
def test_what_is_no_path_address_or_token_is_let_through(text):
    assert privacy.problems_of_text("notes", text, None) == []


def test_json_keeps_its_layout_unless_a_path_is_shortened(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text('{"b":1,  "a":"runs/x"}')
    assert privacy.clean(path) == [] and path.read_text() == '{"b":1,  "a":"runs/x"}'
    content = {"a": "/home/ada/cells", "b": ["../other/base", "x=/data/ada/y.png, 3"], "c": r"D:\cells\base", "d": "/"}
    path.write_text(json.dumps(content))
    assert privacy.clean(path) == ["paths of this machine shortened"]
    assert json.loads(path.read_text()) == {"a": "cells", "b": ["base", "x=y.png, 3"], "c": "base", "d": "/"}


def test_weights_with_a_path_in_their_metadata_are_refused(tmp_path: Path):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors", metadata={"from": "/home/ada/x"})
    (problem,) = privacy.problems_of_file(tmp_path / "model.safetensors", "model.safetensors", None)
    assert "a path of a machine" in problem and "ada" not in problem


def test_what_only_looks_like_a_picture_is_refused(tmp_path: Path):
    (tmp_path / "scan.png").write_bytes(picture("TIFF", tiffinfo={315: "Ada Lovelace"}))
    (problem,) = privacy.problems_of_file(tmp_path / "scan.png", "scan.png", None)
    assert "neither PNG nor JPEG" in problem
    rows = pa.array([{"bytes": picture("TIFF"), "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pyarrow.parquet.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    (problem,) = privacy.problems_of_file(tmp_path / "a.parquet", "a.parquet", None)
    assert "column image: 1 pictures are neither" in problem


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
    ]
    bad = ["Ada", "ada.lovelace", "ada@x.org", "expert-ada", "grader Ada Lovelace", "Dr. B", "reader-1-ada", "rob"]
    grades = [Grade(str(name), "i", "a", "plausible", name) for name in good]
    assert privacy.problems_of_graders(grades) == []
    for name in bad:
        assert privacy.problems_of_graders([*grades, Grade("x", "i", "a", "plausible", name)]), name


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
