"""Random numbers that depend on where they are used, not on what was drawn before: a resumed run draws the same."""

from __future__ import annotations

import numpy as np
import torch


def seeded(*entropy: int) -> torch.Generator:
    """A CPU generator for a tuple of non-negative numbers: a seed, then a position such as a step or an epoch.

    Different tuples give unrelated streams. No state has to be saved for an exact resume, and every process of a
    distributed run can draw the whole global batch and take its part.
    """
    state = np.random.SeedSequence(entropy).generate_state(1)[0]  # torch uses 32 bits of a CPU generator's seed
    return torch.Generator().manual_seed(int(state))
