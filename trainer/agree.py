"""All workers go on, or all stop: what one worker found wrong ends the work everywhere, and nobody waits in a
collective for ever.
"""

import json
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from embeddings.exchange import Exchange
from trainer.errors import UserError

Item = TypeVar("Item")


def gather_json(exchange: Exchange, value: Any) -> list[Any]:
    """On worker 0 every worker's value (anything that JSON holds), in worker order; elsewhere an empty list.
    Collective.
    """
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in exchange.gather(encoded)]


def agree(exchange: Exchange, error: UserError | None) -> None:
    """Raise on every worker when any worker has an error; worker 0 raises the first one's text. Collective."""
    failed = exchange.all_reduce(torch.tensor([float(error is not None)]))
    if not failed.item():
        return
    texts = [text for text in gather_json(exchange, str(error) if error else "") if text]
    raise error or UserError(texts[0] if texts else "another worker stopped")


def agreed(exchange: Exchange, items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator that is equally long on every worker; an error in one worker's iterator is raised on
    all.
    """
    while True:
        item, error = None, None
        try:
            item = next(items)
        except StopIteration:
            return
        except UserError as found:
            error = found
        agree(exchange, error)
        assert item is not None, "agree raises when there is no item"
        yield item
