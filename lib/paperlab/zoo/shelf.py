"""The shelf of the pocket zoo: what models there are, and taking one down.

A model is a safetensors file in half precision with a card beside it: its checksum, what it was trained on, for how
long, and what it can do. Everything here is offline; nothing is ever replaced by something else.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import nn

from paperlab.checks import require_one_of
from paperlab.zoo.recipes import RECIPES

WEIGHTS = Path(__file__).parent / "weights"


class ZooError(RuntimeError):
    """A model whose weights are missing or are not the ones that its card describes."""


def names() -> list[str]:
    """The models whose weights are here."""
    return [name for name in RECIPES if (WEIGHTS / f"{name}.json").exists()]


def card(name: str) -> dict:
    """What is recorded of a model: checksum, parameters, bytes, data seen, seconds, device, scores.

    Raises:
        ValueError: an unknown name.
        ZooError: the model has a recipe but no weights here.
    """
    require_one_of(list(RECIPES), name=name)
    path = WEIGHTS / f"{name}.json"
    if not path.exists():
        raise ZooError(f"{name} is not trained here: `python -m paperlab.zoo train {name}` makes {path.name}")
    return json.loads(path.read_text())


def load(name: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A pretrained model in evaluation mode; language models carry their ``tokenizer``.

    Raises:
        ValueError: an unknown name.
        ZooError: missing weights, or a file whose checksum is not that of its card.
    """
    told, path = card(name), WEIGHTS / f"{name}.safetensors"
    if not path.exists():
        raise ZooError(f"{path.name} is missing: restore it from the repository, or retrain it with "
                       f"`python -m paperlab.zoo train {name}`")  # fmt: skip
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != told["sha256"]:
        raise ZooError(
            f"{path.name} is damaged: its checksum is not that of {name}.json; restore it from the repository"
        )
    with torch.random.fork_rng(devices=[]):  # building draws numbers; the caller's must not shift
        model = RECIPES[name].build()
    model.load_state_dict(parse(data))
    return model.to(device=device, dtype=dtype).eval()


def put(name: str, model: nn.Module, log: dict) -> dict:
    """Put a trained model on the shelf: weights in half precision, and its card without scores. Returns the card."""
    tensors = {key: value.detach().half().contiguous().cpu() for key, value in model.state_dict().items()}
    data = serialise(tensors)
    told = {
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": len(data),
        "unit": RECIPES[name].unit,
        **{key: log[key] for key in ("steps", "seen", "seconds", "device", "threads", "torch")},
        "scores": {},
    }
    WEIGHTS.mkdir(exist_ok=True)
    (WEIGHTS / f"{name}.safetensors").write_bytes(data)
    write_card(told)
    return told


def write_card(told: dict) -> None:
    """Store a card, one field a line, so that a change of one score is a change of one line."""
    (WEIGHTS / f"{told['name']}.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def describe() -> str:
    """A table of the models here: parameters, size, what they saw, how long it took, and their scores."""
    lines = []
    for name in names():
        told = card(name)
        lines.append(f"{name}: {told['parameters'] / 1e6:.2f} M parameters, {told['bytes'] / 1e6:.1f} MB, "
                     f"{told['seen'] / 1e6:.1f} M {RECIPES[name].unit} seen in {told['seconds'] / 60:.0f} min "
                     f"({told['device']})")  # fmt: skip
        for skill, score in told["scores"].items():
            bar = f"   bar {score['bar']:g}" if score.get("bar") is not None else ""
            lines.append(f"  {skill:32} {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] "
                         f"n = {score['n']}{bar}")  # fmt: skip
    return "\n".join(lines) or "no weights here yet: `python -m paperlab.zoo train NAME` makes them"
