"""Soft-NMS against a plain loop over lists, against greedy NMS, and in its limits."""

import math

import pytest
import torch

from paperlab.detection import box_iou
from paperlab.vision.soft_nms import average_boxes, count_decays, gaussian, hard, linear, rescore, turns


def clustered(batch=3, n=25, seed=0):
    """Scores and overlaps of boxes that crowd around a few places."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randint(0, 4, (batch, n, 1), generator=g) * 9.0 + torch.randn(batch, n, 2, generator=g) * 2.5
    half = 4 + torch.rand(batch, n, 2, generator=g) * 2
    boxes = torch.cat([centre - half, centre + half], -1)
    return torch.rand(batch, n, generator=g) * 0.98 + 0.01, box_iou(boxes, boxes).clamp(max=1), boxes


def plain_greedy(scores, overlap, threshold):
    """Greedy NMS as everybody writes it: sort once, keep what no kept box overlaps by the threshold or more."""
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(overlap[j][i] < threshold for j in kept):
            kept.append(i)
    return set(kept)


def plain_soft(scores, overlap, factor, floor):
    """Soft-NMS over lists that shrink; returns {box: final score}."""
    waiting, final = dict(enumerate(scores)), {}
    while waiting:
        best = max(waiting, key=waiting.get)
        final[best] = waiting.pop(best)
        for i in list(waiting):
            waiting[i] *= factor(overlap[best][i])
            if waiting[i] < floor or waiting[i] == 0:
                del waiting[i]
    return final


FACTORS = {
    "hard": (hard(0.45), lambda u: 0.0 if u >= 0.45 else 1.0),
    "linear": (linear(0.3), lambda u: 1 - u if u >= 0.3 else 1.0),
    "gaussian": (gaussian(0.5), lambda u: math.exp(-u * u / 0.5)),
}


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_hard_mode_is_greedy_nms(threshold):
    scores, overlaps, _ = clustered()
    final = rescore(scores, overlaps, hard(threshold))
    for s, o, f in zip(scores.tolist(), overlaps.tolist(), final, strict=True):
        assert set(f.nonzero()[:, 0].tolist()) == plain_greedy(s, o, threshold)
    assert ((final == scores) | (final == 0)).all()


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.05])
def test_every_rule_agrees_with_a_loop_over_lists(name, floor):
    scores, overlaps, _ = clustered(seed=1)
    rule, factor = FACTORS[name]
    final = rescore(scores.double(), overlaps.double(), rule, floor=floor)
    for s, o, f in zip(scores.double().tolist(), overlaps.double().tolist(), final, strict=True):
        expected = plain_soft(s, o, factor, floor)
        torch.testing.assert_close(f, torch.tensor([expected.get(i, 0.0) for i in range(len(s))], dtype=f.dtype))


def test_limits():
    scores, overlaps, _ = clustered(seed=2)
    sharp = rescore(scores, overlaps, gaussian(1e-9))
    for s, o, f in zip(scores.tolist(), overlaps.tolist(), sharp, strict=True):
        assert set(f.nonzero()[:, 0].tolist()) == plain_greedy(s, o, 1e-4)  # disjoint boxes only, at full score
    assert ((sharp == 0) | ((sharp / scores - 1).abs() < 1e-3)).all()
    torch.testing.assert_close(rescore(scores, overlaps, gaussian(1e9)), scores, atol=1e-5, rtol=0)
    assert torch.equal(rescore(scores, overlaps, linear(1.1)), scores)
    assert torch.equal(rescore(scores, overlaps, hard(1.1)), scores)


@pytest.mark.parametrize("name", FACTORS)
def test_invariants(name):
    scores, overlaps, _ = clustered(seed=3)
    rule, _ = FACTORS[name]
    final = rescore(scores, overlaps, rule)
    top = scores.argmax(-1, keepdim=True)
    assert torch.equal(final.gather(-1, top), scores.gather(-1, top))  # the first pick's score never changes
    assert (final <= scores).all()  # no score rises
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(0))
    shuffled = rescore(scores[:, order], overlaps[:, order][:, :, order], rule)
    torch.testing.assert_close(shuffled, final[:, order])  # the order of the input does not matter
    alone = torch.stack([rescore(s, o, rule) for s, o in zip(scores, overlaps, strict=True)])
    torch.testing.assert_close(alone, final)  # nor does the company in the batch


def test_picks_come_in_falling_order_of_their_final_scores():
    scores, overlaps, _ = clustered(batch=1, seed=4)
    final = rescore(scores, overlaps, gaussian(0.5), floor=0.0)[0]
    picks = [int(turn.pick[0]) for turn in turns(scores, overlaps, gaussian(0.5), floor=0.0)]
    assert sorted(picks) == list(range(25))
    assert (final[picks].diff() <= 1e-7).all()


def test_the_worked_example_and_the_switches():
    # C (0.85, overlap 0.5 with A) overtakes B (0.90, overlap 0.8 with A) once A has been picked.
    scores, o = torch.tensor([0.95, 0.90, 0.85]), torch.tensor([[1, 0.8, 0.5], [0.8, 1, 0.4], [0.5, 0.4, 1]])
    after_a = 0.9 * math.exp(-1.28), 0.85 * math.exp(-0.5)
    expected = torch.tensor([0.95, after_a[0] * math.exp(-0.32), after_a[1]])
    torch.testing.assert_close(rescore(scores, o, gaussian(0.5)), expected)
    sorted_once = torch.tensor([0.95, after_a[0], after_a[1] * math.exp(-0.32)])
    torch.testing.assert_close(rescore(scores, o, gaussian(0.5), rerank=False), sorted_once)
    torch.testing.assert_close(rescore(scores, o, gaussian(0.5), first_only=True), torch.tensor([0.95, *after_a]))


def test_linear_jumps_at_its_threshold_and_gaussian_does_not():
    at = torch.tensor([0.3 - 1e-4, 0.3 + 1e-4])
    assert linear(0.3)(at).diff().item() == pytest.approx(-0.3, abs=1e-3)
    assert abs(gaussian(0.5)(at).diff().item()) < 1e-3
    assert hard(0.3)(torch.tensor([0.3])).item() == 0  # at the threshold itself a box goes


def test_work_is_counted_exactly():
    scores, n = torch.rand(2, 30, generator=torch.Generator().manual_seed(5)) + 0.1, 30
    for rule in (hard(0.5), gaussian(0.5)):  # nothing overlaps: every pair is met once
        assert count_decays(scores, torch.eye(n).expand(2, n, n), rule).tolist() == [n * (n - 1) // 2] * 2
    assert count_decays(scores, torch.ones(2, n, n), hard(0.5)).tolist() == [n - 1] * 2  # one pick deletes all
    scores[0, 7:] = 0  # boxes that are not there cost nothing
    assert count_decays(scores, torch.eye(n).expand(2, n, n), gaussian(0.5)).tolist() == [21, n * (n - 1) // 2]


def test_absent_boxes_stay_absent():
    scores, overlaps, _ = clustered(seed=6)
    scores[0], scores[1, 5:] = 0.0, 0.0
    final = rescore(scores, overlaps, gaussian(0.5))
    assert (final[scores == 0] == 0).all()
    torch.testing.assert_close(final[1, :5], rescore(scores[1, :5], overlaps[1, :5, :5], gaussian(0.5)))


def test_averaged_boxes():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12], [50, 50, 60, 60]])
    scores = torch.tensor([0.6, 0.2, 0.5])
    mean = average_boxes(boxes, scores, box_iou(boxes, boxes), 0.5)
    torch.testing.assert_close(mean[0], torch.tensor([0.0, 0, 10, 10.5]))
    torch.testing.assert_close(mean[2], boxes[2])
    torch.testing.assert_close(average_boxes(boxes, scores, box_iou(boxes, boxes), 1.0), boxes)


@pytest.mark.parametrize("rule", [hard, linear, gaussian])
@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_bad_parameters_are_named(rule, bad):
    with pytest.raises(ValueError, match="sigma" if rule is gaussian else "threshold"):
        rule(bad)


def test_bad_input_is_named():
    scores, overlaps, boxes = clustered()
    for bad, name in (((-scores, overlaps), "scores"), ((scores * math.nan, overlaps), "scores"),
                      ((scores, overlaps + 1), "overlaps"), ((scores, overlaps * math.nan), "overlaps")):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            rescore(*bad, gaussian(0.5))
    with pytest.raises(ValueError, match="floor"):
        rescore(scores, overlaps, gaussian(0.5), floor=-1.0)
    with pytest.raises(ValueError, match="threshold"):
        average_boxes(boxes, scores, overlaps, 1.5)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    scores, overlaps, _ = clustered()
    device = torch.device("cuda")
    for rule, _ in FACTORS.values():
        there = rescore(scores.to(device), overlaps.to(device), rule).cpu()
        torch.testing.assert_close(there, rescore(scores, overlaps, rule))
