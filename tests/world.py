"""A small web with a list of its images and a recipe for them: what most tests of whole runs need."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image, ImageDraw

from tests.webserver import WebServer
from vesl.pipeline.recipe import Recipe, load

ROOT = Path(__file__).parent.parent
VESL = [sys.executable, "-m", "vesl.pipeline.cli"]


def jpeg(seed: int, size: tuple[int, int] = (160, 120)) -> bytes:
    """A picture that differs from seed to seed."""
    image = Image.new("RGB", size, (seed * 37 % 256, seed * 91 % 256, seed * 53 % 256))
    ImageDraw.Draw(image).ellipse((10, 10, 40 + seed % 60, 60), fill=(255 - seed % 256, 30, 90))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def without_time(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Files of a store, to be compared with those of another download: equal but for the times of the fetches.

    That is a column of download's tables, and so in the hashes by which each table names itself and its parent.
    """
    return {name: _table(data) if name.endswith(".parquet") else data for name, data in files.items()}


def _table(data: bytes) -> tuple[pa.Table, dict[str, Any]]:
    file = pq.ParquetFile(pa.BufferReader(data))
    footer = json.loads(file.metadata.metadata[b"vesl"])
    rows = file.read()
    timeless = rows.select([name for name in rows.column_names if name != "fetched_at"])
    return timeless, {name: value for name, value in footer.items() if name not in ("content", "parent")}


class World:
    """`recipe` is a YAML file; `run` runs the real command on it."""

    def __init__(self, folder: Path, server: WebServer, store: str | None = None) -> None:
        self.folder, self.server = folder, server
        self.bare = True  # commands run as in a base install, without pandas, which Ray wants
        self.store = store or str(folder / "store")
        self.recipe = folder / "recipe.yaml"
        self.document: dict[str, Any] = {
            "dataset": {
                "name": "world",
                "source": str(folder / "lists" / "*.jsonl"),
                "caption_column": "alt",
                "rows_per_part": 5,
            },
            "store": self.store,
            "steps": {
                "download": {"fetch": {"allow_networks": ["127.0.0.0/8"]}},
                "caption": {"model": "alt_text@1"},
                "phrases": {"tagger": "tests.standins:tagger@1"},
                "ground": {"model": "tests.standins:grounder@1"},
                "select": {"rule": {"score": 0.3}},
            },
            "engine": {"workers": 2},
        }
        (folder / "lists").mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        self.recipe.write_text(yaml.safe_dump(self.document), encoding="utf-8")

    def images(self, count: int, first: int = 0, captions: dict[int, str] | None = None) -> list[tuple[str, str]]:
        """Serve that many pictures; return their rows."""
        rows = []
        for i in range(first, first + count):
            url = self.server.add(f"/{i}.jpg", jpeg(i))
            rows.append((url, (captions or {}).get(i, f"A red ball and {i} green boxes on the old table")))
        return rows

    def list_urls(self, name: str, rows: Iterable[tuple[str, str | None]]) -> None:
        lines = [json.dumps({"url": url, "alt": alt}) for url, alt in rows]
        (self.folder / "lists" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def load(self, *overrides: str) -> Recipe:
        return load(str(self.recipe), overrides)

    def command(self, command: str, *arguments: str) -> list[str]:
        if command == "report" and "--out" not in arguments:
            arguments = (*arguments, "--out", str(self.folder / "report.html"))
        return [*VESL, command, str(self.recipe), *arguments]

    def run(
        self, command: str, *arguments: str, env: dict[str, str] | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """Run `vesl COMMAND` as a user does; the tests' stand-ins are importable."""
        return subprocess.run(
            self.command(command, *arguments), cwd=ROOT, env=self.env(env), capture_output=True, text=True, timeout=280
        )

    def env(self, more: dict[str, str] | None = None) -> dict[str, str]:
        path = [ROOT, ROOT / "tests/base"] if self.bare else [ROOT]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "200", **(more or {})}

    def files(self, under: str = "") -> dict[str, tuple[int, int]]:
        """Every file of a local store with its inode and time of change: equal means that nothing was rewritten."""
        root = Path(self.store)
        found = {}
        for path in sorted((root / under).rglob("*")):
            status = path.stat()
            if path.is_file():
                found[str(path.relative_to(root))] = (status.st_ino, status.st_mtime_ns)
        return found

    def contents(self, *steps: str) -> dict[str, bytes]:
        """The bytes of the files of some steps."""
        root = Path(self.store)
        return {
            str(path.relative_to(root)): path.read_bytes()
            for step in steps
            for path in sorted((root / step).rglob("*"))
            if path.is_file()
        }

    def events(self) -> list[dict[str, Any]]:
        """The events of the newest run."""
        newest = sorted((Path(self.store) / "runs").iterdir())[-1]
        return [event for path in sorted(newest.glob("events-*.json")) for event in json.loads(path.read_text())]
