"""The demo's corner of the web: real photographs from installed packages on a loopback server, and bad neighbours.

    python deploy/photos.py FOLDER

writes FOLDER/urls.csv (the list that the demo's recipe reads), says "ready", and serves until it is ended. The list
keeps its port, so that a second demo finds the same URLs.
"""

import csv
import importlib.util
import io
import struct
import sys
import time
import zlib
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

# Package, path inside it, and what a web page might say of it.
PHOTOS = {
    "astronaut.png": ("skimage", "data/astronaut.png", "Portrait of Eileen Collins, stock photo"),
    "camera.png": ("skimage", "data/camera.png", "Man with a camera on a tripod"),
    "cat.png": ("skimage", "data/chelsea.png", "Chelsea the cat.jpg"),
    "coffee.png": ("skimage", "data/coffee.png", "A cup of espresso with a spoon on a wooden table"),
    "coins.png": ("skimage", "data/coins.png", "Greek coins from Pompeii"),
    "motorcycle-left.png": ("skimage", "data/motorcycle_left.png", "red motorcycle in a garage (HD wallpaper)"),
    "motorcycle-right.png": ("skimage", "data/motorcycle_right.png", ""),
    "rocket.jpg": ("skimage", "data/rocket.jpg", "Falcon 9 rocket on the launch pad at night"),
    "temple.jpg": ("sklearn", "datasets/images/china.jpg", "Chinese temple with yellow roofs under a blue sky"),
    "flower.jpg": ("sklearn", "datasets/images/flower.jpg", "DSC_0042"),
    "officer.jpg": (
        "matplotlib",
        "mpl-data/sample_data/grace_hopper.jpg",
        "Rear Admiral Grace Hopper in front of a flag",
    ),
    "quokka.jpg": ("imgaug", "quokka.jpg", "😀 happy quokka!!! <b>free download</b>"),
}


def photo(name: str) -> bytes:
    """A photograph's file, from its package, without importing the package."""
    package, inside, _ = PHOTOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"photos: the package {package} is not installed; run deploy/demo.sh")
    return (Path(spec.submodule_search_locations[0]) / inside).read_bytes()


def _pixel() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (1, 1), "white").save(file, "PNG")
    return file.getvalue()


def _huge() -> bytes:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "page-not-image.jpg": lambda: b"<!doctype html><title>Sign in</title><p>This image has moved.",
    "truncated.jpg": lambda: photo("officer.jpg")[:20_000],
    "tracking-pixel.png": _pixel,
    "huge.png": _huge,
}


class Handler(BaseHTTPRequestHandler):
    """Photographs, bad files, a slow answer, and 404 for the rest."""

    def do_GET(self) -> None:
        """Answer one request."""
        name = self.path.rsplit("/", 1)[-1]
        if name in PHOTOS or name in BAD:
            body = photo(name) if name in PHOTOS else BAD[name]()
            self.send_response(200)
            self.send_header("Content-Type", "image/png" if name.endswith("png") else "image/jpeg")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        elif name == "slow.jpg":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the reader has more sense than to wait
                for byte in photo("officer.jpg")[:60]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.5)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def write_list(path: Path, port: int) -> None:
    """Write the URL list: what a crawl would hold, bad rows included."""
    base = f"http://127.0.0.1:{port}"
    rows = [(f"{base}/photos/{name}", alt) for name, (_, _, alt) in PHOTOS.items()]
    rows += [(f"{base}/bad/{name}", "a promising alt text") for name in BAD]
    rows += [
        (f"{base}/bad/gone.jpg", "deleted long ago"),
        (f"{base}/bad/slow.jpg", "a server that takes its time"),
        (f"{base.upper()}/photos/./cat.png#top", "the cat again, under another spelling of its URL"),
        ("http://169.254.169.254/latest/meta-data/", "an address that nobody should be sent to"),
        ("ftp://127.0.0.1/old.jpg", "another scheme"),
        ("//cdn/relative.jpg", "no scheme at all"),
        ("", "no URL"),
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "alt"), *rows])


def main(folder: Path) -> None:
    """Write the list if there is none, then serve."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "urls.csv"
    port = 0
    if path.exists():
        port = int(path.read_text(encoding="utf-8").split("http://127.0.0.1:", 1)[1].split("/", 1)[0])
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise SystemExit(
            f"photos: port {port} of {path}: {error.strerror}; end what uses it, or remove {folder}"
        ) from None
    if not port:
        write_list(path, server.server_port)
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
