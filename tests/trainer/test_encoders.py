"""Proof tests of trainer/encoders.py: torch.nn.LSTM, plain loops over behaviours, what may change what."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.encoders import GatedLstm, PropertyGatedAttention
from trainer.features import Inputs, Layout

ITEM, PROPERTY, QUERY, HIDDEN, LONGEST = 5, 3, 2, 6, 7
LAYOUT = Layout({"user": range(4), "query": range(4, 4 + QUERY)}, {"items": ITEM, "actions": PROPERTY})
DUPN: dict[str, Any] = {"items": "items", "properties": "actions", "query": ("query",), "hidden": HIDDEN}
GATES = {"input": 0, "forget": 1, "output": 2, "candidate": 3}


def assert_close(got: Tensor, want: Tensor) -> None:
    """Float32 through at most seven steps of an LSTM, sums in another order."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def encoder(**settings: Any) -> PropertyGatedAttention:
    return PropertyGatedAttention(LAYOUT, **(DUPN | settings))


def inputs(lengths: list[int], longest: int = LONGEST) -> Inputs:
    """Random behaviours, zeros behind the end."""
    there_BL = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    lists = {
        name: (torch.randn(len(lengths), longest, dim) * there_BL.unsqueeze(2), there_BL)
        for name, dim in LAYOUT.lists.items()
    }
    return Inputs(torch.randn(len(lengths), LAYOUT.input_dim), lists, [])


def select(batch: Inputs, rows: Tensor) -> Inputs:
    lists = {name: (rows_BLD[rows], there_BL[rows]) for name, (rows_BLD, there_BL) in batch.lists.items()}
    return Inputs(batch.x_BI[rows], lists, [])


def with_query(batch: Inputs, query_BQ: Tensor) -> Inputs:
    return Inputs(torch.cat([batch.x_BI[:, :4], query_BQ], dim=1), batch.lists, [])


def block(lstm: GatedLstm, gate: str) -> slice:
    """Where a gate's numbers stand among the 4H."""
    return slice(GATES[gate] * lstm.hidden, (GATES[gate] + 1) * lstm.hidden)


# The property-gated LSTM


def test_without_properties_it_is_torchs_lstm() -> None:
    lstm, library, items_BLI = (
        GatedLstm(ITEM, 0, HIDDEN),
        nn.LSTM(ITEM, HIDDEN, batch_first=True),
        torch.randn(8, 9, ITEM),
    )
    # torch's order: i, f, g, o
    rows = torch.cat([torch.arange(4 * HIDDEN)[block(lstm, g)] for g in ("input", "forget", "candidate", "output")])
    weights = {"weight_ih_l0": lstm.of_input.weight, "weight_hh_l0": lstm.of_hidden.weight}
    weights |= {"bias_ih_l0": lstm.of_input.bias, "bias_hh_l0": torch.zeros(4 * HIDDEN)}
    library.load_state_dict({name: weight[rows] for name, weight in weights.items()})
    expected_BLH, _ = library(items_BLI)
    torch.testing.assert_close(lstm(items_BLI, items_BLI[..., :0]), expected_BLH, rtol=0, atol=1e-6)


def test_properties_that_weigh_nothing_leave_torchs_lstm() -> None:
    lstm, items_BLI = GatedLstm(ITEM, PROPERTY, HIDDEN), torch.randn(8, 9, ITEM)
    assert lstm.of_property is not None
    nn.init.zeros_(lstm.of_property.weight)
    plain = GatedLstm(ITEM, 0, HIDDEN)
    plain.load_state_dict(lstm.state_dict(), strict=False)
    assert torch.equal(lstm(items_BLI, torch.randn(8, 9, PROPERTY)), plain(items_BLI, items_BLI[..., :0]))


def stepped(lstm: GatedLstm, items_LI: Tensor, properties_LP: Tensor) -> Tensor:
    """The states of one row, step by step, by the paper's formulas."""
    h_H = cell_H = torch.zeros(lstm.hidden)
    states = []
    for item_I, property_P in zip(items_LI, properties_LP, strict=True):
        of = {}
        for gate in GATES:
            rows = block(lstm, gate)
            of[gate] = (
                lstm.of_input.weight[rows] @ item_I + lstm.of_hidden.weight[rows] @ h_H + lstm.of_input.bias[rows]
            )
            if lstm.of_property is not None and gate != "candidate":
                of[gate] = of[gate] + lstm.of_property.weight[rows] @ property_P
        cell_H = of["forget"].sigmoid() * cell_H + of["input"].sigmoid() * of["candidate"].tanh()
        h_H = of["output"].sigmoid() * cell_H.tanh()
        states.append(h_H)
    return torch.stack(states)


def test_states_are_the_papers_formulas_step_by_step() -> None:
    lstm = GatedLstm(ITEM, PROPERTY, HIDDEN)
    items_BLI, properties_BLP = torch.randn(4, LONGEST, ITEM), torch.randn(4, LONGEST, PROPERTY)
    rows = [stepped(lstm, *row) for row in zip(items_BLI, properties_BLP, strict=True)]
    assert_close(lstm(items_BLI, properties_BLP), torch.stack(rows))


def hold_open(lstm: GatedLstm, *gates: str) -> None:
    """sigmoid(100) is 1 in float32, and its slope 0."""
    with torch.no_grad():
        for gate in gates:
            lstm.of_input.bias[block(lstm, gate)] = 100.0


def slope_by_property(lstm: GatedLstm) -> Tensor:
    """The largest derivative of the last state by each step's property: [L]."""
    properties_BLP = torch.randn(4, LONGEST, PROPERTY, requires_grad=True)
    last_BH = lstm(torch.randn(4, LONGEST, ITEM), properties_BLP)[:, -1]
    (slope_BLP,) = torch.autograd.grad(last_BH.square().sum(), properties_BLP)
    return slope_BLP.abs().amax((0, 2))


def test_what_is_remembered_never_depends_on_the_property() -> None:
    """With all gates held open the state is tanh of the summed candidates: nothing of the property is left in it."""
    lstm = GatedLstm(ITEM, PROPERTY, HIDDEN)
    hold_open(lstm, "input", "forget", "output")
    assert (slope_by_property(lstm) == 0).all()  # exactly


@pytest.mark.parametrize("gate", ["input", "forget", "output"])
def test_each_gate_depends_on_the_property(gate: str) -> None:
    lstm = GatedLstm(ITEM, PROPERTY, HIDDEN)
    hold_open(lstm, *({"input", "forget", "output"} - {gate}))
    slope_L = slope_by_property(lstm)
    # an input gate lets each step in; a forget gate acts on what came before; an output gate shows the last alone
    reached = {"input": slope_L, "forget": slope_L[1:], "output": slope_L[-1:]}[gate]
    assert (reached > 0).all()


# What the encoder makes of it


def summed_up(net: PropertyGatedAttention, batch: Inputs, row: int) -> Tensor:
    """One row's behaviours and no more, by the paper's formulas."""
    (items_LI, there_L), (properties_LP, _) = ((x[row], y[row]) for x, y in batch.lists.values())
    num, query_Q = int(there_L.sum()), batch.x_BI[row, 4:]
    if not num:
        return torch.zeros(HIDDEN)
    states_LH, logits = stepped(net.lstm, items_LI[:num], properties_LP[:num]), []
    for step in range(num):
        seen = torch.cat([states_LH[step], properties_LP[step], query_Q])
        for weight, bias in net.attention.weights:
            seen = torch.relu(seen @ weight[0] + bias[0, 0])
        logits.append(seen @ net.score.weight[0])
    return torch.stack(logits).softmax(0) @ states_LH


@pytest.mark.parametrize("attention_layers", [(), (4,), (8, 4)])
def test_the_encoder_is_the_attention_over_the_states_of_each_rows_own_behaviours(attention_layers: Any) -> None:
    net, batch = encoder(attention_layers=attention_layers), inputs([7, 0, 1, 3, 5])
    expected = torch.stack([summed_up(net, batch, row) for row in range(5)])  # a loop over rows and steps
    assert_close(net(batch, None), expected)
    assert net.output_dim == HIDDEN and net.reads == ("items", "actions", "query")


def test_a_longer_padding_changes_nothing() -> None:
    net, batch = encoder(), inputs([7, 0, 1, 3, 5])
    pad = nn.functional.pad
    longer = {name: (pad(x, (0, 0, 0, 4)), pad(there_BL, (0, 4))) for name, (x, there_BL) in batch.lists.items()}
    assert_close(net(Inputs(batch.x_BI, longer, []), None), net(batch, None))


def test_whatever_stands_behind_the_end_changes_nothing_and_learns_nothing() -> None:
    net, batch = encoder(), inputs([7, 0, 1, 3, 5])
    leaves = {}
    for name, (rows_BLD, there_BL) in batch.lists.items():
        filled_BLD = torch.where(there_BL.unsqueeze(2), rows_BLD, torch.full_like(rows_BLD, 50.0))
        leaves[name] = (filled_BLD.requires_grad_(), there_BL)
    encoded_BH = net(Inputs(batch.x_BI, leaves, []), None)
    assert_close(encoded_BH, net(batch, None))
    encoded_BH.square().sum().backward()
    for rows_BLD, there_BL in leaves.values():
        assert rows_BLD.grad is not None and (rows_BLD.grad[~there_BL] == 0).all()  # exactly
        assert (rows_BLD.grad[there_BL] != 0).any(1).all()


def test_a_row_without_behaviours_gives_zeros_and_finite_gradients() -> None:
    net, batch = encoder(), inputs([0, 0, 3])
    encoded_BH = net(batch, None)
    assert (encoded_BH[:2] == 0).all() and (encoded_BH[2] != 0).all()
    encoded_BH[:2].sum().backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


class Places(nn.Module):
    """In place of an LSTM: each step's state is a one at its own place, so that what is summed up is the shares."""

    def forward(self, items_BLI: Tensor, properties_BLP: Tensor) -> Tensor:
        return torch.eye(items_BLI.shape[1]).expand(items_BLI.shape[0], -1, -1)


def test_attention_shares_are_positive_and_sum_to_one_over_what_is_there() -> None:
    lengths = [7, 0, 1, 3, 5]
    net, batch = encoder(hidden=LONGEST), inputs(lengths)
    for module, value in ((net.attention.layers[-1].bias, 50.0), (net.score.weight, -1.0)):
        nn.init.constant_(module, value)  # logits far below the zeros of a careless mask
    net.lstm = Places()  # type: ignore[assignment]
    share_BL, there_BL = net(batch, None), batch.lists["items"][1]
    assert (share_BL[~there_BL] == 0).all() and (share_BL[there_BL] > 0).all()
    assert_close(share_BL.sum(1), (torch.tensor(lengths) > 0).float())


@pytest.mark.parametrize("changed", ["query", "actions"])
def test_attention_sees_the_query_and_the_property_itself(changed: str) -> None:
    """DUPN's second half: with the states held fixed the shares still depend on both."""
    net, batch = encoder(hidden=LONGEST), inputs([LONGEST] * 4)
    net.lstm = Places()  # type: ignore[assignment]
    other = with_query(batch, torch.randn(4, QUERY))
    if changed == "actions":
        actions = (torch.randn(4, LONGEST, PROPERTY), batch.lists["actions"][1])
        other = Inputs(batch.x_BI, {"items": batch.lists["items"], "actions": actions}, [])
    assert not torch.allclose(net(batch, None), net(other, None), atol=1e-4)


def test_the_query_changes_the_attention_but_not_the_states() -> None:
    """So the states belong to the user alone: they can be kept between requests."""
    net, batch, states = encoder(), inputs([7, 4, 1]), []
    net.lstm.register_forward_hook(lambda module, given, made: states.append(made))
    encoded = [net(with_query(batch, query_BQ), None) for query_BQ in torch.randn(2, 3, QUERY)]
    assert torch.equal(*states)  # the same bits
    assert not torch.allclose(encoded[0][:2], encoded[1][:2], atol=1e-5)
    assert torch.equal(encoded[0][2], encoded[1][2])  # a single behaviour has all the attention, whatever the query


def test_features_that_are_not_named_are_not_read() -> None:
    net, batch = encoder(), inputs([7, 4, 1])
    elsewhere_BI = batch.x_BI.clone()
    elsewhere_BI[:, :4] += 1  # the user
    assert torch.equal(net(Inputs(elsewhere_BI, batch.lists, []), None), net(batch, None))


def test_items_alone_are_enough() -> None:
    net, batch = PropertyGatedAttention(LAYOUT, items="items", hidden=HIDDEN), inputs([7, 0, 3])
    assert net.lstm.of_property is None and net.reads == ("items",)
    assert net(batch, None).shape == (3, HIDDEN)


@pytest.mark.parametrize("wrong", [{"items": "user"}, {"properties": "query"}, {"query": ("items",)}])
def test_a_feature_of_the_wrong_kind_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no (list with pool: none|feature of the main input)"):
        encoder(**wrong)


# Chance, sizes, precision


def test_dropout_keeps_the_expectation() -> None:
    net, batch = encoder(dropout=0.3), inputs([5])
    many = select(batch, torch.zeros(20_000, dtype=torch.int64))
    with torch.no_grad():
        kept_BH, whole_H = net(many, Draws(torch.arange(20_000), 0, 1)), net(batch, None)[0]
    ratio_BH = kept_BH / whole_H
    assert_close(ratio_BH[ratio_BH > 0], torch.tensor(1 / 0.7).expand(int((ratio_BH > 0).sum())))
    # binomial law of each of the six: four standard deviations of sqrt(.3 / .7 / 20000)
    assert (ratio_BH.mean(0) - 1).abs().max() < 4 * (0.3 / 0.7 / 20_000) ** 0.5


def test_dropout_belongs_to_the_row_and_is_absent_from_scoring() -> None:
    net, batch, row_B = encoder(dropout=0.5), inputs([7, 1, 3, 5, 2, 4]), torch.arange(100, 106)
    together_BH, order = net(batch, Draws(row_B, 0, 1)), torch.tensor([4, 0, 5, 2, 3, 1])
    parts = [net(select(batch, rows), Draws(row_B[rows], 0, 1)) for rows in order.split([1, 3, 2])]
    assert_close(torch.cat(parts), together_BH[order])  # oracle: one batch
    assert (together_BH == 0).any() and (net(batch, None) != 0).all()


def test_no_row_or_one_row_gives_as_many_rows() -> None:
    net, batch = encoder(dropout=0.5), inputs([7, 1, 3])
    for draws in (None, Draws(torch.arange(0), 0, 1)):
        assert net(inputs([]), draws).shape == (0, HIDDEN)
    assert_close(net(select(batch, torch.tensor([0])), None), net(batch, None)[:1])


def test_under_bf16_autocast_it_is_near_float32_and_learns() -> None:
    net, batch = encoder(), inputs([7, 0, 1, 3, 5])
    with torch.autocast("cpu", torch.bfloat16):
        encoded_BH = net(batch, None)
    # bf16 has 8 bits, numbers are below 1, seven steps
    torch.testing.assert_close(encoded_BH.float(), net(batch, None), rtol=0.05, atol=0.02)
    assert (encoded_BH[1] == 0).all()
    encoded_BH.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
