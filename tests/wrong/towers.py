"""Wrong towers, encoders, position towers and auxiliary nets."""

# mypy: disable-error-code="method-assign,assignment"

from dataclasses import replace
from typing import Any

from wrong.mutant import Mutant, in_file

# What is replaced is imported inside: nothing of ours may be imported before a mutant is applied.


def cascade_of_probabilities() -> None:
    """NMTR carries on the probability of the behaviour before, where it must be the logit."""
    import torch

    from trainer.towers import Towers

    def cascaded(self: Towers, logits_BL: Any) -> Any:
        columns = list(logits_BL.unbind(1))
        for h in self._order:
            parent = self.heads[h].cascade
            if parent is not None:
                columns[self._first[h]] = columns[self._first[h]] + torch.sigmoid(columns[self._first[parent]])
        return torch.stack(columns, dim=1)

    Towers._cascaded = cascaded


def heads_in_the_order_of_the_configuration() -> None:
    """A parent that is listed later is read before it is made."""
    from trainer.towers import Towers

    start = Towers.__init__

    def as_listed(self: Towers, heads: Any, input_dim: int, layers: Any) -> None:
        start(self, heads, input_dim, layers)
        self._order = list(range(len(heads)))

    Towers.__init__ = as_listed


def parents_detached() -> None:
    """What a child learns never reaches the heads that it builds on."""
    from trainer.towers import Relation

    forward = Relation.forward
    Relation.forward = lambda self, own_BH, parents: forward(self, own_BH, [parent.detach() for parent in parents])


def attention_without_its_scale() -> None:
    """AITM's scores are not divided by the root of the width."""
    import torch

    from trainer.towers import Transfer

    def forward(self: Transfer, own_BH: Any, earlier_BH: Any) -> Any:
        both = torch.stack([torch.relu(self.info(earlier_BH)), own_BH], dim=1)
        weight = (self.query(both) * self.key(both)).sum(2).softmax(1)
        return torch.einsum("bs,bsh->bh", weight, self.value(both))

    Transfer.forward = forward


def property_in_the_candidate() -> None:
    """DUPN's property is remembered: a plain LSTM over items and properties side by side."""
    import torch

    from trainer.encoders import GatedLstm

    def forward(self: GatedLstm, items_BLI: Any, properties_BLP: Any) -> Any:
        pushed = self.of_input(items_BLI)
        if self.of_property is not None:
            p = self.of_property(properties_BLP)
            pushed = pushed + torch.cat([p, p[..., : self.hidden]], dim=-1)
        h = cell = pushed.new_zeros(items_BLI.shape[0], self.hidden)
        states = []
        for x in pushed.unbind(1):
            i, f, o, c = (x + self.of_hidden(h)).split(self.hidden, dim=1)
            cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(c)
            h = torch.sigmoid(o) * torch.tanh(cell)
            states.append(h)
        return torch.stack(states, dim=1)

    GatedLstm.forward = forward


def padding_takes_attention() -> None:
    """What stands behind a list's end has a share of the attention."""
    import torch

    from trainer.encoders import PropertyGatedAttention

    forward = PropertyGatedAttention.forward

    def unmasked(self: PropertyGatedAttention, inputs: Any, draws: Any) -> Any:
        lists = {name: (rows, torch.ones_like(there)) for name, (rows, there) in inputs.lists.items()}
        return forward(self, replace(inputs, lists=lists), draws)

    PropertyGatedAttention.forward = unmasked


def position_in_the_main_tower() -> None:
    """The position is a feature like any other: at serving it has none, and scores are those of no place at all."""
    import torch

    from trainer.features import Features

    inputs = Features.inputs

    def told(self: Features, blocks: Any, numbers_B2K: Any, batch: Any, draws: Any) -> Any:
        made = inputs(self, blocks, numbers_B2K, batch, draws)
        if not made.selection:
            return made
        place_BD = self._vectors(blocks, batch, draws)["position"]
        width = place_BD.shape[1]
        return replace(made, x_BI=torch.cat([made.x_BI[:, :width] + place_BD, made.x_BI[:, width:]], dim=1))

    def always_there(self: Features, name: str, batch: Any, draws: Any) -> Any:
        return (batch.ids[name].lengths_B > 0).float()

    Features.inputs, Features.presence = told, always_there


def position_always_there_in_training() -> None:
    """No position is ever dropped: the vector that scores every served row was never trained."""
    from trainer.features import Features

    presence = Features.presence

    def undropped(self: Features, name: str, batch: Any, draws: Any) -> Any:
        there_B = (batch.ids[name].lengths_B > 0).float()
        return there_B if draws else presence(self, name, batch, draws)

    Features.presence = undropped


def the_missing_vector_is_not_learnt() -> None:
    """A missing position reads as zeros, which no training row has ever shown."""
    from trainer.model import PositionTower

    forward = PositionTower.forward

    def forgetful(self: PositionTower, selection: Any) -> Any:
        return forward(self, [(vector_BD, present_B * 0 + 1) for vector_BD, present_B in selection])

    PositionTower.forward = forgetful


def position_on_every_task() -> None:
    """The place where a row was shown moves satisfaction too, and not engagement alone."""
    from trainer.model import MultiTaskModel

    start = MultiTaskModel.__init__

    def everywhere(self: MultiTaskModel, body: Any, towers: Any, *, adds_to: Any = None, **settings: Any) -> None:
        places = adds_to and [range(towers.num_logits) for _ in adds_to]
        start(self, body, towers, adds_to=places, **settings)

    MultiTaskModel.__init__ = everywhere


def relu_last_in_the_matching_towers() -> None:
    """Inner products of two ReLU outputs are never below zero, and half of their dimensions are dead."""
    import torch

    from trainer.auxiliary import TanhTower

    TanhTower.forward = lambda self, x_BI: torch.relu(self.last(self.hidden(x_BI.unsqueeze(0))[0]))


def a_tower_for_the_target_and_one_for_its_context() -> None:
    """Every second id goes through a tower of its own: an id is not like itself."""
    import torch

    from trainer.auxiliary import Correlation, TanhTower

    start, forward = Correlation.__init__, TanhTower.forward

    def two(self: Correlation, layout: Any, **settings: Any) -> None:
        start(self, layout, **settings)
        context = TanhTower(layout.list_dim(settings["sequence"]), settings.get("layers", (64, 32)))

        def half(tower: TanhTower, arguments: Any, own_PD: Any) -> Any:
            first_P1 = (torch.arange(len(own_PD)) % 2 == 0).unsqueeze(1)
            return torch.where(first_P1, own_PD, forward(context, arguments[0]))

        self.tower.register_forward_hook(half)

    Correlation.__init__ = two


def negatives_from_the_window() -> None:
    """An id that stands beside the target is drawn as one that does not belong to it."""
    import torch

    from trainer.auxiliary import Correlation

    Correlation.near = lambda self, row_P, id_P, other_PQ: torch.zeros_like(other_PQ, dtype=torch.bool)


def negatives_from_the_whole_batch_of_a_worker() -> None:
    """The number of workers says which negatives there are."""
    import torch

    from trainer.auxiliary import Correlation

    others = Correlation.others
    Correlation.others = lambda self, row_P, lane_P, drawn_PQ: others(self, row_P, torch.zeros_like(lane_P), drawn_PQ)


def windows_across_rows() -> None:
    """Pairs are neighbours in the flat list of ids, whosever they are."""
    import torch

    from trainer import auxiliary

    pairs = auxiliary.window_pairs
    auxiliary.window_pairs = lambda row_P, window: pairs(torch.zeros_like(row_P), window)


def null_is_not_taken() -> None:
    """A user of whom it is not known yet whether he took the item is one who did not."""
    from trainer.auxiliary import Matching

    forward = Matching.forward

    def known(self: Matching, inputs: Any, batch: Any, label_B: Any, *rest: Any) -> Any:
        return forward(self, inputs, batch, label_B.nan_to_num(0.0), *rest)

    Matching.forward = known


TOWERS, ENCODERS, FEATURES, MODEL, AUXILIARY = (
    f"trainer/test_{name}.py" for name in ("towers", "encoders", "features", "model", "auxiliary")
)
MUTANTS = [
    Mutant(
        cascade_of_probabilities,
        in_file(
            TOWERS,
            "test_a_cascade_carries_the_logit_through_a_chain_of_three",
            "test_a_behaviour_that_adds_nothing_is_predicted_like_the_one_before",
        ),
    ),
    Mutant(
        heads_in_the_order_of_the_configuration,
        in_file(TOWERS, "test_the_order_in_which_heads_are_named_changes_no_logit"),
        "EasyRec",
    ),
    Mutant(
        parents_detached,
        in_file(TOWERS, "test_a_childs_loss_reaches_all_its_ancestors_and_a_parents_loss_never_its_children"),
    ),
    Mutant(attention_without_its_scale, in_file(TOWERS, "test_transfer_is_the_official_attention_over_two_vectors")),
    Mutant(property_in_the_candidate, in_file(ENCODERS, "test_what_is_remembered_never_depends_on_the_property")),
    Mutant(padding_takes_attention, in_file(ENCODERS, "test_a_longer_padding_changes_nothing")),
    Mutant(position_in_the_main_tower, in_file(FEATURES, "test_scores_do_not_depend_on_where_the_row_was_shown")),
    Mutant(
        position_always_there_in_training,
        in_file(FEATURES, "test_position_is_dropped_on_one_training_row_in_ten_and_absent_from_scoring"),
    ),
    Mutant(
        the_missing_vector_is_not_learnt,
        in_file(MODEL, "test_the_missing_vector_learns_only_from_rows_where_the_feature_is_missing"),
    ),
    Mutant(position_on_every_task, in_file(MODEL, "test_the_position_tower_leaves_the_logits_of_other_tasks_alone")),
    Mutant(
        relu_last_in_the_matching_towers,
        in_file(AUXILIARY, "test_an_inner_product_of_two_towers_can_be_below_zero"),
    ),
    Mutant(
        a_tower_for_the_target_and_one_for_its_context,
        in_file(AUXILIARY, "test_one_tower_serves_the_target_its_context_and_the_negatives"),
    ),
    Mutant(negatives_from_the_window, in_file(AUXILIARY, "test_no_negative_that_counts_stands_in_the_window")),
    Mutant(
        negatives_from_the_whole_batch_of_a_worker,
        in_file(
            AUXILIARY,
            "test_other_lanes_are_never_drawn_from",
            "test_any_split_of_lanes_over_workers_gives_the_same_negatives_losses_and_gradients",
        ),
    ),
    Mutant(windows_across_rows, in_file(AUXILIARY, "test_rows_that_stand_side_by_side_never_mix")),
    Mutant(null_is_not_taken, in_file(AUXILIARY, "test_a_row_whose_label_is_null_learns_nothing")),
]
