"""The processes of a run: they must go on from the same checkpoint, and a signal asks them to stop once."""

import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing import start_processes

from vesl.models.cloc.ranks import agree, asked_to_stop, joined
from vesl.models.contract import ModelError

FOUND = {"same": (7, 7), "one is behind": (7, 5), "one is new": (0, 5)}


def compare(rank: int, folder: str) -> None:
    """One of two processes: write what `agree` says of each case."""
    dist.init_process_group("gloo", f"file://{folder}/meet", timedelta(seconds=60), world_size=2, rank=rank)
    for name, steps in FOUND.items():
        try:
            agree(steps[rank], Path("run"), 2)
            said = "agreed"
        except ModelError as error:
            said = str(error)
        Path(folder, f"{name} {rank}").write_text(said)
    dist.barrier()
    dist.destroy_process_group()


def test_ranks_that_see_different_checkpoints_stop_all_alike(tmp_path: Path) -> None:
    start_processes(compare, (str(tmp_path),), 2, start_method="spawn")  # type: ignore[no-untyped-call]
    for name, steps in FOUND.items():
        for rank in range(2):
            said = (tmp_path / f"{name} {rank}").read_text()
            if steps[0] == steps[1]:
                assert said == "agreed"
            else:
                assert said == "run: the processes do not see the same checkpoints: all nodes must share this folder"


def test_one_process_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with joined() as (rank, world, _):
        assert (rank, world, dist.is_initialized()) == (0, 1, False)
    agree(3, Path("run"), 1)


def test_the_second_interrupt_is_at_once_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with asked_to_stop() as found:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert found == [signal.SIGTERM, signal.SIGTERM]  # a scheduler says it more than once
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
