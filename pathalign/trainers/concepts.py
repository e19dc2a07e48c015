"""New clinical concepts: split classes by the experts' subtype marks.

    loss = E_marked[ L_denoise(x, concept) ] + beta * E_real[ ||eps(x, class) - eps_base(x, class)||^2 ]
           - recognition * E_drawn[ log P(concept | x, class) ]

Source: "Aligning Synthetic Medical Images with Clinical Knowledge using Human Feedback" (arXiv:2306.12438): feedback
brings in concepts that the base model was not told of. Each has an embedding of its own, which starts at its parent's
and is trained with the adapter on marked images. Where a classifier tells held-out marks from each other, it recognises
more: real training images, and images of the base model that the reward model finds plausible. The second term holds
every class of the base model where it is. The last follows the classifier's gradient through the last steps of drawing
a concept, as DRaFT does with a reward (arXiv:2309.17400).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor

from pathalign.artefacts import artefact, fingerprint
from pathalign.augment import random_orientations, random_shifts
from pathalign.diffusion import lora
from pathalign.diffusion.denoiser import Denoiser
from pathalign.diffusion.differentiable import unrolled
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.generate import SCHEDULERS, Sampling, draw, judged_names, score, set_scheduler
from pathalign.images import ImageSet, to_pixel_values
from pathalign.pinning import pinned
from pathalign.progress import say
from pathalign.randomness import seeded
from pathalign.remote import parse
from pathalign.reward import load_encoder
from pathalign.schema import InputError, RunRecord
from pathalign.settings.concepts import ConceptsConfig
from pathalign.shards import scratch_dir
from pathalign.trainers.adapter import TRAINING, AdapterTrainer, load_inputs
from pathalign.trainers.base import cosine_rate, require_finite
from pathalign.trainers.draft import output_distance
from pathalign.trainers.epochs import first_seed
from pathalign.trainers.marks import MarkClassifier, Marks, collect_marks, surest
from pathalign.trainers.pretrain import denoising_loss
from pathalign.trainers.rewards import Reward

LEAST_GAIN = 0.1  # over guessing, on held-out marks
EMBEDDINGS = 6  # stream of random numbers: where new embeddings start


@dataclass(frozen=True)
class Pool:
    """Images that the new classes are learned from.

    Attributes:
        images: Shape `(n, 3, size, size)`, uint8.
        concept_ids: Shape `(n,)`, int64, indices into the marks' concepts.
        counts: What they are: marks, unmarked real images, images of the base model.
    """

    images: Tensor
    concept_ids: Tensor
    counts: dict[str, int]


def align(config: ConceptsConfig, output_dir: str | Path) -> RunRecord:
    """Split classes of a pipeline and write the adapter; the same call goes on where an interrupted one was.

    Raises:
        InputError: If an input cannot be used, the base model is Stable Diffusion, there are too few marks, or the loss
            is no number any more.
    """
    config = pinned(config)
    pipeline, reward_model, real = load_inputs(config)
    if not isinstance(pipeline, ClassConditionalPipeline):
        raise InputError(
            f"{config.base_model} is Stable Diffusion, which has words in place of class embeddings; the method "
            "concepts needs a pipeline made by `pathalign pretrain`. Any other method can align this one."
        )
    marks = collect_marks(config, real, pipeline.class_names)
    with artefact(output_dir) as folder:
        record = ConceptsTrainer(pipeline, reward_model, real, config, folder, marks).train()
    return record


class ConceptsTrainer(AdapterTrainer[ConceptsConfig]):
    """Draws images of the split classes once, marks them, and trains on them.

    Args:
        pipeline: As for every trainer of adapters; so are `reward_model`, `real`, `config` and `folder`.
        marks: Marked images, and the new classes.
    """

    pipeline: ClassConditionalPipeline
    shown: ClassVar[tuple[str, ...]] = ("concept_loss", "recognition_loss")

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        reward_model: Reward,
        real: ImageSet,
        config: ConceptsConfig,
        folder: Path,
        marks: Marks,
    ) -> None:
        self.marks = marks
        super().__init__(pipeline, reward_model, real, config, folder)
        set_scheduler(pipeline, config.scheduler)
        self.inputs["marks"] = fingerprint([marks.image_ids, marks.concept_ids.tolist()])
        self.run.config["marks"] = self.inputs["marks"]  # a checkpoint of other marks is not gone on with
        encoder = parse(config.encoder)
        self.classifier = MarkClassifier(load_encoder(encoder.name, revision=encoder.revision).to(self.device), marks)
        self.classifier.encoder.requires_grad_(False)
        self.sampler = SCHEDULERS[config.scheduler].from_config(pipeline.scheduler.config)
        self.denoise = Denoiser(self.unet, self.conditioning, config.guidance_scale, autocast=self.accelerator.autocast)
        self.unguided = Denoiser(self.unet, self.conditioning, autocast=self.accelerator.autocast)
        self.first_id = len(pipeline.base_class_names)
        self.pool: Pool | None = None
        self.told: dict[str, Any] = {}

    def attach(self) -> None:
        """The adapter, and the new classes as part of it."""
        super().attach()
        concepts = {concept.name: concept.parent for concept in self.marks.concepts}
        lora.add_concepts(self.pipeline, concepts, self.config.noise_scale, seeded(self.config.seed, EMBEDDINGS))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The adapter, and the new embeddings at a learning rate of their own."""
        embeddings = list(self.pipeline.unet.class_embedding.lora_concepts.parameters())
        known = {id(embedding) for embedding in embeddings}
        others = [parameter for parameter in self.parameters if id(parameter) not in known]
        return [{"params": others}, {"params": embeddings, "multiple": self.config.embedding_rate}]

    @property
    def total(self) -> int:
        """Optimizer steps."""
        return self.config.steps

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; the first one of a process gathers the images."""
        config = self.config
        self.usage.start()
        if self.pool is None:
            self.pool = self.collect()
        rate = config.learning_rate * cosine_rate(number, self.total, config.warmup_steps)
        self.set_rate(rate)
        generator = seeded(config.seed, TRAINING, number)
        with self.accelerator.autocast():
            denoised = self.concept_loss(self.pool, generator)
            kept = self.parents_loss(generator) if config.beta > 0 else torch.zeros((), device=self.device)
        unlike = self.recognition_loss(generator) if config.recognition > 0 else torch.zeros((), device=self.device)
        loss = denoised + config.beta * kept + config.recognition * unlike
        require_finite(loss, number, rate)
        self.accelerator.backward(loss)
        norm = self.update()
        return {
            "loss": loss.item(),
            "concept_loss": denoised.item(),
            "recognition_loss": unlike.item(),
            "parents_loss": kept.item(),
            "gradient_norm": norm,
            "learning_rate": rate,
            **self.usage.figures(config.batch_size),
        }

    def collect(self) -> Pool:
        """Marked images, and, if the marks can be told from each other, unmarked real and drawn ones.

        Raises:
            InputError: If a reward is no number.
        """
        marks, config = self.marks, self.config
        self.told = self.classifier.cross_validated(config.seed)
        say(
            f"Of held-out marks {self.told['balanced_accuracy']:.0%} are told right, a mean over the new classes; "
            f"guessing would give {self.told['guessing']:.0%}."
        )
        if self.told["balanced_accuracy"] < self.told["guessing"] + LEAST_GAIN:
            say("So few marks of such images teach next to nothing: mark more images, or use larger ones.")
        parts = {"marked": (marks.images, marks.concept_ids)}
        if self.told["balanced_accuracy"] >= config.least_accuracy:
            for name, found in (("recognised_real", self.unmarked()), ("recognised_drawn", self.plausible())):
                rows, ids = surest(self.classifier.probabilities(found.images, found.labels()), config.sure_share)
                parts[name] = (found.images[rows], ids)
        else:
            say(f"Unmarked images are left out: `least_accuracy` is {config.least_accuracy:.0%}.")
        images, ids = (torch.cat(column) for column in zip(*parts.values(), strict=True))
        counts = {name: len(part[0]) for name, part in parts.items()}
        each = torch.bincount(ids, minlength=len(marks.concepts)).tolist()
        listed = ", ".join(f"{concept.name} {count}" for concept, count in zip(marks.concepts, each, strict=True))
        say(f"Learning from {len(ids)} images, {counts['marked']} of them marked: {listed}.")
        return Pool(images, ids, counts)

    def unmarked(self) -> ImageSet:
        """Real training images of the split classes that have no mark."""
        marks, real = self.marks, self.real
        wanted = [
            self.config.unmarked_real and name in marks.parents and image_id not in marks.image_ids
            for name, image_id in zip(real.labels(), real.image_ids, strict=True)
        ]
        return real.select(torch.tensor(wanted))

    def plausible(self) -> ImageSet:
        """Images of the split classes that the base model draws, those of the highest rewards."""
        config, names = self.config, self.pipeline.base_class_names
        parent_ids = torch.tensor([names.index(parent) for parent in self.marks.parents])
        class_ids = parent_ids.repeat_interleave(config.images_per_class)
        with lora.disabled(self.unet):
            images, rewards = self.drawn(class_ids, 0)
        kept = []
        for class_id in class_ids.unique().tolist():
            own = (class_ids == class_id).nonzero()[:, 0]
            best = rewards[own].argsort(descending=True, stable=True)[: max(1, round(config.top_share * len(own)))]
            kept.append(own[best])
        rows = torch.cat(kept) if kept else torch.zeros(0, dtype=torch.int64)
        return ImageSet.build(images[rows], class_ids[rows], names)

    def drawn(self, class_ids: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Images by the weights that are in use, and their rewards as images of the parents.

        Args:
            class_ids: Shape `(n,)`, of the pipeline's classes.
            number: Which images of the run: no two share a seed.

        Raises:
            InputError: If a reward is no number.
        """
        config = self.config
        if len(class_ids) == 0:
            return torch.zeros((0, *self.real.images.shape[1:]), dtype=torch.uint8), torch.zeros(0)
        first = first_seed(config.seed, 2, number)
        sampling = Sampling(config.inference_steps, config.guidance_scale, config.sample_batch_size, first)
        process = (self.accelerator.process_index, self.accelerator.num_processes)
        weights = [] if number == 0 else [float(weight.double().sum()) for weight in self.average]
        place = [asdict(config), self.inputs, number, class_ids.tolist(), weights]
        with self.accelerator.autocast():
            parts = draw(self.pipeline, None, class_ids.tolist(), sampling, scratch_dir(self.folder, place), process)
        parts = sorted(gather_object(parts), key=lambda part: int(part["start"]))
        images = torch.cat([part["images"] for part in parts])
        rewards = score(self.reward_model, images, class_ids.tolist(), judged_names(self.pipeline))
        if not torch.isfinite(rewards).all():
            raise InputError(f"{config.reward_model} gives rewards that are no numbers; train it again.")
        return images, rewards

    def turns(self, count: int, generator: torch.Generator) -> Tensor:
        """Concepts in turn, beginning anywhere, for all processes' images, shape `(count * processes,)`."""
        number = len(self.marks.concepts)
        first = torch.randint(0, number, (), generator=generator)
        return (torch.arange(count * self.accelerator.num_processes) + first) % number

    def concept_loss(self, pool: Pool, generator: torch.Generator) -> Tensor:
        """Denoising loss on images of the new classes, each as often as the next."""
        wanted = self.turns(self.config.batch_size, generator)
        chance = torch.rand(len(wanted), generator=generator)
        rows = [(pool.concept_ids == concept).nonzero()[:, 0] for concept in wanted.tolist()]
        index = torch.stack([own[int(share * len(own))] for own, share in zip(rows, chance.tolist(), strict=True)])
        pixel_values = to_pixel_values(pool.images[index])
        clean, ids, noise, timesteps = self.noised(pixel_values, wanted, generator, self.config.noise_share)
        conditions = self.conditioning(self.first_id + ids)
        return denoising_loss(self.unet, self.training_schedule, clean, conditions, noise, timesteps).mean()

    def parents_loss(self, generator: torch.Generator) -> Tensor:
        """Squared distance from the base model's output on real images of all classes: none of them shall change."""
        clean, class_ids, noise, timesteps = self.noised_real(generator)
        noisy = self.training_schedule.add_noise(clean, noise, timesteps)
        reference = self.unguided.reference(noisy, timesteps, class_ids)
        return output_distance(self.unguided(noisy, timesteps, class_ids), reference).mean()

    def recognition_loss(self, generator: torch.Generator) -> Tensor:
        """How badly the classifier recognises fresh images of the new classes, with the graph of their last steps."""
        config = self.config
        wanted = self.turns(config.recognition_batch_size, generator)
        noise = torch.randn((len(wanted), *self.conditioning.sample_shape), generator=generator)
        ids = self.own(wanted)
        drawn = unrolled(
            self.denoise, self.sampler, self.own(noise), self.first_id + ids, config.inference_steps, config.train_steps
        )
        pixel_values = self.conditioning.decode(drawn.sample).float().clamp(-1, 1)
        seen = random_shifts(random_orientations(pixel_values, generator), generator)
        return -self.classifier.log_probabilities(seen, ids).mean()

    def metrics(self) -> dict[str, Any]:
        """How many fresh images of each new class are recognised, and whether the parents kept their rewards."""
        config, concepts = self.config, self.marks.concepts
        self.pool = self.pool or self.collect()
        self.use(self.average)
        every = torch.arange(len(self.pipeline.class_names)).repeat_interleave(config.check_images_per_class)
        images, rewards = self.drawn(every, 1)
        base = every[every < self.first_id]
        with lora.disabled(self.unet):
            _, before = self.drawn(base, 1)
        change = rewards[: len(base)] - before
        error = float(change.std()) / len(change) ** 0.5
        new = every >= self.first_id
        parents = [concepts[class_id - self.first_id].parent for class_id in every[new].tolist()]
        guesses = self.classifier.probabilities(images[new], parents).argmax(1)
        entries = []
        for index, concept in enumerate(concepts):
            own = every[new] == self.first_id + index
            marked = self.marks.concept_ids == index
            entries.append(
                {
                    **asdict(concept),
                    "marks": int(marked.sum()),
                    "marks_of_real": int((marked & self.marks.real).sum()),
                    "images": int((self.pool.concept_ids == index).sum()),
                    "recognised": float((guesses[own] == index).float().mean()),
                    "mean_reward": float(rewards[new][own].mean()),
                }
            )
        if float(change.mean()) < -3 * error:
            say(f"The classes lost {-float(change.mean()):.3f} of their mean reward; raise `beta`, or lower `steps`.")
        return {
            "concepts": entries,
            "marks_cross_validated": self.told,
            "pool": self.pool.counts,
            "mean_reward_before": float(before.mean()),
            "mean_reward_after": float(rewards[: len(base)].mean()),
            "mean_reward_change_error": error,
        }
