"""A stand-in for an expert: a network fitted on real images and their attributes. For demos, tests and benchmarks.

It judges an image of class c by whether it looks like a c, whether each criterion of a checklist holds, whether it lies
where real images of c lie, and whether it is whole. Whatever it writes is marked as simulated; it is no expert, and its
grades must never be published as expert feedback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, RegNetConfig, RegNetModel, ResNetConfig, ResNetModel

from pathalign.artefacts import artefact, fingerprint
from pathalign.config import GRADER
from pathalign.images import ImageSet
from pathalign.pinning import commit_of, identity, pinned
from pathalign.remote import is_repo_id, parse
from pathalign.schema import Criterion, Grade, InputError, RunRecord
from pathalign.settings.grade import GradeConfig
from pathalign.settings.subtypes import SubtypeRule, subtype_rule

BATCH_SIZE = 250
PASS_PROBABILITY = 0.5
SMALLEST_SIZE_PX = 32  # below it the last stage is one pixel, which has no deviation


@dataclass(frozen=True)
class Judgement:
    """What a simulated grader says of n images.

    Attributes:
        probabilities: Shape `(n, len(criteria))`, probability that each criterion holds.
        criteria: `class`, the checklist's criteria, and `typicality`.
    """

    probabilities: Tensor
    criteria: tuple[str, ...]

    @property
    def plausibility(self) -> Tensor:
        """Shape `(n,)`, in [0, 1]: an image is as plausible as its weakest point."""
        return self.probabilities.amin(dim=1)

    @property
    def plausible(self) -> Tensor:
        """Shape `(n,)`, bool."""
        return self.plausibility >= PASS_PROBABILITY

    @property
    def failed(self) -> Tensor:
        """Shape `(n, len(criteria))`, bool."""
        return self.probabilities < PASS_PROBABILITY


class SimulatedGrader(nn.Module, PyTorchModelHubMixin):
    """Network with a class head, a head for each attribute, and the distribution of real features for each class.

    Args:
        class_names: Class names in the order of their ids.
        attributes: Attribute column -> its values, in the order of the head's outputs.
        criteria: The checklist, as dictionaries of `schema.Criterion`.
        architecture: `resnet` or `regnet`: two that share no weights and no structure.
        image_size_px: Size that images are brought to.
        rubric_version: Version of the checklist.
    """

    feature_mean: Tensor
    feature_whitening: Tensor
    typical_distance: Tensor
    distance_spread: Tensor
    structure_limit: Tensor

    def __init__(
        self,
        class_names: list[str],
        attributes: dict[str, list[str]],
        criteria: list[dict[str, Any]],
        architecture: str,
        image_size_px: int,
        rubric_version: str,
    ) -> None:
        super().__init__()
        self.class_names, self.attributes, self.architecture = class_names, attributes, architecture
        self.image_size_px, self.rubric_version = image_size_px, rubric_version
        self.rubric_criteria = [Criterion(**entry) for entry in criteria]
        self.backbone, widths = _backbone(architecture)
        width, pooled = widths[-1], 2 * sum(widths)
        self.class_head = nn.Linear(width, len(class_names))
        self.structure_head = nn.Linear(pooled, 1)
        self.attribute_heads = nn.ModuleDict(
            {name: nn.Linear(width, len(values)) for name, values in attributes.items()}
        )
        self.register_buffer("feature_mean", torch.zeros(len(class_names), pooled))
        self.register_buffer("feature_whitening", torch.zeros(len(class_names), pooled, pooled))
        self.register_buffer("typical_distance", torch.ones(()))
        self.register_buffer("distance_spread", torch.ones(()))
        self.register_buffer("structure_limit", torch.zeros(()))

    @classmethod
    def load(cls, path_or_repo_id: str | Path) -> SimulatedGrader:
        """Read a grader made by `fit`, in evaluation mode, from a folder, Hub id or `OWNER/NAME@REVISION`.

        Raises:
            InputError: If there is none, or one whose files do not fit each other.
        """
        reference = parse(path_or_repo_id)
        folder = Path(reference.name)
        if is_repo_id(reference.name):
            revision = commit_of(reference, GRADER)
            weights, _ = (
                Path(hf_hub_download(reference.name, name, revision=revision))
                for name in ("model.safetensors", "config.json")
            )
            folder = weights.parent
        if not (folder / "model.safetensors").is_file():
            raise InputError(f"{folder} holds no simulated grader; make one with `pathalign grade fit`.")
        try:
            grader = cls.from_pretrained(str(folder))
            grader.load_state_dict(load_file(folder / "model.safetensors"))  # strictly: the mixin only warns
        except (RuntimeError, TypeError, SafetensorError) as error:
            raise InputError(
                f"{reference} holds a damaged simulated grader, whose config.json and weights do not fit each other; "
                "make it again with `pathalign grade fit`."
            ) from error
        return grader.eval()

    def features(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Last features `(n, width)` for the heads, and means and deviations of all stages for typicality."""
        if pixel_values.shape[-1] != self.image_size_px:
            pixel_values = F.interpolate(pixel_values, size=self.image_size_px, mode="bilinear", antialias=True)
        output = self.backbone(pixel_values, output_hidden_states=True)
        stages = [stage.flatten(2) for stage in output.hidden_states[1:]]
        pooled = torch.cat([part for stage in stages for part in (stage.mean(2), stage.std(2))], dim=1)
        return output.pooler_output.flatten(1), pooled

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Class logits, attribute logits by name, and pooled features of images `(n, 3, size, size)` in [-1, 1]."""
        last, pooled = self.features(pixel_values)
        return self.class_head(last), {name: head(last) for name, head in self.attribute_heads.items()}, pooled

    def structure(self, pooled: Tensor) -> Tensor:
        """Log-odds that an image is whole and not malformed, from its pooled features; shape `(n,)`."""
        return self.structure_head(pooled)[:, 0]

    def distances(self, pooled: Tensor, class_ids: Tensor) -> Tensor:
        """Mahalanobis distance to the real images of each one's class, per square root of dimension; shape `(n,)`."""
        centred = pooled - self.feature_mean[class_ids]
        white = torch.einsum("nd,nde->ne", centred, self.feature_whitening[class_ids])
        return white.square().mean(dim=1).sqrt()

    @torch.no_grad()
    def judge(self, pixel_values: Tensor, class_ids: Tensor) -> Judgement:
        """Judge images as members of the given classes.

        Args:
            pixel_values: Shape `(n, 3, height, width)`, in [-1, 1].
            class_ids: Shape `(n,)`, indices into `class_names`.
        """
        parts = [
            self._probabilities(pixels.to(self.feature_mean), ids.to(self.feature_mean.device))
            for pixels, ids in zip(pixel_values.split(BATCH_SIZE), class_ids.split(BATCH_SIZE), strict=True)
        ]
        names = ("class", *(criterion.name for criterion in self.rubric_criteria), "typicality", "structure")
        return Judgement(probabilities=torch.cat(parts).cpu(), criteria=names)

    def judge_set(self, image_set: ImageSet) -> Judgement:
        """Judge an image set by its labels; classes are matched by name."""
        return self.judge(image_set.pixel_values(), class_ids_for(image_set, self.class_names))

    @torch.no_grad()
    def attribute(self, pixel_values: Tensor, name: str) -> Tensor:
        """Probability of each value of an attribute, shape `(n, values)`; images as for `judge`."""
        batches = pixel_values.to(self.feature_mean).split(BATCH_SIZE)
        return torch.cat([self(batch)[1][name].softmax(1) for batch in batches]).cpu()

    def _probabilities(self, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
        class_logits, attribute_logits, pooled = self(pixel_values)
        columns = [class_logits.softmax(1).gather(1, class_ids[:, None])[:, 0]]
        for criterion in self.rubric_criteria:
            shares = attribute_logits[str(criterion.attribute)].softmax(1)
            allowed = self._allowed(criterion).to(shares)
            columns.append((shares * allowed[class_ids]).sum(dim=1))
        excess = (self.distances(pooled, class_ids) - self.typical_distance) / self.distance_spread
        columns.append(torch.sigmoid(-excess))
        columns.append(torch.sigmoid(self.structure(pooled) - self.structure_limit))
        return torch.stack(columns, dim=1).clamp(0, 1)  # sums of shares exceed 1 by rounding

    def _allowed(self, criterion: Criterion) -> Tensor:
        values = self.attributes[str(criterion.attribute)]
        rows = []
        for name in self.class_names:
            accepted = criterion.accepted.get(name, values)
            rows.append([float(value in accepted) for value in values])
        return torch.tensor(rows)


def class_ids_for(image_set: ImageSet, class_names: Sequence[str]) -> Tensor:
    """Ids of an image set's labels in another order of classes.

    Raises:
        InputError: If a class is missing there.
    """
    missing = sorted(set(image_set.labels()) - set(class_names))
    if missing:
        raise InputError(
            f"Classes {missing} are not among {list(class_names)}; use a model fitted on the same classes."
        )
    return torch.tensor([list(class_names).index(label) for label in image_set.labels()], dtype=torch.int64)


def _backbone(architecture: str) -> tuple[PreTrainedModel, list[int]]:
    if architecture == "resnet":
        widths = [32, 64, 128]
        resnet = ResNetConfig(embedding_size=32, hidden_sizes=widths, depths=[1, 1, 1], layer_type="basic")
        return ResNetModel(resnet), widths
    widths = [48, 96, 192]
    regnet = RegNetConfig(embedding_size=32, hidden_sizes=widths, depths=[1, 1, 2], groups_width=192, layer_type="y")
    return RegNetModel(regnet), widths


def acceptance(grader: SimulatedGrader, images: ImageSet, seed: int = 0) -> dict[str, float]:
    """Share of real images accepted with their own class and with a wrong one drawn at random, and class accuracy."""
    generator = torch.Generator().manual_seed(seed)
    own = class_ids_for(images, grader.class_names)
    shift = torch.randint(1, len(grader.class_names), own.shape, generator=generator)
    with torch.no_grad():
        logits = torch.cat([grader(batch)[0] for batch in images.pixel_values().split(BATCH_SIZE)])
    return {
        "n": len(images),
        "class_accuracy": (logits.argmax(1) == own).float().mean().item(),
        "accepts_real": grader.judge_set(images).plausible.float().mean().item(),
        "accepts_mislabelled": grader.judge(images.pixel_values(), (own + shift) % len(grader.class_names))
        .plausible.float()
        .mean()
        .item(),
    }


def grade(config: GradeConfig, output_dir: str | Path) -> RunRecord:
    """Grade a candidate set with simulated graders and write `grades.jsonl`, every row marked as simulated.

    Raises:
        InputError: If the candidates or the grader are missing, or a class is unknown to the grader.
    """
    config = pinned(config)
    candidates = ImageSet.load(config.candidates)
    grader = SimulatedGrader.load(config.grader)
    rules = _rules(config, grader)
    judgement = grader.judge_set(candidates)
    marks = subtype_marks(grader, candidates, judgement.plausible, rules, config.max_marks, config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    grades = [
        entry
        for number in range(config.graders)
        for entry in _one_grader(config, candidates, judgement, marks, grader.rubric_version, number, generator)
    ]
    with artefact(output_dir) as folder:
        (folder / "grades.jsonl").write_text("".join(entry.to_json() + "\n" for entry in grades))
        shares = {
            verdict: sum(entry.verdict == verdict for entry in grades) / len(grades)
            for verdict in ("plausible", "unsure")
        }
        record = RunRecord(
            stage="grade",
            config=asdict(config),
            inputs={"candidates": fingerprint(list(candidates.image_ids)), "grader": identity(config.grader)},
            seeds={"seed": config.seed},
            metrics={
                "grades": len(grades),
                "simulated": True,
                **({"subtype_marks": sum(entry.subtype is not None for entry in grades)} if rules else {}),
                **{f"{name}_share": share for name, share in shares.items()},
            },
        )
        record.save(folder)
    return record


def _rules(config: GradeConfig, grader: SimulatedGrader) -> list[SubtypeRule]:
    rules = [subtype_rule(text) for text in config.subtypes]
    for rule in rules:
        known = grader.attributes.get(rule.attribute)
        if rule.class_name not in grader.class_names or known is None:
            raise InputError(
                f"`subtypes` names {rule.class_name}:{rule.attribute}; {config.grader} knows the classes "
                f"{grader.class_names} and the attributes {sorted(grader.attributes)}."
            )
        if missing := sorted(set(rule.values) - set(known)):
            raise InputError(f"`subtypes` names the {rule.attribute} {missing[0]!r}; {config.grader} knows {known}.")
    return rules


def subtype_marks(
    grader: SimulatedGrader, images: ImageSet, plausible: Tensor, rules: Sequence[SubtypeRule], limit: int, seed: int
) -> dict[int, str]:
    """Subtypes that a simulated grader sees, by the row of the image: the likeliest of its class's rules.

    Args:
        grader: Sees attributes.
        images: What is graded.
        plausible: Shape `(n,)`, bool: only these are marked.
        rules: Which values of an attribute make a subtype.
        limit: Images that are marked at most, drawn at random.
        seed: Of that draw.
    """
    classes = {rule.class_name for rule in rules}
    labels = images.labels()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = sorted([row for row in order if plausible[row] and labels[row] in classes][:limit])
    if not rows:
        return {}
    pixel_values = images.select(rows).pixel_values()
    seen = {rule.attribute: grader.attribute(pixel_values, rule.attribute) for rule in rules}

    def share(place: int, rule: SubtypeRule) -> float:
        known = grader.attributes[rule.attribute]
        return sum(float(seen[rule.attribute][place, known.index(value)]) for value in rule.values)

    return {
        row: max(
            (rule for rule in rules if rule.class_name == labels[row]), key=lambda rule: share(place, rule)
        ).subtype
        for place, row in enumerate(rows)
    }


def _one_grader(
    config: GradeConfig,
    candidates: ImageSet,
    judgement: Judgement,
    marks: Mapping[int, str],
    rubric_version: str,
    number: int,
    generator: torch.Generator,
) -> list[Grade]:
    """Grades of one simulated grader: its own threshold, a bias, and verdicts turned round at random."""
    faulty = config.faulty_graders is None or number >= config.graders - config.faulty_graders
    own = config.bias * faulty + config.threshold_spread * torch.randn((), generator=generator)
    log_odds = judgement.plausibility.clamp(1e-6, 1 - 1e-6).logit() + own
    probability = log_odds.sigmoid()
    flipped = torch.rand(len(candidates), generator=generator) < config.flip_rate * faulty
    verdicts = (probability >= config.threshold) ^ flipped
    unsure = (probability - config.threshold).abs() < config.unsure_margin
    name = f"simulated-{number + 1}"
    rows = []
    for index, (image_id, label) in enumerate(zip(candidates.image_ids, candidates.labels(), strict=True)):
        verdict = "unsure" if unsure[index] else "plausible" if verdicts[index] else "implausible"
        failed = [
            criterion for criterion, fails in zip(judgement.criteria, judgement.failed[index], strict=True) if fails
        ]
        rows.append(
            Grade(
                grade_id=fingerprint([name, image_id, index, config.seed]),
                image_id=image_id,
                class_label=label,
                verdict=verdict,
                grader=name,
                failed_criteria=tuple(failed) if verdict == "implausible" else (),
                subtype=marks.get(index) if verdict == "plausible" else None,
                confidence=float(2 * (probability[index] - 0.5).abs()),
                rubric_version=rubric_version,
                simulated=True,
            )
        )
    return rows
