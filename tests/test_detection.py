"""Overlaps, matching, average precision and the detector, against plain loops that share no code with them."""

import numpy as np
import pytest
import torch

from paperlab.data.shapes import make_scenes
from paperlab.detection import (
    COCO_THRESHOLDS,
    CentreDetector,
    average_precision,
    box_iou,
    centre_targets,
    coco_ap,
    crowding,
    match,
    precision_recall,
    propose,
    train_detectors,
    truth_overlaps,
)


def some_boxes(*shape, seed=0, size=20.0):
    g = torch.Generator().manual_seed(seed)
    corner, sides = torch.rand(*shape, 2, generator=g) * size, 3 + torch.rand(*shape, 2, generator=g) * 8
    return torch.cat([corner, corner + sides], -1)


def plain_iou(a, b):
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def plain_ap(scores, boxes, truth, labels, threshold):
    """COCO's average precision, image by image and box by box, straight from its definition."""
    values = []
    for c in range(scores.shape[1]):
        results, positives = [], 0
        for i in range(len(scores)):
            objects = [truth[i, m].tolist() for m in range(truth.shape[1]) if labels[i, m] == c]
            positives += len(objects)
            taken = set()
            for k in sorted(range(scores.shape[2]), key=lambda k: -scores[i, c, k]):
                if scores[i, c, k] == 0:
                    continue
                best, which = -1.0, None
                for m, box in enumerate(objects):
                    value = plain_iou(boxes[i, c, k].tolist(), box)
                    if m not in taken and value > best:
                        best, which = value, m
                hit = best >= threshold
                if hit:
                    taken.add(which)
                results.append((float(scores[i, c, k]), hit))
        results.sort(key=lambda r: -r[0])
        true = np.cumsum([hit for _, hit in results])
        recall, precision = true / positives, true / np.arange(1, len(true) + 1)
        grid = [max((p for r, p in zip(recall, precision, strict=True) if r >= rho - 1e-9), default=0.0)
                for rho in np.linspace(0, 1, 101)]  # fmt: skip
        values.append(np.mean(grid))
    return np.mean(values)


@pytest.fixture(scope="module")
def crowd():
    """Proposals scattered around true boxes, with every kind of mistake in them."""
    truth = some_boxes(6, 5, seed=1)
    labels = torch.randint(-1, 2, (6, 5), generator=torch.Generator().manual_seed(2))
    labels[:, 0], labels[:, 1] = 0, 1
    g = torch.Generator().manual_seed(3)
    near = truth[:, None].repeat(1, 2, 4, 1) + torch.randn(6, 2, 20, 4, generator=g)
    near[..., 2:] = torch.maximum(near[..., 2:], near[..., :2] + 1)
    scores = torch.rand(6, 2, 20, generator=g) * (torch.rand(6, 2, 20, generator=g) > 0.2)
    return scores, near, truth, labels


def test_overlaps_agree_with_a_loop():
    a, b = some_boxes(12, seed=4), some_boxes(9, seed=5)
    expected = [[plain_iou(x.tolist(), y.tolist()) for y in b] for x in a]
    torch.testing.assert_close(box_iou(a, b), torch.tensor(expected), atol=1e-5, rtol=0)
    assert (box_iou(a, a).diagonal() - 1).abs().max() < 1e-5
    torch.testing.assert_close(box_iou(a * 3 + 5, b * 3 + 5), box_iou(a, b), atol=1e-4, rtol=0)  # units and origin
    assert box_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_crowding_sees_the_own_class_only():
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 5, 10, 15], [0, 0, 10, 10], [0, 0, 0, 0]]])
    labels = torch.tensor([[0, 0, 1, -1]])
    torch.testing.assert_close(crowding(boxes, labels), torch.tensor([[1 / 3, 1 / 3, 0.0, 0.0]]))


@pytest.mark.parametrize("threshold", [0.5, 0.65, 0.75])
def test_average_precision_agrees_with_a_loop(crowd, threshold):
    scores, boxes, truth, labels = crowd
    ours = coco_ap(scores, truth_overlaps(boxes, truth, labels), labels, thresholds=(threshold,)).item()
    assert 0 < ours < 1
    assert ours == pytest.approx(plain_ap(scores, boxes, truth, labels, threshold), abs=1e-9)


def test_average_precision_in_closed_form():
    scores, hits = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([[True], [False], [True], [False]])
    # Of 2 objects: precision 1 up to recall 0.5 (51 grid points), then 2/3 (50 points).
    expected = (51 + 50 * 2 / 3) / 101
    assert average_precision(scores, hits, torch.tensor([2.0])).item() == pytest.approx(expected)
    assert average_precision(scores, hits, torch.tensor([4.0])).item() == pytest.approx((26 + 25 * 2 / 3) / 101)
    assert average_precision(scores, ~hits | hits, torch.tensor([4.0])).item() == pytest.approx(1)


def test_weights_mean_repetition(crowd):
    scores, boxes, truth, labels = crowd
    overlaps = truth_overlaps(boxes, truth, labels)
    counts = torch.tensor([2, 0, 1, 3, 1, 0])
    rows = torch.repeat_interleave(torch.arange(6), counts)
    weighted = coco_ap(scores, overlaps, labels, weights=counts[None].float())
    repeated = coco_ap(scores[rows], overlaps[rows], labels[rows])
    torch.testing.assert_close(weighted, repeated, atol=2e-3, rtol=0)  # equal scores of copies are met in another order
    torch.testing.assert_close(coco_ap(scores, overlaps, labels, weights=torch.full((1, 6), 7.0)),
                               coco_ap(scores, overlaps, labels))  # fmt: skip


def test_perfect_boxes_score_one_and_none_score_zero():
    truth, labels = some_boxes(4, 3, seed=6), torch.tensor([[0, 1, 0]] * 4)
    boxes = truth[:, None].repeat(1, 2, 1, 1)
    scores = torch.stack([(labels == c).float() * 0.9 for c in (0, 1)], 1)
    overlaps = truth_overlaps(boxes, truth, labels)
    torch.testing.assert_close(coco_ap(scores, overlaps, labels), torch.ones(1, 10, dtype=torch.float64))
    assert coco_ap(torch.zeros_like(scores), overlaps, labels).sum() == 0
    assert len(COCO_THRESHOLDS) == 10
    assert COCO_THRESHOLDS[-1] == 0.95


def test_an_object_is_found_once_and_by_the_better_box():
    truth, labels = torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[0]])
    boxes = torch.tensor([[[[0.0, 0, 10, 8], [0, 0, 10, 10]]]])
    hits, found = match(torch.tensor([[[0.6, 0.9]]]), truth_overlaps(boxes, truth, labels), (0.5, 0.9))
    assert hits[0, 0].tolist() == [[False, False], [True, True]]
    assert found[0, 0].tolist() == pytest.approx([0.9, 0.9])
    hits, found = match(torch.tensor([[[0.9, 0.6]]]), truth_overlaps(boxes, truth, labels), (0.5, 0.9))
    assert hits[0, 0].tolist() == [[True, False], [False, True]]
    assert found[0, 0].tolist() == pytest.approx([0.9, 0.6])


def test_precision_and_recall_by_hand():
    recall, precision = precision_recall(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([True, True, False]), 4)
    torch.testing.assert_close(recall, torch.tensor([0.25, 0.25, 0.5]))
    torch.testing.assert_close(precision, torch.tensor([1.0, 0.5, 2 / 3]))


def test_targets_peak_at_the_centres():
    boxes, labels = torch.tensor([[[7.0, 15, 19, 31], [0, 0, 0, 0]]]), torch.tensor([[1, -1]])
    heat, box, weight = centre_targets(boxes, labels, 2, 48, 2)
    assert heat[0, 0].max() == 0
    row, column = divmod(int(heat[0, 1].argmax()), 24)
    assert abs(2 * column + 1 - 13) <= 1  # the cell's centre, in pixels, beside the box's
    assert abs(2 * row + 1 - 23) <= 1
    assert weight[0, 0].argmax() == heat[0, 1].argmax()
    assert box[0, :, row, column].tolist() == [7, 15, 19, 31]


def test_proposals_are_sorted_and_peaks_are_fewer():
    torch.manual_seed(0)
    model, images = CentreDetector().eval(), torch.rand(3, 3, 48, 48)
    raw, peaks = propose(model, images, top=400), propose(model, images, top=400, peak=3)
    assert raw.boxes.shape == (3, 2, 400, 4)
    assert (raw.scores.diff(dim=-1) <= 0).all()
    assert (raw.boxes[..., 2:] >= raw.boxes[..., :2]).all()
    assert (peaks.scores == 0).any()
    logits, boxes = model(images)
    assert logits.sigmoid().flatten(2).max(-1).values[0, 0].item() == pytest.approx(raw.scores[0, 0, 0].item())
    cell = logits[0, 0].flatten().argmax()
    torch.testing.assert_close(raw.boxes[0, 0, 0], boxes[0].flatten(1)[:, cell].detach())


def test_training_learns_and_repeats():
    scenes = make_scenes(200, seed=0, objects=(1, 3), crowded=0.0, sides=(14.0, 20.0))
    torch.manual_seed(11)
    alone = [part[None] for part in scenes]
    (model,), (again,) = (train_detectors(*alone, seeds=[1], steps=60) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    raw = CentreDetector().eval()
    ap = []
    for m in (raw, model):
        p = propose(m, scenes.images[:60], top=30, peak=3)
        overlaps = truth_overlaps(p.boxes, scenes.boxes[:60], scenes.labels[:60])
        ap.append(coco_ap(p.scores, overlaps, scenes.labels[:60])[0, 0].item())
    assert ap[1] > ap[0] + 0.2
    assert 30_000 < sum(x.numel() for x in model.parameters()) < 50_000


def test_detectors_side_by_side_do_not_see_each_other():
    parts = [make_scenes(40, seed=s, objects=(1, 3), crowded=0.0) for s in (0, 1)]
    both = [torch.stack(part) for part in zip(*parts, strict=True)]
    together = train_detectors(*both, seeds=[3, 4], steps=6, batch=4)
    for scenes, seed, model in zip(parts, (3, 4), together, strict=True):
        (alone,) = train_detectors(*(part[None] for part in scenes), seeds=[seed], steps=6, batch=4)
        for ours, theirs in zip(model(scenes.images[:5]), alone(scenes.images[:5]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)  # six steps of rounding
    assert not torch.allclose(together[0].head.weight, together[1].head.weight, atol=0.01)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="scores"):
        match(torch.full((1, 1, 2), torch.nan), torch.zeros(1, 1, 2, 1))
    with pytest.raises(ValueError, match="thresholds"):
        match(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 1), ())
    with pytest.raises(ValueError, match="thresholds"):
        match(torch.zeros(1, 1, 2), torch.zeros(1, 1, 2, 1), (0.0, 0.5))
    none = torch.full((1, 4, 2), -1)
    with pytest.raises(ValueError, match="seeds"):
        train_detectors(torch.zeros(1, 4, 3, 48, 48), torch.zeros(1, 4, 2, 4), none, seeds=[], steps=1)
    with pytest.raises(ValueError, match="positives"):
        average_precision(torch.ones(2), torch.ones(2, 1, dtype=torch.bool), torch.zeros(1))
    with pytest.raises(ValueError, match="peak"):
        propose(CentreDetector(), torch.zeros(1, 3, 48, 48), top=5, peak=2)
    with pytest.raises(ValueError, match="classes"):
        CentreDetector(0)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(crowd):
    scores, boxes, truth, labels = (x.to(torch.device("cuda")) for x in crowd)
    there = coco_ap(scores, truth_overlaps(boxes, truth, labels), labels).cpu()
    scores, boxes, truth, labels = crowd
    torch.testing.assert_close(there, coco_ap(scores, truth_overlaps(boxes, truth, labels), labels))
