"""Region-text loss with all logits at once and in tiles: peak memory and time of forward and backward, by hand.

    python tests/bench/tiled_memory.py --regions 32768 --tile 1024 --form tiled naive

Each form runs in a process of its own; its peak is the high-water mark of resident memory above what the process had
with the inputs made. On CUDA (`--device cuda`) it is the allocator's. A form that would not fit is refused.
"""

import argparse
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

GIB = 2**30
SQUARES = {"naive": 5.4, "tiled": 0.0}  # float32 matrices of regions x regions at its peak, as measured


def resident() -> int:
    """Bytes now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(form: str, regions: int, width: int, tile: int, cosine: float | None, device: str, answer: Any) -> None:
    """One forward and backward pass: loss, norms of the gradients, seconds, peak bytes."""
    import torch
    from torch.nn.functional import normalize

    from vesl.models.cloc.losses import region_text_loss

    cuda = device == "cuda"

    def step(count: int) -> tuple[float, ...]:
        loss, share = region_text_loss(
            a[:count],
            b[:count],
            ids[:count],
            torch.ones(count, dtype=torch.bool, device=device),
            scale,
            conflict_cosine=cosine,
            tile=tile if form == "tiled" else None,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), share.item(), *(x.grad.norm().item() for x in (a, b, scale) if x.grad is not None)

    generator = torch.Generator().manual_seed(0)
    a, b = (normalize(torch.randn(regions, width, generator=generator), dim=1).to(device) for _ in range(2))
    ids = torch.randint(0, regions // 4 + 1, (regions,), generator=generator).to(device)
    a.requires_grad_(), b.requires_grad_()
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    step(min(regions, 64))  # libraries load what they load once
    for x in (a, b, scale):
        x.grad = None
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else resident()
    start = time.monotonic()
    figures = step(regions)
    seconds = time.monotonic() - start
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer.put((figures, seconds, peak - before))


def free_bytes(device: str) -> int:
    """What can still be had."""
    if device == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--cosine", type=float, default=0.9, help="of the conflict filter; above 1 for none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--form", nargs="+", choices=list(SQUARES), default=["tiled", "naive"])
    given = parser.parse_args()
    square = given.regions**2 * 4
    print(f"{given.regions:,} x {given.width}: all logits are {square / GIB:.2f} GiB; tiles of {given.tile} rows")
    spawn = multiprocessing.get_context("spawn")
    for form in given.form:
        need, free = SQUARES[form] * square + GIB, free_bytes(given.device)
        if need > free:
            print(f"{form:>6}: not run, it may take {need / GIB:.1f} GiB and {free / GIB:.1f} GiB are free")
            continue
        answer = spawn.Queue()
        cosine = given.cosine if given.cosine <= 1 else None
        process = spawn.Process(
            target=measure, args=(form, given.regions, given.width, given.tile, cosine, given.device, answer)
        )
        process.start()
        figures, seconds, peak = answer.get()
        process.join()
        names = "loss {:.6f}, masked share {:.2e}, gradients {:.6e} {:.6e} {:.6e}".format(*figures)
        print(f"{form:>6}: peak {peak / GIB:.2f} GiB, {seconds:.1f} s; {names}", flush=True)


if __name__ == "__main__":
    main()
