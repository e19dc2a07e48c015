"""What can be published: each kind of artefact, what its folder holds, and what kind of repo it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from pathalign.artefacts import fingerprint
from pathalign.schema import InputError, RunRecord

SCRATCH = ("checkpoints", "trackers")  # folders that never go: they hold optimizers, host names and pickles


@dataclass(frozen=True)
class Kind:
    """One kind of artefact.

    Attributes:
        name: What it is called, also in the repo's manifest.
        stages: Stages whose run record stands in its folder.
        repo_type: `model`, `dataset` or `space`.
        private: Whether it is private unless `--public` is given.
        needs: Glob patterns, each of which must find a file.
        files: Glob patterns of what its stages write and others have a use for; anything else stays here.
        takes: Settings of `PublishConfig` that only some kinds have a use for.
    """

    name: str
    stages: tuple[str, ...]
    repo_type: str
    private: bool
    needs: tuple[str, ...]
    files: tuple[str, ...]
    takes: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a file of this path in the folder belongs to it; `*` matches no `/`."""
        parts = name.split("/")
        patterns = [pattern.split("/") for pattern in (RunRecord.FILE_NAME, *self.files)]
        return any(len(found) == len(parts) and all(map(fnmatchcase, parts, found)) for found in patterns)


KINDS = (
    Kind(
        "base",
        ("pretrain",),
        "model",
        False,
        ("model_index.json", "unet/*.safetensors"),
        (
            "model_index.json", "pipeline.py", "log.jsonl", "scheduler/scheduler_config.json", "unet/config.json",
            "unet/diffusion_pytorch_model*.safetensors", "unet/*.safetensors.index.json", "samples/final.png",
            "samples/step-[0-9]*.png",
        ),
        ("report", "dataset"),
    ),
    Kind(
        "adapter",
        ("align",),
        "model",
        False,
        ("*.safetensors",),
        ("pytorch_lora_weights.safetensors", "log.jsonl", "samples-[0-9]*.png"),
        ("report", "dataset", "base_model"),
    ),
    Kind(
        "reward",
        ("reward",),
        "model",
        False,
        ("config.json", "*.safetensors", "evaluation.json"),
        (
            "config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json",
            "evaluation.json", "log.jsonl", "*_reward.py", "encoders.py",
        ),
        ("dataset",),
    ),
    Kind("candidates", ("generate",), "dataset", True, ("data/*.parquet",), ("data/train-*.parquet", "samples.png")),
    Kind(
        "feedback",
        ("feedback", "grade", "export", "import"),
        "dataset",
        True,
        (),
        (),  # its parts are made anew, see `feedback_parts`
        ("grades", "candidates", "simulated", "comments"),
    ),
    # Its page shows real images, so that it is private as they are.
    Kind(
        "report",
        ("evaluate",),
        "space",
        True,
        ("report.html", "metrics.json"),
        ("report.html", "metrics.json", "figures/*.png", "figures/*.svg"),
        ("dataset",),
    ),
)  # fmt: skip
PARTICULAR = ("base_model", "report", "grades", "candidates", "dataset", "simulated", "comments")


@dataclass(frozen=True)
class Artefact:
    """A finished folder of a known kind."""

    folder: Path
    kind: Kind
    record: RunRecord

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its files as other run records name it."""
        return fingerprint(self.folder)

    def input_folders(self, setting: str) -> list[Path]:
        """Where inputs of its run lie: where the record says, else beside it, if the run was moved."""
        named = self.record.config.get(setting) or []
        return [moved(Path(name), self.folder) for name in ([named] if isinstance(named, str) else named)]


def recognise(folder: str | Path) -> Artefact:
    """Tell what a folder is by its run record and its files.

    Raises:
        InputError: If there is no finished artefact, it is of a stage that is not published, or lacks files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give one that a stage made, such as runs/demo/adapter.")
    record = RunRecord.load(folder)
    kind = kind_of_stage(record.stage)
    if kind is None:
        known = ", ".join(stage for kind in KINDS for stage in kind.stages)
        why = " Real images stay where their owner put them." if record.stage == "data" else ""
        raise InputError(
            f"{folder} was made by the stage `{record.stage}`, which is not published.{why} Give a folder of one of "
            f"the stages {known}."
        )
    if missing := [pattern for pattern in kind.needs if not any(folder.glob(pattern))]:
        raise InputError(f"{folder} says that it is a {kind.name}, but has no {', '.join(missing)}; make it again.")
    return Artefact(folder, kind, record)


def moved(recorded: Path, beside: Path) -> Path:
    """A recorded folder, or the one of its name beside another folder of the same run if only that is there."""
    neighbour = beside.resolve().parent / recorded.name
    return neighbour if neighbour.exists() and not recorded.exists() else recorded


def kind_of_stage(stage: str) -> Kind | None:
    """The kind that a stage's artefacts are; None if they are not published."""
    return next((kind for kind in KINDS if stage in kind.stages), None)


def own_files(folder: Path) -> list[Path]:
    """Files of an artefact, sorted: without scratch, what is hidden, and the card, which is written anew."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part in SCRATCH for part in parts):
            found.append(path)
    return [path for path in found if path != folder / "README.md"]
