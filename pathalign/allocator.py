"""How the C library's allocator treats memory that tensors on the CPU have given back."""

from __future__ import annotations

import ctypes
import sys

# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30  # of free memory at the end of the heap
LARGEST_KEPT_BYTES = 2**28  # larger blocks go back to the system at once, so that they tear no holes


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed for what is allocated next. Returns whether it is glibc and did as told.

    By default blocks of some megabytes, such as activations, go back to the system each time, which hands them out
    again page by page, filled with zeros: of the time to draw fifty images at once that was a fifth at 32 pixels, and
    two fifths at 64 (`tests/benchmarks/allocator.py`). The setting is the process's own: commands make it, the library
    does not.
    """
    if not sys.platform.startswith("linux"):
        return False
    c_library = ctypes.CDLL(None)
    if not hasattr(c_library, "gnu_get_libc_version"):
        return False
    by_size = c_library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    return bool(by_size and c_library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
