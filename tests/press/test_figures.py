"""Figures carry their description, explorable figures their limits, and source is the library's own."""

import base64
import io
import re

import ipywidgets as widgets
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from paperbook import colors, explore, figure, say, show, show_source, start
from paperbook.claims import Ledger, combine


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    for name in ("figures", "interactive"):
        monkeypatch.setattr(f"paperbook.{name}.display", lambda thing, **_: outputs.append(thing))
    return outputs


def picture(html):
    return Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1])))


def draw(a, b=0):
    fig, ax = figure(height=1.5)
    ax.bar([0], [a + b], color=colors.ours)
    return fig, f"One bar of height {a + b}."


def test_show_has_alt_text_and_closes_the_figure(shown):
    fig, ax = figure()
    ax.plot([0, 1])
    show(fig, alt='A line from "zero" to one.', caption="A <b>line</b>")
    html = shown[0].data
    assert 'alt="A line from &quot;zero&quot; to one."' in html
    assert "<figcaption>A <b>line</b></figcaption>" in html
    assert picture(html).format == "WEBP"
    assert not plt.get_fignums()


@pytest.mark.parametrize("alt", ["", "plot", None])
def test_show_refuses_a_figure_without_description(alt):
    fig, _ = figure()
    with pytest.raises(ValueError, match="alt must say"):
        show(fig, alt=alt)
    plt.close(fig)


def luminance(color):
    def channel(x):
        return x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4

    return sum(w * channel(int(color[k : k + 2], 16) / 255) for w, k in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))


def test_colours_are_readable_on_the_card_and_apart():
    assert len(set(colors)) == 8
    text = 1.05 / (luminance(colors.muted) + 0.05)
    assert text >= 4.5  # WCAG AA for text on white
    assert all(1.05 / (luminance(c) + 0.05) >= 2.2 for c in colors)


def test_say_computes_its_numbers(shown):
    say("It is **{x:.1f}** times {name[0]}.", x=2.345, name=["faster"])
    assert shown[0].data == "It is **2.3** times faster."
    with pytest.raises(ValueError, match="only one side has y"):
        say("{x}", x=1, y=2)
    with pytest.raises(ValueError, match="only one side has z"):
        say("{z}")


def test_show_source_shows_what_runs(shown):
    show_source(combine)
    assert "def combine(" in shown[0].data
    assert shown[0].data.startswith("```python")
    show_source(Ledger.claim)  # a method moves to the left as a whole
    lines = shown[1].data.splitlines()
    assert lines[1].startswith("def claim(")
    assert any(line.startswith('    """') for line in lines)
    with pytest.raises(ValueError, match="no source for"):
        show_source(len)
    with pytest.raises(ValueError, match="at least one"):
        show_source()


def test_explore_draws_every_frame_once_and_links_the_sliders(shown, monkeypatch):
    monkeypatch.setenv("PAPERLAB_PRESS", "1")
    calls = []

    def counted(a, b):
        calls.append((a, b))
        return draw(a, b)

    explore(counted, a=[1, 2, 3], b=[0.5, 10.0], labels={"a": "Height"}, start={"a": 1})
    assert sorted(calls) == sorted((a, b) for a in [1, 2, 3] for b in [0.5, 10.0])
    (box,) = shown
    first, second, outer = box.children
    assert first.description == "Height"
    assert [label for label, _ in second.options] == ["0.5", "10"]
    assert outer.selected_index == first.index == 1
    assert all(isinstance(stack, widgets.Stack) for stack in outer.children)
    alts = [re.search(r'alt="([^"]+)"', f.value)[1] for stack in outer.children for f in stack.children]
    assert alts[0] == "a = 1, b = 0.5. One bar of height 1.5."
    assert len(set(alts)) == 6


def test_explore_with_one_slider(shown, monkeypatch):
    monkeypatch.setenv("PAPERLAB_PRESS", "1")
    explore(draw, a=[1, 2])
    slider, stack = shown[0].children
    assert len(stack.children) == len(slider.options) == 2


def test_a_live_kernel_draws_between_the_frames(shown, monkeypatch):
    monkeypatch.delenv("PAPERLAB_PRESS", raising=False)
    explore(draw, a=[1.0, 2.0], b=[0, 4])
    live = shown[0].children[-1]
    assert isinstance(live, widgets.Accordion)
    live.selected_index = 0
    between, whole, image = live.children[0].children
    between.value = 1.5
    whole.value = 3
    assert "One bar of height 4.5." in image.value


def noisy(a):
    fig, ax = figure(height=3.3)
    ax.imshow(np.random.default_rng(a).random((330, 720)), cmap="gray")
    return fig, "Nothing but grey noise, pixel by pixel."


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: explore(draw, a=range(5), b=range(5)), "at most 24 frames, got 5 of a x 5 of b = 25"),
        (lambda: explore(draw), "one or two sweeps, got none"),
        (lambda: explore(draw, a=[1], b=[1], c=[1]), "one or two sweeps, got a, b, c"),
        (lambda: explore(draw, a=[]), "a must hold at least one setting"),
        (lambda: explore(draw, a=[1], labels={"c": "x"}), "labels names c"),
        (lambda: explore(draw, a=[1], start={"a": 3}), "start: a has settings 0 to 0"),
        (lambda: explore(lambda a: None, a=[1]), r"must return \(figure, alt\), got NoneType at a = 1"),
        (lambda: explore(lambda a: (draw(a)[0], "bar"), a=[1]), "alt must say"),
        (lambda: explore(noisy, a=range(6)), "at most 400 kB fit; the largest is a = "),
    ],
)
def test_explore_refuses_by_name(call, words, monkeypatch):
    monkeypatch.setenv("PAPERLAB_PRESS", "1")
    with pytest.raises(ValueError, match=words):
        call()
    plt.close("all")


def test_profiles(monkeypatch):
    monkeypatch.delenv("PAPERLAB_PROFILE", raising=False)
    run = start("pocket", seed=3)
    assert run.seeds(3) == [3, 4, 5]
    assert run.pick(pocket=1, full=2) == 1
    assert run.device.type == "cpu"
    monkeypatch.setenv("PAPERLAB_PROFILE", "full")
    assert start("pocket").full
    monkeypatch.setenv("PAPERLAB_PROFILE", "huge")
    with pytest.raises(ValueError, match="PAPERLAB_PROFILE must be one of pocket, full, got 'huge'"):
        start("pocket")
    monkeypatch.delenv("PAPERLAB_PROFILE")
    with pytest.raises(ValueError, match="profile must be one of"):
        start("tiny")
    with pytest.raises(ValueError, match="seed must be a whole number"):
        start("pocket", seed=-1)


def test_start_seeds_torch_and_numpy():
    import torch

    def draw_numbers():
        start("pocket", seed=7)
        return torch.rand(3).tolist(), np.random.rand(3).tolist()

    assert draw_numbers() == draw_numbers()
