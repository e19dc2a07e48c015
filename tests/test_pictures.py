"""Pictures for the browser: one encoder, a length that only the size decides, and bytes of their own each time."""

from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pytest
from PIL import Image

from pathalign.data import _finish
from pathalign.grading.pictures import Pictures, data_url, png, resized, with_drawn_lowest_bits

SIZES = [(8, 8), (64, 64), (65, 63), (256, 256)]


def some(height: int, width: int) -> list[np.ndarray]:
    """A flat, a noisy and a smooth picture."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3).astype(np.uint8)
    return [np.zeros((height, width, 3), np.uint8), noise, ramp]


def chunks(content: bytes) -> list[bytes]:
    names, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        names.append(content[at + 4 : at + 8])
        at += length + 12
    return names


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_length_depends_on_the_size_only(height, width):
    lengths = {len(png(pixels)) for pixels in some(height, width)}
    lengths |= {len(png(with_drawn_lowest_bits(pixels, "key"))) for pixels in some(height, width)}
    assert len(lengths) == 1
    assert len({len(data_url(pixels, key)) for pixels in some(height, width) for key in ("a", "long key")}) == 1


def test_nothing_but_size_and_pixels_is_in_the_file():
    for pixels in some(64, 64):
        assert set(chunks(png(pixels))) == {b"IHDR", b"IDAT", b"IEND"}
        with Image.open(io.BytesIO(png(pixels))) as image:
            assert (image.mode, image.size, image.info) == ("RGB", (64, 64), {})
            assert np.array_equal(np.asarray(image), pixels)


def test_two_showings_differ_in_bytes_and_never_by_more_than_one_step():
    pixels = some(64, 64)[2]
    first, again, second = (with_drawn_lowest_bits(pixels, key) for key in ("first", "first", "second"))
    assert np.array_equal(first, again)
    assert 0.45 < (first != second).mean() < 0.55
    for shown in (first, second):
        assert np.abs(shown.astype(int) - pixels).max() == 1
        assert 0.45 < (shown & 1).mean() < 0.55


def test_a_data_url_holds_the_picture():
    pixels = some(8, 8)[1]
    head, _, content = data_url(pixels, "key").partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert np.array_equal(np.asarray(image) & 0xFE, pixels & 0xFE)


def test_real_images_are_resized_as_the_data_stage_does_it():
    pixels = some(65, 65)[1]
    expected, _ = _finish(Image.fromarray(pixels), 32)
    assert np.array_equal(resized(pixels, 32, 32), expected)
    assert resized(pixels, 65, 65) is pixels


def test_pictures_are_encoded_once_while_there_is_room():
    asked = []
    pictures = Pictures(lambda image_id: (asked.append(image_id), some(8, 8)[0])[1], "a", cache_bytes=10_000)
    urls = [pictures.url("a", "key"), pictures.url("a", "key")]
    assert urls[0] == urls[1] and asked == ["a", "a"]  # once to learn the length
    for number in range(100):
        pictures.url("b", str(number))
    pictures.url("a", "key")
    assert asked[-1] == "a"
