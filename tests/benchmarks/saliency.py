"""How well maps of a reward model point, by method: `python tests/benchmarks/saliency.py RUN [RUN ...]`.

RUN is a run directory with `reward` (of the encoder `convnet`) and `samples_before`. On 24 of its images, drawn by
seed, a table says for each method

- `raise`, `lower`: mean change of the log-odds when the 5, 10, 20 and 30 % of the pixels that the map marks most as
  raising, or as lowering, the reward are replaced by a blurred copy of the image; `random` maps are the mark to beat,
  and a good map makes the first far below 0 and the second far above it;
- `weights`: mean rank correlation of the map's strength with that of the same network with randomized weights
  (arXiv:1810.03292): near 0 is good, near 1 means that the map shows the image and not the network;
- seconds for all images on one thread.

About a minute a run. Prints JSON last.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerAttribution, LayerGradCam, NoiseTunnel, Occlusion
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from torch import Tensor, nn

from pathalign.images import ImageSet
from pathalign.reward import RewardModel, load_reward_model

IMAGES, STEPS, NOISY, NOISE = 24, 32, 8, 0.15
SHARES = (0.05, 0.1, 0.2, 0.3)
Method = Callable[[RewardModel, Tensor, Tensor], Tensor]


def blurred(values: Tensor, sigma: float) -> Tensor:
    """Images or maps, blurred over their last two dimensions."""
    sigmas = (*[0.0] * (values.ndim - 2), sigma, sigma)
    return torch.from_numpy(gaussian_filter(values.numpy(), sigmas, mode="reflect"))


STARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "black": lambda x: torch.full_like(x, -1),
    "grey": torch.zeros_like,
    "blur": lambda x: blurred(x, 6),
    "mean colour": lambda x: x.mean(dim=(2, 3), keepdim=True).expand_as(x).contiguous(),
}


def log_odds(model: RewardModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda pixels, ids: model(pixel_values=pixels, class_ids=ids).logits


def gradients(start: str, smoothing: float = 0) -> Method:
    def method(model: RewardModel, pixels: Tensor, ids: Tensor) -> Tensor:
        found = IntegratedGradients(log_odds(model)).attribute(
            pixels, STARTS[start](pixels), additional_forward_args=(ids,), n_steps=STEPS, internal_batch_size=64
        )
        return blurred(found.detach().sum(1), smoothing)

    return method


def noisy_gradients(start: str, smoothing: float = 0) -> Method:
    def method(model: RewardModel, pixels: Tensor, ids: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = NoiseTunnel(IntegratedGradients(log_odds(model))).attribute(
                pixels,
                nt_samples=NOISY,
                nt_samples_batch_size=1,
                stdevs=NOISE,
                baselines=STARTS[start](pixels),
                additional_forward_args=(ids,),
                n_steps=STEPS,
                internal_batch_size=64,
            )
        return blurred(found.detach().sum(1), smoothing)

    return method


def occlusion(start: str, window: int, stride: int) -> Method:
    @torch.no_grad()
    def method(model: RewardModel, pixels: Tensor, ids: Tensor) -> Tensor:
        return (
            Occlusion(log_odds(model))
            .attribute(pixels, (3, window, window), (3, stride, stride), STARTS[start](pixels), None, (ids,))
            .mean(1)
        )

    return method


def grad_cam(model: RewardModel, pixels: Tensor, ids: Tensor) -> Tensor:
    last = model.encoders[0].network[-3]  # before pooling
    found = LayerGradCam(log_odds(model), last).attribute(pixels, additional_forward_args=(ids,))
    return LayerAttribution.interpolate(found, pixels.shape[-2:], interpolate_mode="bilinear")[:, 0].detach()


def random_map(model: RewardModel, pixels: Tensor, ids: Tensor) -> Tensor:
    seed = int(1000 * next(model.parameters()).abs().sum().item())  # other weights, another map
    drawn = torch.randn(pixels[:, 0].shape, generator=torch.Generator().manual_seed(seed))
    return blurred(drawn, 2)


METHODS: dict[str, Method] = {
    "random, smoothed": random_map,
    **{f"IG from {start}": gradients(start) for start in STARTS},
    "IG from blur, smoothed": gradients("blur", 2),
    "IG from mean colour, smoothed": gradients("mean colour", 2),
    "SmoothGrad IG from mean colour": noisy_gradients("mean colour"),
    "Occlusion by blur, 8 px": occlusion("blur", 8, 2),
    "Occlusion by mean colour, 8 px": occlusion("mean colour", 8, 2),
    "GradCAM, last layer": grad_cam,
}


def randomized(model: RewardModel, pixels: Tensor, ids: Tensor) -> RewardModel:
    """The same network with weights drawn anew, its normalization settled on the images."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for module in other.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    other.train()
    with torch.no_grad():
        for _ in range(20):
            other(pixel_values=pixels, class_ids=ids)
    return other.eval()


@torch.no_grad()
def change(model: RewardModel, pixels: Tensor, ids: Tensor, maps: Tensor, raising: bool) -> float:
    """Mean change of the log-odds when the most marked pixels are blurred."""
    order = maps.flatten(1).argsort(1, descending=raising)
    whole, blur = log_odds(model)(pixels, ids), STARTS["blur"](pixels)
    changes = []
    for share in SHARES:
        count = int(order.shape[1] * share)
        mask = torch.zeros(order.shape).scatter_(1, order[:, :count], 1).view_as(maps)[:, None]
        changes.append((log_odds(model)(pixels * (1 - mask) + blur * mask, ids) - whole).mean().item())
    return float(np.mean(changes))


def measure(run: Path) -> dict[str, dict[str, float]]:
    model = load_reward_model(run / "reward").eval().requires_grad_(False)
    images = ImageSet.load(run / "samples_before")
    images = images.select(np.random.default_rng(0).choice(len(images), IMAGES, replace=False).tolist())
    pixels, ids = images.pixel_values(), model.class_ids(images.labels())
    other = randomized(model, pixels, ids)
    rows = {}
    print(f"{run}\n{'method':32} {'raise':>7} {'lower':>7} {'weights':>8} {'seconds':>8}")
    for name, method in METHODS.items():
        started = time.monotonic()
        maps = method(model, pixels, ids)
        seconds = time.monotonic() - started
        others = method(other, pixels, ids)
        alike = [
            spearmanr(one.abs().flatten(), two.abs().flatten()).statistic for one, two in zip(maps, others, strict=True)
        ]
        values = {
            "raise": change(model, pixels, ids, maps, True),
            "lower": change(model, pixels, ids, maps, False),
            "weights": float(np.mean(alike)),
            "seconds": seconds,
        }
        rows[name] = values
        print(
            f"{name:32} {values['raise']:+7.2f} {values['lower']:+7.2f} {values['weights']:+8.2f} {seconds:8.1f}",
            flush=True,
        )
    return rows


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    torch.set_num_threads(1)
    print(json.dumps({run: measure(Path(run)) for run in sys.argv[1:]}))
