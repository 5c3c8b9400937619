"""Shared by all tests: a store in a folder and one on a real S3 server on loopback."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.webserver import WebServer
from tests.world import World
from vesl.pipeline.store import Store

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def s3_options() -> Iterator[dict[str, Any]]:
    """storage_options for s3:// URLs; the bucket `bucket` is there."""
    import logging

    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "secret-of-the-test", "endpoint_url": f"http://{host}:{port}"}
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    server.stop()


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store, in a folder and in a bucket."""
    if request.param == "folder":
        return Store(str(tmp_path / "store"))
    return Store(f"s3://bucket/{tmp_path.name}", request.getfixturevalue("s3_options"))


@pytest.fixture
def server() -> Iterator[WebServer]:
    """A web server on loopback."""
    with WebServer() as running:
        yield running


@pytest.fixture
def world(tmp_path: Path, server: WebServer) -> World:
    """A small web with a recipe for it, in a folder."""
    return World(tmp_path, server)
