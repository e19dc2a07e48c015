"""Cards: what an artefact is, how it was made, who graded and what was measured, computed from its records.

A number comes from a record or a report, with its sample count; one that is absent reads "not measured".
"""

from pathalign.cards.datasets import candidates_card, feedback_card
from pathalign.cards.facts import NOT_MEASURED, NOT_STATED, Grading, MeasuredOn, Terms, template_dir
from pathalign.cards.models import CardKind, Sheet, own_measures, render, write_card
from pathalign.cards.spaces import report_card

__all__ = [
    "NOT_MEASURED",
    "NOT_STATED",
    "CardKind",
    "Grading",
    "MeasuredOn",
    "Sheet",
    "Terms",
    "candidates_card",
    "feedback_card",
    "own_measures",
    "render",
    "report_card",
    "template_dir",
    "write_card",
]
