"""What is counted of a day under way: it can be written down between two steps, and gone on with.

own: sums of which every worker has a part, and which add up over workers (nulls, labels, gates, the shards' counts of
ids). alike: what every worker has the same (the losses' sums, how many steps were made). Whoever counts something more
of a day adds it here by a name of its own; it is then kept by every snapshot without further work.

Shape letters: N losses, T tables, S statistics.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from embeddings.shard import COUNTS
from trainer.learner import Learner

State = dict[str, Tensor]


class Counted:
    """The counts of one day's training; begins at nothing. steps: how many were made: where the data are gone on with.
    first_day: whether the model had learnt nothing before this day. seconds: of training before it was gone on with.
    """

    def __init__(self, learner: Learner):
        self._learner = learner
        self.steps, self.seconds = 0, 0.0
        self.first_day = int(learner.averaged.n_averaged) == 0
        self.own: State = {}
        self.alike: State = {}
        self._statistics: State = {}
        learner.health.reset()

    def add(self, name: str, values: Tensor) -> None:
        """Add to a sum of which every worker has its own part. All workers add to the same names."""
        self.own[name] = self.own.get(name, 0) + values.cpu()

    def add_alike(self, name: str, values: Tensor) -> None:
        """Add to a sum that is the same on every worker."""
        self.alike[name] = self.alike.get(name, 0) + values.cpu()

    def state(self) -> State:
        """Copies of everything, also of what the shard and the gates' health counted."""
        shard, health = self._learner.embeddings.shard, self._learner.health
        made = torch.tensor([self.steps, int(self.first_day)])
        state = {"alike/made": made, "alike/seconds": torch.tensor([self.seconds], dtype=torch.float64)}
        state |= {f"alike/of {name}": values for name, values in self.alike.items()}
        state |= {f"alike/statistics {name}": torch.from_numpy(of) for name, of in shard.overall_S.items()}
        state |= {f"alike/choices {name}": torch.tensor(of) for name, of in health.choices.items()}
        state |= {f"own/of {name}": values for name, values in self.own.items()}
        state |= {f"own/ids {name}": torch.from_numpy(shard.counts[name]) for name in COUNTS}
        state |= {f"own/health {name}": values for name, values in health.sums.items()}
        return {name: values.cpu().clone() for name, values in state.items()}

    def load(self, parts: Sequence[State]) -> None:
        """Go on from the states of all workers that wrote them: each gets its own back; another number of workers finds
        their sum on worker 0.
        """
        learner, exchange = self._learner, self._learner.exchange
        own, alike = _of(parts[0], "own/"), _of(parts[0], "alike/")
        if len(parts) == exchange.num_workers:
            own = _of(parts[exchange.rank], "own/")
        else:
            everyone = [_of(part, "own/") for part in parts]
            own = {name: torch.stack([of[name] for of in everyone]).sum(0) for name in own}
            own = own if exchange.rank == 0 else {name: torch.zeros_like(values) for name, values in own.items()}
        self.steps, first_day = alike["made"].tolist()
        self.first_day, self.seconds = bool(first_day), float(alike["seconds"])
        self.own, self.alike, self._statistics = _of(own, "of "), _of(alike, "of "), _of(alike, "statistics ")
        learner.embeddings.shard.counts = {name: values.numpy() for name, values in _of(own, "ids ").items()}
        learner.health.load(
            {name: values.to(learner.device) for name, values in _of(own, "health ").items()},
            {name: values.tolist() for name, values in _of(alike, "choices ").items()},
        )

    def restore_statistics(self) -> None:
        """After the shard's day began anew: each table's statistics as they were when it began first. Rows that were
        evicted since are in them.
        """
        overall_S = self._learner.embeddings.shard.overall_S
        overall_S |= {name: values.numpy() for name, values in self._statistics.items()}


def _of(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
