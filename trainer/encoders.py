"""Encoders: a user's behaviour, in its order, as one vector that joins the body's input.

Each is built from (Layout, **its settings), which name features, and maps the batch's Inputs to e_BR. What it reads
belongs to the user and the request, never to an item: it is computed once for all items of a request. To add one: a
class here, a line in ENCODERS, a test.

Shape letters: B rows, L longest list, I width of an item's vector, P of a property's, H hidden width, Q query, R the
encoder's output, N ids of all lists.
"""

import torch
from torch import Tensor, nn

from trainer.draws import Draws
from trainer.features import Inputs, Layout
from trainer.layers import StackedMlp
from trainer.pieces import FeatureName, FeatureNames, Share


class Encoder(nn.Module):
    """What every encoder is. reads: the features whose vectors it needs. output_dim: R."""

    reads: tuple[str, ...]
    output_dim: int

    def forward(self, inputs: Inputs, draws: Draws | None) -> Tensor:
        raise NotImplementedError


class GatedLstm(nn.Module):
    """An LSTM whose gates, and only these, see a property of each step: what the user did with the item opens and
    shuts, but is not itself remembered.

    Gates i, f, o = sigmoid(W_e e + W_p p + W_h h + b), candidate tanh(W_e e + W_h h + b). Without properties it is
    torch.nn.LSTM. Source: Ni et al.: Perceive your users in depth (DUPN), KDD 2018, section 4.3.
    """

    def __init__(self, input_dim: int, property_dim: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.of_input = nn.Linear(input_dim, 4 * hidden)  # input, forget, output, candidate
        self.of_property = nn.Linear(property_dim, 3 * hidden, bias=False) if property_dim else None
        self.of_hidden = nn.Linear(hidden, 4 * hidden, bias=False)

    def forward(self, items_BLI: Tensor, properties_BLP: Tensor) -> Tensor:
        """The state after each step: [B, L, H]."""
        pushed_BL4H = self.of_input(items_BLI)
        if self.of_property is not None:
            pushed_BL4H = pushed_BL4H + nn.functional.pad(self.of_property(properties_BLP), (0, self.hidden))
        h_BH = cell_BH = pushed_BL4H.new_zeros(items_BLI.shape[0], self.hidden)
        states = []
        for pushed_B4H in pushed_BL4H.unbind(1):
            i, f, o, candidate = (pushed_B4H + self.of_hidden(h_BH)).split(self.hidden, dim=1)
            cell_BH = torch.sigmoid(f) * cell_BH + torch.sigmoid(i) * torch.tanh(candidate)
            h_BH = torch.sigmoid(o) * torch.tanh(cell_BH)
            states.append(h_BH)
        return torch.stack(states, dim=1) if states else pushed_BL4H.new_zeros(*items_BLI.shape[:2], self.hidden)


class PropertyGatedAttention(Encoder):
    """DUPN: a property-gated LSTM over the behaviours, whose states an attention sums up that also sees the query and
    each step's property.

    items: a list feature with pool: none; properties: another, of equal lengths, that says what was done with each
    item; query: features of the user or the request. A row without behaviours gives zeros. Source: Ni et al.: Perceive
    your users in depth, KDD 2018, sections 4.3 and 4.4.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        items: FeatureName = "",
        properties: FeatureName = "",
        query: FeatureNames = (),
        hidden: int = 64,
        attention_layers: tuple[int, ...] = (32,),
        dropout: Share = 0.0,
    ):
        super().__init__()
        self._items, self._properties, self._dropout = items, properties, dropout
        self._query = layout.columns_of(query)
        self.reads = tuple(name for name in (items, properties, *query) if name)
        property_dim = layout.list_dim(properties) if properties else 0
        self.lstm = GatedLstm(layout.list_dim(items), property_dim, hidden)
        self.attention = StackedMlp(1, hidden + property_dim + len(self._query), (*attention_layers,))
        self.score = nn.Linear(self.attention.output_dim, 1, bias=False)  # a softmax sees no constant
        self.output_dim = hidden

    def forward(self, inputs: Inputs, draws: Draws | None) -> Tensor:
        items_BLI, there_BL = inputs.lists[self._items]
        properties_BLP = items_BLI[..., :0]
        if self._properties:
            properties_BLP, _ = inputs.lists[self._properties]
        h_BLH = self.lstm(items_BLI, properties_BLP)
        query_BLQ = inputs.x_BI[:, self._query].unsqueeze(1).expand(-1, h_BLH.shape[1], -1)
        seen = torch.cat([h_BLH, properties_BLP, query_BLQ.to(h_BLH.dtype)], dim=2)
        logits_BL = self.score(self.attention(seen.flatten(0, 1).unsqueeze(0))[0]).view(there_BL.shape).float()
        share_BL = logits_BL.masked_fill(~there_BL, -1e9).softmax(1) * there_BL
        summed_BH = torch.einsum("bl,blh->bh", share_BL.to(h_BLH.dtype), h_BLH)
        if draws is None or self._dropout == 0:
            return summed_BH
        kept_BH = draws.uniform("behaviours", self.output_dim) >= self._dropout
        return summed_BH * kept_BH / max(1 - self._dropout, 1e-6)


ENCODERS: dict[str, type[Encoder]] = {"dupn": PropertyGatedAttention}
