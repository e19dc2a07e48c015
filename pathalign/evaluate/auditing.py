"""Sample-level metrics that audit a generator: alpha-precision, beta-recall and authenticity.

Source: Alaa, van Breugel, Saveliev and van der Schaar, "How Faithful is your Synthetic Data? Sample-level Metrics for
Evaluating and Auditing Generative Models", arXiv:2102.08921. What differs here, on purpose:

- The paper first embeds all features with a one-class network, trained so that real images fill a ball around a
  centre. Here the features are taken as they are, and the centre is the mean of the real images. Training a network
  would make the figures depend on one more seed; the price is that supports are balls in feature space, which a
  distribution of several modes does not fill.
- Beta-recall is that of the authors' published code, which asks how central the one nearest generated image is, and
  not, as the text does, for any generated image of the beta-support: the latter is far above the diagonal for equal
  distributions in many dimensions. k is the text's; the code has k = 1, for which equal distributions reach 1/2.
- Authenticity is the text's, for each generated image; the code looks from the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathalign.evaluate.neighbours import Neighbours, distances_to, mean_of, radii

LEVELS = 101


@dataclass(frozen=True)
class Supports:
    """Alpha-precision and beta-recall curves.

    Attributes:
        levels: Shape `(levels,)`, alpha and beta from 0 to 1.
        alpha_precision: Shape `(levels,)`: share of generated images in the ball around the real images' centre that
            holds the share alpha of them. Equal to alpha if the distributions are equal.
        beta_recall: Shape `(levels,)`: share of real images whose nearest generated one is no farther than their k-th
            real neighbour, and among the share beta of all those nearest ones that is most central. Equal to
            beta * (1 - 2^-k) for equal distributions and as many images.
    """

    levels: np.ndarray
    alpha_precision: np.ndarray
    beta_recall: np.ndarray

    def integrated(self) -> dict[str, float]:
        """IP_alpha and IR_beta, 1 - 2 * integral of |curve - level|: 1 where a curve is the diagonal, 0 at worst."""
        return {
            "alpha_precision": 1 - 2 * float(np.trapezoid(np.abs(self.alpha_precision - self.levels), self.levels)),
            "beta_recall": 1 - 2 * float(np.trapezoid(np.abs(self.beta_recall - self.levels), self.levels)),
        }


def supports(real: np.ndarray, generated: np.ndarray, neighbours: int, levels: int = LEVELS) -> Supports:
    """Compare features of shapes `(n, d)` and `(m, d)`; n > `neighbours`, and best m = n.

    Args:
        real: Features of real images.
        generated: Features of generated images.
        neighbours: k of beta-recall.
        levels: Number of alphas and betas, both ends included.
    """
    steps = np.linspace(0, 1, levels)
    centre, own_centre = mean_of(real), mean_of(generated)
    limits = np.quantile(distances_to(centre, real), steps)
    to_centre = np.sort(distances_to(centre, generated))
    precision = np.searchsorted(to_centre, limits, side="right") / len(generated)

    distances, nearest = (found[:, 0] for found in Neighbours(generated).nearest(real))
    centrality = distances_to(own_centre, generated)[nearest]
    central = np.sort(centrality[distances <= radii(real, neighbours)])
    recall = np.searchsorted(central, np.quantile(centrality, steps), side="right") / len(real)
    return Supports(steps, precision, recall)


def authentic(train: np.ndarray, generated: np.ndarray) -> np.ndarray:
    """Whether each generated image is farther from its nearest training image than that is from the next one.

    Of copies none is. Of images drawn like the training images, many and evenly spread, (1 - o) / (2 - o) are, almost
    half: o is the part that two balls share which reach to each other's centre, 1/2 in one dimension and towards 0 in
    many. Where density varies it is more, since the nearest training image then tends to have near neighbours itself.

    Args:
        train: Features of the training images, shape `(n, d)`, n > 1.
        generated: Features, shape `(m, d)`.

    Returns:
        Shape `(m,)`, bool.
    """
    search = Neighbours(train)
    spacing = search.nearest(train, 2)[0][:, 1]
    distances, rows = search.nearest(generated)
    return np.asarray(distances[:, 0] > spacing[rows[:, 0]])
