"""`next.json`: images that are proposed for grading, in their order, as a study reads it."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path

from pathalign.schema import InputError

NEXT = "next.json"
MAKE_ANEW = "make it anew with `pathalign study next`"


def read_proposal(path: str | Path) -> list[str]:
    """Ids of the proposed images, the first one first.

    Raises:
        InputError: If there is no such file, it is no proposal, or an image is in it twice.
    """
    try:
        rows = json.loads(Path(path).read_text())["images"]
        ids = [row["image_id"] for row in rows]
    except OSError as error:
        raise InputError(f"The proposal {path} cannot be read ({error.strerror}); {MAKE_ANEW}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no proposal: it lacks a list `images` with `image_id`; {MAKE_ANEW}.") from error
    if not all(isinstance(image_id, str) for image_id in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{path} is no proposal: an `image_id` is no text, or is there twice; {MAKE_ANEW}.")
    return ids


def only_ids(path: str | Path) -> bytes:
    """The proposal as a study needs it, without what else the file says; errors as `read_proposal`."""
    return json.dumps({"images": [{"image_id": image_id} for image_id in read_proposal(path)]}).encode()


def rank_by_proposal(
    rest: Sequence[str], proposed: Sequence[str], candidates: Collection[str], seed: int, source: str
) -> list[str]:
    """Images that are not drawn at random: the proposed ones in their order, then the others, shuffled.

    Args:
        rest: Ids of those images. A proposed one that is not among them comes with the random ones, in their order.
        proposed: Ids from `read_proposal`.
        candidates: Ids of all candidates.
        seed: The study's.
        source: What the proposal is called in an error.

    Raises:
        InputError: If an image is proposed that is no candidate.
    """
    unknown = [image_id for image_id in proposed if image_id not in candidates]
    if unknown:
        raise InputError(
            f"{source} proposes {len(unknown)} of {len(proposed)} images that are no candidates of this study, such as "
            f"{unknown[0]}: it was made for other candidates; {MAKE_ANEW}."
        )
    left = set(rest)
    first = [image_id for image_id in proposed if image_id in left]
    others = sorted(left - set(first))
    random.Random(f"{seed}|after the proposal").shuffle(others)
    return first + others
