"""Where a model's files come from: what is pinned, what is refused, and that each mistake is one line."""

import json
from pathlib import Path

import pytest

from vesl.models import check, hub
from vesl.models.contract import ModelError
from vesl.models.options import Captioning, Grounding

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "owlv2"}))
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_a_folder_is_pinned_by_its_content(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    pinned = f"{folder}@{hub.digest(folder)}"
    assert hub.find(pinned) == folder
    assert hub.config(folder) == {"model_type": "owlv2"}
    (folder / "README.md").write_text("no part of the model")
    assert hub.find(pinned) == folder
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError) as caught:
        hub.find(pinned)
    assert str(caught.value).endswith(f"has other content; as it is now, it is {folder}@{hub.digest(folder)}")


@pytest.mark.parametrize("place", [0, 1 << 20, -1])
def test_either_end_of_large_weights_counts(tmp_path: Path, place: int) -> None:
    data = bytearray(3 << 20)
    before = hub.digest(model(tmp_path / "a", bytes(data)))
    data[place if place <= 0 else place - 1] = 1
    assert hub.digest(model(tmp_path / "b", bytes(data))) != before
    assert hub.digest(model(tmp_path / "c", bytes(data) + b"\0")) != hub.digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("org/name@main", "is pinned by a commit, 40 hex digits, no branch"),
        ("org/name@" + COMMIT[:12], "is pinned by a commit"),
        ("org/name", "is not pinned"),
        ("name@" + COMMIT, "is not a "),
        ("./folder@main", "is pinned by 12 hex digits of its content"),
        ("a/b/c@" + COMMIT, "is neither org/name@commit nor"),
        ("../x@" + COMMIT, "is pinned by 12 hex digits"),
    ],
)
def test_what_is_not_pinned_is_refused_with_the_recipe(reference: str, says: str) -> None:
    for options in (Captioning, Grounding):
        with pytest.raises(ModelError) as caught:
            check(options(model=reference))
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_server_knows_its_models_by_any_name() -> None:
    check(Captioning(model="gpt-x:latest@2026-11-01", backend="openai"))
    with pytest.raises(ModelError, match="is not pinned"):
        check(Captioning(model="gpt-x", backend="openai"))


def test_what_a_folder_lacks_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(ModelError, match="there is no folder"):
        hub.find(f"{folder}@0123456789ab")
    model(folder)
    with pytest.raises(ModelError) as caught:
        check(Grounding(model=f"{folder}@new"))
    assert f"as it is now, it is {folder}@{hub.digest(folder)}" in str(caught.value)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights; other formats can run code"):
        hub.find(f"{folder}@{hub.digest(folder)}")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="is not an object"):
        hub.config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        hub.find(f"{folder}@{hub.digest(folder)}")


def test_without_the_hub_the_cache_is_all_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        hub.find(f"org/name@{COMMIT}")
    assert str(caught.value).endswith(f"hf download org/name --revision {COMMIT}")
    assert "\n" not in str(caught.value)
    (tmp_path / "models--org--name/snapshots").mkdir(parents=True)
    (tmp_path / "models--org--name/refs").mkdir()
    folder = model(tmp_path / "models--org--name/snapshots" / COMMIT)
    assert hub.find(f"org/name@{COMMIT}") == folder
