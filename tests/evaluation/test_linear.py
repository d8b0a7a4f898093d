"""Test linear probe and logistic regression: heads that are trained at once, the choice, and unusual inputs."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hf_accel.evaluation.linear as linear
from hf_accel.distributed.stopping import Stopped, request_stop
from hf_accel.evaluation import LinearConfig, linear_probe, logistic_regression, topk_accuracy
from hf_accel.evaluation.linear import standardise, train_heads
from hf_accel.utils.seeding import generator

CLASSES, WIDTH = 4, 6


def blobs(n: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return features (n, WIDTH) around one centre for each class, and labels."""
    source = torch.Generator().manual_seed(seed)
    centres = 3 * torch.eye(CLASSES, WIDTH)
    labels = torch.arange(n) % CLASSES
    return centres[labels] + spread * torch.randn(n, WIDTH, generator=source) + 10, labels


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_heads_trained_at_once_equal_heads_trained_one_by_one(weight_decay, capsys):
    features, labels = blobs(50, 2.0, 0)  # batches of 16, 16, 16 and 2
    features = features.double()  # so that only different formulas, and not rounding, could differ
    config = LinearConfig(epochs=3, batch_size=16, weight_decay=weight_decay)
    rates = (0.01, 0.3, 2.0)
    weight, bias = train_heads(features, labels, CLASSES, rates, config, seed=5)
    assert not capsys.readouterr().err  # a bar is for a terminal, and not for a file
    for number, rate in enumerate(rates):
        head = nn.Linear(WIDTH, CLASSES).double()
        start = torch.randn(CLASSES, WIDTH, generator=generator(5, "head")) * 0.01
        head.load_state_dict({"weight": start, "bias": torch.zeros(CLASSES)})
        optimizer = torch.optim.SGD(head.parameters(), lr=rate * 16 / 256, momentum=0.9, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * 4)
        for epoch in range(3):
            order = torch.randperm(50, generator=generator(5, "head order", epoch))
            for first in range(0, 50, 16):
                rows = order[first : first + 16]
                optimizer.zero_grad()
                F.cross_entropy(head(features[rows]), labels[rows]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(weight[number], head.weight.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(bias[number], head.bias.detach(), rtol=1e-9, atol=1e-9)


def test_both_classifiers_separate_separable_classes():
    train, train_labels = blobs(200, 0.3, 1)
    test, labels = blobs(80, 0.3, 2)
    scores, rate = linear_probe(train, train_labels, test, CLASSES, LinearConfig(), seed=0)
    again, _ = linear_probe(train, train_labels, test, CLASSES, LinearConfig(), seed=0)
    other, _ = linear_probe(train, train_labels, test, CLASSES, LinearConfig(), seed=1)
    assert torch.equal(scores, again) and not torch.equal(scores, other)
    logits, strength = logistic_regression(train, train_labels, test, CLASSES, seed=0)
    assert scores.shape == logits.shape == (80, CLASSES)
    assert topk_accuracy(scores, labels, 1) == topk_accuracy(logits, labels, 1) == 1
    assert rate in LinearConfig().learning_rates and strength in linear.LOGISTIC_C


def test_the_held_out_part_chooses():
    train, train_labels = blobs(400, 2.0, 1)
    test, labels = blobs(400, 2.0, 2)
    useless = LinearConfig(learning_rates=(1e-9, 1e-8))
    config = LinearConfig(learning_rates=(1e-9, 0.1, 1e-8))
    scores, rate = linear_probe(train, train_labels, test, CLASSES, config, seed=0)
    assert rate == 0.1
    worse, _ = linear_probe(train, train_labels, test, CLASSES, useless, seed=0)
    assert topk_accuracy(scores, labels, 1) > topk_accuracy(worse, labels, 1) + 0.05


@pytest.mark.parametrize("method", ["linear", "logistic"])
def test_ties_are_decided_by_cross_entropy(method):
    """Every setting classifies the held-out part correctly, and one class has one image more than the others."""
    train, train_labels = blobs(121, 0.3, 1)
    test, labels = blobs(80, 0.3, 2)
    if method == "linear":
        scores, chosen = linear_probe(train, train_labels, test, CLASSES, LinearConfig(epochs=20), seed=0)
        assert chosen >= 0.1
    else:
        scores, chosen = logistic_regression(train, train_labels, test, CLASSES, seed=0)
        assert chosen >= 1
    assert topk_accuracy(scores, labels, 1) == 1


@pytest.mark.parametrize("strength", linear.LOGISTIC_C)
def test_intercepts_alone_do_not_decide_under_any_penalty(monkeypatch, strength):
    monkeypatch.setattr(linear, "LOGISTIC_C", (strength,))
    train, train_labels = blobs(121, 0.3, 1)
    test, labels = blobs(80, 0.3, 2)
    scores, _ = logistic_regression(train, train_labels, test, CLASSES, seed=0)
    assert topk_accuracy(scores, labels, 1) == 1


def test_the_only_image_of_a_class_is_used_for_training_only():
    train, labels = blobs(120, 0.3, 1)
    train, labels = torch.cat([train, -train[:1]]), torch.cat([labels, torch.tensor([CLASSES])])
    assert CLASSES in labels[linear._split(labels, seed=0)[0]]
    _, strength = logistic_regression(train, labels, train, CLASSES + 1, seed=0)
    assert strength >= 1


def test_few_noisy_images_get_a_strong_penalty():
    source = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    features = torch.randn(120, 80, generator=source)
    features[:, 0] += 1.5 * labels  # one good feature among many
    features[:, 1:] *= 3
    _, strength = logistic_regression(features[:60], labels[:60], features[60:], 2, seed=0)
    assert strength < 1


def test_many_classes_are_scored_in_blocks_and_trained_in_groups(monkeypatch):
    train, train_labels = blobs(100, 1.5, 1)
    test, _ = blobs(60, 1.5, 2)
    config = LinearConfig(epochs=2)
    expected, rate = linear_probe(train, train_labels, test, CLASSES, config, seed=0)
    groups, largest = [], []

    def recording(features, labels, num_classes, rates, *rest):
        groups.append((len(features), len(rates)))
        return train_heads(features, labels, num_classes, rates, *rest)

    def watching(*arguments):
        logits = linear_logits(*arguments)
        largest.append(logits.numel())
        return logits

    linear_logits = linear._compute_logits
    monkeypatch.setattr(linear, "train_heads", recording)
    monkeypatch.setattr(linear, "HEADS_BYTES", 5 * 4 * CLASSES * (WIDTH + config.batch_size))
    monkeypatch.setattr(linear, "SCORES_BYTES", 4 * CLASSES * 13 * 2)
    scores, chosen = linear_probe(train, train_labels, test, CLASSES, config, seed=0)
    assert groups == [(80, 5), (80, 5), (80, 3), (100, 1)] and chosen == rate  # all images train the chosen head
    torch.testing.assert_close(scores, expected)
    monkeypatch.setattr(linear, "_compute_logits", watching)
    monkeypatch.setattr(linear, "train_heads", lambda *_: (torch.zeros(13, CLASSES, WIDTH), torch.zeros(13, CLASSES)))
    linear_probe(train, train_labels, test, CLASSES, config, seed=0)
    assert max(largest) <= 2 * 13 * CLASSES


@pytest.mark.parametrize("method", ["linear", "logistic"])
def test_a_stop_is_answered_between_batches_or_fits(monkeypatch, method):
    train, labels = blobs(100, 1.0, 1)
    drawn, split = [], linear._split

    def stopping(*arguments):
        drawn.append(arguments)
        request_stop()  # before the first batch
        return split(*arguments)

    monkeypatch.setattr(linear, "_split", stopping)
    monkeypatch.setattr(linear, "_compute_logits", None)
    monkeypatch.setattr(linear, "topk_accuracy", None)
    with pytest.raises(Stopped):
        if method == "linear":
            linear_probe(train, labels, train, CLASSES, LinearConfig(), seed=0)
        else:
            logistic_regression(train, labels, train, CLASSES, seed=0)
    assert len(drawn) == 1


def test_standardise():
    train, other = (np.random.default_rng(seed).normal(7, 3, (20, 3)).astype(np.float32) for seed in (0, 1))
    train[:, 1] = other[:, 1] = 5
    got = standardise(torch.from_numpy(train), torch.from_numpy(other))
    mean, std = train.mean(0), train.std(0)
    std[1] = np.inf
    for features, values in zip(got, (train, other), strict=True):
        np.testing.assert_allclose(features.numpy(), (values - mean) / std, atol=1e-5)


@pytest.mark.parametrize("present", [[0, 2], [0, 2, 3]])
def test_classes_without_training_images(present):
    train, labels = blobs(200, 0.3, 1)
    rows = torch.isin(labels, torch.tensor(present))
    scores, _ = logistic_regression(train[rows], labels[rows], train, CLASSES, seed=0)
    assert topk_accuracy(scores[rows], labels[rows], 1) == 1
    absent = [label for label in range(CLASSES) if label not in present]
    assert (scores[:, absent] == -math.inf).all()


def test_impossible_features_are_refused():
    train, labels = blobs(40, 1.0, 1)
    broken = train.clone()
    broken[3, 2] = math.nan
    for fit in (
        lambda features, labels: linear_probe(features, labels, train, CLASSES, LinearConfig(), 0),
        lambda features, labels: logistic_regression(features, labels, train, CLASSES, 0),
    ):
        with pytest.raises(ValueError, match="NaN or infinite"):
            fit(broken, labels)
        with pytest.raises(ValueError, match="2 training images are too few"):
            fit(train[:2], labels[:2])


@pytest.mark.parametrize(
    "values",
    [{"learning_rates": ()}, {"learning_rates": (0.1, 0.0)}, {"epochs": 0}, {"batch_size": 0}, {"weight_decay": -1.0}],
    ids=str,
)
def test_settings_out_of_range(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        LinearConfig(**values)
