"""The images of a study: what is graded, the hidden real controls among them, and the pictures beside them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from pathalign.grading.pictures import resized
from pathalign.grading.study import Study
from pathalign.images import ImageSet
from pathalign.ratings import REAL_CONTROL
from pathalign.schema import InputError, unknown_name

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Catalogue:
    """Images of one size, by their content ids.

    Attributes:
        images: Candidates with their columns, then controls, no image twice; the column `kind` tells which it is
            (`synthetic` or `real control`), and a control's class is the true one.
        references: Real images to show beside them; none is a control.
    """

    images: ImageSet
    references: ImageSet

    @classmethod
    def load(cls, study: Study) -> Catalogue:
        """Read the images of a study.

        Raises:
            InputError: If images are missing or an image stands under two classes, if the study describes classes that
                do not occur, or if there are no real images for controls.
        """
        found = ImageSet.load(study.candidates, revision=study.candidates_revision)
        candidates = _without_copies(found, study.candidates)
        columns = {**candidates.columns, "kind": [SYNTHETIC] * len(candidates)}
        candidates = replace(candidates, columns=columns)
        if unknown := [name for name in study.classes or {} if name not in candidates.class_names]:
            raise InputError(
                " ".join(unknown_name("candidate class", name, candidates.class_names) for name in unknown)
            )
        references, controls = _real_images(study, candidates)
        if study.real_control_share and not len(controls):
            raise InputError(
                f"{study.references} has no image left for hidden controls after {study.references_per_class} "
                "references a class; give more real images, lower `references_per_class`, or set "
                "`real_control_share: 0`."
            )
        return cls(_joined(candidates, controls), references)

    @cached_property
    def labels(self) -> dict[str, str]:
        """Image id -> class that the image claims to show."""
        return dict(zip(self.images.image_ids, self.images.labels(), strict=True))

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Image id -> `synthetic` or `real control`. For the server only."""
        return dict(zip(self.images.image_ids, self.images.columns["kind"], strict=True))

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """Ids of the images to grade."""
        return tuple(image_id for image_id, kind in self.kinds.items() if kind == SYNTHETIC)

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Ids of the hidden real images."""
        return tuple(image_id for image_id, kind in self.kinds.items() if kind == REAL_CONTROL)

    def pixels(self, image_id: str) -> np.ndarray:
        """Shape `(height, width, 3)`, uint8."""
        return np.ascontiguousarray(self.images.images[self._places[image_id]].permute(1, 2, 0).numpy())

    def reference_pixels(self) -> Iterator[tuple[str, np.ndarray]]:
        """Class and pixels of each reference picture."""
        yield from zip(self.references.labels(), self.references.images.permute(0, 2, 3, 1).numpy(), strict=True)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {image_id: place for place, image_id in enumerate(self.images.image_ids)}


def _without_copies(images: ImageSet, source: str) -> ImageSet:
    """The first of equal images.

    Raises:
        InputError: If there is no image, or one of them has two classes.
    """
    if not len(images):
        raise InputError(f"{source} holds no images; make some with `pathalign generate`.")
    first: dict[str, int] = {}
    for place, image_id in enumerate(images.image_ids):
        if images.class_ids[first.setdefault(image_id, place)] != images.class_ids[place]:
            raise InputError(f"{source} has image {image_id} under two classes; take it out.")
    return images.select(list(first.values()))


def _real_images(study: Study, candidates: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Reference pictures and controls: shuffled within each class, the first ones are the references."""
    nothing = candidates.select([])
    if study.references is None:
        return nothing, nothing
    found = ImageSet.load(study.references, study.references_split, study.references_revision)
    rows = [row for row, label in enumerate(found.labels()) if label in candidates.class_names]
    if not rows:
        raise InputError(
            f"{study.references} knows the classes {list(found.class_names)}, none of the candidates' "
            f"{list(candidates.class_names)}; give real images of the same classes."
        )
    found = found.select(rows)
    real = ImageSet.build(
        _in_size(found.images, candidates.image_size_px),
        torch.tensor([candidates.class_names.index(label) for label in found.labels()]),
        candidates.class_names,
        {"kind": [REAL_CONTROL] * len(found)},
    )
    real = _without_copies(real, study.references)
    graded = set(candidates.image_ids)
    order = [row for row in range(len(real)) if real.image_ids[row] not in graded]
    random.Random(f"{study.seed}|references").shuffle(order)
    shown: list[int] = []
    for class_id in range(len(real.class_names)):
        shown += [row for row in order if real.class_ids[row] == class_id][: study.references_per_class]
    hidden = sorted(set(order) - set(shown)) if study.real_control_share else []
    return real.select(shown), real.select(hidden)


def _in_size(images: torch.Tensor, size_px: int) -> torch.Tensor:
    """Images `(n, 3, height, width)` brought to one size."""
    arrays = [resized(array, size_px, size_px) for array in images.permute(0, 2, 3, 1).numpy()]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def _joined(candidates: ImageSet, controls: ImageSet) -> ImageSet:
    """One set; what is only known of candidates, such as their seeds, is None for controls."""
    unknown = [None] * len(controls)
    return ImageSet(
        images=torch.cat([candidates.images, controls.images]),
        class_ids=torch.cat([candidates.class_ids, controls.class_ids]),
        class_names=candidates.class_names,
        image_ids=candidates.image_ids + controls.image_ids,
        columns={name: values + controls.columns.get(name, unknown) for name, values in candidates.columns.items()},
    )
