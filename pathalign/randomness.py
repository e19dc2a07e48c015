"""Random numbers that depend on where they are used, not on what was drawn before: a resumed run draws the same."""

from __future__ import annotations

import numpy as np
import torch


def seeded(seed: int, *position: int) -> torch.Generator:
    """A CPU generator for a seed and a position, such as a step or an epoch; all numbers are at least 0.

    Different positions give unrelated streams. No state has to be saved for an exact resume, and every process of a
    distributed run can draw the whole global batch and take its part.
    """
    sequence = np.random.SeedSequence(seed, spawn_key=position)
    (state,) = sequence.generate_state(1)  # 32 bits: torch's CPU generators use no more of a seed
    return torch.Generator().manual_seed(int(state))
