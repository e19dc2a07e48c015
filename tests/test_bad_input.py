"""What cannot be used is refused with one message that says what to do, an exit code, and nothing half-made."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from pathalign import cli, images
from pathalign.images import ImageSet
from pathalign.reward import RewardModel, RewardModelConfig
from pathalign.schema import RunRecord
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers import base
from pathalign.trainers.pretrain import new_pipeline

WORKED = 1  # exit code of what went wrong while working; 2 is for usage and configuration
USAGE = 2
TINY_UNET = ["--block-out-channels", "8,16", "--attention-levels", "1", "--warmup-steps", "0"]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def refuse(out: Path, code: int, words: list[str], *arguments: str) -> str:
    """Run a command that must fail with `code` and `words`, in one message, leaving no artefact at `out`."""
    result = CliRunner().invoke(cli.main, [*arguments, "--output-dir", str(out)])
    message = result.stderr[result.stderr.rfind("Error: ") :]
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and result.stderr.count("Error: ") == 1
    assert "Traceback" not in result.stderr and "--debug" not in message, message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    assert not (out / RunRecord.FILE_NAME).exists()
    return message


def fill(folder: Path, classes: str = "ab", count: int = 12) -> Path:
    """A folder of noisy images for each class."""
    generator = torch.Generator().manual_seed(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=generator).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture
def data(tiny_images, tmp_path) -> Path:
    for split in ("train", "validation"):
        tiny_images.save(tmp_path / "data", split)
    return tmp_path / "data"


@pytest.fixture
def pipeline(tiny_images, tmp_path) -> Path:
    config = PretrainConfig(block_out_channels=[8, 16], attention_levels=[1])
    new_pipeline(config, 16, tiny_images.class_names).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def reward_model(folder: Path, class_names: list[str]) -> Path:
    """A reward model that gives every image the same reward."""
    model = RewardModel(RewardModelConfig(class_names=class_names, convnet_channels=[4, 8], image_size_px=16))
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.zero_()
    model.save_with_processor(folder)
    return folder


def grades(path: Path, candidates: ImageSet, verdicts: list[str], **changes) -> Path:
    rows = [
        {
            "grade_id": str(index),
            "image_id": image_id,
            "class_label": label,
            "verdict": verdicts[index % len(verdicts)],
            "grader": "one",
            **changes,
        }
        for index, (image_id, label) in enumerate(zip(candidates.image_ids, candidates.labels(), strict=True))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_missing_folder_with_one_of_a_similar_name(out, tmp_path):
    fill(tmp_path / "smears")
    refuse(out, WORKED, [f"no folder {tmp_path / 'smear'}", f"Did you mean {tmp_path / 'smears'}"],
           "data", "--source", str(tmp_path / "smear"))  # fmt: skip


def test_a_corrupt_file(out, tmp_path):
    fill(tmp_path / "cells")
    (tmp_path / "cells" / "a" / "3.png").write_bytes(b"\x89PNG no image")
    words = ["1 of 24 images cannot be used", "a/3.png", "Repair or remove them"]
    refuse(out, WORKED, words, "data", "--source", str(tmp_path / "cells"), "--strict")


def test_one_class_only(out, tmp_path):
    words = ["only one class, 'a'", "at least two are needed", "class/image.png"]
    refuse(out, WORKED, words, "data", "--source", str(fill(tmp_path / "cells", "a")))


def test_an_unknown_class(out, tmp_path):
    words = ["`classes`", "`monocyt`", "did you mean `monocyte`"]
    refuse(out, WORKED, words, "data", "--classes", "monocyt,basophil", "--phantom-per-class", "20",
           "--image-size-px", "16")  # fmt: skip


def test_more_images_asked_for_than_there_are(out, tmp_path):
    words = ["at least 500 images of each class", "Lower `per_class`"]
    refuse(out, WORKED, words, "data", "--source", str(fill(tmp_path / "cells")), "--per-class", "500")


def test_grades_of_images_that_do_not_exist(out, tiny_images, data, tmp_path):
    path = grades(tmp_path / "grades.jsonl", tiny_images, ["plausible", "implausible"], image_id="nowhere")
    words = ["1 graded images are not in the candidate set of 48 images: nowhere", "as `candidates`"]
    refuse(out, WORKED, words, "feedback", "--candidates", str(data), "--grades", str(path))


def test_feedback_with_one_verdict(out, tiny_images, data, tmp_path):
    path = grades(tmp_path / "grades.jsonl", tiny_images, ["plausible"])
    words = ["all of them come out plausible", "Grade more images"]
    refuse(out, WORKED, words, "feedback", "--candidates", str(data), "--grades", str(path))


def test_a_verdict_that_is_none(out, tiny_images, data, tmp_path):
    path = grades(tmp_path / "grades.jsonl", tiny_images, ["plausible", "fine"])
    words = ["24 of 48 grades cannot be read", f"{path}:2", "'fine'", "Correct these lines"]
    refuse(out, WORKED, words, "feedback", "--candidates", str(data), "--grades", str(path))


def test_rewards_that_are_all_equal(out, data, pipeline, tmp_path):
    model = reward_model(tmp_path / "reward", ["a", "b", "c"])
    words = ["All 6 rewards of round 1 are about 0.5", "nothing to learn from", "grade more images"]
    refuse(out, WORKED, words, "align", "--base-model", str(pipeline), "--reward-model", str(model), "--data",
           str(data), "--images-per-class", "2", "--inference-steps", "1")  # fmt: skip


def test_a_reward_model_of_other_classes(out, data, pipeline, tmp_path):
    model = reward_model(tmp_path / "reward", ["a", "b"])
    words = ["does not know the classes ['c']", "['a', 'b']", "Use one that was trained on images or feedback"]
    refuse(
        out, WORKED, words, "align", "--base-model", str(pipeline), "--reward-model", str(model), "--data", str(data)
    )


def test_a_folder_that_is_no_reward_model(out, data, pipeline):
    words = [str(data), "made by `pathalign reward`"]
    refuse(out, WORKED, words, "align", "--base-model", str(pipeline), "--reward-model", str(data), "--data", str(data))


def test_a_loss_that_is_no_number(out, data):
    words = ["The loss is", "with learning rate", "checkpoints are kept", "Lower `learning_rate`"]
    refuse(out, WORKED, words, "pretrain", "--data", str(data), *TINY_UNET, "--steps", "1000", "--batch-size", "4",
           "--learning-rate", "1e30", "--weight-decay", "0")  # fmt: skip


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_images_are_written(out, monkeypatch, tmp_path):
    monkeypatch.setattr(images.ImageSet, "save", no_space)
    words = [f"The disk of {out} is full", "Free some space", "same command again"]
    refuse(out, WORKED, words, "data", "--source", str(fill(tmp_path / "cells")))


def test_a_full_disk_while_a_checkpoint_is_written(out, data, monkeypatch):
    monkeypatch.setattr(base.torch, "save", no_space)
    words = [f"The disk of {out} is full", "Free some space", "same command again"]
    refuse(out, WORKED, words, "pretrain", "--data", str(data), *TINY_UNET, "--steps", "2", "--batch-size", "2",
           "--checkpoint-every-steps", "1")  # fmt: skip


@pytest.mark.parametrize("command", ["data", "run"])
def test_an_output_folder_that_cannot_be_written(tmp_path, command):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out"
    (tmp_path / "run.yaml").write_text("{}")
    arguments = ["run", str(tmp_path / "run.yaml")] if command == "run" else ["data", "--phantom-per-class", "20"]
    words = [f"Cannot write to {out}", "Not a directory", "Choose another"]
    refuse(out, WORKED, words, *arguments)


def test_an_output_folder_with_files_of_the_users(out, tmp_path):
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    words = [str(out), "files that pathalign did not make", "Choose another output folder"]
    refuse(out, WORKED, words, "data", "--source", str(fill(tmp_path / "cells")))
    assert (out / "thesis.txt").read_text() == "ten years of work"


def test_a_configuration_with_three_wrong_keys(out, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("pretrian: {steps: 3}\nreward: {epoch: 3}\nalign: {beta: -1}\n")
    words = [str(path), "did you mean `pretrain`", "did you mean `epochs`", "`beta` is -1"]
    refuse(out, USAGE, words, "run", str(path))
    assert not out.exists()


def test_a_configuration_that_is_no_yaml(out, tmp_path):
    (tmp_path / "run.yaml").write_text("pretrain: [")
    refuse(out, USAGE, [f"{tmp_path / 'run.yaml'} cannot be used", "not valid YAML"], "run", str(tmp_path / "run.yaml"))


def test_an_unknown_stage(out, tmp_path):
    (tmp_path / "run.yaml").write_text("{}")
    refuse(out, USAGE, ["`aling`", "did you mean `align`"], "run", str(tmp_path / "run.yaml"), "--from", "aling")
    assert not out.exists()


def test_a_folder_that_is_no_pipeline(out, data):
    words = [f"{data} is a dataset; give a pipeline made by `pathalign pretrain`"]
    refuse(out, WORKED, words, "generate", "--model", str(data))


def test_an_adapter_folder_without_weights(out, pipeline, tmp_path):
    (tmp_path / "adapter").mkdir()
    words = [f"{tmp_path / 'adapter'} holds no pytorch_lora_weights.safetensors", "`pathalign align`"]
    refuse(out, WORKED, words, "generate", "--model", str(pipeline), "--adapter", str(tmp_path / "adapter"))


def test_a_class_that_the_pipeline_does_not_draw(out, pipeline):
    refuse(out, WORKED, ["no class 'd'", "'a', 'b', 'c'"], "generate", "--model", str(pipeline), "--classes", "d")


def test_a_damaged_table_of_images(out, data):
    path = data / "data" / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:500])
    words = [str(path), "cannot be read as parquet", "make it anew"]
    refuse(out, WORKED, words, "pretrain", "--data", str(data), *TINY_UNET)


def test_candidates_graded_by_no_grader(out, data, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [f"{tmp_path / 'empty'} holds no simulated grader", "`pathalign grade fit`"]
    refuse(out, WORKED, words, "grade", "simulate", "--candidates", str(data), "--grader", str(tmp_path / "empty"))


def test_a_grader_fitted_on_images_without_attributes(out, data, tiny_images):
    for split in ("grader", "grader_validation"):
        tiny_images.save(data, split)
    words = ["lacks the attribute columns", "'cell_size'", "another `rubric`"]
    refuse(out, WORKED, words, "grade", "fit", "--data", str(data))


def test_too_little_feedback(out, data, tiny_images, tmp_path):
    graded = replace(tiny_images, columns={"plausible": [0.0, 1.0] * 24, "n_grades": [1] * 48})
    for split in ("train", "validation", "test"):
        graded.save(tmp_path / "feedback", split)
    words = ["has 48 graded training images; at least 1000 are wanted", "Grade more images, or lower `min_graded`"]
    refuse(out, WORKED, words, "reward", "--feedback", str(tmp_path / "feedback"), "--data", str(data),
           "--min-graded", "1000")  # fmt: skip


def test_an_evaluation_of_nothing(out):
    words = ["`data` is empty", "`before` is empty", "`after` is empty", "`judge` is empty"]
    refuse(out, USAGE, words, "evaluate")


def test_a_missing_split(out, tiny_images, tmp_path):
    tiny_images.save(tmp_path / "half", "train")
    words = [f"{tmp_path / 'half'} has no", "validation", "['train']"]
    refuse(out, WORKED, words, "pretrain", "--data", str(tmp_path / "half"))
