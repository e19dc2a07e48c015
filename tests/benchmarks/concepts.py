"""New clinical concepts on real cells: neutrophils split into band and segmented by at most 100 subtype marks.

    python tests/benchmarks/concepts.py runs/real_cells/seed-0 --output-dir runs/concepts --marks 100

Takes a run of `pathalign run` or `demo` with data, base, reward and judge (real cells with the attribute
`nucleus_shape`), and
1. fits a subtype judge: a network from scratch on real neutrophils that neither base model, marks nor classifier of the
   marks have seen: the splits `judge` and `judge_validation` and every second test image, with the shapes of the other
   classes' nuclei as a help; its accuracy on the other test images stands beside all that it says and bounds it;
2. splits the class with `align --method concepts`, marks being the expert attribute of real training images;
3. draws band and segmented neutrophils and, with the same seeds before and after, all classes;
4. prints one JSON object: the judge's share of right subtypes, its accuracy on unseen real images, and the plausible
   share of the parents before and after by the run's own judge, with a paired interval.
`--bound-only` prints what can be hoped for at all, on real images, and needs the run's data only. What is finished is
not done again. The subtype judge is only asked at the end: settings are chosen by the classifier of the marks, see
`recognised` in the adapter's run.json. All marks here are the experts' of WBCAtt, none is simulated.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from pathalign.augment import ORIENTATIONS, orient, random_exposure, random_orientations, random_shifts
from pathalign.evaluate.alignment import ask, paired_gain
from pathalign.generate import generate
from pathalign.grading.simulated import SimulatedGrader
from pathalign.images import ImageSet, to_pixel_values
from pathalign.progress import Progress
from pathalign.reward.encoders import convnet, load_encoder
from pathalign.schema import RunRecord
from pathalign.settings.concepts import ConceptsConfig
from pathalign.settings.generate import GenerateConfig
from pathalign.trainers.concepts import align
from pathalign.trainers.marks import MarkClassifier, collect_marks, surest

PARENT, ATTRIBUTE = "neutrophil", "nucleus_shape"
SUBTYPES = {"band": ("unsegmented-band",), "segmented": ("segmented-bilobed", "segmented-multilobed")}
RULES = [f"{PARENT}:{ATTRIBUTE}:{name}={'+'.join(values)}" for name, values in SUBTYPES.items()]
CHANNELS = (16, 40, 80, 160)


class SubtypeJudge(nn.Module):
    """Logits of the subtypes; a second head for all classes' shapes is for training only."""

    def __init__(self, shapes: int) -> None:
        super().__init__()
        self.network, self.dropout = convnet(CHANNELS), nn.Dropout(0.3)
        self.subtype, self.shape = nn.Linear(CHANNELS[-1], len(SUBTYPES)), nn.Linear(CHANNELS[-1], shapes)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        features = self.dropout(self.network(pixel_values))
        return self.subtype(features), self.shape(features)

    @torch.no_grad()
    def shares(self, images: Tensor) -> Tensor:
        """Probabilities of the subtypes, mean over orientations, shape `(n, subtypes)`."""
        pixel_values = to_pixel_values(images)
        return torch.stack([self(orient(pixel_values, turn))[0].softmax(1) for turn in range(ORIENTATIONS)]).mean(0)


def subtypes(images: ImageSet) -> Tensor:
    """Index of each image's subtype, -1 for other classes and shapes."""
    names = list(SUBTYPES)
    found = [
        next((names.index(name) for name, values in SUBTYPES.items() if label == PARENT and shape in values), -1)
        for label, shape in zip(images.labels(), images.columns[ATTRIBUTE], strict=True)
    ]
    return torch.tensor(found)


def halves(test: ImageSet) -> tuple[ImageSet, ImageSet]:
    """Test images for the judge to learn from, and the ones that measure it."""
    even = torch.arange(len(test)) % 2 == 0
    return test.select(even), test.select(~even)


def fit_judge(data: Path, steps: int, seed: int, place: Path) -> SubtypeJudge:
    """The subtype judge, kept in `place`."""
    sets = [
        ImageSet.load(data, "judge"),
        ImageSet.load(data, "judge_validation"),
        halves(ImageSet.load(data, "test"))[0],
    ]
    shapes = sorted({shape for images in sets for shape in images.columns[ATTRIBUTE]})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = SubtypeJudge(len(shapes))
        if place.is_file():
            judge.load_state_dict(torch.load(place, weights_only=True))
            return judge.eval()
        images = torch.cat([to_pixel_values(part.images) for part in sets])
        shape_ids = torch.tensor([shapes.index(shape) for part in sets for shape in part.columns[ATTRIBUTE]])
        ids = torch.cat([subtypes(part) for part in sets])
        rows = [(ids == index).nonzero()[:, 0] for index in range(len(SUBTYPES))]
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=5e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        with Progress("subtype judge", steps) as progress:
            for _ in range(steps):
                own = torch.cat([part[torch.randint(0, len(part), (16,), generator=generator)] for part in rows])
                index = torch.cat([own, torch.randint(0, len(images), (16,), generator=generator)])
                turned = random_shifts(random_orientations(images[index], generator), generator)
                logits, shape_logits = judge(random_exposure(turned, generator, 0.7))
                loss = F.cross_entropy(logits[: len(own)], ids[own]) + F.cross_entropy(shape_logits, shape_ids[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update(1)
        torch.save(judge.state_dict(), place)
    return judge.eval()


def share(right: Tensor) -> dict[str, Any]:
    """A share with its count and Wilson interval."""
    low, high = proportion_confint(int(right.sum()), len(right), method="wilson")
    return {"share": float(right.float().mean()), "n": len(right), "ci": [float(low), float(high)]}


def on_real(judge: SubtypeJudge, images: ImageSet) -> dict[str, Any]:
    """How well the judge knows the subtypes of real images that it has not seen."""
    ids = subtypes(images)
    own = images.select(ids >= 0)
    ids, shares = ids[ids >= 0], judge.shares(own.images)
    right = shares.argmax(1) == ids
    each = {name: share(right[ids == index]) for index, name in enumerate(SUBTYPES)}
    balanced = float(np.mean([entry["share"] for entry in each.values()]))
    return {"roc_auc": float(roc_auc_score(ids, shares[:, 1])), "balanced_accuracy": balanced, **each}


def bound(config: ConceptsConfig, judge: SubtypeJudge, data: Path) -> dict[str, Any]:
    """What can be hoped for: how far marks, judge and experts agree on real images that none of the networks has seen.

    An adapter learns from the images of which the marks' classifier is surest. If it drew just these, the judge would
    call as many of them right as it does here.
    """
    real = ImageSet.load(data, "train")
    encoder = load_encoder(config.encoder)
    classifier = MarkClassifier(encoder, collect_marks(config, real, real.class_names))
    unseen = halves(ImageSet.load(data, "test"))[1]
    ids = subtypes(unseen)
    unseen, ids = unseen.select(ids >= 0), ids[ids >= 0]
    told, judged = classifier.probabilities(unseen.images, unseen.labels()), judge.shares(unseen.images).argmax(1)
    found: dict[str, Any] = {
        "marks_cross_validated": classifier.cross_validated(config.seed),
        "subtype_judge_on_unseen_real": on_real(judge, unseen),
    }
    for kept in (1.0, config.sure_share, config.sure_share / 2):
        rows, label = surest(told, kept)
        found[f"surest {kept:.0%}"] = {
            name: {"expert": share(ids[rows][own] == index), "judge": share(judged[rows][own] == index)}
            for index, name in enumerate(SUBTYPES)
            if (own := label == index).any()
        }
    return found


def draw(run: Path, adapter: Path | None, classes: list[str], count: int, folder: Path, steps: int) -> ImageSet:
    """A candidate set, made once."""
    if not folder.is_dir():
        config = GenerateConfig(
            model=str(run / "base"), adapter=str(adapter) if adapter else None, classes=classes, images_per_class=count,
            inference_steps=steps,
        )  # fmt: skip
        generate(config, folder)
    return ImageSet.load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run on real cells")
    parser.add_argument("--judge", type=Path, help="judge of plausibility; the run's own by default")
    parser.add_argument("--reward-model", type=Path, help="the run's own by default")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--marks", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge-steps", type=int, default=800)
    parser.add_argument("--images", type=int, default=200, help="of each new class")
    parser.add_argument("--parent-images", type=int, default=100, help="of each class, before and after")
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument(
        "--bound-only", action="store_true", help="how hard it is on real images; trains the judge only"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="settings of the method")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    run, adapter = options.run, options.output_dir / "adapter"
    settings = {key: json.loads(value) for key, value in (text.split("=", 1) for text in options.set)}
    config = ConceptsConfig(
        base_model=str(run / "base"), reward_model=str(options.reward_model or run / "reward"), data=str(run / "data"),
        subtypes=RULES, max_marks=options.marks, seed=options.seed, **settings,
    )  # fmt: skip
    judge = fit_judge(run / "data", options.judge_steps, options.seed, options.output_dir / "subtype_judge.pt")
    if options.bound_only:
        print(json.dumps(bound(config, judge, run / "data")))
        return
    if not adapter.is_dir():
        align(config, adapter)
    names = [f"{subtype} {PARENT}" for subtype in SUBTYPES]
    steps = options.inference_steps
    new = draw(run, adapter, names, options.images, options.output_dir / "new", steps)
    before = draw(run, None, [], options.parent_images, options.output_dir / "before", steps)
    after = draw(run, adapter, [], options.parent_images, options.output_dir / "after", steps)
    wanted = torch.tensor([names.index(name) for name in new.columns["concept"]])
    right = judge.shares(new.images).argmax(1) == wanted
    plausibility = SimulatedGrader.load(options.judge or run / "judge")
    verdicts = {
        name: ask(plausibility, images) for name, images in (("before", before), ("after", after), ("new", new))
    }
    parents = {"all classes": torch.ones(len(before), dtype=torch.bool).numpy()}
    parents[PARENT] = np.array([label == PARENT for label in before.labels()])
    found = {
        "subtype_right": {"all": share(right), **{name: share(right[wanted == i]) for i, name in enumerate(names)}},
        **bound(config, judge, run / "data"),
        "plausible": {name: float(np.mean(verdict.plausible)) for name, verdict in verdicts.items()},
        "parents_gain": {
            name: paired_gain(verdicts["before"].plausible[own], verdicts["after"].plausible[own], 2000, 0.95, 0)
            for name, own in parents.items()
        },
        "adapter": RunRecord.load(adapter).metrics["concepts"],
    }
    (options.output_dir / "concepts.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
