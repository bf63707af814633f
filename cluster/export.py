"""A promoted model for serving: its user part and its item part, in a folder that needs nothing else."""

from typing import Any

from cluster.morning import must_have_champion, open_checkpoints, open_ledger
from embeddings.exchange import LocalExchange
from trainer.config import Config, absolute
from trainer.errors import UserError
from trainer.intervals import Interval
from trainer.learner import build, check, fusion_powers, open_logs
from trainer.serving import save


def export(config: Config, out: str, interval: Interval | None = None) -> dict[str, Any]:
    """Write the model that was trained through an interval, or the champion, as it scores the next one. In this
    process: it holds all rows.
    """
    check(config)
    if not config.serving.item:
        do, expected = "add serving: {item: [...]}: all other features are the user's", "the features of an item"
        raise UserError("nothing says what belongs to an item", "serving.item", expected=expected, do=do)
    checkpoints = open_checkpoints(config)
    checkpoint = checkpoints.open(interval) if interval else must_have_champion(checkpoints, open_ledger(config))
    learner = build(config, LocalExchange())
    checkpoints.load(learner, checkpoint)
    learner.embeddings.shard.begin_day(checkpoint.interval.next().day.toordinal())
    about = {"model": config.name, "trained_through": checkpoint.interval.name, "checkpoint": checkpoint.id}
    return save(learner, open_logs(config).schema, config.serving.item, fusion_powers(config), absolute(out), about)
