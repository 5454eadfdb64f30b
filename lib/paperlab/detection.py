r"""Object detection in small: boxes and their overlaps, average precision as COCO measures it, a centre-point detector.

Everything here works on whole sets of images at once. A detector proposes ``k`` scored boxes for every image and class;
an image holds up to ``most`` true objects. Overlap always means intersection over union (IoU), boxes are
(left, top, right, bottom), and a score of 0 marks a box that is not there.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import require_at_least, require_between, require_finite, require_nonempty, require_same_length
from paperlab.devices import generator
from paperlab.training import fit

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * k, 2) for k in range(10))  # 0.50, 0.55, …, 0.95
RECALL_GRID = 101


def box_iou(a: Float[Tensor, "*batch n 4"], b: Float[Tensor, "*batch m 4"]) -> Float[Tensor, "*batch n m"]:
    """Intersection over union of every box of ``a`` with every box of ``b``; 0 where both are empty."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides[..., 0] * sides[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    union = area_a + area_b - shared
    return torch.where(union > 0, shared / union.clamp(min=1e-12), torch.zeros_like(shared))


def truth_overlaps(
    boxes: Float[Tensor, "n classes k 4"], true_boxes: Float[Tensor, "n most 4"], labels: Int[Tensor, "n most"]
) -> Float[Tensor, "n classes k most"]:
    """Overlap of every proposal with every true object of its own class; −1 for objects of another class or none."""
    n, classes, k, _ = boxes.shape
    overlap = box_iou(boxes.flatten(1, 2), true_boxes).view(n, classes, k, -1)
    same = labels[:, None] == torch.arange(classes, device=labels.device)[:, None]
    return overlap.masked_fill(~same[:, :, None], -1.0)


def crowding(boxes: Float[Tensor, "n most 4"], labels: Int[Tensor, "n most"]) -> Float[Tensor, "n most"]:
    """The largest overlap of each true object with another one of its own class; 0 where there is none."""
    same = (labels[:, :, None] == labels[:, None]) & (labels >= 0)[:, :, None]
    same &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    return (box_iou(boxes, boxes) * same).amax(-1)


def match(
    scores: Float[Tensor, "n classes k"],
    overlaps: Float[Tensor, "n classes k most"],
    thresholds: tuple[float, ...] = COCO_THRESHOLDS,
) -> tuple[Bool[Tensor, "n classes k t"], Float[Tensor, "n most t"]]:
    """Give every proposal at most one object and every object at most one proposal, as COCO does.

    From the highest score down, each proposal takes, of the objects of its class that are still free and that it
    overlaps by at least the threshold, the one it overlaps most. Returns which proposals are hits, and for every object
    the score of the proposal that found it (0: none did), each for all ``t`` thresholds.

    Raises:
        ValueError: scores that are not finite, or no threshold.
    """
    require_finite(scores=scores)
    require_nonempty(thresholds=thresholds)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = overlaps.gather(2, order[..., None].expand_as(overlaps))
    cut = torch.tensor(thresholds, device=scores.device, dtype=overlaps.dtype)[:, None]
    free = torch.ones(*scores.shape[:2], len(thresholds), overlaps.shape[-1], dtype=torch.bool, device=scores.device)
    hits = torch.zeros(*scores.shape, len(thresholds), dtype=torch.bool, device=scores.device)
    found = torch.zeros(free.shape, dtype=scores.dtype, device=scores.device)
    for rank in range(int((scores > 0).sum(-1).max())):  # beyond, only boxes that are not there
        score = scores.gather(2, order[..., rank : rank + 1])  # n classes 1
        offer = torch.where(free, ranked[:, :, rank, None], -1.0)  # n classes t most
        best, which = offer.max(-1, keepdim=True)
        hit = (best >= cut) & (score > 0)[..., None]  # n classes t 1
        free.scatter_(3, which, free.gather(3, which) & ~hit)
        found.scatter_add_(3, which, hit * score[..., None])
        hits.scatter_(2, order[..., rank, None, None].expand(-1, -1, 1, len(thresholds)), hit[:, :, None, :, 0])
    return hits, found.sum(1).transpose(1, 2)  # an object is free in its own class only


def average_precision(
    scores: Float[Tensor, " d"],
    hits: Bool[Tensor, "d t"],
    positives: Float[Tensor, " r"],
    weights: Float[Tensor, "r d"] | None = None,
) -> Float[Tensor, "r t"]:
    """Area under the interpolated precision-recall curve, on COCO's grid of 101 recalls, for each of ``t`` thresholds.

    ``weights`` counts each proposal so many times in each of ``r`` resamples (by default once), ``positives`` is the
    number of true objects in each. Precision at recall ρ is the best precision at any recall of at least ρ; it needs to
    be known at the hits only, because between two hits it can but fall.

    Raises:
        ValueError: no true object at all, lengths differ, or scores are not finite.
    """
    require_same_length(scores=scores, hits=hits)
    require_finite(scores=scores)
    require_at_least(1, positives=positives)
    order = scores.argsort(dim=0, descending=True, stable=True)
    w = torch.ones(len(positives), len(scores), device=scores.device) if weights is None else weights
    w = w[:, order].double()
    seen = w.cumsum(1)
    grid = torch.linspace(0, 1, RECALL_GRID, device=scores.device, dtype=torch.float64) - 1e-9
    result = torch.zeros(len(positives), hits.shape[1], device=scores.device, dtype=torch.float64)
    for t in range(hits.shape[1]):
        at = hits[order, t].nonzero()[:, 0]
        if not len(at):
            continue
        true = w[:, at].cumsum(1)
        precision = true / seen[:, at].clamp(min=1e-12)
        best = precision.flip(1).cummax(1).values.flip(1)
        recall = (true / positives[:, None].double()).contiguous()
        place = torch.searchsorted(recall, grid.expand(len(recall), -1).contiguous())
        value = F.pad(best, (0, 1)).gather(1, place)  # beyond the last hit the precision is 0
        result[:, t] = value.mean(1)
    return result


def coco_ap(
    scores: Float[Tensor, "n classes k"],
    overlaps: Float[Tensor, "n classes k most"],
    labels: Int[Tensor, "n most"],
    *,
    thresholds: tuple[float, ...] = COCO_THRESHOLDS,
    weights: Float[Tensor, "r n"] | None = None,
) -> Float[Tensor, "r t"]:
    """Average precision at each threshold, mean over the classes; one row for each of ``r`` weightings of the images.

    Without ``weights`` every image counts once and ``r`` is 1. The mean over COCO's ten thresholds is what is called
    mAP.

    Raises:
        ValueError: as in `match` and `average_precision`; a class of which there is no object.
    """
    hits, _ = match(scores, overlaps, thresholds)
    w = torch.ones(1, len(scores), device=scores.device) if weights is None else weights
    classes = []
    for c in range(scores.shape[1]):
        image, box = (scores[:, c] > 0).nonzero(as_tuple=True)
        positives = w.double() @ (labels == c).sum(1).double()
        classes.append(average_precision(scores[image, c, box], hits[image, c, box], positives, w[:, image]))
    return torch.stack(classes).mean(0)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    """3 by 3 convolution, batch normalisation, ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class CentreDetector(nn.Module):
    """A detector of about 40,000 parameters that asks at every second pixel: what is here, how far are its edges?

    Three strided stages look ever wider, the widest view is added back to the one before, and the head unfolds the
    result to stride 2. Each cell gives a logit per class and the distances to the four edges of its box. No cell knows
    of another cell's answer, so that one object gets a cloud of nearly equal boxes.

    Raises:
        ValueError: ``classes`` below 1.
    """

    stride = 2

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        require_at_least(1, classes=classes)
        self.classes = classes
        self.near = nn.Sequential(convolution(3, 16, 2), convolution(16, 24, 2), convolution(24, 24))
        self.wide = nn.Sequential(convolution(24, 40, 2), convolution(40, 40), nn.Conv2d(40, 24, 1))
        self.joint = convolution(24, 24)
        self.head = nn.Conv2d(24, 4 * (classes + 4), 1)
        nn.init.constant_(self.head.bias[: 4 * classes], -3.0)  # at first nearly every cell says: nothing here

    def forward(
        self, images: Float[Tensor, "n 3 height width"]
    ) -> tuple[Float[Tensor, "n classes h w"], Float[Tensor, "n 4 h w"]]:
        """Class logits, and boxes (left, top, right, bottom) in pixels, of every cell; sides must divide by 8."""
        near = self.near(images)  # n 24 height/4 width/4
        joint = self.joint(near + F.interpolate(self.wide(near), scale_factor=2.0))
        out = F.pixel_shuffle(self.head(joint), 2)  # n classes+4 height/2 width/2
        logits, reach = out[:, : self.classes], 8 * F.softplus(out[:, self.classes :] + 0.5)
        x, y = cell_centres(*out.shape[-2:], self.stride, out)
        edges = (x - reach[:, 0], y - reach[:, 1], x + reach[:, 2], y + reach[:, 3])
        return logits, torch.stack(edges, 1)


def cell_centres(h: int, w: int, stride: int, like: Tensor) -> tuple[Float[Tensor, "1 w"], Float[Tensor, "h 1"]]:
    """Where the cells of an ``h`` by ``w`` grid look, in pixels: their columns and their rows."""
    x, y = (stride * (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) for count in (w, h))
    return x[None], y[:, None]


def centre_targets(
    boxes: Float[Tensor, "n most 4"], labels: Int[Tensor, "n most"], classes: int, size: int, stride: int
) -> tuple[Float[Tensor, "n classes h w"], Float[Tensor, "n 4 h w"], Float[Tensor, "n 1 h w"]]:
    """What each cell should answer: a bump of height 1 on every object's centre, and the box of the highest bump there.

    A bump is a Gaussian with a standard deviation of an eighth of the object's sides. Returns the heat per class, the
    box, and the heat of that box's object, which is how much the cell's box counts.
    """
    h = w = size // stride
    x, y = cell_centres(h, w, stride, boxes)
    centre, spread = (boxes[..., :2] + boxes[..., 2:]) / 2, ((boxes[..., 2:] - boxes[..., :2]) / 8).clamp(min=0.1)
    across = torch.exp(-(((x - centre[..., :1]) / spread[..., :1]) ** 2) / 2)  # n most w
    down = torch.exp(-(((y.T - centre[..., 1:]) / spread[..., 1:]) ** 2) / 2)  # n most h
    heat = down[..., :, None] * across[..., None, :] * (labels >= 0)[..., None, None]
    per_class = torch.stack([(heat * (labels == c)[..., None, None]).amax(1) for c in range(classes)], 1)
    weight, owner = heat.max(1, keepdim=True)
    box = boxes.gather(1, owner.flatten(1)[..., None].expand(-1, -1, 4)).transpose(1, 2).unflatten(2, (h, w))
    return per_class, box, weight


def train_detector(
    images: Float[Tensor, "n 3 size size"],
    boxes: Float[Tensor, "n most 4"],
    labels: Int[Tensor, "n most"],
    *,
    seed: int,
    steps: int,
    batch: int = 8,
    lr: float = 1e-2,
    classes: int = 2,
) -> CentreDetector:
    """A centre-point detector, trained on these scenes by AdamW with a cosine schedule; reproducible from ``seed``.

    The heat is learnt by cross-entropy, down-weighted where it is right already (a focal loss for graded targets), the
    box by one minus its overlap with the true one, where the heat is above 0.3.

    Raises:
        ValueError: lengths differ, or as in `paperlab.training.fit`.
    """
    require_same_length(images=images, boxes=boxes, labels=labels)
    g = generator(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CentreDetector(classes).to(images)

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(images), (batch,), generator=g).to(images.device)
        heat, target, weight = centre_targets(boxes[rows], labels[rows], classes, images.shape[-1], model.stride)
        weight = weight[:, 0] * (weight[:, 0] > 0.3)
        logits, predicted = model(images[rows])
        focus = (heat - logits.sigmoid()).detach().abs()
        seen = (focus * F.binary_cross_entropy_with_logits(logits, heat, reduction="none")).sum()
        missed = (weight * (1 - paired_iou(predicted, target))).sum() / weight.sum()
        return seen / (labels[rows] >= 0).sum() + 3 * missed

    fit(model.parameters(), loss, steps=steps, lr=lr, weight_decay=1e-4, schedule="cosine")
    return model.eval()


def paired_iou(a: Float[Tensor, "n 4 h w"], b: Float[Tensor, "n 4 h w"]) -> Float[Tensor, "n h w"]:
    """Overlap of the two boxes of every cell."""
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    shared = sides[:, 0] * sides[:, 1]
    area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    return shared / (area_a + area_b - shared).clamp(min=1e-6)


class Proposals(NamedTuple):
    """The ``k`` highest-scored boxes of every image and class, highest first."""

    boxes: Float[Tensor, "n classes k 4"]
    scores: Float[Tensor, "n classes k"]


@torch.no_grad()
def propose(model: CentreDetector, images: Float[Tensor, "n 3 height width"], *, top: int, peak: int = 1) -> Proposals:
    """The ``top`` boxes of every image and class by raw score: nothing is suppressed.

    With an odd ``peak`` above 1 only cells that hold the maximum of their ``peak`` by ``peak`` neighbourhood count; the
    others' score is 0. That is how centre-point detectors usually get rid of duplicates.

    Raises:
        ValueError: ``top`` or ``peak`` below 1, or an even ``peak``.
    """
    require_at_least(1, top=top, peak=peak)
    require_between(1, 1, **{"peak modulo 2": peak % 2})
    pieces = [model(part) for part in images.split(100)]
    heat, boxes = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    heat = heat.sigmoid()
    heat = heat * (heat == F.max_pool2d(heat, peak, 1, peak // 2))
    scores, cells = heat.flatten(2).topk(min(top, heat[0, 0].numel()), -1)
    every = boxes.flatten(2).transpose(1, 2)[:, None].expand(-1, heat.shape[1], -1, -1)
    return Proposals(every.gather(2, cells[..., None].expand(-1, -1, -1, 4)), scores)


def precision_recall(
    scores: Float[Tensor, " d"], hits: Bool[Tensor, " d"], positives: int
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Recall and precision when the boxes are accepted one by one from the highest score down.

    Raises:
        ValueError: ``positives`` is below 1, lengths differ, or scores are not finite.
    """
    require_same_length(scores=scores, hits=hits)
    require_at_least(1, positives=positives)
    require_finite(scores=scores)
    true = hits[scores.argsort(dim=0, descending=True, stable=True)].cumsum(0).to(scores.dtype)
    return true / positives, true / torch.arange(1, len(scores) + 1, device=scores.device)
