"""Real images become labelled splits of one size: read, checked, and dealt to those who may see them.

What cannot be read is left out and listed in `data_report.json`. Near-duplicates never stand on two sides of a split
or in two roles.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from pathalign.artefacts import artefact
from pathalign.images import ImageSet
from pathalign.near_duplicates import near_duplicate_groups, perceptual_hashes
from pathalign.progress import say, track
from pathalign.schema import InputError, RunRecord
from pathalign.settings.data import DataConfig
from pathalign.sources import Row, chosen_classes, find_rows

REPORT_NAME = "data_report.json"
SMALLEST_SIDE_PX = 8
KEPT_FIRST = ("test", "validation", "train")  # of copies in several splits, the one that training sees last stays
LARGEST_GROUP_SHARE, LARGEST_GROUP = 0.1, 20  # a larger group of near-duplicates is a chain, or a source full of copies
VALIDATION_SHARES = {"validation": 0.4, "grader_validation": 0.3}  # base, grader; the rest is the judge's
# What stands in place of a split for images that are in none.
COPY, CONTRADICTION, NOT_USED = "copy in another split", "copy of another class", "beyond per_class"


@dataclasses.dataclass
class Reading:
    """The rows that could be read, shapes `(n, ...)`, and the names of the others with the reason."""

    rows: list[Row]
    images: np.ndarray  # (n, size, size, 3), uint8
    hashes: np.ndarray  # (n,), uint64, of the images in source resolution
    unreadable: dict[str, str]


def prepare(config: DataConfig, output_dir: str | Path) -> RunRecord:
    """Import labelled images: one `ImageSet` for each split and role, `data_report.json` and `run.json`.

    Raises:
        InputError: If the source is missing, empty, unlabelled, mostly unreadable (with `strict`: at all), or too small
            for what is asked of it.
    """
    source = find_rows(config)
    names = chosen_classes(config.classes, source.class_names)
    rows = [row for row in source.rows if row.label is None or row.label in names]
    with artefact(output_dir) as folder:
        shutil.rmtree(folder / "data", ignore_errors=True)  # an interrupted run may have left splits of another config
        reading = read_rows(rows, config.image_size_px)
        _check_readable(reading, len(rows), config.strict)
        class_ids = np.array([names.index(str(row.label)) for row in reading.rows])
        groups = near_duplicate_groups(reading.hashes, config.near_duplicate_bits)
        _check_groups(groups, config.near_duplicate_bits)
        splits = assign_splits([row.split for row in reading.rows], class_ids, groups, names, config)
        found = {
            "counts": _save_splits(reading, class_ids, splits, names, _wanted_splits(config), folder),
            "near_duplicates": _near_duplicates(groups, splits, config.near_duplicate_bits),
            "not_used": int((splits == NOT_USED).sum()),
            "unreadable": len(reading.unreadable),
        }
        report = {
            "source": config.source,
            "revision": source.revision,
            "class_names": list(names),
            **found,
            "unreadable_files": reading.unreadable,
            "left_out": source.left_out,
        }
        (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
        record = RunRecord(
            stage="data",
            config=dataclasses.asdict(config),
            inputs={"source": source.revision},
            seeds={"seed": config.seed},
            metrics=found,
        )
        record.save(folder)
    return record


def read_rows(rows: Sequence[Row], image_size_px: int) -> Reading:
    """Read, crop to the central square, and resize (Lanczos) all rows; what fails is named with its reason.

    16-bit images are scaled by one white level for the whole source, the smallest of 8, 10, 12, 14 or 16 bits that
    holds all of them: cameras write 12 bits into 16, and a level for each image would change how images compare.
    """
    done: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    peaks: dict[int, int] = {}
    unreadable: dict[str, str] = {}
    for index, row in enumerate(track(rows, "Reading images", len(rows), unit="image")):
        try:
            if row.label is None:
                raise InputError("no class label")
            image = _square(row.open())
            if image.mode.startswith("I"):
                peaks[index] = int(np.asarray(image).max())
            else:
                done[index] = _finish(_rgb(image, 255), image_size_px)
        except Exception as error:  # Pillow's readers raise nearly anything on broken files
            unreadable[row.name] = str(error) or type(error).__name__
    white = next((2**bits - 1 for bits in (8, 10, 12, 14, 16) if max(peaks.values(), default=0) < 2**bits), 0)
    for index in peaks:
        done[index] = _finish(_rgb(_square(rows[index].open()), white), image_size_px)
    order = sorted(done)
    return Reading(
        rows=[rows[index] for index in order],
        images=np.stack([done[index][0] for index in order]) if order else np.empty((0, 1, 1, 3), np.uint8),
        hashes=np.concatenate([done[index][1] for index in order]) if order else np.empty(0, np.uint64),
        unreadable=unreadable,
    )


def _square(image: Image.Image) -> Image.Image:
    """The central square of an image, upright as its EXIF data says."""
    image = ImageOps.exif_transpose(image)
    side = min(image.size)
    if side < SMALLEST_SIDE_PX:
        raise InputError(f"{image.width}x{image.height} pixels, less than {SMALLEST_SIDE_PX} on a side")
    if image.mode == "F" or (image.mode == "I" and not 0 <= np.asarray(image).min() <= np.asarray(image).max() < 2**16):
        raise InputError("pixel values of more than 16 bits, or fractions; save it with 8 or 16 bits")
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _rgb(image: Image.Image, white: int) -> Image.Image:
    """8-bit RGB: in 16-bit images `white` becomes 255, and what is transparent shows a white ground."""
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64) * (255 / white)
        image = Image.fromarray(np.rint(values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _finish(image: Image.Image, size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)), perceptual_hashes([image])


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns without gaps, so that their type is one in all splits: missing text is empty, a missing number NaN."""
    columns: dict[str, list[Any]] = {}
    for name in rows[0].columns:
        values = [row.columns[name] for row in rows]
        if None in values:
            if any(isinstance(value, str) for value in values):
                values = [value or "" for value in values]
            else:
                values = [float("nan") if value is None else float(value) for value in values]
        columns[name] = values
    return columns


def _check_readable(reading: Reading, n_rows: int, strict: bool) -> None:
    bad = reading.unreadable
    if not bad:
        return
    listed = "; ".join(f"{name} ({reason})" for name, reason in list(bad.items())[:10])
    listed += f"; and {len(bad) - 10} more" if len(bad) > 10 else ""
    if strict or len(bad) * 2 > n_rows:
        advice = "Repair or remove them" + (", or leave out `strict` to go on without them." if strict else ".")
        raise InputError(f"{len(bad)} of {n_rows} images cannot be used: {listed}. {advice}")
    say(f"Left out {len(bad)} of {n_rows} images, see {REPORT_NAME}: {listed}")


def _check_groups(groups: np.ndarray, bits: int) -> None:
    largest, limit = np.bincount(groups).max(), max(LARGEST_GROUP, LARGEST_GROUP_SHARE * len(groups))
    if largest > limit:
        advice = f"Lower `near_duplicate_bits` (now {bits})" if bits else "Remove the copies"
        raise InputError(
            f"{largest} of {len(groups)} images are linked as near-duplicates, too many to split. {advice}."
        )


def assign_splits(
    given: Sequence[str | None],
    class_ids: np.ndarray,
    groups: np.ndarray,
    class_names: Sequence[str],
    config: DataConfig,
) -> np.ndarray:
    """Say for each image which split or role it belongs to; images of one group never come into two.

    Args:
        given: Split of each image in the source, `train`, `validation`, `test` or None.
        class_ids: Shape `(n,)`, indices into `class_names`.
        groups: Shape `(n,)`, number of the group of near-duplicates that each image is in.
        class_names: Names of all classes; the seeded order of a class depends on its name, not on the other classes.
        config: Shares, roles, counts and seed.

    Returns:
        Shape `(n,)`, names of splits, or `COPY` or `NOT_USED` for images that are in none.

    Raises:
        InputError: If a class has too few images, with the counts.
    """
    present = {split for split in given if split}
    if present and "train" not in present and len(present) > 1:
        raise InputError(f"The source has the splits {sorted(present)} and no `train`; add or rename one.")
    made = {"test": config.test_share, "validation": config.validation_share}
    if "train" in present:
        made = {split: share for split, share in made.items() if split not in present}
        splits = np.array([split or "train" for split in given], dtype=object)
    else:
        splits = np.full(len(given), "train", dtype=object)
    _drop_copies(splits, class_ids, groups)
    deal = _Deal(splits, class_ids, groups, class_names, config.seed)
    deal.by_share("train", made, rest="train")
    if config.per_class:
        deal.require("train", config.per_class, "Lower `per_class`, or add images.")
        deal.exactly("train", config.per_class, rest="spare" if config.roles else NOT_USED)
    for text in config.rare:
        class_name, _, count = text.rpartition("=")
        deal.keep("train", class_name, int(count))
    if config.roles:
        deal.by_share("spare", {"grader": 0.5}, rest="judge")
        deal.by_share("validation", VALIDATION_SHARES, rest="judge_validation")
    for split in _wanted_splits(config):
        deal.require(split, 1, "Add images, lower `per_class`, or leave the class out with `classes`.")
    return splits


def _wanted_splits(config: DataConfig) -> list[str]:
    roles = ["grader", "grader_validation", "judge", "judge_validation"] if config.roles else []
    return ["train", "validation", "test", *roles]


def _drop_copies(splits: np.ndarray, class_ids: np.ndarray, groups: np.ndarray) -> None:
    """Of near-duplicates in several splits keep those of one; of near-duplicates of several classes keep none."""
    sizes = np.bincount(groups)
    for group in np.flatnonzero(sizes > 1):
        members = np.flatnonzero(groups == group)
        if len(set(class_ids[members])) > 1:
            splits[members] = CONTRADICTION
        else:
            kept = next(split for split in KEPT_FIRST if split in splits[members])
            splits[members[splits[members] != kept]] = COPY


@dataclasses.dataclass
class _Deal:
    """Moves images from one split to others, class by class, in seeded order, whole groups at a time."""

    splits: np.ndarray
    class_ids: np.ndarray
    groups: np.ndarray
    class_names: Sequence[str]
    seed: int

    def by_share(self, split: str, shares: Mapping[str, float], rest: str) -> None:
        """Give each name its share of every class of `split`, at least one image; what is left is called `rest`."""
        for class_groups in self._shuffled(split):
            count = sum(map(len, class_groups))
            left = {name: max(1, round(share * count)) for name, share in shares.items()}
            for members in class_groups:
                name = next((name for name, room in left.items() if room >= len(members)), None)
                self.splits[members] = name or rest
                if name:
                    left[name] -= len(members)

    def exactly(self, split: str, count: int, rest: str) -> None:
        """Keep `count` images of every class in `split`, others become `rest`; a group that is cut loses its tail."""
        for class_groups in self._shuffled(split):
            room = count
            for members in class_groups:
                self.splits[members] = COPY if room else rest
                self.splits[members[:room]] = split
                room -= len(members[:room])

    def keep(self, split: str, class_name: str, count: int) -> None:
        """Keep `count` images of one class in `split`; the others are not used at all."""
        if class_name not in self.class_names:
            raise InputError(f"`rare` names the class {class_name!r}; the data has {list(self.class_names)}.")
        members = self._shuffled(split)[list(self.class_names).index(class_name)]
        self.splits[np.concatenate(members)[count:]] = NOT_USED

    def require(self, split: str, minimum: int, advice: str) -> None:
        """Refuse a `split` with less than `minimum` images of a class."""
        found = np.bincount(self.class_ids[self.splits == split], minlength=len(self.class_names)).tolist()
        if min(found) < minimum:
            counts = _text(dict(zip(self.class_names, found, strict=True)))
            raise InputError(f"`{split}` needs at least {minimum} images of each class; it has {counts}. {advice}")

    def _shuffled(self, split: str) -> list[list[np.ndarray]]:
        """For each class, the row numbers of each of its groups in `split`."""
        result = []
        for class_id, class_name in enumerate(self.class_names):
            rows = np.flatnonzero((self.splits == split) & (self.class_ids == class_id))
            generator = np.random.default_rng([self.seed, zlib.crc32(f"{split}/{class_name}".encode())])
            members: dict[int, list[int]] = {}
            for row in rows.tolist():
                members.setdefault(int(self.groups[row]), []).append(row)
            each = [np.array(group) for group in members.values()]
            result.append([each[index] for index in generator.permutation(len(each))])
        return result


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _save_splits(
    reading: Reading,
    class_ids: np.ndarray,
    splits: np.ndarray,
    names: Sequence[str],
    wanted: Sequence[str],
    folder: Path,
) -> dict[str, dict[str, int]]:
    """Write the wanted splits and return how many images of each class they hold."""
    pixels = torch.from_numpy(reading.images).permute(0, 3, 1, 2).contiguous()
    images = ImageSet.build(pixels, torch.from_numpy(class_ids), names, _columns(reading.rows))
    counts = {}
    for split in wanted:
        part = images.select(torch.from_numpy(splits == split))
        part.save(folder, split)
        per_class = Counter(part.labels())
        counts[split] = {name: per_class[name] for name in names}
        say(f"{split}: {len(part)} images ({_text(counts[split])})")
    return counts


def _near_duplicates(groups: np.ndarray, splits: np.ndarray, bits: int) -> dict[str, int]:
    sizes = np.bincount(groups)
    found = {
        "bits": bits,
        "groups": int((sizes > 1).sum()),
        "images": int(sizes[sizes > 1].sum()),
        "dropped_across_splits": int((splits == COPY).sum()),
        "dropped_across_classes": int((splits == CONTRADICTION).sum()),
    }
    if found["groups"]:
        dropped = found["dropped_across_splits"] + found["dropped_across_classes"]
        say(f"{found['images']} images are near-duplicates in {found['groups']} groups; {dropped} of them dropped.")
    return found
