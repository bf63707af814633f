"""Proof tests of trainer/towers.py: who reads whom, in which direction gradients run, plain twins of each relation."""

import math
from collections.abc import Callable, Sequence
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as surprise

from trainer.towers import Head, Relation, Towers, Transfer, parents_first

WIDTH, LAYERS = 6, (8, 5)
FUNNEL = [Head(), Head(cascade=0), Head(cascade=1)]  # view, cart, buy
RELATIONS: dict[str, Callable[[int], Head]] = {
    "links": lambda parent: Head(links=(parent,)),
    "transfer": lambda parent: Head(transfer=parent),
    "cascade": lambda parent: Head(cascade=parent),
}


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 sums of at most 16 products of numbers below 10, in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shared(num_heads: int, num_rows: int = 32) -> Tensor:
    return torch.randn(num_heads, num_rows, WIDTH)


def tower(towers: Towers, head: int, h_TBH: Tensor) -> Tensor:
    """A head's own tower, layer by layer."""
    x_BH = h_TBH[head]
    for weight, bias in towers.towers.weights:
        x_BH = torch.relu(nn.functional.linear(x_BH, weight[head].T, bias[head, 0]))
    return x_BH


def out(towers: Towers, logit: int, hidden_BH: Tensor) -> Tensor:
    return nn.functional.linear(hidden_BH, towers.out.weight[logit].T, towers.out.bias[logit, 0])[:, 0]


def gradients_by_head(towers: Towers, logit_B: Tensor, h_TBH: Tensor) -> Tensor:
    """How much a logit moves each head's tower: the largest gradient of any of its weights and inputs, [T]."""
    wanted = [*towers.towers.parameters(), h_TBH]
    found = torch.autograd.grad(logit_B.square().sum(), wanted, retain_graph=True)
    return torch.stack([gradient.abs().flatten(1).amax(1) for gradient in found]).amax(0)


@pytest.mark.parametrize("layers", [(), (5,), (8, 5)])
def test_heads_that_read_no_other_are_plain_networks_side_by_side(layers: tuple[int, ...]) -> None:
    towers, h_TBH = Towers([Head(), Head(2), Head()], WIDTH, layers), shared(3)
    logits_BL = towers(h_TBH)
    assert logits_BL.shape == (32, 4) and logits_BL.dtype == torch.float32
    for logit, head in enumerate([0, 1, 1, 2]):  # the heads' logits side by side
        assert_close(logits_BL[:, logit], out(towers, logit, tower(towers, head, h_TBH)))  # torch.nn.functional


def test_without_links_the_towers_are_those_of_a_model_that_knows_none() -> None:
    """The relations' weights are drawn after the towers': what a head is that reads nobody does not depend on them."""
    plain = Towers([Head(), Head(), Head()], WIDTH, LAYERS)
    linked = Towers([Head(), Head(links=(0,)), Head()], WIDTH, LAYERS)
    linked.load_state_dict(plain.state_dict(), strict=False)
    h_TBH = shared(3)
    assert torch.equal(linked(h_TBH)[:, [0, 2]], plain(h_TBH)[:, [0, 2]])  # the same bits
    assert (linked(h_TBH)[:, 1] != plain(h_TBH)[:, 1]).all()


# Which head reads which


def test_parents_come_first_whatever_the_order_of_the_heads() -> None:
    parents = {"buy": ["cart", "click"], "cart": ["click"], "click": [], "like": ["click"], "watch": []}
    for names in permutations(parents):
        order = [names[h] for h in parents_first([[names.index(p) for p in parents[name]] for name in names])]
        assert sorted(order) == sorted(names)
        assert all(order.index(p) < order.index(name) for name in names for p in parents[name])  # by definition


@pytest.mark.parametrize("parents", [[[0]], [[1], [0]], [[], [2], [3], [1]], [[1], [2], [0, 3], []]])
def test_a_circle_is_refused(parents: Sequence[Sequence[int]]) -> None:
    with pytest.raises(ValueError, match="circle"):
        parents_first(parents)
    if len(parents) > 1:
        with pytest.raises(ValueError, match="circle"):
            Towers([Head(links=tuple(of)) for of in parents], WIDTH, LAYERS)


def test_thirty_heads_of_which_each_reads_all_before_it_are_ordered_at_once() -> None:
    """Each head is visited once; a walk along every path would take 2^29 visits."""
    assert parents_first([list(range(head)) for head in range(30)]) == list(range(30))


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_order_in_which_heads_are_named_changes_no_logit(relation: str) -> None:
    """A chain of three named from its end equals the same chain named from its start, weights carried over."""
    read, h_TBH = RELATIONS[relation], shared(3)
    forward, backward = ([Head(), read(0), read(1)], [read(1), read(2), Head()])
    straight, turned = Towers(forward, WIDTH, LAYERS), Towers(backward, WIDTH, LAYERS)
    state = {name: weight.flip(0) for name, weight in straight.state_dict().items() if name[:3] in ("tow", "out")}
    for name, weight in straight.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind in ("relations", "transfers"):
            state[f"{kind}.{2 - int(rest[0])}{rest[1:]}"] = weight
    turned.load_state_dict(state)
    assert_close(turned(h_TBH.flip(0)).flip(1), straight(h_TBH))


@pytest.mark.parametrize("relation", RELATIONS)
def test_a_childs_loss_reaches_all_its_ancestors_and_a_parents_loss_never_its_children(relation: str) -> None:
    read = RELATIONS[relation]
    towers = Towers([Head(), read(0), read(1), Head()], WIDTH, LAYERS)  # a chain of three, and one that reads nobody
    h_TBH = shared(4).requires_grad_()
    logits_BL = towers(h_TBH)
    reached = [gradients_by_head(towers, logits_BL[:, head], h_TBH) > 0 for head in range(4)]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]  # exactly zero elsewhere, by definition
    assert torch.equal(torch.stack(reached).int(), torch.tensor(expected, dtype=torch.int32))


def test_a_parents_loss_leaves_the_relations_of_its_children_alone() -> None:
    towers = Towers([Head(), Head(links=(0,)), Head(transfer=0)], WIDTH, LAYERS)
    own = [*towers.relations.parameters(), *towers.transfers.parameters()]
    gradients = torch.autograd.grad(towers(shared(3))[:, 0].sum(), own)
    assert own and all((gradient == 0).all() for gradient in gradients)  # exactly


# Links (DBMTL)


def test_a_linked_head_reads_its_own_tower_and_its_parents_made_features() -> None:
    """relation_k = ReLU(W [tower_k, relation_parents] + b), as EasyRec's relation_mlp of one layer."""
    towers, h_TBH = Towers([Head(links=(2, 1)), Head(), Head(links=(1,))], WIDTH, LAYERS), shared(3)
    own = [tower(towers, head, h_TBH) for head in range(3)]
    of_first, of_last = towers.relations["0"], towers.relations["2"]
    assert isinstance(of_first, Relation) and isinstance(of_last, Relation)
    made = torch.relu(nn.functional.linear(torch.cat([own[2], own[1]], 1), of_last.linear.weight, of_last.linear.bias))
    both = torch.cat([own[0], made, own[1]], 1)  # the parent's features with what it took from its own parents
    first = torch.relu(nn.functional.linear(both, of_first.linear.weight, of_first.linear.bias))
    expected = torch.stack([out(towers, head, x) for head, x in enumerate([first, own[1], made])], 1)
    assert_close(towers(h_TBH), expected)


def held_out_loss(links: tuple[int, ...], seed: int) -> float:
    """Log loss of a third target after one pass over fresh rows. It is known on one row in 16, and has the latent of
    the first; the second has one of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(num_rows: int) -> tuple[Tensor, Tensor]:
        x_BI = torch.randn(num_rows, 4, generator=generator)
        latent_BT = 3 * torch.sin(2 * x_BI[:, [0, 2, 0]] + x_BI[:, [1, 3, 1]])
        return x_BI.expand(3, -1, -1), (torch.rand(num_rows, 3, generator=generator) < latent_BT.sigmoid()).float()

    torch.manual_seed(seed)
    towers = Towers([Head(), Head(), Head(links=links)], 4, (16,))
    optimizer = torch.optim.Adam(towers.parameters(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        x_TBI, labels_BT = rows(128)
        logits_BL = towers(x_TBI)
        known = [surprise(logits_BL[:n, t], labels_BT[:n, t]) for t, n in enumerate((128, 128, 8))]
        torch.stack(known).sum().backward()
        optimizer.step()
    x_TBI, labels_BT = rows(4_000)
    with torch.no_grad():
        return float(surprise(towers(x_TBI)[:, 2], labels_BT[:, 2]))


@pytest.fixture(scope="module")
def losses_3S() -> Tensor:
    """By seed: of the third target without a link, linked to the first, linked to the second."""
    return torch.tensor([[held_out_loss(links, seed) for seed in range(4)] for links in ((), (0,), (1,))])


def test_a_link_helps_where_a_target_follows_from_the_latent_of_the_other(losses_3S: Tensor) -> None:
    """Paired over seeds, beside a tower without a link and beside the same net linked elsewhere: not by its size."""
    unlinked_S, linked_S, linked_elsewhere_S = losses_3S
    for gain_S in (unlinked_S - linked_S, linked_elsewhere_S - linked_S):
        assert gain_S.mean() > 3 * gain_S.std() / math.sqrt(4)  # t > 3; measured: 17 and 7


def test_a_link_does_no_harm_where_the_targets_are_independent(losses_3S: Tensor) -> None:
    unlinked_S, _, linked_elsewhere_S = losses_3S
    assert (linked_elsewhere_S < unlinked_S + 0.01).all()  # log loss; measured: lower by 0.1


# Transfer (AITM)


def attended(transfer: Transfer, own_H: Tensor, earlier_H: Tensor) -> tuple[Tensor, Tensor]:
    """One row by the official code's formulas: the attention's weights and what it makes."""
    passed = torch.relu(transfer.info.weight @ earlier_H + transfer.info.bias)
    scores, values = [], []
    for vector_H in (own_H, passed):
        query, key, value = (m.weight @ vector_H + m.bias for m in (transfer.query, transfer.key, transfer.value))
        scores.append((query * key).sum() / math.sqrt(own_H.numel()))
        values.append(value)
    total = sum(torch.exp(score) for score in scores)
    weights = torch.stack([torch.exp(score) / total for score in scores])
    return weights, weights[0] * values[0] + weights[1] * values[1]


def test_transfer_is_the_official_attention_over_two_vectors() -> None:
    transfer, own_BH, earlier_BH = Transfer(5), torch.randn(20, 5), torch.randn(20, 5)
    rows = [attended(transfer, own, earlier) for own, earlier in zip(own_BH, earlier_BH, strict=True)]
    assert_close(transfer(own_BH, earlier_BH), torch.stack([made for _, made in rows]))  # a loop over rows
    assert_close(torch.stack([weights.sum() for weights, _ in rows]), torch.ones(20))


def test_attention_weights_sum_to_one() -> None:
    """With the identity as value, and both vectors the same, only weights that sum to 1 give that vector back."""
    transfer, own_BH = Transfer(5), torch.rand(20, 5)
    for linear, weight in ((transfer.info, torch.eye(5)), (transfer.value, torch.eye(5))):
        linear.load_state_dict({"weight": weight, "bias": torch.zeros(5)})
    assert_close(transfer(own_BH, own_BH), own_BH)  # info is the identity on numbers that are not negative


def test_transferred_features_are_what_the_earlier_head_made_with_its_own() -> None:
    """Step by step, as in the official code: transfer(ait of the task before), not of its tower."""
    towers, h_TBH = Towers([Head(), Head(transfer=0), Head(transfer=1)], WIDTH, LAYERS), shared(3)
    made = [tower(towers, head, h_TBH) for head in range(3)]
    for head in (1, 2):
        transfer = towers.transfers[str(head)]
        assert isinstance(transfer, Transfer)
        made[head] = torch.stack(
            [attended(transfer, *pair)[1] for pair in zip(made[head], made[head - 1], strict=True)]
        )
    assert_close(towers(h_TBH), torch.stack([out(towers, head, x) for head, x in enumerate(made)], 1))


# Cascade (NMTR)


def test_a_behaviour_that_adds_nothing_is_predicted_like_the_one_before() -> None:
    towers, h_TBH = Towers(FUNNEL, WIDTH, LAYERS), shared(3)
    with torch.no_grad():
        for parameter in (towers.out.weight, towers.out.bias):
            parameter[1:] = 0  # f^r = 0 for r > 1
    view_B, cart_B, buy_B = towers(h_TBH).unbind(1)
    assert torch.equal(cart_B, view_B) and torch.equal(buy_B, view_B)  # exactly, by definition


def test_a_cascade_carries_the_logit_through_a_chain_of_three() -> None:
    towers, h_TBH = Towers(FUNNEL, WIDTH, LAYERS), 10 * shared(3)
    own_BL = torch.stack([out(towers, head, tower(towers, head, h_TBH)) for head in range(3)], 1)
    assert_close(towers(h_TBH), own_BL.cumsum(1))  # s^r = s^(r-1) + f^r: not the probability, which ends at 1


def test_the_last_behaviours_loss_reaches_the_first_ones_logit_unchanged() -> None:
    towers, h_TBH = Towers(FUNNEL, WIDTH, LAYERS), shared(3)
    loss = surprise(towers(h_TBH)[:, 2], torch.ones(32))
    of_view, of_buy = torch.autograd.grad(loss, towers.out.bias)[0].flatten()[[0, 2]]
    assert of_view == of_buy != 0  # d s^3 / d f^1 = d s^3 / d f^3 = 1


@pytest.mark.parametrize("behaviour", range(3))
def test_all_the_weight_on_one_behaviour_learns_as_that_behaviour_alone(behaviour: int) -> None:
    towers, h_TBH = Towers(FUNNEL, WIDTH, LAYERS), shared(3)
    labels_BT, weights_T = (torch.rand(32, 3) < 0.3).float(), torch.eye(3)[behaviour]
    together = (surprise(towers(h_TBH), labels_BT, reduction="none").mean(0) * weights_T).sum()
    parameters = list(towers.parameters())
    got = torch.autograd.grad(together, parameters)
    own_BT = torch.stack([out(towers, head, tower(towers, head, h_TBH)) for head in range(behaviour + 1)], 1)
    alone = surprise(own_BT.sum(1), labels_BT[:, behaviour])  # a plain model of that label: f^1 + ... + f^r
    want = torch.autograd.grad(alone, parameters)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)  # sums over 32 rows in another order
        assert (ours[behaviour + 1 :] == 0).all()  # later behaviours learn nothing, exactly


def test_of_heads_with_several_logits_the_first_are_carried() -> None:
    heads = [Head(3), Head(2, cascade=0), Head(1, cascade=1)]
    towers, h_TBH = Towers(heads, WIDTH, LAYERS), shared(3)
    own_BL = torch.stack(
        [out(towers, logit, tower(towers, head, h_TBH)) for logit, head in enumerate([0, 0, 0, 1, 1, 2])], 1
    )
    expected = own_BL.clone()
    expected[:, 3] += own_BL[:, 0]
    expected[:, 5] += expected[:, 3]
    assert_close(towers(h_TBH), expected)


def test_one_head_may_be_linked_transferred_to_and_cascaded_at_once() -> None:
    """First it attends to the one before, then the relation reads that, then its logit is added: a plain twin."""
    heads = [Head(), Head(), Head(links=(0,), transfer=1, cascade=0)]
    towers, h_TBH = Towers(heads, WIDTH, LAYERS), shared(3)
    first, second, own = (tower(towers, head, h_TBH) for head in range(3))
    hidden = towers.relations["2"](towers.transfers["2"](own, second), [first])
    assert_close(towers(h_TBH)[:, 2], out(towers, 2, hidden) + out(towers, 0, first))


# Sizes and precision

MIXED = [Head(2), Head(links=(0,)), Head(transfer=1), Head(cascade=2)]


def test_no_row_or_one_row_gives_as_many_rows_of_logits() -> None:
    towers, h_TBH = Towers(MIXED, WIDTH, LAYERS), shared(4, num_rows=5)
    assert towers(h_TBH[:, :0]).shape == (0, 5)
    assert_close(torch.cat([towers(h_TBH[:, b : b + 1]) for b in range(5)]), towers(h_TBH))  # the rows together


def test_under_bf16_autocast_logits_are_float32_and_near_those_of_float32() -> None:
    towers, h_TBH = Towers(MIXED, WIDTH, LAYERS), shared(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BL = towers(h_TBH)
    assert logits_BL.dtype == torch.float32
    # bf16 has 8 bits: six layers of relative error 2^-8 each on numbers below 2
    torch.testing.assert_close(logits_BL, towers(h_TBH), rtol=0.05, atol=0.05)
    logits_BL.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in towers.parameters())
