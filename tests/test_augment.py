"""Flips, turns and exposure."""

from __future__ import annotations

import torch

from pathalign.augment import ORIENTATIONS, orient, random_exposure, random_orientations, random_shifts
from pathalign.images import ImageSet


def test_the_eight_orientations_differ_and_any_two_in_a_row_are_one_of_them():
    image = torch.arange(9).reshape(1, 3, 3)
    seen = {tuple(orient(image, index).flatten().tolist()) for index in range(ORIENTATIONS)}
    twice = {
        tuple(orient(orient(image, first), second).flatten().tolist())
        for first in range(ORIENTATIONS)
        for second in range(ORIENTATIONS)
    }
    assert len(seen) == 8
    assert twice == seen


def test_orientation_0_changes_nothing():
    image = torch.arange(16).reshape(1, 4, 4)
    assert torch.equal(orient(image, 0), image)


def test_random_orientations_move_pixels_and_change_none(tiny_images: ImageSet):
    pixels = tiny_images.pixel_values()
    before = pixels.clone()
    turned = random_orientations(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(pixels, before)
    assert torch.equal(turned.flatten(2).sort().values, pixels.flatten(2).sort().values)
    assert not torch.equal(turned, pixels)


def test_random_orientations_use_all_eight_about_equally():
    image = torch.arange(9.0).reshape(1, 1, 3, 3)
    turned = random_orientations(image.repeat(4000, 1, 1, 1), torch.Generator().manual_seed(0))
    counts = turned.flatten(1).unique(dim=0, return_counts=True)[1]
    assert len(counts) == 8
    assert ((counts - 500).abs() < 100).all()  # 4.8 standard deviations of a binomial


def test_exposure_is_fixed_by_its_generator_and_scaled_by_its_strength(tiny_images: ImageSet):
    pixels = tiny_images.pixel_values()
    once, again, other = (random_exposure(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert once.shape == pixels.shape
    unchanged = random_exposure(pixels, torch.Generator().manual_seed(0), strength=0.0)
    assert torch.equal(unchanged.flatten(2).sort().values, pixels.flatten(2).sort().values)  # shifted only


def test_shifts_move_each_image_by_its_own_few_pixels_and_repeat_the_border():
    size, count = 32, 400
    image = torch.arange(float(size * size)).view(1, 1, size, size).expand(count, 3, size, size)
    moved = random_shifts(image, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    seen = set()
    for one in moved:
        down, right = divmod(int(one[0, 16, 16]) - (16 * size + 16) + 2 * size + 2, size)  # 0 to 4 means -2 to 2
        rows = (torch.arange(size) + down - 2).clamp(0, size - 1)
        columns = (torch.arange(size) + right - 2).clamp(0, size - 1)
        assert torch.equal(one, image[0, :, rows][:, :, columns])
        seen.add((down, right))
    assert seen == {(down, right) for down in range(5) for right in range(5)}


def test_shifts_are_differentiable_and_fixed_by_their_generator():
    pixels = torch.rand(2, 3, 16, 16, dtype=torch.float64).requires_grad_()
    moved = [random_shifts(pixels, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*moved)
    assert torch.autograd.gradcheck(lambda x: random_shifts(x, torch.Generator().manual_seed(3)), pixels)
