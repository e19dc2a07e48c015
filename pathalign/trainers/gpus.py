"""What GPUs can do at best."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory in GB and its peak in TFLOPS without sparsity, as its datasheet has it."""

    name: str
    memory_gb: int
    fp32_tflops: float
    half_tflops: float  # fp16 and bf16, on tensor cores
    source: str
    has_bf16: bool = True

    def peak_tflops(self, mixed_precision: str) -> float | None:
        """Peak in a precision; None if the GPU lacks it."""
        if mixed_precision == "no" or (mixed_precision == "auto" and not self.has_bf16):
            return self.fp32_tflops
        return self.half_tflops if self.has_bf16 or mixed_precision == "fp16" else None


GPUS = (
    Gpu("T4", 16, 8.1, 65, "NVIDIA T4 datasheet, 2019", has_bf16=False),
    Gpu("A10G", 24, 35, 70, "NVIDIA A10G datasheet for AWS, 2022"),
    Gpu("L4", 24, 30.3, 121, "NVIDIA L4 datasheet, 2023 (242 with sparsity)"),
    Gpu("A100", 80, 19.5, 312, "NVIDIA A100 80GB SXM datasheet, 2021"),
    Gpu("H100", 80, 67, 989, "NVIDIA H100 SXM datasheet, 2023 (1,979 with sparsity)"),
    Gpu("H200", 141, 67, 989, "NVIDIA H200 datasheet, 2024 (the H100's cores, 1,979 with sparsity)"),
)


def named(device_name: str) -> Gpu | None:
    """The GPU that a driver's name speaks of, such as `NVIDIA H100 80GB HBM3`; None if it is none of `GPUS`."""
    return next((gpu for gpu in GPUS if re.search(rf"\b{gpu.name}\b", device_name)), None)
