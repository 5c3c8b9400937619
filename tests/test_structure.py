"""The rules of the layout, checked: imports flow one way, every package is listed, nothing heavy loads early."""

import ast
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("transforms", "models", "pipeline")
MAY_IMPORT = {"transforms": {"transforms"}, "models": {"transforms", "models"}, "pipeline": set(FOLDERS)}
HEAVY = ("torch", "transformers", "ray", "apache_beam", "duckdb", "spacy", "pyarrow", "ai_edge_litert")


def imported(path: Path) -> set[str]:
    """The modules that a file imports, with the project's own as `vesl.<folder>...`."""
    package = ["vesl", *path.relative_to(ROOT).parent.parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {base} if base != "vesl" else {f"vesl.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_flow_one_way(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            if name.startswith("vesl."):
                assert name.split(".")[1] in MAY_IMPORT[folder], f"{path} imports {name}"
            assert not (folder == "transforms" and name.split(".")[0] in {"torch", "transformers", "spacy", "aiohttp"})


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(["vesl", *path.parent.relative_to(ROOT).parts])
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(listed) == there
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            assert (path.parent / "__init__.py").exists()


def test_the_top_level_stays_as_it_is() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    top = {name.split("/")[0] for name in tracked if name and not name.startswith(".")}
    assert top <= {"pyproject.toml", "README.md", "LICENSE", *FOLDERS, "deploy", "tests"}


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, vesl.pipeline.cli as cli\n"
        "try: cli.main(['--help'])\n"
        f"except SystemExit: print([m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
    assert done.stdout.strip().endswith("[]")
    assert min(seconds) < 0.5


def test_constraints_name_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(
            d
            for extra in ("s3", "tiny", "models", "train", "ray", "beam", "dev")
            for d in project["optional-dependencies"][extra]
        ),
    ]
    pinned = {line.split("==")[0].lower() for line in (ROOT / "deploy/constraints.txt").read_text().splitlines()}
    for dependency in wanted:
        name = dependency.replace(">", "=").replace("[", "=").split("=")[0].strip().lower()
        assert name in pinned or name.replace("-", "_") in pinned, name


def test_readme_speaks_of_commands_and_files_that_exist() -> None:
    from vesl.pipeline.cli import parser

    text = (ROOT / "README.md").read_text()
    commands = {action.dest: action for action in parser()._actions}["command"].choices
    for line in text.splitlines():
        words = line.strip().split()
        if words[:1] == ["vesl"] or words[:1] == [".venv/bin/vesl"]:
            assert words[1] in commands, line
        for word in words:
            name = word.strip("`(),.:;|")
            if name.startswith(("deploy/", "tests/", "pipeline/", "transforms/", "models/")) and "*" not in name:
                assert (ROOT / name).exists(), name
