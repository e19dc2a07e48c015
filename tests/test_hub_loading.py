"""What consumers load from a Hub: the stock clients and pathalign's own stages against the loopback Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_artefacts as tiny
import torch
from hub import HubServer, serve
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

from pathalign.diffusion import lora
from pathalign.diffusion.pipeline import ClassConditionalPipeline, base_hash
from pathalign.generate import generate
from pathalign.images import ImageSet
from pathalign.reward import RewardModel
from pathalign.schema import InputError
from pathalign.settings.evaluate import EvaluateConfig
from pathalign.settings.generate import GenerateConfig

pytestmark = pytest.mark.hub

VISITOR = "hf_visitor"
Refusals = tuple[dict[str, str], list[str]]
UPLOAD = """
import json
from huggingface_hub import HfApi
api = HfApi()
def put(name, folder, kind="model", message="m"):
    api.create_repo(f"lab/{name}", repo_type=kind, private=name != "gated", exist_ok=True)
    api.upload_folder(repo_id=f"lab/{name}", repo_type=kind, folder_path=folder)
for name in ("base", "adapter", "reward"):
    put(name, f"old/{name}")
    api.create_tag(f"lab/{name}", tag="old")
put("candidates", "old/candidates", "dataset")
api.create_tag("lab/candidates", repo_type="dataset", tag="old")
for name in ("base", "adapter", "second", "reward"):
    put(name, name)
put("candidates", "candidates", "dataset")
for name in ("pickled-base", "pickled-adapter", "pickled-reward", "code", "vit", "judge"):
    put(name, name)
put("gated", "base")
api.update_repo_settings("lab/gated", gated="manual")
kinds = {"base": "model", "adapter": "model", "reward": "model", "candidates": "dataset"}
commits = {name: {revision: api.repo_info(f"lab/{name}", repo_type=kind, revision=revision).sha
                  for revision in ("main", "old")} for name, kind in kinds.items()}
print(json.dumps(commits | {"code": {"main": api.model_info("lab/code").sha}}))
"""
IMAGES = """
from PIL import Image
shown = [Image.new("RGB", (20 + n, 20), (60 * n, 200 - 50 * n, 90)) for n in range(3)]
"""
LOADING = (
    tiny.DRAWING
    + IMAGES
    + """
import json, sys
from datasets import load_dataset
from huggingface_hub.constants import HF_HUB_OFFLINE
from safetensors.torch import save_file
from pathalign import ClassConditionalPipeline, ImageSet, RewardModel
found = {}
for revision in ("main", "old"):
    pipe = ClassConditionalPipeline.from_pretrained("lab/base", revision=revision)
    pipe.set_progress_bar_config(disable=True)
    found[f"base {revision}"] = draw(pipe)
    pipe.load_lora_weights("lab/adapter", revision=revision)
    found[f"adapter {revision}"] = draw(pipe)
pipe = ClassConditionalPipeline.from_pretrained("lab/base")
pipe.set_progress_bar_config(disable=True)
pipe.load_lora_weights("lab/adapter", adapter_name="one")
pipe.load_lora_weights("lab/second", adapter_name="two")
pipe.set_adapters(["one", "two"], [0.3, 0.7])
found["both"] = draw(pipe)
scores = {}
for revision in ("old", "main"):
    model = RewardModel.from_pretrained("lab/reward", revision=revision)
    scores[revision] = model.score(shown, ["a", "b", "c"])
    ids = ImageSet.load("lab/candidates", revision=revision).image_ids
    scores[f"candidates {revision}"] = ids
    assert ImageSet.load(f"lab/candidates@{revision}").image_ids == ids
    if HF_HUB_OFFLINE and revision == "old":
        continue  # datasets 5.2 then gives what was loaded last
    images = load_dataset("lab/candidates", revision=revision, split="train")
    assert tuple(images["image_id"]) == ids
    assert images.features["label"].names == ["a", "b", "c"] and images[0]["image"].size == (16, 16)
save_file(found, sys.argv[1] if len(sys.argv) > 1 else "found.safetensors")
print(json.dumps(scores))
"""
)
INVOKING = """
import json, sys
from pathlib import Path
from click.testing import CliRunner
from pathalign.cli import main
said = {}
for name, arguments in json.loads(sys.argv[1]).items():
    result = CliRunner().invoke(main, [*arguments, "--output-dir", f"{sys.argv[2]}/{name}"])
    said[name] = result.stderr[result.stderr.rfind("Error: "):].strip() if result.exit_code else "done"
"""
COMMANDS = (
    INVOKING
    + """
out = Path(sys.argv[2])
few = ["--images-per-class", "2"]
weak = ["--rounds", "1", "--steps-per-round", "1", "--batch-size", "2", "--real-batch-size", "2"]
main(["generate", "--model", "lab/base@old", "--adapter", "lab/adapter@old", "--reward-model", "lab/reward@old",
      "--best-of", "2", *few, "--output-dir", str(out / "samples")], standalone_mode=False)
main(["align", "--base-model", "lab/base", "--base-revision", "old", "--reward-model", "lab/reward@old",
      "--data", "lab/candidates@old", *few, *weak, "--output-dir", str(out / "aligned")], standalone_mode=False)
main(["data", "--source", "lab/candidates", "--test-share", "0.3", "--output-dir", str(out / "data")],
     standalone_mode=False)
from pathalign.evaluate import load_panel
from pathalign.settings.evaluate import EvaluateConfig
panel = load_panel(EvaluateConfig(
    data="d", before="b", after="a", judge="lab/judge@main", encoder=sys.argv[3], trust_remote_code=True
))
network = type(panel.encoder.network)
shown = [network.__name__, network.__module__, panel.judge.class_names]
records = {name: json.loads((out / name / "run.json").read_text()) for name in ("samples", "aligned", "data")}
print(json.dumps({"records": records, "said": said, "panel": shown}))
"""
)
REFUSALS = (
    INVOKING
    + """
from pathalign import ClassConditionalPipeline, RewardModel
from pathalign.reward import load_encoder
from pathalign.schema import InputError
def refused(name, call):
    try:
        call()
    except InputError as error:
        said[name] = f"Error: {error}"
refused("pipeline.from_pretrained", lambda: ClassConditionalPipeline.from_pretrained("lab/adapter"))
refused("absent pipeline.from_pretrained", lambda: ClassConditionalPipeline.from_pretrained("lab/none"))
refused("pickled pipeline.from_pretrained", lambda: ClassConditionalPipeline.from_pretrained("lab/pickled-base"))
refused("RewardModel.from_pretrained", lambda: RewardModel.from_pretrained("lab/vit"))
refused("RewardModel.from_pretrained of a pipeline", lambda: RewardModel.from_pretrained("lab/base", revision="old"))
refused("pickled RewardModel.from_pretrained", lambda: RewardModel.from_pretrained("lab/pickled-reward"))
refused("remote code", lambda: load_encoder("lab/code"))
print(json.dumps(said))
"""
)


GENERATE = ["generate", "--images-per-class", "1", "--inference-steps", "2", "--model"]
REFUSED = {
    "absent": (
        [*GENERATE, "lab/none"],
        ["`model`: There is no folder lab/none here, and the model 'lab/none'", "does not exist"],
    ),
    "no such revision": ([*GENERATE, "lab/base@nope"], ["'lab/base'", "no revision 'nope'", "a tag or a commit"]),
    "no such commit": ([*GENERATE, f"lab/base@{'0' * 40}"], ["'lab/base'", "no revision", "a tag or a commit"]),
    "two revisions": ([*GENERATE, "lab/base@old", "--revision", "main"], ["contradict each other"]),
    "empty revision": ([*GENERATE, "lab/base@"], ["names no revision", "write lab/base@REVISION"]),
    "dataset as model": ([*GENERATE, "lab/candidates"], ["is a dataset", "give a pipeline", "pathalign pretrain"]),
    "adapter as model": ([*GENERATE, "lab/adapter@old"], ["is a LoRA adapter", "give a pipeline"]),
    "reward model as model": ([*GENERATE, "lab/reward"], ["is a reward model", "give a pipeline"]),
    "pipeline as adapter": ([*GENERATE, "lab/base", "--adapter", "lab/base"], ["`adapter`:", "is a pipeline"]),
    "pipeline as reward model": (
        [*GENERATE, "lab/base", "--reward-model", "lab/base"],
        ["`reward_model`:", "is a pipeline", "give a reward model", "pathalign reward"],
    ),
    "backbone as reward model": ([*GENERATE, "lab/base", "--reward-model", "lab/vit"], ["is a transformers model"]),
    "model as dataset": (["reward", "--feedback", "lab/base"], ["`feedback`:", "is a model", "a dataset"]),
    "reward model as judge": (
        ["grade", "simulate", "--candidates", "lab/candidates", "--grader", "lab/reward"],
        ["`grader`:", "is a reward model", "give a simulated grader", "pathalign grade fit"],
    ),
    "folder of another kind": ([*GENERATE, "adapter"], ["`model`: adapter is a LoRA adapter; give a pipeline"]),
    "source of data that is a model": (["data", "--source", "lab/base"], ["is a model", "a dataset"]),
    "pickled pipeline": (
        [*GENERATE, "lab/pickled-base"],
        ["pickle only (unet/diffusion_pytorch_model.bin)", "convert a copy that you trust"],
    ),
    "pickled adapter": (
        [*GENERATE, "lab/base", "--adapter", "lab/pickled-adapter"],
        ["pickle only (pytorch_lora_weights.bin)", "any code"],
    ),
    "pickled reward model": (
        [*GENERATE, "lab/base", "--reward-model", "lab/pickled-reward"],
        ["pickle only (pytorch_model.bin)", "safetensors"],
    ),
}
CALLS_REFUSED = {
    "pipeline.from_pretrained": ["'lab/adapter'", "is a LoRA adapter", "give a pipeline"],
    "absent pipeline.from_pretrained": ["'lab/none'", "does not exist", "hf auth login"],
    "pickled pipeline.from_pretrained": ["pickle only (unet/diffusion_pytorch_model.bin)"],
    "RewardModel.from_pretrained": ["'lab/vit'", "is a transformers model", "give a reward model"],
    "RewardModel.from_pretrained of a pipeline": ["'lab/base@old'", "is a pipeline", "give a reward model"],
    "pickled RewardModel.from_pretrained": ["pickle only (pytorch_model.bin)"],
    "remote code": ["needs code from its own repo", "never runs", "--trust-remote-code", "OWNER/NAME@COMMIT"],
}


@dataclass(frozen=True)
class Site:
    """A Hub that holds everything, the folders that were uploaded, and the commits of their revisions."""

    hub: HubServer
    folder: Path
    commits: dict[str, dict[str, str]]
    open: ExitStack

    def run(self, code: str, *arguments: str, **options: str) -> Any:
        """Run code in a process of its own, see `tiny_artefacts.run`; all of them share one cache."""
        return tiny.run(code, self.folder, self.hub, *arguments, **options)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 3, 16, 16), generator=generator).to(torch.uint8)
    images = ImageSet.build(pixels, torch.arange(12) % 3, tiny.CLASSES)
    tiny.save_all(folder, images)
    old = folder / "old"
    base = tiny.pipeline(seed=9)
    base.save_pretrained(old / "base")
    tiny.save_adapter(old / "adapter", base, seed=9)
    tiny.reward_model(seed=9).save_with_processor(old / "reward")
    tiny.candidates(images.select(range(6))).save(old / "candidates")
    pickles(folder)
    backbones(folder)
    with ExitStack() as opened:
        hub = opened.enter_context(serve(folder / "hub"))
        hub.store.add_token(VISITOR, "visitor")
        yield Site(hub, folder, tiny.run(UPLOAD, folder, hub), opened)


def pickles(folder: Path) -> None:
    """The base, the adapter and the reward model again, with their weights as pickles."""
    for kind, (inside, name) in {
        "base": ("unet", "diffusion_pytorch_model"),
        "adapter": ("", "pytorch_lora_weights"),
        "reward": ("", "model"),
    }.items():
        copy = folder / f"pickled-{kind}"
        shutil.copytree(folder / kind, copy)
        weights = copy / inside / f"{name}.safetensors"
        torch.save(load_file(weights), weights.with_name("pytorch_model.bin" if name == "model" else f"{name}.bin"))
        weights.unlink()


def backbones(folder: Path) -> None:
    """A transformers backbone, and one that needs code of its own repo."""
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    processing = json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    for name in ("vit", "code"):
        ViTModel(config).save_pretrained(folder / name)
        (folder / name / "preprocessor_config.json").write_text(processing)
    path = folder / "code" / "config.json"
    own = {"model_type": "of_its_own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    (folder / "code" / "own.py").write_text(
        "from transformers import ViTConfig, ViTModel\n"
        "class OwnConfig(ViTConfig):\n    model_type = 'of_its_own'\n"
        "class OwnModel(ViTModel):\n    config_class = OwnConfig\n"
    )


@pytest.fixture(scope="module")
def expected(site: Site) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Images, scores and image ids from the folders that were uploaded."""
    images, scores = {}, {}
    shown: dict[str, Any] = {}
    exec(IMAGES, shown)
    for revision, folder in (("main", site.folder), ("old", site.folder / "old")):
        pipeline = ClassConditionalPipeline.from_pretrained(folder / "base")
        images[f"base {revision}"] = tiny.draw(pipeline)
        pipeline.load_lora_weights(folder / "adapter")
        images[f"adapter {revision}"] = tiny.draw(pipeline)
        model = RewardModel.from_pretrained(folder / "reward")
        scores[revision] = model.score(shown["shown"], ["a", "b", "c"])
        scores[f"candidates {revision}"] = list(ImageSet.load(folder / "candidates").image_ids)
    images["both"] = tiny.draw(weighted_sum(site.folder, {"adapter": 0.3, "second": 0.7}))
    assert len({tuple(image.flatten().tolist()) for image in images.values()}) == len(images)  # all differ
    return images, scores


def weighted_sum(folder: Path, weights: dict[str, float]) -> ClassConditionalPipeline:
    """The base with weighted LoRA updates added to its weights, alpha / rank * B A (arXiv:2106.09685, section 4.1)."""
    pipeline = ClassConditionalPipeline.from_pretrained(folder / "base")
    own = pipeline.unet.state_dict()
    for name, weight in weights.items():
        update = load_file(folder / name / lora.WEIGHTS_NAME)
        for key in [key for key in update if key.endswith("lora_A.weight")]:
            layer = key.removeprefix("unet.").replace("lora_A.weight", "weight")
            product = update[key.replace("lora_A", "lora_B")].flatten(1) @ update[key].flatten(1)
            own[layer] += weight * 4 / 2 * product.view_as(own[layer])
    return pipeline


def check(site: Site, expected: tuple[dict[str, torch.Tensor], dict[str, Any]], scores: dict[str, Any]) -> None:
    """Compare what a process found with the folders: images bit for bit, rewards to 1e-6."""
    found = load_file(site.folder / "found.safetensors")
    for name, images in found.items():
        torch.testing.assert_close(images, expected[0][name], rtol=0, atol=1e-5 if name == "both" else 0)
    for name, rows in scores.items():
        if name.startswith("candidates"):
            assert rows == expected[1][name]
            continue
        assert [row["label"] for row in rows] == [row["label"] for row in expected[1][name]]
        assert [row["score"] for row in rows] == pytest.approx([row["score"] for row in expected[1][name]], abs=1e-6)


@pytest.fixture(scope="module")
def loaded(site: Site, expected) -> dict[str, Any]:
    """What `LOADING` printed; the cache is warm afterwards."""
    scores = site.run(LOADING)
    check(site, expected, scores)
    return scores


@pytest.fixture(scope="module")
def made(site: Site) -> dict[str, Any]:
    """Run records of artefacts that were made from the Hub below `made`, and what other commands said."""
    with_adapter = [*GENERATE, "lab/base@old", "--adapter", "lab/adapter"]
    commands = {"other base": with_adapter, "any base": [*with_adapter, "--any-base"]}
    return site.run(COMMANDS, json.dumps(commands), "made", f"lab/code@{site.commits['code']['main']}")


@pytest.fixture(scope="module")
def records(made: dict[str, Any]) -> dict[str, Any]:
    return made["records"]


def test_pipeline_adapters_reward_model_and_candidates_load_from_the_hub_at_any_revision(site: Site, loaded, expected):
    assert loaded.keys() == expected[1].keys()
    assert load_file(site.folder / "found.safetensors").keys() == expected[0].keys()


def test_stages_read_any_revision_and_their_records_pin_the_commits(site: Site, records: dict[str, Any]):
    at = {name: f"lab/{name}@{site.commits[name]['old']}" for name in site.commits if name != "code"}
    samples, aligned = records["samples"], records["aligned"]
    assert samples["inputs"] == {"model": at["base"], "adapter": at["adapter"], "reward_model": at["reward"]}
    assert (samples["config"]["model"], samples["config"]["revision"]) == ("lab/base", site.commits["base"]["old"])
    assert samples["config"]["adapter"] == at["adapter"]
    assert records["data"]["inputs"] == {"source": site.commits["candidates"]["main"]}
    assert aligned["inputs"]["base_model"] == at["base"] and aligned["inputs"]["reward_model"] == at["reward"]
    assert aligned["config"]["base_model"] == "lab/base" and aligned["config"]["data"] == at["candidates"]
    drawn = ImageSet.load(site.folder / "made/samples")
    assert set(drawn.columns["model"]) == {at["base"]} and set(drawn.columns["adapter"]) == {at["adapter"]}


def test_what_stages_draw_from_the_hub_is_what_they_draw_from_the_folders(site: Site, records: dict[str, Any]):
    config = GenerateConfig(**records["samples"]["config"])
    old = site.folder / "old"
    sources = {"model": str(old / "base"), "adapter": str(old / "adapter"), "reward_model": str(old / "reward")}
    generate(replace(config, revision=None, **sources), site.folder / "local")
    drawn, local = ImageSet.load(site.folder / "made/samples"), ImageSet.load(site.folder / "local")
    assert drawn.image_ids == local.image_ids
    assert drawn.columns["reward"] == pytest.approx(local.columns["reward"], abs=1e-6)


def test_an_adapter_made_from_a_repo_knows_its_base_by_content_under_any_name(site: Site, records: dict[str, Any]):
    old, new = (ClassConditionalPipeline.from_pretrained(site.folder / name) for name in ("old/base", "base"))
    lora.load(old, str(site.folder / "made/aligned"))
    assert records["aligned"]["inputs"]["base_unet"] == base_hash(old.unet)  # the adapter on it changes nothing
    with pytest.raises(InputError, match=r"trained on another base model: .*`--any-base`"):
        lora.load(new, str(site.folder / "made/aligned"))
    lora.load(new, str(site.folder / "adapter"))
    new.load_lora_weights(site.folder / "second", adapter_name="second")
    assert base_hash(new.unet) == base_hash(tiny.pipeline().unet)  # whatever adapters it has


@pytest.fixture(scope="module")
def refusals(site: Site) -> Refusals:
    """What each of `REFUSED` and `CALLS_REFUSED` said, and the requests that the Hub got meanwhile."""
    before = len(site.hub.faults.requests)
    commands = json.dumps({name: arguments for name, (arguments, _) in REFUSED.items()})
    said = site.run(REFUSALS, commands, "refused", HF_HOME=str(site.folder / "cold"))
    return said, site.hub.faults.requests[before:]


@pytest.mark.parametrize("name", [*REFUSED, *CALLS_REFUSED])
def test_what_cannot_be_used_is_named_with_the_reason_and_what_to_do(refusals: Refusals, name: str):
    words = CALLS_REFUSED[name] if name in CALLS_REFUSED else REFUSED[name][1]
    said = refusals[0][name]
    assert said.startswith("Error: ") and "\n" not in said, said
    assert [word for word in words if word not in said] == [], said


def test_a_refused_repo_costs_no_download_of_weights(refusals: Refusals):
    assert [request for request in refusals[1] if "/lfs/" in request] == []
    assert any("lab/base/resolve" in request for request in refusals[1])


@pytest.mark.slow
def test_private_and_gated_repos_are_told_apart_for_who_may_not_read_them(site: Site):
    commands = {"private": [*GENERATE, "lab/base"], "gated": [*GENERATE, "lab/gated"]}
    commands["revision"] = [*GENERATE, "lab/gated@main"]
    said = site.run(REFUSALS, json.dumps(commands), "refused", token=VISITOR, HF_HOME=str(site.folder / "visitor"))
    assert "does not exist, or is private" in said["private"] and "hf auth login" in said["private"]
    for name in ("gated", "revision"):
        assert "is gated: ask for access on its page" in said[name]
    assert "does not exist, or is private" in said["RewardModel.from_pretrained"]


def test_an_adapter_on_another_revision_of_its_base_is_refused_unless_asked_for(site: Site, made: dict[str, Any]):
    wanted, own = (base_hash(tiny.pipeline(seed).unet)[:12] for seed in (0, 9))
    for word in ("lab/adapter", "lab/base", "another base model", wanted, own, "run.json", "`--any-base`"):
        assert word in made["said"]["other base"], made["said"]
    assert made["said"]["any base"] == "done"
    assert len(ImageSet.load(site.folder / "made/any base")) == 3
    assert not (site.folder / "made/other base").exists()


def test_code_of_a_backbone_runs_only_with_the_flag_and_at_a_commit(site: Site, made: dict[str, Any]):
    with pytest.raises(InputError, match=r"`trust_remote_code` runs code from 'lab/code'; .* OWNER/NAME@COMMIT"):
        EvaluateConfig(data="d", before="b", after="a", judge="j", encoder="lab/code", trust_remote_code=True)
    name, module, judged = made["panel"]
    assert name == "OwnModel" and site.commits["code"]["main"] in module
    assert judged == ["a", "b", "c"]


# From here on the server is stopped: these tests come last.


@pytest.fixture(scope="module")
def stopped(site: Site, loaded: dict[str, Any], made: dict[str, Any]) -> dict[str, str]:
    """The server is gone, and the clients know that they are offline."""
    site.open.close()
    return {"HF_HUB_OFFLINE": "1"}


def test_without_connection_everything_loads_from_the_cache(site: Site, stopped: dict[str, str], expected, loaded):
    assert site.run(LOADING, **stopped) == loaded
    check(site, expected, loaded)


@pytest.mark.slow
def test_without_connection_stages_read_the_cache_and_name_what_is_not_in_it(
    site: Site, stopped: dict[str, str], made: dict[str, Any]
):
    commands = {"never loaded": [*GENERATE, "lab/gated"], "other revision": [*GENERATE, "lab/base@nope"]}
    encoder = f"lab/code@{site.commits['code']['main']}"
    offline = site.run(COMMANDS, json.dumps(commands), "offline", encoder, **stopped)
    assert offline["panel"] == made["panel"]
    for name, record in made["records"].items():
        found = offline["records"][name]
        assert {**found["inputs"], **found["config"]} == {**record["inputs"], **record["config"]}
    again, first = (ImageSet.load(site.folder / name / "samples") for name in ("offline", "made"))
    assert again.image_ids == first.image_ids
    for name, repo in (("never loaded", "lab/gated"), ("other revision", "lab/base")):
        said = offline["said"][name]
        assert repo in said and "not in the cache of this machine. Unset HF_HUB_OFFLINE" in said, said
