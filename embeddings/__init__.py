"""Where rows live: raw 64-bit ids, their rows, and the shards that own them.

Reading order: pulse, table, jagged, buckets, dedupe, idmap, exchange, shared_memory, optim, kernels, pool, tallies,
admission, shard, accounts, client, pooling, freeze, snapshot, rowfile.
Knows no feature, task, day or Ray.
"""
