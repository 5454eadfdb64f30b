"""Training a pocket model: a loop that can be interrupted, and ends with the same weights.

Every batch is a function of the seed and the step alone, so that a run which was killed goes on from its last
checkpoint as if nothing had happened, and siblings with the same task see the same tokens in the same order.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from paperlab.checks import require_at_least
from paperlab.devices import seed_everything
from paperlab.zoo.muon import Muon

SAVE_EVERY = 120.0  # seconds between checkpoints


class Task(Protocol):
    """What a model is trained on: the loss of a step, and how many tokens or images that step shows."""

    seen_per_step: int

    def loss(self, model: nn.Module, step: int) -> Tensor:
        """The loss of step ``step`` on data that depend on the task's seed and ``step`` only."""


@dataclass(frozen=True)
class Recipe:
    """How one pocket model is made. Rates are peaks: they rise over ``warmup`` steps, hold, and fall linearly to 0
    from ``decay_from`` (a share of all steps) on. Matrices inside the network are trained by Muon, the rest by AdamW.
    ``scores`` measures the finished model on held-out data, given the model and ``build``; ``portrait`` is what else
    its card shows. ``base`` names the model of the zoo that the network adopts a part of before its training begins, by
    its method ``adopt``.
    """

    name: str
    build: Callable[[], nn.Module]
    task: Callable[[torch.device], Task]
    scores: Callable[[nn.Module, Callable[[], nn.Module]], dict[str, dict]]
    steps: int
    matrix_lr: float = 0.02
    other_lr: float = 3e-3
    weight_decay: float = 0.01
    warmup: int = 100
    decay_from: float = 0.5
    seed: int = 0
    unit: str = "tokens"
    base: str | None = None
    portrait: Callable[[nn.Module], dict] | None = None

    def rate(self, step: int) -> float:
        """The share of the peak rates at ``step``."""
        fall = (self.steps - step) / max(1.0, self.steps * (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup, fall)


def optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings, norms, convolutions and everything else."""
    inside = {f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "." in name}
    matrices = [p for name, p in model.named_parameters() if name in inside and p.requires_grad]
    others = [p for name, p in model.named_parameters() if name not in inside and p.requires_grad]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay))
    if others:
        found.append(torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True))
    return found


def train(
    recipe: Recipe,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    base: nn.Module | None = None,
    steps: int | None = None,
    snapshots: int = 0,
    stream=sys.stderr,
) -> tuple[nn.Module, dict]:
    """Train by ``recipe``, or go on where ``folder``'s checkpoint stands; returns the model and the log of the run.

    ``base`` is the model that the recipe names so. ``steps`` stops early (the schedule stays that of the whole
    recipe). ``snapshots`` keeps that many further checkpoints, evenly spaced in the logarithm of the step, for the
    study of training itself.

    Raises:
        ValueError: ``steps`` or ``snapshots`` out of range, a ``base`` without need or none where it is needed.
        FloatingPointError: the loss is no longer finite.
    """
    total = recipe.steps if steps is None else min(steps, recipe.steps)
    require_at_least(1, steps=total)
    require_at_least(0, snapshots=snapshots)
    if (base is None) != (recipe.base is None):
        raise ValueError(f"base must be {recipe.base or 'None'} for {recipe.name}")
    device = torch.device(device)
    seed_everything(recipe.seed)
    model = recipe.build()
    if base is not None:
        model.adopt(base)
    model = model.to(device).train()
    task, opts = recipe.task(device), optimizers(model, recipe)
    peaks = [[group["lr"] for group in opt.param_groups] for opt in opts]
    folder.mkdir(parents=True, exist_ok=True)
    state = _resume(folder / "checkpoint.pt", model, opts)
    wanted = {round(total ** (k / snapshots)) for k in range(1, snapshots + 1)}
    begun, saved, first = time.monotonic(), time.monotonic(), state["step"]
    for step in range(first, total):
        for opt, peak in zip(opts, peaks, strict=True):
            for group, lr in zip(opt.param_groups, peak, strict=True):
                group["lr"] = lr * recipe.rate(step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):  # most processors emulate it
            loss = task.loss(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        done = step + 1
        if done % 10 == 0 or done == total:
            value = loss.item()
            if not abs(value) < float("inf"):
                raise FloatingPointError(f"{recipe.name}: the loss is {value} at step {step}")
            state["losses"].append((done, round(value, 4)))
            seconds = time.monotonic() - begun
            left = seconds / (done - first) * (total - done)
            line = f"{recipe.name} {done}/{total}  loss {value:.3f}  {left / 60:.0f} min left"
            if stream.isatty():  # one line that is written over; elsewhere a line now and then
                print(f"\r\033[K{line}", end="\n" if done == total else "", file=stream, flush=True)
            elif done % 200 == 0 or done == total:
                print(line, file=stream, flush=True)
        if done in wanted:
            torch.save(model.state_dict(), folder / f"step-{done:06d}.pt")
        if time.monotonic() - saved > SAVE_EVERY or done == total:
            now = time.monotonic()
            state |= {"step": done, "seconds": state["seconds"] + now - saved}
            saved = now
            _save(folder / "checkpoint.pt", model, opts, state)
    log = {
        "steps": state["step"],
        "seen": state["step"] * task.seen_per_step,
        "seconds": round(state["seconds"]),
        "device": "CPU" if device.type == "cpu" else torch.accelerator.current_accelerator().type.upper(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "losses": state["losses"],
    }
    (folder / "log.json").write_text(json.dumps(log))
    return model.eval(), log


def _resume(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer]) -> dict:
    """The state of an interrupted run, loaded into the model and its optimisers; a new one where there is none."""
    if not path.exists():
        return {"step": 0, "seconds": 0.0, "losses": []}
    held = torch.load(path, map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(held["model"])
    for opt, state in zip(opts, held["optimizers"], strict=True):
        opt.load_state_dict(state)
    return held["run"]


def _save(path: Path, model: nn.Module, opts: list[torch.optim.Optimizer], run: dict) -> None:
    """Write the checkpoint whole or not at all."""
    fresh = path.with_suffix(".new")
    torch.save({"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts], "run": run}, fresh)
    fresh.replace(path)
