"""Argument checks that name the argument.

A wrong argument should fail where it enters, with its name and its value, and not three calls later as a NaN. Every
function takes its arguments by keyword, so that the name in the message is the name in the caller's signature:
``require_positive(temperature=temperature)``. Numbers, NumPy arrays and torch tensors are all welcome.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np


def _array(value: Any) -> np.ndarray:
    """The value as a NumPy array; of a torch tensor without its graph, wherever it lives."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype.itemsize < 4:  # NumPy has no bfloat16
            value = value.float()
    return np.asarray(value)


def _fail(name: str, rule: str, value: Any) -> None:
    array = _array(value)
    shown = repr(array.item()) if array.size == 1 else f"an array of shape {array.shape}"
    raise ValueError(f"{name} must be {rule}, got {shown}")


def require_finite(**named: Any) -> None:
    """Every element is neither NaN nor infinite."""
    for name, value in named.items():
        if not np.isfinite(_array(value)).all():
            _fail(name, "finite", value)


def require_positive(**named: Any) -> None:
    """Every element is finite and greater than 0."""
    for name, value in named.items():
        array = _array(value)
        if not (np.isfinite(array) & (array > 0)).all():
            _fail(name, "positive and finite", value)


def require_nonnegative(**named: Any) -> None:
    """Every element is finite and at least 0."""
    for name, value in named.items():
        array = _array(value)
        if not (np.isfinite(array) & (array >= 0)).all():
            _fail(name, "at least 0 and finite", value)


def require_between(low: float, high: float, /, **named: Any) -> None:
    """Every element lies in the closed interval from ``low`` to ``high``."""
    for name, value in named.items():
        array = _array(value)
        if not ((array >= low) & (array <= high)).all():
            _fail(name, f"between {low} and {high}", value)


def require_at_least(minimum: float, /, **named: Any) -> None:
    """Every element is at least ``minimum``, and not NaN."""
    for name, value in named.items():
        if not (_array(value) >= minimum).all():
            _fail(name, f"at least {minimum}", value)


def require_one_of(options: Collection, /, **named: Any) -> None:
    """The value is one of ``options``."""
    for name, value in named.items():
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")


def require_nonempty(**named: Any) -> None:
    """The value holds at least one element."""
    for name, value in named.items():
        if (math.prod(value.shape) if hasattr(value, "shape") else len(value)) == 0:
            raise ValueError(f"{name} must not be empty")


def require_ndim(ndim: int, /, **named: Any) -> None:
    """The array has ``ndim`` axes."""
    for name, value in named.items():
        if len(value.shape) != ndim:
            raise ValueError(f"{name} must have {ndim} axes, got shape {tuple(value.shape)}")


def require_same_length(**named: Any) -> None:
    """All values have the same length along their first axis."""
    lengths = {name: len(value) for name, value in named.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError("must have the same length: " + ", ".join(f"{k} has {v}" for k, v in lengths.items()))


def require_labels(scores: Any, labels: Any) -> None:
    """``scores`` has at least two classes on its last axis, and every one of ``labels`` is one of them."""
    require_at_least(2, **{"number of classes in scores": scores.shape[-1]})
    require_between(0, scores.shape[-1] - 1, labels=labels)
