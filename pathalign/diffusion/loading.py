"""Open a base model, whichever kind it is, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from pathalign.config import PIPELINE
from pathalign.diffusion.pipeline import ClassConditionalPipeline
from pathalign.diffusion.prompted import PromptPipeline
from pathalign.pinning import unusable
from pathalign.remote import parse
from pathalign.schema import InputError
from pathalign.settings.prompt import PROMPT

BaseModel = ClassConditionalPipeline | PromptPipeline
PIPELINES = {"ClassConditionalPipeline": ClassConditionalPipeline, "StableDiffusionPipeline": PromptPipeline}


def load_base(
    path_or_repo_id: str,
    revision: str | None = None,
    class_names: Sequence[str] = (),
    template: str = PROMPT,
    device: torch.device | None = None,
) -> BaseModel:
    """A base model; `model_index.json` says which kind it is.

    Args:
        path_or_repo_id: Folder, Hub id, or `OWNER/NAME@REVISION`.
        revision: Of the Hub repo.
        class_names: Classes to ask Stable Diffusion for; a class-conditional model has its own.
        template: Stable Diffusion's prompt, with `{class_name}` in it.
        device: Where it is put. By default the GPU where there is one, and then several processes wait for each other.

    Raises:
        InputError: If it cannot be loaded, is of another kind, or is Stable Diffusion without `class_names`.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    kind = pipeline_kind(path_or_repo_id, revision)
    options = {"safety_checker": None, "requires_safety_checker": False} if kind is PromptPipeline else {}
    reference = parse(path_or_repo_id, revision)
    try:
        pipeline = kind.from_pretrained(
            reference.name, revision=reference.revision, use_safetensors=True, trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise unusable(error, reference, PIPELINE) from error
    if kind is PromptPipeline:
        if not class_names:
            raise InputError(f"{path_or_repo_id} knows words, not classes; name the classes to draw with `classes`.")
        pipeline.name_classes(class_names, template)
    pipeline.set_progress_bar_config(disable=True)
    if device is not None:
        return pipeline.to(device)
    # Whoever asks first decides whether several processes on a CPU know each other.
    return pipeline.to(PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device)


def image_size_px(pipeline: BaseModel) -> int:
    """Width and height of the images that a base model draws."""
    size = int(pipeline.unet.config.sample_size)
    return size * pipeline.vae_scale_factor if isinstance(pipeline, PromptPipeline) else size


def pipeline_kind(path_or_repo_id: str, revision: str | None = None) -> type[BaseModel]:
    """Class that opens a base model, by `model_index.json` alone.

    Raises:
        InputError: If there is no such file, or it names a pipeline that cannot be aligned.
    """
    name = model_index(path_or_repo_id, revision).get("_class_name")
    name = name[-1] if isinstance(name, list) else name  # [module, class] of a pipeline that brought its own code
    if name not in PIPELINES:
        raise InputError(f"{path_or_repo_id} is a {name}; use one of {', '.join(PIPELINES)}.")
    return PIPELINES[name]


def model_index(path_or_repo_id: str, revision: str | None = None) -> dict[str, Any]:
    """Content of `model_index.json` in a folder or Hub repo.

    Raises:
        InputError: If there is none.
    """
    reference = parse(path_or_repo_id, revision)
    folder = Path(reference.name)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise InputError(f"{folder} holds no pipeline (no model_index.json); make one with `pathalign pretrain`.")
    try:
        return dict(ClassConditionalPipeline.load_config(reference.name, revision=reference.revision))
    except (OSError, ValueError) as error:
        raise unusable(error, reference, PIPELINE) from error
