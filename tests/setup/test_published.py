"""The registry's package: its files, its metadata, and that installing it cannot change torch."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import nodes as comfy_nodes
import raylight
from raylight.dev.setup.environment import Environment

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(comfy_nodes.__file__).parent
LARGEST_BYTES = 6_000_000


def published() -> list[str]:
    """Return the files of the registry's package: those of git, except those in .comfyignore."""

    def listed(*options: str) -> set[str]:
        done = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip("not a git checkout")
        return set(done.stdout.splitlines())

    return sorted(
        name
        for name in listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")
        if (ROOT / name).is_file()
    )


def test_published_files() -> None:
    files = published()
    assert {name.partition("/")[0] for name in files} <= {
        "LICENSE",
        "README.md",
        "__init__.py",
        "example_workflows",
        "nodes",
        "pyproject.toml",
        "raylight",
        "requirements.txt",
    }
    assert {
        "__init__.py",
        "nodes/__init__.py",
        "raylight/plans/wan.py",
        "requirements.txt",
        "nodes/web/docs/RaylightStatus.md",
    } <= set(files)
    assert sum((ROOT / name).stat().st_size for name in files) < LARGEST_BYTES


@pytest.mark.slow
def test_published_files_are_complete(tmp_path: Path) -> None:
    pack = tmp_path / "raylight-pack"
    for name in published():
        (pack / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, pack / name)
    code = (
        "from comfy.cli_args import args; args.cpu = True; import asyncio, nodes;"
        f"assert asyncio.run(nodes.load_custom_node({str(pack)!r}));"
        "import raylight.driver.api, raylight.worker.service, raylight.worker.boot, raylight.plans;"
        "assert raylight.plans.all_plans();"
        f"assert raylight.__file__.startswith({str(pack)!r}), raylight.__file__"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HOST, check=True, timeout=120)


def test_registry_reads_pyproject() -> None:
    from comfy_config.config_parser import extract_node_configuration

    found = extract_node_configuration(str(ROOT))
    project, comfy = found.project, found.tool_comfy
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", project.name) and "comfyui" not in project.name
    assert re.fullmatch(r"\d+\.\d+\.\d+", project.version) and project.version == raylight.__version__
    assert project.description and project.requires_python == ">=3.10"
    assert project.license.file == "LICENSE" and (ROOT / "LICENSE").is_file()
    assert project.urls.repository.startswith("https://")
    assert comfy.publisher_id and comfy.display_name == "Raylight"
    assert project.supported_os and project.supported_accelerators, "one wrong classifier empties the list"
    owner = project.urls.repository.split("/")[3]
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text("utf-8")
    assert f"github.repository_owner == '{owner}'" in workflow
    assert comfy.icon.endswith(f"/{owner}/{project.name}/main/docs/icon.png")


def test_icon_size() -> None:
    with Image.open(ROOT / "docs" / "icon.png") as icon:
        assert icon.format == "PNG" and icon.width == icon.height <= 400


def test_requirements_do_not_need_torch() -> None:
    """Check that no requirement needs torch, because pip may then replace the installed one."""
    asked = {line for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if line}
    assert all(re.fullmatch(r"[a-z0-9-]+>=[0-9.]+", line) for line in asked), "lower bounds, one a line"
    waiting, seen = {re.split(r"[<>=]", line)[0] for line in asked}, set()
    while waiting:
        name = waiting.pop()
        seen.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            needed = re.match(r"[A-Za-z0-9._-]+", requirement).group().lower().replace("_", "-")
            if "extra ==" not in requirement and needed not in seen and _is_installed(needed):
                waiting.add(needed)
    assert {"ray", "safetensors", "protobuf"} <= seen
    assert not seen & {
        "torch",
        "torchvision",
        "torchaudio",
        "transformers",
        "diffusers",
        "huggingface-hub",
        "numpy",
        "triton",
    }


def test_packages_that_need_torch_are_extras() -> None:
    extras = Environment(Path(sys.prefix)).optional_dependencies(ROOT / "pyproject.toml")
    assert extras["yunchang"] == ["yunchang>=0.6"]
    assert extras["xfuser"] == ["xfuser>=0.4.5", "yunchang>=0.6"]
    assert set(extras["xfuser"]) <= set(extras["test"])


def _is_installed(name: str) -> bool:
    """Return whether a requirement is for this platform and Python, and so is installed."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
