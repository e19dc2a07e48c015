"""What an epoch of DDPO costs: against trl 0.23.1's own loop, and against the passes of the UNet it is made of.

    python tests/benchmarks/ddpo_epoch.py

All on one machine, in one thread each, by CPU time, interleaved: a round measures everything once, and each figure is
made of medians over rounds. The UNet is that of `pathalign demo` at 32x32, untrained; the reward is brightness. trl
left DDPO out after 0.23.1, so that this version is installed, from PyPI, into an environment of its own (`--env`),
which borrows all other packages from the running one; `trl_epoch.py` there drives trl's trainer, sampler and
log-probabilities. Neither side logs, writes checkpoints or looks at its result in what is timed. About eight minutes.

Prints, last, one JSON object:

- `same_work_vs_trl`: CPU time of an epoch here over that of one of trl. Both draw the same number of images in batches
  of 16, 50 steps, no guidance, and train all weights of the UNet, without adapter, on 49 steps of each image, 16 at
  once, with one optimizer step for 16 images. 49, since the last step of DDIM has no density and is not trained here;
  trl trains 50, or any number that `train_timestep_fraction` asks for. Here `DDPOTrainer` trains adapters only: its
  loop is run as it is, with all weights in the place of the adapter's. Only it has a moving average of the weights, a
  noise generator for each image, and a look at 16 steps of the base model in each epoch, and that is in its time.
- `speedup_vs_trl_batch_2_1`: CPU time of an image in trl that samples 2 at once and trains 1 at once, on all 50 steps,
  with an optimizer step for each image, over that of an image here as above. trl's defaults are 1 and 1, in fp16 and
  with guidance, which doubles the work and is off here.
- `cheaper_20_4` and `cheaper_10_2`: CPU time of an image here as above over that of one drawn in 20 or 10 steps of
  which 4 or 2 are trained. `adapter_cheaper_*`: the same with the adapter that the trainer attaches by default.
- `vs_cost_model`: CPU time of an epoch over S*F + K*B, the highest of all epochs measured here (`epochs`), with or
  without adapter. F is a forward pass, B a forward and a backward pass, of the same UNet at batch 16.
"""

from __future__ import annotations

import argparse
import json
import os
import site
import statistics
import subprocess
import sys
import time
import venv
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from brightness import Brightness

from pathalign.diffusion import lora
from pathalign.generate import load_pipeline
from pathalign.images import ImageSet
from pathalign.settings.ddpo import DDPOConfig
from pathalign.settings.pretrain import PretrainConfig
from pathalign.trainers.ddpo import PROBED_STEPS, DDPOTrainer
from pathalign.trainers.pretrain import new_pipeline

TRL = "trl==0.23.1"
BATCH = 16
CLASSES = ("a", "b", "c", "d")
STEPS = {"50_50": (50, 49), "20_4": (20, 4), "10_2": (10, 2)}  # denoising steps, and those of them that are trained on
RATE = 1e-5  # so low that no weight goes astray in a few epochs
FORWARDS, BACKWARDS = 8, 4  # timed passes of each UNet, twice in a round


class WholeUNetTrainer(DDPOTrainer):
    """`DDPOTrainer`'s loop on all weights of the UNet in the place of an adapter's."""

    def __init__(self, *inputs: Any) -> None:
        super().__init__(*inputs)
        self.unet.unload_lora()
        self.unet.requires_grad_(True)
        self.parameters = list(self.unet.parameters())
        optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizer = self.accelerator.prepare(optimizer)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.base = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def reference(self, sample: Tensor, timesteps: Tensor, class_ids: Tensor, count: int) -> Tensor:
        """As the trainer's own, which turns the adapter off."""
        if count == 0:
            return sample[:0]
        with self.weights_of(self.base):
            return self.denoiser(sample[:count], timesteps[:count], class_ids[:count])


class Ours:
    """Epochs of one of our trainers, and passes of its UNet; all methods return CPU seconds an image."""

    def __init__(self, base: Path, trainer_class: type[DDPOTrainer], steps: str, images: int, folder: Path) -> None:
        folder.mkdir()
        real = ImageSet.build(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4), CLASSES)
        self.steps, self.trained = STEPS[steps]
        config = DDPOConfig(
            base_model=str(base),
            reward_model="brightness",
            images_per_class=images // len(CLASSES),
            inference_steps=self.steps,
            train_steps=self.trained,
            sample_batch_size=BATCH,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            merge_adapter=trainer_class is DDPOTrainer,
            learning_rate=RATE,
            kl_weight=0.0,  # trl's trainer has none
        )
        self.trainer = trainer_class(load_pipeline(str(base)), Brightness(CLASSES), real, config, folder)
        self.images, self.done = images, 0
        self._passes(go_back, 1)  # the first passes take longer
        assert self.trainer.usage.profile.forward_flops  # counted once for all epochs
        self.trainer.optimizer.zero_grad()

    def epoch(self) -> float:
        began = time.process_time()
        figures = self.trainer.epoch(self.done)
        spent = time.process_time() - began
        self.done += 1
        asked = figures["unet_forwards"], figures["unet_backwards"]
        check_passes(asked, self.images, self.steps, self.trained, PROBED_STEPS)
        return spent / self.images

    def forward(self) -> float:
        merging = lora.merged if self.trainer.config.merge_adapter else nullcontext
        with merging(self.trainer.unet), torch.no_grad():
            return self._passes(lambda output: None, FORWARDS)

    def backward(self) -> float:
        spent = self._passes(go_back, BACKWARDS)
        self.trainer.optimizer.zero_grad()
        return spent

    def _passes(self, then: Callable[[Tensor], None], count: int) -> float:
        sample, timesteps = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 1000, (BATCH,))
        class_ids = torch.arange(BATCH) % len(CLASSES)
        began = time.process_time()
        for _ in range(count):
            then(self.trainer.denoiser(sample, timesteps, class_ids))
        return (time.process_time() - began) / count / BATCH


def go_back(output: Tensor) -> None:
    output.square().mean().backward()


class Theirs:
    """Epochs of trl's trainer in a process of its own; a context."""

    def __init__(self, python: Path, base: Path, images: int, sample: int, train: int, trained: int) -> None:
        self.images, self.steps, self.trained = images, STEPS["50_50"][0], trained
        options = {"images": images, "steps": self.steps, "train-steps": trained}
        options |= {"sample-batch": sample, "train-batch": train}
        script = Path(__file__).with_name("trl_epoch.py")
        command = [str(python), str(script), str(base), *(f"--{name}={value}" for name, value in options.items())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def epoch(self) -> float:
        assert self.process.stdin
        self.process.stdin.write("epoch\n")
        self.process.stdin.flush()
        reply = json.loads(self.reply())
        check_passes((reply["forwards"], reply["backwards"]), self.images, self.steps, self.trained)
        return reply["cpu_s"] / self.images

    def reply(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("trl's process ended before its work was done; what it said stands above.")
        return line

    def __enter__(self) -> Theirs:
        self.reply()  # it is ready: nothing that is timed runs beside its start
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input is the end of its work


def check_passes(asked: tuple[float, float], images: int, steps: int, trained: int, more: int = 0) -> None:
    """Make sure that an epoch is the work it is said to be; training goes forward too."""
    wanted = images * (steps + trained) + more, images * trained
    if asked != wanted:
        raise SystemExit(f"The UNet went forward and back for {asked} images in an epoch; {wanted} are meant.")


def trl_environment(folder: Path) -> Path:
    """Python of an environment with trl 0.23.1 and all other packages of this one; made if it is not there yet."""
    python = folder / "bin" / "python"
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    if not (packages / f"{TRL.replace('==', '-')}.dist-info").is_dir():
        print(f"Installing {TRL} in {folder}", flush=True)
        venv.create(folder, clear=True, symlinks=True, with_pip=False)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), TRL]
        subprocess.run(pip, check=True)
    (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    return python


def round_plan(ours: dict[str, Ours], trl: Theirs, trl_batch_2_1: Theirs) -> list[tuple[str, Callable[[], float]]]:
    """What one round measures, by name: what is compared stands close together, and what is short comes twice."""
    passes = [
        (f"{kind}_{name}", getattr(ours[f"{kind}_50_50"], name))
        for kind in ("whole", "adapter")
        for name in ("forward", "backward")
    ]
    short = [(name, each.epoch) for name, each in ours.items() if not name.endswith("50_50")]
    whole, adapter = (("whole_50_50", ours["whole_50_50"].epoch), ("adapter_50_50", ours["adapter_50_50"].epoch))
    return [
        *passes,
        *short,
        ("trl", trl.epoch),
        whole,
        ("trl_batch_2_1", trl_batch_2_1.epoch),
        *passes,
        adapter,
        *short,
    ]


def figures(times: dict[str, list[float]]) -> dict[str, Any]:
    """What is asked for, from CPU seconds an image of each round."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    models = {
        f"{kind}_{steps}": count * middle[f"{kind}_forward"] + trained * middle[f"{kind}_backward"]
        for kind in ("whole", "adapter")
        for steps, (count, trained) in STEPS.items()
    }
    over_model = {name: middle[name] / model for name, model in models.items()}
    cheaper = {
        f"{prefix}cheaper_{steps}": middle[f"{kind}_50_50"] / middle[f"{kind}_{steps}"]
        for kind, prefix in (("whole", ""), ("adapter", "adapter_"))
        for steps in ("20_4", "10_2")
    }
    ratios = {
        "same_work_vs_trl": middle["whole_50_50"] / middle["trl"],
        "speedup_vs_trl_batch_2_1": middle["trl_batch_2_1"] / middle["whole_50_50"],
        **cheaper,
        "vs_cost_model": max(over_model.values()),
    }
    return {
        **{name: round(value, 3) for name, value in ratios.items()},
        "epochs": {name: round(value, 3) for name, value in over_model.items()},
        "cpu_ms_per_image": {name: round(1000 * value, 2) for name, value in middle.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=16, help=f"images of an epoch, a multiple of {BATCH}")
    default = Path.home() / ".cache" / "pathalign" / f"trl-0.23.1-py{sys.version_info[0]}.{sys.version_info[1]}"
    parser.add_argument("--env", type=Path, default=default, help=f"environment with {TRL}, made where it is missing")
    arguments = parser.parse_args()
    if arguments.images < BATCH or arguments.images % BATCH or arguments.rounds < 1:
        parser.error(f"`--images` is {arguments.images}; use a multiple of {BATCH}, and at least one round.")
    torch.set_num_threads(1)
    python = trl_environment(arguments.env)
    times: dict[str, list[float]] = defaultdict(list)
    with TemporaryDirectory() as name:
        base = Path(name) / "base"
        new_pipeline(PretrainConfig(), 32, CLASSES).save_pretrained(base)
        ours = {
            f"{kind}_{steps}": Ours(base, trainer_class, steps, arguments.images, Path(name) / f"{kind}_{steps}")
            for kind, trainer_class in (("whole", WholeUNetTrainer), ("adapter", DDPOTrainer))
            for steps in STEPS
        }
        with (
            Theirs(python, base, arguments.images, BATCH, BATCH, STEPS["50_50"][1]) as trl,
            Theirs(python, base, arguments.images, 2, 1, STEPS["50_50"][0]) as trl_batch_2_1,
        ):
            for number in range(arguments.rounds):
                plan = round_plan(ours, trl, trl_batch_2_1)
                for name, measure in plan if number % 2 == 0 else reversed(plan):
                    times[name].append(measure())
                    print(f"round {number + 1}: {name} {1000 * times[name][-1]:.1f} ms an image", flush=True)
    print(json.dumps(figures(times)))


if __name__ == "__main__":
    main()
