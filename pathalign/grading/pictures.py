"""Images as browsers get them: one encoder for all, whose bytes tell nothing but the pixels.

PNG without compression, so that the length depends on the image's size only, and without metadata. The lowest bit of
each value, which nobody can see, is drawn anew for each showing: a repeat has other bytes than the first look, and
what a camera or a network leaves in that bit is gone.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

CACHE_BYTES = 64 * 2**20


def png(pixels: np.ndarray) -> bytes:
    """PNG of pixels `(height, width, 3)`, uint8, uncompressed and without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def with_drawn_lowest_bits(pixels: np.ndarray, key: str) -> np.ndarray:
    """The same pixels, each value's lowest bit drawn at random from the seed `key`."""
    drawn = np.frombuffer(hashlib.shake_256(key.encode()).digest(-(-pixels.size // 8)), np.uint8)
    return (pixels & 0xFE) | np.unpackbits(drawn, count=pixels.size).reshape(pixels.shape)


def data_url(pixels: np.ndarray, key: str) -> str:
    """A picture as it is shown under `key`."""
    return png_url(png(with_drawn_lowest_bits(pixels, key)))


def png_url(content: bytes) -> str:
    """The bytes of a PNG as data URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def resized(pixels: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    """Pixels `(height, width, 3)` brought to a size as the `data` stage does it (Lanczos), if they have another."""
    if pixels.shape[:2] == (height_px, width_px):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width_px, height_px), Image.Resampling.LANCZOS))


class Pictures:
    """Encoded pictures, the latest ones kept. Thread-safe.

    Args:
        pixels: From an image id to pixels `(height, width, 3)`, uint8.
        cache_bytes: About how much memory the kept ones may take.
    """

    def __init__(self, pixels: Callable[[str], np.ndarray], example_id: str, cache_bytes: int = CACHE_BYTES) -> None:
        length = len(data_url(pixels(example_id), ""))
        self._encoded = lru_cache(max(1, cache_bytes // length))(lambda image_id, key: data_url(pixels(image_id), key))

    def url(self, image_id: str, key: str) -> str:
        """Data URL of an image as it is shown under `key`: always the same for the same key."""
        return self._encoded(image_id, key)
