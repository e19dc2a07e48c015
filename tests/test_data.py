"""Importing images: every layout, every kind of pixel, and no near-duplicate on two sides of a split."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from pathalign import data, sources
from pathalign.images import ImageSet
from pathalign.near_duplicates import perceptual_hashes
from pathalign.schema import InputError, RunRecord
from pathalign.settings.data import DataConfig

COLOURS = {"cat": (220, 80, 80), "dog": (80, 220, 80), "fox": (80, 80, 220)}
ROLES = ("train", "validation", "test", "grader", "grader_validation", "judge", "judge_validation")


def picture(seed: int, colour: tuple[int, int, int] = (255, 255, 255), size: tuple[int, int] = (20, 20)) -> Image.Image:
    """Blocks of random brightness in a tint: pictures of two seeds are far apart in their perceptual hashes."""
    blocks = np.random.default_rng(seed).integers(40, 255, (8, 8), dtype=np.uint8)
    grey = np.asarray(Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST), dtype=float)
    return Image.fromarray((grey[..., None] * np.array(colour) / 255).astype(np.uint8))


def write_folder(root: Path, name: Callable[[str, int], str], per_class: int = 10, first_seed: int = 0) -> Path:
    """Pictures of three classes at `root / name(class, number)`."""
    for seed, (label, number) in enumerate(itertools.product(COLOURS, range(per_class)), first_seed):
        path = root / name(label, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, COLOURS[label]).save(path)
    return root


def class_folders(label: str, number: int) -> str:
    return f"{label}/{number:03}.png"


def prepared(source: Path | str, output: Path, **settings: Any) -> dict[str, ImageSet]:
    config = DataConfig(source=str(source), **{"image_size_px": 16, **settings})
    data.prepare(config, output)
    return {
        split: ImageSet.load(output, split)
        for split in ROLES
        if (output / f"data/{split}-00000-of-00001.parquet").exists()
    }


def report_of(output: Path) -> dict[str, Any]:
    return dict(json.loads((output / "data_report.json").read_text()))


def tint(image: torch.Tensor) -> int:
    return int(image.float().mean(dim=(1, 2)).argmax())


@pytest.mark.parametrize(
    "layout",
    [class_folders, lambda label, i: f"{label}_{i:03}.png", lambda label, i: f"{label}/patient {i % 2}/{i}.jpg"],
    ids=["folders", "flat names", "nested folders"],
)
def test_folder_layouts_keep_class_names_and_labels(tmp_path: Path, layout: Callable[[str, int], str]) -> None:
    found = prepared(write_folder(tmp_path / "in", layout), tmp_path / "out")
    assert {split: len(images) for split, images in found.items()} == {"train": 21, "validation": 3, "test": 6}
    for images in found.values():
        assert images.class_names == ("cat", "dog", "fox")
        assert images.images.shape[1:] == (3, 16, 16)
        assert [tint(image) for image in images.images] == images.class_ids.tolist()


@pytest.mark.parametrize("inner", ["{label}/{i}.png", "{label}_{i}.png"])
def test_splits_of_a_folder_are_respected(tmp_path: Path, inner: str) -> None:
    for number, (split, count) in enumerate({"train": 6, "val": 2, "Test": 3}.items()):
        write_folder(tmp_path / "in" / split, lambda label, i: inner.format(label=label, i=i), count, 1000 * number)
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert {split: len(images) for split, images in found.items()} == {"train": 18, "validation": 6, "test": 9}
    assert found["test"].class_names == ("cat", "dog", "fox")


def test_missing_splits_are_taken_from_the_training_split_only(tmp_path: Path) -> None:
    write_folder(tmp_path / "in/train", class_folders, 10)
    write_folder(tmp_path / "in/test", class_folders, 2, first_seed=500)
    found = prepared(tmp_path / "in", tmp_path / "out", validation_share=0.2)
    assert {split: len(images) for split, images in found.items()} == {"train": 24, "validation": 6, "test": 6}


def test_a_folder_beside_splits_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "in/train", class_folders, 2)
    write_folder(tmp_path / "in/extras", class_folders, 2, 100)
    with pytest.raises(InputError, match="extras"):
        prepared(tmp_path / "in", tmp_path / "out")


def table(count: int, label: Any, first_seed: int = 0, **columns: Any) -> datasets.Dataset:
    rows = {
        "image": [picture(first_seed + i, COLOURS[list(COLOURS)[i % 3]]) for i in range(count)],
        "label": [[2, 1, 0][i % 3] if not isinstance(label, list) else label[i % 3] for i in range(count)],
        **columns,
    }
    made = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    return made.cast_column("label", label) if isinstance(label, datasets.ClassLabel) else made


def test_parquet_keeps_the_order_of_its_class_names_and_its_plain_columns(tmp_path: Path) -> None:
    label = datasets.ClassLabel(names=["fox", "dog", "cat"])
    for number, (split, count) in enumerate({"train": 12, "validation": 6, "test": 6, "extra": 3}.items()):
        extra = {
            "shape": ["round"] * (count - 1) + [None],
            "area": [1.5] * count,
            "boxes": [[1, 2]] * count,
            "image_id": ["x"] * count,
        }
        part = table(count, label, 100 * number, **extra)
        (tmp_path / "in/data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / f"in/data/{split}-00000-of-00001.parquet")
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert {split: len(images) for split, images in found.items()} == {"train": 12, "validation": 6, "test": 6}
    train = found["train"]
    assert train.class_names == ("fox", "dog", "cat")
    assert [tint(image) for image in train.images] == [{"cat": 0, "dog": 1, "fox": 2}[name] for name in train.labels()]
    assert train.columns == {"shape": ["round"] * 11 + [""], "area": [1.5] * 12}
    left_out = report_of(tmp_path / "out")["left_out"]
    assert left_out["splits"] == ["extra-00000-of-00001"] and "boxes" in left_out["columns"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["cat", "dog", "fox"], ("cat", "dog", "fox")), ([10, 2, 1], ("class_1", "class_2", "class_10"))],
)
def test_one_parquet_file_with_text_or_number_labels(
    tmp_path: Path, labels: list[Any], expected: tuple[str, ...]
) -> None:
    table(30, labels).to_parquet(tmp_path / "cells.parquet")
    found = prepared(tmp_path / "cells.parquet", tmp_path / "out")
    assert found["train"].class_names == expected
    assert {split: len(images) for split, images in found.items()} == {"train": 21, "validation": 3, "test": 6}


def test_a_parquet_file_without_labels_is_refused_with_its_columns(tmp_path: Path) -> None:
    table(3, ["a", "b", "c"]).rename_column("label", "verdict").to_parquet(tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"`label`.*verdict"):
        prepared(tmp_path / "x.parquet", tmp_path / "out")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"broken\.parquet"):
        prepared(tmp_path / "broken.parquet", tmp_path / "out")


def test_a_hub_dataset_is_read_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = datasets.ClassLabel(names=["fox", "dog", "cat"])
    parts = datasets.DatasetDict({"train": table(24, label), "test": table(6, label, 100)})
    asked: list[Any] = []
    resolved = argument(resolved="c0ffee")
    monkeypatch.setattr("huggingface_hub.HfApi.resolve_revision", lambda self, repo, repo_type, revision: resolved)
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, revision: asked.append((repo, revision)) or parts)
    found = prepared("lab/cells", tmp_path / "out", revision="v1")
    assert asked == [("lab/cells", "c0ffee")]
    assert found["train"].class_names == ("fox", "dog", "cat")
    assert RunRecord.load(tmp_path / "out").inputs == {"source": "c0ffee"}


def argument(**values: Any) -> Any:
    return type("Argument", (), values)()


def test_hub_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing.*Check your connection, or give a folder"):
        prepared("nobody/nothing", tmp_path / "out")


@pytest.mark.parametrize("source", ["{}/pictres", "./nothing/at/all", "{}/file.txt"])
def test_a_missing_source_is_named(tmp_path: Path, source: str) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(InputError, match=r"no folder|one file") as caught:
        prepared(source.format(tmp_path), tmp_path / "out")
    assert "pictres" not in source or "Did you mean" in str(caught.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/readme.md").write_text("nothing")
    with pytest.raises(InputError, match="no images"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_unlabelled_images_are_refused_with_the_layouts_that_name_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", lambda label, i: f"{label}{i}.png")
    with pytest.raises(InputError, match=r"No image has a label.*class/image.png"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", lambda label, i: f"cells/{label}{i}.png")
    with pytest.raises(InputError, match="only one class, 'cells'"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_an_unknown_class_is_answered_with_the_nearest(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders)
    with pytest.raises(InputError, match=r"`dogg` is not known; did you mean `dog`\?"):
        prepared(tmp_path / "in", tmp_path / "out", classes=["cat", "dogg"])
    with pytest.raises(InputError, match="did you mean `monocyte`"):
        prepared("phantom", tmp_path / "out", classes=["monocite", "neutrophil"])


def test_chosen_classes_stand_in_the_order_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders)
    everything = prepared(tmp_path / "in", tmp_path / "all")
    chosen = prepared(tmp_path / "in", tmp_path / "some", classes=["fox", "cat"])
    assert chosen["train"].class_names == ("fox", "cat")
    expected = {
        i for i, name in zip(everything["train"].image_ids, everything["train"].labels(), strict=True) if name != "dog"
    }
    assert set(chosen["train"].image_ids) == expected


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders)
    with pytest.raises(InputError, match="no Hub dataset"):
        prepared(tmp_path / "in", tmp_path / "out", revision="v1")


def read_one(image: Image.Image | list[Image.Image], size: int = 16, **kind: Any) -> np.ndarray:
    images = image if isinstance(image, list) else [image]
    rows = [sources.Row(str(i), "a", None, lambda one=one: one) for i, one in enumerate(images)]
    reading = data.read_rows(rows, size)
    assert not reading.unreadable
    return reading.images


def test_grey_palette_and_bilevel_images_become_rgb() -> None:
    colour = picture(0, COLOURS["cat"])
    grey = colour.convert("L")
    np.testing.assert_array_equal(read_one(grey, 20)[0], np.asarray(grey)[..., None].repeat(3, axis=2))
    palette = colour.convert("P", palette=Image.Palette.ADAPTIVE)
    np.testing.assert_array_equal(read_one(palette, 20)[0], np.asarray(palette.convert("RGB")))
    assert set(np.unique(read_one(grey.convert("1"), 20))) == {0, 255}


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_transparency_shows_white(mode: str) -> None:
    image = Image.new("RGBA", (20, 20), (100, 100, 100, 0))
    image.paste((100, 100, 100, 255), (0, 0, 20, 10))
    image.paste((100, 100, 100, 51), (0, 10, 10, 20))
    result = read_one(image.convert(mode), 20)[0]
    assert result[3, 3].tolist() == [100] * 3
    assert result[15, 15].tolist() == [255] * 3
    assert result[15, 3].tolist() == [224] * 3  # 0.2 * 100 + 0.8 * 255


def test_a_transparent_palette_entry_shows_white(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (0, 0, 20, 10))
    image.save(tmp_path / "p.png", transparency=0)
    result = read_one(Image.open(tmp_path / "p.png"), 20)[0]
    assert result[3, 3].tolist() == [200, 100, 50] and result[15, 3].tolist() == [255] * 3


def deep(values: list[int]) -> Image.Image:
    return Image.fromarray(np.resize(np.array(values, dtype=np.uint16), (20, 20)))


def test_sixteen_bit_images_share_one_white_level(tmp_path: Path) -> None:
    full, dark = deep([0, 257, 65535, 32896]), deep([257 * 5])
    full.save(tmp_path / "full.png")
    assert Image.open(tmp_path / "full.png").mode == "I;16"
    result = read_one([Image.open(tmp_path / "full.png"), dark], 20)
    assert result[0, 0, :4, 0].tolist() == [0, 1, 255, 128]
    assert set(np.unique(result[1])) == {5}
    twelve_bits = read_one([deep([4095, 0]), deep([2048])], 20)
    assert twelve_bits[0, 0, :2, 0].tolist() == [255, 0] and set(np.unique(twelve_bits[1])) == {128}


def test_wide_images_are_cropped_to_the_middle_and_resized_by_lanczos() -> None:
    wide = picture(1, size=(60, 40))
    expected = wide.crop((10, 0, 50, 40)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read_one(wide)[0], np.asarray(expected))


def spoil(folder: Path) -> dict[str, str]:
    """Four files that cannot be used, and a word of the reason for each."""
    (folder / "cat/corrupt.png").write_bytes(b"not a picture")
    whole = (folder / "cat/000.png").read_bytes()
    (folder / "cat/truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dog/empty.png").write_bytes(b"")
    picture(0, size=(7, 30)).save(folder / "dog/tiny.png")
    return {"cat/corrupt.png": "identify", "cat/truncated.png": "", "dog/empty.png": "identify", "dog/tiny.png": "7x30"}


def test_a_few_bad_files_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = spoil(write_folder(tmp_path / "in", class_folders))
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert sum(map(len, found.values())) == 30
    report = report_of(tmp_path / "out")
    assert report["unreadable"] == 4 and set(report["unreadable_files"]) == set(bad)
    assert all(word in report["unreadable_files"][name] for name, word in bad.items())
    assert "Left out 4 of 34 images" in capsys.readouterr().err


def test_strict_refuses_bad_files_by_name_and_leaves_no_artefact(tmp_path: Path) -> None:
    bad = spoil(write_folder(tmp_path / "in", class_folders))
    with pytest.raises(InputError, match="4 of 34") as caught:
        prepared(tmp_path / "in", tmp_path / "out", strict=True)
    assert all(name in str(caught.value) for name in bad)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_mostly_corrupt_is_refused_with_ten_names(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 4)
    for number in range(14):
        (tmp_path / f"in/cat/bad{number}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"14 of 26 .*; and 4 more"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_near_duplicates_never_cross_splits_or_roles(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 40)
    for label, number in itertools.product(COLOURS, range(12)):
        original = Image.open(tmp_path / f"in/{label}/{number:03}.png")
        original.resize((30, 30), Image.Resampling.BICUBIC).save(tmp_path / f"in/{label}/copy{number}.jpg", quality=90)
    found = prepared(tmp_path / "in", tmp_path / "out", roles=True, per_class=9, validation_share=0.2)
    assert set(found) == set(ROLES)
    for one, other in itertools.combinations(ROLES, 2):
        left, right = (hashes_of(found[split]) for split in (one, other))
        assert int(np.bitwise_count(left[:, None] ^ right[None]).min()) > 4, (one, other)
    counted = report_of(tmp_path / "out")["near_duplicates"]
    assert counted["groups"] == 36 and counted["images"] == 72
    total = sum(map(len, found.values())) + counted["dropped_across_splits"]
    assert total == 156


def hashes_of(images: ImageSet) -> np.ndarray:
    return perceptual_hashes(Image.fromarray(array) for array in images.images.permute(0, 2, 3, 1).numpy())


def test_copies_in_several_splits_stay_in_the_one_that_training_sees_last(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        write_folder(tmp_path / "in" / split, class_folders, 5, 1000 * number)
    for split in ("train", "validation"):
        picture(2000, COLOURS["cat"]).save(tmp_path / f"in/{split}/cat/copy.png")  # the test split's first cat
    picture(1000, COLOURS["cat"]).save(tmp_path / "in/train/cat/copy2.png")  # the validation split's first cat
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert {split: len(images) for split, images in found.items()} == {"train": 15, "validation": 15, "test": 15}
    assert report_of(tmp_path / "out")["near_duplicates"]["dropped_across_splits"] == 3


def test_copies_under_two_class_names_are_all_dropped(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders)
    picture(0, COLOURS["cat"]).save(tmp_path / "in/dog/this_is_a_cat.png")
    found = prepared(tmp_path / "in", tmp_path / "out")
    assert sum(map(len, found.values())) == 29
    assert report_of(tmp_path / "out")["near_duplicates"]["dropped_across_classes"] == 2


def test_a_chain_of_near_duplicates_is_refused_before_it_swallows_the_data(tmp_path: Path) -> None:
    for number in range(30):
        write_folder(tmp_path / "in", lambda label, i, number=number: f"{label}/{number}_{i}.png", 1)
    with pytest.raises(InputError, match=r"near-duplicates.*near_duplicate_bits"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_splits_depend_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 20)
    first, again, other = (
        prepared(tmp_path / "in", tmp_path / f"out{i}", seed=seed) for i, seed in enumerate((0, 0, 1))
    )
    coarse = prepared(tmp_path / "in", tmp_path / "coarse", image_size_px=8)
    assert first["test"].image_ids == again["test"].image_ids != other["test"].image_ids
    assert coarse["test"].class_ids.tolist() == first["test"].class_ids.tolist()
    assert (tmp_path / "out0/data_report.json").read_bytes() == (tmp_path / "out1/data_report.json").read_bytes()


def test_roles_are_disjoint_and_of_the_sizes_asked_for(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 50)
    found = prepared(tmp_path / "in", tmp_path / "out", roles=True, per_class=12, validation_share=0.2)
    per_class = {split: np.bincount(images.class_ids).tolist() for split, images in found.items()}
    assert per_class == {
        "train": [12] * 3,
        "validation": [4] * 3,
        "test": [10] * 3,
        "grader": [9] * 3,
        "grader_validation": [3] * 3,
        "judge": [9] * 3,
        "judge_validation": [3] * 3,
    }
    ids = [image_id for images in found.values() for image_id in images.image_ids]
    assert len(ids) == len(set(ids)) == 150


def test_fewer_training_images_than_asked_for_is_refused_with_the_counts(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 10)
    with pytest.raises(
        InputError, match=r"at least 8 images of each class; it has cat 7, dog 7, fox 7\. Lower `per_class`"
    ):
        prepared(tmp_path / "in", tmp_path / "out", per_class=8)


def test_per_class_alone_leaves_the_other_splits_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 10)
    found = prepared(tmp_path / "in", tmp_path / "out", per_class=2)
    assert {split: len(images) for split, images in found.items()} == {"train": 6, "validation": 3, "test": 6}
    assert report_of(tmp_path / "out")["not_used"] == 15


def test_a_class_too_small_for_the_splits_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 10)
    for path in sorted((tmp_path / "in/fox").iterdir())[2:]:
        path.unlink()
    with pytest.raises(InputError, match=r"`train` needs at least 1 .* fox 0"):
        prepared(tmp_path / "in", tmp_path / "out")


def test_an_interrupted_run_leaves_no_splits_behind(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", class_folders, 10)
    (tmp_path / ".out.partial/data").mkdir(parents=True)
    (tmp_path / ".out.partial/data/judge-00000-of-00001.parquet").write_bytes(b"old")
    assert set(prepared(tmp_path / "in", tmp_path / "out")) == {"train", "validation", "test"}


def test_the_phantom_is_split_with_its_attributes(tmp_path: Path) -> None:
    found = prepared("phantom", tmp_path / "out", phantom_per_class=20, image_size_px=32)
    assert {split: len(images) for split, images in found.items()} == {"train": 70, "validation": 10, "test": 20}
    assert found["train"].class_names == ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")
    assert "nucleus_shape" in found["train"].columns


def test_real_cells_get_their_names_and_disjoint_roles(real_data: Path, tmp_path: Path) -> None:
    found = prepared(real_data, tmp_path / "out", roles=True, per_class=128, image_size_px=32)
    assert {split: len(images) for split, images in found.items()} == {
        "train": 640,
        "validation": 200,
        "test": 1500,
        "grader": 930,
        "grader_validation": 150,
        "judge": 930,
        "judge_validation": 150,
    }
    ids = [image_id for images in found.values() for image_id in images.image_ids]
    assert len(ids) == len(set(ids)) == 4500
    prefixes = {"basophil": "BA", "eosinophil": "EO", "lymphocyte": "LY", "monocyte": "MO"}
    for images in found.values():
        assert images.class_names == ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")
        for label, file_name in zip(images.labels(), images.columns["source_image"], strict=True):
            assert file_name.startswith(prefixes.get(label, ("BNE", "SNE", "NEUTROPHIL", "NE")))
