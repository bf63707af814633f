"""All that is dense as named tensors, and named tensors as bytes: safetensors, which nothing can hide code in."""

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.learner import Learner

UNDO = "undo the change of the configuration, or train under a new name"
State = dict[str, Tensor]
DamagedTensors = safetensors.SafetensorError


def to_bytes(state: State) -> bytes:
    """Named tensors as the content of a file."""
    content: bytes = safetensors.torch.save(state)
    return content


def from_bytes(content: bytes) -> State:
    """The tensors of a file. DamagedTensors when it is none."""
    state: State = safetensors.torch.load(content)
    return state


def dense_state(learner: Learner) -> State:
    """The dense net, its average, its optimizer, what balancer and losses know, the statistics: copies."""
    state = {
        f"{part}/{name}": v for part, module in _modules(learner).items() for name, v in module.state_dict().items()
    }
    for name, parameter in learner.named_parameters().items():
        for key, value in learner.optimizer.state[parameter].items():
            state[f"optimizer/{name}/{key}"] = value
    state |= {f"numbers/{name}": value for name, value in learner.stats.state().items()}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def load_dense_state(learner: Learner, state: State, where: str) -> None:
    """Set all that is dense. where: the file, for errors. A net of other shapes is a UserError."""
    modules = _modules(learner)
    parts: dict[str, State] = {part: {} for part in (*modules, "optimizer", "numbers")}
    for name, value in state.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = value
    for part, module in modules.items():
        mine = {f"{part}/{name}": tuple(value.shape) for name, value in module.state_dict().items()}
        theirs = {f"{part}/{name}": tuple(value.shape) for name, value in parts[part].items()}
        if differing := [name for name in mine | theirs if mine.get(name) != theirs.get(name)]:
            got, expected = (f"{differing[0]} {_shape(shapes.get(differing[0]))}" for shapes in (mine, theirs))
            what = "the dense net of the configuration is not the one that was trained"
            raise UserError(what, where, got=got, expected=expected, do=UNDO)
        module.load_state_dict(parts[part])
    for name, parameter in learner.named_parameters().items():
        of_parameter = {k.rpartition("/")[2]: v for k, v in parts["optimizer"].items() if k.rpartition("/")[0] == name}
        learner.optimizer.state[parameter] = {
            k: v.to(v.device if k == "step" else learner.device) for k, v in of_parameter.items()
        }
    learner.stats.load({name: value.to(learner.device) for name, value in parts["numbers"].items()})


def _modules(learner: Learner) -> dict[str, torch.nn.Module]:
    return {
        "model": learner.model,
        "averaged": learner.averaged,
        "auxiliary": learner.auxiliary,
        "balance": learner.balance,
        "losses": torch.nn.ModuleList(task.loss for task in learner.graph.tasks.values()),
    }


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"
