"""What is counted of a day under way: it can be written down between two steps, and gone on with.

own: sums of which every worker has a part, and which add up over workers (nulls, labels, gates, the shards' counts of
ids). alike: what every worker has the same (the losses' sums, how many steps were made). Whoever counts something more
of a day adds it here by a name of its own; it is then kept by every snapshot without further work.

Shape letters: N losses, T tables, S statistics.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from embeddings.shard import COUNTS
from trainer.learner import Learner

State = dict[str, Tensor]


class Counted:
    """The counts of one day's training; begins at nothing. steps: how many were made: where the data are gone on with.
    first_day: whether the model had learnt nothing before this day.
    """

    def __init__(self, learner: Learner):
        self._learner = learner
        self.steps, self._seconds, self._since = 0, 0.0, time.perf_counter()
        self.first_day = int(learner.averaged.n_averaged) == 0
        self.own: State = {}
        self.alike: State = {}
        self._statistics: State = {}
        learner.health.reset()

    @property
    def seconds(self) -> float:
        """Of training, earlier tries included."""
        return self._seconds + time.perf_counter() - self._since

    def start_clock(self) -> None:
        """Training begins now, or goes on."""
        self._since = time.perf_counter()

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

    def load(self, state: State) -> None:
        """Go on from a state that was written down: see share."""
        learner, own, alike = self._learner, _of(state, "own/"), _of(state, "alike/")
        self.steps, first_day = alike["made"].tolist()
        self.first_day, self._seconds = bool(first_day), float(alike["seconds"])
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


def share(read: Callable[[int], State], written_by: int, rank: int, num_workers: int) -> State:
    """What a worker goes on from, when so many workers wrote down their states: its own, bit for bit; when their number
    was another, worker 0 has everybody's sums and the others begin at zero. read: a worker's state.
    """
    if written_by == num_workers:
        return read(rank)
    states = [read(worker) for worker in range(written_by if rank == 0 else 1)]
    found = dict(states[0])
    for name in (name for name in found if name.startswith("own/")):
        total = torch.stack([state[name] for state in states]).sum(0)
        found[name] = total if rank == 0 else torch.zeros_like(total)
    return found


def _of(state: State, prefix: str) -> State:
    return {name.removeprefix(prefix): values for name, values in state.items() if name.startswith(prefix)}
