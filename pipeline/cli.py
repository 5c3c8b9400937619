"""`vesl`: the command line. Heavy imports wait until a command needs them, so that `vesl --help` is quick.

Exit codes: 0 done, 1 fault, 2 usage or recipe error, 3 over an error limit.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .plan import Plan
    from .recipe import Recipe

STEPS = ("download", "caption", "phrases", "ground", "score", "select", "pack")


def parser() -> argparse.ArgumentParser:
    """The commands and their few flags."""
    top = argparse.ArgumentParser(prog="vesl", description="Web images in, region-text training shards out.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file; deploy/recipes/ has examples")
        command.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override a key of the recipe")
        return command

    add("plan", "show the resolved chain and what is missing; writes nothing")
    run = add("run", "do what is missing; running again resumes")
    run.add_argument("--until", choices=STEPS, help="stop after this step")
    add("status", "show how far a run is, from any terminal or machine")
    add("report", "show the funnel with its reasons, and statistics")
    add("train", "train CLOC on the recipe's shards; running again resumes")
    evaluation = add("eval", "measure a model on the recipe's evaluation sets")
    evaluation.add_argument("checkpoint", metavar="CHECKPOINT", help="a model folder or a checkpoint of `vesl train`")
    show = add("show", "show the whole history of samples")
    show.add_argument("keys", nargs="*", metavar="KEY", help="a key or its beginning; none: a few samples with regions")
    show.add_argument("--image", metavar="FILE", help="draw the boxes into this picture file (.jpg or .png)")
    return top


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; `show` takes its keys before and after the flags. Exits with 2 for a mistake."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    if options.command == "show" and not any(word.startswith("-") for word in rest):
        options.keys += rest
    elif rest:
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    options = parse(arguments)
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


def _run(options: argparse.Namespace) -> int:
    from ..models.contract import ModelError
    from .engines import EngineError
    from .lists import IngestError
    from .recipe import RecipeError, load, load_training
    from .run import OverLimitError
    from .store import StoreError

    try:
        if options.command in ("train", "eval"):
            from . import training

            found = load_training(options.recipe, options.set)
            if options.command == "train":
                return training.train(*found)
            return training.evaluate(*found, options.checkpoint)
        return _command(options, load(options.recipe, options.set))
    except (RecipeError, IngestError, StoreError) as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 2
    except OverLimitError as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 3
    except (ModelError, EngineError) as error:
        print(f"vesl: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a store that went away
        print(f"vesl: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _command(options: argparse.Namespace, recipe: "Recipe") -> int:
    from rich.console import Console

    from . import report
    from .plan import make_plan

    console = Console(width=None if sys.stdout.isatty() else 160)
    if options.command == "run":
        from .run import run

        plan, complete = run(recipe, options.until)
        report.print_funnel(plan, console, reasons=False)
        last = plan.steps[-1]
        console.print(f"results: {plan.store.url.rstrip('/')}/{last.folder}", highlight=False, soft_wrap=True)
        return 0 if complete else 1
    plan = make_plan(recipe)
    if options.command == "plan":
        report.print_plan(plan, console)
    elif options.command == "status":
        report.print_status(plan, console)
    elif options.command == "report":
        report.print_funnel(plan, console)
        report.print_statistics(plan, console)
    else:
        return _show(options, plan, console)
    return 0


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
