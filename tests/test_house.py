"""The rules that the house keeps for itself: who may import whom, sizes, documentation, packaging."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pathalign import settings
from pathalign.config import StageConfig
from pathalign.schema import DISCLAIMER

PROJECT = Path(__file__).resolve().parents[1]
PACKAGE = PROJECT / "pathalign"
STAGES = """
schema config settings artefacts progress remote pinning randomness images shards cards near_duplicates augment phantom
sources data diffusion reward generate scoring grades ratings agreement grading feedback trainers evaluate hub stages
rounds ledger workflow experiments jobs allocator __init__ options commands cli
""".split()
LONGEST_MODULE, LONGEST_FUNCTION = 400, 80
Function = ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    assert len(found) > 25
    return found


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    package = path.relative_to(PROJECT).parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def stage_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def public(path: Path) -> Iterator[ast.ClassDef | Function]:
    """Public classes and functions of a module, and the public methods of those classes."""
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef) and not any(getattr(base, "id", "") == "Protocol" for base in node.bases):
                yield from (item for item in node.body if isinstance(item, Function) and not item.name.startswith("_"))


def stage_configs() -> list[type[StageConfig]]:
    found = [
        value
        for entry in pkgutil.iter_modules(settings.__path__)
        for value in vars(importlib.import_module(f"pathalign.settings.{entry.name}")).values()
        if isinstance(value, type) and issubclass(value, StageConfig) and value is not StageConfig
    ]
    assert len(set(found)) >= 9
    return sorted(set(found), key=lambda config: config.__name__)


def project_metadata() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())


def requirements() -> list[Requirement]:
    project = project_metadata()["project"]
    extras = project["optional-dependencies"]
    lines = project["dependencies"] + [line for name, lines in extras.items() if name != "all" for line in lines]
    return [Requirement(line) for line in lines]


def test_imports_only_flow_downstream():
    for path in modules():
        stage = stage_of(path)
        assert stage in STAGES, f"{path}: put `{stage}` where it belongs in STAGES"
        for name in imports(path):
            if name.split(".")[0] == "pathalign":
                other = name.split(".")[1]
                is_module = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").is_file()
                other = other if is_module else "__init__"
                assert STAGES.index(other) <= STAGES.index(stage), f"{path}: `{stage}` must not import `{other}`"


def test_public_functions_and_classes_say_what_they_do():
    silent = [
        f"{path.relative_to(PROJECT)}:{node.lineno} {node.name}"
        for path in modules()
        for node in public(path)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_modules_and_functions_stay_readable():
    long = [str(path) for path in modules() if len(path.read_text().splitlines()) > LONGEST_MODULE]
    long += [
        f"{path}:{node.lineno} {node.name}"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, Function) and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []


def test_command_line_and_settings_load_without_heavy_libraries():
    names = [f"pathalign.settings.{entry.name}" for entry in pkgutil.iter_modules(settings.__path__)]
    heavy = "{'torch', 'transformers', 'diffusers', 'datasets', 'trl', 'sklearn', 'matplotlib'}"
    code = f"import sys, {', '.join(names)}, pathalign.cli; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=True)
    assert result.stdout.strip() == "[]"


def test_every_option_explains_itself():
    for config in stage_configs():
        for field in dataclasses.fields(config):
            assert field.metadata.get("help", "").endswith((".", ")")), f"{config.__name__}.{field.name} has no help"


def test_every_option_is_read_by_some_stage():
    nodes = [node for path in modules() if stage_of(path) != "settings" for node in ast.walk(tree(path))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant)}  # by `getattr`
    unread = [
        f"{config.__name__}.{f.name}"
        for config in stage_configs()
        for f in dataclasses.fields(config)
        if f.name not in read
    ]
    assert unread == []


def test_every_library_that_is_imported_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in requirements()}
    distributions = packages_distributions()
    for path in modules():
        for name in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"pathalign"}:
            owners = {canonicalize_name(owner) for owner in distributions.get(name, [])}
            assert owners & declared, f"{path} imports {name}, which pyproject.toml does not name"


def test_tested_versions_lie_within_the_declared_bounds():
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    pinned = {canonicalize_name(name): number for name, number in pinned.items()}
    assert lines[1].startswith("torch==")
    assert not any("+" in number or "/" in number for number in pinned.values())
    for requirement in requirements():
        number = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(number), f"{requirement} against {number}"


def test_the_extra_all_holds_every_other_extra():
    extras = project_metadata()["project"]["optional-dependencies"]
    assert Requirement(*extras["all"]).extras == set(extras) - {"all"}


def test_the_installed_version_is_the_checkouts():
    assert version("pathalign") == project_metadata()["project"]["version"]


def test_packaging_lists_every_package():
    on_disk = {".".join(path.parent.relative_to(PROJECT).parts) for path in PACKAGE.rglob("__init__.py")}
    listed = set(project_metadata()["tool"]["setuptools"]["packages"])
    assert listed == on_disk | {"pathalign.model_cards", "pathalign.spaces"}


def test_every_space_has_front_matter_and_says_what_it_is_not_for():
    folders = [path.parent for path in (PROJECT / "spaces").glob("*/README.md")]
    assert len(folders) >= 1
    for folder in folders:
        card = SpaceCard.load(folder / "README.md")
        assert card.data.license == "apache-2.0"
        assert (folder / card.data.app_file).is_file()
        assert "Never for diagnosis" in card.text and DISCLAIMER.split(".")[0] in card.text


@pytest.mark.slow
def test_a_wheel_holds_cards_spaces_checklists_and_the_command(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    for name in ("pathalign", "model_cards", "spaces"):
        shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        f"pathalign/{path.relative_to(root)}"
        for root, pattern in (
            (PACKAGE, "**/*.py"),
            (PACKAGE, "**/*.yaml"),
            (PROJECT, "model_cards/*"),
            (PROJECT, "spaces/**/*.*"),
        )
        for path in root.glob(pattern)
        if "__pycache__" not in path.parts
    }
    assert wanted - names == set()
    assert {name.split("/")[0] for name in names} == {"pathalign", f"pathalign-{version('pathalign')}.dist-info"}
    assert "pathalign/py.typed" in names
