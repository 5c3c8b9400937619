"""Checkpoints: whole or not there, the newest few kept, a damaged one passed over and said so."""

import logging
import os
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from vesl.models.cloc import checkpoint
from vesl.models.contract import ModelError


def save(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.save(folder, step, {"step": step, "model": {"x": torch.full((500,), float(step))}}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_trip(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "x": torch.randn(3, 4, dtype=torch.bfloat16), "step": 7, "nested": {"list": [1, None, "ä"], 3: (True, 0.5)},
    }  # fmt: skip
    path = checkpoint.save(tmp_path / "new" / "folder", 7, state, 1)
    assert path.name == "step-00000007.pt"
    found = checkpoint.load(path)
    assert torch.equal(found.pop("x"), state.pop("x"))
    assert found == state


def test_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 8, 9, 10, 100, keep=2)
    assert names(tmp_path) == ["step-00000010.pt", "step-00000100.pt"]
    save(tmp_path, 101, keep=0)  # never none
    assert names(tmp_path) == ["step-00000101.pt"]


def test_the_newest_is_taken(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    save(tmp_path, 9, 10, 2)
    (tmp_path / "step-00000011.wip").write_bytes(b"half")  # of a killed run
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["step"]) == ("step-00000010.pt", 10)


@pytest.mark.parametrize("how", ["cut", "empty", "zeros", "turned", "text"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "step-00000002.pt"
    data = path.read_bytes()
    where = data.index(torch.full((500,), 2.0).numpy().tobytes())  # in the middle of the weights themselves
    damaged = {
        "cut": data[: len(data) // 2], "empty": b"", "zeros": bytes(len(data)), "text": b"no checkpoint",
        "turned": data[: where + 100] + b"\x55" + data[where + 101 :],
    }  # fmt: skip
    path.write_bytes(damaged[how])
    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: is damaged or no checkpoint")
    assert "\n" not in record.getMessage()


def test_all_damaged_is_no_fresh_start(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for path in tmp_path.iterdir():
        os.truncate(path, 100)
    with pytest.raises(ModelError, match="no checkpoint can be read; remove the folder to start anew"):
        checkpoint.latest(tmp_path)
    with pytest.raises(ModelError, match="there is no such checkpoint"):
        checkpoint.load(tmp_path / "step-00000003.pt")


class Trap:
    def __reduce__(self) -> Any:
        return os.system, ("touch trapped",)


def test_no_code_is_read_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"step": Trap()}, tmp_path / "step-00000001.pt")
    (tmp_path / "step-00000002.pt").write_bytes(pickle.dumps(Trap()))
    for path in sorted(tmp_path.glob("*.pt")):
        with pytest.raises(ModelError, match="is damaged or no checkpoint"):
            checkpoint.load(path)
    assert not (tmp_path / "trapped").exists()


def test_a_full_disk_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def full(_: Any, file: Any) -> None:
        file.write(b"x" * 100)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found[1]["step"] == 1
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000002.pt"]


def test_a_write_that_the_system_cuts_off_leaves_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))  # a file that may not grow, as on a full disk
    try:
        with pytest.raises(OSError, match=r"step-00000002\.pt: cannot be written \(is the disk full\?\)"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001.pt"]
