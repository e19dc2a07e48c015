"""Open a reward model from a folder or the Hub."""

from __future__ import annotations

from pathlib import Path

from pathalign.remote import parse
from pathalign.reward.modeling_reward import RewardModel


def load_reward_model(path_or_repo_id: str | Path) -> RewardModel:
    """A reward model in evaluation mode, from a folder, Hub id or `OWNER/NAME@REVISION`.

    Raises:
        InputError: If there is none, or its weights don't fit its configuration exactly.
    """
    reference = parse(path_or_repo_id)
    options = {"revision": reference.revision} if reference.revision else {}
    model: RewardModel = RewardModel.from_pretrained(reference.name, **options)
    return model
