"""Where rows live: raw 64-bit ids, their rows, and the shards that own them.

Reading order: table, jagged, buckets, idmap, kernels, optim, pool, shard, exchange, client, pooling, snapshot.
Knows no feature, task, day or Ray.
"""
