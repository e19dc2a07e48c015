"""How often a whole run asks the networks, from its settings alone.

Python is not what an alignment costs; calls of the UNet are. Per image they are S forward passes of sampling and K
forward and backward passes of training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from pathalign.settings.adapter import AdapterConfig, GuardedConfig
from pathalign.settings.concepts import ConceptsConfig
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.dpo import DPOConfig
from pathalign.settings.draft import DraftConfig
from pathalign.settings.reward_weighted import RewardWeightedConfig
from pathalign.settings.subtypes import subtype_rule
from pathalign.trainers.ddpo import PROBED_STEPS


@dataclass(frozen=True)
class Work:
    """Images that go through the networks in a whole run on one device, and what of it is in memory at once.

    Attributes:
        forward: Through the UNet without gradient: sampling, references, checks.
        backward: Through the UNet forward and back.
        decoded: Through the VAE's decoder without gradient.
        decoded_backward: Through the VAE's decoder forward and back.
        encoded: Through the VAE's encoder.
        graph: Calls of the UNet, in images, whose activations are kept for one backward pass.
        decoded_graph: The same of the VAE's decoder.
        kept_samples: Noisy images of an epoch that are kept to be trained on.
    """

    forward: int = 0
    backward: int = 0
    decoded: int = 0
    decoded_backward: int = 0
    encoded: int = 0
    graph: int = 0
    decoded_graph: int = 0
    kept_samples: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def work_of(config: AdapterConfig, classes: int) -> Work:
    """Work of a whole run for a base model of so many classes, on one device, without rounds that are undone."""
    own = _METHODS[config.method](config, classes)
    return own + checks(config, classes) if isinstance(config, GuardedConfig) else own


def checks(config: GuardedConfig, classes: int) -> Work:
    """Images of the checks for reward hacking: before the first epoch, every few epochs, and at the end."""
    count = 1 + -(-config.epochs // config.check_every_epochs)
    images = count * classes * config.check_images_per_class
    return Work(forward=images * config.check_inference_steps * passes(config.check_guidance_scale), decoded=images)


def passes(guidance_scale: float) -> int:
    """Passes of the UNet for one prediction: guidance asks it twice."""
    return 1 if guidance_scale == 1.0 else 2


def real_images(config: AdapterConfig) -> int:
    """Real images in an optimizer step."""
    return config.real_batch_size if config.beta > 0 else 0


def reward_weighted(config: RewardWeightedConfig, classes: int) -> Work:
    """Rounds of drawing, one more at the end to see what became of it, and steps on synthetic and real images."""
    drawn = (config.rounds + 1) * classes * config.images_per_class
    steps = config.rounds * config.steps_per_round
    batch = config.batch_size + real_images(config)
    references = steps * config.batch_size if config.weighting == "contrastive" else 0
    return Work(
        forward=drawn * config.inference_steps * passes(config.guidance_scale) + references,
        backward=steps * batch,
        decoded=drawn,
        encoded=steps * batch,
        graph=batch,
    )


def ddpo(config: DDPOConfig, classes: int) -> Work:
    """Epochs of drawing all images and training K steps of each; GRPO costs the same, and a KL term a reference."""
    images = classes * config.images_per_class
    passed = passes(config.guidance_scale)
    last = config.inference_steps - 1  # the last step has no density
    trained = min(config.train_steps, last) or last
    batches = -(-images // config.batch_size)
    updates = config.inner_epochs * batches
    if config.kl_weight > 0:
        references = config.inner_epochs * images * trained
    else:  # a few steps of each epoch's first batch, to log how far the policy has gone
        references = min(PROBED_STEPS, config.micro_batch_size, images // batches * trained)
    backward = config.inner_epochs * images * trained * passed + updates * real_images(config)
    again = config.inner_epochs * images * trained * passed if config.gradient_checkpointing else 0
    graph = 1 if config.gradient_checkpointing else passed
    return Work(
        forward=config.epochs * (images * config.inference_steps * passed + references * passed + again),
        backward=config.epochs * backward,
        decoded=config.epochs * images,
        encoded=config.epochs * updates * real_images(config),
        graph=max(graph * config.micro_batch_size, real_images(config)),
        kept_samples=images * min(2 * trained, config.inference_steps + 1),
    )


def draft(config: DraftConfig, classes: int) -> Work:
    """Epochs of drawing with the graph of the last K steps, or of the last step several times over, to the reward."""
    images = classes * config.images_per_class
    passed = passes(config.guidance_scale)
    repeats = config.lv_samples if config.variant == "lv" else 0
    trained = config.train_steps + repeats
    # The distance to the base model: its samples, but for the first ones, depend on the adapter.
    followed = config.train_steps - 1 if config.kl_weight > 0 else 0
    backward = trained + followed
    again = backward if config.gradient_checkpointing else 0
    updates = -(-images // config.batch_size)
    micro_batch = min(config.micro_batch_size, config.batch_size, images)
    # Of each trained step, but those that are followed: of all images, or to log the distance of the first ones.
    references = trained * (images if config.kl_weight > 0 else micro_batch) - followed * images
    alive = 1 if config.gradient_checkpointing else backward
    return Work(
        forward=config.epochs * passed * (images * (config.inference_steps - config.train_steps + again) + references),
        backward=config.epochs * (images * passed * backward + updates * real_images(config)),
        decoded=config.epochs * images * (1 + repeats) if config.gradient_checkpointing else 0,
        decoded_backward=config.epochs * images * (1 + repeats),
        encoded=config.epochs * updates * real_images(config),
        graph=max(alive * passed * micro_batch, real_images(config)),
        decoded_graph=micro_batch * (1 if config.gradient_checkpointing else 1 + repeats),
    )


def dpo(config: DPOConfig, classes: int) -> Work:
    """Epochs of drawing images, and of passes over pairs: two images each, by the adapter and by the base model."""
    given = config.preferences is not None or config.feedback is not None
    per_class = config.monitor_images_per_class if given else config.images_per_class
    pairs = config.pairs_per_epoch if given else min(config.pairs_per_epoch, classes * (per_class // 2))
    trained = config.passes * pairs * 2
    updates = config.passes * -(-pairs // config.batch_size)
    drawn = config.epochs * classes * per_class
    return Work(
        forward=drawn * config.inference_steps * passes(config.guidance_scale) + config.epochs * trained,
        backward=config.epochs * (trained + updates * real_images(config)),
        decoded=drawn,
        encoded=config.epochs * (trained + updates * real_images(config)),
        graph=max(2 * min(config.micro_batch_size, config.batch_size, pairs), real_images(config)),
    )


def concepts(config: ConceptsConfig, classes: int) -> Work:
    """Images of the split classes by the base model, steps, and images of all classes before and after.

    Which classes the feedback splits is not known yet: without `subtypes` it is taken for one, in two. Nor is whether
    the marks can be told well enough for unmarked images to be drawn; they are taken to be.
    """
    new = {(rule.class_name, rule.subtype) for rule in map(subtype_rule, config.subtypes)}
    families = Counter(class_name for class_name, _ in new) or Counter(one=2)
    drawn = len(families) * config.images_per_class + (2 * classes + families.total()) * config.check_images_per_class
    batch = config.batch_size + real_images(config)
    followed = config.recognition_batch_size if config.recognition > 0 else 0
    passed = passes(config.guidance_scale)
    steps = config.inference_steps - config.train_steps
    return Work(
        forward=(drawn * config.inference_steps + config.steps * followed * steps) * passed
        + config.steps * real_images(config),  # the base model's output on them
        backward=config.steps * (batch + followed * config.train_steps * passed),
        decoded=drawn,
        decoded_backward=config.steps * followed,
        encoded=config.steps * batch,
        graph=batch + followed * config.train_steps * passed,
        decoded_graph=followed,
    )


_METHODS: dict[str, Callable[..., Work]] = {
    "reward-weighted": reward_weighted,
    "ddpo": ddpo,
    "grpo": ddpo,
    "draft": draft,
    "dpo": dpo,
    "concepts": concepts,
}
