"""What makes a result what it is: options in and out of a fingerprint, bytes of tables, files of the store."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.pipeline.test_recipe import GOOD, fingerprints, read
from vesl.pipeline.recipe import RecipeError
from vesl.pipeline.steps.select import Select
from vesl.pipeline.store import Store, encode_table

# Frozen: an option that is on this list by mistake hides that results differ.
_FETCH = (
    *("connect_timeout_s", "read_timeout_s", "total_timeout_s", "user_agent", "contact", "concurrency", "buffer_mib"),
    *("host_concurrency", "host_rate_per_s", "patience_s", "retries"),
)
_ENDPOINT = ("url", "key_from", "in_flight", "timeout_s", "retries")
OPERATIONAL = {
    *(f"download.fetch.{name}" for name in _FETCH),
    *(f"download.respect.{name}" for name in ("keep_h", "blocked_domains_file")),
    *(f"caption.endpoint.{name}" for name in _ENDPOINT),
    *(f"caption.{name}" for name in ("device", "compile", "batch_tokens")),
    *(f"ground.{name}" for name in ("device", "compile", "text_cache", "batch_pixels", "batch_tokens")),
    "select.scores_of",
}


def operational(options: Any, where: str) -> Iterator[str]:
    for field in dataclasses.fields(options):
        value, name = getattr(options, field.name), f"{where}{field.name}"
        if field.metadata.get("operational"):
            yield name
        elif dataclasses.is_dataclass(value):
            yield from operational(value, f"{name}.")


def test_which_options_stay_out_of_the_fingerprints(tmp_path: Path) -> None:
    assert set(operational(read(tmp_path, GOOD).steps, "")) == OPERATIONAL


def test_a_new_version_of_a_step_changes_its_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprints(read(tmp_path, GOOD))
    monkeypatch.setattr(Select, "version", 2)
    after = fingerprints(read(tmp_path, GOOD))
    assert [name for name in before if before[name] != after[name]] == ["select", "pack"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("use=0123456789ab", "it belongs into a step, as in steps.caption.use"),
        ("steps.ground.model=alt_text@1", "steps.ground.model: 'alt_text@1' is not a grounder"),
        ("steps.caption.model='a.module:function'", "steps.caption.model: 'a.module:function' is not pinned"),
        ("steps.caption.model='a.module:function@'", "steps.caption.model: 'a.module:function@' is not pinned"),
    ],
)
def test_more_mistakes(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, GOOD, override)
    assert says in str(caught.value)


# test_store.py


def test_replacing_leaves_nothing_beside_the_file(store: Store) -> None:
    store.replace("d/x.json", b"1")
    store.replace("d/x.json", b"2")
    assert store.names("d") == ["x.json"]


def test_another_attempt_that_sweeps_our_scratch_file_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, link, swept = Store(str(tmp_path)), os.link, []

    def sweep_first(source: Any, target: str) -> None:
        if not swept:
            swept.append(source)
            shutil.rmtree(Path(source).parent)
        link(source, target)

    monkeypatch.setattr(os, "link", sweep_first)
    assert store.create("d/part-00000.parquet", b"whole")
    assert swept
    assert store.read("d/part-00000.parquet") == b"whole"


def test_what_another_machine_writes_into_a_bucket_is_seen(tmp_path: Path, s3_options: dict[str, Any]) -> None:
    import s3fs

    store = Store(f"s3://bucket/{tmp_path.name}", s3_options)
    store.create("d/a", b"x")
    assert store.names("d") == ["a"]
    other = s3fs.S3FileSystem(**s3_options, skip_instance_cache=True)
    other.pipe_file(f"bucket/{tmp_path.name}/d/b", b"x")
    assert store.names("d") == ["a", "b"]
    assert store.exists("d/b")


def test_bytes_of_a_long_table_do_not_depend_on_its_pieces() -> None:
    table = pa.table({"key": [f"{i:024x}" * 20 for i in range(20_000)], "n": range(20_000)})  # pages of 1 MB fill up
    pieces = pa.concat_tables([table.slice(start, 999) for start in range(0, 20_000, 999)])
    assert pieces["key"].num_chunks > 1
    assert encode_table(pieces, {}) == encode_table(table, {})
