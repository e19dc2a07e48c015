"""What the words of a page mean, each in one plain sentence, for readers who do not measure images for a living.

Entries of metrics are keyed like the rows of the metric table, whose titles link to them.
"""

from __future__ import annotations

from collections.abc import Container

from pathalign.evaluate.page import Term

TERMS = (
    Term("plausible_share", "Plausible share", "Of 100 images, how many the judge takes for what they should show."),
    Term("judge", "Judge", "A network that only measures; the generator and the reward model never learnt from it."),
    Term("grader", "Grader", "Who said of each image whether it is plausible; the reward model learnt from that."),
    Term("grader_judge_kappa", "Kappa", "How far two readers agree beyond chance: 0 is chance, 1 is always."),
    Term("mean_reward", "Reward", "The reward model's guess, from 0 to 1, that a grader finds the image plausible."),
    Term(
        "criterion_reward",
        "Reward of a criterion",
        "The reward model's guess, from 0 to 1, that the image meets that one point of the checklist.",
    ),
    Term(
        "saliency",
        "Where it looks",
        "A map of the image: which places raised the reward and which lowered it, against a plain image of its colour.",
    ),
    Term("precision", "Precision", "Share of generated images that look like some real image: are they realistic?"),
    Term("recall", "Recall", "Share of real images that the generator could have made: is anything missing?"),
    Term(
        "density",
        "Density",
        "How many real images lie around each generated one; like precision, less swayed by odd ones.",
    ),
    Term("coverage", "Coverage", "Share of real images that have a generated one close by: how much variety is there?"),
    Term(
        "alpha_precision",
        "Alpha-precision",
        "Whether generated images are as near to and as far from the typical as real ones are.",
    ),
    Term("beta_recall", "Beta-recall", "How much of the variety of real images the typical generated ones span."),
    Term("kid", "KID", "Distance between the generated and the real images as two crowds; 0 is the same crowd."),
    Term("fid", "FID", "An older distance between the two crowds; it is too high where there are few images."),
    Term(
        "authenticity",
        "Authenticity",
        "Share of images farther from their nearest training image than that one lies from its own nearest neighbour; "
        "compare it with that of real images.",
    ),
    Term(
        "utility_accuracy", "Usefulness", "How often a classifier that saw only generated images is right on real ones."
    ),
    Term(
        "no_near_copy", "No near-copy", "Share of images that do not all but repeat one that the generator learnt from."
    ),
    Term(
        "nearer_to_train",
        "Nearer to training",
        "Share of images closer to one learnt from than to one never seen; 50 % is best, above it is memorizing.",
    ),
    Term(
        "augment_accuracy",
        "Usefulness, added",
        "The same when the real training images are added to the generated ones.",
    ),
    Term("interval", "Interval", "The range that chance alone leaves open; narrow with many images, wide with few."),
    Term("seed", "Seed", "The number that fixes the noise an image starts from: same seed, same start."),
    Term("control", "Control", "The base model trained on for the same time on real images, without any feedback."),
    Term(
        "best_of_n", "Best of N", "The base model's own images, the best by reward of N tries each; nothing is trained."
    ),
)


def terms(keys: Container[str]) -> list[Term]:
    """The entries for what a page shows, in the glossary's order."""
    return [term for term in TERMS if term.key in keys]


def term_of(key: str) -> str | None:
    """The id of the entry on a metric, None if it has none."""
    return key if any(term.key == key for term in TERMS) else None
