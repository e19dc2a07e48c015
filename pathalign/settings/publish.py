"""Settings of `pathalign publish`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pathalign.config import StageConfig, option

DATASET = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


@dataclass
class PublishConfig(StageConfig):
    """Publish an artefact as one commit to a Hub repo, with its card."""

    base_model: str | None = option(None, "Adapter: Hub repo of the base model, if it was trained on a folder.")
    report: str | None = option(
        None, "Base model, adapter: folder of `pathalign evaluate` whose figures the card shows."
    )
    dataset: str | None = option(
        None, "Hub dataset that the figures were measured on, as OWNER/NAME@REVISION, if the records do not name it."
    )
    grades: list[str] = option([], "Feedback: the grades it was made of, if they are not where its record says.")
    candidates: list[str] = option(
        [], "Grades: the images that were graded, if the record does not say where they are."
    )
    simulated: bool = option(False, "Grades by simulated graders too; the card's first line then says so.")
    comments: bool = option(False, "Grades with the graders' free text; read it first.")
    license: str | None = option(None, "Licence of what is published, by its Hub identifier, such as cc-by-4.0.")
    data_license: str | None = option(None, "Licence of the real images behind it, in words, for the card.")
    consent: str | None = option(None, "What the patients consented to, in words, for the card.")
    revision_tag: str | None = option(None, "Tag that the commit gets, such as v1.")

    def problems(self) -> list[str]:
        """Ids that are none, and a licence that the Hub does not take by its identifier alone."""
        found = []
        if self.license == "other":
            found.append(
                "`license` is 'other', which says nothing. Give the licence's own identifier, such as cc-by-nc-4.0 "
                "(https://hf.co/docs/hub/repositories-licenses has all), or leave it out and put a file LICENSE into "
                "the repo by its page: publishing again lets it be."
            )
        if self.dataset and not DATASET.fullmatch(self.dataset):
            found.append(f"`dataset` is {self.dataset!r}; write OWNER/NAME@REVISION of a Hub dataset.")
        return found
