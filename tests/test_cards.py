from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub import serve
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

from pathalign.cards import (
    NOT_MEASURED,
    Grading,
    MeasuredOn,
    Terms,
    candidates_card,
    feedback_card,
    own_measures,
    render,
    report_card,
    template_dir,
    write_card,
)
from pathalign.cards.measures import eval_results
from pathalign.schema import DISCLAIMER, InputError, RunRecord

PROJECT = Path(__file__).resolve().parents[1]
SIMULATED = Grading(simulated=True, n_grades=800, n_graders=1)
REPORT = {
    "metrics": {
        "before": {"n": 500, "plausible_share": 0.54, "plausible_ci": [0.5, 0.58], "recall": 0.61, "n_fidelity": 1480},
        "after": {"n": 500, "plausible_share": 0.71, "plausible_ci": [0.67, 0.75], "recall": 0.57, "n_fidelity": 480},
        "real": {"n": 600, "plausible_share": 0.9, "plausible_ci": [0.87, 0.92]},
        "control": None,
    },
    "worse": [
        {"name": "recall", "before": 0.61, "after": 0.57, "notable": True},
        {"name": "density", "before": 0.8, "after": 0.79, "notable": False},
        {"name": "FID", "before": 2.0, "after": 3.0, "notable": True, "interval": None},  # of an older report
    ],
}


@pytest.fixture
def record() -> RunRecord:
    return RunRecord(
        stage="align", config={"data": "/home/someone/data"}, seeds={"seed": 7}, versions={"torch": "2.13.0"}, wall_s=61
    )


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL).group(1))


def body_lines(card: str) -> list[str]:
    return [line for line in card.split("---\n", 2)[2].splitlines() if line]


def row(card: str, title: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {title}")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_front_matter_of_each_kind_has_the_keys_that_the_hub_shows(record):
    for kind, keys in {
        "diffusion_base": {"license", "library_name", "pipeline_tag", "tags"},
        "lora_adapter": {"license", "library_name", "pipeline_tag", "tags", "base_model", "base_model_relation"},
        "reward_model": {"license", "library_name", "pipeline_tag", "tags"},
    }.items():
        base_model = "someone/cells" if kind == "lora_adapter" else None
        card = render(kind, record, grading=SIMULATED, base_model=base_model)
        assert set(front_matter(card)) == keys, kind
        assert "not-for-diagnosis" in front_matter(card)["tags"]


def test_an_adapter_names_its_base_model_as_the_hub_wants_it(record):
    card = render("lora_adapter", record, grading=SIMULATED, base_model="someone/cells", terms=Terms("cc-by-4.0"))
    data = ModelCard(card).data
    assert (data.base_model, data.to_dict()["base_model_relation"]) == ("someone/cells", "adapter")
    assert (data.library_name, data.license) == ("diffusers", "cc-by-4.0")


def test_no_path_of_this_machine_gets_into_a_card(record, tmp_path):
    card = render("lora_adapter", record, grading=SIMULATED, base_model=str(tmp_path))
    assert "base_model" not in front_matter(card)
    assert str(tmp_path) not in card
    assert "/home/" not in card


def test_the_first_line_says_simulated_if_graders_were_networks_and_never_if_they_were_experts(record):
    by_networks = render("reward_model", record, grading=SIMULATED)
    assert body_lines(by_networks)[0].startswith("**Learned from simulated graders, not from experts.**")
    by_experts = render(
        "reward_model", record, grading=Grading(simulated=False, n_grades=90, krippendorff_alpha=0.7123)
    )
    assert "simulated" not in by_experts.lower()
    assert "| 90 | not measured | 0.712 |" in by_experts


def test_every_card_says_research_only_at_the_top(record):
    for kind in ("diffusion_base", "lora_adapter", "reward_model"):
        assert DISCLAIMER in body_lines(render(kind, record, grading=SIMULATED, base_model="someone/cells"))[0]


def test_numbers_stand_with_their_sample_count_and_interval_and_absent_ones_as_not_measured(record):
    card = render("lora_adapter", record, REPORT, grading=SIMULATED, base_model="someone/cells")
    assert row(card, "measure") == ["base, n = 500", "aligned, n = 500", "real, n = 600"]
    assert row(card, "plausible") == ["0.54 (0.5 to 0.58)", "0.71 (0.67 to 0.75)", "0.9 (0.87 to 0.92)"]
    assert row(card, "recall") == ["0.61", "0.57", NOT_MEASURED]
    assert row(card, "authenticity") == [NOT_MEASURED] * 3
    assert row(card, "images that") == ["1480", "480", NOT_MEASURED]


def test_measures_by_a_simulated_judge_or_on_a_phantom_say_so(record):
    plain = render("diffusion_base", record, REPORT)
    warned = render("diffusion_base", record, {**REPORT, "simulated": True, "phantom": True})
    for words in ("The judge is simulated", "drawn phantoms"):
        assert words in warned and words not in plain


def test_what_got_worse_is_listed_and_said_to_be_not_measured_without_a_report(record):
    card = render("lora_adapter", record, REPORT, grading=SIMULATED, base_model="someone/cells")
    assert (
        "- recall: 0.61 to 0.57\n- density: 0.8 to 0.79, which may be chance\n- FID: 2 to 3, which has no interval\n"
        in card
    )
    without_report = render("lora_adapter", record, grading=SIMULATED, base_model="someone/cells")
    assert "What got worse, the gravest first:\nnot measured." in without_report


def test_a_reward_model_shows_its_held_out_figures(record):
    figures = {"n": 160, "roc_auc": 0.913, "roc_auc_ci": [0.87, 0.95], "ece": 0.04, "brier": None}
    card = render("reward_model", record, {"overall": figures}, grading=SIMULATED)
    assert "On 160 held-out grades" in card
    assert (row(card, "ROC AUC"), row(card, "Brier score")) == (["0.913 (0.87 to 0.95)"], [NOT_MEASURED])


def test_a_reward_models_figures_say_whose_grades_they_are_against_and_terms_do_not_break_the_table(record):
    report = {"overall": {"n": 160, "roc_auc": 0.913}}
    for grading, title in ((SIMULATED, "ROC AUC, against simulated grades"), (Grading(simulated=False), "ROC AUC")):
        card = render("reward_model", record, report, grading=grading, terms=Terms(consent="research\nor | teaching"))
        (entry,) = front_matter(card)["model-index"][0]["results"][0]["metrics"]
        assert (entry["name"], entry["value"], entry["args"]) == (title, 0.913, {"n": 160})
        assert "| not stated | not stated | research or \\| teaching |" in card


def test_who_graded_is_read_from_the_feedback_datasets_agreement():
    agreement = {"simulated": True, "n_grades": 90, "n_graders": 3, "krippendorff_alpha": {"value": 0.7, "n": 30}}
    assert Grading.from_agreement(agreement) == Grading(True, 90, 3, 0.7)


def test_a_reports_headline_stands_on_the_card(record):
    card = render(
        "lora_adapter", record, {**REPORT, "headline": "Reward hacking."}, grading=SIMULATED, base_model="a/b"
    )
    assert body_lines(card)[1] == "> Reward hacking."
    assert "Reward hacking" not in render("diffusion_base", record, {**REPORT, "headline": "Reward hacking."})


def test_the_first_line_says_simulated_if_the_judge_was_a_network(record):
    judged, report = "**Measured by a simulated judge, not by experts.**", {**REPORT, "simulated": True}
    space = {"repo_id": "lab/report", "terms": Terms(), "measured_on": MeasuredOn()}
    facts = {"grading": SIMULATED, "base_model": "a/b"}
    for shown in (
        render("diffusion_base", record, report),
        render("lora_adapter", record, report, **facts),
        report_card(record, report, **space),
    ):
        assert judged in body_lines(shown)[0] and DISCLAIMER in body_lines(shown)[0]
    both = body_lines(render("lora_adapter", record, report, **facts))[0]
    assert both.startswith(f"**Learned from simulated graders, not from experts.** {judged} ")
    for plain in (
        render("diffusion_base", record),
        render("lora_adapter", record, REPORT, **facts),
        report_card(record, REPORT, **space),
    ):
        assert judged not in plain


def test_a_model_that_learned_from_simulated_graders_is_found_by_that_tag_and_no_other_model_is(record):
    for kind in ("reward_model", "lora_adapter"):
        for grading in (SIMULATED, Grading(simulated=False, n_grades=90)):
            tags = front_matter(render(kind, record, grading=grading, base_model="a/b"))["tags"]
            assert ("simulated-feedback" in tags) == grading.simulated
    assert "simulated-feedback" not in front_matter(render("diffusion_base", record))["tags"]


def test_usage_python_compiles_and_uses_a_class_of_the_model(record):
    for kind in ("diffusion_base", "lora_adapter", "reward_model"):
        card = render(kind, record, grading=SIMULATED, base_model="someone/cells", class_names=["band", "segmented"])
        *_, code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        compile(code, kind, "exec")
        assert '"band"' in code


def test_no_snippet_runs_code_of_a_repo_without_a_revision(record):
    facts = {"grading": SIMULATED, "base_model": "someone/cells", "repo_id": "lab/it"}
    unnamed = [render(kind, record, **facts) for kind in ("diffusion_base", "lora_adapter", "reward_model")]
    named = render("lora_adapter", record, **facts, base_revision="abc123")
    found = 0
    for card, commit in [*((card, "COMMIT") for card in unnamed), (named, "abc123")]:
        names: dict[str, str] = {}
        for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
                    names |= dict(
                        zip(ast.unparse(node.targets[0]).strip("()").split(", "), node.value.elts, strict=True)
                    )
                if not isinstance(node, ast.Call):
                    continue
                given = {word.arg: names.get(ast.unparse(word.value), word.value) for word in node.keywords}
                whole = ast.unparse(node.args[0]) == "folder" if node.args else False  # of `snapshot_download`
                if "trust_remote_code" in given and not whole:
                    wanted = ["revision", *(["custom_revision"] if "custom_pipeline" in given else [])]
                    assert [ast.literal_eval(given[name]) for name in wanted] == [commit] * len(wanted)
                    found += 1
                if ast.unparse(node.func) == "snapshot_download":
                    assert ast.literal_eval(given["revision"]) == commit
                    found += 1
    assert found == 5  # base, adapter twice, and both ways of the reward model


def test_a_card_without_the_facts_it_owes_is_refused(record):
    with pytest.raises(InputError, match="base_model"):
        render("lora_adapter", record, grading=SIMULATED)
    with pytest.raises(InputError, match="grading"):
        render("reward_model", record)
    with pytest.raises(InputError, match="diffusion_base"):
        render("pipeline", record)


def test_write_card_writes_what_the_hub_shows_as_the_repos_page(record, tmp_path):
    path = write_card(tmp_path, "diffusion_base", record, class_names=["a", "b"])
    assert path == tmp_path / "README.md"
    assert ModelCard.load(path).data.library_name == "diffusers"
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_every_template_is_found_in_a_checkout():
    names = {path.name for path in Path(template_dir()).glob("*.jinja")}
    assert {"diffusion_base.md.jinja", "lora_adapter.md.jinja", "reward_model.md.jinja"} <= names


def test_the_cards_of_datasets_say_first_what_they_are_not_and_load_by_their_configs(record):
    agreement = {
        "simulated": False, "simulated_share": 0.0, "n_grades": 90, "n_graders": 3, "n_images": 30, "unsure_share": 0.1,
        "krippendorff_alpha": {"value": 0.7, "ci": [0.6, 0.8], "n": 30},
        "fleiss_kappa": {"value": None, "ci": None, "n": 0},
    }  # fmt: skip
    configs = {"candidates": {"train": "data/train-*"}, "grades": {"train": "feedback/grades.parquet"}}
    facts = {"configs": configs, "counts": {"a": 20, "b": 10}, "criteria": ["nucleus"], "repo_id": "lab/feedback"}
    by_experts = feedback_card(record, agreement, **facts, terms=Terms("cc-by-4.0", consent="research"))
    assert body_lines(by_experts)[0] == f"**{DISCLAIMER}**" and "simulated" not in by_experts.lower()
    assert "| 90 | 3 | 30 | 0.1 | 0.7 (0.6 to 0.8), n = 30 | not measured, n = 0 |" in by_experts
    assert "| cc-by-4.0 | not stated | research |" in by_experts
    data = DatasetCard(by_experts).data.to_dict()
    assert [entry["config_name"] for entry in data["configs"]] == ["candidates", "grades"]
    assert data["license"] == "cc-by-4.0" and data["size_categories"] == ["n<1K"]
    by_networks = feedback_card(
        record, agreement | {"simulated": True, "simulated_share": 1 / 3}, **facts, terms=Terms()
    )
    assert body_lines(by_networks)[0].startswith("**SIMULATED: 30 of 90 grades are by networks, not by experts.")
    assert "license" not in front_matter(by_networks) and "simulated-feedback" in front_matter(by_networks)["tags"]
    plain = candidates_card(record, {"a": 2000, "b": 10}, repo_id="lab/set", terms=Terms(), n_real=7)
    assert body_lines(plain)[0] == f"**{DISCLAIMER}**" and "7 of them are **real** images" in plain
    assert front_matter(plain)["size_categories"] == ["1K<n<10K"]
    for card in (by_experts, plain):
        (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        compile(code, "card", "exec")


def test_the_card_of_a_report_is_that_of_a_static_space(record):
    card = report_card(record, REPORT, repo_id="lab/report", terms=Terms(), measured_on=MeasuredOn("lab/cells", "v1"))
    data = SpaceCard(card).data
    assert (data.sdk, data.app_file, data.title) == ("static", "index.html", "report")
    assert DISCLAIMER in body_lines(card)[0] and "split `test` of `lab/cells`, revision v1." in card
    assert "- recall: 0.61 to 0.57" in card


def test_figures_without_a_dataset_on_the_hub_stay_out_of_the_eval_results(record):
    card = render("lora_adapter", record, REPORT, grading=SIMULATED, base_model="a/b", repo_id="lab/adapter")
    (entry,) = front_matter(card)["model-index"]
    assert entry["name"] == "lab/adapter" and entry["results"][0]["dataset"]["type"] == "not-on-the-hub"
    figures = own_measures("lora_adapter", REPORT)
    assert {figure.key: figure.n for figure in figures} == {"plausible_share": 500, "recall": 480}
    assert eval_results(figures, MeasuredOn(), "") is None and eval_results([], MeasuredOn("lab/cells"), "") is None
    assert "a dataset that is not on the Hub, revision not stated" in card
    simulated = own_measures("lora_adapter", REPORT | {"simulated": True})
    assert simulated[0].title == "plausible, by a simulated judge"


@pytest.mark.hub
def test_the_hub_accepts_the_cards_of_all_spaces(tmp_path):
    cards = sorted(str(path) for path in (PROJECT / "spaces").glob("*/README.md"))
    code = f"from huggingface_hub import SpaceCard\nfor card in {cards}: SpaceCard.load(card).validate()"
    with serve(tmp_path) as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.variables(tmp_path / "home"), check=True)
        assert hub.faults.requests.count("POST /api/validate-yaml") == len(cards) == 2
