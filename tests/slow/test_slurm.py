"""deploy/slurm/ray.sbatch with the real Ray and the real command line; only Slurm itself is played, on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.deploy.test_clusters import DEPLOY, stand_in
from tests.world import ROOT, World, without_time

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_over_two_nodes(world: World, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    world.list_urls("a", world.images(20))
    world.bare = False
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "scontrol", "printf 'n1\\nn2\\n'")
    stand_in(folder, "srun", 'while [[ $1 == --* ]]; do shift; done\nexec "$@"')
    stand_in(folder, "hostname", "echo 127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = {
        **world.env(),
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "2",
        "RAY_PORT": str(port),
        "HF_HOME": str(tmp_path / "models"),
    }
    script = ["bash", str(DEPLOY / "slurm/ray.sbatch"), str(world.recipe)]
    done = subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nodes came up" not in done.stderr  # both did
    there = without_time(world.contents("pack"))
    os.rename(world.store, f"{world.store}-slurm")
    assert world.run("run").returncode == 0
    assert there == without_time(world.contents("pack"))
    ours = f"--gcs-address=127.0.0.1:{port}"
    raylets = [p for p in psutil.process_iter(["name", "cmdline"]) if p.info["name"] == "raylet"]
    left = [p for p in raylets if ours in (p.info["cmdline"] or ())]
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive
