"""The measure of new clinical concepts: are generated images of the subtype that they were asked for?

A *subtype judge* answers, a network from scratch on real cells of the split class that neither base model, marks nor
the classifier of the marks have seen: the splits `judge` and `judge_validation` and every second test image, with the
attribute of the other classes' cells as a help. How often it is right on the other test images stands beside all that
it says, and bounds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from pathalign.artefacts import fingerprint, write_atomically
from pathalign.augment import ORIENTATIONS, orient, random_exposure, random_orientations, random_shifts
from pathalign.evaluate.alignment import ask
from pathalign.experiments.measures import Figure, Place, evaluation, last_round, proportion
from pathalign.generate import generate
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet, to_pixel_values
from pathalign.progress import Progress
from pathalign.reward.encoders import convnet
from pathalign.schema import RunRecord
from pathalign.settings.generate import GenerateConfig
from pathalign.settings.subtypes import SubtypeRule, subtype_of, subtype_rule

CHANNELS = (24, 48, 96, 192)
JUDGE_STEPS = 800
SUBTYPE_BATCH = 16  # images of each subtype, and of all classes, in a step
LEARNING_RATE = 2e-3
FIRST_SEED = 900_000  # of these images; candidates come as far in the ninth round only


@dataclass(frozen=True)
class Split:
    """The class that is split, and the rules by which the experts' attribute makes its subtypes."""

    rules: tuple[SubtypeRule, ...]

    @property
    def parent(self) -> str:
        """Class that is split."""
        return self.rules[0].class_name

    @property
    def attribute(self) -> str:
        """Column of the data that the rules are about."""
        return self.rules[0].attribute

    @property
    def names(self) -> list[str]:
        """Subtypes in their order."""
        return [rule.subtype for rule in self.rules]

    def ids(self, images: ImageSet) -> Tensor:
        """Index of each image's subtype, -1 for other classes and values. Shape `(n,)`, int64."""
        values = zip(images.labels(), images.columns[self.attribute], strict=True)
        found = [subtype_of(self.rules, label, {self.attribute: value}) for label, value in values]
        return torch.tensor([self.names.index(name) if name else -1 for name in found])


class SubtypeJudge(nn.Module):
    """Logits of the subtypes `(n, subtypes)`; those of all classes' attribute `(n, values)` help in training only."""

    def __init__(self, subtypes: int, values: int) -> None:
        super().__init__()
        self.network, self.dropout = convnet(CHANNELS), nn.Dropout(0.3)
        self.subtype, self.attribute = nn.Linear(CHANNELS[-1], subtypes), nn.Linear(CHANNELS[-1], values)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Images `(n, 3, size, size)` in [-1, 1]."""
        features = self.dropout(self.network(pixel_values))
        return self.subtype(features), self.attribute(features)

    @torch.no_grad()
    def shares(self, images: Tensor) -> Tensor:
        """Probabilities of the subtypes, mean over orientations, of uint8 images. Shape `(n, subtypes)`."""
        pixel_values = to_pixel_values(images)
        return torch.stack([self(orient(pixel_values, turn))[0].softmax(1) for turn in range(ORIENTATIONS)]).mean(0)


def halves(test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Test images that the subtype judge learns from, and those that measure it."""
    even = torch.arange(len(test)) % 2 == 0
    return test.select(even), test.select(~even)


def fit_judge(data: Path, split: Split, seed: int, place: Path) -> SubtypeJudge:
    """Fit the subtype judge, or read the one that is kept at `place`."""
    seen = [ImageSet.load(data, name) for name in ("judge", "judge_validation")]
    seen.append(halves(ImageSet.load(data, "test"))[0])
    values = sorted({value for images in seen for value in images.columns[split.attribute]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SubtypeJudge(len(split.names), len(values))
        if place.is_file():
            judge.load_state_dict(load_file(place))
            return judge.eval()
        _train(judge, split, seen, values, seed)
    write_atomically(place, save({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}))
    return judge.eval()


def _train(judge: SubtypeJudge, split: Split, seen: list[ImageSet], values: list[str], seed: int) -> None:
    images = torch.cat([to_pixel_values(part.images) for part in seen])
    value_ids = torch.tensor([values.index(value) for part in seen for value in part.columns[split.attribute]])
    ids = torch.cat([split.ids(part) for part in seen])
    rows = [(ids == index).nonzero()[:, 0] for index in range(len(split.names))]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=JUDGE_STEPS)
    with Progress("subtype judge", JUDGE_STEPS) as progress:
        for _ in range(JUDGE_STEPS):
            own = torch.cat([part[torch.randint(0, len(part), (SUBTYPE_BATCH,), generator=generator)] for part in rows])
            index = torch.cat([own, torch.randint(0, len(images), (SUBTYPE_BATCH,), generator=generator)])
            turned = random_shifts(random_orientations(images[index], generator), generator)
            logits, value_logits = judge(random_exposure(turned, generator, 0.7))
            loss = F.cross_entropy(logits[: len(own)], ids[own]) + F.cross_entropy(value_logits, value_ids[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()


def concepts(place: Place) -> dict[str, Figure]:
    """Share of images of the new classes whose subtype the subtype judge finds right, what bounds it, and the judge's
    share of plausible cells of the parent among them.

    The parents' figures are those of the evaluation, before and after with the same seeds. `options`: `images`, of each
    new class, and `guidance_scale` of theirs. The split is that of the arm's `align.subtypes`.
    """
    found = evaluation(place)
    if place.arm.set != "after":
        return found
    record = RunRecord.load(last_round(place.run_dir, "adapter"))
    split = Split(tuple(subtype_rule(text) for text in record.config["subtypes"]))
    data, seed = place.run_dir / "data", record.config["seed"]
    made_from = fingerprint([fingerprint(data), record.config["subtypes"], seed, JUDGE_STEPS])
    judge = fit_judge(data, split, seed, place.run_dir / f"subtype_judge-{made_from}.safetensors")
    names = [entry["name"] for entry in record.metrics["concepts"]]
    subtypes = [entry["subtype"] for entry in record.metrics["concepts"]]
    images = _drawn(place)
    wanted = torch.tensor([split.names.index(subtypes[names.index(name)]) for name in images.columns["concept"]])
    right = judge.shares(images.images).argmax(1) == wanted
    found["subtype_right"] = proportion(right.numpy())
    for index, name in enumerate(split.names):
        if (wanted == index).any():  # a subtype with too few marks made no class
            found[f"subtype_right of {name}"] = proportion(right[wanted == index].numpy())
    verdicts = ask(SimulatedGrader.load(place.run_dir / "judge"), images)
    found["concepts_plausible"] = proportion(verdicts.plausible)
    unseen = halves(ImageSet.load(data, "test"))[1]
    ids = split.ids(unseen)
    shares = judge.shares(unseen.select(ids >= 0).images)
    ids = ids[ids >= 0]
    known = shares.argmax(1) == ids
    found["subtype_judge_on_real"] = proportion(known.numpy())
    for index, name in enumerate(split.names):
        found[f"subtype_judge_on_real of {name}"] = proportion(known[ids == index].numpy())
    balanced = np.mean([found[f"subtype_judge_on_real of {name}"].value for name in split.names])
    found["subtype_judge_balanced"] = Figure(float(balanced), None, len(ids))
    if len(split.names) == 2:
        found["subtype_judge_roc_auc"] = Figure(float(roc_auc_score(ids, shares[:, 1])), None, len(ids))
    found["marks"] = Figure(sum(entry["marks"] for entry in record.metrics["concepts"]))
    return found


def samples_of(place: Place) -> tuple[list[str], Path]:
    """Names of an arm's new classes, and the candidate set of their images, which `concepts` makes."""
    adapter = last_round(place.run_dir, "adapter")
    names = [entry["name"] for entry in RunRecord.load(adapter).metrics["concepts"]]
    made_from = fingerprint(
        [fingerprint(adapter), names, place.experiment.options, _sampling(place)["inference_steps"]]
    )
    return names, place.run_dir / f"samples_concepts-{made_from}"


def _sampling(place: Place) -> dict[str, Any]:
    """How the evaluation's images were drawn."""
    return RunRecord.load(place.run_dir / "samples_after").config


def _drawn(place: Place) -> ImageSet:
    """Images of the new classes, made once."""
    (names, folder), sampling = samples_of(place), _sampling(place)
    if not folder.is_dir():
        config = GenerateConfig(
            model=str(place.run_dir / "base"),
            adapter=str(last_round(place.run_dir, "adapter")),
            classes=names,
            images_per_class=int(place.experiment.options["images"]),
            guidance_scale=float(place.experiment.options["guidance_scale"]),
            inference_steps=sampling["inference_steps"],
            seed=FIRST_SEED + sampling["seed"],
        )
        generate(config, folder)
    return ImageSet.load(folder)
