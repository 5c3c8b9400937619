"""What a user sees for a mistake: one clear line and the right exit code, never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.world import VESL, World


def test_flags_are_frozen() -> None:
    done = subprocess.run([*VESL, "--help"], capture_output=True, text=True, check=True)
    for command in ("plan", "run", "status", "report", "show"):
        assert f"\n    {command} " in done.stdout
        text = subprocess.run([*VESL, command, "--help"], capture_output=True, text=True, check=True).stdout
        flags = {word.strip(",[]") for word in text.split() if word.strip("[").startswith("--")}
        own = {"plan": {"--sample"}, "run": {"--until", "--retry"}, "show": {"--image"}, "report": {"--out"}}.get(
            command, set()
        )
        assert flags == {"--help", "--set", *own}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "steps.select.rule.scroe=1"], "steps.select.rule.scroe: unknown key; did you mean 'score'?"),
        (["--set", "steps.ground.model=org/owl"], "'org/owl' is not pinned"),
        (["--set", "steps.ground.score_floor=high"], "expected a finite number"),
        (["--set", "dataset.source=/nowhere/*.csv"], "no file matches /nowhere/*.csv"),
        (["--set", "dataset.url_column=link"], "has no column 'link'"),
        (["--set", "store=/proc/nothing/store"], "store /proc/nothing/store"),
        (["--set", "store=nosuch://x"], "nosuch"),
        (["--until", "nothing"], "invalid choice: 'nothing'"),
    ],
)
def test_usage_and_recipe_errors_exit_with_2(world: World, arguments: list[str], says: str) -> None:
    world.list_urls("a", world.images(2))
    done = world.run("run", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert says == "invalid choice: 'nothing'" or done.stderr.startswith("vesl: ")
    assert len(done.stderr.splitlines()) == 1 or "usage" in done.stderr


def test_a_bucket_that_does_not_answer_is_a_fault_of_one_line(world: World) -> None:
    world.list_urls("a", world.images(2))
    offline = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = world.run("run", "--set", "store=s3://bucket/x", env=offline | {"VESL_STORE_PATIENCE_S": "1"})
    assert done.returncode == 1
    assert done.stderr.startswith("vesl: s3://bucket/x")
    assert len(done.stderr.splitlines()) == 1


def test_a_missing_recipe(tmp_path: Path) -> None:
    done = subprocess.run([*VESL, "plan", str(tmp_path / "no.yaml")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"vesl: {tmp_path}/no.yaml: cannot be read: No such file or directory\n"


def test_plan_status_and_report_of_an_empty_store_write_nothing(world: World) -> None:
    for command in ("plan", "status", "report"):
        done = world.run(command)
        assert done.returncode == 0, done.stderr
    assert "nothing is ingested yet" in world.run("plan").stdout
    assert not any(Path(world.store).rglob("*"))
    assert world.run("show").returncode == 2


def chain_of(shown: str) -> dict[str, list[str]]:
    """The first table of `vesl plan`, by step."""
    return {words[0]: words for line in reversed(shown.splitlines()) if (words := line.split())}


def test_plan_tells_what_is_missing(world: World) -> None:
    world.list_urls("a", world.images(7))
    assert world.run("run", "--until", "ground").returncode == 0
    lines = chain_of(world.run("plan").stdout)
    assert lines["ground"][2:5] == ["2", "0", "no"]
    assert lines["select"][2:5] == ["0", "2", "no"]
    changed = world.run("plan", "--set", "steps.caption.model=tests.standins:captioner@1").stdout
    lines = chain_of(changed)
    assert lines["download"][2:5] == ["2", "0", "no"]
    assert lines["caption"][2:5] == ["0", "2", "yes"]


def test_a_run_over_a_limit_shows_rows(world: World) -> None:
    world.list_urls("a", world.images(4, captions=dict.fromkeys(range(4), "please raise")))
    done = world.run("run", "--set", "steps.caption.model=tests.standins:captioner@1")
    assert done.returncode == 3
    said, *rows = done.stderr.splitlines()[-4:]
    assert said.startswith("vesl: caption: 4 of 4 rows failed (error 4), over limits.failed_fraction = 0.05; see `vesl")
    assert said.endswith("; such as")
    assert len({row.split(":")[0] for row in rows}) == 3
    assert all(": RuntimeError: a model that does" in row for row in rows)


def test_show_tells_a_history_and_draws(world: World, tmp_path: Path) -> None:
    hostile = "A [bold]red[/bold] ball, <script>alert(1)</script> \u202e and two green boxes"
    world.list_urls("a", [*world.images(3, captions={0: hostile}), (f"{world.server.url}/none.jpg", "x")])
    assert world.run("run").returncode == 0
    few = world.run("show").stdout
    keys = [line.split()[0] for line in few.splitlines() if line and not line.startswith(" ")]
    assert len(keys) == 3
    everything = "".join(world.run("show", key[:10]).stdout for key in keys)
    assert "[bold]red[/bold] ball, <script>alert(1)</script>" in everything
    assert ": kept" in everything
    picture = tmp_path / "one.png"
    assert world.run("show", keys[0], "--image", str(picture)).returncode == 0
    assert Image.open(picture).width > 400
    from vesl.transforms import urls

    dead = world.run("show", urls.key(f"{world.server.url}/none.jpg")).stdout
    assert "failed http_4xx: HTTP 404" in dead
    assert world.run("show", "ffffffff0000").returncode == 2
    assert world.run("show", keys[0], "--image", str(tmp_path / "no" / "where.png")).returncode == 2
    assert world.run("show", keys[0], "--image", str(tmp_path / "x.docx")).returncode == 2


def test_status_from_another_terminal(world: World) -> None:
    world.list_urls("a", world.images(12))
    world.document["steps"]["caption"]["model"] = "tests.standins:captioner@1"
    world.write()
    process = subprocess.Popen(
        world.command("run"),
        env=world.env({"STANDIN_WAIT_S": "1.5"}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        seen = ""
        while process.poll() is None and "running" not in seen:
            seen = world.run("status").stdout
        assert "last run: running" in seen
    finally:
        process.kill()
        process.wait()


def test_output_to_a_closed_pipe(world: World) -> None:
    world.list_urls("a", world.images(3))
    assert world.run("run").returncode == 0
    command = " ".join(world.command("show")) + " | head -n 1"
    done = subprocess.run(["bash", "-c", command], env=world.env(), capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr


def test_progress_lines_where_there_is_no_terminal(world: World) -> None:
    world.list_urls("a", world.images(5))
    done = world.run("run")
    assert "rows: download 5/5, caption 5/5" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout


def test_the_installed_command_is_the_same(world: World) -> None:
    command = Path(sys.executable).parent / "vesl"
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, check=True)
    assert "RECIPE" in subprocess.run([str(command), "run", "-h"], capture_output=True, text=True, check=True).stdout
    assert "Web images in" in done.stdout
