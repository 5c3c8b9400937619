"""`vesl export`: the samples that select kept, in the formats of other tools: `coco`, `grit-parquet`, `hf`.

Part by part, with a batch of images in memory at a time. DEST/.vesl-export/ has a mark for each part: it names the
part's files before they are written, and says that they are done after. So an export that was killed goes on; one that
is run again after more parts are done, or after a takedown, writes what changed and removes what must not be there;
and nothing that is not ours is ever touched. What a sample looks like in a format is in transforms/exports.py.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from tempfile import TemporaryFile
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..transforms.captions import visible
from ..transforms.card import card
from ..transforms.exports import (
    GRIT,
    HUGGING_FACE,
    Samples,
    coco_captions,
    coco_images,
    coco_names,
    coco_regions,
    count,
    grit_table,
    hugging_face_table,
    tally,
)
from ..transforms.takedown import Takedown
from .plan import Plan, provenance
from .run import described
from .stage import part_name
from .store import Store, StoreError
from .takedown import NAMED_BY, match, obeyed
from .work import Incoming, Job, StaleError, incoming

FORMAT = 1  # of the layouts; another one is never mixed into a folder
_MARKS = ".vesl-export"
_BATCH_ROWS, _BATCH_BYTES = 100, 1 << 26  # with their images
_ROWS = 10_000  # without
_FILE_BYTES = 500 << 20  # of images in one Parquet file, as the hub advises
_PARTS = 4  # written at a time: most of a small part's time is waiting for a bucket
_WRITERS = 16  # images written at a time, of each
_TOP = 1000  # phrases counted of each part
_EVERY_S = 5.0
_COLUMNS = ("url", "alt_text", "sha256", "width", "height", "captions", "phrases", "detections", "verdicts", "select")

Batches = Iterator[tuple[Samples, list[bytes]]]
Claim = Callable[[Sequence[str]], None]  # called with the names of files before they are written


@dataclass(frozen=True)
class Source:
    """What is exported: a plan's parts that select has done, without what takedown lists name."""

    plan: Plan
    job: Job
    takedown: Takedown

    @cached_property
    def parts(self) -> dict[int, str]:
        """The parts, in order, each with the content hash of its select table."""
        done = self.plan.done["select"]
        return {part: done[part]["content"] for part in self.plan.parts if part in done}

    @cached_property
    def lists(self) -> str:
        """What the takedown lists say, as a hash; empty where there are none."""
        return _digest(sorted(names) for names in vars(self.takedown).values()) if self.takedown else ""

    def taken(self, part: int) -> str:
        """Which samples of a part the lists name, as a hash; empty where they name none."""
        if not self.takedown:
            return ""
        rows = self._rows(part, NAMED_BY).rows
        keys = rows["key"].filter(match(rows, self.takedown)).to_pylist()
        return _digest(keys) if keys else ""

    def _rows(self, part: int, columns: Iterable[str]) -> Incoming:
        """Columns of the samples that select kept."""
        steps = [step.name for step in self.plan.steps]
        return incoming(self.plan.store, self.job, steps.index("select") + 1, part, tuple(dict.fromkeys(columns)))

    def read(self, part: int, images: bool) -> tuple[list[str], Batches]:
        """A part's keys, and its samples in batches, with their JPEGs or, unless `images`, with none."""
        given = self._rows(part, (*_COLUMNS, *(["image"] if images else []), *(NAMED_BY if self.takedown else [])))
        rows = given.rows.filter(pc.invert(match(given.rows, self.takedown))) if self.takedown else given.rows
        return rows["key"].to_pylist(), self._batches(rows, given.tar if images else None)

    def _batches(self, rows: pa.Table, tar: str | None) -> Batches:
        first = 0
        while first < len(rows):
            batch, blobs = rows.slice(first, _BATCH_ROWS if tar else _ROWS), []
            if tar:
                sizes = pc.cumulative_sum(batch["size"].cast(pa.int64()))
                batch = batch.slice(0, max(1, pc.sum(pc.less_equal(sizes, _BATCH_BYTES)).as_py()))
                places = zip(batch["offset"].to_pylist(), batch["size"].to_pylist(), strict=True)
                blobs = self.plan.store.read_ranges(tar, [(start, start + size) for start, size in places])
            first += len(batch)
            yield Samples.of(batch), blobs

    def all(self) -> Iterator[Samples]:
        """All samples without their images, in the order of parts and keys."""
        return (samples for part in self.parts for samples, _ in self.read(part, images=False)[1])


class Coco:
    """COCO's instances and captions: images/KEY.jpg, annotations/instances_default.json and captions_default.json.

    A category is a phrase by `coco_names`, the most frequent first, so that labels survive a tool that drops the fields
    that it does not know. Memory grows with the distinct phrases (and far more for whoever reads such a file).
    """

    images = True

    def write(self, dest: Store, part: int, keys: list[str], batches: Batches, claim: Claim) -> None:
        """Copy the part's images."""
        dest.fs.makedirs(dest.path("images"), exist_ok=True)
        claim([f"images/{key}.jpg" for key in keys])
        with ThreadPoolExecutor(_WRITERS) as pool:
            for samples, images in batches:
                names = [dest.path(f"images/{key}.jpg") for key in samples.rows["key"].to_pylist()]
                list(pool.map(dest.fs.pipe_file, names, images))

    def finish(self, dest: Store, source: Source, totals: Mapping[str, Any]) -> None:
        """Write the two documents, reading part by part again: once for the categories, and once for what is said."""
        names: Counter[str] = Counter()
        for samples in source.all():
            names.update(tally(coco_names(samples.normal)))
        places = {name: i for i, (name, _) in enumerate(_top(names, len(names)), 1)}
        info = {"description": source.plan.recipe.dataset.name, "select": _select(source.plan)}
        about = {"info": info, "licenses": []}
        categories = [{"id": i, "name": name, "supercategory": "phrase"} for name, i in places.items()]
        with TemporaryFile() as images, TemporaryFile() as regions, TemporaryFile() as captions:
            image = region = caption = 1
            for samples in source.all():
                _append(images, coco_images(samples, image))
                _append(regions, coco_regions(samples, places, image, region, caption))
                _append(captions, coco_captions(samples, image, caption))
                image, region = image + len(samples), region + len(samples.images)
                caption += len(samples.texts)
            lists = {"images": images, "annotations": regions, "categories": categories}
            _write_json(dest, "annotations/instances_default.json", {**about, **lists})
            _write_json(dest, "annotations/captions_default.json", {**about, "images": images, "annotations": captions})


class Grit:
    """data/grit-NNNNN.parquet, one a part: a row per image and caption; as in GRIT, none for a pair without boxes."""

    images = False

    def write(self, dest: Store, part: int, keys: list[str], batches: Batches, claim: Claim) -> None:
        """Write the part's table."""
        name = f"data/grit-{part:05d}.parquet"
        claim([name])
        with dest.spool(name) as file:
            with pq.ParquetWriter(file, GRIT, compression="zstd") as writer:
                for samples, _ in batches:
                    writer.write_table(grit_table(samples))
            dest.publish(file, name)
        dest.sweep(name)

    def finish(self, dest: Store, source: Source, totals: Mapping[str, Any]) -> None:
        """Nothing is left to do."""


class HuggingFace:
    """data/train-NNNNN-NNN.parquet with the JPEGs inside, one or more a part, and a data card: README.md."""

    images = True

    def write(self, dest: Store, part: int, keys: list[str], batches: Batches, claim: Claim) -> None:
        """Write the part's files, a new one where the images of one reach its limit."""
        batch, number = next(batches, None), 0
        while batch is not None:
            name, size = f"data/train-{part:05d}-{number:03d}.parquet", 0
            claim([name])
            with dest.spool(name) as file:
                with pq.ParquetWriter(file, HUGGING_FACE, compression="zstd") as writer:
                    while batch is not None and size < _FILE_BYTES:
                        writer.write_table(hugging_face_table(*batch))
                        size += sum(map(len, batch[1]))
                        batch = next(batches, None)
                dest.publish(file, name)
            dest.sweep(name)
            number += 1

    def finish(self, dest: Store, source: Source, totals: Mapping[str, Any]) -> None:
        """Write the data card."""
        recipe = source.plan.recipe
        text = card(recipe.dataset.name, totals, described(recipe), provenance(source.plan))
        dest.replace("README.md", text.encode())


FORMATS: dict[str, Coco | Grit | HuggingFace] = {"coco": Coco(), "grit-parquet": Grit(), "hf": HuggingFace()}


def export(plan: Plan, kind: str, destination: str) -> dict[str, Any]:
    """Write the samples that select kept as format `kind` into `destination`; return the totals.

    Raises StoreError, one line: a folder that holds anything else, a store that cannot be read or written.
    """
    source = Source(plan, plan.job(), obeyed(plan.store))
    if not source.parts:
        raise StoreError(f"store {plan.store.url}: select has not done any part yet; `vesl run` does")
    dest = _open(source, kind, destination)
    totals: Counter[str] = Counter()
    phrases: Counter[str] = Counter()
    start = last = time.monotonic()
    try:
        for i, counts in enumerate(_all_parts(dest, kind, source), 1):
            phrases.update(counts.pop("phrases"))
            totals.update(counts)
            if (now := time.monotonic()) - last > _EVERY_S or i == len(source.parts):
                last, done = now, f"parts {i}/{len(source.parts)}, {totals['images']} images"
                print(f"[{now - start:4.0f} s] {done}, {totals['regions']} regions", file=sys.stderr, flush=True)
        FORMATS[kind].finish(dest, source, {**totals, "top": _top(phrases, 20)})
    except (StaleError, ValueError) as error:  # a tar or a table that another one cites is not what it was
        raise StoreError(f"store {plan.store.url}: {error}; `vesl run` mends it") from None
    complete = plan.inputs.keys() == source.parts.keys()
    about = {"complete": complete, "takedown": source.lists, "counts": dict(totals)}
    about |= {"recipe": described(plan.recipe), "chain": provenance(plan)}
    dest.write_json(f"{_MARKS}/index.json", {**_identity(plan, kind), **about})
    notes = f", {totals['pairs']} pairs of an image and a caption" if kind == "grit-parquet" else ""
    notes += f"; {totals['taken_down']} images are taken down" if totals["taken_down"] else ""
    notes += "" if complete else f"; {len(source.parts)} of {len(plan.inputs)} parts, the others are not done or chosen"
    print(f"{visible(destination)}: {totals['images']} images, {totals['regions']} regions{notes}")
    return dict(totals)


def _open(source: Source, kind: str, destination: str) -> Store:
    """The destination, if it is empty or holds this very export."""
    plan = source.plan
    dest = Store(destination, plan.recipe.storage_options if "://" in destination else {})
    here, there = (os.path.realpath(one.root) if one.local else one.root for one in (dest, plan.store))
    if type(dest.fs) is type(plan.store.fs) and f"{here}/".startswith(f"{there}/"):
        raise StoreError(f"{destination}: lies in the store; choose a folder beside it")
    dest.check(write=True)
    index = _read_mark(dest, "index")
    if index is None and set(dest.names("")) - {_MARKS}:
        raise StoreError(f"{destination}: is not empty and no export of ours; choose a new folder")
    wanted = _identity(plan, kind)
    if index is None:
        dest.write_json(f"{_MARKS}/index.json", wanted)
    elif {name: index.get(name) for name in wanted} != wanted:
        was = f"{index.get('format')} of select/{index.get('select')}"
        raise StoreError(f"{destination}: holds another export: {was}, not {kind} of select/{_select(plan)}")
    marks = {name.removesuffix(".json") for name in dest.names(_MARKS, "part-") if name.endswith(".json")}
    if others := sorted(marks - set(map(part_name, source.parts))):
        raise StoreError(f"{destination}: holds {others[0]}, which this recipe does not have (dataset.only_parts?)")
    return dest


def _identity(plan: Plan, kind: str) -> dict[str, Any]:
    return {"vesl_export": FORMAT, "format": kind, "select": _select(plan)}


def _select(plan: Plan) -> str:
    return next(step.fingerprint for step in plan.steps if step.name == "select")


def _top(phrases: Counter[str], most: int) -> list[tuple[str, int]]:
    return sorted(phrases.items(), key=lambda item: (-item[1], item[0]))[:most]


def _all_parts(dest: Store, kind: str, source: Source) -> Iterator[dict[str, Any]]:
    """Write the parts, some at a time; their counts, in order."""
    pending: deque[Future[dict[str, Any]]] = deque()
    lists = source.lists
    with ThreadPoolExecutor(_PARTS) as pool:
        try:
            for part, content in source.parts.items():
                pending.append(pool.submit(_part, dest, kind, source, part, {"parent": content, "takedown": lists}))
                if len(pending) > 2 * _PARTS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _read_mark(dest: Store, name: str) -> dict[str, Any] | None:
    try:
        document = dest.read_json(f"{_MARKS}/{name}.json")
    except ValueError:
        document = ()
    if document is None or isinstance(document, dict):
        return document
    raise StoreError(f"{dest.url}: {_MARKS}/{name}.json is damaged; export into a new folder")


def _part(dest: Store, kind: str, source: Source, part: int, state: dict[str, str]) -> dict[str, Any]:
    """Write a part unless it is done for this state; return its counts."""
    mark = f"{_MARKS}/{part_name(part)}.json"
    there = _read_mark(dest, part_name(part)) or {"files": []}
    same = "counts" in there and there["parent"] == state["parent"]
    if same and there["takedown"] == state["takedown"]:
        return dict(there["counts"])
    state = {**state, "taken": source.taken(part)}
    if same and there.get("taken") == state["taken"]:  # the lists have changed, and name nothing else here
        dest.write_json(mark, {**there, **state})
        return dict(there["counts"])
    counts: Counter[str] = Counter({"images": 0, "regions": 0})
    phrases: Counter[str] = Counter()
    claimed, files = set(there["files"]), set[str]()
    if "counts" in there:  # from here on it is not done
        dest.write_json(mark, {"files": sorted(claimed)})

    def claim(names: Sequence[str]) -> None:
        files.update(names)
        if not claimed.issuperset(names):
            claimed.update(names)
            dest.write_json(mark, {"files": sorted(claimed)})

    def counted(batches: Batches) -> Batches:
        for samples, images in batches:
            found, said = count(samples)
            counts.update(found)
            phrases.update(said)
            yield samples, images

    written = FORMATS[kind]
    keys, batches = source.read(part, written.images)
    written.write(dest, part, keys, counted(batches), claim)
    for old in sorted(claimed - files):
        dest.remove(old)
    kept = source.plan.done["select"][part]["counts"]["kept"]
    found = {**counts, "taken_down": kept - counts["images"], "phrases": dict(_top(phrases, _TOP))}
    dest.write_json(mark, {**state, "files": sorted(files), "counts": found})
    return found


def _digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12]


def _append(file: IO[bytes], items: Iterable[Any]) -> None:
    """Add items of a JSON list, one a line."""
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False).encode
    text = ",\n".join(map(encode, items))
    if text:
        file.write((b",\n" if file.tell() else b"\n") + text.encode())


def _write_json(dest: Store, name: str, document: Mapping[str, Any]) -> None:
    """A JSON object, in which a file stands for the list of the items that `_append` wrote."""
    with dest.spool(name) as file:
        before = b"{"
        for key, value in document.items():
            file.write(before + json.dumps(key).encode() + b":")
            if hasattr(value, "seek"):
                value.seek(0)
                file.write(b"[")
                shutil.copyfileobj(value, file, 1 << 20)
                file.write(b"]")
            else:
                file.write(json.dumps(value, ensure_ascii=False).encode())
            before = b",\n"
        file.write(b"}\n")
        dest.publish(file, name)
    dest.sweep(name)
