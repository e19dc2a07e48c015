"""Attach, save and load LoRA adapters by the UNet's own adapter methods (LoRA: arXiv:2106.09685)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError

from pathalign.artefacts import write_atomically
from pathalign.config import ADAPTER
from pathalign.diffusion.loading import BaseModel
from pathalign.diffusion.pipeline import (
    BASE_KEY,
    CONCEPT_WEIGHTS,
    CONCEPTS_KEY,
    LORA_WEIGHTS_NAME,
    ClassConditionalPipeline,
    ConceptEmbedding,
    base_hash,
    other_base,
)
from pathalign.pinning import unusable
from pathalign.remote import parse
from pathalign.schema import InputError

ADAPTER_NAME = "default"
WEIGHTS_NAME = LORA_WEIGHTS_NAME
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTION_LAYERS = ("conv1", "conv2", "conv_shortcut", "conv", "time_emb_proj")


def attach(unet: UNet2DConditionModel, rank: int, alpha: float, convolutions: bool, generator: torch.Generator) -> None:
    """Freeze the UNet and add a trainable adapter that changes nothing yet.

    Args:
        unet: Changed in place.
        rank: Rank of the update of each layer.
        alpha: The update is scaled by `alpha / rank`.
        convolutions: Adapt convolutions and time projections too, not attention only.
        generator: Draws the down-projections; the up-projections start at zero.
    """
    layers = ATTENTION_LAYERS + (CONVOLUTION_LAYERS if convolutions else ())
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(layers)), adapter_name=ADAPTER_NAME)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_A" in name:  # peft draws from the global generator; ours makes the run repeatable
                fan_in = parameter[0].numel()
                noise = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_((noise / fan_in**0.5).to(parameter))


def add_concepts(
    pipeline: ClassConditionalPipeline, concepts: Mapping[str, str], noise: float, generator: torch.Generator
) -> None:
    """Give the attached adapter new classes, which start at their parents' embeddings plus noise.

    Args:
        pipeline: Changed in place.
        concepts: Name of each new class -> class that it is split off from.
        noise: Standard deviation of the noise, in those of the parents' own embeddings: sisters must not be equal.
        generator: Draws it.
    """
    weight = pipeline.unet.class_embedding.weight
    offsets = torch.randn((len(concepts), weight.shape[1]), generator=generator)
    offsets = offsets.to(weight) * noise * weight.detach().std()
    ids = [(name, pipeline.base_class_names.index(parent)) for name, parent in concepts.items()]
    ConceptEmbedding.add(pipeline.unet, ADAPTER_NAME, ids, offsets)


def parameters(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's trainable parameters by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if "lora_" in name}


@contextmanager
def merged(unet: UNet2DConditionModel) -> Iterator[None]:
    """Context in which the active adapter is part of the base weights: sampling is faster, gradients are not to be had.

    The base weights come back bit for bit: they are kept, since subtracting the update again would leave its rounding.
    """
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    kept = [layer.get_base_layer().weight.data.clone() for layer in layers]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer in layers:
            layer.unmerge()
        torch._foreach_copy_([layer.get_base_layer().weight.data for layer in layers], kept)


@contextmanager
def disabled(unet: UNet2DConditionModel) -> Iterator[None]:
    """Context in which the UNet is the base model again: the reference of a trainer, without a second copy."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def save(unet: UNet2DConditionModel, folder: Path, class_names: Sequence[str] = ()) -> None:
    """Write the adapter in diffusers' format, for `load_lora_weights`; equal adapters give equal bytes.

    Its metadata holds the hash of the base weights, so that it knows its base model under any name, and the names and
    parents of its concepts, of the base model `class_names`.
    """
    weights = get_peft_model_state_dict(unet, adapter_name=ADAPTER_NAME)
    metadata = unet.peft_config[ADAPTER_NAME].to_dict()
    ClassConditionalPipeline.save_lora_weights(
        folder,
        unet_lora_layers={name: tensor.detach().contiguous() for name, tensor in weights.items()},
        unet_lora_adapter_metadata={**metadata, "target_modules": sorted(metadata["target_modules"])},
    )
    layer = unet.class_embedding
    own: dict[str, Any] = {BASE_KEY: base_hash(unet)}
    if isinstance(layer, ConceptEmbedding) and (concepts := layer.concepts.get(ADAPTER_NAME)):
        own |= {CONCEPTS_KEY: [(name, class_names[parent]) for name, parent in concepts]}
    _finish_header(folder / WEIGHTS_NAME, own)


def _finish_header(path: Path, own: Mapping[str, Any]) -> None:
    """Add our own metadata to the header of a safetensors file, and sort it.

    diffusers takes metadata of its own networks only, and safetensors 0.8 writes it in random order.
    """
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:start])
    metadata = json.loads(entries["__metadata__"]["lora_adapter_metadata"])
    entries["__metadata__"]["lora_adapter_metadata"] = json.dumps({**metadata, **own}, sort_keys=True)
    if (name := f"unet.class_embedding.{CONCEPT_WEIGHTS}") in entries:
        entries[CONCEPT_WEIGHTS] = entries.pop(name)
    header = json.dumps(entries, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    write_atomically(path, len(header).to_bytes(8, "little") + header + content[start:])


def load(
    pipeline: BaseModel,
    path_or_repo_id: str,
    scale: float = 1.0,
    revision: str | None = None,
    any_base: bool = False,
) -> None:
    """Load an adapter onto a pipeline and make it active.

    Args:
        pipeline: Changed in place.
        path_or_repo_id: Folder, Hub id, or `OWNER/NAME@REVISION`.
        scale: Strength of the adapter: 0 is the base model.
        revision: Of the Hub repo.
        any_base: Load it even if it was trained on another base model.

    Raises:
        InputError: If there is no adapter, or it was trained on another base model.
    """
    reference = parse(path_or_repo_id, revision)
    folder = Path(reference.name)
    if folder.is_dir() and not (folder / WEIGHTS_NAME).is_file():
        raise InputError(f"{folder} holds no {WEIGHTS_NAME}; give a folder or repo made by `pathalign align`.")
    where = {"weight_name": WEIGHTS_NAME, "revision": reference.revision, "use_safetensors": True}
    try:
        *_, metadata = pipeline.lora_state_dict(reference.name, return_lora_metadata=True, **where)
        if not any_base and (problem := other_base(pipeline.unet, metadata)):
            raise InputError(
                f"{reference} does not fit {pipeline.name_or_path}. {problem} Load the base model that its run.json "
                "and card name, or say `any_base` (`--any-base`) to use it all the same."
            )
        pipeline.load_lora_weights(reference.name, adapter_name=ADAPTER_NAME, **where)
    except (OSError, SafetensorError) as error:
        raise unusable(error, reference, ADAPTER) from error
    pipeline.set_adapters([ADAPTER_NAME], [scale])
