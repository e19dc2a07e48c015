"""Image sets in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from pathalign.images import ImageSet, contact_sheet, content_id, to_images, to_pixel_values
from pathalign.schema import InputError


def test_a_set_comes_back_from_disk_as_it_was(tiny_images: ImageSet, tmp_path: Path):
    columns = {"seed": list(range(48)), "reward": [index / 7 for index in range(48)], "kind": ["real"] * 48}
    kept = ImageSet.build(tiny_images.images, tiny_images.class_ids, tiny_images.class_names, columns)
    kept.save(tmp_path, "validation")
    loaded = ImageSet.load(tmp_path, "validation")
    assert torch.equal(loaded.images, kept.images)
    assert torch.equal(loaded.class_ids, kept.class_ids)
    assert loaded.class_names == kept.class_names
    assert loaded.image_ids == kept.image_ids
    assert loaded.columns == columns


def test_load_dataset_reads_what_save_wrote(tiny_images: ImageSet, tmp_path: Path):
    tiny_images.save(tmp_path / "set")
    table = datasets.load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))["train"]
    assert table.features["label"].names == ["a", "b", "c"]
    assert np.array_equal(np.asarray(table[5]["image"]), tiny_images.images[5].permute(1, 2, 0).numpy())


def test_an_id_depends_on_pixels_and_shape_and_on_nothing_else():
    image = torch.arange(48, dtype=torch.uint8).reshape(3, 4, 4)
    strided = torch.stack([image, image], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert content_id(strided) == content_id(image)
    changed = image.clone()
    changed[0, 0, 0] = 1
    assert len({content_id(image), content_id(changed), content_id(image.reshape(3, 2, 8))}) == 3


def test_a_missing_split_names_those_that_are_there(tiny_images: ImageSet, tmp_path: Path):
    tiny_images.save(tmp_path, "validation")
    with pytest.raises(InputError, match=r"has no data/train-.*; its splits are \['validation'\]"):
        ImageSet.load(tmp_path, "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="its splits are none"):
        ImageSet.load(tmp_path / "empty", "train")


def test_a_table_without_ids_is_refused(tmp_path: Path):
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"label": [0]}).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    with pytest.raises(InputError, match=r"lacks the columns \['image', 'image_id'\]"):
        ImageSet.load(tmp_path)


def test_a_name_that_is_neither_folder_nor_repo_is_refused():
    with pytest.raises(InputError, match="no folder here"):
        ImageSet.load("no/such/folder")


def test_pixel_values_and_images_are_each_others_inverse():
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    values = to_pixel_values(images)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(to_images(values), images)


def test_values_outside_are_clamped():
    assert to_images(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_select_takes_indices_and_masks_and_keeps_rows_together(tiny_images: ImageSet):
    numbered = ImageSet.build(
        tiny_images.images, tiny_images.class_ids, tiny_images.class_names, {"row": list(range(48))}
    )
    assert numbered.select([7, 2]).columns["row"] == [7, 2]
    of_b = numbered.select(numbered.class_ids == 1)
    assert of_b.labels() == ["b"] * 16
    assert of_b.image_ids == numbered.image_ids[1::3]
    assert len(numbered.select(torch.zeros(48, dtype=torch.bool))) == 0


def test_first_per_class_is_ordered_by_class(tiny_images: ImageSet):
    assert tiny_images.first_per_class(2).image_ids == tuple(tiny_images.image_ids[row] for row in (0, 3, 1, 4, 2, 5))


@pytest.mark.parametrize(("count", "rows"), [(6, 2), (7, 3)])
def test_a_contact_sheet_has_room_for_every_image(tiny_images: ImageSet, count: int, rows: int):
    sheet = contact_sheet(tiny_images.images[:count], columns=3, scale=2, gap_px=2)
    assert sheet.size == (3 * 34, rows * 34)
    red, green, blue = sheet.getpixel((10, 10))
    assert red > max(green, blue)  # image 0 is of class a
    assert sheet.getpixel((33, 33)) == (255, 255, 255)
