"""The page about the pocket models, from the cards that measuring them wrote: nothing here is typed by hand."""

import base64
import html
import io
import json
import math
from pathlib import Path

from PIL import Image

from paperbook.site.pages import raw


def cards(root: Path) -> list[dict]:
    """The cards of all models, by name."""
    folder = root / "lib" / "paperlab" / "zoo" / "weights"
    return [json.loads(path.read_text()) for path in sorted(folder.glob("pocket-*.json"))]


def scores(root: Path) -> str:
    """How each model was made, and its scores beside what was asked for."""
    lines = []
    for card in cards(root):
        lines += [f"### {card['name']}", "",
                  f"{card['parameters'] / 1e6:.2f} million parameters in {card['bytes'] / 1e6:.1f} MB; "
                  f"{card['seen'] / 1e6:.1f} million {card['unit']} seen in {card['seconds'] / 60:.0f} minutes "
                  f"({card['device']}).", "", "| held-out score | value and 95% interval | n | asked for |",
                  "| --- | --- | --- | --- |"]  # fmt: skip
        for name, score in card["scores"].items():
            bar = score.get("bar")
            asked = "" if bar is None else f"≥ {bar:g}: {'reached' if score['value'] >= bar else '**not reached**'}"
            value = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            lines.append(f"| {name} | {value} | {score['n']} | {asked} |")
        lines.append("")
    return "\n".join(lines)


def heads(root: Path, name: str) -> str:
    """Maps of a model's heads, layer by layer: the deeper the ground, the higher the score on it. Then, where each map
    is highest.
    """
    maps, highest = [], []
    for what, rows in _card(root, name)["heads"].items():
        score, layer, head = max((x, i, j) for i, row in enumerate(rows) for j, x in enumerate(row))
        highest.append(f"{what} in layer {layer}, head {head} ({score:.2f})")
        columns = "".join(f'<th scope="col">head {k}</th>' for k in range(len(rows[0])))
        body = "".join(
            f'<tr><th scope="row">layer {layer}</th>'
            + "".join(f'<td style="--score: {min(1.0, max(0.0, x)):.3f}">{x:.2f}</td>' for x in row)
            + "</tr>"
            for layer, row in enumerate(rows)
        )
        maps.append(f'<table class="paperlab-heads"><caption>{html.escape(what)}</caption><thead><tr><td></td>'
                    f"{columns}</tr></thead><tbody>{body}</tbody></table>")  # fmt: skip
    table = raw(f'<div class="paperlab-scroll" tabindex="0" role="region" aria-label="Heads of {name}">'
                f"{''.join(maps)}</div>")  # fmt: skip
    return f"{table}\n\nHighest: {', '.join(highest)}."


def stream(root: Path, name: str) -> str:
    """The sizes of a model's residual stream, a row a layer; then the largest of all beside its layer's median."""
    sizes = _card(root, name)["stream"]
    lines = [f"| after layer | {' | '.join(sizes)} |", "| --- |" + " --- |" * len(sizes)]
    for layer, row in enumerate(zip(*sizes.values(), strict=True)):
        lines.append(f"| {layer} | {' | '.join(f'{x:.1f}' for x in row)} |")
    ratio, where, layer = max(
        (x / median, what, layer)
        for what, values in sizes.items()
        for layer, (x, median) in enumerate(zip(values, sizes["median"], strict=True))
    )
    lines += ["", f"The largest is {ratio:.0f} times its layer's median ({where}, layer {layer})."]
    return "\n".join(lines)


def samples(root: Path, name: str) -> str:
    """What a model writes: the prompts are in bold."""
    found = "".join(
        f'<pre class="paperlab-sample"><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>'
        for prompt, text in _card(root, name)["samples"]
    )
    return raw(found)


def pictures(root: Path, name: str) -> str:
    """What a model paints: a table, a row a caption and a column a guidance."""
    found: dict[str, dict[float, str]] = {}
    for caption, guidance, pixels in _card(root, name)["pictures"]:
        found.setdefault(caption, {})[guidance] = pixels
    columns = "".join(f'<th scope="col">guidance {g:g}</th>' for g in next(iter(found.values())))
    rows = "".join(
        f'<tr><th scope="row">{html.escape(caption)}</th>'
        + "".join(f"<td>{_picture(pixels, f'{caption} At guidance {g:g}.')}</td>" for g, pixels in row.items())
        + "</tr>"
        for caption, row in found.items()
    )
    return raw(
        f'<table class="paperlab-pictures"><thead><tr><td></td>{columns}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _picture(pixels: str, alt: str) -> str:
    """A square picture from its pixels' bytes."""
    data = base64.b64decode(pixels)
    side, out = math.isqrt(len(data) // 3), io.BytesIO()
    Image.frombytes("RGB", (side, side), data).save(out, format="png")
    source = base64.b64encode(out.getvalue()).decode()
    return f'<img class="dark-light" alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'


def _card(root: Path, name: str) -> dict:
    return next(card for card in cards(root) if card["name"] == name)
