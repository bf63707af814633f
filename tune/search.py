"""A search for the point of a space at which something is highest: it asks for points to try, is told what they gave,
and can be killed at any time.

A suggestion depends on the seed, on its number and on what was found before, and on nothing else that a process
remembers. So a search that goes on after a kill makes the trials of one that was never disturbed.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from tune.space import Space

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every trial otherwise

SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


@dataclass(frozen=True)
class Trial:
    """A point to try: numbered from 0, its values by name, and what it gave: NaN until that is told."""

    number: int
    values: dict[str, Any]
    result: float = float("nan")


class Search:
    """ask, try, tell, again and again. sampler: gp, a Gaussian process with expected improvement, the best of these as
    long as there are not many hundreds of trials; tpe; random.

    storage: a database's URL, of any that SQLAlchemy knows; name: of the search in it. A search of that name is gone on
    with, and what was asked for and never told is asked for again. Only one process at a time may do so. Without
    storage all is forgotten in the end.
    """

    def __init__(
        self, name: str, space: Space, *, sampler: str = "gp", seed: int = 0, storage: str | None = None
    ) -> None:
        self._space, self._sampler, self._seed = dict(space), SAMPLERS[sampler], seed
        self._study = optuna.create_study(
            study_name=name, storage=storage, direction="maximize", sampler=self._sampler(seed), load_if_exists=True
        )
        self._left = self._study.get_trials(states=(TrialState.RUNNING,))  # of a process that is no more

    def ask(self) -> Trial:
        """The next point to try."""
        number = self._left[0].number if self._left else len(self._study.get_trials(deepcopy=False))
        # fresh, for its state is in no database; a warning that a trial is suggested to again is what we want
        self._study.sampler = self._sampler(int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0]))
        trial = optuna.trial.Trial(self._study, self._left.pop(0)._trial_id) if self._left else self._study.ask()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trial(number, self._values(trial.suggest_float))

    def tell(self, number: int, result: float) -> None:
        """What a trial gave. ValueError for a result that is no number, or a trial that is none or was told before."""
        if not np.isfinite(result):
            raise ValueError(f"trial {number} gave {result}")
        self._study.tell(number, result)

    @property
    def trials(self) -> list[Trial]:
        """Those that were told, by number."""
        finished = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [Trial(t.number, self._values(lambda name, *_, t=t: t.params[name]), t.values[0]) for t in finished]

    @property
    def best(self) -> Trial:
        """The first of those with the highest result. ValueError when no trial is told yet."""
        return max(self.trials, key=lambda trial: trial.result)

    def _values(self, coordinate: Callable[[str, float, float], float]) -> dict[str, Any]:
        return {name: piece.choose(name, coordinate) for name, piece in self._space.items()}
