"""The dense net: a body, a tower a task, and the shallow position tower.

Shape letters: B rows, I input width, T tasks, H width of a task's input, D floats of a selection feature.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.bodies import BODIES, Body, StackedLinear, StackedMlp
from trainer.config import nearest
from trainer.draws import Draws
from trainer.errors import UserError


class PositionTower(nn.Module):
    """A shallow net on selection features whose output is added to the logits of some tasks; a missing feature has a
    learnt vector.

    Source: Zhao et al.: Recommending what video to watch next, RecSys 2019, section 4.3.
    """

    def __init__(self, dims: Sequence[int], layers: tuple[int, ...], tasks: Sequence[int], num_tasks: int):
        super().__init__()
        self.missing = nn.ParameterList(torch.zeros(dim) for dim in dims)
        self.net = StackedMlp(1, sum(dims), layers)
        self.out = nn.Linear(self.net.output_dim, len(tasks))
        self.register_buffer("to_tasks", torch.eye(num_tasks)[list(tasks)], persistent=False)

    def forward(self, selection: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """What to add to the logits: [B, T], zero for every other task. selection: vectors [B, D] (zeros where
        missing), presence [B].
        """
        vectors = [
            vector_BD + (1 - present_B).unsqueeze(1) * missing_D
            for (vector_BD, present_B), missing_D in zip(selection, self.missing, strict=True)
        ]
        hidden = self.net(torch.cat(vectors, dim=1).unsqueeze(0))[0]
        return self.out(hidden) @ self.to_tasks


class MultiTaskModel(nn.Module):
    """body: maps x_BI to h_TBH. tower_layers: hidden layers of each task's tower. position: the shallow tower, if
    any.
    """

    def __init__(
        self, body: Body, num_tasks: int, tower_layers: tuple[int, ...], position: PositionTower | None = None
    ):
        super().__init__()
        self.body = body
        self.towers = StackedMlp(num_tasks, body.output_dim, tower_layers)
        self.out = StackedLinear(num_tasks, self.towers.output_dim, 1)
        self.position = position

    def forward(self, x_BI: Tensor, selection: Sequence[tuple[Tensor, Tensor]], draws: Draws | None) -> Tensor:
        """The tasks' conditional logits: [B, T], float32."""
        towers_TBH = self.towers(self.body(x_BI, draws))
        logits_BT = self.out(towers_TBH).squeeze(2).T.float()
        return logits_BT if self.position is None else logits_BT + self.position(selection).float()


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


# What a body's setting may be, by its annotation; a parameter with another annotation is not for the configuration.
_SETTINGS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    int: (_is_count, "a whole number from 1 up"),
    float: (lambda value: type(value) in (int, float) and 0 <= value <= 1, "a number from 0 to 1"),
    tuple[int, ...]: (
        lambda value: type(value) in (list, tuple) and all(map(_is_count, value)),
        "a list of whole numbers from 1 up",
    ),
}


def make_body(settings: Mapping[str, Any], input_dim: int, num_tasks: int) -> Body:
    """The body that a configuration names: {kind: mmoe, num_experts: 8, ...}."""
    options = dict(settings)
    kind = str(options.pop("kind", ""))
    if kind not in BODIES:
        raise UserError(f"no body is called '{kind}'", "model.body.kind", do=nearest(kind, BODIES))
    parameters = inspect.signature(BODIES[kind]).parameters
    known = {name: p.annotation for name, p in list(parameters.items())[2:] if p.annotation in _SETTINGS}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"unknown key '{option}'", f"model.body ({kind})", do=nearest(option, known))
        fits, expected = _SETTINGS[known[option]]
        if not fits(value):
            got, do = str({option: value}), "correct the body's settings"
            raise UserError("wrong value", f"model.body ({kind})", got=got, expected=expected, do=do)
    try:
        return BODIES[kind](input_dim, num_tasks, **options)
    except (TypeError, RuntimeError, ValueError) as error:
        raise UserError(
            "wrong value", f"model.body ({kind})", got=f"{options}: {error}", do="correct the body's settings"
        ) from None
