"""What more grades are expected to bring: a power law through held-out losses of models trained on fewer.

    loss(n) = floor + scale * n ** -exponent

Sources: Hestness et al., arXiv:1712.00409, section 3; for the number of labels in medical tasks Figueroa et al., BMC
Medical Informatics and Decision Making 12 (2012) 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import curve_fit

LEVEL, SAMPLES = 0.95, 200
STEEPEST, FLATTEST = 2.0, 0.05  # exponents; outside of these a few points tell the law from no other


@dataclass(frozen=True)
class PowerLaw:
    """A law with numbers; `floor` and `scale` in the unit of the loss, at least 0."""

    floor: float
    scale: float
    exponent: float

    def __call__(self, n: float | np.ndarray) -> float | np.ndarray:
        """Loss after `n` training images."""
        return self.floor + self.scale * np.asarray(n, dtype=float) ** -self.exponent


@dataclass(frozen=True)
class ExpectedGain:
    """Fall of the held-out loss that is expected of more grades, in nats for each image.

    Attributes:
        law: Fitted to the mean losses.
        now: Loss by the law with what is there.
        later: Loss by the law with more.
        gain: Their difference, never below 0: the law does not know of harm.
        low: Lower end of its 95 % interval.
        high: Upper end.
    """

    law: PowerLaw
    now: float
    later: float
    gain: float
    low: float
    high: float


def fit_power_law(sizes: np.ndarray, losses: np.ndarray) -> PowerLaw:
    """Least squares through mean losses.

    Args:
        sizes: Shape `(points,)`, training images, increasing, three points or more.
        losses: Shape `(points,)`.
    """
    scale = sizes[0]  # in units of the smallest size the coefficient has the unit of the loss
    start = (max(losses[-1], 1e-6), max(losses[0] - losses[-1], 1e-6), 0.5)

    def law(n: np.ndarray, floor: float, drop: float, exponent: float) -> np.ndarray:
        return np.asarray(floor + drop * (n / scale) ** -exponent)

    bounds = ([0.0, 0.0, FLATTEST], [np.inf, np.inf, STEEPEST])
    try:
        found, _ = curve_fit(law, sizes.astype(float), losses, p0=start, bounds=bounds, max_nfev=5000)
    except RuntimeError:  # no convergence: nothing is expected of more
        found = (float(losses.mean()), 0.0, 0.5)
    floor, drop, exponent = (float(value) for value in found)
    return PowerLaw(floor, drop * float(scale) ** exponent, exponent)


def expected_gain(sizes: np.ndarray, losses: np.ndarray, now: float, later: float, seed: int) -> ExpectedGain:
    """Extrapolate a learning curve, with a bootstrap over refits and held-out images.

    Args:
        sizes: Shape `(points,)`, training images of each point, increasing.
        losses: Shape `(points, refits, held_out)`, loss of each refit on each held-out image.
        now: Training images that are there.
        later: Training images that there would be.
        seed: Of the bootstrap.

    Returns:
        The gain with an interval: it holds what differs between subsets, refits and held-out images, and nothing of
        whether the law holds beyond the last point.
    """
    points, refits, held_out = losses.shape
    law = fit_power_law(sizes, losses.mean(axis=(1, 2)))
    generator = np.random.default_rng(seed)
    gains = []
    for _ in range(SAMPLES):
        images = generator.integers(held_out, size=held_out)
        chosen = generator.integers(refits, size=(points, refits))
        means = losses[:, :, images].mean(axis=2)
        drawn = fit_power_law(sizes, np.take_along_axis(means, chosen, axis=1).mean(axis=1))
        gains.append(float(drawn(now) - drawn(later)))
    low, high = np.quantile(gains, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    before, after = float(law(now)), float(law(later))
    return ExpectedGain(law, before, after, before - after, float(low), float(high))
