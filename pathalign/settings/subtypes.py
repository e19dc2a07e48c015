"""Which attribute values of a class make which subtype: rules as text, in settings of several stages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RULE = re.compile(r"(?P<class_name>[^:=]+):(?P<attribute>[^:=]+):(?P<subtype>[^:=]+)=(?P<values>[^:=]+)")
RULE_HELP = (
    "each CLASS:ATTRIBUTE:SUBTYPE=VALUE+VALUE, such as neutrophil:nucleus_shape:band=unsegmented-band; a cell of that "
    "class whose attribute has one of these values is of that subtype"
)


@dataclass(frozen=True)
class SubtypeRule:
    """Cells of a class whose attribute has one of these values are of this subtype."""

    class_name: str
    attribute: str
    subtype: str
    values: tuple[str, ...]


def subtype_rule(text: str) -> SubtypeRule:
    """Read `CLASS:ATTRIBUTE:SUBTYPE=VALUE+VALUE`.

    Raises:
        ValueError: If it is not of that form.
    """
    found = RULE.fullmatch(text)
    values = found and [value.strip() for value in found["values"].split("+")]
    if not found or not values or not all(values):
        raise ValueError(text)
    class_name, attribute, subtype = (found[name].strip() for name in ("class_name", "attribute", "subtype"))
    return SubtypeRule(class_name, attribute, subtype, tuple(values))


def rule_problems(texts: Sequence[str]) -> list[str]:
    """What is wrong with the setting `subtypes`: rules that cannot be read, and values that make two subtypes."""
    found: list[str] = []
    seen: dict[tuple[str, str, str], str] = {}
    for text in texts:
        try:
            rule = subtype_rule(text)
        except ValueError:
            found.append(f"`subtypes` has {text!r}; write CLASS:ATTRIBUTE:SUBTYPE=VALUE+VALUE.")
            continue
        for value in rule.values:
            other = seen.setdefault((rule.class_name, rule.attribute, value), rule.subtype)
            if other != rule.subtype:
                found.append(f"`subtypes` says that {rule.attribute} {value!r} is {other!r} and {rule.subtype!r}.")
    return found


def subtype_of(rules: Sequence[SubtypeRule], class_name: str, attributes: Mapping[str, Any]) -> str:
    """Subtype of a cell by its attributes; empty if no rule is about it."""
    for rule in rules:
        if rule.class_name == class_name and attributes.get(rule.attribute) in rule.values:
            return rule.subtype
    return ""
