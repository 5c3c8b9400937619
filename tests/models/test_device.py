"""Where a model computes, and what happens when the device's memory runs out."""

import pytest
import torch

from vesl.models.contract import ModelError
from vesl.models.device import Pieces, moved, place
from vesl.models.options import Grounding


def test_no_gpu_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place(Grounding("tiny@1")) == (torch.device("cpu"), torch.float32)
    assert place(Grounding("tiny@1", dtype="float16"))[1] == torch.float16
    with pytest.raises(ModelError, match="device: cuda, but PyTorch sees no GPU here; auto takes what there is"):
        place(Grounding("tiny@1", device="cuda"))


def test_what_is_too_much_once_is_halved_from_then_on() -> None:
    asked: list[tuple[int, int]] = []

    def run(start: int, end: int) -> list[int]:
        asked.append((start, end))
        if end - start > 3:
            raise torch.OutOfMemoryError
        return list(range(start, end))

    pieces = Pieces()
    assert pieces(8, run) == list(range(8))
    assert asked == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8)]
    asked.clear()
    assert pieces(3, run) == [0, 1, 2]
    assert asked == [(0, 2), (2, 3)]
    assert Pieces()(0, run) == []


def test_after_many_pieces_that_went_well_more_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vesl.models.device._AGAIN", 3)
    least, asked = 2, list[int]()

    def run(start: int, end: int) -> list[int]:
        asked.append(end - start)
        if end - start > least:
            raise torch.OutOfMemoryError
        return list(range(start, end))

    pieces = Pieces()
    assert pieces(4, run) == list(range(4))
    assert asked == [4, 2, 2]
    asked.clear()
    assert pieces(8, run) == list(range(8))
    assert asked == [2, 4, 2, 2, 2]  # the third of two went well: four are tried, in vain
    least = 99
    asked.clear()
    assert pieces(8, run) == list(range(8))
    assert asked == [4, 4]  # the fourth and more: all of them fit now
    assert pieces.size == 4


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_one_row_that_is_too_much_is_told(error: RuntimeError) -> None:
    asked: list[int] = []

    def run(start: int, end: int) -> list[int]:
        asked.append(end - start)
        raise error

    with pytest.raises(torch.OutOfMemoryError):
        Pieces()(4, run)
    assert asked == [4, 2, 1]


def test_another_fault_is_no_lack_of_memory() -> None:
    def run(start: int, end: int) -> list[int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    pieces = Pieces()
    with pytest.raises(RuntimeError, match="assert"):
        pieces(4, run)
    assert pieces.size is None


def test_nested_tensors_move_and_the_rest_stays() -> None:
    given = {"a": torch.ones(1), "b": [torch.zeros(2), (3, "x")]}
    found = moved(given, torch.device("meta"))
    assert found["a"].device.type == found["b"][0].device.type == "meta"
    assert found["b"][1] == (3, "x")
