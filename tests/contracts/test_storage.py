"""What every storage must do: the same promises on a local disk and on a real S3 server.

Oracles: a dict of what was written; the local disk for the object store; hashlib.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET, KEY, SECRET, Server, s3_server

from trainer import storage as module
from trainer.storage import Storage

BIG = bytes(range(256)) * (96 << 10)  # 24 MiB: three parts of an upload


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """An empty folder."""
    if request.param == "disk":
        return Storage(str(tmp_path))
    return Storage(request.getfixturevalue("server").uri(tmp_path.name))


@pytest.fixture
def on_s3(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A folder on a server that is soon given up."""
    monkeypatch.setattr(module, "_MAX_ATTEMPTS", 3)
    return Storage(server.uri(tmp_path.name))


def test_what_is_written_is_read_whole_and_replaced_whole(storage: Storage) -> None:
    for content in (b"first", b"", b"a longer second", BIG, b"last"):
        storage.write("a/b/name", content)
        assert storage.read("a/b/name") == content


def test_names_may_have_spaces_and_signs(storage: Storage) -> None:
    names = ["a name.json", "day=2026-11-20/hour=13/part 1+2&3%20.json", "größe/名前", "dots..in/it"]
    for name in names:
        storage.write(name, name.encode())
    assert storage.files(recursive=True) == sorted(names)
    assert [storage.read(name).decode() for name in names] == names
    assert storage.folders() == ["day=2026-11-20", "dots..in", "größe"]


def test_what_is_absent_is_said_so_or_is_nothing(storage: Storage) -> None:
    storage.write("folder/name", b"content")
    for name in ("none", "folder/none", "none/none", "folder"):
        assert not storage.exists(name)
    for name in ("none", "folder/none", "none/none"):
        with pytest.raises(FileNotFoundError):
            storage.read(name)
        with pytest.raises(FileNotFoundError):
            storage.fingerprint(name)
        storage.delete(name)
        storage.delete_folder(name)
        assert storage.files(name) == storage.folders(name) == storage.files(name, recursive=True) == []
    assert storage.files(recursive=True) == ["folder/name"]


def test_a_storage_that_was_never_written_to_is_empty(storage: Storage) -> None:
    fresh = storage.within("never/seen")
    assert fresh.files() == fresh.folders() == []
    fresh.delete("name")
    fresh.delete_folder()
    fresh.remove_leftovers()
    fresh.write("name", b"content")
    assert fresh.read("name") == storage.read("never/seen/name") == b"content"
    assert fresh.path == f"{storage.path}/never/seen"


def test_lists_are_sorted_and_tell_files_from_folders(storage: Storage) -> None:
    for name in ("b", "a", "c/2", "c/10", "c/d/e/f", "z/y"):
        storage.write(name, name.encode())
    assert storage.files() == ["a", "b"]
    assert storage.folders() == ["c", "z"]
    assert storage.files("c") == ["10", "2"]
    assert storage.folders("c") == ["d"]
    assert storage.files("c", recursive=True) == ["10", "2", "d/e/f"]
    assert storage.within("c").files("d", recursive=True) == ["e/f"]


def test_a_deleted_file_and_a_deleted_folder_are_gone_and_the_others_are_not(storage: Storage) -> None:
    for name in ("a/1", "a/2", "a/b/3", "ab/4"):
        storage.write(name, b"content")
    storage.delete("a/1")
    assert storage.files(recursive=True) == ["a/2", "a/b/3", "ab/4"]
    storage.delete_folder("a")
    assert storage.files(recursive=True) == ["ab/4"]
    assert storage.folders() == ["ab"]


def test_a_fingerprint_is_the_size_and_the_hash_of_the_file(storage: Storage) -> None:
    for content in (b"", b"content", BIG):
        storage.write("name", content)
        expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert storage.fingerprint("name") == expected


def test_a_stream_writes_a_file_piece_by_piece_and_reads_it_back(storage: Storage) -> None:
    with storage.open_output("a/big") as stream:
        for start in range(0, len(BIG), 5 << 20):
            stream.write(BIG[start : start + (5 << 20)])
    with storage.open_input("a/big") as stream:
        assert stream.read(100) == BIG[:100]
    assert storage.fingerprint("a/big")["sha256"] == hashlib.sha256(BIG).hexdigest()


@pytest.mark.parametrize("size", [4, len(BIG)])
def test_a_stream_that_its_writer_gives_up_leaves_no_file(storage: Storage, size: int) -> None:
    with pytest.raises(RuntimeError, match="given up"), storage.open_output("a/name") as stream:
        stream.write(BIG[:size])
        raise RuntimeError("given up")
    assert storage.files(recursive=True) == []


@pytest.mark.parametrize("sizes", [(400_000, 400_000), (270, 1_000, 40)], ids=["one size", "several sizes"])
def test_a_reader_never_sees_half_a_file(storage: Storage, sizes: tuple[int, ...]) -> None:
    contents = [bytes([n]) * size for n, size in enumerate(sizes)]
    storage.write("name", contents[0])
    writer = threading.Thread(target=lambda: [storage.write("name", content) for content in contents * 20])
    writer.start()
    seen = set()
    while writer.is_alive():
        seen.add(storage.read("name"))
    writer.join()
    assert seen <= set(contents)


def test_any_calls_in_any_order_leave_what_a_dict_would_hold(storage: Storage, times: int) -> None:
    draws, held = np.random.default_rng(7), dict[str, bytes]()
    names = [f"{folder}name {n}" for folder in ("", "a/", "a/b/", "c/") for n in range(2)]
    for turn in range(60 * times):
        name, kind = str(draws.choice(names)), draws.choice(["write", "delete", "folder"], p=[0.7, 0.2, 0.1])
        if kind == "write":
            held[name] = b"%d" % turn * draws.integers(1, 1000)
            storage.write(name, held[name])
        elif kind == "delete":
            held.pop(name, None)
            storage.delete(name)
        else:
            folder = str(draws.choice(["a", "a/b", "c"]))
            held = {name: content for name, content in held.items() if not name.startswith(f"{folder}/")}
            storage.delete_folder(folder)
        assert storage.exists(name) == (name in held)
        assert storage.files(recursive=True) == sorted(held)
        assert storage.files("a") == sorted(n[2:] for n in held if n.startswith("a/") and n.count("/") == 1)
    assert {name: storage.read(name) for name in held} == held


def test_more_names_than_one_answer_of_a_server_holds_are_all_listed_and_all_deleted(storage: Storage) -> None:
    names = [f"part-{n:04}/file" for n in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: storage.write(f"many/{name}", b"x"), names))
    assert storage.files("many", recursive=True) == names
    assert storage.folders("many") == [name.partition("/")[0] for name in names]
    storage.delete_folder("many")
    assert storage.files(recursive=True) == storage.folders("many") == []


# From here on: what only a server can do to us.


def test_a_server_that_refuses_twice_is_asked_a_third_time(server: Server, on_s3: Storage) -> None:
    server.seen()
    with server.trouble("refuse", times=2):
        on_s3.write("name", b"content")
    assert [method for method, _ in server.seen()] == ["PUT"] * 3
    assert on_s3.read("name") == b"content"


@pytest.mark.parametrize("kind", ["refuse", "cut"])
@pytest.mark.parametrize("content", [b"new", BIG], ids=["small", "big"])
def test_a_server_that_stays_away_is_an_error_without_secrets_and_the_old_file_stays(
    server: Server, on_s3: Storage, kind: str, content: bytes
) -> None:
    on_s3.write("name", b"old")
    with server.trouble(kind, methods="PUT"), pytest.raises(OSError) as error:
        on_s3.write("name", content)
    assert KEY not in str(error.value) and SECRET not in str(error.value)
    assert on_s3.read("name") == b"old" and on_s3.files() == ["name"]


@pytest.mark.parametrize("kind", ["refuse", "cut"])
def test_a_file_that_cannot_be_read_is_an_error_and_never_taken_for_absent(
    server: Server, on_s3: Storage, kind: str
) -> None:
    on_s3.write("name", BIG)
    for call in (on_s3.read, on_s3.exists, on_s3.files, on_s3.fingerprint):
        with server.trouble(kind), pytest.raises(OSError) as error:
            call("name")
        assert not isinstance(error.value, FileNotFoundError)
        assert KEY not in str(error.value) and SECRET not in str(error.value)


def test_an_answer_that_breaks_off_is_asked_for_again(server: Server, on_s3: Storage) -> None:
    on_s3.write("name", BIG)
    with server.trouble("cut", times=1, methods="GET"):
        assert on_s3.read("name") == BIG
    with server.trouble("cut", times=1, methods="GET"):
        assert on_s3.fingerprint("name")["sha256"] == hashlib.sha256(BIG).hexdigest()


@pytest.mark.parametrize("content", [b"new", BIG], ids=["small", "big"])
def test_a_write_whose_answer_is_lost_is_done_once_more_and_is_whole(
    server: Server, on_s3: Storage, content: bytes
) -> None:
    on_s3.write("name", b"old")
    with server.trouble("lose", times=1, methods="PUT"):
        on_s3.write("name", content)
    assert on_s3.read("name") == content


def test_a_big_write_whose_last_answer_is_lost_is_there_whole_and_may_be_repeated(
    server: Server, on_s3: Storage
) -> None:
    on_s3.write("name", b"old")
    with server.trouble("lose", times=1, methods="POST", containing="uploadId"):
        try:
            on_s3.write("name", BIG)
        except OSError:
            pass  # the store knows nothing of an upload that is complete
    assert on_s3.read("name") == BIG
    on_s3.write("name", b"again")
    assert on_s3.read("name") == b"again"


def test_a_server_that_takes_longer_than_pyarrow_would_wait_is_waited_for(server: Server, on_s3: Storage) -> None:
    server.seen()
    with server.trouble("slow", seconds=4.5, times=1):
        on_s3.write("name", b"content")
    assert len([address for _, address in server.seen() if "/name" in address]) == 1, "asked once, and waited for"
    assert on_s3.read("name") == b"content"


def test_a_server_that_says_nothing_is_given_up_in_time(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_ATTEMPTS", 1)
    monkeypatch.setattr(module, "_SILENCE_TIMEOUT_S", 1.0)
    storage, began = Storage(server.uri(tmp_path.name)), time.monotonic()
    with server.trouble("slow", seconds=6), pytest.raises(OSError):
        storage.read("name")
    assert time.monotonic() - began < 5


def test_a_server_that_is_not_there_is_an_error(on_s3: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as gone:
        storage = Storage(gone.uri("folder"))
        storage.write("name", b"content")
    with pytest.raises(OSError) as error:
        storage.read("name")
    assert not isinstance(error.value, FileNotFoundError)
    assert KEY not in str(error.value) and SECRET not in str(error.value)


def test_a_bucket_that_is_not_there_is_an_error_when_something_is_written(server: Server) -> None:
    storage = Storage(server.uri("folder").replace(BUCKET, "nowhere"))
    with pytest.raises(OSError, match="nowhere.*NO_SUCH_BUCKET"):
        storage.write("name", b"content")


def test_a_process_that_is_killed_while_it_uploads_leaves_the_old_file(server: Server, on_s3: Storage) -> None:
    on_s3.write("name", b"old")
    program = "import sys; from trainer.storage import Storage; Storage(sys.argv[1]).write('name', bytes(24 << 20))"
    address = server.uri(on_s3.root.partition("/")[2])
    server.seen()
    with server.trouble("slow", seconds=30, containing="partNumber=2"):
        writing = subprocess.Popen([sys.executable, "-c", program, address])
        while not any("partNumber=2" in address for _, address in server.seen()):
            assert writing.poll() is None
            time.sleep(0.05)
        os.kill(writing.pid, signal.SIGKILL)
        writing.wait()
    assert on_s3.read("name") == b"old" and on_s3.files() == ["name"]


def test_the_server_ends_with_its_test() -> None:
    with s3_server() as server:
        process = server.process
        assert process.poll() is None
    assert process.poll() is not None


def test_the_server_ends_when_the_test_is_killed() -> None:
    program = "import time; from s3_server import s3_server\n"
    program += "with s3_server() as server: print(server.process.pid, flush=True); time.sleep(99)"
    tests = str(Path(__file__).parent.parent)
    killed = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=tests, text=True)
    with killed:
        assert killed.stdout is not None
        server = int(killed.stdout.readline())
        killed.kill()
    for _ in range(100):
        if not Path(f"/proc/{server}").exists() or "Z" in Path(f"/proc/{server}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("the server outlives its test")
