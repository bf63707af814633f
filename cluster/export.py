"""A promoted model for serving: its user part and its item part, in a folder that needs nothing else."""

import datetime
from typing import Any

from cluster.nightly import Morning, open_checkpoints
from embeddings.exchange import LocalExchange
from trainer.config import Config, absolute
from trainer.errors import UserError
from trainer.learner import build, check, fusion_powers, open_logs
from trainer.serving import save

_ONE_DAY = datetime.timedelta(days=1)


def export(config: Config, out: str, day: datetime.date | None = None) -> dict[str, Any]:
    """Write the model that was trained through a day, or the champion, as it scores the day after. In this process: it
    holds all rows.
    """
    check(config)
    if not config.serving.item:
        do, expected = "add serving: {item: [...]}: all other features are the user's", "the features of an item"
        raise UserError("nothing says what belongs to an item", "serving.item", expected=expected, do=do)
    checkpoints = open_checkpoints(config)
    checkpoint = checkpoints.open(day) if day else Morning(config, checkpoints).must_have_champion()
    learner = build(config, LocalExchange())
    checkpoints.load(learner, checkpoint)
    learner.embeddings.shard.begin_day((checkpoint.day + _ONE_DAY).toordinal())
    about = {"model": config.name, "trained_through": str(checkpoint.day), "checkpoint": checkpoint.id}
    return save(learner, open_logs(config).schema, config.serving.item, fusion_powers(config), absolute(out), about)
