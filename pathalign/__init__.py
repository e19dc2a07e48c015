"""pathalign: align synthetic medical images with clinical knowledge by expert feedback. Research use only.

The public names are imported when they are first used, so that `import pathalign` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathalign.diffusion.pipeline import ClassConditionalPipeline
    from pathalign.grading.simulated import SimulatedGrader
    from pathalign.images import ImageSet
    from pathalign.reward import RewardModel, RewardModelConfig
    from pathalign.schema import Grade, Rubric, RunRecord

_MODULES = {
    "ClassConditionalPipeline": "pathalign.diffusion.pipeline",
    "Grade": "pathalign.schema",
    "ImageSet": "pathalign.images",
    "RewardModel": "pathalign.reward",
    "RewardModelConfig": "pathalign.reward",
    "Rubric": "pathalign.schema",
    "RunRecord": "pathalign.schema",
    "SimulatedGrader": "pathalign.grading.simulated",
}

__all__ = [
    "ClassConditionalPipeline",
    "Grade",
    "ImageSet",
    "RewardModel",
    "RewardModelConfig",
    "Rubric",
    "RunRecord",
    "SimulatedGrader",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("pathalign")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
