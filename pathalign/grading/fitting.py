"""Fitting a simulated grader: classes and attributes of real cells, whole cells against malformed ones, typicality."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.covariance import LedoitWolf
from torch import Tensor

from pathalign.artefacts import artefact, fingerprint
from pathalign.augment import ORIENTATIONS, orient, random_exposure, random_orientations
from pathalign.grading.corruptions import corrupt
from pathalign.grading.simulated import BATCH_SIZE, SMALLEST_SIZE_PX, SimulatedGrader, acceptance
from pathalign.images import ImageSet
from pathalign.pinning import pinned
from pathalign.progress import Progress, say
from pathalign.schema import InputError, Rubric, RunRecord
from pathalign.settings.graders import GraderConfig


def fit(config: GraderConfig, output_dir: str | Path) -> RunRecord:
    """Fit a simulated grader on split `<role>` and calibrate typicality on `<role>_validation`.

    Raises:
        InputError: If a split or an attribute column of the checklist is missing, or a criterion names no attribute.
    """
    config = pinned(config)
    train = ImageSet.load(config.data, config.role)
    held_out = ImageSet.load(config.data, f"{config.role}_validation")
    rubric = Rubric.load(config.rubric)
    unbound = [criterion.name for criterion in rubric.criteria if criterion.attribute is None]
    if unbound:
        raise InputError(
            f"The criteria {unbound} of the checklist {rubric.name!r} have no `attribute`, so that they cannot be "
            "simulated; name the column of the data that each is about, or use another `rubric`."
        )
    names = sorted({str(criterion.attribute) for criterion in rubric.criteria})
    missing = [name for name in names if name not in train.columns]
    if missing:
        raise InputError(
            f"{config.data} lacks the attribute columns {missing} that the checklist {rubric.name!r} asks for; "
            "use data with these columns, or another `rubric`."
        )
    attributes = {name: sorted(set(train.columns[name])) for name in names}
    with artefact(output_dir) as folder:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + (1 if config.role == "grader" else 2))  # transformers initializes globally
            grader = SimulatedGrader(
                class_names=list(train.class_names),
                attributes=attributes,
                criteria=[asdict(criterion) for criterion in rubric.criteria],
                architecture=config.architecture,
                image_size_px=max(SMALLEST_SIZE_PX, train.image_size_px),
                rubric_version=f"{rubric.name} {rubric.version}",
            )
        _train(grader, train, config)
        _fit_typicality(grader.eval(), train, held_out, config)
        metrics = acceptance(grader, held_out, config.seed)
        say(
            f"{config.role}: accepts {metrics['accepts_real']:.1%} of unseen real images, "
            f"{metrics['accepts_mislabelled']:.1%} of mislabelled ones"
        )
        grader.save_pretrained(folder)
        record = RunRecord(
            stage="graders",
            config=asdict(config),
            inputs={"data": fingerprint(list(train.image_ids))},
            seeds={"seed": config.seed},
            metrics=metrics,
        )
        record.save(folder)
    return record


def _train(grader: SimulatedGrader, train: ImageSet, config: GraderConfig) -> None:
    """Cross-entropy of the class, of every attribute, and of real against malformed, on augmented images."""
    generator = torch.Generator().manual_seed(config.seed)
    members = [(train.class_ids == class_id).nonzero()[:, 0] for class_id in range(len(train.class_names))]
    pixel_values = train.pixel_values()
    targets = {
        name: torch.tensor([values.index(value) for value in train.columns[name]])
        for name, values in grader.attributes.items()
    }
    optimizer = torch.optim.AdamW(grader.parameters(), lr=config.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    grader.train()
    with Progress(f"fit {config.role}", config.steps) as progress:
        for _ in range(config.steps):
            index = torch.randint(0, len(train), (config.batch_size,), generator=generator)
            whole = random_orientations(pixel_values[index], generator)
            half = config.batch_size // 2
            partner = [
                int(members[label][torch.randint(len(members[label]), (), generator=generator)])
                for label in train.class_ids[index[:half]]
            ]
            malformed = corrupt(whole[:half], random_orientations(pixel_values[partner], generator), generator)
            class_logits, attribute_logits, pooled = grader(random_exposure(torch.cat([whole, malformed]), generator))
            loss = F.cross_entropy(class_logits[: config.batch_size], train.class_ids[index], label_smoothing=0.02)
            for name, logits in attribute_logits.items():
                loss = loss + F.cross_entropy(logits[: config.batch_size], targets[name][index]) / len(targets)
            is_whole = torch.cat([torch.ones(config.batch_size), torch.zeros(half)])
            loss = loss + F.binary_cross_entropy_with_logits(grader.structure(pooled), is_whole)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(loss=loss.item())


@torch.no_grad()
def _fit_typicality(grader: SimulatedGrader, train: ImageSet, held_out: ImageSet, config: GraderConfig) -> None:
    """Gaussian of the pooled features for each class (shrunk covariance), and the limits that unseen images set."""

    def pooled(images: ImageSet, orientation: int) -> Tensor:
        batches = orient(images.pixel_values(), orientation).split(BATCH_SIZE)
        return torch.cat([grader.features(batch)[1] for batch in batches])

    features = torch.cat([pooled(train, orientation) for orientation in range(0, ORIENTATIONS, 2)])
    class_ids = train.class_ids.repeat(ORIENTATIONS // 2)
    for class_id in range(len(grader.class_names)):
        own = features[class_ids == class_id].double()
        estimate = LedoitWolf().fit(own.numpy())
        values, vectors = np.linalg.eigh(estimate.covariance_)
        grader.feature_mean[class_id] = own.mean(0)
        grader.feature_whitening[class_id] = torch.from_numpy(vectors / np.sqrt(values))
    held_out_features = pooled(held_out, 0)
    unseen = grader.distances(held_out_features, held_out.class_ids)
    structure = grader.structure(held_out_features)
    below = torch.special.ndtri(torch.tensor(1 - config.structure_quantile))  # a few held-out images are no quantile
    grader.structure_limit.copy_(structure.mean() + below * structure.std())
    grader.typical_distance.copy_(unseen.quantile(config.typicality_quantile))
    grader.distance_spread.copy_(unseen.std())
