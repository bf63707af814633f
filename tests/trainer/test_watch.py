"""The watchdog: who hangs is named in time, who works or waits is left alone."""

import threading
import time
import timeit
from dataclasses import replace

import pytest
import threads
import torch

from embeddings.exchange import Exchange, LocalExchange
from embeddings.pulse import beat, beats
from trainer.watch import TELL_EVERY_S, Hang, Place, Telling, Watchdog, WatchedExchange

HANG_S = 60.0


class Told:
    """Workers as the driver hears of them, by a clock that the test moves."""

    def __init__(self, num_workers: int = 2, hang_s: float = HANG_S, phase: str = "train", step: int = 310):
        self.places = [
            Place(r, host="here", pid=4711 + r, interval="2026-11-02", phase=phase) for r in range(num_workers)
        ]
        for place in self.places:
            place.step, place.number = step, 8122
        self.watchdog, self.clock, self.stopped = Watchdog(hang_s), 0.0, set[int]()

    def enter(self, *ranks: int, name: str = "all_reduce") -> None:
        for rank in ranks:
            self.places[rank].number += 1
            self.places[rank].collective = name

    def run(self, for_s: float, every_s: float = TELL_EVERY_S) -> Hang | None:
        """Time goes by; everyone who is not stopped tells twice a second. The first hang that is found, or none."""
        until = self.clock + for_s
        while self.clock < until:
            self.clock += every_s
            for place in self.places:
                place.tellings += place.rank not in self.stopped
            if hang := self.watchdog.look([replace(place) for place in self.places], every_s):
                return hang
        return None


def test_a_worker_in_an_endless_loop_is_named_with_its_step_and_the_collective_in_which_others_wait() -> None:
    told = Told()
    told.run(10)
    told.enter(0)
    hang = told.run(100)
    assert hang is not None and [place.rank for place in hang.places] == [1]
    assert "worker 1 (process 4712 on here) hangs in step 311 of training 2026-11-02" in hang.text
    assert "before all_reduce 8123, in which worker 0 waited for " in hang.text


@pytest.mark.parametrize("inside", [False, True])
def test_a_stopped_process_is_named_although_its_thread_is_stopped_too(inside: bool) -> None:
    told = Told(3)
    told.run(5)
    told.enter(0, 2, *([1] if inside else []), name="all_to_all")
    told.stopped = {1}
    hang = told.run(100)
    assert hang is not None and [place.rank for place in hang.places] == [1]
    assert "worker 1 (process 4712 on here) is silent in step 311 of training 2026-11-02" in hang.text
    assert (
        "inside all_to_all 8123" if inside else "before all_to_all 8123, in which worker 0 and worker 2"
    ) in hang.text


def test_the_only_worker_is_watched_too() -> None:
    told = Told(1)
    told.stopped = {0}
    assert told.run(100) is not None


@pytest.mark.parametrize("hang_s", [2.0, 10.0, 60.0])
@pytest.mark.parametrize("stopped", [set[int](), {1}])
def test_who_hangs_is_named_within_hang_s_and_not_long_before(hang_s: float, stopped: set[int]) -> None:
    told = Told(hang_s=hang_s)
    told.run(TELL_EVERY_S)
    told.enter(0)
    told.stopped, begun = stopped, told.clock
    assert told.run(2 * hang_s) is not None
    assert min(hang_s - 2, hang_s / 2) <= told.clock - begun <= hang_s


def test_when_everybody_is_inside_one_collective_it_is_stuck_and_all_are_ended() -> None:
    told = Told()
    told.enter(0, 1)
    hang = told.run(100)
    assert hang is not None and [place.rank for place in hang.places] == [0, 1]
    assert (
        "worker 0 (process 4711 on here) hangs in step 311 of training 2026-11-02, inside all_reduce 8123" in hang.text
    )


def test_of_workers_in_two_collectives_those_in_the_earlier_one_hold_up_the_others() -> None:
    told = Told(3)
    told.enter(0, 1, 2)
    told.enter(0, 2)
    hang = told.run(100)
    assert hang is not None and [place.rank for place in hang.places] == [1]


def test_a_writer_on_a_slow_store_lives_as_long_as_it_beats_and_hangs_when_it_does_not() -> None:
    told = Told()
    told.enter(0)
    for _ in range(20):
        told.places[1].beats += 1
        assert told.run(HANG_S - 5) is None
    assert told.run(HANG_S) is not None


def test_steps_that_go_on_are_signs_of_life() -> None:
    told = Told()
    for step in range(300):
        for place in told.places:
            place.at("2026-11-02", "train", 311 + step)
        assert told.run(1) is None


def test_until_a_phase_has_come_through_a_step_it_may_take_five_times_as_long() -> None:
    told = Told(phase="score", step=0)
    told.enter(0)
    assert told.run(5 * HANG_S - 10) is None, "kernels are compiled"
    assert told.run(20) is not None
    told = Told(phase="score", step=0)
    told.places[0].step = 1
    told.run(1)
    told.enter(0)
    assert told.run(HANG_S) is not None, "the phase has begun: worker 0 has come through a step of it"


def test_a_driver_that_slept_itself_blames_nobody() -> None:
    told = Told()
    told.run(5)
    assert told.run(3600, every_s=3600) is None


def test_every_collective_has_a_name_and_a_number_and_its_result_is_that_of_the_exchange() -> None:
    def talk(exchange: Exchange) -> tuple[list[float], list[list[float]], str, int]:
        place = Place(exchange.rank)
        watched = WatchedExchange(exchange, place)
        mine = torch.tensor([float(watched.rank)])
        total = watched.all_reduce(mine.clone())
        swapped = watched.all_to_all(mine.repeat(2), [1, 1], [1, 1])
        everyone = watched.gather(mine)
        return [*total.tolist(), *swapped.tolist()], [t.tolist() for t in everyone], place.collective, place.number

    first, second = threads.run(2, talk)
    assert first == ([1.0, 0.0, 1.0], [[0.0], [1.0]], "", 3)
    assert second == ([1.0, 0.0, 1.0], [], "", 3)


def test_a_collective_that_failed_is_where_the_worker_was() -> None:
    place = Place(0, interval="2026-11-02", phase="score")
    with pytest.raises(AssertionError):
        threads.run(1, lambda exchange: WatchedExchange(exchange, place).all_to_all(torch.ones(3), [2], [3]))
    assert place.where == "scoring 2026-11-02, inside all_to_all 1"


def test_watching_costs_next_to_nothing() -> None:
    """A step of the demo has about 30 collectives and takes 50 ms: at 3 us each, two thousandths of it."""
    bare, tensor = LocalExchange(), torch.ones(1)
    watched = WatchedExchange(bare, Place(0))
    seconds = [min(timeit.repeat(lambda e=e: e.all_reduce(tensor), number=1000, repeat=20)) for e in (bare, watched)]
    assert (seconds[1] - seconds[0]) / 1000 < 3e-6


def test_a_worker_is_told_of_until_its_job_ends_with_what_it_beat() -> None:
    told: list[Place] = []
    place = Place(0)
    with Telling(place, told.append):
        place.at("2026-11-02", "train", 7)
        before = beats()
        beat()
        while len(told) < 3:
            time.sleep(0.01)
    number = len(told)
    time.sleep(1.2 * TELL_EVERY_S)
    assert len(told) == number and [p.tellings for p in told] == list(range(1, number + 1))
    assert (told[-1].step, told[-1].beats) == (7, before + 1) and told[-1] is not place


def test_two_threads_of_which_one_loops_for_ever_the_watchdog_names_that_one() -> None:
    """In real time, from exchange to text."""
    latest: dict[int, Place] = {}
    met, over = threading.Barrier(2), threading.Event()

    class Meets(LocalExchange):
        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            met.wait()
            return tensor

    def work(rank: int) -> None:
        place = Place(rank)
        exchange = WatchedExchange(Meets(), place)
        with Telling(place, lambda place: latest.__setitem__(place.rank, place)):
            for step in range(1, 1000):
                while rank == 1 and step == 20 and not over.is_set():
                    time.sleep(0.001)
                try:
                    exchange.all_reduce(torch.ones(1))
                except threading.BrokenBarrierError:
                    return
                place.at("2026-11-02", "train", step)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    watchdog, hang, begun = Watchdog(2.0), None, time.monotonic()
    while hang is None and time.monotonic() - begun < 30:
        time.sleep(0.1)
        hang = watchdog.look(list(latest.values()), 0.1)
    over.set()
    met.abort()
    for worker in workers:
        worker.join()
    assert hang is not None and [place.rank for place in hang.places] == [1]
    assert "in step 20 of training 2026-11-02, before all_reduce 20, in which worker 0 waited" in hang.text
