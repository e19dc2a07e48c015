"""What the allocator keeps, by the pages that the system has to hand out."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
import torch
from pathalign.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(50):
    if round == 10:
        before = faults()
    torch.ones(10 * 2**20)  # 40 MB
print(faults() - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_freed_activations_are_used_again_instead_of_given_back():
    pages = 40 * 40 * 2**20 // 4096
    kept, given_back = faults("keep"), faults("default")
    assert kept < 0.05 * pages
    assert given_back > 0.5 * pages
