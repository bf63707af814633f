"""Run one function in several gloo processes, as the workers of a night would be, without Ray."""

import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing


def run(num_workers: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call function(exchange, *args) in num_workers processes and return the results in worker order.

    function: a module-level function of a test module. Its exception is raised here with the worker's traceback.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch.distributed", "torch.multiprocessing", "embeddings.kernels"]
    )  # imported once
    results = context.SimpleQueue()
    with tempfile.NamedTemporaryFile() as store:
        store_path = f"file://{store.name}-group"
        processes = [
            context.Process(target=_enter, args=(rank, num_workers, store_path, function, args, results), daemon=True)
            for rank in range(num_workers)
        ]
        for process in processes:
            process.start()
        outcomes = {}
        while len(outcomes) < num_workers:
            while results.empty():
                assert all(p.is_alive() or p.exitcode == 0 for p in processes), "a worker died without a word"
                time.sleep(0.01)
            rank, outcome = results.get()
            outcomes[rank] = outcome
        for process in processes:
            process.join()
    for rank, (_, error) in sorted(outcomes.items()):
        if error:
            raise AssertionError(f"worker {rank}:\n{error}")
    return [outcomes[rank][0] for rank in range(num_workers)]


def _enter(
    rank: int, num_workers: int, store: str, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    from embeddings.exchange import CollectiveExchange

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=num_workers)
    try:
        results.put((rank, (function(CollectiveExchange(), *args), None)))
    except BaseException:
        results.put((rank, (None, traceback.format_exc())))
    finally:
        torch.distributed.destroy_process_group()
