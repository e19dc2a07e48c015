"""Cards of datasets: candidate sets, and feedback with its grades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from pathalign.cards.facts import SIMULATED_TAG, TAGS, Grading, Terms, fill
from pathalign.schema import DISCLAIMER, RunRecord

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
LARGE = "100K<n<1M"


def candidates_card(
    record: RunRecord,
    counts: Mapping[str, int],
    *,
    repo_id: str,
    terms: Terms,
    n_real: int = 0,
    sheet: str | None = None,
) -> str:
    """Text of a candidate set's card.

    Args:
        record: How it was made.
        counts: Images of each class.
        repo_id: Where the usage snippet loads from.
        terms: Licences and consent.
        n_real: Real images among them, hidden controls of a study.
        sheet: Path of a picture of samples beside the card.
    """
    metadata = _metadata(
        terms,
        sum(counts.values()),
        ["candidates"],
        [{"config_name": "candidates", "data_files": [{"split": "train", "path": "data/train-*"}], "default": True}],
    )
    return _checked(
        fill(
            "candidates.md.jinja",
            front_matter=metadata.to_yaml(),
            disclaimer=DISCLAIMER,
            record=record,
            counts=counts,
            repo_id=repo_id,
            terms=terms,
            n_real=n_real,
            sheet=sheet,
        )
    )


def feedback_card(
    record: RunRecord,
    agreement: Mapping[str, Any],
    *,
    configs: Mapping[str, Mapping[str, str]],
    counts: Mapping[str, int],
    criteria: Sequence[str],
    repo_id: str,
    terms: Terms,
    n_real: int = 0,
    comments: bool = False,
) -> str:
    """Text of a feedback dataset's card. Its first line says so if grades are simulated.

    Args:
        record: How it was made.
        agreement: What `feedback.agreement_report` gives.
        configs: Name of each part -> split -> path.
        counts: Images of each class.
        criteria: Checklist that graders named failures of.
        repo_id: Where the usage snippet loads from.
        terms: Licences and consent.
        n_real: Real images among them, hidden controls of a study.
        comments: Whether the graders' free text is among it.
    """
    simulated = agreement["simulated"]
    metadata = _metadata(
        terms,
        sum(counts.values()),
        ["human-feedback", *([SIMULATED_TAG] if simulated else ["expert-feedback"])],
        [
            {
                "config_name": name,
                "data_files": [{"split": split, "path": path} for split, path in splits.items()],
                **({"default": True} if index == 0 else {}),
            }
            for index, (name, splits) in enumerate(configs.items())
        ],
    )
    return _checked(
        fill(
            "feedback.md.jinja",
            front_matter=metadata.to_yaml(),
            disclaimer=DISCLAIMER,
            record=record,
            grading=Grading.from_agreement(agreement),
            agreement=agreement,
            n_simulated=round(agreement["simulated_share"] * agreement["n_grades"]),
            configs=configs,
            counts=counts,
            criteria=criteria,
            repo_id=repo_id,
            terms=terms,
            n_real=n_real,
            comments=comments,
        )
    )


def _metadata(terms: Terms, count: int, tags: Sequence[str], configs: list[dict[str, Any]]) -> DatasetCardData:
    return DatasetCardData(
        license=terms.license,
        task_categories=["unconditional-image-generation", "image-classification"],
        tags=[*TAGS, *tags],
        size_categories=[next((name for limit, name in SIZES if count < limit), LARGE)],
        configs=configs,
    )


def _checked(content: str) -> str:
    DatasetCard(content)  # parses the front matter again: refuses what the Hub would refuse
    return content
