"""Which powers fuse predictions best. Nothing is trained: predictions are made once, and each trial ranks them anew."""

from collections.abc import Callable, Mapping

from torch import Tensor

from trainer.predictions import log_fused
from tune.search import Search


def search_powers(
    search: Search, logs: Mapping[str, Tensor], quality: Callable[[Tensor], float], num_trials: int
) -> dict[str, float]:
    """Go on with a search, in a space {"powers": Simplex(addresses)}, until it has so many trials.

    logs: by address the logarithm of its predictions [R], see trainer.predictions.in_logs. quality: of log scores [R];
    more is better. Returns the powers of the best trial by address.
    """
    while len(search.trials) < num_trials:
        trial = search.ask()
        search.tell(trial.number, quality(log_fused(logs, trial.values["powers"])))
    powers: dict[str, float] = search.best.values["powers"]
    return powers
