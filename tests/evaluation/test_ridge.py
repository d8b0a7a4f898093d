"""The linear classifier in closed form against scikit-learn's ridge regression."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from hf_accel.evaluation import ridge, ridge_accuracy


def features(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of four classes that overlap, with channels of very different scales."""
    source = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=source)
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    rows = centres[labels] + 1.5 * torch.randn(n, 12, generator=source)
    return 3 + rows * torch.logspace(-3, 3, 12), labels


@pytest.mark.parametrize("penalty", [1e-3, 10.0])
def test_accuracy_is_that_of_ridge_regression(monkeypatch, penalty) -> None:
    monkeypatch.setattr(ridge, "PENALTY", penalty)
    monkeypatch.setattr(ridge, "BLOCK", 64)  # several blocks
    (bank, bank_labels), (queries, labels) = features(300, 0), features(500, 1)
    scaler = StandardScaler().fit(bank.double().numpy())
    model = Ridge(alpha=penalty * len(bank))
    model.fit(scaler.transform(bank.double().numpy()), F.one_hot(bank_labels).double().numpy())
    predicted = torch.from_numpy(model.predict(scaler.transform(queries.double().numpy()))).argmax(1)
    expected = (predicted == labels).double().mean().item()
    assert ridge_accuracy(bank, bank_labels, queries, labels)["top1"] == pytest.approx(expected) and 0.4 < expected < 1


def test_a_constant_feature_and_a_class_without_queries_do_no_harm() -> None:
    bank, labels = features(300, 0)
    bank[:, 3] = 7.0
    assert ridge_accuracy(bank, labels, bank[labels > 1], labels[labels > 1])["top1"] > 0.5


def test_features_that_are_not_finite_are_named() -> None:
    bank, labels = features(30, 0)
    bank[4, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        ridge_accuracy(bank, labels, bank, labels)
    good, labels = features(30, 0)
    with pytest.raises(ValueError, match="NaN"):
        ridge_accuracy(good, labels, bank, labels)


def test_an_empty_bank_is_named() -> None:
    queries, labels = features(30, 0)
    with pytest.raises(ValueError, match="no training features"):
        ridge_accuracy(queries[:0], labels[:0], queries, labels)
