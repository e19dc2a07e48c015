"""Label-preserving changes of cell images: a cell has no up, and a smear no fixed exposure."""

from __future__ import annotations

import torch
from torch import Tensor

ORIENTATIONS = 8


def orient(pixel_values: Tensor, orientation: int) -> Tensor:
    """One of the eight flips and quarter turns of square images, shape `(..., size, size)`; 0 changes nothing."""
    flipped = pixel_values.flip(-1) if orientation >= 4 else pixel_values
    return torch.rot90(flipped, orientation % 4, (-2, -1))


def random_orientations(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Turn and flip each image of a batch `(n, channels, size, size)` at random; draws n numbers."""
    choice = torch.randint(0, ORIENTATIONS, (len(pixel_values),), generator=generator).to(pixel_values.device)
    result = pixel_values.clone()
    for orientation in range(1, ORIENTATIONS):
        chosen = choice == orientation
        result[chosen] = orient(pixel_values[chosen], orientation)
    return result


def random_shifts(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image of a batch `(n, channels, size, size)` by up to a sixteenth of its size, repeating its border."""
    count, _, size, _ = pixel_values.shape
    reach = max(1, size // 16)
    shifts = torch.randint(-reach, reach + 1, (2, count, 1), generator=generator)
    rows, columns = ((torch.arange(size) + shift).clamp(0, size - 1).to(pixel_values.device) for shift in shifts)
    images = torch.arange(count, device=pixel_values.device)[:, None, None]
    moved = pixel_values.movedim(1, -1)[images, rows[:, :, None], columns[:, None, :]]
    return moved.movedim(-1, 1)


def random_exposure(pixel_values: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Vary contrast, brightness, colour balance, position (by a few pixels) and sensor noise of a batch in [-1, 1].

    `strength` 1 is about what differs between smears of one laboratory.
    """
    count, channels, size, _ = pixel_values.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(pixel_values) * strength

    result = pixel_values * (1 + 0.1 * normal(count, 1, 1, 1))
    result = result + 0.08 * normal(count, 1, 1, 1) + 0.03 * normal(count, channels, 1, 1)
    reach = max(1, size // 16)
    shift = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return torch.roll(result, shift, (2, 3)) + 0.02 * normal(*pixel_values.shape)
