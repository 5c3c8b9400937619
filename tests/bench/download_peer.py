"""The download step against img2dataset: images/s, CPU seconds per image, peak memory, as ratios of one run; by hand.

    python -m venv PEER && PEER/bin/pip install img2dataset==1.47.0
    python -m tests.bench.download_peer --peer-python PEER/bin/python [--rows 5000] [--rounds 3] [--threads 64,256]

Real photographs of 0.2 to 12 megapixels, once from nginx, and once from a server that answers after 200 ms and fails
every tenth. Both tools are run as their users run them, as a command, start-up included, with the same output: JPEG of
512 px on the longer side at quality 92, never enlarged, what fits already kept as it is, in tars, with its sha256. CPU
seconds are those of all processes of the tool (ours runs as in a base install, which has no pandas), memory is the sum
of their proportional set sizes, sampled. The tools take turns; the server has a core of its own where there are three
or more. img2dataset gets as many processes as there are cores and the best of the numbers of threads tried.
"""

import argparse
import asyncio
import ctypes
import io
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from tests.photos import photo
from tests.world import ROOT

PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/coffee.png",
    "skimage/data/chelsea.png",
    "skimage/data/rocket.jpg",
)
PHOTOS += ("sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg", "skimage/data/retina.jpg")
SIDES = (512, 800, 1024, 1600, 2400, 4000)  # of the longer side in pixels; 4000 is up to 16 megapixels
SHARES = (3, 3, 3, 3, 3, 1)  # of 16 rows
SIDE_PX, QUALITY = 512, 92
MOST_PIXELS = 12_000_000
NGINX = """
worker_processes 1; daemon off; pid nginx.pid; error_log error.log;
events {{ worker_connections 8192; }}
http {{ access_log off; sendfile on; tcp_nopush on; default_type image/jpeg; keepalive_requests 100000;
  client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4; scgi_temp_path t5;
  server {{ listen 127.0.0.1:{port} backlog=4096; root {root}; }} }}
"""
DELAY_S, FAILING = 0.2, 10  # every tenth
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux
HEAD = b"HTTP/1.1 %d -\r\nContent-Length: %d\r\nContent-Type: image/jpeg\r\n\r\n"


@dataclass(frozen=True)
class Figures:
    """Of one run of a tool: seconds, CPU seconds of its processes, MiB at the peak, images written."""

    seconds: float
    cpu_s: float
    peak_mib: float
    images: int


def draw(folder: Path) -> list[bytes]:
    """Write the photographs in their sizes; return their bytes, one for each of the sixteenths and photographs."""
    folder.mkdir()
    found = []
    for place in PHOTOS:
        with suppress(AssertionError, OSError):  # a package that is not installed
            picture = photo(place)
            for side, share in zip(SIDES, SHARES, strict=True):
                scale = min(side / max(picture.size), (MOST_PIXELS / (picture.width * picture.height)) ** 0.5)
                file = io.BytesIO()
                picture.resize((round(picture.width * scale), round(picture.height * scale)), 1).save(
                    file, "JPEG", quality=88
                )
                found += [file.getvalue()] * share
    order = [found[i * 7919 % len(found)] for i in range(len(found))]  # a prime: each once, well mixed
    for i, data in enumerate(order):
        (folder / str(i)).write_bytes(data)
    return order


async def serve(folder: Path) -> None:
    """Answer /N.jpg as nginx would, but late, and every tenth with a 404."""
    answers = {path.name: path.read_bytes() for path in folder.iterdir()}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, ValueError, asyncio.IncompleteReadError):
            while True:
                n = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1][1:-4])
                await asyncio.sleep(DELAY_S)
                body = b"none" if n % FAILING == 0 else answers[str(n % len(answers))]
                writer.write(HEAD % (404 if n % FAILING == 0 else 200, len(body)) + body)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def served(folder: Path, rows: int, late: bool, core: set[int]) -> Iterator[str]:
    """A server of the photographs as /0.jpg, /1.jpg and so on; yields its URL."""
    images, root = folder / "images", folder / "www"
    if late:
        command = [sys.executable, "-m", "tests.bench.download_peer", "--serve", str(images)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        port = int(server.stdout.readline())
    else:
        if not root.exists():
            root.mkdir()
            count = len(list(images.iterdir()))
            for n in range(rows):
                os.link(images / str(n % count), root / f"{n}.jpg")
        port = 20000 + os.getpid() % 20000
        (folder / "nginx.conf").write_text(NGINX.format(port=port, root=root))
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        server = subprocess.Popen([nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")], stderr=subprocess.PIPE)
        time.sleep(1)
    with suppress(OSError):
        os.sched_setaffinity(server.pid, core)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def ours(urls: Path, out: Path, cores: int) -> list[str]:
    """The command of this project."""
    rows = pq.read_metadata(urls).num_rows
    recipe = {
        "dataset": {"name": "bench", "source": str(urls), "rows_per_part": -(-rows // cores)},
        "store": str(out),
        "steps": {
            "download": {
                "image": {"max_side_px": SIDE_PX, "quality": QUALITY},
                "fetch": {"allow_networks": ["127.0.0.0/8"], "host_concurrency": None},
            },
            "caption": {"model": "alt_text@1"},
            "ground": {"model": "tiny@1"},
            "select": {"rule": {"score": 0.3}},
        },
        "engine": {"kind": "local", "workers": cores},
    }
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return [sys.executable, "-m", "vesl.pipeline.cli", "run", str(path), "--until", "download"]


def peers(python: str, urls: Path, out: Path, cores: int, threads: int) -> list[str]:
    """The command of img2dataset."""
    rows = pq.read_metadata(urls).num_rows
    options = {
        "url_list": urls, "input_format": "parquet", "url_col": "url", "output_folder": out,
        "output_format": "webdataset", "number_sample_per_shard": max(1, min(1000, -(-rows // cores))),
        "processes_count": cores, "thread_count": threads, "image_size": SIDE_PX, "resize_mode": "keep_ratio_largest",
        "resize_only_if_bigger": True, "skip_reencode": True, "encode_format": "jpg", "encode_quality": QUALITY,
        "extract_exif": False, "compute_hash": "sha256", "enable_wandb": False, "retries": 0, "timeout": 10,
    }  # fmt: skip
    return [python, "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]


def measure(command: list[str], out: Path, cores: set[int], environment: dict[str, str]) -> Figures:
    """Run a tool to its end."""
    peak, log = 0.0, out.with_suffix(".log")
    start = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, start_new_session=True, env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )  # fmt: skip
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.1):
                peak = max(peak, sum(map(pss_mib, tree(process.pid))))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, used = os.wait4(process.pid, 0)  # with its children, as far as it waited for them
        seconds = time.monotonic() - start
        ended.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    every = [used]
    with suppress(ChildProcessError):
        while True:  # the others, which are ours as their parent has ended
            every.append(os.wait4(-process.pid, 0)[2])
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text()[-2000:]}")
    return Figures(seconds, sum(one.ru_utime + one.ru_stime for one in every), peak, written(out))


def written(out: Path) -> int:
    """Images in the tool's tars; each must be one of at most SIDE_PX (a few of each tar are looked at)."""
    count = 0
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            names = [member for member in tar if member.name.endswith(".jpg")]
            for member in names[::97]:
                file = tar.extractfile(member)
                assert file is not None
                with Image.open(file) as image:
                    assert max(image.size) == SIDE_PX, image.size
            count += len(names)
    return count


def tree(root: int) -> list[int]:
    """A process and all below it."""
    found, rest = [], [root]
    while rest:
        found.append(pid := rest.pop())
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                with suppress(OSError):
                    rest += map(int, (task / "children").read_text().split())
    return found


def pss_mib(pid: int) -> float:
    """Proportional set size: what processes share is divided among them."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer-python")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", default="64,256", help="numbers of threads per process that img2dataset may try")
    parser.add_argument("--only", choices=["quick", "late"], help="one of the two servers")
    given = parser.parse_args()
    if given.serve:
        return asyncio.run(serve(given.serve))
    if not given.peer_python:
        parser.error("--peer-python: the Python of a virtual environment with img2dataset")
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)  # whose parent ends is our child, so that its CPU time can be had
    with tempfile.TemporaryDirectory(prefix="download_peer") as name:
        os.chmod(name, 0o755)  # nginx, started by root, serves as nobody
        compare(Path(name), given)


def compare(folder: Path, given: argparse.Namespace) -> None:
    """Print the figures of both tools from both servers."""
    every = sorted(os.sched_getaffinity(0))
    own, rest = (set(every[-1:]), set(every[:-1])) if len(every) >= 3 else (set(every), set(every))
    images = draw(folder / "images")
    mean = statistics.mean(map(len, images)) / 1000
    print(f"{given.rows} URLs, {len(set(images))} files, {mean:.0f} kB each on average; {len(rest)} cores", flush=True)
    for late in (False, True):
        if given.only != ("quick" if late else "late"):
            with served(folder, given.rows, late, own) as url:
                print("late and failing:" if late else "nginx:", flush=True)
                scenario(folder / ("late" if late else "nginx"), url, given, rest)


def scenario(folder: Path, url: str, given: argparse.Namespace, cores: set[int]) -> None:
    """One server: start-up, the peer's best number of threads, then the rounds."""
    folder.mkdir()
    lists = {rows: folder / f"{rows}.parquet" for rows in (len(cores), max(100, given.rows // 10), given.rows)}
    for rows, path in lists.items():
        pq.write_table(pa.table({"url": [f"{url}/{n}.jpg" for n in range(given.rows)][-rows:]}), path)
    runs = 0

    def run(who: str, rows: int, threads: int) -> Figures:
        nonlocal runs
        runs += 1
        out, count = folder / f"{who}-{runs}", len(cores)
        command = (
            ours(lists[rows], out, count)
            if who == "ours"
            else peers(given.peer_python, lists[rows], out, count, threads)
        )
        path = os.pathsep.join(filter(None, [str(ROOT / "tests/base"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path} if who == "ours" else dict(os.environ)
        figures = measure(command, out, cores, environment)
        shutil.rmtree(out)
        return figures

    few, some, all_rows = lists
    best = max(map(int, given.threads.split(",")), key=lambda threads: some / run("theirs", some, threads).seconds)
    for who in ("ours", "theirs"):
        print(f"  start-up, {who}: {run(who, few, best).seconds:.1f} s", flush=True)
    pairs = []
    for turn in range(given.rounds):
        order = ("ours", "theirs") if turn % 2 == 0 else ("theirs", "ours")
        found = {who: run(who, all_rows, best) for who in order}
        pairs.append(found)
        for who, f in found.items():
            print(
                f"  {who}: {f.images} images, {f.images / f.seconds:.1f}/s, {1000 * f.cpu_s / f.images:.1f} ms CPU, "
                f"peak {f.peak_mib:.0f} MiB" + (f" ({best} threads)" if who == "theirs" else ""),
                flush=True,
            )

    def ratio(of: Callable[[Figures], float]) -> float:
        return statistics.median(of(pair["ours"]) / of(pair["theirs"]) for pair in pairs)

    figures = {
        "images/s": ratio(lambda f: f.images / f.seconds),
        "CPU": ratio(lambda f: f.cpu_s / f.images),
        "memory": ratio(lambda f: f.peak_mib),
    }
    print("  ours / theirs, median: " + ", ".join(f"{n} {r:.2f}" for n, r in figures.items()), flush=True)


if __name__ == "__main__":
    main()
