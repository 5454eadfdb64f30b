"""Interactive figures that need no kernel.

Every frame is drawn once, when the page is executed, and kept in nested stacks of widgets; the sliders are tied to the
stacks in the browser (`jslink`). The same figure therefore answers on a static site, offline, and in Jupyter. In a live
kernel it also draws settings between the frames.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import ipywidgets as widgets
from IPython.display import display
from matplotlib.figure import Figure

from paperbook.figures import encode, image_tag, require_alt

MAX_FRAMES = 24
MAX_BYTES = 400_000
FRAME_DPI = 100

Draw = Callable[..., tuple[Figure, str]]


def in_press() -> bool:
    """Is the press executing this page, so that nobody will ever answer a live control?"""
    return os.environ.get("PAPERLAB_PRESS") == "1"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _frame(draw: Draw, setting: dict[str, Any]) -> tuple[widgets.HTML, int]:
    """One drawn frame as a widget, and its size in bytes."""
    named = ", ".join(f"{name} = {_text(value)}" for name, value in setting.items())
    drawn = draw(**setting)
    if not (isinstance(drawn, tuple) and len(drawn) == 2 and isinstance(drawn[0], Figure)):
        raise ValueError(f"draw must return (figure, alt), got {type(drawn).__name__} at {named}")
    data, size = encode(drawn[0], dpi=FRAME_DPI)
    return widgets.HTML(image_tag(data, size, f"{named}. {require_alt(drawn[1])}")), len(data)


def _live_controls(draw: Draw, sweeps: dict[str, Sequence]) -> widgets.Widget | None:
    """Sliders over everything between the frames; only for sweeps of numbers, and only with a kernel to answer."""
    sliders = {}
    for name, values in sweeps.items():
        if not all(isinstance(v, Real) and not isinstance(v, bool) for v in values) or len(values) < 2:
            return None
        low, high = min(values), max(values)
        whole = all(isinstance(v, Integral) for v in values)
        step = 1 if whole else 10 ** math.floor(math.log10((high - low) / 100))
        kind = widgets.IntSlider if whole else widgets.FloatSlider
        sliders[name] = kind(values[0], min=low, max=high, step=step, description=name, continuous_update=False)
    picture = widgets.HTML()

    def redraw(_: object = None) -> None:
        picture.value = _frame(draw, {name: slider.value for name, slider in sliders.items()})[0].value

    for slider in sliders.values():
        slider.observe(redraw, "value")
    box = widgets.Accordion([widgets.VBox([*sliders.values(), picture])], titles=("Between the frames (live kernel)",))
    box.selected_index = None
    box.observe(lambda change: redraw() if change["new"] == 0 and not picture.value else None, "selected_index")
    return box


def explore(
    draw: Draw,
    *,
    labels: dict[str, str] | None = None,
    start: dict[str, int] | None = None,
    **sweeps: Sequence,
) -> None:
    """A figure with one or two sliders: ``explore(draw, beta=[0.5, 1, 2], n=[4, 8])``.

    ``draw(beta=…, n=…)`` returns a figure and its description. ``labels`` names the sliders for people, ``start`` gives
    the index of the setting shown first.

    Raises:
        ValueError: no or more than two sweeps, an empty sweep, more than 24 frames, frames that together are too large
            (with the largest setting named), an unknown name in ``labels`` or ``start``, a ``draw`` that does not
            return a figure with a description.
    """
    labels, start = labels or {}, start or {}
    if not 1 <= len(sweeps) <= 2:
        raise ValueError(f"explore takes one or two sweeps, got {', '.join(sweeps) or 'none'}")
    for name, values in sweeps.items():
        if len(values) == 0:
            raise ValueError(f"{name} must hold at least one setting")
        if not 0 <= start.get(name, 0) < len(values):
            raise ValueError(f"start: {name} has settings 0 to {len(values) - 1}, got {start[name]}")
    for argument, given in {"labels": labels, "start": start}.items():
        if set(given) - set(sweeps):
            raise ValueError(f"{argument} names {', '.join(sorted(set(given) - set(sweeps)))}, which is not a sweep")
    frames = math.prod(map(len, sweeps.values()))
    if frames > MAX_FRAMES:
        counts = " x ".join(f"{len(values)} of {name}" for name, values in sweeps.items())
        raise ValueError(f"explore keeps at most {MAX_FRAMES} frames, got {counts} = {frames}")

    names = list(sweeps)
    pictures, sizes = {}, {}
    for setting in itertools.product(*sweeps.values()):
        pictures[setting], sizes[setting] = _frame(draw, dict(zip(names, setting, strict=True)))
    if sum(sizes.values()) > MAX_BYTES:
        worst = max(sizes, key=sizes.get)
        at = ", ".join(f"{name} = {_text(value)}" for name, value in zip(names, worst, strict=True))
        raise ValueError(
            f"the frames weigh {sum(sizes.values()) / 1000:.0f} kB together, at most {MAX_BYTES / 1000:.0f} kB fit; the"
            f" largest is {at} with {sizes[worst] / 1000:.0f} kB. Draw fewer points, or a smaller figure"
        )

    sliders = [
        widgets.SelectionSlider(
            options=[(_text(value), k) for k, value in enumerate(values)],
            index=start.get(name, 0),
            description=labels.get(name, name),
            continuous_update=True,
            style={"description_width": "initial"},
            layout={"width": "95%"},
        )
        for name, values in sweeps.items()
    ]
    first, *rest = sweeps.values()
    if rest:
        stacks = [widgets.Stack([pictures[a, b] for b in rest[0]], selected_index=sliders[1].index) for a in first]
        for stack in stacks:
            widgets.jslink((sliders[1], "index"), (stack, "selected_index"))
    else:
        stacks = [pictures[(a,)] for a in first]
    shown = widgets.Stack(stacks, selected_index=sliders[0].index)
    widgets.jslink((sliders[0], "index"), (shown, "selected_index"))
    live = None if in_press() else _live_controls(draw, sweeps)
    box = widgets.VBox([*sliders, shown, *([live] if live else [])])
    box.add_class("paperlab-explore")
    display(box)
