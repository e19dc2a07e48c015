from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from pathalign.evaluate import figures, report, tables
from pathalign.evaluate.alignment import Verdicts
from pathalign.evaluate.explained import Chosen, CloseLook, criterion_metrics, criterion_skill
from pathalign.images import ImageSet
from pathalign.schema import DISCLAIMER, RunRecord

SETS = ("before", "after", "control", "best_of_n", "real")
CLASSES = ("band <neutrophil>", "lymphocyte")
VOID = {"meta", "img", "source", "br"}


class Outline(HTMLParser):
    """Collects what a reader or a screen reader meets, and fails on tags that do not close."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and not {"style", "title"} & set(self.open):
            self.text.append(data.strip())


def measured(share: float, reward: float | None) -> dict[str, Any]:
    shares = ("precision", "recall", "coverage", "no_near_copy", "authenticity", "utility_accuracy", "grader_share")
    shares += ("nearer_to_train", "augment_accuracy")
    return {
        "n": 8,
        "plausible_share": share,
        "plausible_ci": [share - 0.05, share + 0.05],
        **dict.fromkeys(shares, 0.75),
        **{f"{name}_ci": [0.7, 0.8] for name in shares},
        "density": 0.9,
        "alpha_precision": 0.8,
        "beta_recall": 0.7,
        "nearer_to_train_p": 0.5,
        "kid": 0.012,
        "kid_sd": 0.001,
        "fid": 1.5,
        "fid_dimensions": 2,
        "fid_reduced": False,
        "grader_judge_kappa": 0.6,
        "mean_reward": reward,
        "mean_reward_ci": None if reward is None else [reward - 0.02, reward + 0.02],
        "n_fidelity": 6,
        "n_utility": 5,
        "n_utility_test": 7,
        "n_augment": 9,
        "n_memorization": 8,
        "per_class": {
            name: {"n": 4, "plausible_share": share, "plausible_share_ci": [share - 0.1, share + 0.1]}
            for name in CLASSES
        },
        "per_criterion": {"nucleus": {"n": 8, "failed_share": 0.2, "failed_share_ci": [0.1, 0.3]}},
        "per_criterion_reward": {
            "nucleus": {"n": 8, "mean_reward": 0.6 * share, "mean_reward_ci": [0.5 * share, 0.7 * share]},
            "granules": {"n": 8, "mean_reward": 0.9, "mean_reward_ci": [0.88, 0.92]},
        },
    }


def example_metrics() -> dict[str, Any]:
    shares = {
        "before": (0.5, 0.4),
        "after": (0.7, 0.6),
        "control": (0.55, 0.45),
        "best_of_n": (0.6, 0.7),
        "real": (0.9, 0.8),
    }
    return {
        "reward": {"roc_auc": 0.91, "roc_auc_ci": [0.85, 0.96], "ece": 0.03, "n": 200, "per_class": {}},
        "metrics": {name: measured(*values) for name, values in shares.items()},
        "plausible_gain": 0.2,
        "plausible_gain_ci": [0.1, 0.3],
        "gain_over_control": 0.15,
        "gain_over_control_ci": [0.05, 0.25],
        "gap_closed": 0.5,
        "gap_closed_ci": [0.3, 0.7],
        "reward_hacking": False,
        "worse": [
            {
                "name": "recall",
                "before": 0.8,
                "after": 0.7,
                "difference": -0.1,
                "interval": [-0.2, -0.05],
                "verdict": "open",
                "notable": False,
            },
            {
                "name": "KID",
                "before": 0.1,
                "after": 0.7,
                "difference": 0.6,
                "interval": None,
                "verdict": "no interval",
                "notable": False,
            },
            {
                "name": "precision",
                "before": 0.8,
                "after": 0.7,
                "difference": -0.1,
                "interval": [-0.2, -0.05],
                "verdict": "clear",
                "notable": True,
            },
        ],
        "criterion_skill": {"nucleus": {"n": 40, "n_failed": 12, "roc_auc": 0.84}},
        "confidence": 0.95,
        "simulated": True,
    }


def example_exhibits() -> report.Exhibits:
    generator = torch.Generator().manual_seed(0)

    def images(count: int) -> ImageSet:
        pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
        return ImageSet.build(pixels, torch.arange(count) % 2, CLASSES, {"seed": list(range(count))})

    verdicts = Verdicts(np.arange(8) % 2 == 0, ("nucleus",), (np.arange(8) % 2 == 1)[:, None])
    pair = {"row": 3, "train_row": 1, "orientation": 5, "distance": 0.25, "near_copy": True}
    return report.Exhibits(
        sets={name: images(8) for name in SETS},
        verdicts=dict.fromkeys(SETS, verdicts),
        rewards={name: np.linspace(0.1, 0.9, 8) for name in SETS},
        train=images(4),
        closest=[pair, {**pair, "row": 0, "near_copy": False}],
        calibration=[{"n": 10, "reward": 0.2, "plausible": 0.25}, {"n": 30, "reward": 0.8, "plausible": 0.7}],
        phantom=False,
        close_look=example_close_look(),
    )


def example_close_look() -> CloseLook:
    """Rewards that rise with the row before and less so after: row 0 rose most, row 7 fell most."""
    before, after = np.linspace(0.1, 0.9, 8), np.linspace(0.4, 0.6, 8)
    chosen = Chosen.by_reward(before, after)
    drawn = figures.png_bytes(torch.zeros(3, 16, 16, dtype=torch.uint8))
    criteria = {
        "before": np.stack([before, np.full(8, 0.95)], axis=1),
        "after": np.stack([after, np.full(8, 0.951)], axis=1),
    }
    overlays = {name: dict.fromkeys(chosen.rows(name), drawn) for name in ("before", "after")}
    return CloseLook(chosen, ("nucleus", "granules"), criteria, overlays)


def render(folder: Path, metrics: dict[str, Any], exhibits: report.Exhibits) -> tuple[str, Outline]:
    record = RunRecord("evaluate", {"encoder": "tiny", "neighbours": 5, "seed": 0, "bootstrap_samples": 200})
    report.write(folder, metrics, exhibits, record)
    page = (folder / "report.html").read_text(encoding="utf-8")
    return page, Outline(page)


@pytest.fixture
def metrics() -> dict[str, Any]:
    return example_metrics()


@pytest.fixture
def exhibits() -> report.Exhibits:
    return example_exhibits()


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Outline]:
    folder = tmp_path_factory.mktemp("report")
    return folder, *render(folder, example_metrics(), example_exhibits())


def without(metrics: dict[str, Any], exhibits: report.Exhibits) -> tuple[dict[str, Any], report.Exhibits]:
    """The same evaluation without control, best of N, reward model and grader."""
    sets = {name: metrics["metrics"][name] for name in ("before", "after", "real")}
    absent: dict[str, Any] = dict.fromkeys(
        ("mean_reward", "mean_reward_ci", "grader_share", "grader_share_ci", "grader_judge_kappa")
    )
    absent["per_criterion_reward"] = {}
    sets = {name: values | absent for name, values in sets.items()} | {"control": None, "best_of_n": None}
    less = {name: value for name, value in metrics.items() if name != "criterion_skill"}
    less |= {"metrics": sets, "reward": {}, "gain_over_control": None, "gain_over_control_ci": None}
    kept = {name: exhibits.sets[name] for name in ("before", "after", "real")}
    return less, report.Exhibits(kept, exhibits.verdicts, {}, exhibits.train, exhibits.closest, [], phantom=True)


def test_the_report_is_one_file_that_asks_for_nothing_from_elsewhere(rendered):
    _, page, outline = rendered
    addresses = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}[^\s\"']*", re.sub(r"base64,[^\"]+", "", page))
    assert [address for address in addresses if "www.w3.org" not in address] == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in outline.tags}
    sources = [attrs.get("src") or attrs.get("srcset") or "" for tag, attrs in outline.tags if tag in ("img", "source")]
    assert len(sources) > 30 and all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_report_can_be_read_aloud(rendered):
    *_, outline = rendered
    assert all(attrs.get("alt") for tag, attrs in outline.tags if tag == "img")
    headings = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))
    tags = [tag for tag, _ in outline.tags]
    assert tags.count("table") == tags.count("caption") == 7
    assert all(attrs.get("scope") in ("row", "col") for tag, attrs in outline.tags if tag == "th")
    assert dict(outline.tags[0][1])["lang"] == "en"


def test_the_pictures_come_first_then_the_tables_then_the_method(rendered):
    *_, outline = rendered
    ids = [attrs["id"] for tag, attrs in outline.tags if tag == "h2"]
    shown = ["pictures", "shares", "metrics", "terms", "worse", "classes", "looks", "copies", "reward", "method"]
    assert ids == shown
    links = [attrs["href"] for tag, attrs in outline.tags if tag == "a" and str(attrs["href"]).startswith("#")]
    assert links[: len(ids)] == [f"#{name}" for name in ids]


def test_every_figure_is_shown_with_its_interval_and_number_of_images(rendered):
    *_, outline = rendered
    text = " ".join(outline.text)
    for expected in (
        "70.0 % 65.0 to 75.0 n = 8",
        "75.0 % 70.0 to 80.0 n = 6",
        "75.0 % 70.0 to 80.0 n = 7",
        "roc_auc 0.910 0.850 to 0.960",
    ):
        assert expected in text
    assert outline.text.count("not measured") == 2  # what the judge says of a criterion that only the reward model has
    assert "-0.100 -0.200 to -0.050 may be chance or not the interval takes the images as given" in text
    assert "+0.600 no interval" in text
    assert "▼ clear" in text and "✗ near-copy" in text and "✓ no near-copy" in text and "fails nucleus" in text
    assert text.count(DISCLAIMER) == 2 and "phantom" not in text


def test_class_names_are_escaped(rendered):
    _, page, outline = rendered
    assert "<neutrophil>" not in page and any("band <neutrophil>" in text for text in outline.text)


def test_what_was_not_given_is_called_not_measured_and_a_phantom_a_phantom(tmp_path, metrics, exhibits):
    _, outline = render(tmp_path, *without(metrics, exhibits))
    cells = [text for text in outline.text if text == "not measured"]
    assert len(cells) >= 2 * len(report.ROWS)  # control and best of N
    text = " ".join(outline.text)
    assert (
        "Rewards: not measured." in text and "held-out feedback; larger points hold more images — not measured" in text
    )
    assert "are a phantom : drawn by a program" in text
    assert not (tmp_path / "figures/rewards.png").exists()


def test_reward_hacking_is_the_first_line(tmp_path, metrics, exhibits):
    metrics |= {"reward_hacking": True, "plausible_gain": -0.2, "plausible_gain_ci": [-0.3, -0.1]}
    metrics["metrics"]["after"]["plausible_share"] = 0.3
    page, outline = render(tmp_path, metrics, exhibits)
    expected = (
        "Reward hacking: the mean reward rose from 0.400 to 0.600, while the independent judge's plausible share fell"
    )
    assert outline.text[0].startswith(expected)
    assert report.summary_table(metrics).startswith(expected)
    assert "<title>Reward hacking: " in page


def test_without_hacking_the_first_line_is_no_alarm(rendered, metrics):
    *_, outline = rendered
    assert outline.text[0] == "Alignment report: before and after"
    assert "Reward hacking:" not in report.summary_table(metrics)


def test_the_plain_table_has_a_column_for_each_set_and_fits_a_terminal(metrics, exhibits):
    table = report.summary_table(metrics).splitlines()
    assert table[0].split() == ["Before", "After", "Control", "Best", "of", "N", "Real"]
    assert table[2].split() == ["Plausible", "(judge)", "50.0", "%", "70.0", "%", "55.0", "%", "60.0", "%", "90.0", "%"]
    assert max(len(line) for line in table[: 2 + len(report.ROWS)]) <= 80
    less = report.summary_table(without(metrics, exhibits)[0]).splitlines()
    assert less[2].split() == ["Plausible", "(judge)", "50.0", "%", "70.0", "%", "-", "-", "90.0", "%"]


def test_the_headline_says_when_there_is_no_gap_or_no_interval(metrics):
    assert "closed: 50.0 % (95 % interval 30.0 to 70.0 %)" in report.headline(metrics)
    assert "too small for an interval" in report.headline(metrics | {"gap_closed_ci": None})
    assert "no gap to close" in report.headline(metrics | {"gap_closed": None, "gap_closed_ci": None})


def test_figures_are_also_files_and_drawn_at_twice_the_screens_resolution(rendered):
    folder, *_ = rendered
    names = {path.name for path in (folder / "figures").iterdir()}
    charts = {"plausible_share", "per_class", "rewards", "calibration", "criteria"}
    sheets = {"samples_before.png", "samples_after.png", "closest_training_pairs.png"}
    sheets |= {f"looks_{group}.png" for group in ("risen", "fallen", "lowest", "highest")}
    assert names == {f"{name}.{ending}" for name in charts for ending in ("png", "svg")} | sheets
    with Image.open(folder / "figures/rewards.png") as image:
        assert image.size == (1000, 640)


def test_the_page_links_to_every_figure_that_is_a_file(rendered):
    folder, _, outline = rendered
    links = {str(attrs["href"]) for tag, attrs in outline.tags if tag == "a" and not str(attrs["href"]).startswith("#")}
    assert links == {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    targets = {f"#{attrs['id']}" for _, attrs in outline.tags if "id" in attrs}
    assert {str(attrs["href"]) for tag, attrs in outline.tags if tag == "a"} - links <= targets


def test_the_words_of_the_table_are_in_the_glossary_once_each(rendered):
    *_, outline = rendered
    ids = [attrs["id"] for _, attrs in outline.tags if str(attrs.get("id")).startswith("term-")]
    assert len(set(ids)) == len(ids)
    named = {"precision", "recall", "density", "coverage", "kid", "fid", "authenticity", "utility_accuracy"}
    assert {f"term-{row.key}" for row in report.ROWS if row.key in named} <= set(ids) and len(named) == 8


def test_the_plain_words_count_in_hundreds_and_say_when_chance_explains_the_change(metrics):
    text = report.in_plain_words(metrics)
    assert "Of 100 images of the base model the judge finds 50 plausible, of 100 of the aligned model 70" in text
    assert "90. The rise is larger than chance explains." in text
    assert "Chance alone could explain" in report.in_plain_words(metrics | {"plausible_gain_ci": [-0.01, 0.3]})
    assert "The fall is larger" in report.in_plain_words(metrics | {"plausible_gain_ci": [-0.3, -0.1]})


def test_the_images_that_are_looked_at_are_the_extremes_and_the_pairs_that_changed_most():
    before, after = np.array([0.5, 0.9, 0.1, 0.4, 0.4]), np.array([0.6, 0.2, 0.7, 0.4, 0.3])
    chosen = Chosen.by_reward(before, after)
    assert chosen.lowest[:3] == [1, 4, 3] and chosen.highest[:3] == [2, 0, 3]
    assert chosen.risen == [2, 0] and chosen.fallen == [1, 4]  # an unchanged pair is in neither
    assert chosen.rows("before") == [0, 1, 2, 4] and chosen.rows("after") == [0, 1, 2, 3, 4]


def test_the_criteria_are_shown_for_single_images_and_in_the_eyes_of_reward_model_and_judge(rendered):
    *_, outline = rendered
    text = " ".join(outline.text)
    assert "nucleus 0.10 → 0.40" in text and "nucleus 0.90 → 0.60" in text
    assert "granules 0.95 → 0.95" not in text  # nothing that can be seen has changed
    assert "nucleus 0.300 0.250 to 0.350 n = 8 0.420 0.350 to 0.490 n = 8 80.0 % 70.0 to 90.0 n = 8" in text
    assert "granules 0.900 0.880 to 0.920 n = 8 0.900 0.880 to 0.920 n = 8 not measured not measured" in text
    assert "nucleus 0.840 12 40" in text


def test_the_rewards_of_criteria_are_summed_up_with_intervals_and_checked_against_grades():
    rewards = np.array([[0.1, 0.5], [0.3, 0.5], [0.8, 0.5], [0.9, 0.5]] * 10)
    measured = criterion_metrics(("nucleus", "granules"), rewards, samples=200, confidence=0.95, seed=0)
    assert measured["nucleus"]["mean_reward"] == pytest.approx(0.525) and measured["nucleus"]["n"] == 40
    low, high = measured["nucleus"]["mean_reward_ci"]
    assert 0.1 <= low < 0.525 < high <= 0.9
    assert measured["granules"]["mean_reward_ci"] == pytest.approx([0.5, 0.5])
    columns = {"failed_nucleus": [1.0, 0.0, 0.5, 0.0] * 10, "failed_granules": ([1.0] * 9 + [0.0] + [None, 0.0] * 15)}
    graded = ImageSet.build(torch.zeros(40, 3, 8, 8, dtype=torch.uint8), torch.zeros(40), ("a",), columns)
    skill = criterion_skill(("nucleus", "granules"), rewards, graded)
    assert skill["nucleus"] == {"n": 30, "n_failed": 10, "roc_auc": 1.0}  # ties of the graders are left out
    assert skill["granules"] == {"n": 25, "n_failed": 9, "roc_auc": None}  # one too few to say


def test_paired_gains_are_tabled_in_points_where_they_were_measured(metrics):
    titles = {"precision": "Precision", "recall": "Recall", "coverage": "Coverage"}
    assert tables.gains(metrics, titles) is None
    metrics["gains"] = {"precision": {"gain": 0.05, "ci": [0.01, 0.09]}, "recall": {"gain": -0.02, "ci": [-0.06, 0.02]}}
    metrics["gains_over_control"] = {"precision": {"gain": 0.1, "ci": [0.02, 0.18]}}
    rows = {
        row.title: [(entry.value, entry.interval) for entry in row.cells] for row in tables.gains(metrics, titles).rows
    }
    assert rows == {
        "Precision": [("+5.0", "1.0 to 9.0"), ("+10.0", "2.0 to 18.0")],
        "Recall": [("-2.0", "-6.0 to 2.0"), ("not measured", "")],
    }


def test_an_older_evaluation_without_rewards_of_criteria_is_still_a_page(tmp_path, metrics, exhibits):
    del metrics["criterion_skill"]
    for values in metrics["metrics"].values():
        del values["per_criterion_reward"], values["utility_accuracy"]
    _, outline = render(tmp_path, metrics, dataclasses.replace(exhibits, close_look=CloseLook()))
    text = " ".join(outline.text)
    assert "Rewards: not measured." in text and "in the eyes of" not in text


def test_the_training_image_of_a_pair_is_turned_as_it_was_found(exhibits):
    flipped = exhibits.train.images[1].flip(-1)
    expected = torch.rot90(flipped, 1, (-2, -1))  # orientation 5: flipped, then one quarter turn
    assert torch.equal(report.nearest_training(exhibits)[0], expected)


def watched(*observers: str) -> dict[str, Any]:
    """Checks of a training that was stopped after epoch 4 and went back to epoch 2."""
    values = {"reward": [0.3, 0.4, 0.5], "held_out_reward": [0.3, 0.45, 0.2], "judge_share": [0.5, 0.625, 0.375]}
    checks = [{"epoch": 2 * row, **{name: values[name][row] for name in ("reward", *observers)}} for row in range(3)]
    return {"checks": checks, "n_check_images": 40, "reward_hacking": True, "stopped_at": 4, "kept_epoch": 2}


def test_the_checks_of_the_training_are_plotted_and_tabled(tmp_path, metrics, exhibits):
    metrics["training"] = watched("held_out_reward", "judge_share")
    _, outline = render(tmp_path, metrics, exhibits)
    text = " ".join(outline.text)
    assert "Epoch Reward (trained on) Held-out reward Judge's plausible share" in text
    assert "0 0.300 0.300 0.500 2 0.400 0.450 0.625 4 0.500 0.200 0.375" in text
    assert "Reward hacking was seen in training: the held-out reward fell" in text
    assert "ended after epoch 4. The adapter is that of epoch 2." in text
    assert (tmp_path / "figures/checks.png").is_file() and (tmp_path / "figures/checks.svg").is_file()
    assert outline.text[0] == "Alignment report: before and after"  # the alarm is the judge's, on all images
    assert [tag for tag, _ in outline.tags].count("table") == 8


def test_a_training_that_nothing_guarded_is_said_to_be_that(tmp_path, metrics, exhibits):
    metrics["training"] = watched() | {"reward_hacking": False, "stopped_at": None, "kept_epoch": 4}
    _, outline = render(tmp_path, metrics, exhibits)
    text = " ".join(outline.text)
    assert "nothing guarded this training against reward hacking. The adapter is that of epoch 4." in text
    assert "0 0.300 not measured not measured" in text


def test_the_curves_are_the_checks_values_and_the_kept_epoch_is_marked():
    axes = Figure().add_subplot()
    figures.check_curves(axes, watched("held_out_reward"))
    lines = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}
    assert lines["Reward (trained on)"] == ([0, 2, 4], [0.3, 0.4, 0.5])
    assert lines["Held-out reward"] == ([0, 2, 4], [0.3, 0.45, 0.2])
    assert lines["kept"][0] == [2, 2] and len(lines) == 3


def test_a_report_without_a_watched_training_says_nothing_of_one(rendered):
    folder, page, _ = rendered
    assert "While the adapter was trained" not in page and not (folder / "figures/checks.png").exists()
