"""`vesl show`: one sample's whole history as text, and its boxes drawn on the image."""

import functools
import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.markup import escape

from ..transforms.captions import visible
from ..transforms.records import ADDS
from ..transforms.takedown import Takedown
from .ingest import input_tables
from .plan import Plan
from .takedown import obeyed

_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
    "#000075",
    "#c2185b",
)
_SIDE_PX = 480  # of a picture on the sheet
_FEW = 12  # samples where no key is named
_HASHES = ("sha256", "source_sha256")


def find(plan: Plan, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The histories of the samples whose keys begin with one of `keys`; of a few with regions where there are none.

    A history holds the columns of every step that the sample went through, and `steps`: name -> (outcome, reason,
    detail, fingerprint). Of one that takedown lists name, there is its key and part, and nothing else.
    """
    tables, takedown = input_tables(plan.dataset) if plan.dataset else [], obeyed(plan.store)
    found: list[dict[str, Any]] = []
    for part in plan.parts:
        rows = plan.store.read_table(tables[part])
        if keys:
            wanted = [pc.starts_with(rows["key"], key) for key in keys]
            rows = rows.filter(functools.reduce(pc.or_, wanted))
        histories = [_told(history, takedown) for history in _histories(plan, part, rows.to_pylist())]
        found += histories if keys else [history for history in histories if kept_regions(history)]
        if not keys and len(found) >= _FEW:
            break
    return found if keys else sorted(found, key=lambda h: -len(kept_regions(h)))[:_FEW]


def _told(history: dict[str, Any], takedown: Takedown) -> dict[str, Any]:
    """A history, or what may be told of one that takedown lists name."""
    urls, hashes = ([history.get(name) or "" for name in names] for names in (("url", "final_url"), _HASHES))
    if takedown and any(takedown.covers(history["key"], url, sha) for url in urls for sha in hashes):
        return {"key": history["key"], "part": history["part"], "steps": {}, "taken_down": True}
    return history


def _histories(plan: Plan, part: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    going = {row["key"]: row | {"part": part, "steps": {}} for row in rows}
    histories = list(going.values())
    for step in plan.steps:
        if part not in plan.done[step.name] or not going:
            break
        table = plan.store.read_table(step.table(part))
        for mine in table.filter(pc.is_in(table["key"], pa.array(going))).to_pylist():
            history = going[mine["key"]]
            history["steps"][step.name] = (mine["outcome"], mine["reason"], mine["detail"], step.fingerprint)
            history.update({name: mine.get(name) for name in ADDS[step.name].names})
        going = {key: h for key, h in going.items() if h["steps"].get(step.name, [""])[0] == "kept"}
    return histories


def kept_regions(history: dict[str, Any]) -> list[tuple[list[float], str, float]]:
    """(box, phrase, score) of the detections that `select` kept, best first."""
    pairs = zip(history.get("detections") or [], history.get("verdicts") or [], strict=False)
    kept = [(d["box"], history["phrases"][d["phrase"]]["text"], d["score"]) for d, v in pairs if v == "kept"]
    return sorted(kept, key=lambda region: -region[2])


def print_history(history: dict[str, Any], console: Console) -> None:
    """From the URL to the regions: each step's outcome and what it found."""

    def line(label: str, text: Any) -> None:
        console.print(f"  [dim]{label:10}[/] {escape(visible(text))}", highlight=False, soft_wrap=True)

    console.print(f"[bold]{history['key']}[/] part {history['part']}", highlight=False)
    if history.get("taken_down"):
        return line("taken down", "a takedown list names it")
    line("url", history["url"])
    line("from", f"{history['source']} row {history['row']}")
    line("alt text", history["alt_text"] or "")
    for step, (outcome, reason, detail, fingerprint) in history["steps"].items():
        why = f" {reason}" + (f": {detail}" if detail else "") if reason else ""
        console.print(
            f"  [bold]{step}[/] {fingerprint} {outcome}{escape(visible(why))}", highlight=False, soft_wrap=True
        )
        if outcome == "kept":
            for label, text in _found(step, history):
                line(label, text)


def _found(step: str, history: dict[str, Any]) -> list[tuple[str, Any]]:
    if step == "download":
        source = f"{history['source_width']}x{history['source_height']} {history['source_format']}"
        stored = f"{history['width']}x{history['height']} JPEG, {history['size']:,} bytes"
        image: list[tuple[str, Any]] = [("image", f"{source} -> {stored}, sha256 {history['sha256'][:16]}")]
        at = history["fetched_at"]
        return image + ([("fetched", f"{at:%Y-%m-%d %H:%M:%S} UTC")] if at else [])
    if step == "caption":
        written: list[tuple[str, Any]] = [(c["model"], c["text"]) for c in history["captions"]]
        for note in history["caption_notes"] or ():
            end = "dropped" if note["caption"] is None else f"caption {note['caption'] + 1}"
            written.append(
                ("note", f"{note['model']}, prompt {note['prompt'] + 1}: {note['note']} ({end}): {note['text']}")
            )
        return written
    if step == "dedup":
        return []
    if step == "phrases":
        return [("phrases", "; ".join(p["text"] for p in history["phrases"]) or "none")]
    if step == "ground":
        cut = ", cut" if history["truncated"] else ""
        return [("detections", f"{len(history['detections'])}{cut}")]
    if step == "select":
        lines: list[tuple[str, Any]] = []
        for d, verdict in zip(history["detections"], history["verdicts"], strict=True):
            box = " ".join(f"{x:.3f}" for x in d["box"])
            lines.append((f"{d['score']:.3f}", f"[{box}] {history['phrases'][d['phrase']]['text']}: {verdict}"))
        return lines[:40] + ([("", f"and {len(lines) - 40} more")] if len(lines) > 40 else [])
    return [("shard", f"{history['shard']} sample {history['position']}")]


def picture(plan: Plan, history: dict[str, Any]) -> Image.Image | None:
    """The stored image with the kept boxes and their phrases, or None where there is no image."""
    if "size" not in history or history["size"] is None:
        return None
    step = plan.steps[0]
    footer = plan.store.footer(step.table(history["part"]))
    assert footer is not None
    place = (history["offset"], history["offset"] + history["size"])
    (data,) = plan.store.read_ranges(f"{step.folder}/{footer['tar']['name']}", [place])
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = _SIDE_PX / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    regions = kept_regions(history)
    colours = {phrase: _COLOURS[i % len(_COLOURS)] for i, phrase in enumerate(dict.fromkeys(r[1] for r in regions))}
    labels = []
    for box, phrase, score in reversed(regions):
        x0, y0, x1, y1 = (v * side for v, side in zip(box, image.size * 2, strict=True))
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=colours[phrase], width=3)
        labels.append((x0, y0, f"{phrase} {score:.2f}", colours[phrase]))
    for x, y, text, colour in labels:  # over all boxes
        width = draw.textlength(text, font=font)
        x, y = min(x, max(0, image.width - width - 6)), min(y, image.height - 18)
        draw.rectangle((x, y, x + width + 6, y + 17), fill=colour)
        draw.text((x + 3, y), text, fill="white", font=font)
    return image


def sheet(plan: Plan, histories: Sequence[dict[str, Any]]) -> Image.Image | None:
    """The pictures of several samples side by side, each over its caption; one sample alone as it is."""
    pictures = [(p, h) for h in histories if (p := picture(plan, h)) is not None]
    if not pictures:
        return None
    columns = min(3, len(pictures))
    font = ImageFont.load_default(13)
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    heights = [max(image.height for image, _ in row) + 64 for row in rows]
    page = Image.new("RGB", (columns * (_SIDE_PX + 16), sum(heights)), "white")
    draw = ImageDraw.Draw(page)
    top = 8
    for row, height in zip(rows, heights, strict=True):
        for i, (image, history) in enumerate(row):
            x, y = i * (_SIDE_PX + 16) + 8, top
            page.paste(image, (x, y))
            text = (history.get("captions") or [{"text": history["alt_text"] or ""}])[0]["text"]
            for n, line in enumerate(_wrapped(f"{history['key'][:8]}  {text}", draw, font, _SIDE_PX)[:3]):
                draw.text((x, y + image.height + 2 + 15 * n), line, fill="black", font=font)
        top += height
    return page


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font: Any, width: float) -> list[str]:
    lines = [""]
    for word in text[:400].split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and draw.textlength(longer, font=font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
