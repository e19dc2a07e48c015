"""Why a reward is what it is: the rewards of single criteria, and where in the image the reward model looks.

Where: Integrated Gradients (Sundararajan et al., arXiv:1703.01365, eq. 1) by Captum, on the calibrated log-odds of
plausible, from an image of the same mean colour and no structure, smoothed a little. Chosen on one run among other
starting images, SmoothGrad (arXiv:1706.03825), Occlusion and GradCAM, and confirmed on two others
(`tests/benchmarks/saliency.py`): covering what it marks changes the reward more than with any other method, only a
blurred image to start from does as well; it works with every encoder, and its parts add up to the whole. Randomized
weights (arXiv:1810.03292) change its maps, though both show where there is a cell: read the signs, not only the places.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from torch import Tensor

from pathalign.reward.image_processing_reward import RewardImageProcessor, load_image, paired
from pathalign.reward.modeling_reward import RewardModel
from pathalign.schema import InputError

STEPS = 64  # of the integral; the parts then miss the whole by 0.02 log-odds in the mean, by 6 % at worst
SMOOTHING = 1 / 16  # standard deviation of the smoothing, as a part of the image's width
RAISES, LOWERS = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and vermilion, told apart by the colour-blind too
OUTLINED = 0.5  # of the full colour: what reaches that gets a line around it
OVERLAY_SIZE_PX = 192


@dataclass(frozen=True)
class Explanation:
    """What the reward model says of images, part by part. All on the CPU, float32.

    Attributes:
        rewards: Shape `(n,)`, calibrated probability of plausible, 0..1.
        criteria: Names of the checklist's criteria.
        criteria_rewards: Shape `(n, len(criteria))`, probability that each criterion is met, 0..1, not calibrated.
        saliency: Shape `(n, size, size)`, `size` being the model's `image_size_px`: how much each pixel raises (above
            0) or lowers the calibrated log-odds of plausible. A map's sum is its `evidence`.
        evidence: Shape `(n,)`: calibrated log-odds of the image less those of an image of its mean colour.
    """

    rewards: Tensor
    criteria: tuple[str, ...]
    criteria_rewards: Tensor
    saliency: Tensor
    evidence: Tensor

    @property
    def scale(self) -> float:
        """Saliency that an overlay shows in full colour: one pixel in a hundred of these images reaches it. Above 0."""
        return max(float(np.quantile(self.saliency.abs().numpy(), 0.99)), 1e-12)


def require_captum() -> Any:
    """The library that attributes.

    Raises:
        InputError: If it is not installed.
    """
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise InputError(
            "Captum, which finds where the reward model looks, is not installed: `pip install 'pathalign[eval]'`."
        ) from error
    return IntegratedGradients


@torch.no_grad()
def reward_parts(model: RewardModel, pixel_values: Tensor, class_ids: Tensor) -> Tensor:
    """The reward, and the probability that each criterion is met: shape `(n, 1 + len(criteria))`, float32 in 0..1.

    The heads of the criteria are not calibrated: read them against each other, not as frequencies. Arguments as in
    `RewardModel.forward`.
    """
    output = model(pixel_values=pixel_values, class_ids=class_ids)
    criteria = [] if output.criteria_logits is None else [torch.sigmoid(output.criteria_logits)]
    return torch.cat([output.rewards[:, None], *criteria], dim=1)


def explain(model: RewardModel, images: Any, class_labels: str | Sequence[str], batch_size: int = 16) -> Explanation:
    """Say what the reward model thinks of each criterion, and where it looks. The same inputs give the same bytes.

    Args:
        model: Any reward model; it is used in evaluation mode.
        images: One or several: PIL images, files, or uint8 arrays `(height, width, 3)` of any size.
        class_labels: Names from `model.config.class_names`: one for all images, or one for each.
        batch_size: Images explained at once; each costs about as much as 200 rewards.

    Raises:
        InputError: If a class is unknown, or Captum is not installed.
        ValueError: If the numbers differ, or an image is none of these.
        OSError: If a file cannot be read.
    """
    require_captum()
    pairs = paired(images, class_labels)
    ids = model.class_ids([label for _, label in pairs])
    processor = RewardImageProcessor(image_size_px=model.config.image_size_px)
    training = model.training
    model.eval()
    try:
        parts = [
            _explain_batch(
                model,
                processor([load_image(image) for image, _ in pairs[start : start + batch_size]])["pixel_values"],
                ids[start : start + batch_size],
            )
            for start in range(0, len(pairs), batch_size)
        ]
    finally:
        model.train(training)
    judged, saliency, evidence = (torch.cat(part).float().cpu() for part in zip(*parts, strict=True))
    return Explanation(judged[:, 0], tuple(model.config.criteria), judged[:, 1:], saliency, evidence)


def _explain_batch(model: RewardModel, pixel_values: Tensor, class_ids: Tensor) -> tuple[Tensor, ...]:
    pixel_values, class_ids = pixel_values.to(model.device), class_ids.to(model.device)
    without_structure = pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values).contiguous()

    def log_odds(pixels: Tensor, ids: Tensor) -> Tensor:
        logits: Tensor = model(pixel_values=pixels, class_ids=ids).logits
        return logits / model.config.temperature

    attributed = require_captum()(log_odds).attribute(
        pixel_values,
        baselines=without_structure,
        additional_forward_args=(class_ids,),
        n_steps=STEPS,
        internal_batch_size=max(64, len(pixel_values)),
    )
    with torch.no_grad():
        evidence = log_odds(pixel_values, class_ids) - log_odds(without_structure, class_ids)
    return reward_parts(model, pixel_values, class_ids), _smoothed(attributed.detach().sum(dim=1)), evidence


def _smoothed(maps: Tensor) -> Tensor:
    """Maps `(n, height, width)` a little blurred: single pixels are noise. Mirrored borders keep the sum."""
    sigma = SMOOTHING * maps.shape[-1]
    return torch.from_numpy(gaussian_filter(maps.double().cpu().numpy(), (0, sigma, sigma), mode="reflect"))


def overlay(image: Any, saliency: Tensor, scale: float, size_px: int = OVERLAY_SIZE_PX) -> bytes:
    """A map over its image in grey, as PNG.

    Blue raises the reward, orange lowers it, and for who sees no colours what weighs most has a line around it, whole
    where it raises and dashed where it lowers.

    Args:
        image: As in `explain`; of any size.
        saliency: Its map, shape `(height, width)`.
        scale: Saliency of full colour, above 0; `Explanation.scale`, or one for several maps that are compared.
        size_px: Width and height of the picture.
    """
    shape = (size_px, size_px)
    grey = np.asarray(load_image(image).convert("L").resize(shape, Image.Resampling.LANCZOS), np.float32)
    ground = np.repeat(90 + 165 * grey[..., None] / 255, 3, axis=2)  # pale, so that colours stand out
    drawn = Image.fromarray(saliency.numpy().astype(np.float32)).resize(shape, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(drawn) / scale, -1, 1)
    colour = np.where((strength > 0)[..., None], RAISES, LOWERS).astype(np.float32)
    opacity = 0.8 * np.abs(strength)[..., None]
    shown = ground * (1 - opacity) + colour * opacity
    rows, columns = np.indices(shape)
    for sign, visible in ((1, np.ones(shape, bool)), (-1, (rows + columns) // 4 % 2 == 0)):
        area = sign * strength >= OUTLINED
        shown[area & ~binary_erosion(area, iterations=3) & visible] = RAISES if sign > 0 else LOWERS
    buffer = io.BytesIO()
    Image.fromarray(shown.round().astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
