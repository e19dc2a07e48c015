"""Malformed cells made from real ones: what a simulated grader learns to refuse, without seeing any generated image.

Outlier exposure (arXiv:1812.04606) with local corruptions (CutPaste, arXiv:2104.04015): a network that must tell real
cells from cells with torn outlines, mixed nuclei or blotched texture has to look at structure.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def corrupt(pixel_values: Tensor, partners: Tensor, generator: torch.Generator) -> Tensor:
    """Malform each image in one way, drawn at random.

    Args:
        pixel_values: Shape `(n, 3, size, size)`, in [-1, 1].
        partners: Same shape: another image of the same class for each one.
        generator: Source of all randomness, on the CPU.

    Returns:
        Same shape. A share of a quarter each: warped, from bent to ragged; blended with the partner; patched with parts
        of the partner; or overlaid with blotches.
    """
    ways = (
        _warp(pixel_values, generator),
        _blend(pixel_values, partners, generator),
        _patch(pixel_values, partners, generator),
        _blotch(pixel_values, generator),
    )
    choice = torch.randint(0, len(ways), (len(pixel_values),), generator=generator)
    return torch.stack(ways)[choice, torch.arange(len(pixel_values))]


def _uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand((count, 1, 1, 1), generator=generator)


def _smooth_noise(count: int, channels: int, size: int, cells: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn((count, channels, cells, cells), generator=generator)
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)


def _warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Elastic deformation: from a bent cell (waves of six pixels at 32 px) to a ragged outline (waves of two)."""
    count, _, size, _ = images.shape
    straight = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), list(images.shape), align_corners=False)
    fields = torch.stack([_smooth_noise(count, 2, size, cells, generator) / cells for cells in (5, 8, 13)])
    choice = torch.randint(0, len(fields), (count,), generator=generator)
    shift = fields[choice, torch.arange(count)] * _uniform(count, 0.8, 2.0, generator)
    return F.grid_sample(images, straight + shift.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False)


def _blend(images: Tensor, partners: Tensor, generator: torch.Generator) -> Tensor:
    share = _uniform(len(images), 0.4, 0.5, generator)
    return (1 - share) * images + share * partners


def _patch(images: Tensor, partners: Tensor, generator: torch.Generator) -> Tensor:
    """Parts of the partner inside random blobs with soft edges."""
    mask = (8 * _smooth_noise(len(images), 1, images.shape[-1], 4, generator)).sigmoid()
    return mask * images + (1 - mask) * partners


def _blotch(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blotches of light, dark and colour a few pixels wide."""
    count, channels, size, _ = images.shape
    grey = _smooth_noise(count, 1, size, 12, generator)
    colour = _smooth_noise(count, channels, size, 12, generator)
    return images + _uniform(count, 0.2, 0.4, generator) * (grey + 0.5 * colour)
