"""Evaluation sets as they are read: COCO-format annotations, shards, class folders; all of them from anybody.

What cannot be used is left out and counted under a reason of SKIPPED; a set that cannot be used at all is a SetError.
"""

import hashlib
import json
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, NamedTuple

import fsspec
import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from ...transforms.boxes import clip, valid
from ...transforms.outcomes import Drop
from ...transforms.records import Sample
from ...transforms.shards import decode
from ...transforms.takedown import Takedown
from . import metrics
from .data import reference
from .options import Evaluation

MAX_PIXELS = 64_000_000
MAX_BYTES = 1 << 26  # of one image or sample
MAX_CHARS = 10_000  # of a text
MAX_SIDE_ERROR = 1.0  # pixels by which an image's shape may differ from what its annotations say
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")

SKIPPED = {
    # labels, of the whole file
    "bad_annotation": "an entry that is not what the format says",
    "unknown_image": "an annotation of an image that the file does not list",
    "duplicate": "an image listed, or a sample packed, a second time",
    "crowd": "an annotation of a crowd (iscrowd)",
    "no_category": "an annotation, or a folder, without a category that has a name",
    "no_text": "an annotation without a text",
    "bad_box": "a box that is not four finite numbers, or has no extent within the image",
    "bad_path": "an image's path that is no relative path, or leaves the folder",
    "bad_sample": "a shard's sample that is not one, or lacks its image or its labels",
    "broken_shard": "a shard that cannot be read to its end",
    "taken_down": "a takedown list of the shards' store names it",
    "unlabelled": "an image about which nothing is asked",
    # images, of those taken
    "missing_image": "no such file",
    "unreadable_image": "a file that cannot be read",
    "not_an_image": "a file that is no image of an allowed format",
    "decode_error": "an image that cannot be decoded whole",
    "too_many_pixels": f"an image of more than {MAX_PIXELS} pixels",
    "image_changed": "a referenced image that is not the one that was packed (sha256)",
    "size_differs": "an image whose shape is not the one that its boxes were annotated in",
}


class SetError(ValueError):
    """An evaluation set cannot be used: one line that names it and says what to do."""


@dataclass(frozen=True)
class Labels:
    """What is asked of one image: pairs of a box (row of `boxes`; 0 where the text is of the image) and a text."""

    boxes: npt.NDArray[np.float64]  # [r, 4], in 0..1 of the image
    texts: tuple[tuple[int, str], ...]
    notes: Counter[str]  # reasons of single labels


Picture = Callable[[], tuple[Image.Image, Labels]]  # loads an image; may raise Drop


@dataclass(frozen=True)
class Source:
    """A set as read: how to load each image taken, every class (regions, zeroshot), what was skipped so far."""

    pictures: Sequence[Picture]
    classes: tuple[str, ...]
    skipped: Counter[str]


def say(skipped: Mapping[str, int]) -> str:
    """Reasons and counts, for a message."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(skipped.items())) or "it is empty"


class _Folder:
    """Files below one fsspec URL."""

    def __init__(self, name: str, url: str, options: Mapping[str, Any]) -> None:
        try:
            self.fs, root = fsspec.url_to_fs(url, **options)
            self.root = root.rstrip("/")
            there = self.fs.exists(root)
        except (OSError, ValueError, ImportError) as error:
            raise SetError(f"{name}: {url} cannot be opened: {_line(error)}") from None
        if not there:
            raise SetError(f"{name}: there is no {url}: correct the path in the recipe's `evaluate` block")

    def read(self, path: str, start: int = 0, size: int = MAX_BYTES + 1) -> bytes:
        """Bytes of a file, `path` relative to the folder. Raises Drop: missing_image, unreadable_image."""
        try:
            data: bytes = self.fs.cat_file(f"{self.root}/{path}", start=start, end=start + size)
        except FileNotFoundError:
            raise Drop("missing_image", path) from None
        except (OSError, ValueError) as error:
            raise Drop("unreadable_image", f"{path}: {_line(error)}") from None
        if len(data) > MAX_BYTES:
            raise Drop("unreadable_image", f"{path}: more than {MAX_BYTES} bytes")
        return data


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def open_set(name: str, spec: Evaluation, options: Mapping[str, Any]) -> Source:
    """Read what a set consists of, but for its images. Raises SetError."""
    if spec.limit is not None and spec.limit < 1:
        raise SetError(f"{name}: limit: {spec.limit} is not a positive number")
    if any("{}" not in template for template in spec.templates):
        raise SetError(f"{name}: templates: every one needs a {{}} where the class name goes")
    given = {key for key in ("annotations", "images", "shards") if getattr(spec, key)}
    ways: dict[str, Callable[[str, Evaluation, Mapping[str, Any]], Source]]
    ways = {"annotations images": _coco, "shards": _shards, "shards images": _shards}
    if spec.kind == "zeroshot":
        ways = {"images": _class_folders}
    for way, read in ways.items():
        if given == set(way.split()):
            source = read(name, spec, options)
            break
    else:
        needed = ", or ".join(way.replace(" ", " and ") for way in ways)
        raise SetError(f"{name}: a set of kind {spec.kind} needs {needed}, and nothing else of these")
    if not source.pictures:
        raise SetError(f"{name}: no image to evaluate ({say(source.skipped)}): is this a set for {spec.kind}?")
    return source


def open_image(data: bytes) -> Image.Image:
    """Decode to RGB, as the pixels lie in the file; what is transparent becomes white, of 16-bit greys the high byte.

    Raises Drop: not_an_image, decode_error, too_many_pixels (of the header: nothing is decoded then).
    """
    try:
        image: Image.Image = Image.open(BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise Drop("too_many_pixels", f"{image.width}x{image.height}")
        image.load()
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            white.alpha_composite(image.convert("RGBA"))
            image = white
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise Drop("not_an_image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Drop("too_many_pixels", str(error)) from None
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, ArithmeticError, AttributeError,
            AssertionError, RuntimeError, struct.error, zlib.error) as error:  # fmt: skip
        raise Drop("decode_error", _line(error)) from None


_NO_BOX = np.zeros((1, 4))


def _load_file(
    folder: _Folder, paths: Sequence[str], labels: Labels, size: tuple[float, float] | None, boxed: bool
) -> tuple[Image.Image, Labels]:
    """Open the first of `paths` that is there; map boxes from pixels of `size` (None: of the image) to 0..1."""
    for i, path in enumerate(paths):
        try:
            image = open_image(folder.read(path))
            break
        except Drop as drop:
            if drop.reason != "missing_image" or i == len(paths) - 1:
                raise
    if not boxed:
        return image, labels
    width, height = size or image.size
    if abs(width * image.height - height * image.width) > MAX_SIDE_ERROR * max(width, height, *image.size):
        raise Drop("size_differs", f"{image.width}x{image.height}, annotated as {width}x{height}")
    return image, _within(labels.boxes / [width, height, width, height], labels.texts)


def _within(raw: npt.NDArray[np.float64], texts: Sequence[tuple[int, str]]) -> Labels:
    """Clip boxes [r, 4] to the image; leave out those without extent (in float32, as a model sees them)."""
    boxes = clip(raw)
    usable = valid(boxes.astype(np.float32))
    moved = (np.abs(raw - boxes) > 1e-6).any(axis=1) & usable
    notes = +Counter({"bad_box": int(np.count_nonzero(~usable)), "clipped": int(np.count_nonzero(moved))})
    row = np.cumsum(usable) - 1
    return Labels(boxes[usable], tuple((int(row[box]), text) for box, text in texts if usable[box]), notes)


def _json(name: str, url: str, read: Callable[[], bytes]) -> Any:
    try:
        return json.loads(read())
    except (OSError, ValueError, ImportError, RecursionError) as error:
        raise SetError(f"{name}: {url} cannot be read as JSON: {_line(error)}") from None


def _coco(name: str, spec: Evaluation, options: Mapping[str, Any]) -> Source:
    """COCO's format; what the labels are depends on the kind. Images in the file's order."""
    assert spec.annotations
    assert spec.images
    folder, file = _Folder(name, spec.images, options), _Folder(name, spec.annotations, options)
    document = _json(name, spec.annotations, lambda: file.fs.cat_file(file.root))
    needed = ["images", "annotations", *(["categories"] if spec.kind == "regions" else [])]
    for key in needed:
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise SetError(f"{name}: {spec.annotations} has no list `{key}`: it is not in COCO's format")
    skipped: Counter[str] = Counter()
    names: dict[Any, str] = {}
    for entry in document["categories"] if spec.kind == "regions" else ():
        if isinstance(entry, dict) and _is_id(entry.get("id")) and _class_name(entry.get("name")):
            names.setdefault(entry["id"], _class_name(entry["name"]))
        else:
            skipped["bad_annotation"] += 1
    images: dict[Any, tuple[dict[str, Any], list[tuple[tuple[float, ...], list[str]]]]] = {}
    for entry in document["images"]:
        if not isinstance(entry, dict) or not _is_id(entry.get("id")):
            skipped["bad_annotation"] += 1
        elif entry["id"] in images:
            skipped["duplicate"] += 1
        else:
            images[entry["id"]] = entry, []
    for entry in document["annotations"]:
        try:
            images[_image_of(entry, images)][1].append(_label(entry, spec.kind, names))
        except Drop as drop:
            skipped[drop.reason] += 1
    boxed = spec.kind != "pairs"
    pictures = []
    for entry, found in images.values():
        paths = _paths(entry)
        if found and paths:
            boxes = np.array([box for box, _ in found]) if boxed else _NO_BOX
            texts = tuple((i if boxed else 0, text) for i, (_, texts) in enumerate(found) for text in texts)
            pictures.append(partial(_load_file, folder, paths, Labels(boxes, texts, Counter()), _size(entry), boxed))
        else:
            skipped["bad_path" if found else "unlabelled"] += 1
    chosen = [pictures[i] for i in metrics.evenly(len(pictures), spec.limit)]
    return Source(chosen, tuple(names.values()), skipped)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, float, str))


def _text(value: object) -> str:
    """Text as it goes to a model: of at most MAX_CHARS, single spaces, no lone surrogates; "" if there is none."""
    return " ".join(value[:MAX_CHARS].encode(errors="replace").decode().split()) if isinstance(value, str) else ""


def _class_name(value: object) -> str:
    return _text(value.replace("_", " ")) if isinstance(value, str) else ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9  # NaN is not below


def _image_of(entry: object, images: Mapping[Any, object]) -> Any:
    if not isinstance(entry, dict) or not _is_id(entry.get("image_id")):
        raise Drop("bad_annotation")
    if entry["image_id"] not in images:
        raise Drop("unknown_image")
    return entry["image_id"]


def _label(entry: dict[str, Any], kind: str, names: Mapping[Any, str]) -> tuple[tuple[float, ...], list[str]]:
    """Box in pixels and texts of an annotation. Raises Drop."""
    box: tuple[float, ...] = ()
    if kind != "pairs":
        if entry.get("iscrowd"):
            raise Drop("crowd")
        given = entry.get("bbox")
        if not isinstance(given, list) or len(given) != 4 or not all(_is_number(x) for x in given):
            raise Drop("bad_box")
        x, y, w, h = given
        if not (w > 0 and h > 0):
            raise Drop("bad_box")
        box = (x, y, x + w, y + h)
    if kind == "regions":
        category = entry.get("category_id")
        if not _is_id(category) or category not in names:
            raise Drop("no_category")
        return box, [names[category]]
    sentences = entry.get("sentences")
    said = [entry.get("phrase") or entry.get("caption"), *(sentences if isinstance(sentences, list) else [])]
    said = [s.get("sent") or s.get("raw") if isinstance(s, dict) else s for s in said]
    texts = [text for text in map(_text, said) if text]
    if not texts:
        raise Drop("no_text")
    return box, texts


def _size(entry: Mapping[str, Any]) -> tuple[float, float] | None:
    """What an annotation file says of an image's size in pixels, if it says so."""
    width, height = entry.get("width"), entry.get("height")
    if not isinstance(width, (int, float)) or not isinstance(height, (int, float)):
        return None
    return (width, height) if 0 < width < 1e9 and 0 < height < 1e9 else None


def _paths(entry: Mapping[str, Any]) -> list[str]:
    """Where an image may lie in its folder: `file_name`; else the last part, or two, of LVIS's `coco_url`."""
    given, url = entry.get("file_name"), entry.get("coco_url")
    if isinstance(given, str) and given:
        paths = [given]
    else:
        parts = url.split("/") if isinstance(url, str) else []
        paths = ["/".join(parts[-n:]) for n in (1, 2) if len(parts) >= n]
    return [path for path in paths if _is_inside(path)]


def _is_inside(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return bool(parts[-1]) and parts[0] != "" and ".." not in parts and "\0" not in path and ":" not in parts[0]


def _class_folders(name: str, spec: Evaluation, options: Mapping[str, Any]) -> Source:
    """Class folders in order of their names, each with all files below it; what begins with a dot is passed over.

    classes.json: {folder: name}; class_names.txt: lines of folder, white space, name. All their names are candidates,
    and a folder that they leave out is counted as no_category.
    """
    assert spec.images
    folder = _Folder(name, spec.images, options)
    try:
        children = sorted(folder.fs.ls(folder.root, detail=True), key=lambda info: str(info["name"]))
        below = [i["name"].rstrip("/") for i in children if i["type"] != "file" and folder.fs.isdir(i["name"])]
        folders = {path.rsplit("/", 1)[-1]: path for path in below}
        named = _class_names(name, folder, {i["name"].rsplit("/", 1)[-1] for i in children})
        files = {key: sorted(folder.fs.find(path)) for key, path in folders.items() if not key.startswith(".")}
    except OSError as error:
        raise SetError(f"{name}: {spec.images} cannot be listed: {_line(error)}") from None
    names = {key: _class_name(key if named is None else named.get(key)) for key in files}
    skipped: Counter[str] = Counter()
    found = []
    for key, paths in files.items():
        shown = [path for path in paths if not path.rsplit("/", 1)[-1].startswith(".")]
        if names[key]:
            found += [(path, key) for path in shown]
        else:
            skipped["no_category"] += len(shown)
    pictures = []
    for i in metrics.evenly(len(found), spec.limit):
        path, key = found[i]
        labels = Labels(_NO_BOX, ((0, names[key]),), Counter())
        pictures.append(partial(_load_file, folder, [path[len(folder.root) + 1 :]], labels, None, False))
    candidates = [*names.values(), *map(_class_name, (named or {}).values())]
    return Source(pictures, tuple(text for text in candidates if text), skipped)


def _class_names(name: str, folder: _Folder, there: set[str]) -> dict[str, str] | None:
    """The names that a folder of class folders gives to them; None where it gives none."""
    if "classes.json" in there:
        document = _json(name, "classes.json", lambda: folder.fs.cat_file(f"{folder.root}/classes.json"))
        if isinstance(document, dict) and document and all(map(_class_name, document.values())):
            return document
        raise SetError(f"{name}: classes.json is not an object of folder names and class names")
    if "class_names.txt" not in there:
        return None
    lines = folder.fs.cat_file(f"{folder.root}/class_names.txt").decode(errors="replace").splitlines()
    pairs = [line.split(None, 1) for line in lines if line.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise SetError(f"{name}: class_names.txt: every line needs a folder's name, a space and the class's name")
    return dict(pairs)


# ---- shards ----


class _Member(NamedTuple):
    """A file's place in a tar, `path`, relative to a folder."""

    folder: _Folder
    path: str
    start: int
    size: int


def _shards(name: str, spec: Evaluation, options: Mapping[str, Any]) -> Source:
    """`*.tar` of a folder in order of their names, or one tar. Read twice: all labels, then the images taken.

    References lead into the store `images`, by default the one that the shards lie in, as `<store>/<step>/<fp>`; its
    takedown lists are obeyed.
    """
    assert spec.shards
    folder = _Folder(name, spec.shards, options)
    try:
        if spec.shards.endswith(".tar"):
            folder.root, _, only = folder.root.rpartition("/")
            tars = [only]
        else:
            listed = folder.fs.ls(folder.root, detail=False)
            tars = sorted(path.rsplit("/", 1)[-1] for path in listed if path.endswith(".tar"))
    except OSError as error:
        raise SetError(f"{name}: {spec.shards} cannot be listed: {_line(error)}") from None
    if not tars:
        raise SetError(f"{name}: there are no shards (*.tar) in {spec.shards}: correct the path, or pack first")
    skipped: Counter[str] = Counter()
    samples: dict[str, tuple[_Member, _Member]] = {}
    store = _Folder(name, spec.images, options) if spec.images else copy(folder)
    if not spec.images:
        store.root = folder.root.rpartition("/")[0].rpartition("/")[0]
    fault = partial(_fault, kind=spec.kind, takedown=_takedown(name, store))
    for tar in tars:
        _walk(folder, tar, store, fault, samples, skipped)
    places = list(samples.values())
    chosen = [partial(_load_sample, spec.kind, *places[i]) for i in metrics.evenly(len(places), spec.limit)]
    return Source(chosen, (), skipped)


def _takedown(name: str, store: _Folder) -> Takedown:
    try:
        listed = store.fs.ls(f"{store.root}/takedown", detail=False) if store.root else []
        paths = sorted(path for path in listed if path.endswith(".txt"))
        return Takedown.parse((path, store.fs.cat_file(path).decode()) for path in paths)
    except FileNotFoundError:
        return Takedown()
    except (OSError, ValueError) as error:
        raise SetError(f"{name}: the takedown lists of {store.root} cannot be read: {_line(error)}") from None


def _walk(
    folder: _Folder,
    tar: str,
    store: _Folder,
    fault_of: Callable[[bytes], str],
    samples: dict[str, tuple[_Member, _Member]],
    skipped: Counter[str],
) -> None:
    """Add the image's and the label's place of a shard's usable samples, by key, in the order of the labels."""
    images: dict[str, _Member] = {}
    cited: dict[str, _Member] = {}
    labels: dict[str, tuple[_Member, str]] = {}  # with the reason not to use it
    try:
        with folder.fs.open(f"{folder.root}/{tar}", "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                key, _, suffix = info.name.rpartition(".")
                if suffix not in ("jpg", "json") or not info.isreg() or info.issparse():
                    continue
                member = _Member(folder, tar, info.offset_data, info.size)
                if key in samples or key in (images if suffix == "jpg" else labels):
                    skipped["duplicate"] += suffix == "json"
                elif suffix == "jpg":
                    images[key] = member
                else:
                    reader = archive.extractfile(info)
                    data = reader.read() if reader and info.size <= MAX_BYTES else b""
                    labels[key] = member, fault_of(data)
                    if not labels[key][1] and (place := reference(json.loads(data).get("image"))):
                        cited[key] = _Member(store, *place)
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes a damaged header for the end
                skipped["broken_shard"] += 1
    except (OSError, ValueError, ArithmeticError, LookupError, tarfile.TarError, EOFError, zlib.error):
        skipped["broken_shard"] += 1
    skipped["bad_sample"] += len(images.keys() - labels.keys())
    images = cited | images
    for key, (member, fault) in labels.items():
        if fault or key not in images:
            skipped[fault or "bad_sample"] += 1
        else:
            samples[key] = images[key], member


def _fault(data: bytes, kind: str, takedown: Takedown) -> str:
    try:
        sample = decode(data)
        if takedown and takedown.covers(sample.key, sample.url, sample.sha256):
            return "taken_down"
        return "" if _asked(sample, kind).texts else "unlabelled"
    except (ValueError, ArithmeticError):
        return "bad_sample"


def _read(member: _Member) -> bytes:
    data = member.folder.read(member.path, member.start, member.size) if member.size <= MAX_BYTES else b""
    if len(data) != member.size:
        raise Drop("unreadable_image", "cut short, or too large")
    return data


def _asked(sample: Sample, kind: str) -> Labels:
    if kind == "pairs":
        return Labels(_NO_BOX, tuple((0, _text(c.text)) for c in sample.captions[:1] if _text(c.text)), Counter())
    said = [(region.box, _text(region.phrase)) for region in sample.regions if _text(region.phrase)]
    labels = _within(np.array([box for box, _ in said]).reshape(-1, 4), [(i, text) for i, (_, text) in enumerate(said)])
    labels.notes.update({"no_text": len(sample.regions) - len(said)})
    return labels


def _load_sample(kind: str, image: _Member, label: _Member) -> tuple[Image.Image, Labels]:
    sample, data = decode(_read(label)), _read(image)
    if image.folder is not label.folder and hashlib.sha256(data).hexdigest() != sample.sha256:
        raise Drop("image_changed")
    return open_image(data), _asked(sample, kind)
