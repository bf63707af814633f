"""Rounds of workers on a real Ray: killed, stopped and looping workers, lost nodes and nodes that come back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from conftest import FIRST_DAY, configure

from cluster.nightly import nightly
from cluster.simulate import simulate
from trainer import workers
from trainer.errors import ClusterError, UserError
from trainer.workers import Event, Worker, run_on_ray

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test
pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STEPS = 30
Job = Callable[[Worker], Any]
Disturb = Callable[[], None]


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_myself() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def loop_for_ever() -> None:
    while True:
        time.sleep(0.001)


def counting(folder: Path, disturbances: list[Disturb], intervals: int = 1, ends_with: str = "") -> Job:
    """A job that counts steps over all workers and finds by itself how far it had come. In the n-th round worker 1 does
    the n-th thing in the middle. Worker 0 writes a line a step: interval, step, workers, time.
    """

    def job(worker: Worker) -> str:
        diary, rounds, first = folder / "diary", folder / "rounds", worker.exchange.rank == 0
        done = len(diary.read_text().splitlines()) if diary.exists() else 0
        number = len(rounds.read_text()) if rounds.exists() else 0
        together = worker.exchange.all_reduce(torch.ones(1))  # everyone has read
        if first:
            rounds.write_text("r" * (number + 1))
        worker.emit({"event": "began", "rank": worker.exchange.rank, "workers": int(together.item())})
        begun = done
        while done < intervals * STEPS:
            interval, step = divmod(done, STEPS)
            if step == 0 and worker.more_workers():
                return "early"
            worker.at(f"interval {interval}", "train", step)
            if worker.exchange.rank == 1 and done == begun + 5 and number < len(disturbances):
                disturbances[number]()
            workers = int(worker.exchange.all_reduce(torch.ones(1)).item())
            done += 1
            if first:
                with diary.open("a") as file:
                    file.write(f"{interval} {step} {workers} {time.time()}\n")
            time.sleep(0.1)
        if ends_with:
            raise UserError(ends_with)
        return "done"

    return job


def diary(folder: Path) -> list[tuple[int, int, int, float]]:
    rows = [line.split() for line in (folder / "diary").read_text().splitlines()]
    return [(int(interval), int(step), int(workers), float(at)) for interval, step, workers, at in rows]


def assert_each_step_once(folder: Path, intervals: int = 1) -> None:
    assert [(i, s) for i, s, _, _ in diary(folder)] == [(i, s) for i in range(intervals) for s in range(STEPS)]


def test_workers_that_are_killed_stop_or_loop_are_named_and_replaced_within_30_s(tmp_path: Path) -> None:
    """Three rounds are lost, each in another way; every step is made once all the same."""
    events: list[Event] = []
    job = counting(tmp_path, [kill_myself, stop_myself, loop_for_ever])
    hang_s, begun = 10.0, time.time()
    assert run_on_ray(job, events.append, workers=(2, 2), max_failures=3, hang_s=hang_s) == "done"
    assert_each_step_once(tmp_path)
    killed, stopped, looping = [event["text"] for event in events if event["event"] == "lost"]
    assert killed.startswith("worker 1 (process ") and " was lost in step " in killed and "End of file" in killed
    assert stopped.startswith("worker 1 (process ") and " is silent in step " in stopped
    assert looping.startswith("worker 1 (process ") and " hangs in step " in looping
    for hang in (stopped, looping):
        assert "of training interval 0, before all_reduce " in hang and ", in which worker 0 waited for " in hang
    at = [at for *_, at in diary(tmp_path)]
    pauses = sorted(later - earlier for earlier, later in zip(at, at[1:], strict=False))[-3:]
    print("from the loss to the first new step:", [round(pause, 1) for pause in pauses], "s, hang_s", hang_s)
    start = at[0] - begun
    assert pauses[0] < max(30, start) and pauses[2] < max(30, start) + hang_s, "or, on a busy machine, than the start"
    assert not [p for p in psutil.Process().children(recursive=True) if "ray::" in " ".join(p.cmdline())]


def test_ctrl_c_leaves_nothing_behind_and_the_command_ends_with_1(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from cluster.cli import _run\n"
        "from test_workers import counting, stop_myself\n"
        "from trainer.workers import run_on_ray\n"
        f"job = counting(Path({str(tmp_path)!r}), [stop_myself])\n"
        "_run(lambda: run_on_ray(job, lambda event: None, workers=(2, 2), max_failures=0), as_json=False)\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "e2e")])
    environment = os.environ | {"PYTHONPATH": path}
    driver = subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "diary").exists():
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.1)
    time.sleep(3)  # by now a worker has stopped itself
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate(timeout=60)
    assert driver.returncode == 1 and "daybreak: stopped" in error
    assert not psutil.wait_procs(started, timeout=30)[1]


def test_what_ray_train_shall_not_start_is_still_called_so() -> None:
    import ray.train.v2.api.data_parallel_trainer as trainer

    assert all(hasattr(trainer, name) for name in workers._UNUSED)
    assert hasattr(trainer.DataParallelTrainer, "_create_default_callbacks")


# On a cluster that was there before: a head without CPUs, and nodes of one CPU each.


class Nodes:
    """A small Ray cluster on addresses of its own. Nodes are added and removed in the main thread, so what runs on them
    gets a thread of its own.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._net = f"127.{os.getpid() >> 8 & 127}.{os.getpid() & 255}"  # beside other runs of this test
        head = {"num_cpus": 0, "node_ip_address": f"{self._net}.2", "include_dashboard": False}
        self.cluster, self._used = Cluster(initialize_head=True, head_node_args=head), 2
        ray.init(address=self.cluster.address, _node_ip_address=f"{self._net}.2", log_to_driver=False)

    def add(self) -> Any:
        self._used += 1
        return self.cluster.add_node(num_cpus=1, node_ip_address=f"{self._net}.{self._used}")

    def kill(self, node: Any) -> None:
        """As when a machine loses its power: all of its processes at once."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    cluster = Nodes()
    yield cluster
    cluster.close()


class Beside:
    """A call in a thread, and what it told."""

    def __init__(self, call: Callable[[Callable[[Event], None]], Any]):
        self.events: list[Event] = []
        self._result: list[Any] = []
        self._thread = threading.Thread(target=lambda: self._result.append(call(self.events.append)), daemon=True)
        self._thread.start()

    def wait_for(self, what: Callable[[Event], bool], seconds: float = 500) -> Event:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self._thread.is_alive() or self.events):
            if found := [event for event in self.events if what(event)]:
                return found[0]
            time.sleep(0.05)
        raise AssertionError(f"it was never told; told were {self.events}")

    def result(self) -> Any:
        self._thread.join(500)
        assert self._result, self.events
        return self._result[0]


def test_a_node_that_is_lost_is_done_without_and_taken_back_at_the_next_interval(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add()
    lost = nodes.add()
    job = counting(tmp_path, [], intervals=3)
    begun = time.time()
    run = Beside(lambda tell: run_on_ray(job, tell, workers=(1, 2), max_failures=1))
    run.wait_for(lambda event: event["event"] == "began")
    time.sleep(1)
    nodes.kill(lost)
    run.wait_for(lambda event: event["event"] == "lost")
    nodes.add()
    assert run.result() == "done"
    assert_each_step_once(tmp_path, intervals=3)
    numbers = [number for *_, number, _ in diary(tmp_path)]
    assert numbers[0] == 2 and numbers[STEPS - 1] == 1, "the interval is finished on what is there"
    assert set(numbers[2 * STEPS :]) == {2}, "and the node that came is used"
    at = [at for *_, at in diary(tmp_path)]
    pause = max(later - earlier for earlier, later in zip(at[:STEPS], at[1:STEPS], strict=False))
    print(f"from the loss of the node to the first new step: {pause:.1f} s")
    assert pause < max(30, at[0] - begun), "or, on a busy machine, than the start"
    assert "with its node" in run.wait_for(lambda event: event["event"] == "lost")["text"]


def test_what_is_missing_is_told_and_the_wait_has_an_end(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add()
    events: list[Event] = []
    with pytest.raises(ClusterError, match="^waits for 2 CPUs, 1 is there after 8 s: start more nodes, or lower train"):
        run_on_ray(counting(tmp_path, []), events.append, workers=(2, 3), max_failures=3, wait_s=8.0)
    assert [event["text"] for event in events] == ["waits for 2 CPUs, 1 is there"]


def test_failures_are_told_when_they_are_used_up_and_a_users_error_is_none(nodes: Nodes, tmp_path: Path) -> None:
    nodes.add()
    nodes.add()
    events: list[Event] = []
    with pytest.raises(ClusterError) as raised:
        run_on_ray(counting(tmp_path, [kill_myself] * 2), events.append, workers=(2, 2), max_failures=1)
    first, *numbered = str(raised.value).splitlines()
    assert first == "workers were lost 2 times, and nightly.max_failures is 1"
    assert [line[:16] for line in numbered] == ["  1. worker 1 (p", "  2. worker 1 (p"]
    assert len([event for event in events if event["event"] == "lost"]) == 1
    with pytest.raises(UserError, match="^the day is bad$"):
        run_on_ray(counting(tmp_path, [], ends_with="the day is bad"), events.append, workers=(2, 2), max_failures=0)


def test_a_day_whose_node_is_lost_is_finished_on_one_worker_and_the_next_uses_two_again(
    nodes: Nodes, tmp_path: Path
) -> None:
    """The real night. Law 1: its metrics are those of an undisturbed one."""
    simulate(str(tmp_path), days=4, start=FIRST_DAY, users=200, items=150, rows_per_day=24_000, seed=1)
    for name in ("disturbed", "undisturbed"):
        (tmp_path / name).mkdir()
    settings = ("train.batch_size=64", "train.workers={min: 1, max: 2}")
    disturbed = configure(tmp_path / "logs", tmp_path / "disturbed")(*settings)
    undisturbed = configure(tmp_path / "logs", tmp_path / "undisturbed")(*settings)
    want = nightly(undisturbed, use_ray=False, on_event=lambda event: None)
    nodes.add()
    lost = nodes.add()
    night = Beside(lambda tell: nightly(disturbed, on_event=tell))
    second = str(FIRST_DAY.replace(day=2))
    night.wait_for(lambda e: e["event"] == "progress" and e["day"] == second and e["phase"] == "train")
    nodes.kill(lost)
    night.wait_for(lambda event: event["event"] == "lost")
    told = len(night.events)
    night.wait_for(lambda e: e["event"] == "progress" and night.events.index(e) > told)
    nodes.add()  # from the next day, or the one after it
    report = night.result()
    workers = [day["workers"] for day in report["days"]]
    assert workers[:2] == [2, 1] and workers[3] == 2, workers
    assert [day["state"] for day in report["days"]] == [day["state"] for day in want["days"]]
    for day, wanted in zip(report["days"], want["days"], strict=True):
        for address, metrics in wanted["metrics"].items():
            assert day["metrics"][address] == pytest.approx(metrics, rel=1e-4, nan_ok=True), f"{day['day']} {address}"
