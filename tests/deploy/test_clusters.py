"""What deploy/ ships for clusters: manifests against Kubernetes' own schema, scripts run with stand-ins, the image's
sources and extras against the repository."""

import os
import re
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.world import ROOT, World
from vesl.pipeline import cli
from vesl.pipeline.recipe import load

DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
KUBERNETES = "1.31"
# The fields of ray.io/v1 that the manifests may use (KubeRay's API reference).
CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "autoscalerOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template", "serviceType"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "idleTimeoutSeconds"}
JOB = {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "backoffLimit", "rayClusterSpec"}
START = {"num-cpus", "num-gpus", "dashboard-host", "resources"}


def manifest(name: str) -> Any:
    return yaml.safe_load((DEPLOY / "kubernetes" / name).read_text())


def cluster() -> Any:
    return manifest("raycluster.yaml")["spec"]


def groups() -> list[Any]:
    return [cluster()["headGroupSpec"], *cluster()["workerGroupSpecs"]]


def containers() -> Iterator[Any]:
    for group in groups():
        yield from group["template"]["spec"]["containers"]
        yield from group["template"]["spec"].get("initContainers", [])


@pytest.mark.parametrize("k", range(3))
def test_pods_are_what_kubernetes_takes(k: int) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": groups()[k]["template"]["spec"]}
    kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    names = {volume["name"] for volume in pod["spec"]["volumes"]}
    for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= names
    assert pod["spec"]["securityContext"]["runAsNonRoot"]
    pod["spec"]["containers"][0]["resources"]["request"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):  # so the check can fail
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_the_cluster_has_kuberays_fields_and_both_groups_can_grow_and_shrink() -> None:
    assert cluster().keys() <= CLUSTER
    assert cluster()["enableInTreeAutoscaling"] is True
    assert cluster()["headGroupSpec"].keys() <= HEAD
    for group in cluster()["workerGroupSpecs"]:
        assert group.keys() <= GROUP
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["rayStartParams"].keys() <= START
    with_gpu = [
        g["groupName"]
        for g in cluster()["workerGroupSpecs"]
        if "nvidia.com/gpu" in g["template"]["spec"]["containers"][0]["resources"]["limits"]
    ]
    assert with_gpu == ["gpu"]


def test_the_job_has_the_same_cluster_and_a_command_that_vesl_takes(world: World) -> None:
    job = manifest("rayjob.yaml")["spec"]
    assert job.keys() <= JOB
    assert job["rayClusterSpec"] == cluster()
    program, *words = job["entrypoint"].split()
    assert program == "vesl"
    options = cli.parse(words)
    assert options.recipe == "/recipes/recipe.yaml"
    assert load(str(world.recipe), options.set).engine.kind == "ray"


def test_every_image_is_one_that_the_dockerfile_makes() -> None:
    built = set(re.findall(r"-t vesl:(\w+)", DOCKERFILE))
    assert built == {"cpu", "cuda", "dataflow"}
    images = {container["image"] for container in containers()}
    assert images == {"registry.example.com/vesl:cpu", "registry.example.com/vesl:cuda"}


def test_ray_and_beam_are_of_the_versions_that_the_project_pins() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (DEPLOY / "constraints.txt").read_text(), re.M))
    assert cluster()["rayVersion"] == pins["ray"]
    assert set(re.findall(r"(?:apache/beam_python3.11_sdk:|apache-beam\[gcp\]==)([\d.]+)", DOCKERFILE)) == {
        pins["apache-beam"]
    }


def test_weights_are_staged_where_the_workers_look_for_them() -> None:
    pod = cluster()["workerGroupSpecs"][1]["template"]["spec"]
    (stage,), (worker,) = pod["initContainers"], pod["containers"]
    home = {e["name"]: e.get("value") for e in stage["env"]}["HF_HOME"]
    assert {e["name"]: e["value"] for e in worker["env"]} == {"HF_HOME": home, "HF_HUB_OFFLINE": "1"}
    where = {m["mountPath"]: m["name"] for m in stage["volumeMounts"]}[home]
    assert where == {m["mountPath"]: m["name"] for m in worker["volumeMounts"]}[home]
    assert next(v for v in pod["volumes"] if v["name"] == where)["hostPath"]["type"] == "DirectoryOrCreate"


def test_the_image_is_made_of_what_the_repository_has() -> None:
    copied = [line.split()[1:-1] for line in DOCKERFILE.splitlines() if re.match(r"COPY (?!--from)", line)]
    assert {"transforms", "models", "pipeline", "pyproject.toml"} <= {name for names in copied for name in names}
    for name in (name for names in copied for name in names):
        assert (ROOT / name).exists(), name
        kept = name.split("/")[0]
        assert f"!{kept}" in (ROOT / ".dockerignore").read_text().splitlines(), name
    (extras,) = re.findall(r"ARG EXTRAS=(\S+)", DOCKERFILE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= known.keys()
    assert "USER vesl" in DOCKERFILE.split(" AS runtime")[1].split("FROM ")[0]


def stand_in(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def bin_folder(tmp_path: Path) -> Path:
    """Stand-ins that note how they were called; `srun` runs its command here, as Slurm would on its nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = f'echo "${{0##*/}} $*" >> {tmp_path}/log'
    stand_in(folder, "scontrol", "printf 'n1\\nn2\\nn3\\n'")
    stand_in(folder, "srun", f'{log}\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"')
    stand_in(folder, "hostname", "echo '10.0.0.1 fe80::1'")
    status = f'printf "Active:\\n 1 node_a\\n 1 node_b\\n"; [ -e {tmp_path}/two ] || echo " 1 node_c"'
    stand_in(folder, "ray", f'{log}\n[ "$1" = start ] && exec sleep 60\n[ -e {tmp_path}/down ] && exit 1\n{status}')
    stand_in(folder, "sleep", '[ "$1" = 60 ] && exec /bin/sleep 60\nexit 0')
    wait = f"until grep -q 'ray start --block' {tmp_path}/log; do /bin/sleep 0.1; done"  # for the other nodes
    says = 'echo "at $RAY_ADDRESS $RAY_AUTH_TOKEN, offline $HF_HUB_OFFLINE"'
    stand_in(folder, "vesl", f'{log}\n{wait}\n{says}\nexit "${{VESL_CODE:-0}}"')
    stand_in(folder, "python", f'[ "$1" = -c ] && echo token || {log}')
    return folder


def script(name: str, folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(["bash", str(DEPLOY / name), *arguments], env=env, capture_output=True, text=True, timeout=60)


def test_slurm_starts_ray_over_its_nodes_and_ends_it(bin_folder: Path, tmp_path: Path) -> None:
    given = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "16", "SLURM_GPUS_ON_NODE": "8", "MODELS": "a/b@1"}
    done = script("slurm/ray.sbatch", bin_folder, "r.yaml", "--until", "ground", VESL_CODE="3", **given)
    assert done.returncode == 3, done.stderr  # what `vesl run` said is what Slurm sees
    assert done.stdout == "at 10.0.0.1:6379 token, offline 1\n"
    calls = (tmp_path / "log").read_text().splitlines()
    own = [call for call in calls if not call.startswith("srun")]
    assert own[0] == "python -m vesl.models.hub a/b@1"
    assert "vesl run r.yaml --set engine.kind=ray --until ground" in own
    sizes = "--num-cpus=16 --num-gpus=8"
    heads = [call for call in own if "--head" in call]
    assert heads == [
        f"ray start --head --block --node-ip-address=10.0.0.1 --port=6379 --include-dashboard=false {sizes}"
    ]
    assert f"ray start --block --address=10.0.0.1:6379 {sizes}" in own
    where = [call for call in calls if call.startswith("srun") and "ray start" in call]
    assert any("--nodes=2 --ntasks=2 --exclude=n1 ray start --block --address" in call for call in where)
    assert any("--nodelist=n1 ray start --head" in call for call in where)
    left = subprocess.run(["pgrep", "-f", f"{bin_folder}/ray"], capture_output=True, text=True)
    assert not left.stdout
    assert "nodes came up" not in done.stderr
    last = max(at for at, call in enumerate(own) if call.startswith("ray status"))
    assert last < next(at for at, call in enumerate(own) if call.startswith("vesl run"))


def test_slurm_goes_on_with_the_nodes_that_came_up(bin_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two").touch()
    done = script("slurm/ray.sbatch", bin_folder, "r.yaml", SLURM_JOB_NODELIST="n[1-3]")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 nodes came up; going on with them" in done.stderr
    assert "vesl run r.yaml" in (tmp_path / "log").read_text()


def test_slurm_says_where_ray_did_not_come_up(bin_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "down").touch()  # `ray status` fails; with it, `ray start` goes on
    done = script("slurm/ray.sbatch", bin_folder, "r.yaml", SLURM_JOB_NODELIST="n[1-3]")
    assert done.returncode == 1
    assert "Ray's head did not come up on n1" in done.stderr
    assert "vesl run" not in (tmp_path / "log").read_text()


def test_dataflow_gets_options_that_beam_understands(world: World, tmp_path: Path) -> None:
    pipeline_options = pytest.importorskip("apache_beam.options.pipeline_options")
    folder = tmp_path / "bin"
    folder.mkdir()
    stand_in(folder, "vesl", 'printf "%s\\n" "$@"')
    given = {"PROJECT": "my-project", "REGION": "europe-west4", "BUCKET": "b", "IMAGE": "eu.gcr.io/x/vesl:dataflow"}
    done = script("dataflow.sh", folder, str(world.recipe), "--until", "ground", **given)
    assert done.returncode == 0, done.stderr
    options = cli.parse(done.stdout.splitlines())
    assert options.until == "ground"
    engine = load(options.recipe, options.set).engine
    assert engine.kind == "beam"
    parsed = pipeline_options.PipelineOptions(list(engine.options)).get_all_options(drop_default=True)
    assert parsed["runner"] == "DataflowRunner"
    assert (parsed["project"], parsed["region"]) == ("my-project", "europe-west4")
    assert parsed["temp_location"] == "gs://b/dataflow"
    assert parsed["sdk_container_image"] == given["IMAGE"]
    assert parsed["max_num_workers"] == 50
    assert parsed["sdk_location"] == "container"
    assert not {"machine_type", "experiments"} & parsed.keys()
    done = script("dataflow.sh", folder, str(world.recipe), **given, MACHINE="n1-standard-8", ONE_PROCESS="1")
    options = cli.parse(done.stdout.splitlines())
    there = pipeline_options.PipelineOptions(list(load(options.recipe, options.set).engine.options))
    more = there.get_all_options(drop_default=True)
    assert (more["machine_type"], more["experiments"]) == ("n1-standard-8", ["no_use_multiple_sdk_containers"])


def test_dataflow_says_what_is_not_set(tmp_path: Path) -> None:
    done = script("dataflow.sh", tmp_path, "r.yaml", PROJECT="p", REGION="r", IMAGE="i")
    assert (done.returncode, done.stderr) == (2, "dataflow.sh: set BUCKET\n")
