"""Where a job runs: in this process, or on Ray Train workers.

A job is a plain function of a Worker; nothing below it knows Ray. Workers tell the driver what happens through events
(plain dicts), handed to on_event in the driver while the job runs.

On Ray a job runs in rounds. Each round is one Ray Train run of a fixed number of workers: as many as the cluster can
give then. A worker or a node that is lost, or a worker that hangs, ends the round, and the next one begins at once with
what is left: the job must find by itself how far it had come. A job that more workers are free for returns at the end
of an interval, and the next round has them.
"""

import contextlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch

from embeddings.exchange import Exchange, LocalExchange
from embeddings.pulse import beat
from embeddings.shared_memory import connect
from trainer.errors import ClusterError, UserError
from trainer.nodes import (
    away_from_the_dead,
    end,
    free_workers,
    lost_among,
    needs_of_a_worker,
    remove_reservations,
    wait_for_workers,
)
from trainer.watch import TELL_EVERY_S, Place, Telling, Watchdog, WatchedExchange

Event: TypeAlias = dict[str, Any]
OnEvent: TypeAlias = Callable[[Event], Any]  # what it returns, plain JSON, is for a worker that asks

# Ray's defaults phone home and look at the workers every two seconds; a night shall do neither. What it waits for when
# workers are gone (a process group to shut down, resources that were there) is short: the round is lost anyway.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "3",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a node that is drained is lost in the end, and done without
    "RAY_worker_niceness": "0",  # at Ray's 15, anything else on the machine goes first
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
_COLLECTIVE_TIMEOUT_S = 300
_POLL_S = 0.2
_STARTS = 5  # so often in a row may workers not come to life: what the cluster seemed to have was gone again
_SETTLE_S, _SETTLE_FOR_MORE_S = 3.0, 15.0  # until what a round had is free again
_REST_S = 600.0
_ANSWER_S = 0.05
_QUESTION = "question"
_WAIT_S = 900.0
_END_S = 30.0


@dataclass(frozen=True)
class Worker:
    """What a job is given.

    exchange: its way to talk to the other workers. emit: tells the driver something. ask: tells it, and waits for what
    on_event returns. at(interval, phase, step): so many steps of a phase ("score", "train", "commit") are done; who
    looks after the workers wants to know. more_workers: whether more workers are free than there are; then the job must
    return, and is called again with more. Collective, to be asked between intervals.
    """

    exchange: Exchange
    device: torch.device
    emit: Callable[[Event], None]
    ask: Callable[[Event], Any] = lambda event: None
    at: Callable[[str, str, int], None] = lambda interval, phase, step: None
    more_workers: Callable[[], bool] = lambda: False


Job: TypeAlias = Callable[[Worker], Any]


def run_here(job: Job, on_event: OnEvent) -> Any:
    """Run a job as the only worker, in this process, without Ray."""
    return job(Worker(LocalExchange(), _device(), on_event, on_event))


def run_on_ray(
    job: Job,
    on_event: OnEvent,
    *,
    workers: tuple[int, int],
    max_failures: int,
    hang_s: float = 60.0,
    wait_s: float = _WAIT_S,
) -> Any:
    """Run a job on Ray Train workers, at least workers[0] and at most workers[1], and return worker 0's result.

    Joins the cluster of RAY_ADDRESS, or starts a local one and stops it. Lost workers end a round; after more than
    max_failures of them, or when the cluster has too little for wait_s, a ClusterError tells what happened. A worker
    without a sign of life for hang_s counts as lost (0: is waited for). A UserError in the job ends it at once, on all
    workers, and is raised here. Events of its own: "lost" and "waiting", both with a text.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    failures = _Failures(max_failures, on_event)
    while True:
        ours = not ray.is_initialized()
        if ours:
            _start(workers[1])
        alone = ours and not os.environ.get("RAY_ADDRESS")
        try:
            return _rounds(job, on_event, workers, failures, hang_s, wait_s)
        except ray.exceptions.RayError as error:
            if not alone:
                raise ClusterError(f"the Ray cluster was lost: {_shortly(error)}") from error
            failures.add(f"Ray itself was lost: {_shortly(error)}")
        finally:
            if ours:
                ray.shutdown()


class _Failures:
    """What was lost so far: more than `most` times end all."""

    def __init__(self, most: int, on_event: Callable[[Event], None]):
        self._most, self._on_event, self._texts = most, on_event, list[str]()

    def add(self, text: str) -> None:
        self._texts.append(text)
        if len(self._texts) > self._most:
            times = "once" if len(self._texts) == 1 else f"{len(self._texts)} times"
            told = "\n".join(f"  {number}. {text}" for number, text in enumerate(self._texts, 1))
            raise ClusterError(f"workers were lost {times}, and nightly.max_failures is {self._most}\n{told}")
        self._on_event({"event": "lost", "text": text})


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


def _rounds(
    job: Job,
    on_event: OnEvent,
    workers: tuple[int, int],
    failures: "_Failures",
    hang_s: float,
    wait_s: float,
) -> Any:
    """Rounds until the job is done."""
    (least, most), needs = workers, needs_of_a_worker()
    desk, in_vain, too_few = _open_desk(needs, most), 0, 0
    while True:
        settle_s = _SETTLE_FOR_MORE_S if too_few else _SETTLE_S
        num_workers = wait_for_workers(least, most, needs, wait_s, settle_s, partial(_say, on_event))
        if num_workers <= too_few:  # somebody else was quicker: that is not tried again and again
            desk.rest.remote()
        round_ = _Round(job, desk, num_workers, needs, hang_s)
        ended = round_.run(on_event)
        if isinstance(ended, dict) and ended["error"]:
            raise UserError(ended["error"])
        if isinstance(ended, dict) and not ended["again"]:
            return ended["result"]
        too_few = num_workers if isinstance(ended, dict) else 0
        if isinstance(ended, str):
            remove_reservations()
        in_vain = 0 if round_.begun else in_vain + 1
        if in_vain == _STARTS:
            raise ClusterError(f"workers do not start, {in_vain} times in a row: {ended}")
        if isinstance(ended, str) and round_.begun:
            failures.add(ended)


def _open_desk(needs: dict[str, float], most: int) -> Any:
    """The driver's actor, on its own node: others may be lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    restarted = {"max_restarts": -1, "max_task_retries": -1}
    return ray.remote(_Desk).options(num_cpus=0, scheduling_strategy=here, **restarted).remote(needs, most)


def _say(on_event: OnEvent, text: str) -> None:
    on_event({"event": "waiting", "text": text})


class _Round:
    """One run of Ray Train on a fixed number of workers."""

    def __init__(self, job: Job, desk: Any, num_workers: int, needs: dict[str, float], hang_s: float):
        self._name = uuid.uuid4().hex[:8]
        self._config = {"job": job, "desk": desk, "round": self._name}
        self._desk, self._num_workers, self._needs = desk, num_workers, needs
        self._hang_s = hang_s
        self._places: list[Place] = []
        self._ended_for = ""
        self._ended: dict[str, Any] | str = ""
        self._over = threading.Event()

    def run(self, on_event: OnEvent) -> dict[str, Any] | str:
        """The outcome of worker 0, or what happened to a round that is lost. Events are handed over in this thread, so
        that what goes wrong there, or Ctrl-C, ends the round at once; Ray Train gets a thread of its own.
        """
        import ray

        threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in (self._fit, self._watch)]
        for thread in threads:
            thread.start()
        try:
            while not self._over.wait(_POLL_S):
                self._hand_over(on_event)
            self._hand_over(on_event)
            return self._ended
        finally:
            with contextlib.suppress(ray.exceptions.RayError):
                if isinstance(self._ended, str):  # also when it was left before its end
                    self._dismiss(self._ended)
            threads[0].join(_END_S)

    def _hand_over(self, on_event: OnEvent) -> None:
        import ray

        for event in ray.get(self._desk.drain.remote()):
            question = event.pop(_QUESTION, None)
            answer = on_event(event)
            if question:
                ray.get(self._desk.answer.remote(question, answer))

    def _fit(self) -> None:
        import ray.train
        import ray.train.torch

        try:
            result = _trainer()(
                _on_worker,
                train_loop_config=self._config,
                torch_config=ray.train.torch.TorchConfig(timeout_s=_COLLECTIVE_TIMEOUT_S),
                scaling_config=ray.train.ScalingConfig(
                    num_workers=self._num_workers,
                    use_gpu="GPU" in self._needs,
                    resources_per_worker=self._needs,
                    label_selector=away_from_the_dead(),
                ),
                run_config=ray.train.RunConfig(
                    name=self._name,
                    storage_path=_scratch(),
                    failure_config=ray.train.FailureConfig(
                        max_failures=0, controller_failure_limit=0, max_preemption_failures=0
                    ),
                    logging_config=ray.train.LoggingConfig("CRITICAL"),
                ),
            ).fit()
            self._ended = result.return_value
        except BaseException as error:  # noqa: BLE001 - whatever it is, the round is lost
            self._ended = self._ended_for or self._what(error)
        self._over.set()

    def _latest(self) -> list[Place]:
        """Where the workers were last; the desk forgets it when its process is lost."""
        import ray

        with contextlib.suppress(ray.exceptions.RayError):
            self._places = ray.get(self._desk.places.remote(self._name)) or self._places
        return self._places

    @property
    def begun(self) -> bool:
        """Whether a worker began its job."""
        return bool(self._latest())

    def _what(self, error: BaseException) -> str:
        """What happened to a round: who was lost where, or else who failed with what, and its traceback."""
        import ray
        import ray.exceptions

        places = {place.rank: place for place in self._latest()}
        died, failed = [], []
        for rank, failure in getattr(error, "worker_failures", {}).items():
            cause = getattr(failure, "health_check_failure", failure)
            who, where = (places[rank].who, places[rank].where) if rank in places else (f"worker {rank}", "starting")
            if isinstance(cause, ray.exceptions.RayError):
                died.append(f"{who} was lost {where}: {_shortly(cause)}")
            else:
                failed.append(f"{who} failed {where}: {type(cause).__name__}: {_shortly(cause)}\n{error}")
        return "; ".join(died) or "".join(failed[:1]) or _shortly(error)

    def _watch(self) -> None:
        """Look at the workers until the round is over: who hangs is ended, and where a node is gone, everybody is."""
        import ray

        watchdog, looked, lost = Watchdog(self._hang_s), time.monotonic(), set[str]()
        while not self._over.wait(TELL_EVERY_S):
            with contextlib.suppress(ray.exceptions.RayError):  # the desk starts again by itself
                self._latest()
                places = ray.get(self._desk.places.remote(self._name, at_work=True))
                before, lost = lost, lost_among({place.node for place in places})
                now = time.monotonic()
                hang = watchdog.look(places, now - looked) if self._hang_s else None
                looked = now
                if gone := [place for place in places if place.node in lost & before]:
                    self._dismiss("; ".join(f"{place.who} was lost {place.where}, with its node" for place in gone))
                elif hang:
                    self._dismiss(hang.text)
                    end(hang.places)

    def _dismiss(self, why: str) -> None:
        """Nobody goes on alone: each worker ends itself when it next tells where it is, those of this node at once.
        What is told first is the cause of all else.
        """
        import ray

        self._ended_for = self._ended_for or why
        self._desk.dismiss.remote(self._name)
        here = ray.get_runtime_context().get_node_id()
        end([place for place in self._latest() if place.node == here])


# What Ray Train starts a process for and a night does not use: data sets, and a watch over what a lost controller had
# reserved, which outlives a lost driver where Ray has no dashboard; remove_reservations does that.
_UNUSED = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


def _trainer() -> Any:
    """Ray's TorchTrainer, with fewer processes to start: seconds, each time that workers are replaced."""
    import ray.train.torch

    class Trainer(ray.train.torch.TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [c for c in super()._create_default_callbacks() if type(c).__name__ not in _UNUSED]

    return Trainer


def _shortly(error: BaseException) -> str:
    """An error in a line; of a lost process how it ended, without Ray's advice."""
    text = str(error)
    if found := re.search(r"low on memory\..* was (\S+ used / \S+ limit)", text):
        return f"its node ran out of memory ({found[1]})"
    if found := re.search(r"Worker exit detail: (.*?\.)(?: Some common causes| There are some|\n|$)", text):
        return found[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _scratch() -> str:
    """Where Ray Train may write what nobody reads: beside Ray's own logs, which go with them."""
    import ray._private.worker

    return f"{ray._private.worker.global_worker.node.get_session_dir_path()}/daybreak"


def _on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray Train worker. A user's error is a result, not a failure: trying again would not mend it."""
    import ray
    import ray.train

    context, desk, name = ray.train.get_context(), config["desk"], config["round"]
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    place = Place(context.get_world_rank(), ray.get_runtime_context().get_node_id())
    with Telling(place, partial(_tell, desk, name)):
        exchange = WatchedExchange(connect(_device()), place)
        again = False

        def more_workers() -> bool:
            nonlocal again
            free = place.rank == 0 and ray.get(desk.more.remote(exchange.num_workers))
            again = bool(exchange.all_reduce(torch.tensor([float(free)])).item())
            return again

        worker = Worker(exchange, _device(), desk.put.remote, partial(_ask, desk), place.at, more_workers)
        try:
            outcome = {"result": config["job"](worker), "error": None}
        except UserError as error:
            outcome = {"result": None, "error": str(error)}
        outcome["again"] = again
    ray.get(desk.leave.remote(name, place.rank))  # calls arrive in order: what was told before is there
    return outcome


def _ask(desk: Any, event: Event) -> Any:
    """Tell the driver, and wait for its answer: however long that takes, this worker lives."""
    import ray

    question = uuid.uuid4().hex
    while True:
        found = ray.get(desk.answered.remote(question))
        if found:
            return found[0]
        if found is None:  # not asked yet, or of a desk that had to start anew
            ray.get(desk.put.remote(event | {_QUESTION: question}))
        beat()
        time.sleep(_ANSWER_S)


def _tell(desk: Any, name: str, place: Place) -> None:
    """Tell the driver where a worker is. When its round is over, or the driver is, end it, whatever it does."""
    import ray

    try:
        wanted = ray.get(desk.tell.remote(name, place))
    except ray.exceptions.ActorDiedError:
        wanted = False
    if not wanted:
        os._exit(1)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Desk:
    """The driver's actor, on its node: holds events until the driver fetches them, and where each worker is."""

    def __init__(self, needs: dict[str, float], most: int) -> None:
        self._needs, self._most = needs, most
        self._events: list[Event] = []
        self._places: dict[str, dict[int, Place]] = {}
        self._left: set[tuple[str, int]] = set()
        self._answers: dict[str, tuple[Any, ...]] = {}  # to questions; empty while there is none
        self._dismissed: set[str] = set()
        self._rests_until = 0.0

    def put(self, event: Event) -> None:
        self._events.append(event)
        if _QUESTION in event:
            self._answers[event[_QUESTION]] = ()

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def answer(self, question: str, answer: Any) -> None:
        """What the driver says to a question."""
        self._answers[question] = (answer,)

    def answered(self, question: str) -> tuple[Any, ...] | None:
        """The answer, to be taken once; nothing while there is none; None when nobody knows the question."""
        answer = self._answers.get(question)
        if answer:
            del self._answers[question]
        return answer

    def tell(self, name: str, place: Place) -> bool:
        """Where a worker of a round is. Whether it shall go on."""
        self._places.setdefault(name, {})[place.rank] = place
        return name not in self._dismissed

    def dismiss(self, name: str) -> None:
        """A round is lost: all of its workers end."""
        self._dismissed.add(name)

    def leave(self, name: str, rank: int) -> None:
        """A worker's job is done; everything that it put before is here."""
        self._left.add((name, rank))

    def places(self, name: str, at_work: bool = False) -> list[Place]:
        """The workers of a round, or those whose job is not done, by rank."""
        return [
            place
            for rank, place in sorted(self._places.get(name, {}).items())
            if not (at_work and (name, rank) in self._left)
        ]

    def more(self, num_workers: int) -> bool:
        """Whether a further worker would fit beside these."""
        rested = time.monotonic() >= self._rests_until
        return rested and num_workers < self._most and free_workers(self._needs) > 0

    def rest(self) -> None:
        """No more workers for a while."""
        self._rests_until = time.monotonic() + _REST_S
