"""The charts and image sheets of the report, as files and as bytes to embed. Colours are Okabe and Ito's, safe for the
colour-blind; marker shapes say the same once more.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from pathalign.images import contact_sheet

SET_TITLES = {
    "before": "Before",
    "after": "After",
    "control": "Control",
    "best_of_n": "Best of N",
    "real": "Real",
}
COLOURS = {"before": "#0072B2", "after": "#D55E00", "control": "#009E73", "best_of_n": "#CC79A7", "real": "#808080"}
MARKERS = {"before": "o", "after": "s", "control": "^", "best_of_n": "D", "real": "X"}
CURVES = {  # figure of a check -> what readers see, colour, marker
    "reward": ("Reward (trained on)", "#D55E00", "s"),
    "held_out_reward": ("Held-out reward", "#0072B2", "o"),
    "judge_share": ("Judge's plausible share", "#009E73", "^"),
}
LIGHT = {"ink": "#1b1f24", "ground": "#ffffff"}
DARK = {"ink": "#e6e9ed", "ground": "#1b1f24"}
SIZE_INCHES = (5.0, 3.2)  # narrow, so that 10 pt text stays readable on a phone
PIXELS_PER_INCH = 200  # twice the screen's


@dataclass(frozen=True)
class Chart:
    """A chart as PNG bytes for light and dark pages, and its files as a page beside their folder links them."""

    light: bytes
    dark: bytes
    files: tuple[str, ...]


def draw(path: Path, plot: Callable[[Axes], None]) -> Chart:
    """Draw one chart, also into the files `path` + `.png` and `.svg`, light on white."""
    images = {}
    for theme, colours in (("light", LIGHT), ("dark", DARK)):
        ink, ground = colours["ink"], colours["ground"]
        style: Any = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style |= {"axes.edgecolor": ink, "axes.facecolor": ground, "legend.frameon": False, "font.size": 10}
        style |= {"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": path.name}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=SIZE_INCHES, layout="constrained", facecolor=ground)
            plot(figure.add_subplot())
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=PIXELS_PER_INCH)
            images[theme] = buffer.getvalue()
            if theme == "light":
                path.with_suffix(".png").write_bytes(images[theme])
                figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    files = tuple(f"{path.parent.name}/{path.name}{ending}" for ending in (".png", ".svg"))
    return Chart(images["light"], images["dark"], files)


def plausible_shares(axes: Axes, sets: dict[str, Any]) -> None:
    """Plausible share of each measured set with its interval."""
    names = [name for name in SET_TITLES if sets.get(name)]
    for row, name in enumerate(names):
        _point(axes, row, sets[name]["plausible_share"], sets[name]["plausible_ci"], name)
        axes.annotate(
            f"{100 * sets[name]['plausible_share']:.0f} %",
            (100 * sets[name]["plausible_share"], row),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
        )
    axes.set_yticks(range(len(names)), [SET_TITLES[name] for name in names])
    _percent_axis(axes, len(names))


def class_shares(axes: Axes, sets: dict[str, Any]) -> None:
    """Plausible share of each class, before and after, with intervals."""
    classes = list(sets["before"]["per_class"])
    for name, shift in (("before", -0.15), ("after", 0.15)):
        for row, label in enumerate(classes):
            entry = sets[name]["per_class"][label]
            legend = SET_TITLES[name] if row == 0 else None
            _point(axes, row + shift, entry["plausible_share"], entry["plausible_share_ci"], name, legend)
    axes.set_yticks(range(len(classes)), classes)
    _percent_axis(axes, len(classes))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def _point(axes: Axes, row: float, value: float, interval: list[float], name: str, legend: str | None = None) -> None:
    reach = 100 * np.clip([[value - interval[0]], [interval[1] - value]], 0, None)
    axes.errorbar(
        100 * value, row, xerr=reach, fmt=MARKERS[name], color=COLOURS[name], capsize=3, markersize=7, label=legend
    )


def _percent_axis(axes: Axes, rows: int) -> None:
    axes.set_xlim(-3, 103)
    axes.set_ylim(rows - 0.5, -0.6)
    axes.set_xlabel("images judged plausible (%)")
    axes.grid(axis="x", alpha=0.25)


def criterion_rewards(axes: Axes, sets: dict[str, Any]) -> None:
    """Mean reward of each criterion, before and after, with intervals."""
    names = list(sets["before"]["per_criterion_reward"])
    for name, shift in (("before", -0.15), ("after", 0.15)):
        for row, criterion in enumerate(names):
            entry = sets[name]["per_criterion_reward"][criterion]
            legend = SET_TITLES[name] if row == 0 else None
            _point(axes, row + shift, entry["mean_reward"], entry["mean_reward_ci"], name, legend)
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    _percent_axis(axes, len(names))
    axes.set_xlabel("mean reward of the criterion")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 100:.1f}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def reward_histogram(axes: Axes, rewards: dict[str, np.ndarray]) -> None:
    """Distribution of rewards before and after."""
    bins = np.linspace(0, 1, 21).tolist()
    for name, line in (("before", "--"), ("after", "-")):
        label = f"{SET_TITLES[name]} (mean {rewards[name].mean():.2f})"
        axes.hist(rewards[name], bins, histtype="step", linewidth=2, linestyle=line, color=COLOURS[name], label=label)
    axes.set_xlabel("reward")
    axes.set_ylabel("images")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def calibration_plot(axes: Axes, bins: list[dict[str, float]]) -> None:
    """Graded plausibility against predicted reward; the area of a point grows with its number of images."""
    counts = np.asarray([entry["n"] for entry in bins])
    rewards, plausible = ([entry[key] for entry in bins] for key in ("reward", "plausible"))
    axes.plot([0, 1], [0, 1], linestyle=":", color=COLOURS["real"], label="perfectly calibrated")
    axes.plot(rewards, plausible, color=COLOURS["before"], linewidth=1)
    axes.scatter(rewards, plausible, s=20 + 180 * counts / counts.max(), c=COLOURS["before"], label="held-out grades")
    axes.set_xlabel("mean reward of the bin")
    axes.set_ylabel("graded plausible")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.05, 1.05)
    axes.legend(loc="upper left")


def check_curves(axes: Axes, training: dict[str, Any]) -> None:
    """Reward, held-out reward and judge's share at each check of a training; a line marks the weights that were kept.

    Args:
        axes: Drawn on.
        training: `checks`, a list of figures with their `epoch`, and `kept_epoch`.
    """
    checks = training["checks"]
    for name, (title, colour, marker) in CURVES.items():
        points = [(check["epoch"], check[name]) for check in checks if name in check]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=title)
    axes.axvline(training["kept_epoch"], linestyle=":", color=COLOURS["real"], label="kept")
    axes.set_xlabel("epochs")
    axes.set_ylabel("mean over the check's images")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


def save_sheet(path: Path, images: Tensor, columns: int) -> None:
    """Write a grid of uint8 images of shape `(n, 3, height, width)` as PNG, small images enlarged."""
    contact_sheet(images, columns, scale=max(1, 64 // images.shape[-1])).save(path)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Alternate the images of two tensors of shape `(n, 3, height, width)`: shape `(2 * n, ...)`."""
    return torch.stack([left, right], dim=1).flatten(0, 1)


def png_bytes(image: Tensor) -> bytes:
    """A uint8 image of shape `(3, height, width)` as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="png")
    return buffer.getvalue()


def save_overlays(path: Path, shown: list[tuple[Tensor, bytes]], columns: int = 3) -> None:
    """Write images of shape `(3, height, width)`, uint8, each with the PNG of its map to its right, as one PNG."""
    tiles = []
    for image, overlay in shown:
        with Image.open(io.BytesIO(overlay)) as drawn:
            enlarged = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(drawn.size, Image.Resampling.LANCZOS)
            pair = [torch.from_numpy(np.array(half.convert("RGB"))).permute(2, 0, 1) for half in (enlarged, drawn)]
        tiles.append(torch.cat(pair, dim=2))
    contact_sheet(torch.stack(tiles), columns, scale=1, gap_px=8).save(path)
