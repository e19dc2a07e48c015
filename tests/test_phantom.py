"""The phantom's ground truth: the pixels show what the columns say, measured without the module's own geometry."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pathalign import phantom
from pathalign.images import ImageSet
from pathalign.schema import InputError

REAL_DATA = Path(os.environ.get("PATHALIGN_TEST_DATA", Path(__file__).parents[2] / "shared/data/pbc_wbcatt_64"))
PER_CLASS = 70
DOMAIN = {  # read off the real data, not off the module
    "cell_size": {"big", "small"},
    "cell_shape": {"irregular", "round"},
    "nucleus_shape": {
        "irregular",
        "segmented-bilobed",
        "segmented-multilobed",
        "unsegmented-band",
        "unsegmented-indented",
        "unsegmented-round",
    },
    "nuclear_cytoplasmic_ratio": {"high", "low"},
    "chromatin_density": {"densely", "loosely"},
    "cytoplasm_vacuole": {"no", "yes"},
    "cytoplasm_texture": {"clear", "frosted"},
    "cytoplasm_colour": {"blue", "light blue", "purple blue"},
    "granule_type": {"coarse", "nil", "round", "small"},
    "granule_colour": {"nil", "pink", "purple", "red"},
    "granularity": {"no", "yes"},
}


@pytest.fixture(scope="module")
def smear() -> ImageSet:
    return phantom.draw(PER_CLASS, image_size_px=64, seed=3)


def rgb(smear: ImageSet, class_name: str) -> np.ndarray:
    """Images of one class, shape `(n, height, width, 3)`, as float."""
    return smear.images[np.array(smear.labels()) == class_name].permute(0, 2, 3, 1).numpy().astype(float)


def truth(smear: ImageSet, class_name: str, attribute: str) -> np.ndarray:
    return np.array(smear.columns[attribute])[np.array(smear.labels()) == class_name]


def central(mask: np.ndarray) -> np.ndarray:
    """The piece of a mask that covers most of the image's middle."""
    pieces, _ = ndimage.label(mask)
    middle = slice(len(mask) // 4, -len(mask) // 4)
    found = pieces[middle, middle]
    return pieces == np.bincount(found[found > 0]).argmax()


def blue_cells(pixels: np.ndarray) -> np.ndarray:
    """Outlines of lymphocytes and monocytes: red cells and the slide are much redder than blue."""
    return np.stack([ndimage.binary_fill_holes(central(image[..., 2] > image[..., 0] - 15)) for image in pixels])


def nuclei(pixels: np.ndarray) -> np.ndarray:
    return np.stack([central(image[..., 1] < 85) for image in pixels])


def spread(mask: np.ndarray) -> float:
    """Second moment over that of a disc of the same area: 1 for a disc, more for anything else."""
    area = mask.sum()
    return float(np.argwhere(mask).var(axis=0).sum() * 2 * np.pi / area)


def separates(values: list[float] | np.ndarray, positive: np.ndarray) -> float:
    """Chance that a positive has the higher value."""
    return float(roc_auc_score(positive, values))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images() -> None:
    first, again, other = phantom.draw(3, seed=7), phantom.draw(3, seed=7), phantom.draw(3, seed=8)
    assert torch.equal(first.images, again.images)
    assert first.columns == again.columns
    assert not set(first.image_ids) & set(other.image_ids)
    assert len(set(first.image_ids)) == 15


def test_a_longer_draw_begins_with_the_shorter_one(monkeypatch: pytest.MonkeyPatch) -> None:
    longer = phantom.draw(37, seed=1)
    shorter = phantom.draw(5, seed=1)
    beginning = longer.first_per_class(5)
    assert torch.equal(beginning.images, shorter.images)
    assert beginning.columns == shorter.columns
    monkeypatch.setattr(phantom, "PIXELS_AT_ONCE", 1)  # one image at a time
    assert torch.equal(phantom.draw(5, seed=1).images, shorter.images)


@pytest.mark.parametrize("size", [8, 20, 32, 64, 128])
def test_every_size_shows_the_same_scene(size: int) -> None:
    drawn = phantom.draw(1, image_size_px=size, seed=5)
    assert drawn.images.shape == (5, 3, size, size)
    assert drawn.images.dtype == torch.uint8
    reference = phantom.draw(1, image_size_px=160, seed=5)
    assert drawn.columns == reference.columns
    small, large = (torch.nn.functional.adaptive_avg_pool2d(item.images.float(), 4) for item in (drawn, reference))
    assert (small - large).abs().mean() < 5  # grey levels of 255; different scenes lie 9 to 31 apart


def test_classes_come_in_order_with_all_eleven_attributes(smear: ImageSet) -> None:
    assert smear.class_names == ("basophil", "eosinophil", "lymphocyte", "monocyte", "neutrophil")
    assert smear.class_ids.tolist() == [class_id for class_id in range(5) for _ in range(PER_CLASS)]
    assert list(smear.columns) == list(DOMAIN)
    for name, allowed in DOMAIN.items():
        assert set(smear.columns[name]) <= allowed, name
        assert set(phantom.FREQUENCIES[name]) == allowed, name


def test_each_class_has_the_granules_and_nuclei_that_define_it(smear: ImageSet) -> None:
    granules = {
        (label, kind, colour)
        for label, kind, colour in zip(
            smear.labels(), smear.columns["granule_type"], smear.columns["granule_colour"], strict=True
        )
    }
    assert granules <= {
        ("basophil", "coarse", "purple"),
        ("eosinophil", "round", "red"),
        ("lymphocyte", "nil", "nil"),
        ("monocyte", "nil", "nil"),
        ("neutrophil", "small", "pink"),
        ("neutrophil", "small", "purple"),
    }
    mononuclear = {"unsegmented-round", "unsegmented-indented", "irregular"}
    assert set(truth(smear, "lymphocyte", "nucleus_shape")) <= mononuclear
    assert set(truth(smear, "monocyte", "nucleus_shape")) <= mononuclear
    assert not set(truth(smear, "neutrophil", "nucleus_shape")) & {"unsegmented-round", "unsegmented-indented"}


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs the real cells, see PATHALIGN_TEST_DATA")
def test_the_frequency_table_is_that_of_the_real_training_split() -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(
        REAL_DATA / "data" / "train-00000-of-00001.parquet", columns=["label", *DOMAIN]
    ).to_pandas()
    for name, shares in phantom.FREQUENCIES.items():
        for class_id in range(5):
            real = table[table["label"] == class_id][name].value_counts(normalize=True)
            for value, by_class in shares.items():
                assert by_class[class_id] == pytest.approx(real.get(value, 0.0), abs=0.011), (name, class_id, value)


@pytest.mark.parametrize("class_name", ["eosinophil", "basophil"])
def test_big_cells_cover_a_bigger_area(smear: ImageSet, class_name: str) -> None:
    areas = [ndimage.binary_fill_holes(central(image[..., 1] < 140)).sum() for image in rgb(smear, class_name)]
    assert separates(areas, truth(smear, class_name, "cell_size") == "big") > 0.95


def test_irregular_cells_have_less_round_outlines(smear: ImageSet) -> None:
    roughness = []
    for cell in blue_cells(rgb(smear, "monocyte")):
        outline = np.argwhere(cell & ~ndimage.binary_erosion(cell))
        distance = np.hypot(*(outline - np.argwhere(cell).mean(axis=0)).T)
        roughness.append(distance.std() / distance.mean())
    assert separates(roughness, truth(smear, "monocyte", "cell_shape") == "irregular") > 0.9


def test_a_high_nuclear_ratio_means_more_of_the_cell_is_nucleus(smear: ImageSet) -> None:
    ratios, high = [], []
    for class_name in ("lymphocyte", "monocyte"):
        pixels, colour = rgb(smear, class_name), truth(smear, class_name, "cytoplasm_colour")
        share = nuclei(pixels).sum(axis=(1, 2)) / blue_cells(pixels).sum(axis=(1, 2))
        ratios.extend(share[colour != "light blue"])
        high.extend(truth(smear, class_name, "nuclear_cytoplasmic_ratio")[colour != "light blue"] == "high")
    assert separates(ratios, np.array(high)) > 0.9


def test_nucleus_shapes_differ_as_their_names_say(smear: ImageSet) -> None:
    found: dict[str, list[float]] = {}
    for class_name in ("lymphocyte", "monocyte", "neutrophil"):
        for mask, shape in zip(nuclei(rgb(smear, class_name)), truth(smear, class_name, "nucleus_shape"), strict=True):
            found.setdefault(str(shape), []).append(spread(mask))
    median = {shape: float(np.median(values)) for shape, values in found.items()}
    assert median["unsegmented-round"] < 1.05
    assert 1.05 < median["unsegmented-indented"] < median["unsegmented-band"]
    assert min(median["unsegmented-band"], median["segmented-bilobed"], median["segmented-multilobed"]) > 1.4


def test_loose_chromatin_is_lighter(smear: ImageSet) -> None:
    pixels = rgb(smear, "monocyte")
    light = [image[mask][:, 1].mean() for image, mask in zip(pixels, nuclei(pixels), strict=True)]
    assert separates(light, truth(smear, "monocyte", "chromatin_density") == "loosely") > 0.75


def test_vacuoles_brighten_the_cytoplasm(smear: ImageSet) -> None:
    pixels, blue = rgb(smear, "monocyte"), truth(smear, "monocyte", "cytoplasm_colour") != "light blue"
    inner = [ndimage.binary_erosion(cell, iterations=3) for cell in blue_cells(pixels)]
    bright = np.array([(image[cell][:, 1] > 190).mean() for image, cell in zip(pixels, inner, strict=True)])
    assert separates(bright[blue], (truth(smear, "monocyte", "cytoplasm_vacuole") == "yes")[blue]) > 0.9


def test_frosted_cytoplasm_is_grainier_and_its_colour_follows_its_name(smear: ImageSet) -> None:
    pixels, colour = rgb(smear, "monocyte"), truth(smear, "monocyte", "cytoplasm_colour")
    plain = truth(smear, "monocyte", "cytoplasm_vacuole") == "no"
    grain, hue, brightness = [], [], []
    for image, nucleus in zip(pixels, nuclei(pixels), strict=True):
        distance = ndimage.distance_transform_edt(~nucleus)
        ring = (distance > 2.5) & (distance < 5)  # cytoplasm next to the nucleus
        fine = image[..., 1] - ndimage.uniform_filter(image[..., 1], 3)
        grain.append(np.median(np.abs(fine[ring])))
        hue.append(np.median(image[ring][:, 2] - image[ring][:, 0]))
        brightness.append(np.median(image[ring]))
    frosted = truth(smear, "monocyte", "cytoplasm_texture") == "frosted"
    assert separates(np.array(grain)[plain], frosted[plain]) > 0.85
    by_colour = {name: np.array(hue)[colour == name].mean() for name in ("blue", "purple blue", "light blue")}
    assert by_colour["blue"] > by_colour["purple blue"] + 10 > by_colour["light blue"] + 10
    assert (
        np.array(brightness)[colour == "light blue"].mean() > np.array(brightness)[colour != "light blue"].mean() + 15
    )


def test_granules_of_eosinophils_are_redder_than_those_of_neutrophils_and_basophils(smear: ImageSet) -> None:
    def redness(class_name: str) -> np.ndarray:
        middle = rgb(smear, class_name)[:, 19:45, 19:45].reshape(PER_CLASS, -1, 3)
        outside = middle[..., 1] > 80  # not nucleus
        return np.array(
            [np.median((row[..., 0] - row[..., 2])[keep]) for row, keep in zip(middle, outside, strict=True)]
        )

    red, others = redness("eosinophil"), np.concatenate([redness("neutrophil"), redness("basophil")])
    assert separates(np.concatenate([red, others]), np.arange(3 * PER_CLASS) < PER_CLASS) > 0.98


def test_classes_separate_by_their_cells_but_not_by_what_lies_around_them() -> None:
    drawn = phantom.draw(140, seed=11)
    train = np.arange(len(drawn)) % 7 < 5
    labels = drawn.class_ids.numpy()
    pixels = drawn.images.permute(0, 2, 3, 1).numpy().astype(float)
    border = np.ones((32, 32), dtype=bool)
    border[2:-2, 2:-2] = False

    def accuracy(features: np.ndarray, forest: bool) -> float:
        reduced = make_pipeline(StandardScaler(), PCA(40, random_state=0), LogisticRegression(max_iter=500))
        model = RandomForestClassifier(100, random_state=0) if forest else reduced
        return float(model.fit(features[train], labels[train]).score(features[~train], labels[~train]))

    cells = pixels[:, 8:24, 8:24].reshape(len(drawn), 256, 3)
    colours = np.sort(cells, axis=1)[:, ::16].reshape(len(drawn), -1)  # quantiles of each channel
    assert accuracy(colours, forest=False) > 0.9
    around = pixels[:, border].reshape(len(drawn), -1)
    assert accuracy(around, forest=False) < 0.3  # chance is 0.2, its standard error 0.028
    assert accuracy(around, forest=True) < 0.3


@pytest.mark.parametrize(
    "wrong", [{"count_per_class": 0}, {"count_per_class": 1, "image_size_px": 7}, {"count_per_class": 1, "seed": -1}]
)
def test_numbers_outside_their_range_are_named(wrong: dict[str, int]) -> None:
    name = list(wrong)[-1]
    with pytest.raises(InputError, match=f"`{name}` is {wrong[name]}; give a whole number from"):
        phantom.draw(**wrong)
