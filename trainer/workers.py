"""Where a job runs: in this process, or on Ray Train workers. The only file that imports ray.

A job is a plain function of a Worker; nothing below it knows Ray. Workers tell the driver what happens through events
(plain dicts), handed to on_event in the driver while the job runs. A killed worker makes Ray Train start the whole
group again: the job must find by itself how far it had come.
"""

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from embeddings.exchange import Exchange, LocalExchange
from embeddings.shared_memory import connect
from trainer.errors import UserError

Event: TypeAlias = dict[str, Any]

# Ray's defaults phone home and look at the workers every two seconds; a night shall do neither.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_worker_niceness": "0",  # at Ray's 15, anything else on the machine goes first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_COLLECTIVE_TIMEOUT_S = 300
_POLL_S = 0.2


@dataclass(frozen=True)
class Worker:
    """What a job is given: its way to talk to the other workers, its device, and emit, which tells the driver
    something.
    """

    exchange: Exchange
    device: torch.device
    emit: Callable[[Event], None]


def run_here(job: Callable[[Worker], Any], on_event: Callable[[Event], None]) -> Any:
    """Run a job as the only worker, in this process, without Ray."""
    return job(Worker(LocalExchange(), _device(), on_event))


def run_on_ray(
    job: Callable[[Worker], Any], on_event: Callable[[Event], None], *, num_workers: int, max_failures: int
) -> Any:
    """Run a job on num_workers Ray Train workers and return worker 0's result.

    Joins the cluster of RAY_ADDRESS, or starts a local one and stops it. A worker that is lost restarts the job, at
    most max_failures times; a UserError in the job ends it at once, on all workers, and is raised here.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.train
    import ray.train.torch

    ours = not ray.is_initialized()
    if ours:
        _start(num_workers)
    events = ray.remote(_Events).options(num_cpus=0).remote()
    try:
        with (
            _Listener(lambda: ray.get(events.drain.remote()), on_event),
            tempfile.TemporaryDirectory(prefix="daybreak-") as folder,
        ):
            gpus = bool(ray.cluster_resources().get("GPU"))
            result = ray.train.torch.TorchTrainer(
                _on_worker,
                train_loop_config={"job": job, "events": events},
                torch_config=ray.train.torch.TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
                scaling_config=ray.train.ScalingConfig(num_workers=num_workers, use_gpu=gpus),
                run_config=ray.train.RunConfig(
                    name=uuid.uuid4().hex[:8],
                    storage_path=folder,
                    failure_config=ray.train.FailureConfig(max_failures=max_failures, controller_failure_limit=20),
                    logging_config=ray.train.LoggingConfig("ERROR"),
                ),
            ).fit()
    finally:
        if ours:
            ray.shutdown()
    outcome: dict[str, Any] = result.return_value
    if outcome["error"]:
        raise UserError(outcome["error"])
    return outcome["result"]


def _start(num_workers: int) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level="ERROR")
        return
    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, num_workers),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )


def _on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray Train worker. A user's error is a result, not a failure: trying again would not mend it."""
    import ray
    import ray.train

    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ray.train.get_context().get_local_world_size()))
    events = config["events"]
    worker = Worker(connect(_device()), _device(), lambda event: events.put.remote(event))
    try:
        outcome = {"result": config["job"](worker), "error": None}
    except UserError as error:
        outcome = {"result": None, "error": str(error)}
    ray.get(events.arrived.remote())  # calls arrive in order: what was told before is there
    return outcome


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Events:
    """An actor that holds events until the driver fetches them."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        self._events.append(event)

    def arrived(self) -> None:
        """Returns once everything that the caller put before is here."""

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


class _Listener:
    """Calls on_event for every event, in a thread, until the end of the with block; on_event's own error is raised
    there.
    """

    def __init__(self, drain: Callable[[], list[Event]], on_event: Callable[[Event], None]):
        self._drain, self._on_event = drain, on_event
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._listen, name="events", daemon=True)

    def _listen(self) -> None:
        try:
            while not self._ended.is_set():
                self._hand_over()
                time.sleep(_POLL_S)
        except BaseException as error:  # noqa: BLE001 - raised in the driver's own thread
            self._error = error

    def _hand_over(self) -> None:
        for event in self._drain():
            self._on_event(event)

    def __enter__(self) -> "_Listener":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, traceback: Any) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            if self._error:
                raise self._error
            self._hand_over()
