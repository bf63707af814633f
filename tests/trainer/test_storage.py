"""Storage on a local disk. Oracles: the folder's listing by os, a process that is killed in the middle of a write."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.storage import Storage, without_credentials

OLD, NEW = b"old " * 500_000, b"new!" * 500_000

# A process that writes NEW over OLD and is killed just before one of the calls that make a write whole.
KILLED = """
import os, signal, sys
from trainer.storage import Storage

folder, point = sys.argv[1:]

def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)

if point == "half":
    with Storage(folder).open_output("a/file") as stream:
        stream.write(b"new!" * 250_000)
        stream.flush()
        die()
setattr(os, point, die)
Storage(folder).write("a/file", b"new!" * 500_000)
"""


@pytest.mark.parametrize("point", ["half", "fsync", "replace"])
def test_a_write_that_is_killed_leaves_the_old_file_and_nothing_that_is_listed(tmp_path: Path, point: str) -> None:
    storage = Storage(str(tmp_path))
    storage.write("a/file", OLD)
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), point], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert storage.read("a/file") == OLD
    assert storage.files("a") == ["file"] and storage.files(recursive=True) == ["a/file"]
    assert len(os.listdir(tmp_path / "a")) == 2, "the killed write left its temporary file"
    storage.remove_leftovers()
    assert os.listdir(tmp_path / "a") == ["file"]
    storage.write("a/file", NEW)
    assert storage.read("a/file") == NEW


def test_the_file_is_on_the_disk_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def replaced(old: str, new: str) -> None:
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    Storage(str(tmp_path)).write("a/b/file", b"content")
    assert calls == ["folder", "folder", "file", "rename", "folder"], "two new folders, then the file"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        storage.write("file", b"new")
    assert os.listdir(tmp_path) == ["file"] and storage.read("file") == b"old"


def test_a_stream_that_its_writer_gives_up_leaves_no_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with pytest.raises(RuntimeError, match="given up"), storage.open_output("a/file") as stream:
        stream.write(b"half")
        raise RuntimeError("given up")
    assert not storage.exists("a/file") and os.listdir(tmp_path / "a") == []


def test_two_writers_of_one_name_leave_the_content_of_one_of_them(tmp_path: Path) -> None:
    contents = [bytes([n]) * 300_000 for n in range(4)]
    storage = Storage(str(tmp_path))
    threads = [threading.Thread(target=storage.write, args=("file", content)) for content in contents * 5]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not storage.exists("file") or storage.read("file") in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    storage.write("file", OLD)
    writer = threading.Thread(target=lambda: [storage.write("file", content) for content in (NEW, OLD) * 10])
    writer.start()
    while writer.is_alive():
        assert storage.read("file") in (OLD, NEW)
    writer.join()


def test_a_uri_of_the_local_disk_is_the_local_disk(tmp_path: Path) -> None:
    Storage(f"file://{tmp_path}/").write("file", b"content")
    assert Storage(str(tmp_path)).read("file") == b"content"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://KEY:hush@bucket/folder?region=eu-west-1&endpoint_override=host:9000", "s3://bucket/folder"),
        ("s3://KEY:hu/sh@bucket/folder", "s3://bucket/folder"),
        ("s3://KEY:hu?sh@bucket/folder", "s3://bucket/folder"),
        ("s3://KEY:hu@sh@bucket/folder", "s3://bucket/folder"),
        ("abfss://:hush@account/container", "abfss://account/container"),
        ("s3://bucket/mail@home/folder", "s3://bucket/mail@home/folder"),
        ("gs://bucket/folder", "gs://bucket/folder"),
        ("/data/mail@home", "/data/mail@home"),
        ("data", "data"),
    ],
)
def test_people_see_an_address_without_its_credentials(address: str, shown: str) -> None:
    assert without_credentials(address) == shown


@pytest.mark.parametrize(
    "address",
    [
        "s3://KEY:hu/sh@bucket/folder",
        "s3://KEY:hu sh@bucket/folder",
        "s3://KEY:hu'sh@bucket/folder",
        "s3://KEY:hush@bucket/folder?frobnicate=1",
        "s3://KEY:hush@/",
        "ftp://KEY:hush@host/folder",
    ],
)
def test_an_address_that_cannot_be_opened_is_refused_in_words_and_without_its_secret(address: str) -> None:
    with pytest.raises(UserError, match="cannot open the filesystem") as error:
        Storage(address)
    text = str(error.value)
    assert "KEY" not in text and "hu" not in text and "sh@" not in text
    assert "->" in text and "got" in text


def test_a_storage_shows_no_credentials_and_keeps_the_options_of_its_address() -> None:
    address = "s3://KEY:hu%2Fsh@bucket/a%20folder?scheme=http&region=eu-west-3&endpoint_override=127.0.0.1:9"
    storage = Storage(address).within("day=2026-11-20")
    assert storage.path == "s3://bucket/a%20folder/day=2026-11-20"
    assert storage.root == "bucket/a folder/day=2026-11-20"
    _, (options,) = storage.filesystem.__reduce__()
    assert (options["access_key"], options["secret_key"], options["region"]) == ("KEY", "hu/sh", "eu-west-3")
    assert (options["scheme"], options["endpoint_override"]) == ("http", "127.0.0.1:9")
    assert options["request_timeout"] > 3, "pyarrow's own"


def test_an_option_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(UserError, match="tls_ca_file_path"):
        Storage("s3://KEY:hush@bucket/folder?tls_verify_certificates=false")
