"""A class-conditional diffusion pipeline in pixel space. It travels with the weights and needs diffusers only."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import logging
from huggingface_hub import constants
from PIL import Image

try:  # needed by adapters only
    from peft.tuners.tuners_utils import BaseTunerLayer
except ImportError:
    BaseTunerLayer = object

LORA_WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
BASE_KEY = "base.unet_sha256"  # in the metadata of an adapter; diffusers reads the keys that begin with `unet.`
CONCEPTS_KEY = "base.concepts"  # beside it: name and parent class of each row of the tensor `CONCEPT_WEIGHTS`
CONCEPT_WEIGHTS = "lora_concepts"  # in the file; not below `unet.`, so that earlier versions pass it by
logger = logging.get_logger(__name__)


def randn_per_image(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Noise of shape `(len(generators), *shape)`, float32; image i draws from `generators[i]` only."""
    return torch.stack([torch.randn(shape, generator=generator, device=generator.device) for generator in generators])


class ConceptEmbedding(torch.nn.Module, BaseTunerLayer):
    """The class embedding of a UNet with the new classes, called concepts, that its adapters bring.

    A concept's row is its parent's row plus an offset, which is scaled with the adapter: an adapter that is disabled or
    has the weight 0 leaves the parent. Concepts of active adapters come after the base model's classes; the last row of
    the table is "no class" as before. To diffusers this is one more layer of the adapters, on the base model's own
    embedding, `(classes + 1, width)`.
    """

    adapter_layer_names = (CONCEPT_WEIGHTS,)
    other_param_names = ("concepts", "scaling")
    active_adapters: Any  # of peft's layers, like `disable_adapters` and `set_adapter`
    set_adapter: Any

    def __init__(self, base_layer: torch.nn.Embedding) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_concepts = torch.nn.ParameterDict()  # adapter -> offsets, shape (concepts, width)
        self.concepts: dict[str, list[tuple[str, int]]] = {}  # adapter -> name and parent's id of each offset
        self.scaling: dict[str, float] = {}
        self.lora_A: dict[str, torch.Tensor] = {}  # diffusers looks here for what it could move to another device
        self.merged_adapters: list[str] = []

    @classmethod
    def add(
        cls, unet: UNet2DConditionModel, adapter: str, concepts: Sequence[tuple[str, int]], offsets: torch.Tensor
    ) -> None:
        """Give an adapter of `unet` its concepts: name and parent's id of each, offsets of shape `(n, width)`.

        Raises:
            ValueError: If another adapter has such a concept with another parent.
        """
        layer = unet.class_embedding
        others = layer.concepts.items() if isinstance(layer, cls) else ()
        known = {name: parent for key, entries in others if key != adapter for name, parent in entries}
        if clash := [name for name, parent in concepts if known.get(name, parent) != parent]:
            raise ValueError(f"Another adapter has {clash[0]!r} with another parent; delete that adapter first.")
        tuners = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
        if not isinstance(layer, cls):
            layer = cls(layer)
            del unet.class_embedding  # last among the modules: diffusers asks the first layer which adapters there are
            unet.class_embedding = layer
        layer.lora_concepts[adapter] = torch.nn.Parameter(offsets.detach().clone().to(layer.base_layer.weight))
        layer.concepts[adapter], layer.scaling[adapter] = list(concepts), 1.0
        layer.set_adapter(list(tuners[0].active_adapters))

    @property
    def parents(self) -> dict[str, int]:
        """Concepts of the active adapters -> their parents' ids, in the order of the rows."""
        return dict(entry for name in self.active_adapters for entry in self.concepts.get(name, ()))

    @property
    def num_embeddings(self) -> int:
        """Rows of the table: classes, concepts and "no class"."""
        return self.base_layer.num_embeddings + len(self.parents)

    def forward(self, class_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings of classes, concepts and "no class", shape `(n, width)`."""
        weight, parents = self.base_layer.weight, self.parents
        rows = weight[list(parents.values())]
        for name in [] if self.disable_adapters else self.active_adapters:
            if name in self.concepts:
                places = [list(parents).index(concept) for concept, _ in self.concepts[name]]
                offsets = self.scaling[name] * self.lora_concepts[name].to(rows)
                rows = rows.index_add(0, torch.tensor(places, device=rows.device), offsets)
        return torch.nn.functional.embedding(class_ids, torch.cat([weight[:-1], rows, weight[-1:]]))

    def set_scale(self, adapter: str, scale: float) -> None:
        """Strength of an adapter's offsets."""
        self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        self.scaling |= {name: scale * self.scaling.get(name, 1.0) for name in self.active_adapters}

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a number strengths are 1 again."""
        self.scaling |= {name: self.scaling.get(name, 1.0) / scale if scale else 1.0 for name in self.active_adapters}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to do, as in `unmerge`: rows are added to a table, not to the weights of the base model."""

    unmerge = merge


class ClassConditionalPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Draws images of given classes with a `UNet2DConditionModel` that has class embeddings and no text.

    The UNet's last class embedding stands for "no class" and serves classifier-free guidance (arXiv:2207.12598).
    Adapters may bring concepts, new classes split off from a parent, known by name while the adapter is active.
    Images are synthetic: for research only, never for diagnosis.

    Args:
        unet: Built with `num_class_embeds = len(class_names) + 1`, predicting noise or velocity as the scheduler says.
        scheduler: Any diffusers scheduler with the training schedule.
        id2label: Class id -> class name; saved in `model_index.json`, where the ids become strings.
    """

    model_cpu_offload_seq = "unet"
    _lora_loadable_modules = ["unet"]
    text_encoder = None  # the LoRA loader asks for it

    def __init__(
        self, unet: UNet2DConditionModel, scheduler: SchedulerMixin, id2label: dict[str, str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(class_id): name for class_id, name in (id2label or {}).items()})

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their ids: the base model's classes, then the concepts of active adapters."""
        return [*self.base_class_names, *self.concepts]

    @property
    def base_class_names(self) -> list[str]:
        """Classes of the base model alone, in the order of their ids."""
        return [self.config.id2label[class_id] for class_id in sorted(self.config.id2label, key=int)]

    @property
    def concepts(self) -> dict[str, str]:
        """Concepts of the active adapters -> the classes that they were split off from."""
        parents, names = getattr(self.unet.class_embedding, "parents", {}), self.base_class_names
        return {name: names[parent] for name, parent in parents.items()}

    def class_ids(self, class_labels: str | int | Sequence[str | int]) -> torch.Tensor:
        """Class names or ids to ids, shape `(n,)`, int64; errors as of `label_ids`."""
        return label_ids(class_labels, self.class_names)

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor | int, class_ids: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """UNet output for noisy images, guided if `guidance_scale` is not 1.

        Args:
            sample: Shape `(n, channels, size, size)`.
            timestep: One timestep, or one for each image.
            class_ids: Shape `(n,)`.
            guidance_scale: 1 is none; above 1 moves away from what no class gives, or a concept's parent.
        """
        conditional = self.unet(sample, timestep, encoder_hidden_states=None, class_labels=class_ids).sample
        if guidance_scale == 1.0:
            return conditional
        others = general_ids(self.unet, class_ids)
        general = self.unet(sample, timestep, encoder_hidden_states=None, class_labels=others).sample
        return general + guidance_scale * (conditional - general)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[str | int],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each label.

        Args:
            class_labels: Names or ids, one for each image.
            generator: One generator for each image: batch size then never changes an image. A single generator is
                used to seed one for each image; None takes fresh entropy.
            num_inference_steps: Denoising steps.
            guidance_scale: See `predict`.
            output_type: `pil`, `np` (n, size, size, 3) in [0, 1], or `pt` (n, 3, size, size) in [-1, 1].
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.

        Raises:
            ValueError: If a label is unknown, the number of generators differs from the number of labels, or the
                output type is unknown.
        """
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"`output_type` is {output_type!r}; use pil, np or pt.")
        class_ids = self.class_ids(class_labels).to(self.device)
        generators = one_generator_each(generator, len(class_ids))
        config = self.unet.config
        shape = (config.in_channels, config.sample_size, config.sample_size)
        sample = randn_per_image(shape, generators).to(self.device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        sample = sample * self.scheduler.init_noise_sigma
        takes_noise = "generator" in inspect.signature(self.scheduler.step).parameters
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(sample, timestep)
            model_output = self.predict(model_input, timestep, class_ids, guidance_scale)
            options = {"generator": generators} if takes_noise else {}
            sample = self.scheduler.step(model_output, timestep, sample, **options).prev_sample
        images = convert(sample.float().clamp(-1, 1), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load a pipeline from a folder or Hub id; arguments as of `DiffusionPipeline.from_pretrained`.

        Weights are read from safetensors only, never from a pickle.

        Raises:
            InputError: If it cannot be loaded; diffusers' own error where pathalign is not installed.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            try:
                pinning = import_module("pathalign.pinning")
            except ImportError:  # this file came with the weights
                raise error from None
            reference = pinning.Reference(str(pretrained_model_name_or_path), kwargs.get("revision"))
            raise pinning.unusable(error, reference, "a pipeline") from error

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """As in diffusers, from safetensors only, and also where there is no connection to ask for the file's name.

        Raises:
            ValueError: If `weight_name` is a pickle.
        """
        source, name = pretrained_model_name_or_path_or_dict, kwargs.get("weight_name")
        if name is not None and not name.endswith(".safetensors"):
            raise ValueError(f"`weight_name` is {name!r}; adapters are read from .safetensors only, not from pickles.")
        offline = constants.HF_HUB_OFFLINE or kwargs.get("local_files_only")
        if name is None and offline and not isinstance(source, dict) and not Path(source).exists():
            kwargs["weight_name"] = LORA_WEIGHTS_NAME
        kwargs["use_safetensors"] = True
        return super().lora_state_dict(source, **kwargs)

    @classmethod
    def load_lora_into_unet(cls, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the adapter's concepts, and a warning if it was trained on another base model.

        Raises:
            ValueError: If it has concepts that cannot be added to this pipeline's classes.
        """
        unet, metadata = kwargs["unet"], kwargs.get("metadata") or {}
        if problem := other_base(unet, metadata):
            logger.warning(problem)
        offsets, named = state_dict.get(CONCEPT_WEIGHTS), metadata.get(CONCEPTS_KEY, [])
        if offsets is not None:
            concepts = concept_ids(named, kwargs["_pipeline"].base_class_names, offsets, unet)
        super().load_lora_into_unet(state_dict, *args, **kwargs)
        if offsets is not None:
            ConceptEmbedding.add(unet, kwargs.get("adapter_name") or list(unet.peft_config)[-1], concepts, offsets)

    def fuse_lora(self, components: Sequence[str] = ("unet",), **kwargs: Any) -> None:
        """Merge the active adapters into the UNet's weights; `unfuse_lora` takes them out again."""
        super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("unet",), **kwargs: Any) -> None:
        """Undo `fuse_lora`."""
        super().unfuse_lora(components=list(components), **kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write the pipeline, with this file as `pipeline.py` so that it loads where pathalign is not installed."""
        super().save_pretrained(save_directory, **kwargs)
        for name in ("model_index.json", "unet/config.json"):  # where it was loaded from is a path of this machine
            path = Path(save_directory) / name
            config = json.loads(path.read_text())
            config.pop("_name_or_path", None)
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        target = Path(save_directory) / "pipeline.py"
        target.write_text(Path(inspect.getfile(ClassConditionalPipeline)).read_text())


def no_class_id(unet: UNet2DConditionModel) -> int:
    """Id that stands for "no class": the last row, however many concepts adapters bring."""
    return int(unet.class_embedding.num_embeddings) - 1


def general_ids(unet: UNet2DConditionModel, class_ids: torch.Tensor) -> torch.Tensor:
    """What guidance moves away from, shape `(n,)`: "no class", or the parents of concepts."""
    parents, no_class = getattr(unet.class_embedding, "parents", {}).values(), no_class_id(unet)
    table = [no_class] * (no_class - len(parents)) + [*parents, no_class]
    return torch.tensor(table, device=class_ids.device)[class_ids]


def concept_ids(
    named: Sequence[Sequence[str]], class_names: Sequence[str], offsets: torch.Tensor, unet: UNet2DConditionModel
) -> list[tuple[str, int]]:
    """Concepts as an adapter's metadata name them, with the ids of their parents.

    Raises:
        ValueError: If a parent is no class here, a name is one already, or the offsets do not fit.
    """
    fits = tuple(offsets.shape) == (len(named), unet.class_embedding.weight.shape[1])
    for name, parent in named:
        if not fits or parent not in class_names or name in class_names:
            raise ValueError(
                f"The adapter's concept {name!r} of {parent!r} does not fit this model, whose classes are "
                f"{list(class_names)}; load the base model that it was trained on."
            )
    return [(name, list(class_names).index(parent)) for name, parent in named]


def base_hash(unet: UNet2DConditionModel) -> str:
    """SHA-256 of a UNet's own weights, whatever adapters it has, on any device, in single or half precision."""
    return weights_hash(sorted(unet.state_dict().items()))


def weights_hash(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """`base_hash` of a UNet's tensors with their names, sorted by them."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        if "lora_" not in name:
            values = tensor.detach().cpu().to(torch.float16).contiguous()
            digest.update(name.replace(".base_layer", "").encode() + values.numpy().tobytes())
    return digest.hexdigest()


def other_base(unet: UNet2DConditionModel, metadata: Mapping[str, Any] | None) -> str:
    """What is wrong if an adapter's metadata names another base model than this UNet; else empty."""
    wanted = (metadata or {}).get(BASE_KEY)
    if wanted is None or wanted == (own := base_hash(unet)):
        return ""
    return (
        f"The adapter was trained on another base model: on a UNet of SHA-256 {wanted[:12]}..., this one has "
        f"{own[:12]}.... What it draws here was never trained, graded or measured."
    )


def label_ids(class_labels: str | int | Sequence[str | int], names: Sequence[str]) -> torch.Tensor:
    """Class names or ids to ids, shape `(n,)`, int64.

    Raises:
        ValueError: If a label is neither one of `names` nor an index into them.
    """
    if isinstance(class_labels, (str, int)):
        class_labels = [class_labels]
    ids = []
    for label in class_labels:
        if isinstance(label, str) and label in names:
            ids.append(names.index(label))
        elif not isinstance(label, str) and 0 <= int(label) < len(names):
            ids.append(int(label))
        else:
            raise ValueError(f"Class {label!r} is not known; use one of {list(names)} or 0 to {len(names) - 1}.")
    return torch.tensor(ids, dtype=torch.int64)


def one_generator_each(
    generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[torch.Generator]:
    """`count` generators: those given, or new ones seeded by the one given, or by fresh entropy.

    Raises:
        ValueError: If there are more or fewer than `count`.
    """
    if generator is None or isinstance(generator, torch.Generator):
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(0, 2**62, (count,), generator=generator, device=device).tolist()
        return [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generator) != count:
        raise ValueError(f"There are {len(generator)} generators for {count} labels; give one for each image.")
    return list(generator)


def convert(pixel_values: torch.Tensor, output_type: str) -> Any:
    """Pixel values `(n, 3, h, w)` in [-1, 1] as `pt`, `np` or `pil`; see `ClassConditionalPipeline.__call__`."""
    if output_type == "pt":
        return pixel_values.cpu()
    scaled = ((pixel_values + 1) / 2).permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return scaled
    return [Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in scaled]
