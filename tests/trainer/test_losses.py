"""Proof tests of trainer/losses.py: published values, closed forms, plain loops, torch and scikit-learn."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import percentileofscore
from sklearn.metrics import ndcg_score
from torch import Tensor

from trainer.losses import (
    LOSSES,
    ApproxNdcg,
    CrossEntropy,
    DurationQuantiles,
    Huber,
    ListLoss,
    ListMle,
    Loss,
    Pairwise,
    Softmax,
    SquaredError,
    Thresholds,
    WeightedLogistic,
    in_lists,
    lists,
)

NAN = math.nan
LIST_LOSSES = [Pairwise(), Softmax(), ListMle(), ApproxNdcg()]
each_list_loss = pytest.mark.parametrize("loss", LIST_LOSSES, ids=lambda loss: type(loss).__name__)


def column(*values: float) -> Tensor:
    """One logit a row."""
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def row(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def graded(num_lists: int, size: int, seed: int = 0) -> Tensor:
    """Labels 0..3, with ties; each list has a 0 and a 3."""
    labels_GS = torch.randint(0, 4, (num_lists, size), generator=torch.Generator().manual_seed(seed)).double()
    labels_GS[:, 0], labels_GS[:, -1] = 0.0, 3.0
    return labels_GS


def of_list(loss: Loss, scores: Tensor, labels: Tensor) -> float:
    return loss(scores.unsqueeze(0), labels.unsqueeze(0)).item()


def fitted(loss_of: Callable[[Tensor], Tensor], num_logits: int = 1) -> Tensor:
    """The constant logits that make a loss smallest."""
    logits_L = torch.zeros(num_logits, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits_L], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss_of(logits_L)
        value.backward()
        return value

    optimizer.step(closure)
    return logits_L.detach()


# One number a row.


def test_cross_entropy_is_the_log_probability_of_what_happened() -> None:
    logits_B1, target_B = column(-40.0, -1.5, 0.0, 2.0, 40.0), row(0.0, 1.0, 1.0, 0.0, 1.0)
    # definition, log1p(e^-z) or log1p(e^z), in Python floats
    expected = [math.log1p(math.exp(-z if y else z)) for z, y in zip(logits_B1[:, 0], target_B, strict=True)]
    torch.testing.assert_close(CrossEntropy()(logits_B1, target_B), row(*expected), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(CrossEntropy().predict(logits_B1), torch.sigmoid(logits_B1[:, 0]), rtol=0, atol=0)


def test_squared_error_is_least_at_the_mean_of_the_targets() -> None:
    target_B = row(0.0, 1.0, 4.0, 11.0)
    optimum = fitted(lambda z_L: SquaredError()(z_L.expand(4, 1), target_B).mean())
    assert optimum.item() == pytest.approx(4.0, abs=1e-9)  # closed form; float64
    assert SquaredError()(column(3.0), row(5.0)).item() == 4.0  # definition
    assert SquaredError().predict(column(3.0)).item() == 3.0


@pytest.mark.parametrize("delta", [0.5, 1.0, 3.0])
def test_huber_is_half_the_square_near_and_a_line_far_from_the_target(delta: float) -> None:
    errors_B = torch.linspace(-8, 8, 41, dtype=torch.float64)
    found_B = Huber(delta=delta)(errors_B.unsqueeze(1) + 2, torch.full_like(errors_B, 2.0))
    far = errors_B.abs() > delta
    expected_B = torch.where(far, delta * (errors_B.abs() - delta / 2), errors_B**2 / 2)  # definition, by hand
    torch.testing.assert_close(found_B, expected_B, rtol=1e-12, atol=1e-15)
    torch_B = torch.nn.functional.huber_loss(
        errors_B + 2, torch.full_like(errors_B, 2.0), reduction="none", delta=delta
    )
    assert torch.equal(found_B, torch_B)  # and the library's


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_weighted_logistic_fits_the_odds_of_time_not_the_expected_time(share: float) -> None:
    num_positive = round(200 * share)
    time_B = torch.cat([torch.linspace(1, 9, num_positive), torch.zeros(200 - num_positive)]).double()
    loss = WeightedLogistic()
    optimum_1 = fitted(lambda z_L: loss(z_L.expand(200, 1), time_B).mean())
    prediction = loss.predict(optimum_1.unsqueeze(0)).item()
    # closed form of Covington et al., section 4.2: sum T / (N - k) = p E[T] / (1 - p)
    assert prediction == pytest.approx(time_B.sum().item() / (200 - num_positive), rel=1e-7)
    # so it overstates the mean time over all rows by 1 / (1 - p): 5 % where positives are rare, 100 % at one half
    assert prediction / time_B.mean().item() == pytest.approx(1 / (1 - share), rel=1e-7)


def test_weighted_logistic_stays_finite_at_any_logit() -> None:
    logits_B1 = column(-1e4, -100.0, 100.0, 1e4).requires_grad_()
    loss_B = WeightedLogistic()(logits_B1, row(30.0, 0.0, 30.0, 0.0))
    (slope_B1,) = torch.autograd.grad(loss_B.sum(), logits_B1)
    # limits of T softplus(-z) and softplus(z): T |z| and 0, 0 and z; with slopes -T, 0, 0, 1
    torch.testing.assert_close(loss_B, row(30e4, 0.0, 0.0, 1e4))
    torch.testing.assert_close(slope_B1[:, 0], row(-30.0, 0.0, 0.0, 1.0))
    assert WeightedLogistic().predict(logits_B1).isfinite().all()


def test_cread_predicts_the_mean_exactly_where_values_lie_on_its_thresholds() -> None:
    thresholds, chance = (2.0, 5.0, 9.0, 20.0), (0.1, 0.3, 0.2, 0.25, 0.15)  # of y = 0, 2, 5, 9, 20
    passes = [sum(chance[m + 1 :]) for m in range(4)]  # P(y > 0), P(y > 2), P(y > 5), P(y > 9)
    logits_1M = torch.logit(row(*passes)).unsqueeze(0)
    mean = sum(p * y for p, y in zip(chance, (0.0, *thresholds), strict=True))
    # summation by parts: E[y] = sum_m P(y > t_m-1) (t_m - t_m-1); float64
    assert Thresholds(thresholds=thresholds).predict(logits_1M).item() == pytest.approx(mean, rel=1e-12)


def test_cread_fits_the_true_chances_and_with_them_the_mean() -> None:
    values_B = row(*[0.0] * 4, *[2.0] * 9, *[5.0] * 2, *[9.0] * 5)
    loss = Thresholds(thresholds=(2.0, 5.0, 9.0), restore=0.0, order=0.0)
    optimum_M = fitted(lambda z_M: loss(z_M.expand(20, 3), values_B).mean(), 3)
    # closed form: cross entropy is least at the shares 16, 7 and 5 of 20
    torch.testing.assert_close(torch.sigmoid(optimum_M), row(0.8, 0.35, 0.25), rtol=1e-6, atol=0)
    assert loss.predict(optimum_M.unsqueeze(0)).item() == pytest.approx(values_B.mean().item(), rel=1e-6)


@pytest.mark.parametrize(("restore", "order"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
def test_each_term_of_cread_equals_a_plain_loop(restore: float, order: float) -> None:
    thresholds, logits_BM = (0.5, 1.25, 4.0), 2 * normal(40, 3)
    target_B = normal(40, seed=1).exp() * 1.5
    target_B[:4] = row(0.0, 0.5, 4.0, 50.0)  # nothing, on a threshold, the last one, far beyond it
    found_B = Thresholds(thresholds=thresholds, restore=restore, order=order)(logits_BM, target_B)
    edges = (0.0, *thresholds)
    for logits, y, found in zip(logits_BM.tolist(), target_B.tolist(), found_B.tolist(), strict=True):
        chances = [1 / (1 + math.exp(-z)) for z in logits]
        entropy = -sum(math.log(p if y > t else 1 - p) for p, t in zip(chances, edges[:-1], strict=True))
        guess = sum(p * (edges[m + 1] - edges[m]) for m, p in enumerate(chances))
        apart = abs(guess - min(y, 4.0))
        huber = apart**2 / 2 if apart <= 1 else apart - 0.5
        disorder = sum(max(chances[m + 1] - chances[m], 0.0) for m in range(2))
        # plain loop over the paper's eq. 5-9 in Python floats
        assert found == pytest.approx(entropy + restore * huber + order * disorder, rel=1e-12)


def test_cread_grows_with_every_chance_and_never_leaves_its_range() -> None:
    loss, logits_BM = Thresholds(thresholds=(1.0, 3.0, 10.0)), 3 * normal(200, 3, seed=2)
    for m in range(3):
        higher_BM = logits_BM.clone()
        higher_BM[:, m] += 0.5
        assert (loss.predict(higher_BM) > loss.predict(logits_BM)).all()  # each width is above 0
    assert (loss.predict(logits_BM) > 0).all() and (loss.predict(logits_BM) < 10).all()  # between 0 and t_M
    ordered_BM = logits_BM.sort(1, descending=True).values
    plain = Thresholds(thresholds=(1.0, 3.0, 10.0), order=0.0)
    targets_B = torch.ones(200, dtype=torch.float64)
    assert torch.equal(loss(ordered_BM, targets_B), plain(ordered_BM, targets_B))  # no disorder, no cost


def test_settings_that_make_no_sense_are_refused() -> None:
    for thresholds in ((), (0.0, 1.0), (-1.0,), (2.0, 2.0), (3.0, 2.0)):
        with pytest.raises(ValueError, match="each larger than the one before"):
            Thresholds(thresholds=thresholds)
    with pytest.raises(ValueError, match="delta"):
        Huber(delta=0.0)
    with pytest.raises(ValueError, match="temperature"):
        ApproxNdcg(temperature=0.0)
    with pytest.raises(ValueError, match="by must name the column"):
        DurationQuantiles()


def quantiles(**settings: Any) -> tuple[DurationQuantiles, Tensor, Tensor]:
    """A loss that has seen 4,000 watch times, a fifth of the length in the mean, of short and long videos."""
    loss = DurationQuantiles(**({"by": "length", "lengths": (60.0,), "bins": 4096, "most": 3600.0} | settings))
    generator = torch.Generator().manual_seed(0)
    length_B = torch.where(torch.rand(4000, generator=generator) < 0.5, 30.0, 600.0)
    time_B = -0.2 * length_B * torch.rand(4000, generator=generator).log()
    for part in (slice(0, 1000), slice(1000, 4000)):  # sums of two batches add up
        loss.update(loss.measure(time_B[part], length_B[part]))
    return loss, time_B, length_B


def test_a_quantile_is_the_rank_among_items_of_like_length() -> None:
    loss, time_B, length_B = quantiles()
    share_B = loss.target(time_B, length_B)
    for length in (30.0, 600.0):
        of_group = length_B == length
        ranks = percentileofscore(time_B[of_group], time_B[of_group], kind="mean") / 100
        # scipy's rank; a bin is .2 % of a time wide, so few others share it
        np.testing.assert_allclose(share_B[of_group], ranks, atol=2e-3)


def test_the_predicted_time_of_a_quantile_is_the_time_that_has_it() -> None:
    loss, time_B, length_B = quantiles()
    logit_B1 = torch.logit(loss.target(time_B, length_B).double(), eps=1e-9).unsqueeze(1)
    # the inverse of the rank, to the width of a bin: log(1 + most) / bins = .2 %
    np.testing.assert_allclose(loss.predict(logit_B1, length_B), time_B, rtol=4e-3, atol=4e-3)


def test_quantiles_take_the_length_out_of_a_watch_time() -> None:
    """Zhan et al., section 4.1: the same quantile means 20 times the time where videos are 20 times as long."""
    loss, _, _ = quantiles()
    short, long = loss.predict(torch.zeros(2, 1, dtype=torch.float64), row(30.0, 600.0)).tolist()
    # medians of exponential times: .2 * length * log 2; of 2,000 draws the standard error is 3 %
    assert short == pytest.approx(0.2 * 30 * math.log(2), rel=0.1) and long / short == pytest.approx(20, rel=0.14)


@pytest.mark.parametrize("length", [math.nan, 1e6])
def test_a_row_of_unknown_length_or_of_an_empty_group_is_among_all_rows(length: float) -> None:
    loss, time_B, _ = quantiles(lengths=(60.0, 1000.0))
    everybody, _, _ = quantiles(lengths=())
    time_B, length_B = time_B[:50], torch.full((50,), length)
    torch.testing.assert_close(loss.target(time_B, length_B), everybody.target(time_B, torch.zeros(50)))
    logit_B1 = normal(50, 1)
    torch.testing.assert_close(loss.predict(logit_B1, length_B), everybody.predict(logit_B1, torch.zeros(50)))


def test_losses_know_their_kind() -> None:  # by hand, from what each one's prediction is
    kinds = {kind: [name for name, loss in LOSSES.items() if loss.kind == kind] for kind in ("binary", "regression")}
    assert kinds == {"binary": ["bce"], "regression": ["mse", "huber", "weighted_logistic", "cread", "d2q"]}
    assert [name for name, loss in LOSSES.items() if loss.in_lists] == ["bpr", "softmax", "listmle", "approx_ndcg"]
    assert all((loss.kind == "ranking") == loss.in_lists for loss in LOSSES.values())


# Lists.


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(Pairwise(), 0.7981389), (Softmax(), 0.7981389), (ListMle(), 0.7981389), (ApproxNdcg(), 1 - 0.655107)],
    ids=lambda value: type(value).__name__,
)
def test_two_rows_give_the_values_that_tf_ranking_documents(loss: Loss, expected: float) -> None:
    # TensorFlow Ranking's documentation, y = [1, 0], s = [.6, .8]; its pairwise value, .39906943, is averaged over the
    # two places of the list, ours over its one pair; six or seven digits are printed. ListMLE: log(1 + e^.2)
    assert of_list(loss, row(0.6, 0.8), row(1.0, 0.0)) == pytest.approx(expected, abs=5e-7)
    assert expected == pytest.approx(math.log1p(math.exp(0.2)), abs=5e-8) or isinstance(loss, ApproxNdcg)


def test_the_gradient_of_a_pair_is_the_chance_of_the_wrong_order() -> None:
    scores_GS = torch.stack([normal(50), normal(50, seed=1)], 1).requires_grad_()
    (slope_GS,) = torch.autograd.grad(Pairwise()(scores_GS, row(1.0, 0.0).expand(50, 2)).sum(), scores_GS)
    above_G, below_G = scores_GS.detach().unbind(1)
    # closed form, Rendle et al. 2009, section 4: d / ds_i = -sigmoid(-(s_i - s_j)); float64
    torch.testing.assert_close(slope_GS[:, 0], -torch.sigmoid(below_G - above_G), rtol=1e-12, atol=0)
    torch.testing.assert_close(slope_GS[:, 1], -slope_GS[:, 0], rtol=1e-12, atol=0)


def test_bpr_equals_a_plain_loop_over_graded_pairs() -> None:
    scores_GS, labels_GS = normal(20, 7), graded(20, 7)
    for scores, labels, found in zip(
        scores_GS.tolist(), labels_GS.tolist(), Pairwise()(scores_GS, labels_GS), strict=True
    ):
        pairs = [(i, j) for i in range(7) for j in range(7) if labels[i] > labels[j]]
        surprise = [math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs]
        assert found.item() == pytest.approx(sum(surprise) / len(pairs), rel=1e-12)  # plain loop


@pytest.mark.parametrize("size", [2, 5, 40])
def test_a_list_whose_scores_are_all_tied_costs_ln_2_a_pair_however_long_it_is(size: int) -> None:
    scores_GS = torch.full((30, size), 0.3, dtype=torch.float64)
    # closed form: softplus(0); a mean over pairs, so long lists weigh no more than short ones
    torch.testing.assert_close(
        Pairwise()(scores_GS, graded(30, size)), torch.full((30,), math.log(2), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_softmax_equals_a_plain_loop_over_the_shares_of_labels() -> None:
    scores_GS, labels_GS = normal(20, 7, seed=2), graded(20, 7, seed=1)
    for scores, labels, found in zip(
        scores_GS.tolist(), labels_GS.tolist(), Softmax()(scores_GS, labels_GS), strict=True
    ):
        total = math.log(sum(map(math.exp, scores)))
        surprise = sum(y * (total - s) for s, y in zip(scores, labels, strict=True)) / sum(labels)
        assert found.item() == pytest.approx(surprise, rel=1e-12)  # plain loop


def test_listmle_without_ties_is_the_plackett_luce_likelihood() -> None:
    scores_GS = normal(20, 6, seed=3)
    labels_GS = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(g)) for g in range(20)]).double()
    for scores, labels, found in zip(
        scores_GS.tolist(), labels_GS.tolist(), ListMle()(scores_GS, labels_GS), strict=True
    ):
        best_first = sorted(range(6), key=lambda i: -labels[i])
        surprise = 0.0
        for place, i in enumerate(best_first):  # draw one after the other, each from those that are left
            surprise += math.log(sum(math.exp(scores[j]) for j in best_first[place:])) - scores[i]
        assert found.item() == pytest.approx(surprise / 5, rel=1e-12)  # Xia et al. 2008; the last one is certain


def test_listmle_with_ties_equals_a_plain_loop() -> None:
    scores_GS, labels_GS = normal(20, 7, seed=4), graded(20, 7, seed=2)
    for scores, labels, found in zip(
        scores_GS.tolist(), labels_GS.tolist(), ListMle()(scores_GS, labels_GS), strict=True
    ):
        rows = [i for i in range(7) if labels[i] > min(labels)]
        left = [math.log(sum(math.exp(s) for s, y in zip(scores, labels, strict=True) if y <= labels[i])) for i in rows]
        surprise = sum(log_sum - scores[i] for i, log_sum in zip(rows, left, strict=True)) / len(rows)
        assert found.item() == pytest.approx(surprise, rel=1e-12)  # Breslow's treatment of ties, plain loop


@pytest.mark.parametrize("seed", range(3))
def test_approx_ndcg_becomes_the_ndcg_as_the_temperature_falls(seed: int) -> None:
    scores_GS, labels_GS = normal(25, 8, seed=seed), graded(25, 8, seed=seed)
    found_G = ApproxNdcg(temperature=1e-4)(scores_GS, labels_GS)
    # scikit-learn takes labels as gains; scores a tenth of a standard deviation apart are 1,000 temperatures apart, a
    # few pairs are nearer than that
    gains = (torch.exp2(labels_GS) - 1).numpy()
    exact = [1 - ndcg_score(gains[g : g + 1], scores_GS[g : g + 1].numpy()) for g in range(25)]
    apart_G = (scores_GS.sort(1).values.diff(dim=1) > 2e-3).all(1)
    assert apart_G.sum() > 15
    np.testing.assert_allclose(found_G[apart_G].numpy(), np.array(exact)[apart_G.numpy()], atol=1e-8)


def test_approx_ndcg_smooths_ranks() -> None:
    scores_GS = normal(20, 5, seed=5)
    labels_GS = graded(20, 5, seed=3)
    found_G = ApproxNdcg(temperature=0.7)(scores_GS, labels_GS)
    for scores, labels, found in zip(scores_GS.tolist(), labels_GS.tolist(), found_G.tolist(), strict=True):
        total = 0.0
        for i in range(5):
            rank = 1 + sum(1 / (1 + math.exp((scores[i] - scores[j]) / 0.7)) for j in range(5) if j != i)
            total += (2 ** labels[i] - 1) / math.log2(1 + rank)
        ideal = sum((2**y - 1) / math.log2(2 + k) for k, y in enumerate(sorted(labels, reverse=True)))
        assert found == pytest.approx(1 - total / ideal, rel=1e-12)  # Qin et al. 2010, plain loop


@each_list_loss
def test_a_constant_added_to_a_list_changes_nothing(loss: Loss) -> None:
    scores_GS, labels_GS = normal(30, 6), graded(30, 6)
    moved_GS = scores_GS + 10 * normal(30, 1, seed=1)
    # scores enter as differences; the shift costs one more digit of float64
    torch.testing.assert_close(loss(moved_GS, labels_GS), loss(scores_GS, labels_GS), rtol=1e-11, atol=1e-13)
    leaf_GS = scores_GS.clone().requires_grad_()
    (slope_GS,) = torch.autograd.grad(loss(leaf_GS, labels_GS).sum(), leaf_GS)
    torch.testing.assert_close(slope_GS.sum(1), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-12)


@each_list_loss
def test_the_order_of_a_lists_rows_changes_nothing_also_with_ties(loss: Loss) -> None:
    scores_GS, labels_GS = normal(30, 9), graded(30, 9)
    order_S = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    found_G = loss(scores_GS[:, order_S], labels_GS[:, order_S])
    torch.testing.assert_close(found_G, loss(scores_GS, labels_GS), rtol=1e-12, atol=1e-15)  # another order of sums


@each_list_loss
def test_padding_changes_no_loss_and_no_gradient(loss: Loss) -> None:
    scores_GS, labels_GS = normal(30, 6), graded(30, 6)
    scores_GS = torch.cat([scores_GS, 5 + normal(30, 4, seed=1)], 1).requires_grad_()
    padded_GS = torch.cat([labels_GS, torch.full((30, 4), NAN, dtype=torch.float64)], 1)
    plain_G, padded_G = loss(scores_GS[:, :6], labels_GS), loss(scores_GS, padded_GS)
    torch.testing.assert_close(padded_G, plain_G, rtol=1e-12, atol=1e-15)  # oracle: the list without it
    plain, padded = (torch.autograd.grad(each.sum(), scores_GS, retain_graph=True)[0] for each in (plain_G, padded_G))
    torch.testing.assert_close(padded, plain, rtol=1e-11, atol=1e-15)
    assert (padded[:, 6:] == 0).all()


@each_list_loss
@pytest.mark.parametrize("gap", [90.0, 1e3, 1e5])
def test_scores_far_apart_give_finite_losses_and_gradients_in_float32(loss: Loss, gap: float) -> None:
    scores_GS = torch.tensor([[0.0, gap, 0.5 * gap]], requires_grad=True)
    value = loss(scores_GS, torch.tensor([[2.0, 0.0, 1.0]])).sum()
    (slope_GS,) = torch.autograd.grad(value, scores_GS)
    assert value.isfinite() and slope_GS.isfinite().all()
    # limits of the definitions: the sums of differences in the wrong order, over three pairs or two places; 2/3 and
    # 1/3 of the label; 1 - NDCG of the reversed order
    worst: dict[type[Loss], float] = {Pairwise: 2 / 3 * gap, ListMle: 0.75 * gap, Softmax: gap * (2 / 3 + 1 / 3 * 0.5)}
    reversed_ndcg = (3 / 2 + 1 / math.log2(3)) / (3 + 1 / math.log2(3))
    assert value.item() == pytest.approx(worst.get(type(loss), 1 - reversed_ndcg), rel=1e-3)


@each_list_loss
def test_one_row_or_equal_labels_say_nothing_and_give_no_nan(loss: ListLoss) -> None:
    labels_GS = torch.tensor(  # one row; no row; equal labels, of any height; then two that do say something
        [[1.0, NAN, NAN], [NAN, NAN, NAN], [0.0, 0.0, NAN], [2.0, 2.0, 2.0], [NAN, 0.0, 1.0], [1.0, 2.0, 2.0]],
        dtype=torch.float64,
    )
    assert loss.says(labels_GS).tolist() == [False, False, False, False, True, True]  # by hand
    scores_GS = normal(6, 3).requires_grad_()
    value_G = loss(scores_GS, labels_GS)
    (slope_GS,) = torch.autograd.grad((value_G * loss.says(labels_GS)).sum(), scores_GS)
    assert value_G.isfinite().all() and slope_GS.isfinite().all()
    assert (slope_GS[:4] == 0).all() and (slope_GS[4] != 0).any() and (slope_GS[5] != 0).any()


@each_list_loss
def test_better_scores_cost_less(loss: Loss) -> None:
    labels = row(3.0, 2.0, 1.0, 0.0)
    in_order, swapped, backwards = row(3.0, 2.0, 1.0, 0.0), row(3.0, 1.0, 2.0, 0.0), row(0.0, 1.0, 2.0, 3.0)
    costs = [of_list(loss, scores, labels) for scores in (2 * in_order, in_order, swapped, backwards)]
    # monotone in the quality of the order; softmax alone is not least at the steepest scores, its labels being shares
    assert costs[1] < costs[2] < costs[3] and (costs[0] < costs[1] or isinstance(loss, Softmax))


def test_lists_equal_a_dict_of_lists() -> None:
    group_B = torch.randint(-3, 6, (200,), generator=torch.Generator().manual_seed(0)) * 2**60  # as hashes are: large
    group_B[150:] = torch.arange(50)  # and fifty of one row
    by_group: dict[int, list[int]] = {}
    for number, group in enumerate(group_B.tolist()):
        by_group.setdefault(group, []).append(number)
    rows_GS = lists(group_B)
    found = [[number for number in rows if number >= 0] for rows in rows_GS.tolist()]
    assert sorted(found) == sorted(by_group.values())  # a dict of lists, in the order of the rows
    assert rows_GS.shape == (len(by_group), max(map(len, by_group.values())))
    assert all((rows[len(own) :] == -1).all() for rows, own in zip(rows_GS, found, strict=True))  # only behind the end


def test_values_of_rows_as_lists_and_their_gradients() -> None:
    values_B = row(1.0, 2.0, 3.0, 4.0).requires_grad_()
    rows_GS = lists(torch.tensor([7, -2, 7, 7]))
    values_GS = in_lists(values_B, rows_GS, -5.0)
    assert values_GS.tolist() == [[2.0, -5.0, -5.0], [1.0, 3.0, 4.0]]  # by hand
    (slope_B,) = torch.autograd.grad((values_GS * torch.arange(1.0, 7).view(2, 3)).sum(), values_B)
    assert slope_B.tolist() == [4.0, 1.0, 5.0, 6.0]  # each row's own place; nothing from behind a list's end


@each_list_loss
def test_an_empty_share_of_a_batch_has_no_list_and_no_loss(loss: ListLoss) -> None:
    rows_GS = lists(torch.zeros(0, dtype=torch.int64))
    scores_B = torch.zeros(0, requires_grad=True)
    target_GS = in_lists(torch.zeros(0), rows_GS, NAN)
    value_G = loss(in_lists(scores_B, rows_GS, 0.0), target_GS)
    assert value_G.shape == loss.says(target_GS).shape == (0,)  # a worker without rows takes part all the same
    assert torch.autograd.grad(value_G.sum(), scores_B)[0].shape == (0,)
