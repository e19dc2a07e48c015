"""What a training run would cost, before it starts: FLOPs, time on this machine and on common GPUs, memory.

Only configurations are read: neither weights, nor the reward model, nor (but for the classes that Stable Diffusion is
asked for) data. FLOPs are counted, a multiplication and an addition as two, by running the networks on torch's meta
device, with the adapter attached. A backward pass through a frozen network with an adapter costs about one forward
pass in FLOPs, not two: most weights need no gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pathalign.diffusion import lora
from pathalign.diffusion.flops import Profile, profile, profile_unet, unet_inputs
from pathalign.diffusion.loading import model_index, pipeline_kind
from pathalign.diffusion.prompted import PromptPipeline
from pathalign.images import ImageSet
from pathalign.randomness import seeded
from pathalign.remote import parse
from pathalign.settings.adapter import AdapterConfig
from pathalign.trainers.base import with_precision
from pathalign.trainers.gpus import GPUS
from pathalign.trainers.work import Work, work_of

SHARE_OF_PEAK = (0.15, 0.20)  # what convolutional UNets reach of a GPU's peak at small batches; an assumption
LARGEST_MEASURED_GFLOPS = {"cpu": 100.0}  # of one forward pass: beyond it a measurement on a CPU takes minutes
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
GB = 1e9


@dataclass(frozen=True)
class BaseProfile:
    """The networks of a base model; one in pixel space has neither decoder nor encoder nor text."""

    unet: Profile
    adapter_parameters: int
    sample_shape: tuple[int, int, int]
    decoder: Profile | None = None
    encoder_flops: int = 0
    other_parameters: int = 0


@dataclass(frozen=True)
class Measured:
    """UNet passes of one image on this machine, in seconds, measured at a batch size, and the run's hours by these."""

    device: str
    batch_size: int
    forward_s: float
    backward_s: float  # forward and back
    hours: float


@dataclass(frozen=True)
class Estimate:
    """What a run would cost on one device.

    Attributes:
        method: Name of the method.
        base_model: Its base model.
        mixed_precision: Its precision.
        classes: Number of classes.
        work: Passes of the whole run.
        profile: FLOPs and sizes of the networks.
        pflops: FLOPs of the whole run, in units of 1e15; reward models are not in it.
        gpu_hours: Hours by GPU at 20 % and 15 % of its peak; None if it lacks the precision.
        memory_gb: Parts of the memory, and their sum as `total`, in GB.
        measured: On this machine; None if the networks are too large for that.
    """

    method: str
    base_model: str
    mixed_precision: str
    classes: int
    work: Work
    profile: BaseProfile
    pflops: float
    gpu_hours: dict[str, tuple[float, float] | None]
    memory_gb: dict[str, float]
    measured: Measured | None


def estimate(config: AdapterConfig) -> Estimate:
    """Count, measure and add up.

    Raises:
        InputError: If the base model's configuration cannot be read, or, of Stable Diffusion, the data.
    """
    classes = class_count(config)
    work = work_of(config, classes)
    profile = profile_base(config)
    flops = total_flops(work, profile)
    peaks = {gpu.name: gpu.peak_tflops(config.mixed_precision) for gpu in GPUS}
    low, high = SHARE_OF_PEAK
    return Estimate(
        method=config.method,
        base_model=config.base_model,
        mixed_precision=config.mixed_precision,
        classes=classes,
        work=work,
        profile=profile,
        pflops=flops / 1e15,
        gpu_hours={
            name: (flops / (peak * 1e12 * high) / 3600, flops / (peak * 1e12 * low) / 3600) if peak else None
            for name, peak in peaks.items()
        },
        memory_gb=memory(config, work, profile),
        measured=measure(config, work, profile),
    )


def class_count(config: AdapterConfig) -> int:
    """Number of classes, from the base model if it has any, else from the data."""
    if pipeline_kind(config.base_model, config.base_revision) is PromptPipeline:
        return len(ImageSet.load(config.data, "train").class_names)
    return len(model_index(config.base_model, config.base_revision)["id2label"])


def total_flops(work: Work, profile: BaseProfile) -> float:
    """FLOPs of a whole run: passes of the UNet, and of the VAE where there is one."""
    flops = work.forward * profile.unet.forward_flops + work.backward * profile.unet.backward_flops
    if profile.decoder is not None:
        flops += work.decoded * profile.decoder.forward_flops + work.decoded_backward * profile.decoder.backward_flops
    return float(flops + work.encoded * profile.encoder_flops)


def memory(config: AdapterConfig, work: Work, profile: BaseProfile) -> dict[str, float]:
    """Parts of the memory in GB: counted, not measured, and without the framework's own.

    Half precision halves activations and adds a cast copy of the weights; `auto` counts as full, which is more.
    """
    half = config.mixed_precision in DTYPES
    weights = 4 * (profile.unet.parameters + profile.other_parameters)
    activations = work.graph * profile.unet.saved_bytes / (2 if half else 1)
    if profile.decoder is not None:
        activations += work.decoded_graph * profile.decoder.saved_bytes  # the VAE computes in float32
    channels, height, width = profile.sample_shape
    parts = {
        "weights": weights + (2 * profile.unet.parameters if half else 0),
        "adapter": 5 * 4 * profile.adapter_parameters,  # with gradient, Adam's two moments, and the average
        "activations": activations,
        "trajectories": 4 * work.kept_samples * channels * height * width,
    }
    return {name: size / GB for name, size in {**parts, "total": sum(parts.values())}.items()}


def profile_base(config: AdapterConfig) -> BaseProfile:
    """Count the networks of a base model with the adapter of `config`; only its configurations are read."""
    unet = new_unet(config, "meta")
    attach(unet, config)
    counted = profile_unet(unet)
    adapter = sum(parameter.numel() for parameter in lora.parameters(unet).values())
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    if pipeline_kind(config.base_model, config.base_revision) is not PromptPipeline:
        return BaseProfile(counted, adapter, shape)
    vae = new_network(AutoencoderKL, config, "vae", "meta").requires_grad_(False)
    vae_parameters = sum(parameter.numel() for parameter in vae.parameters())
    latents = torch.zeros(1, *shape, device="meta", requires_grad=True)
    size = shape[-1] * 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = torch.zeros(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as encoding:
        vae.encode(pixels)
    return BaseProfile(
        counted,
        adapter,
        shape,
        decoder=profile(lambda: vae.decode(latents).sample, vae, vae_parameters),
        encoder_flops=encoding.get_total_flops(),
        other_parameters=vae_parameters + text_parameters(config),
    )


def text_parameters(config: AdapterConfig) -> int:
    """Parameters of Stable Diffusion's text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    base = parse(config.base_model, config.base_revision)
    settings = CLIPTextConfig.from_pretrained(base.name, subfolder="text_encoder", revision=base.revision)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in CLIPTextModel(settings).parameters())


def new_network(kind: Any, config: AdapterConfig, subfolder: str, device: str | torch.device) -> Any:
    """A network of the base model with weights that mean nothing, or on the meta device with none."""
    base = parse(config.base_model, config.base_revision)
    settings = kind.load_config(base.name, subfolder=subfolder, revision=base.revision)
    with torch.device(device):
        return kind.from_config(settings)


def new_unet(config: AdapterConfig, device: str | torch.device) -> UNet2DConditionModel:
    """The base model's UNet, as `new_network` makes it."""
    return new_network(UNet2DConditionModel, config, "unet", device)


def attach(unet: UNet2DConditionModel, config: AdapterConfig) -> None:
    """Attach the adapter that the run would train."""
    lora.attach(unet, config.lora_rank, config.lora_alpha, config.lora_convolutions, seeded(config.seed))


def measure(config: AdapterConfig, work: Work, profile: BaseProfile) -> Measured | None:
    """Time a few passes of a UNet of the same shape at the batch size of training."""
    device = PartialState().device
    if profile.unet.forward_flops / 1e9 > LARGEST_MEASURED_GFLOPS.get(device.type, float("inf")):
        return None
    batch_size = max(1, work.graph)
    unet = new_unet(config, device)
    attach(unet, config)
    inputs = unet_inputs(unet, batch_size)
    dtype = DTYPES.get(with_precision(config).mixed_precision)

    def output() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return unet(**inputs).sample.float()

    def forward() -> None:
        with torch.no_grad():
            output()

    forward_s = seconds(forward, device) / batch_size
    backward_s = seconds(lambda: output().square().mean().backward(), device) / batch_size
    hours = (work.forward * forward_s + work.backward * backward_s) / 3600
    return Measured(str(device), batch_size, forward_s, backward_s, hours)


def seconds(run: Callable[[], None], device: torch.device, repeats: int = 3) -> float:
    """The shortest of a few runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def table(made: Estimate) -> str:
    """An estimate as text."""
    work, profile, measured = made.work, made.profile, made.measured
    rows = [
        ("UNet, forward", f"{work.forward:,} images, {profile.unet.forward_flops / 1e9:,.2f} GFLOPs each"),
        ("UNet, forward and back", f"{work.backward:,} images, {profile.unet.backward_flops / 1e9:,.2f} GFLOPs each"),
    ]
    if profile.decoder is not None:
        decoded, encoded = work.decoded + work.decoded_backward, work.encoded
        rows.append(("VAE", f"{decoded:,} images decoded, {encoded:,} encoded"))
    rows += [
        ("FLOPs in all", f"{made.pflops:,.3f} PFLOPs, without reward models"),
        *((f"memory, {name}", f"{size:.2f} GB") for name, size in made.memory_gb.items()),
    ]
    if measured is None:
        rows.append(("this machine", "not measured: one pass of this UNet takes too long here"))
    else:
        passes = f"{1000 * measured.forward_s:.1f} ms forward, {1000 * measured.backward_s:.1f} ms forward and back"
        ratio = measured.backward_s / measured.forward_s
        rows.append(
            (f"this machine ({measured.device})", f"{hours_text(measured.hours)}: {passes} an image, {ratio:.1f} to 1")
        )
    for gpu in GPUS:
        span = made.gpu_hours[gpu.name]
        text = f"no {made.mixed_precision}" if span is None else f"{hours_text(span[0])} to {hours_text(span[1])}"
        fits = "" if made.memory_gb["total"] <= gpu.memory_gb else ", more than its memory"
        rows.append((f"{gpu.name}, {gpu.memory_gb} GB", text + fits))
    width = max(len(name) for name, _ in rows)
    low, high = SHARE_OF_PEAK
    title = f"{made.method} on {made.base_model}, {made.classes} classes, precision {made.mixed_precision}, one device"
    note = f"GPUs: at {low:.0%} to {high:.0%} of their peak, an assumption; small UNets reach less."
    return "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in rows), note])


def hours_text(hours: float) -> str:
    """A time that is easily read: seconds, minutes or hours."""
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.1f} h"
