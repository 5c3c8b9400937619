"""`vesl`: the command line. Heavy imports wait until a command needs them, so that `vesl --help` is quick.

Exit codes: 0 done, 1 fault, 2 usage or recipe error, 3 over an error limit.
"""

import argparse
import atexit
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .plan import Plan
    from .recipe import Recipe

STEPS = ("download", "dedup", "caption", "phrases", "ground", "score", "select", "pack")


def parser() -> argparse.ArgumentParser:
    """The commands and their few flags."""
    top = argparse.ArgumentParser(prog="vesl", description="Web images in, region-text training shards out.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file; deploy/recipes/ has examples")
        command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the recipe")
        return command

    plan = add("plan", "show the resolved chain, what is missing, and what it will cost; writes nothing")
    plan.add_argument("--sample", type=int, metavar="N", help="time N rows in what is missing, beside the store")
    run = add("run", "do what is missing; running again resumes")
    run.add_argument("--until", choices=STEPS, help="stop after this step")
    run.add_argument("--retry", choices=["failed"], help="try again what failed by a fault that may pass")
    add("status", "show how far a run is, from any terminal or machine")
    report = add("report", "show the funnel with its reasons, and write a page with statistics and pictures")
    report.add_argument("other", nargs="?", metavar="OTHER", help="a recipe to compare with; --set does not change it")
    report.add_argument("--out", default="report.html", metavar="FILE", help="the HTML page; default: report.html")
    add("train", "train CLOC on the recipe's shards; running again resumes")
    evaluation = add("eval", "measure a model on the recipe's evaluation sets")
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT", help="a model folder or a checkpoint of `vesl train`")
    show = add("show", "show the whole history of samples")
    show.add_argument("keys", nargs="*", metavar="KEY", help="a key or its beginning; none: a few samples with regions")
    show.add_argument("--image", metavar="FILE", help="draw the boxes into this picture file (.jpg or .png)")
    calibration = add("calibrate", "measure the stored scores on labelled images, and find a threshold")
    calibration.add_argument("labels", metavar="LABELS", help="COCO boxes with phrases for a few images of the store")
    calibration.add_argument("--precision", type=float, default=0.9, metavar="P", help="what is wanted; default: 0.9")
    calibration.add_argument("--out", metavar="PNG", help="draw the curves into this picture file")
    export = add("export", "write the samples that select kept in another format; running again resumes")
    export.add_argument("format", choices=("coco", "grit-parquet", "hf"), help="what to write")
    export.add_argument("destination", metavar="DEST", help="a new or empty folder, or a URL of one")
    takedown = add("takedown", "store a list of what must not be used any more; every reader obeys it at once")
    takedown.add_argument("list", metavar="LIST", help="keys, sha256, URLs and domains, one a line")
    takedown.add_argument("--compact", action="store_true", help="also remove what all lists name from every file")
    text = "list the results in a store, and remove those that no recipe names"
    gc = commands.add_parser("gc", help=text, description=text)
    gc.add_argument("store", metavar="STORE", help="a folder or URL")
    gc.add_argument("recipes", nargs="*", metavar="RECIPE", help="every recipe whose results are to stay")
    gc.add_argument("--remove", action="store_true", help="remove; without it nothing is changed")
    return top


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `show` takes its keys before and after the flags. Exits with 2 for a mistake."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if options.command == "show" and not any(word.startswith("-") for word in rest):
        options.keys += rest
    elif options.command == "gc" and not any(word.startswith("-") for word in rest):
        options.recipes += rest
    elif options.command == "report" and options.other is None and len(rest) == 1 and rest[0][:1] != "-":
        options.other = rest[0]
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    options = parse(arguments)
    atexit.register(_hush)  # the first to be registered is the last to be called
    code = 0
    try:
        code = _run(options)
    except KeyboardInterrupt:
        print("vesl: stopped; run the same command again to go on", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)


def _hush() -> None:
    """Keep stderr shut while Python ends, all having been said: DuckDB counts there what threads still hold of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _run(options: argparse.Namespace) -> int:
    from ..models.contract import ModelError
    from .engines import EngineError
    from .lists import IngestError
    from .recipe import RecipeError, load, load_training
    from .run import OverLimitError
    from .store import StoreError, StoreFault
    from .takedown import TakedownError

    try:
        if options.command in ("train", "eval"):
            from . import training

            found = load_training(options.recipe, options.set)
            if options.command == "train":
                return training.train(*found)
            return training.evaluate(*found, options.checkpoint)
        if options.command == "gc":
            from .gc import command as gc

            return gc(options.store, options.recipes, options.remove)
        if options.command == "takedown":
            from .compact import command as takedown

            return takedown(load(options.recipe, options.set), options.list, options.compact)
        return _command(options, load(options.recipe, options.set))
    except (RecipeError, IngestError, StoreError, TakedownError) as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 2
    except OverLimitError as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 3
    except (ModelError, EngineError, StoreFault) as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a store that went away
        print(f"vesl: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _command(options: argparse.Namespace, recipe: "Recipe") -> int:
    from rich.console import Console

    from . import tables
    from .journal import unfinished
    from .plan import make_plan

    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.command == "run":
        from .run import run

        plan, complete = run(recipe, options.until, options.retry == "failed")
        tables.print_funnel(plan, console, reasons=False)
        last = plan.steps[-1]
        console.print(f"results: {plan.store.url.rstrip('/')}/{last.folder}", highlight=False, soft_wrap=True)
        return 0 if complete else 1
    if options.command == "plan" and options.sample is not None and options.sample < 1:
        print(f"vesl: --sample {options.sample}: is not a positive number", file=sys.stderr)
        return 2
    plan = make_plan(recipe)
    if plan.compaction is None and (text := unfinished(plan.store)):
        print(f"vesl: {text}", file=sys.stderr)
    if options.command == "plan":
        from .cost import measure

        def say(line: str) -> None:
            print(line, file=sys.stderr)

        tables.print_plan(plan, measure(plan, options.sample, say), console)
    elif options.command == "status":
        tables.print_status(plan, console)
    elif options.command == "report":
        return _report(options, plan, console)
    elif options.command == "calibrate":
        from .calibrate import calibrate

        calibrate(plan, options.labels, options.precision, options.out, console)
    elif options.command == "export":
        from .export import export

        export(plan, options.format, options.destination)
    else:
        return _show(options, plan, console)
    return 0


def _report(options: argparse.Namespace, plan: "Plan", console: "Console") -> int:
    from pathlib import Path

    from .plan import make_plan
    from .recipe import load
    from .report import build
    from .tables import print_funnel, print_statistics

    other = make_plan(load(options.other)) if options.other else None
    out = Path(options.out)
    if out.is_dir() or not out.parent.is_dir():
        print(f"vesl: --out {out}: is not a file in a folder that exists", file=sys.stderr)
        return 2
    print_funnel(plan, console)
    if other:
        console.print(f"\n{options.other}:", markup=False, highlight=False)
        print_funnel(other, console)
    html, statistics = build(plan, other, *_names(options))
    if statistics.verdicts:
        print_statistics(statistics, console)
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        print(f"vesl: --out {out}: {error.strerror}", file=sys.stderr)
        return 2
    console.print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)", markup=False, highlight=False, soft_wrap=True)
    return 0


def _names(options: argparse.Namespace) -> tuple[str, str]:
    """What a report calls its recipes: their files, and what was set."""
    return " ".join([options.recipe, *(f"{text}" for text in options.set)]), options.other or ""


def _show(options: argparse.Namespace, plan: "Plan", console: "Console") -> int:
    from .show import find, print_history, sheet

    histories = find(plan, options.keys)
    if not histories:
        what = f"sample has a key like {' '.join(options.keys)}" if options.keys else "sample has regions yet"
        print(f"vesl: no {what}", file=sys.stderr)
        return 2
    if options.keys or not options.image:
        for history in histories:
            print_history(history, console)
    if options.image:
        image = sheet(plan, histories)
        if image is None:
            print("vesl: there is no stored image to draw on", file=sys.stderr)
            return 2
        try:
            image.save(options.image)
        except (OSError, ValueError) as error:
            print(f"vesl: --image {options.image}: {error}", file=sys.stderr)
            return 2
        print(options.image)
    return 0


if __name__ == "__main__":
    main()
