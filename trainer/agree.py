"""All workers go on, or all stop: what one worker found wrong ends the work everywhere, and nobody waits in a
collective for ever.
"""

import json
from collections.abc import Callable, Iterator
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


def told(exchange: Exchange, value: Any) -> Any:
    """Worker 0's value (anything that JSON holds), on every worker. Collective."""
    encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    size = exchange.all_reduce(torch.tensor([0 if exchange.rank else encoded.numel()]))
    text = torch.zeros(int(size), dtype=torch.uint8) if exchange.rank else encoded.clone()
    return json.loads(bytes(exchange.all_reduce(text).tolist()))


def agree(exchange: Exchange, error: UserError | None) -> None:
    """Raise on every worker when any worker has an error: its own, or the first one's text. Collective."""
    failed = exchange.all_reduce(torch.tensor([float(error is not None)]))
    if not failed.item():
        return
    texts = [text for text in gather_json(exchange, str(error) if error else "") if text]
    first = told(exchange, texts[0] if texts else "")
    raise error or UserError(first)


def together(exchange: Exchange, work: Callable[[], Item]) -> Item:
    """Do the same kind of work on every worker; what one of them finds wrong is raised on all. Collective."""
    try:
        result, error = work(), None
    except UserError as found:
        result, error = None, found
    agree(exchange, error)
    return result  # type: ignore[return-value]  # agree raises when there is none


def agreed(exchange: Exchange, items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator that is equally long on every worker; an error in one worker's iterator is raised on
    all.
    """
    while True:
        try:
            yield together(exchange, lambda: next(items))
        except StopIteration:
            return
