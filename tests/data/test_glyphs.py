"""Glyphs and textures against SciPy's distances and Fourier transforms, and what their generator promises."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from paperlab.data.glyphs import _grid, _ink, class_strokes, class_waves, draw_glyphs


def test_images_are_pictures_with_labels_and_repeat_from_their_seed():
    images, labels = draw_glyphs(300, seed=3, classes=16, coloured=0.5)
    assert images.shape == (300, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    assert set(labels.tolist()) == set(range(16))
    again, same = draw_glyphs(300, seed=3, classes=16, coloured=0.5)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, draw_glyphs(300, seed=4, classes=16, coloured=0.5)[0])


def test_coloured_is_the_share_of_pictures_that_are_not_grey():
    for share in (0.0, 0.3, 1.0):
        images, _ = draw_glyphs(600, seed=0, coloured=share)
        found = (images.mean((2, 3)).std(1) > 0.02).double().mean().item()  # channels of different mean brightness
        assert found == pytest.approx(share, abs=0.06)


def test_a_class_is_the_same_however_many_there_are():
    assert torch.equal(class_strokes(128)[:8], class_strokes(8))
    assert torch.equal(class_waves(128)[:8], class_waves(8))


def test_every_class_has_a_shape_of_its_own():
    strokes, textures = class_strokes(288)[[k % 4 != 3 for k in range(288)]], class_waves(288)[3::4]
    assert len(torch.unique(strokes.flatten(1), dim=0)) == len(strokes)
    assert len(torch.unique(textures, dim=0)) == len(textures)


def test_ink_lies_within_a_pens_width_of_the_curve():
    # Distances of SciPy to a finely sampled curve; ours are to the segments of a coarse one.
    uniform = torch.full((1, 10), 0.5)  # no turn, no shear, no shift
    uniform[0, 3:5] = 0.5
    grid, lines, pen = _grid(uniform, 32), class_strokes(1)[None, 0], torch.tensor([0.15])
    ink = _ink(grid, lines, pen)[0].flatten().numpy()
    t = np.linspace(0, 1, 400)[:, None]
    curve = np.concatenate([(1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c for a, b, c in lines[0].numpy()])
    distance = cdist(grid[0].flatten(0, 1).numpy(), curve).min(1)
    assert (ink[distance < 0.15 - 0.08] == 1).mean() > 0.97
    assert (ink[distance > 0.15 + 0.08] == 0).mean() > 0.97


def test_a_waves_frequency_is_the_one_of_its_class():
    images, labels = draw_glyphs(800, seed=0, classes=48, size=32)
    kinds = class_waves(48)
    for k in (3, 15, 27):  # plane waves of three frequencies
        assert kinds[k, 2] == 0
        spectrum = torch.fft.rfft2(
            images[labels == k].mean(1) - images[labels == k].mean((1, 2, 3))[:, None, None]
        ).abs()
        spectrum = spectrum.mean(0)
        y, x = divmod(int(spectrum.argmax()), spectrum.shape[1])
        found = np.hypot(min(y, 32 - y), x)
        # a page of width 2 shows `frequency` periods; the hand scales it by 0.66 on average
        assert found == pytest.approx(kinds[k, 0].item() / 0.66, rel=0.25)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: draw_glyphs(0, seed=0), "n must"),
        (lambda: draw_glyphs(1, seed=0, classes=2), "classes"),
        (lambda: draw_glyphs(1, seed=0, size=4), "size"),
        (lambda: draw_glyphs(1, seed=0, coloured=1.5), "coloured"),
        (lambda: draw_glyphs(1, seed=-1), "seed"),
        (lambda: class_strokes(0), "classes"),
        (lambda: class_waves(0), "classes"),
    ],
)
def test_bad_input_names_the_argument(call, name):
    with pytest.raises(ValueError, match=name):
        call()
