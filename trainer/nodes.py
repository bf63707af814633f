"""What the cluster can give now, and how a process on any of its machines is ended. Beside workers.py the only file
that imports ray.

Ray learns late (after about 17 s) that a machine is gone, and until then offers what it had. A shorter health check
would take a busy machine for a dead one. So every node is asked itself: where a raylet is gone a connection is refused
at once, and where a machine is gone it is not made within a second; a busy one's kernel takes it.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ClusterError
from trainer.watch import Place

_ANSWER_S = 1.0
_LOOK_EVERY_S = 0.25
_SAY_EVERY_S = 30.0
_END_S = 20.0
_NODE_ID = "ray.io/node-id"

Needs = Mapping[str, float]


def needs_of_a_worker() -> dict[str, float]:
    """A GPU for each worker where the cluster has some, a CPU elsewhere."""
    import ray

    return {"GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}


def free_workers(needs: Needs) -> int:
    """How many more workers fit on the nodes that answer."""
    import ray._private.state

    return _fit(ray._private.state.available_resources_per_node(), needs)


def _all_workers(needs: Needs) -> int:
    """How many fit there when nothing else runs."""
    import ray._private.state

    return _fit(ray._private.state.total_resources_per_node(), needs)


def _fit(resources: Mapping[str, Needs], needs: Needs) -> int:
    there = [resources.get(node["NodeID"], {}) for node in _alive() if _answers(node)]
    return sum(int(min(has.get(what, 0.0) / amount for what, amount in needs.items()) + 1e-6) for has in there)


def _alive() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _ANSWER_S).close()
    except OSError:
        return False
    return True


def lost_among(nodes: Collection[str]) -> set[str]:
    """Which of these nodes are gone, whether Ray knows it yet or not."""
    return set(nodes) - {node["NodeID"] for node in _alive() if node["NodeID"] in nodes and _answers(node)}


def away_from_the_dead() -> dict[str, str] | None:
    """A selector that keeps workers off nodes that Ray takes for alive and that do not answer; None without such."""
    dead = [node["NodeID"] for node in _alive() if not _answers(node)]
    return {_NODE_ID: f"!in({', '.join(dead)})"} if dead else None


def wait_for_workers(
    least: int, most: int, needs: Needs, wait_s: float, settle_s: float, say: Callable[[str], None]
) -> int:
    """How many workers the cluster can give, at least `least`: waits for them, and says what is missing. ClusterError
    after wait_s.

    settle_s: what the round before had is free only after a moment, so what the nodes have is waited for that long.
    """
    start = said = time.monotonic()
    said -= _SAY_EVERY_S
    while True:
        free, waited_s = free_workers(needs), time.monotonic() - start
        if free >= most or (free >= least and (waited_s > settle_s or free >= _all_workers(needs))):
            return min(free, most)
        what = " and ".join(f"{least * amount:g} {name}s" for name, amount in needs.items())
        missing = f"waits for {what}, {free} {'is' if free == 1 else 'are'} there"
        if waited_s > wait_s:
            raise ClusterError(f"{missing} after {wait_s:.0f} s: start more nodes, or lower train.workers")
        if waited_s > settle_s and time.monotonic() - said >= _SAY_EVERY_S:
            said = time.monotonic()
            say(missing)
        time.sleep(_LOOK_EVERY_S)


def end(places: Sequence[Place]) -> None:
    """End the workers' processes (SIGKILL: a stopped one hears nothing else), on whatever node they are. Those that
    are gone already are no error; a node that does not answer ends its own.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    there = {node["NodeID"] for node in _alive() if node["NodeID"] != here and _answers(node)}
    calls = []
    for node in {place.node for place in places}:
        pids = [place.pid for place in places if place.node == node]
        if node == here:
            _kill(pids)
        elif node in there:
            on_that_node = NodeAffinitySchedulingStrategy(node, soft=False)
            calls.append(
                ray.remote(_kill).options(num_cpus=0, max_retries=0, scheduling_strategy=on_that_node).remote(pids)
            )
    if calls:
        ray.wait(calls, num_returns=len(calls), timeout=_END_S)


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            if "RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_text():  # and no later owner of its number
                os.kill(pid, signal.SIGKILL)


def remove_reservations() -> None:
    """Free what this driver's lost rounds had reserved: Ray does it when the driver ends."""
    import ray._private.state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    mine = bytes.fromhex(ray.get_runtime_context().get_job_id())
    for content in ray._private.state.state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(content)
        if group.creator_job_id == mine and group.state != PlacementGroupTableData.REMOVED:
            ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
