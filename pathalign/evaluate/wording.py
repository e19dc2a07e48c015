"""What happened, in sentences: for everybody, for who reads intervals, and as an alarm."""

from __future__ import annotations

from typing import Any

from pathalign.evaluate.page import interval_text, number, percent, points


def in_plain_words(metrics: dict[str, Any]) -> str:
    """What happened to the plausible share, for a reader who knows no statistics."""
    sets, (low, high) = metrics["metrics"], metrics["plausible_gain_ci"]
    before, after, real = (round(100 * sets[name]["plausible_share"]) for name in ("before", "after", "real"))
    text = (
        f"Of 100 images of the base model the judge finds {before} plausible, of 100 of the aligned model {after}, and "
        f"of 100 real images that it never saw {real}."
    )
    if low <= 0 <= high:
        return text + " Chance alone could explain the change."
    return text + f" The {'rise' if low > 0 else 'fall'} is larger than chance explains."


def headline(metrics: dict[str, Any]) -> str:
    """What happened to the plausible share, in sentences."""
    sets, level = metrics["metrics"], f"{100 * metrics['confidence']:.0f} %"
    real = sets["real"]
    text = (
        f"The simulated judge finds {percent(sets['before']['plausible_share'])} of the base model's images plausible "
        f"and {percent(sets['after']['plausible_share'])} of the aligned model's: {points(metrics['plausible_gain'])} "
        f"points ({level} interval {interval_text(metrics['plausible_gain_ci'], 100)}; {sets['after']['n']} pairs "
        f"of the same seed). It accepts {percent(real['plausible_share'])} of {real['n']} unseen real images."
    )
    if metrics["gap_closed"] is None:
        text += " Real images are not judged above the base, so there is no gap to close."
    else:
        within = interval_text(metrics["gap_closed_ci"], 100)
        text += f" Part of that distance closed: {percent(metrics['gap_closed'])}"
        text += f" ({level} interval {within} %)." if within else " (the distance is too small for an interval)."
    if metrics["gain_over_control"] is not None:
        text += (
            f" Against continued pretraining of the same compute: {points(metrics['gain_over_control'])} points "
            f"({interval_text(metrics['gain_over_control_ci'], 100)})."
        )
    return text


def hacking_warning(metrics: dict[str, Any]) -> str:
    """The sentence that must come first when the reward was hacked, else an empty text."""
    if not metrics["reward_hacking"]:
        return ""
    before, after = metrics["metrics"]["before"], metrics["metrics"]["after"]
    risen = [
        f"{title} rose from {form(before[key])} to {form(after[key])}"
        for key, title, form in (
            ("mean_reward", "the mean reward", number),
            ("grader_share", "the grader's plausible share", percent),
        )
        if before[key] is not None and after[key] > before[key]
    ]
    low, high = metrics["plausible_gain_ci"]
    certainty = "beyond chance" if high < 0 else "though chance could explain the fall"
    return (
        f"Reward hacking: {' and '.join(risen)}, while the independent judge's plausible share fell from "
        f"{percent(before['plausible_share'])} to {percent(after['plausible_share'])} "
        f"({interval_text([low, high], 100)} points; {certainty}). Do not use this model."
    )
