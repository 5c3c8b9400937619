"""The download step: rows/s, CPU seconds a row, and peak memory above the interpreter; by hand.

    python tests/bench/fetch_speed.py [--rows 2000] [--delay 0.2] [--failing 0.1] [--silent 0.005] [--threads 14]

Real photographs of 0.2 to 12 megapixels from a server process on loopback; each answer comes after `delay` seconds,
some are a 404, some never come. The figures are of the worker alone, the server has its own process; one of two cores
is the server's, so only ratios between two states of the code on the same machine mean anything.
"""

import argparse
import asyncio
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import pyarrow as pa

from tests.photos import photo
from vesl.pipeline.fetch import FetchRule
from vesl.pipeline.stage import Step
from vesl.pipeline.steps.download import Download
from vesl.pipeline.store import Store, encode_table
from vesl.pipeline.work import Attempt, Job, run_part
from vesl.transforms.images import ImageRule
from vesl.transforms.records import INPUT

PHOTOS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
SIDES = (512, 800, 1024, 1600, 2400, 4000)
PART = "input/x/part-00000.parquet"
HEAD = b"HTTP/1.1 %d -\r\nContent-Length: %d\r\nContent-Type: image/jpeg\r\nConnection: close\r\n\r\n"


def pictures() -> list[bytes]:
    """JPEGs of several sizes."""
    found = []
    for i, side in enumerate(SIDES):
        image = photo(f"skimage/data/{PHOTOS[i % len(PHOTOS)]}").resize((side, side * 3 // 4))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=88)
        found.append(file.getvalue())
    return found


async def serve(delay_s: float, failing: float, silent: float) -> None:
    """Answer /N by its number."""
    answers = pictures()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, asyncio.IncompleteReadError):
            n = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1][1:])
            await asyncio.sleep(60 if n * 7919 % 1000 < silent * 1000 else delay_s)
            fails = n * 104729 % 1000 < failing * 1000
            # the small ones are many
            body = b"none" if fails else answers[min(n * 31 % 16 // 3, len(answers) - 1)]
            writer.write(HEAD % (404 if fails else 200, len(body)) + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--failing", type=float, default=0.1)
    parser.add_argument("--silent", type=float, default=0.005)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=14)
    given = parser.parse_args()
    if given.measure:
        return measure(given.measure, given)
    if given.serve:
        return asyncio.run(serve(given.delay, given.failing, given.silent))
    server = subprocess.Popen([sys.executable, *sys.argv, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            prepare(folder, f"http://127.0.0.1:{int(server.stdout.readline())}", given.rows)
            subprocess.run([sys.executable, *sys.argv, "--measure", folder], check=True)
    finally:
        server.kill()


def prepare(folder: str, url: str, rows: int) -> None:
    """A store with one part of that many URLs."""
    columns = {"key": [f"{n:024x}" for n in range(rows)], "url": [f"{url}/{n}" for n in range(rows)]}
    nothing = {"alt_text": [""] * rows, "source": ["a"] * rows, "row": range(rows)}
    table = encode_table(pa.table({**columns, **nothing}, schema=INPUT), {})
    Store(folder).create(PART, table)


def measure(folder: str, given: argparse.Namespace) -> None:
    """One part through the step, in a process that does nothing else."""
    rule = FetchRule(allow_networks=("127.0.0.1/32",), read_timeout_s=5.0, host_concurrency=None)
    step = Step(Download(ImageRule(max_side_px=given.side), rule), "input")
    batch, threads = {"download": given.batch}, {"download": given.threads}
    job = Job(folder, {}, (step,), (PART,), batch, threads, 60.0)
    before, start, cpu = rss_mib(), time.monotonic(), time.process_time()
    footer, _ = run_part(job, 0, 0, lambda stage: stage.open(), Attempt())
    seconds, cpu = time.monotonic() - start, time.process_time() - cpu
    peak, bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, interpreter_mib()
    print(f"{given.rows} rows: {given.rows / seconds:.0f} rows/s, {1000 * cpu / given.rows:.1f} ms CPU a row, ", end="")
    print(f"peak {peak - bare:.0f} MiB above the interpreter, {before - bare:.0f} of them imports; {footer['counts']}")
    sys.stdout.flush()
    os._exit(0)  # nobody waits for connections that never answer


def rss_mib(process: int | str = "self") -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def interpreter_mib() -> float:
    """Resident memory of a Python that does nothing."""
    with subprocess.Popen(
        [sys.executable, "-i", "-c", "print(1, flush=True)"], stdin=PIPE, stdout=PIPE, stderr=PIPE
    ) as idle:
        assert idle.stdout is not None
        idle.stdout.readline()
        found = rss_mib(idle.pid)
        idle.communicate(b"\n")
    return found


if __name__ == "__main__":
    main()
