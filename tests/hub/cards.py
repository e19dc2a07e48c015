"""Front matter of a repo's README.md, and what the Hub has against it."""

from __future__ import annotations

from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from hub.store import Repo, Store
from hub.web import json_body

COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SDKS = ("gradio", "docker", "static", "streamlit")
LISTS = ("tags", "datasets", "models", "metrics", "base_model", "language")  # of texts, or one text
EMPTY = "empty or missing yaml metadata in repo card"


def front_matter(text: str) -> dict[str, Any]:
    """The mapping between the first two `---`; empty if there is none or it is broken."""
    try:
        found = yaml.safe_load(_block(text) or "")
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the README of a `model`, `dataset` or `space`."""
    block = _block(text)
    if block is None:
        return (["Missing configuration in README"], []) if kind == "space" else ([], [EMPTY])
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"Bad YAML in the metadata: {' '.join(str(error).split())}"], []
    if data is None:
        return [], [EMPTY]
    if not isinstance(data, dict):
        return ['"metadata" must be a mapping'], []
    errors = []
    for key in LISTS:
        value = data.get(key, [])
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(part, str) for part in value)
        ):
            errors.append(f'"{key}" must be a string or an array of strings')
    if not isinstance(data.get("license", ""), str | list):
        errors.append('"license" must be a string')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is required when "license" is other')
    for entry in data.get("model-index") or []:
        if not isinstance(entry, dict) or "name" not in entry or not isinstance(entry.get("results", []), list):
            errors.append('"model-index[].name" and "model-index[].results" are required')
    return errors + (_space_errors(data) if kind == "space" else []), []


def _space_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    if data.get("sdk") not in SDKS:
        errors.append(f'"sdk" must be one of {", ".join(SDKS)}')
    for key in ("colorFrom", "colorTo"):
        if key in data and data[key] not in COLOURS:
            errors.append(f'"{key}" must be one of {", ".join(COLOURS)}')
    if len(str(data.get("short_description", ""))) > 60:
        errors.append('"short_description" length must be at most 60 characters')
    return errors


def _block(text: str) -> str | None:
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in (line.strip() for line in lines[1:]):
        return None
    end = next(number for number, line in enumerate(lines[1:], 1) if line.strip() == "---")
    return "\n".join(lines[1:end])


def card_of(store: Store, repo: Repo, oid: str) -> dict[str, Any]:
    """Front matter of a repo at a commit."""
    entry = store.tree(oid).get("README.md")
    return front_matter(store.blob(entry.sha256).decode(errors="replace")) if entry else {}


def tags_of(card: dict[str, Any]) -> list[str]:
    """What the Hub makes of front matter to search by."""
    tags = [tag for tag in card.get("tags") or [] if isinstance(tag, str)]
    tags += [str(card[key]) for key in ("library_name", "pipeline_tag") if card.get(key)]
    for key, prefix in (("license", "license"), ("datasets", "dataset"), ("base_model", "base_model")):
        values = card.get(key) or []
        tags += [f"{prefix}:{value}" for value in ([values] if isinstance(values, str) else values)]
    return tags


async def validate_yaml(request: Request) -> Response:
    body = await json_body(request)
    errors, warnings = check_card(body.get("content") or "", body.get("repoType") or "model")
    answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return JSONResponse(answer, status_code=400 if errors else 200)


def routes() -> list[Route]:
    return [Route("/api/validate-yaml", validate_yaml, methods=["POST"])]
