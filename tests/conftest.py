"""What all tests share: one thread, tiny images made in place, and the real cells where they are at hand."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from pathalign.images import ImageSet

PROJECT = Path(__file__).resolve().parents[1]
REQUIRE_REAL = os.environ.get("PATHALIGN_REQUIRE_REAL") == "1"

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# A shell's background job ignores Ctrl-C, and so would each command that a test starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real blood cells: `PATHALIGN_TEST_DATA`, or where the project expects them."""
    folder = Path(os.environ.get("PATHALIGN_TEST_DATA", PROJECT / "../shared/data/pbc_wbcatt_64"))
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}; set PATHALIGN_TEST_DATA")
    return folder


@pytest.fixture
def tiny_images() -> ImageSet:
    """48 images of 16 px in three classes that differ in colour, in the order a, b, c, a, b, c, ..."""
    generator = torch.Generator().manual_seed(0)
    class_ids = torch.arange(48) % 3
    colours = torch.tensor([[200, 60, 60], [60, 200, 60], [60, 60, 200]])[class_ids]
    noise = torch.randint(-40, 41, (48, 3, 16, 16), generator=generator)
    images = (colours[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8)
    return ImageSet.build(images, class_ids, ("a", "b", "c"))


@pytest.fixture
def tiny_pipeline(tiny_images: ImageSet) -> Any:
    """An untrained pipeline for images like `tiny_images`, the same each time."""
    from pathalign.settings.pretrain import PretrainConfig
    from pathalign.trainers.pretrain import new_pipeline

    config = PretrainConfig(block_out_channels=[8, 16], attention_levels=[1])
    pipeline = new_pipeline(config, tiny_images.image_size_px, tiny_images.class_names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The reward model that `align` loads, a `Brightness`; it knows the classes in another order."""
    from brightness import Brightness

    from pathalign.reward import RewardModel

    model = Brightness()
    monkeypatch.setattr(RewardModel, "from_pretrained", lambda *_: model)
    return model


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds of all images that are drawn from here on."""
    from pathalign import generate

    seeds: list[int] = []
    sample = generate.sample

    def counted(pipeline: Any, class_ids: Any, batch_seeds: Any, *args: Any) -> torch.Tensor:
        seeds.extend(batch_seeds)
        return sample(pipeline, class_ids, batch_seeds, *args)

    monkeypatch.setattr(generate, "sample", counted)
    return seeds


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.accelerator.is_available():
        pytest.skip("no accelerator")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    report = yield
    expected = item.get_closest_marker("gpu") or hasattr(report, "wasxfail")
    return report if expected else _refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, pytest.CollectReport]:
    return _refuse_skip((yield))


def _refuse_skip(report: Any) -> Any:
    """Where everything must be at hand, a skipped test is a failed one."""
    if REQUIRE_REAL and report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"PATHALIGN_REQUIRE_REAL=1 allows no skipping: {reason}"
    return report
