r"""Object detection in small: boxes and their overlaps, average precision as COCO measures it, a centre-point detector.

Everything here works on whole sets of images at once. A detector proposes ``k`` scored boxes for every image and class;
an image holds up to ``most`` true objects. Overlap always means intersection over union (IoU), boxes are
(left, top, right, bottom), and a score of 0 marks a box that is not there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from paperlab.checks import (
    require_at_least,
    require_between,
    require_finite,
    require_nonempty,
    require_positive,
    require_same_length,
)
from paperlab.devices import generator
from paperlab.training import eager

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
        ValueError: scores that are not finite, no threshold, or one that is not positive.
    """
    require_finite(scores=scores)
    require_nonempty(thresholds=thresholds)
    require_positive(thresholds=thresholds)
    n, classes, k, most = overlaps.shape
    cut = torch.tensor(thresholds, device=scores.device, dtype=overlaps.dtype)
    use = torch.where(overlaps.amax(-1) >= cut.min(), scores, 0.0).flatten(0, 1)  # others cannot hit
    count = (use > 0).sum(-1)
    lists = count.argsort(descending=True)  # the longest first: those that end early drop out at the end
    order = use[lists].argsort(dim=-1, descending=True, stable=True)
    score = use[lists].gather(1, order)
    ranked = overlaps.flatten(0, 1)[lists[:, None], order]  # lists k most
    free = torch.ones(len(lists), len(thresholds), most, dtype=overlaps.dtype, device=scores.device)
    found, hits = torch.zeros_like(free), torch.zeros(len(lists), k, len(thresholds)).to(free)
    for rank in range(int(count.max())):
        end = int((count > rank).sum())
        best, which = (ranked[:end, rank, None] * free[:end]).max(-1, keepdim=True)  # lists t 1
        hit = (best >= cut[:, None]).to(free)
        free[:end].scatter_add_(2, which, -hit)
        found[:end].scatter_add_(2, which, hit * score[:end, rank, None, None])
        hits[:end, rank] = hit[..., 0]
    back = lists.argsort()
    placed = torch.zeros_like(hits).scatter_(1, order[..., None].expand_as(hits), hits)[back].unflatten(0, (n, classes))
    return placed > 0, found[back].unflatten(0, (n, classes)).sum(1).transpose(1, 2)  # an object has one class


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
    ranked = hits.index_select(0, order)
    at = ranked.any(1).nonzero()[:, 0]  # ranks that are hits at some threshold
    if not len(at):
        return torch.zeros(len(positives), hits.shape[1], device=scores.device, dtype=torch.float64)
    weights = torch.ones(len(positives), len(scores), device=scores.device) if weights is None else weights
    grid = torch.linspace(0, 1, RECALL_GRID, device=scores.device, dtype=torch.float64) - 1e-9
    result = []
    for w, total in zip(weights.split(16), positives.double().split(16), strict=True):  # a few, for the cache
        w = w[:, order].double()
        true = (w[:, None, at] * ranked[at].T).cumsum(-1)  # r t hits
        precision = true / w.cumsum(1)[:, None, at].clamp(min=1e-12)
        best = precision.flip(-1).cummax(-1).values.flip(-1)
        recall = true / total[:, None, None]
        place = torch.searchsorted(recall, grid.expand(*recall.shape[:2], -1).contiguous())
        result.append(F.pad(best, (0, 1)).gather(-1, place).mean(-1))  # beyond the last hit the precision is 0
    return torch.cat(result)


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
        there = scores[:, c].flatten().nonzero()[:, 0]
        score, hit = scores[:, c].flatten()[there], hits[:, c].flatten(0, 1).index_select(0, there)
        positives = w.double() @ (labels == c).sum(1).double()
        classes.append(average_precision(score, hit, positives, w[:, there // scores.shape[2]]))
    return torch.stack(classes).mean(0)


def convolution(inputs: int, outputs: int, stride: int = 1, runs: int = 1) -> nn.Sequential:
    """3 by 3 convolution, batch normalisation, ReLU; ``runs`` of them side by side on the channel axis."""
    conv = nn.Conv2d(runs * inputs, runs * outputs, 3, stride, 1, bias=False, groups=runs)
    return nn.Sequential(conv, nn.BatchNorm2d(runs * outputs), nn.ReLU(inplace=True))


class CentreDetector(nn.Module):
    """A detector of about 44,000 parameters that asks at every second pixel: what is here, how far are its edges?

    Three strided stages look ever wider, the widest view is added back to the one before, and the head unfolds the
    result to stride 2. Each cell gives a logit per class and the distances to the four edges of its box. No cell knows
    of another cell's answer, so that one object gets a cloud of nearly equal boxes.

    With ``runs`` above 1 it is that many detectors side by side, none of which sees another: each has its own three
    image channels and its own part of every parameter, and the answers come as one batch, the runs of an image in turn.

    Raises:
        ValueError: ``classes`` or ``runs`` below 1.
    """

    stride = 2

    def __init__(self, classes: int = 2, runs: int = 1) -> None:
        super().__init__()
        require_at_least(1, classes=classes, runs=runs)
        self.classes, self.runs = classes, runs
        self.near = nn.Sequential(
            convolution(3, 16, 2, runs), convolution(16, 32, 2, runs), convolution(32, 32, 1, runs)
        )
        self.wide = nn.Sequential(
            convolution(32, 32, 2, runs), convolution(32, 32, 1, runs), nn.Conv2d(32 * runs, 32 * runs, 1, groups=runs)
        )
        self.joint = convolution(32, 32, 1, runs)
        self.head = nn.Conv2d(32 * runs, 4 * (classes + 4) * runs, 1, groups=runs)
        nn.init.constant_(self.head.bias[: 4 * classes], -3.0)  # at first nearly every cell says: nothing here
        self.to(memory_format=torch.channels_last)  # a quarter less time on a processor

    def forward(
        self, images: Float[Tensor, "n channels height width"]
    ) -> tuple[Float[Tensor, "m classes h w"], Float[Tensor, "m 4 h w"]]:
        """Class logits, and boxes (left, top, right, bottom) in pixels, of every cell; sides must divide by 8."""
        near = self.near(images)  # n 32 height/4 width/4
        joint = self.joint(near + F.interpolate(self.wide(near), scale_factor=2.0))
        out = F.pixel_shuffle(self.head(joint), 2)  # n classes+4 height/2 width/2
        out = out.unflatten(1, (self.runs, -1)).flatten(0, 1)
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


def train_detectors(
    images: Float[Tensor, "runs n 3 size size"],
    boxes: Float[Tensor, "runs n most 4"],
    labels: Int[Tensor, "runs n most"],
    *,
    seeds: Sequence[int],
    steps: int,
    batch: int = 5,
    lr: float = 2e-2,
    classes: int = 2,
) -> list[CentreDetector]:
    """Centre-point detectors, each trained on its own scenes from its own seed; side by side, which saves time.

    The heat is learnt by cross-entropy, down-weighted where it is right already (a focal loss for graded targets), the
    box by one minus its overlap with the true one, where the heat is above 0.3. The rate of AdamW climbs to ``lr`` and
    falls again (one cycle), and it forgets fast (β = 0.75 and 0.95): in a hundred steps old gradients mislead.

    Raises:
        ValueError: lengths differ, no scene, ``steps`` or ``batch`` below 1, a rate that is not positive.
    """
    require_same_length(images=images, boxes=boxes, labels=labels, seeds=seeds)
    require_nonempty(images=images)
    require_at_least(1, steps=steps, batch=batch)
    require_positive(lr=lr)
    runs, n, size = len(seeds), images.shape[1], images.shape[-1]
    models, order = [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(CentreDetector(classes).to(images))
        g = generator(seed)
        order.append(torch.cat([torch.randperm(n, generator=g) for _ in range(-(-steps * batch // n))]))
    joint, own = CentreDetector(classes, runs).to(images), torch.arange(runs, device=images.device)
    for whole, *parts in zip(joint.parameters(), *(model.parameters() for model in models), strict=True):
        whole.data.copy_(torch.cat(parts))
    opt = eager(torch.optim.AdamW)(joint.parameters(), lr=lr, betas=(0.75, 0.95), weight_decay=1e-4, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps + 1, cycle_momentum=False)
    for rows in torch.stack(order, 1).to(images.device)[: steps * batch].split(batch):  # batch runs
        true = labels[own, rows].flatten(0, 1)
        heat, target, weight = centre_targets(boxes[own, rows].flatten(0, 1), true, classes, size, joint.stride)
        logits, predicted = joint(images[own, rows].flatten(1, 2))
        focus = (heat - logits.sigmoid()).detach().abs()
        seen = focus * F.binary_cross_entropy_with_logits(logits, heat, reduction="none")
        weight = F.threshold(weight[:, 0], 0.3, 0.0)
        missed = torch.zeros_like(weight)
        here, there = (box.movedim(1, -1)[weight > 0] for box in (predicted, target))  # cells near a centre, 4
        missed[weight > 0] = weight[weight > 0] * (1 - paired_iou(here, there))
        each = [part.unflatten(0, (-1, runs)).transpose(0, 1).flatten(1).sum(1)
                for part in (seen, true >= 0, missed, weight)]  # fmt: skip
        opt.zero_grad(set_to_none=True)
        (each[0] / each[1] + 3 * each[2] / each[3]).sum().backward()
        opt.step()
        cycle.step()
    wholes = joint.state_dict()
    for k, model in enumerate(models):
        model.load_state_dict({key: x.chunk(runs)[k] if x.ndim else x for key, x in wholes.items()})
    return [model.eval() for model in models]


def paired_iou(a: Float[Tensor, "*batch 4"], b: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """Overlap of each box of ``a`` with the box of ``b`` at the same place."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    shared = sides.prod(-1)
    area_a, area_b = ((x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b))
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
