"""Figures in one style: one width, a colour-blind-safe cycle, and never without a description.

A figure is shown as an HTML image, because a notebook's own image output has no place for alternative text. It stands
on a white card in both colour schemes, so that its colours mean the same by day and by night.
"""

import base64
import html
import inspect
import io
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
from IPython.display import HTML, Markdown, display
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

WIDTH = 7.2  # inches; at DPI the width of the text column on a dense screen
DPI = 150
WEBP_QUALITY = 82

# Okabe and Ito (2008): eight colours that stay apart under every common form of colour blindness.
_CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")


class _Colors(tuple):
    """The cycle by index, and the four roles that recur by name."""

    ours = _CYCLE[0]
    baseline = _CYCLE[1]
    theory = _CYCLE[6]
    muted = "#767676"


colors = _Colors(_CYCLE)

_STYLE = {
    "axes.edgecolor": "#4d4d4d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelsize": 9.5,
    "axes.prop_cycle": plt.cycler(color=_CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "image.cmap": "cividis",
    "image.interpolation": "nearest",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "savefig.facecolor": "white",
    "svg.hashsalt": "paperlab",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


def use_style() -> None:
    """Make every figure of this session look like the book's; `start` calls it."""
    matplotlib.use("agg")
    matplotlib.rcParams.update(_STYLE)


def figure(rows: int = 1, cols: int = 1, *, height: float | None = None, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of the book's width with ``rows`` by ``cols`` axes; ``height`` in inches, by default 2.9 a row.

    Further arguments go to `matplotlib.pyplot.subplots`.

    Raises:
        ValueError: rows, cols or height not positive.
    """
    for name, value in {"rows": rows, "cols": cols, "height": height if height is not None else 1}.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    return plt.subplots(rows, cols, figsize=(WIDTH, height or 2.9 * rows), **subplots)


def require_alt(alt: str) -> str:
    """The description, stripped.

    Raises:
        ValueError: it is missing or says hardly anything.
    """
    if not isinstance(alt, str) or len(alt.split()) < 4:
        raise ValueError(f"alt must say in words what the figure shows, for readers who cannot see it; got {alt!r}")
    return " ".join(alt.split())


def encode(fig: Figure, *, dpi: int = DPI, quality: int = WEBP_QUALITY) -> tuple[bytes, tuple[int, int]]:
    """The figure as WebP bytes and its size in pixels; closes it."""
    canvas = FigureCanvasAgg(fig)
    fig.set_dpi(dpi)
    canvas.draw()  # once: `savefig` would lay the figure out, draw it and compress it as PNG first
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    plt.close(fig)
    out = io.BytesIO()
    image.save(out, format="webp", quality=quality, method=2)
    return out.getvalue(), image.size


def image_tag(data: bytes, size: tuple[int, int], alt: str) -> str:
    """An `<img>` that carries its own data, so that a page needs no second request."""
    source = base64.b64encode(data).decode()
    return (
        f'<img class="paperlab-figure dark-light" alt="{html.escape(alt)}" width="{size[0]}" height="{size[1]}" '
        f'src="data:image/webp;base64,{source}">'
    )


def show(fig: Figure, *, alt: str, caption: str = "") -> None:
    """Display a figure with its description for those who cannot see it; ``caption`` may hold HTML.

    Raises:
        ValueError: ``alt`` is missing or too short to describe anything.
    """
    tag = image_tag(*encode(fig), require_alt(alt))
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    display(HTML(f'<figure class="paperlab-card">{tag}{below}</figure>'))


def say(text: str, **numbers: Any) -> None:
    """A paragraph of Markdown whose numbers are computed here: ``say("{x:.1f} times faster", x=ratio)``.

    Raises:
        ValueError: a name in braces has no value, or a value is not used.
    """
    from string import Formatter

    used = {name.split(".")[0].split("[")[0] for _, name, _, _ in Formatter().parse(text) if name}
    if used != set(numbers):
        raise ValueError(
            f"say: names and values must match; only one side has {', '.join(sorted(used ^ set(numbers)))}"
        )
    display(Markdown(text.format(**numbers)))


def show_source(*objects: Callable | type) -> None:
    """The library's own source of functions or classes, highlighted: what the reader sees is what runs.

    Raises:
        ValueError: nothing to show, or an object without source.
    """
    if not objects:
        raise ValueError("objects must name at least one function or class")
    for thing in objects:
        try:
            source = inspect.getsource(thing)
        except (TypeError, OSError) as error:
            raise ValueError(f"objects: no source for {thing!r}: {error}") from None
        name = f"{thing.__module__}.{thing.__qualname__}"
        display(Markdown(f"```python\n{textwrap.dedent(source).rstrip()}\n```"),
                metadata={"paperlab": SimpleNamespace(source=name).__dict__})  # fmt: skip
