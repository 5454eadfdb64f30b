"""Scenes: everything that they promise about boxes, classes, overlap and pixels."""

import pytest
import torch

from paperlab.data.shapes import make_scenes, shifted
from paperlab.detection import box_iou, crowding


def test_a_scene_keeps_its_promises():
    scenes = make_scenes(200, seed=0, objects=(3, 8), sides=(10.0, 20.0))
    real = scenes.labels >= 0
    assert scenes.images.shape == (200, 3, 48, 48)
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert set(real.sum(1).tolist()) == set(range(3, 9))  # every number of objects occurs, and no other
    assert set(scenes.labels[real].tolist()) == {0, 1}
    boxes = scenes.boxes[real]
    assert (boxes >= -1e-4).all()
    assert (boxes <= 48 + 1e-4).all()
    sides = boxes[:, 2:] - boxes[:, :2]
    assert sides.min() >= 10 - 1e-3
    assert sides.max() <= 20 + 1e-3
    assert (scenes.boxes[~real] == 0).all()


def test_a_seed_repeats_and_another_does_not():
    a, b, c = (make_scenes(20, seed=s) for s in (4, 4, 5))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a.images, c.images)


@pytest.mark.parametrize("wanted", [0.1, 0.35, 0.6])
def test_pairs_overlap_by_as_much_as_asked(wanted):
    scenes = make_scenes(100, seed=1, objects=(2, 2), crowded=1.0, overlap=(wanted, wanted))
    measured = crowding(scenes.boxes, scenes.labels)[:, 0]
    assert ((measured - wanted).abs() < 1e-3).float().mean() > 0.95  # a few find no room and stand alone
    assert (scenes.labels[:, 0] == scenes.labels[:, 1]).float().mean() > 0.95


def test_without_crowding_sparse_objects_keep_apart():
    scenes = make_scenes(200, seed=2, objects=(2, 3), sides=(8.0, 12.0), crowded=0.0)
    assert crowding(scenes.boxes, scenes.labels).max() <= 0.05


def test_shifted_agrees_with_the_closed_form():
    # Equal boxes moved along x: overlap (w - d) / (w + d), so that d = w (1 - o) / (1 + o).
    box = torch.tensor([[10.0, 10.0, 20.0, 30.0]])
    o = torch.tensor([0.25])
    moved = shifted(box, torch.tensor([[10.0, 20.0]]), torch.tensor([[1.0, 0.0]]), o)
    distance = 10 * (1 - 0.25) / (1 + 0.25)
    torch.testing.assert_close(moved, box + torch.tensor([distance, 0, distance, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(box_iou(box, moved)[0], o, atol=1e-4, rtol=0)


def test_pixels_show_the_object_inside_its_box_only():
    lone = make_scenes(30, seed=3, objects=(1, 1), crowded=0.0)
    for image, box in zip(lone.images, lone.boxes[:, 0], strict=True):
        x0, y0, x1, y1 = (round(v) for v in box.tolist())
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        # The ground is a plane: fit it outside the box, and nothing but noise may be left there.
        y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
        plane = torch.stack([torch.ones(48, 48), x, y], -1)
        grown = torch.zeros_like(inside)
        grown[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2] = True
        fit = torch.linalg.lstsq(plane[~grown], image.permute(1, 2, 0)[~grown]).solution
        rest = (image.permute(1, 2, 0) - plane @ fit).abs().mean(-1)
        assert rest[~grown].mean() < 0.06
        assert rest[inside].mean() > rest[~grown].mean()


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"n": 0}, "n"),
        ({"objects": (0, 3)}, "objects"),
        ({"objects": (5, 3)}, "objects"),
        ({"crowded": 1.5}, "crowded"),
        ({"overlap": (0.1, 0.95)}, "overlap"),
        ({"sides": (10.0, 60.0)}, "sides"),
    ],
)
def test_bad_arguments_are_named(bad, name):
    with pytest.raises(ValueError, match=name):
        make_scenes(**{"n": 2, "seed": 0, **bad})
