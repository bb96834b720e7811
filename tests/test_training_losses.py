"""Losses, metrics and the border map against their formulas on hand-made cases."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from tilenet.classes import default_classes
from tilenet.training.border import border_weights
from tilenet.training.losses import Loss, auto_class_weights
from tilenet.training.metrics import Scores, confusion

# One row of four pixels; the last is ignored.
TARGET = torch.tensor([[[0, 1, 1, 255]]])
LOGITS = torch.tensor([[[[-1.0, 2.0, -0.5, 9.0]]]])
P = [1 / (1 + math.exp(-x)) for x in (-1.0, 2.0, -0.5)]
T = [0, 1, 1]


def value(name, logits=LOGITS, target=TARGET, weights=None, border=None):
    return float(Loss([(1.0, name)], logits.shape[1], weights)(logits, target, border))


def bce(p, t):
    return -math.log(p if t else 1 - p)


def test_bce():
    expected = sum(bce(p, t) for p, t in zip(P, T, strict=True)) / 3
    assert value("bce") == pytest.approx(expected, abs=1e-6)
    assert value("ce") == pytest.approx(expected, abs=1e-6)


def test_bce_with_class_weights():
    w = [0.5, 3.0]
    above = sum(w[t] * bce(p, t) for p, t in zip(P, T, strict=True))
    assert value("bce", weights=w) == pytest.approx(above / (0.5 + 3 + 3), abs=1e-6)


def test_bce_with_border_weights():
    border = torch.tensor([[[2.0, 0.0, 0.0, 5.0]]])
    parts = [bce(p, t) for p, t in zip(P, T, strict=True)]
    assert value("bce", border=border) == pytest.approx((sum(parts) + 2 * parts[0]) / 3, abs=1e-6)


def test_cross_entropy_of_three_classes():
    logits = torch.tensor([[[[1.0, 0.0]], [[2.0, -1.0]], [[0.5, 3.0]]]])  # (1, 3, 1, 2)
    target = torch.tensor([[[1, 2]]])
    one = -math.log(math.exp(2) / (math.e + math.exp(2) + math.exp(0.5)))
    two = -math.log(math.exp(3) / (1 + math.exp(-1) + math.exp(3)))
    assert value("ce", logits, target) == pytest.approx((one + two) / 2, abs=1e-6)
    w = [1.0, 2.0, 4.0]
    assert value("ce", logits, target, w) == pytest.approx((2 * one + 4 * two) / 6, abs=1e-6)


def test_dice():
    expected = 1 - 2 * (P[1] + P[2]) / (sum(P) + 2)
    assert value("dice") == pytest.approx(expected, abs=1e-6)


def test_jaccard():
    both = P[1] + P[2]
    assert value("jaccard") == pytest.approx(1 - both / (sum(P) + 2 - both), abs=1e-6)


def test_tversky():
    hit, false, missed = P[1] + P[2], P[0], 2 - P[1] - P[2]
    expected = 1 - hit / (hit + 0.3 * false + 0.7 * missed)
    assert value("tversky") == pytest.approx(expected, abs=1e-6)


def test_focal():
    right = [p if t else 1 - p for p, t in zip(P, T, strict=True)]
    expected = sum((1 - r) ** 2 * -math.log(r) for r in right) / 3
    assert value("focal") == pytest.approx(expected, abs=1e-6)


def test_lovasz():
    """The Lovász hinge: sorted errors times the steps of the Jaccard loss."""
    errors = sorted(
        ((1 - x * (2 * t - 1), t) for x, t in zip((-1.0, 2.0, -0.5), T, strict=True)), reverse=True
    )
    total, before = 0.0, 0.0
    for count in range(1, 4):
        wrong = errors[:count]
        missed = sum(t for _, t in wrong)
        union = 2 + sum(1 - t for _, t in wrong)
        jaccard = 1 - (2 - missed) / union
        total += max(0.0, errors[count - 1][0]) * (jaccard - before)
        before = jaccard
    assert value("lovasz") == pytest.approx(total, abs=1e-6)


def test_sum_of_losses():
    both = Loss([(1.0, "dice"), (0.5, "bce")], 1, None)(LOGITS, TARGET)
    assert float(both) == pytest.approx(value("dice") + 0.5 * value("bce"), abs=1e-6)


@pytest.mark.parametrize("name", ["bce", "ce", "dice", "jaccard", "focal", "tversky", "lovasz"])
@pytest.mark.parametrize("channels", [1, 3])
def test_ignored_pixels_have_no_gradient(name, channels):
    torch.manual_seed(0)
    logits = torch.randn(2, channels, 4, 4, requires_grad=True)
    target = torch.randint(0, max(2, channels), (2, 4, 4))
    target[:, 0] = 255
    loss = Loss([(1.0, name)], channels, None)(logits, target)
    loss.backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, :, 0] == 0).all()
    assert (logits.grad[:, :, 1:] != 0).any()
    nothing = Loss([(1.0, name)], channels, None)(logits, torch.full_like(target, 255))
    assert float(nothing.detach()) == 0.0


def test_auto_class_weights():
    assert auto_class_weights([100, 100]) == [1.0, 1.0]
    rare = auto_class_weights([10000, 100])
    assert rare[1] / rare[0] == pytest.approx(10)
    assert sum(rare) / 2 == pytest.approx(1)


def test_border_weights_follow_the_formula():
    objects = np.zeros((20, 30), np.int32)
    objects[5:12, 3:10] = 7
    objects[5:12, 13:20] = 2
    objects[15:18, 22:28] = 40
    planes = [ndimage.distance_transform_edt(objects != n) for n in (7, 2, 40)]
    first, second, _ = np.sort(planes, axis=0)
    expected = 10 * np.exp(-((first + second) ** 2) / 50) * (objects == 0)
    np.testing.assert_allclose(border_weights(objects, 10, 5), expected, atol=1e-4)
    alone = np.where(objects == 7, 7, 0)
    assert (border_weights(alone, 10, 5) == 0).all()  # there is no second object


def test_scores_of_a_known_case():
    truth = np.array([[0, 0, 1, 1, 255]], np.uint8)
    pred = np.array([[0, 1, 1, 255, 1]], np.uint8)
    scores = Scores(confusion(truth, pred, 2))
    assert scores.matrix.tolist() == [[1, 1, 0], [0, 1, 1]]
    np.testing.assert_allclose(scores.dice, [2 / 3, 0.5])
    np.testing.assert_allclose(scores.iou, [1 / 2, 1 / 3])
    np.testing.assert_allclose(scores.precision, [1, 0.5])
    np.testing.assert_allclose(scores.recall, [0.5, 0.5])
    assert scores.accuracy == 0.5
    document = scores.as_dict(default_classes(2))
    assert document["mean_dice"] == pytest.approx((2 / 3 + 0.5) / 2, abs=1e-6)
    assert document["object_dice"] == 0.5


def test_scores_agree_with_torchmetrics():
    from torchmetrics.functional.classification import multiclass_jaccard_index

    rng = np.random.default_rng(0)
    truth, pred = rng.integers(0, 4, (2, 50, 50)).astype(np.uint8)
    theirs = multiclass_jaccard_index(
        torch.from_numpy(pred).long(), torch.from_numpy(truth).long(), 4, average=None
    )
    np.testing.assert_allclose(Scores(confusion(truth, pred, 4)).iou, theirs.numpy(), rtol=1e-6)
