"""How a class is named to a base model that reads text."""

from __future__ import annotations

PROMPT = "a microscopy image of a {class_name}"
PROMPT_HELP = "What a text-to-image base model is asked for; {class_name} becomes each class. Others ignore it."


def prompt_problems(prompt: str) -> list[str]:
    """Say so if a template would ask for the same image whatever the class is."""
    if "{class_name}" in prompt:
        return []
    return [f"`prompt` is {prompt!r}, the same for all classes; put {{class_name}} into it, as in {PROMPT!r}."]
