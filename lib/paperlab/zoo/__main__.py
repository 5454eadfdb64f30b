"""The zoo's command line: ``python -m paperlab.zoo train NAME | evaluate [NAME …] | describe``."""

import argparse
import sys
from pathlib import Path

import torch

from paperlab.devices import default_device
from paperlab.zoo import language, shelf
from paperlab.zoo.evaluation import evaluate
from paperlab.zoo.recipes import RECIPES
from paperlab.zoo.training import train


def main(words: list[str] | None = None) -> int:
    """Parse and run; 0 if it went well, 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m paperlab.zoo", description="Pocket models: make them, measure them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("train", help="train a model by its recipe and put it on the shelf")
    making.add_argument("name", choices=list(RECIPES))
    making.add_argument("--steps", type=int, help="stop after so many steps, and put nothing on the shelf")
    making.add_argument("--device", default=str(default_device()), help="cpu, cuda, … (default: %(default)s)")
    making.add_argument("--snapshots", type=int, default=0, help="keep so many checkpoints, to study training itself")
    making.add_argument("--folder", type=Path, default=Path("_build/zoo"), help="checkpoints (default: %(default)s)")
    measuring = commands.add_parser("evaluate", help="measure models on held-out data and write their cards")
    measuring.add_argument("names", nargs="*", metavar="NAME", help="default: every model here")
    commands.add_parser("tokenizer", help="train the language models' tokenizer anew; they must be retrained after it")
    commands.add_parser("describe", help="parameters, sizes, costs and scores")
    given = parser.parse_args(words)
    if given.command == "describe":
        print(shelf.describe())
    elif given.command == "tokenizer":
        language.make_tokenizer().save(language.TOKENIZER)
        print(f"wrote {language.TOKENIZER.name}, {language.VOCAB} tokens")
    elif given.command == "evaluate":
        for name in given.names or shelf.names():
            evaluate(name)
        print(shelf.describe())
    else:
        recipe = RECIPES[given.name]
        try:
            base = shelf.load(recipe.base) if recipe.base else None
            model, log = train(recipe, given.folder / given.name, device=given.device, base=base, steps=given.steps,
                               snapshots=given.snapshots)  # fmt: skip
        except KeyboardInterrupt:
            print(f"\ninterrupted: the same command goes on from {given.folder / given.name}", file=sys.stderr)
            return 130
        if log["steps"] == recipe.steps:
            told = shelf.put(given.name, model, log)
            size = told["bytes"] / 1e6
            print(f"{given.name}: {size:.1f} MB; `python -m paperlab.zoo evaluate {given.name}` measures it")
    return 0


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
