"""What does the embedding store cost, and how does its cost grow? Beside TorchRec's fixed tables, on the same ids.

Sections: pull and push against TorchRec with 1 and 2 workers; dynamic ids against fixed rows in our own store; bytes a
row; deltas against rows touched and against rows there are; load, step and snapshot with 1, 10 and more million rows.
Rounds of the systems compared alternate in the same processes; figures are medians, ratios are of paired rounds. Exit
code 1 when a bound is missed.

    pip install --no-deps -r benchmarks/torchrec.txt
    python -m benchmarks.embeddings [--rows 50_000_000] [--dim 16] [--json]
"""

import argparse
import gc
import json
import logging
import resource
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
import torch
import torch.distributed
import torch.multiprocessing

import embeddings.client
from benchmarks.workload import DIM, FEATURES, batch
from embeddings.buckets import unhash64
from embeddings.client import ShardedEmbeddings
from embeddings.dedupe import distinct
from embeddings.exchange import LocalExchange
from embeddings.jagged import Jagged
from embeddings.optim import RowwiseAdagrad
from embeddings.pooling import Pooling, pool
from embeddings.shard import Shard
from embeddings.shared_memory import connect
from embeddings.snapshot import Layer, Part, Snapshot, load
from embeddings.table import TableConfig

BATCH, BATCHES = 2048, 8
Step = Callable[[int], None]  # one pull and push of batch number ...


def ours(batches: list[dict[str, Jagged]], exchange: Any, kernel: dict[str, Any] | None = None) -> tuple[Step, Shard]:
    """Pull, pool, backward and push of one batch in our store."""
    tables = {name: TableConfig(DIM, feature.ids) for name, feature in FEATURES.items()}
    shard = Shard(tables, RowwiseAdagrad(lr=0.05), exchange, **(kernel or {}))
    shard.begin_day(1)
    store = ShardedEmbeddings(shard, {name: name for name in FEATURES})
    how = {name: Pooling(mean=False) for name in FEATURES}
    grad_FBD = torch.randn(len(FEATURES), BATCH, DIM)

    def step(number: int) -> None:
        (block,) = store.pull(batches[number], insert=True)
        pool(block, how).backward(grad_FBD)
        store.push([block])

    return step, shard


def torchrec(batches: list[dict[str, Jagged]], num_workers: int) -> Step:
    """The same in TorchRec: an EmbeddingBagCollection as its planner shards it, fused row-wise Adagrad."""
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=DIM, num_embeddings=feature.ids, feature_names=[name])
        for name, feature in FEATURES.items()
    ]
    bags = EmbeddingBagCollection(device=torch.device("meta"), tables=tables)
    apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.05})
    sharders: list[Any] = [EmbeddingBagCollectionSharder()]
    topology = Topology(world_size=num_workers, compute_device="cpu", ddr_cap=8 << 30)
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(bags, sharders, torch.distributed.group.WORLD)
    model = DistributedModelParallel(bags, device=torch.device("cpu"), plan=plan, sharders=sharders)
    grad = torch.randn(BATCH, DIM * len(FEATURES))
    keyed = [
        (torch.cat([ids.values_N for ids in each.values()]), torch.cat([ids.lengths_B for ids in each.values()]).int())
        for each in batches
    ]

    def step(number: int) -> None:
        values, lengths = keyed[number]
        ids = KeyedJaggedTensor(keys=list(FEATURES), values=values, lengths=lengths)
        model(ids).values().backward(grad)

    return step


def compare(steps: dict[str, Step], rounds: int, barrier: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds a step of each system in alternating rounds over all batches, the first round of each not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            barrier()
            start = time.perf_counter()
            for number in range(BATCHES):
                step(number)
            barrier()
            seconds[name].append((time.perf_counter() - start) / BATCHES)
    return {name: each[1:] for name, each in seconds.items()}


def _peer_worker(rank: int, num_workers: int, port: int, rounds: int, results: Any) -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num_workers
    )
    batches = [batch(BATCH, seed=1000 * rank + number) for number in range(BATCHES)]
    exchange = connect() if num_workers > 1 else LocalExchange()
    steps = {"ours": ours(batches, exchange)[0], "torchrec": torchrec(batches, num_workers)}
    for step in steps.values():
        for number in range(BATCHES):
            step(number)
    found = compare(steps, rounds, torch.distributed.barrier)
    if rank == 0:
        ids = sum(ids.values_N.numel() for each in batches for ids in each.values()) / BATCHES
        results.put((found, ids * num_workers))
    torch.distributed.destroy_process_group()


def against_torchrec(num_workers: int, rounds: int) -> tuple[float, dict[str, float]]:
    """The ratio of speeds (above 1: we are faster), and ids a second of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_peer_worker, args=(rank, num_workers, port, rounds, results))
        for rank in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0, "a worker failed: see above"
    seconds, ids = results.get()
    ratio = statistics.median(t / o for t, o in zip(seconds["torchrec"], seconds["ours"], strict=True))
    return ratio, {name: ids / statistics.median(each) for name, each in seconds.items()}


def dynamic_overhead(rounds: int) -> tuple[float, float]:
    """What ids that come and go cost: seconds of a step over those of a store of fixed rows, row = id, that neither
    hashes, finds nor counts; less one. And over those of one that was told the rows where the ids happen to lie here,
    side by side in the order of their arrival, which is kinder to the caches than any fixed row could be.
    """
    batches = [batch(BATCH, seed=number) for number in range(BATCHES)]
    first_T = len(FEATURES) + np.cumsum([0, *(feature.ids for feature in FEATURES.values())])[:-1]

    def told(fixed: bool) -> Step:
        step, shard = ours(batches, LocalExchange())
        ids, ledger, rows = shard.pools[0].ids, shard.ledger, []
        hashed, find, add = embeddings.client.keys_of, ids.find, ledger.add
        for number in range(BATCHES):
            step(number)  # now each id has its row
            values = [batches[number][name].values_N for name in FEATURES]
            key_N = hashed(torch.cat(values).numpy())
            pairs = distinct(key_N, np.repeat(np.arange(len(values), dtype=np.uint8), [v.numel() for v in values]))
            id_U = unhash64(torch.from_numpy(pairs.key_U)).numpy()
            rows.append((key_N, first_T[pairs.table_U] + id_U if fixed else find(pairs.key_U, pairs.table_U)))

        def without_asking(number: int) -> None:
            key_N, rows_U = rows[number]
            embeddings.client.keys_of = lambda ids: key_N  # type: ignore[assignment]
            ids.find = lambda key_U, table_U: rows_U.copy()  # type: ignore[method-assign]
            ledger.add = lambda *_: None  # type: ignore[method-assign]
            step(number)
            embeddings.client.keys_of, ids.find, ledger.add = hashed, find, add  # type: ignore[method-assign]

        return without_asking

    dynamic, _ = ours(batches, LocalExchange())
    steps = {"dynamic": dynamic, "fixed": told(fixed=True), "told": told(fixed=False)}
    for step in steps.values():
        for number in range(BATCHES):
            step(number)
    seconds = compare(steps, rounds, lambda: None)
    fixed, compact = (
        statistics.median(d / f for d, f in zip(seconds["dynamic"], seconds[name], strict=True)) - 1
        for name in ("fixed", "told")
    )
    return fixed, compact


def median_overhead(rounds: int, stores: int = 7) -> tuple[float, float]:
    """The medians over stores made anew: where their memory happens to lie changes the share by some hundredths."""
    found = [dynamic_overhead(rounds) for _ in range(stores)]
    return statistics.median(fixed for fixed, _ in found), statistics.median(compact for _, compact in found)


class Filled:
    """A store of one table with so many rows, ids 0 .. rows - 1."""

    def __init__(self, rows: int, dim: int):
        self.shard = Shard({"item": TableConfig(dim, rows, init_scale=0.1)}, RowwiseAdagrad())
        self.shard.begin_day(1)
        self.store = ShardedEmbeddings(self.shard, {"item": "item"})
        for first in range(0, rows, 1 << 20):
            self.touch(torch.arange(first, min(first + (1 << 20), rows)), train=False)

    def touch(self, ids: torch.Tensor, train: bool = True) -> None:
        blocks = self.store.pull({"item": Jagged(ids, torch.arange(ids.numel() + 1))}, insert=True)
        if train:
            blocks[0].rows_UD.grad = torch.randn_like(blocks[0].rows_UD)
            self.store.push(blocks)


def _saved(shard: Shard, folder: str, *, base: bool) -> tuple[list[Part], float, float, int]:
    """A snapshot's parts; seconds for which training waited, seconds in all, and bytes."""
    start = time.perf_counter()
    snapshot = Snapshot(shard, base=base)
    held = time.perf_counter()
    parts = snapshot.write(pyarrow.fs.LocalFileSystem(), folder)
    end = time.perf_counter()
    return parts, held - start, end - start, sum((Path(folder) / part.path).stat().st_size for part in parts)


def deltas(dim: int, folder: str) -> dict[str, list[dict[str, float]]]:
    """Deltas of one store with more and more rows touched, and of larger and larger stores with as many touched."""
    by_touched, by_rows = [], []
    for rows in (1_000_000, 4_000_000, 16_000_000):
        filled = Filled(rows, dim)
        filled.shard.saved()  # as if a base had just been written
        for touched in (50_000, 200_000, 800_000) if rows == 4_000_000 else (200_000,):
            chosen = torch.randperm(rows)[:touched]
            filled.touch(chosen)
            found = []
            for attempt in range(3):
                _, _, seconds, size = _saved(filled.shard, f"{folder}/{rows}-{touched}-{attempt}", base=False)
                found.append((seconds, size))
                filled.touch(chosen)
            entry = {"rows": rows, "touched": touched, "seconds": min(s for s, _ in found), "bytes": found[0][1]}
            by_touched += [entry] if rows == 4_000_000 else []
            by_rows += [entry] if touched == 200_000 else []
            _saved(filled.shard, f"{folder}/rest", base=False)
        del filled
        gc.collect()
    return {"by_touched": by_touched, "by_rows": by_rows}


def growth(rows: int, dim: int, folder: str) -> dict[str, float]:
    """Fill a store, train, save, load: seconds, and the most memory that the process had."""
    start = time.perf_counter()
    filled = Filled(rows, dim)
    filled_at = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(20):
        ids = torch.randint(0, rows, (BATCH * 16,), generator=generator)
        begin = time.perf_counter()
        filled.touch(ids)
        steps.append(time.perf_counter() - begin)
    overhead = filled.shard.pools[0].ids.memory_bytes / rows
    parts, held, saved, size = _saved(filled.shard, folder, base=True)
    del filled
    gc.collect()
    fresh = Shard({"item": TableConfig(dim, rows, init_scale=0.1)}, RowwiseAdagrad())
    begin = time.perf_counter()
    load(fresh, pyarrow.fs.LocalFileSystem(), [Layer(folder, parts)])
    loaded = time.perf_counter() - begin
    assert fresh.pools[0].ids.num_rows == rows, "rows were lost"
    return {
        "rows": rows,
        "fill_s": filled_at - start,
        "step_s": statistics.median(steps),
        "snapshot_hold_s": held,
        "snapshot_s": saved,
        "snapshot_bytes": size,
        "load_s": loaded,
        "bytes_per_row_overhead": overhead,
        "memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _line(entry: dict[str, float]) -> str:
    parts = [
        f"  {entry['rows']:11,} rows: fill {entry['fill_s']:.1f} s",
        f"step of {BATCH * 16:,} ids {entry['step_s'] * 1e3:.1f} ms",
        f"snapshot {entry['snapshot_s']:.1f} s ({entry['snapshot_bytes'] / 2**30:.2f} GiB",
        f"training held {entry['snapshot_hold_s'] * 1e3:.0f} ms)",
        f"load {entry['load_s']:.1f} s",
        f"memory {entry['memory_gib']:.1f} GiB",
    ]
    return ", ".join(parts)


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process of its own, so that its memory is its own."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_put, args=(results, function, arguments))
    process.start()
    found = results.get()
    process.join()
    return found


def _put(results: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    results.put(function(*arguments))


def main() -> None:
    parser = argparse.ArgumentParser("benchmarks.embeddings", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=lambda text: int(text.replace("_", "")), default=10_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=31, help="rounds of each system that is compared")
    parser.add_argument("--only", choices=["torchrec", "dynamic", "deltas", "growth"], help="one section")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    missed: list[str] = []

    def bound(what: str, value: float, holds: bool, text: str) -> None:
        print(f"  {what}: {value:.3g} ({text}){'' if holds else '  MISSED'}", flush=True)
        if not holds:
            missed.append(what)

    if options.only in (None, "torchrec"):
        print("pull + pool + backward + push, beside TorchRec's fixed tables", flush=True)
        found["vs_torchrec"], found["ids_per_s"] = {}, {}
        for workers in (1, 2):
            ratio, speeds = against_torchrec(workers, options.rounds)
            found["vs_torchrec"][str(workers)], found["ids_per_s"][str(workers)] = ratio, speeds
            print("  " + ", ".join(f"{name} {speed / 1e6:.2f} M ids/s" for name, speed in speeds.items()))
            bound(f"times TorchRec, {workers} workers", ratio, ratio >= 2, "at least 2")
    if options.only in (None, "dynamic"):
        print("dynamic ids beside fixed rows in our own store", flush=True)
        found["dynamic_overhead"], found["dynamic_overhead_compact"] = median_overhead(options.rounds // 3)
        bound("more time a step", found["dynamic_overhead"], found["dynamic_overhead"] < 0.15, "under 0.15")
        print(f"  against rows side by side: {found['dynamic_overhead_compact']:.3g}")
    with tempfile.TemporaryDirectory() as folder:
        if options.only in (None, "deltas"):
            print("deltas", flush=True)
            found["deltas"] = _in_process(deltas, options.dim, folder)
            for entry in (*found["deltas"]["by_touched"], *found["deltas"]["by_rows"]):
                print(
                    f"  {entry['touched']:9,} of {entry['rows']:11,} rows touched:"
                    f" {entry['seconds']:.3f} s, {entry['bytes'] / entry['touched']:.1f} bytes a touched row"
                )
            first, *_, last = found["deltas"]["by_touched"]
            linear = last["bytes"] / last["touched"] / (first["bytes"] / first["touched"])
            bound("bytes a touched row, most over fewest touched", linear, 0.8 <= linear <= 1.25, "0.8 .. 1.25")
            linear = last["seconds"] / last["touched"] / (first["seconds"] / first["touched"])
            bound("seconds a touched row, most over fewest touched", linear, linear <= 1.5, "at most 1.5")
            first, *_, last = found["deltas"]["by_rows"]
            bound(
                "seconds, 16 times the rows",
                last["seconds"] / first["seconds"],
                last["seconds"] <= 1.5 * first["seconds"],
                "at most 1.5 times",
            )
        if options.only in (None, "growth"):
            sizes = [rows for rows in (1_000_000, 10_000_000) if rows < options.rows] + [options.rows]
            print(f"one table of so many rows of {options.dim} numbers", flush=True)
            found["growth"] = []
            for rows in sizes:
                entry = _in_process(growth, rows, options.dim, f"{folder}/{rows}")
                found["growth"].append(entry)
                print(_line(entry), flush=True)
            found["bytes_per_row_overhead"] = found["growth"][-1]["bytes_per_row_overhead"]
            bound(
                "bytes a row beyond vector and state",
                found["bytes_per_row_overhead"],
                found["bytes_per_row_overhead"] < 24,
                "under 24",
            )
            bound("GiB at most", found["growth"][-1]["memory_gib"], found["growth"][-1]["memory_gib"] < 12, "under 12")
    found["missed"] = missed
    if options.json:
        print(json.dumps(found))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
