"""Figures of a study equal published examples and hand counts; the owner's page shows them and runs nothing."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from small_study import grade_on, make_study, serve
from starlette.testclient import TestClient

from pathalign import agreement
from pathalign.grading.results import looks, pace, study_results
from pathalign.grading.study import Study
from pathalign.images import ImageSet
from pathalign.schema import Grade, InputError, Preference, Rubric

PROJECT = Path(__file__).resolve().parents[1]

# Fleiss, Psychological Bulletin 76 (1971) 378, table 1: 30 patients, 6 psychiatrists, 5 diagnoses; kappa .430.
FLEISS_1971 = """
00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031 00501 30012 51000 02040 10203
00006 01050 02013 20040 10041 05010 40002 02040 10500 00006
""".split()
# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units; alpha .743.
KRIPPENDORFF_2011 = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
# Section B of the same: two observers, no rating missing; alpha .692.
KRIPPENDORFF_2011_B = ["aabbdcccedda", "babbbccceddd"]
# Cohen's table of 200 cases (Psychological Bulletin 70 (1968) 213; also the example of R's psych): kappa .492.
COHEN = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]


def codes(lines: list[str]) -> np.ndarray:
    return np.array([[np.nan if sign == "." else float(ord(sign)) for sign in line] for line in lines])


def exact_alpha(ratings: np.ndarray) -> Fraction:
    """Nominal alpha from the coincidence matrix, as section E of Krippendorff 2011 writes it."""
    observed, totals = Fraction(0), {}
    for column in ratings.T:
        values = column[~np.isnan(column)].tolist()
        if len(values) >= 2:
            same = sum(first == second for first in values for second in values) - len(values)
            observed += Fraction(same, len(values) - 1)
            for value in values:
                totals[value] = totals.get(value, 0) + 1
    n = sum(totals.values())
    chance = sum(count * (count - 1) for count in totals.values())
    return ((n - 1) * observed - chance) / (n * (n - 1) - chance)


def exact_fleiss(table: np.ndarray) -> Fraction:
    """Fleiss 1971, equations 4 to 7."""
    subjects, raters = len(table), int(table[0].sum())
    agreeing = sum(int(n) ** 2 for n in table.ravel()) - subjects * raters
    mean = Fraction(agreeing, subjects * raters * (raters - 1))
    chance = sum(Fraction(int(n), subjects * raters) ** 2 for n in table.sum(axis=0))
    return (mean - chance) / (1 - chance)


def exact_cohen(table: np.ndarray) -> Fraction:
    """Cohen, Educational and Psychological Measurement 20 (1960) 37, equation 1."""
    n = int(table.sum())
    observed = Fraction(int(np.trace(table)), n)
    chance = sum(
        Fraction(int(row) * int(column), n * n) for row, column in zip(table.sum(1), table.sum(0), strict=True)
    )
    return (observed - chance) / (1 - chance)


@pytest.mark.parametrize(
    ("lines", "published", "exact"),
    [(KRIPPENDORFF_2011, 0.743, Fraction(904, 1216)), (KRIPPENDORFF_2011_B, 0.692, Fraction(310, 448))],
)
def test_alpha_equals_krippendorffs_worked_examples_also_with_missing_ratings(lines, published, exact):
    ratings = codes(lines)
    found = agreement.alpha(ratings, 50, 0).value
    assert exact_alpha(ratings) == exact
    assert found == pytest.approx(float(exact), abs=1e-6)
    assert found == pytest.approx(published, abs=5e-4)


def test_fleiss_kappa_equals_the_table_of_1971_also_when_other_images_have_fewer_ratings():
    table = np.array([[int(sign) for sign in row] for row in FLEISS_1971])
    assert table.sum(axis=0).tolist() == [26, 26, 30, 55, 43]  # as printed below the table
    ratings = np.stack([np.repeat(np.arange(5.0), row) for row in table], axis=1)
    missing = np.full((6, 9), np.nan)
    missing[:4] = 1.0
    for shown in (ratings, np.concatenate([ratings, missing], axis=1)):
        found = agreement.fleiss(shown, 50, 0)
        assert found.value == pytest.approx(float(exact_fleiss(table)), abs=1e-6)
        assert found.value == pytest.approx(0.430, abs=5e-4)
        assert found.n == 30


def test_cohens_kappa_equals_his_table_also_when_one_rater_skips_images():
    table = np.array(COHEN)
    rows, columns = np.nonzero(table)
    first = np.repeat(rows, table[rows, columns]).astype(float)
    second = np.repeat(columns, table[rows, columns]).astype(float)
    assert exact_cohen(table) == Fraction(58, 118)
    gaps = np.full(7, np.nan)
    for pair in ((first, second), (np.concatenate([first, np.ones(7)]), np.concatenate([second, gaps]))):
        found = agreement.cohen(*pair, 50, 0)
        assert found.value == pytest.approx(58 / 118, abs=1e-6)
        assert found.value == pytest.approx(0.492, abs=5e-4)
        assert found.n == 200


def test_wilson_interval_equals_the_published_one():
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, count), interval in published.items():
        assert agreement.share(successes, count).ci == pytest.approx(interval, abs=5e-5)
    assert agreement.share(0, 0).value is None


def grade(number: int, image: str, verdict: str, grader: str = "grader-1", **values) -> Grade:
    return Grade(
        grade_id=f"g{number}",
        image_id=image,
        class_label=values.pop("class_label", "neutrophil"),
        verdict=verdict,
        grader=grader,
        recorded_at=values.pop("recorded_at", f"2026-03-01T10:{number // 60:02d}:{number % 60:02d}+00:00"),
        **values,
    )


IMAGES = {f"i{n}": {"class_label": "neutrophil", "kind": "synthetic"} for n in range(8)}
IMAGES |= {f"r{n}": {"class_label": "neutrophil", "kind": "real control"} for n in range(4)}


def test_shares_count_images_of_several_graders_once_and_keep_real_controls_apart():
    grades = [
        grade(1, "i0", "plausible"),
        grade(2, "i0", "plausible", "grader-2"),
        grade(3, "i0", "implausible", "grader-3"),
        grade(4, "i1", "plausible"),
        grade(5, "i1", "implausible", "grader-2"),  # a tie is not plausible
        grade(6, "i2", "unsure"),  # counts for nothing
        grade(7, "i3", "implausible", drawn_by="uncertainty"),
        grade(8, "r0", "plausible"),
        grade(9, "r1", "implausible"),
    ]
    total = study_results(grades, [], IMAGES).total
    assert (total.plausible.value, total.plausible.n) == (1 / 3, 3)
    assert (total.unbiased.value, total.unbiased.n) == (1 / 2, 2)
    assert (total.controls.value, total.controls.n) == (1 / 2, 2)
    assert total.plausible.ci == agreement.share(1, 3).ci


def test_a_corrected_grade_counts_once_but_its_time_was_spent():
    grades = [
        grade(1, "i0", "plausible", active_ms=4000),
        grade(2, "i0", "implausible", supersedes="g1", active_ms=2000),
        grade(3, "i1", "implausible", active_ms=3000),
        grade(3, "i1", "implausible", active_ms=3000),  # sent twice
    ]
    results = study_results(grades, [], IMAGES)
    (only,) = results.graders
    assert (only.n_grades, only.plausible.value, only.plausible.n) == (2, 0.0, 2)
    assert only.median_active_s == 3.0
    assert only.grades_per_hour == 2 * 3600 / 9
    assert results.left_out == {"duplicates": 1, "superseded": 1}


def test_pace_is_not_measured_without_times():
    assert pace([grade(1, "i0", "plausible")], 1) == (None, None)


def test_intra_rater_kappa_compares_first_look_and_repeat_only():
    grades = []
    for n, (first, second) in enumerate([("p", "p"), ("p", "i"), ("i", "i"), ("i", "i"), ("p", "p"), ("u", "p")]):
        verdicts = {"p": "plausible", "i": "implausible", "u": "unsure"}
        grades += [grade(n, f"i{n}", verdicts[first]), grade(n + 30, f"i{n}", verdicts[second])]
    grades += [grade(70, "i6", "plausible"), grade(71, "i7", "implausible")]
    # both ways: p-p 2, p-i 1, i-i 2; agreement 4/5, chance (3*2 + 2*3)/25 = 12/25, kappa (20 - 12) / (25 - 12)
    for repeats in (None, {f"g{n + 30}" for n in range(6)}):
        (only,) = study_results(grades, [], IMAGES, repeats=repeats).graders
        assert only.repeats.value == pytest.approx(8 / 13, abs=1e-9)
        assert only.repeats.n == 5
    first, second = looks(grades, {"g31"})
    assert (first.tolist(), second.tolist()) == ([1.0], [0.0])


def test_criteria_are_counted_by_last_verdict_on_synthetic_images_most_often_failed_first():
    grades = [
        grade(1, "i0", "implausible", failed_criteria=("granules",)),
        grade(2, "i0", "implausible", supersedes="g1", failed_criteria=("nucleus_shape",)),
        grade(3, "i1", "implausible", failed_criteria=("nucleus_shape", "granules")),
        grade(4, "i2", "plausible"),
        grade(5, "r0", "implausible", failed_criteria=("granules",)),
    ]
    rows = study_results(grades, [], IMAGES).criteria
    assert [(row.name, row.failed.value, row.by_class) for row in rows] == [
        ("nucleus_shape", 2 / 3, {"neutrophil": 2}),
        ("granules", 1 / 3, {"neutrophil": 1}),
    ]


def test_disagreements_are_the_images_with_both_verdicts_most_evenly_split_first():
    grades = [
        grade(n, image, verdict, f"grader-{grader}")
        for n, (image, grader, verdict) in enumerate(
            [
                ("i0", 1, "plausible"), ("i0", 2, "plausible"), ("i0", 3, "implausible"),
                ("i1", 1, "implausible"), ("i1", 2, "plausible"), ("i1", 3, "unsure"),
                ("i2", 1, "plausible"), ("i2", 2, "unsure"),
            ]
        )
    ]  # fmt: skip
    found = study_results(grades, [], IMAGES).disagreements
    assert [item.image_id for item in found] == ["i1", "i0"]
    assert [entry.verdict for entry in found[0].grades] == ["plausible", "implausible", "unsure"]


def test_a_grade_of_an_image_that_the_study_does_not_have_is_refused():
    with pytest.raises(InputError, match="1 graded images are not among the 12 of this study: strange"):
        study_results([grade(1, "strange", "plausible")], [], IMAGES)


def test_results_of_nothing_say_so_instead_of_failing():
    results = study_results([], [], IMAGES)
    assert (results.n_grades, results.total.plausible.value, results.alpha.value) == (0, None, None)


# The page. Browser tests and these share one example study.


@dataclass
class ExampleService:
    """Stands in for a `GradingService`: three graders, two classes, controls, repeats, disagreements."""

    study: object
    inputs: SimpleNamespace
    images: ImageSet

    def results_inputs(self) -> SimpleNamespace:
        return self.inputs

    def picture(self, image_id: str) -> str:
        from pathalign.grading.pictures import data_url

        row = self.images.image_ids.index(image_id)
        return data_url(self.images.images[row].permute(1, 2, 0).numpy(), image_id)


def space_module(name: str) -> ModuleType:
    """A module of a Space's folder, such as `grade/results`; it is no package."""
    path = PROJECT / "spaces" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"space_{name.replace('/', '_')}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example_service(folder: Path, comment: str = "Granules too coarse.") -> ExampleService:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(90, 200, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
    kinds = ["synthetic"] * 48 + ["real control"] * 12
    names = ("basophil", "very_long_class_name_of_a_rare_cell")
    images = ImageSet.build(noise, torch.arange(60) % 2, names, {"kind": kinds})
    labels, grades = images.labels(), []
    draw = np.random.default_rng(0)
    for number, grader in enumerate(("grader-1a2b3c4d", "grader-2b3c4d5e", "grader-3c4d5e6f")):
        for row, image_id in enumerate(images.image_ids):
            good = draw.random() < (0.9 if kinds[row] == "real control" else 0.6) - 0.1 * number
            entry = grade(
                len(grades), image_id, "plausible" if good else "implausible", grader, class_label=labels[row],
                failed_criteria=() if good else ("nucleus_shape", "granules")[: 1 + row % 2],
                comment=None if good or row % 5 else comment, confidence=0.75, active_ms=int(draw.integers(1500, 6000)),
                idle_ms=10, hidden_ms=0, drawn_by="uncertainty" if row % 3 == 0 else "random",
            )  # fmt: skip
            grades.append(entry)
    repeats = [replace(entry, grade_id=f"again-{entry.grade_id}") for entry in grades[:40:4]]
    preferences = [
        Preference(
            preference_id=f"p{n}", class_label=labels[n], left_image_id=images.image_ids[n],
            right_image_id=images.image_ids[n + 2], choice=("left", "right", "right", "tie", "both_bad")[n % 5],
            grader="grader-1a2b3c4d",
        )
        for n in range(20)
    ]  # fmt: skip
    inputs = SimpleNamespace(
        grades=(*grades, *repeats),
        preferences=tuple(preferences),
        images={
            name: {"class_label": label, "kind": kind}
            for name, label, kind in zip(images.image_ids, labels, kinds, strict=True)
        },
        repeats=frozenset(entry.grade_id for entry in repeats),
    )
    rubric = Rubric.load("white_blood_cells")
    study = Study(
        title="White cells, round 2 <script>alert(1)</script>",
        classes={"basophil": {"display_name": "Basophil"}},
        real_control_share=0.0,
    )
    assert study.checklist == rubric
    return ExampleService(study, inputs, images)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    service = example_service(tmp_path, comment="<img src=x onerror=alert(1)>")
    page = space_module("grade/results").results_page(service, candidates=lambda: service.images, samples=50)
    return TestClient(page)


def test_the_page_shows_names_and_comments_as_text(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in answer.text
    assert "&lt;img src=x onerror=alert(1)&gt;" in answer.text
    assert "<script" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["cache-control"] == "no-store"
    assert answer.text.count("Never for diagnosis") >= 2


def test_the_page_of_a_study_without_grades_says_so(tmp_path):
    service = example_service(tmp_path)
    service.inputs.grades = service.inputs.preferences = ()
    page = TestClient(space_module("grade/results").results_page(service))
    assert "Nobody has graded anything yet" in page.get("/").text
    assert page.get("/export/csv").status_code == 409


def test_new_grades_change_the_page_and_simulated_ones_are_marked(tmp_path):
    service = example_service(tmp_path)
    page = TestClient(space_module("grade/results").results_page(service, samples=50))
    assert "Simulated:" not in page.get("/").text
    extra = grade(999, service.images.image_ids[0], "plausible", "simulated-1", class_label="basophil", simulated=True)
    service.inputs.grades = (*service.inputs.grades, extra)
    assert f"Simulated: 1 of {len(service.inputs.grades)} grades" in page.get("/").text


def test_every_export_of_the_page_is_a_zip_with_a_notice_and_an_unknown_one_is_not_found(client):
    import io
    import zipfile

    for name in ("jsonl", "csv", "parquet", "images", "paper", "preferences"):
        answer = client.get(f"/export/{name}")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-disposition"] == f'attachment; filename="feedback-{name}.zip"'
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert "Never for diagnosis" in archive.read("feedback/README.md").decode()
            assert len(archive.namelist()) >= 3
    missing = client.get("/export/jason")
    assert missing.status_code == 404
    assert "There is no export format 'jason'" in missing.text


def test_a_served_study_shows_its_graders_controls_repeats_and_pairs(tmp_path):
    study = make_study(tmp_path, count=30, graders_per_image=2, repeat_distance=5, repeat_share=0.2, pairs_per_class=2)
    service = serve(tmp_path, study)
    first = grade_on(service, "grader-1a2b3c4d", 40)
    grade_on(service, "grader-2b3c4d5e", 40)
    grade_on(service, "grader-1a2b3c4d", 3, "pairwise")
    inputs = service.results_inputs()
    results = study_results(inputs.grades, inputs.preferences, inputs.images, repeats=inputs.repeats, samples=20)
    assert results.n_grades == len(inputs.grades) >= 60
    assert results.total.plausible.value == results.total.controls.value == 1.0
    assert results.total.controls.n + results.total.plausible.n == results.n_images
    own = next(row for row in results.graders if row.grader == "grader-1a2b3c4d")
    assert own.n_grades == len(first)
    assert own.repeats.n == len(first) - len({g.image_id for g in inputs.grades if g.grader == own.grader}) > 0
    assert sum(sum(row.choices.values()) for row in results.preferences) == 3
    text = TestClient(space_module("grade/results").results_page(service, samples=20)).get("/").text
    assert "grader-1a2b3c4d" in text
    assert "Pairwise choices" in text
    service.close()
