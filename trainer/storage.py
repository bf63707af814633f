"""Files on a local disk or in an object store, by one small set of words: whoever needs a filesystem opens it here.

    Storage("/data/checkpoints"), Storage("s3://bucket/checkpoints") -> read, write, exists, files, folders, delete ...

`write` is all or nothing, also when the process is killed in it. On a local disk: a temporary name in the same folder,
fsync of the file, rename, fsync of the folder. In an object store: one PUT, which the store makes visible as a whole.
So no reader ever sees half a file. What killed writes leave behind on a disk is listed nowhere; `remove_leftovers`
frees its space.

Names are relative to the storage, with "/" between folders; "" is the storage itself. What goes wrong is raised as
OSError or pyarrow.ArrowException: the caller knows what was being done, and says it in words.
"""

import contextlib
import copy
import hashlib
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any, cast

import pyarrow as pa
import pyarrow.fs

from embeddings.pulse import beat
from trainer.errors import UserError

_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 60.0  # how long an answer may stand still; without it pyarrow gives up after 3 s
_MAX_ATTEMPTS = 8  # of one request, with growing pauses: about a minute of a store that refuses
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")
_CHUNK_BYTES = 8 << 20


class Storage:
    """A folder on a local disk or in an object store.

    path: what people are shown: the address without key, secret and options. filesystem, root: for readers and writers
    of Parquet, as f"{root}/{name}".
    """

    def __init__(self, path: str):
        """path: a local folder, or the URI of any filesystem that pyarrow knows: s3://, gs://, abfs://, hdfs://, file://.
        An address that cannot be opened is a UserError.
        """
        self.path = without_credentials(path).rstrip("/")
        self.filesystem, self.root = open_filesystem(path)
        self._is_local = isinstance(self.filesystem, pyarrow.fs.LocalFileSystem)
        self._is_object_store = self.filesystem.type_name in ("s3", "gcs", "abfs")  # put whole or not at all

    def within(self, name: str) -> "Storage":
        """A folder below; it need not be there."""
        inner = copy.copy(self)
        inner.path, inner.root = f"{self.path}/{name}", self._at(name)
        return inner

    def read(self, name: str) -> bytes:
        """The whole file. FileNotFoundError when it is absent."""
        if not self._is_object_store:
            with self.filesystem.open_input_file(self._at(name)) as stream:
                return bytes(stream.read())
        while (content := self._read_object(name)) is None:
            pass
        return content

    def _read_object(self, name: str) -> bytes | None:
        """The whole object, or None when it was replaced meanwhile. pyarrow asks for the size first, and then for so
        many bytes: of an object that is replaced in between by one of another size, that is a part, more than there is,
        or an error.
        """
        path, content = self._at(name), None
        with self.filesystem.open_input_file(path) as stream:  # it knows its size: one request for all
            size = stream.size()
            try:
                content = bytes(stream.read())
            except OSError:
                if self.filesystem.get_file_info(path).size == size:
                    raise
        return content if self.filesystem.get_file_info(path).size == size else None

    def write(self, name: str, content: bytes) -> None:
        """All of the content or none of it. Makes the folders above, and replaces what has the name."""
        open_output = self._object if self._is_object_store else self.open_output
        with open_output(name) as stream:
            stream.write(content)

    def exists(self, name: str) -> bool:
        """Is there a file of that name? A folder is none."""
        return bool(self.filesystem.get_file_info(self._at(name)).is_file)

    def folders(self, name: str = "") -> list[str]:
        """The names of the folders right below a folder, sorted; none when it is absent."""
        return sorted(info.base_name for info in self._below(name) if not info.is_file)

    def files(self, name: str = "", recursive: bool = False) -> list[str]:
        """The names of a folder's files, relative to it, sorted; none when it is absent."""
        start = len(self._at(name)) + 1
        found = [info for info in self._below(name, recursive) if info.is_file]
        return sorted(info.path[start:] for info in found if not _TEMPORARY.fullmatch(info.base_name))

    def delete(self, name: str) -> None:
        """No error when the file is absent."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(self._at(name))

    def delete_folder(self, name: str = "") -> None:
        """With all that is in it; no error when it is absent. Not at once: killed in it, some files are still there."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_dir(self._at(name))

    def fingerprint(self, name: str) -> dict[str, Any]:
        """The file's bytes and SHA-256, read piece by piece."""
        return fingerprint(self.filesystem, self._at(name))

    def open_input(self, name: str) -> Any:
        """A stream to read the file from; for a with block."""
        return self.filesystem.open_input_stream(self._at(name))

    @contextlib.contextmanager
    def open_output(self, name: str) -> Iterator[Any]:
        """A stream to write a file to. It gets its name when the with block ends well, and does not when it fails. In
        an object store a block that fails also loses the file that had the name: pyarrow can only end an upload.
        """
        if self._is_object_store:
            try:
                with self._object(name) as stream:
                    yield stream
            except BaseException:
                with contextlib.suppress(OSError, pa.ArrowException):
                    self.delete(name)
                raise
        elif self._is_local:
            with _written_beside(self._at(name)) as stream:
                yield stream
        else:
            path, temporary = self._at(name), _temporary(self._at(name))
            self.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            with self.filesystem.open_output_stream(temporary) as stream:
                yield stream
            self.filesystem.move(temporary, path)

    def remove_leftovers(self) -> None:
        """Remove what killed writes left behind anywhere below. To be called while nobody else writes here."""
        if not self._is_object_store:
            for info in self._below("", recursive=True):
                if info.is_file and _TEMPORARY.fullmatch(info.base_name):
                    self.filesystem.delete_file(info.path)

    def _object(self, name: str) -> Any:
        return self.filesystem.open_output_stream(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _below(self, name: str, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
        return cast(list, self.filesystem.get_file_info(pyarrow.fs.FileSelector(self._at(name), True, recursive)))


@contextlib.contextmanager
def _written_beside(path: str) -> Iterator[Any]:
    """A local file under a temporary name, moved into its place when it is whole and on the disk."""
    folder, temporary = os.path.dirname(path) or ".", _temporary(path)
    _make_folders(folder)
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _temporary(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}.{name}.{uuid.uuid4().hex[:12]}.tmp"


def _make_folders(folder: str) -> None:
    """Make a folder and those above it, each known to the disk."""
    if not os.path.isdir(folder):
        above = os.path.dirname(folder) or "."
        _make_folders(above)
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        _sync_folder(above)


def _sync_folder(folder: str) -> None:
    """Bring a folder's names to the disk: a rename is not on it before."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """A local path, or the URI of any filesystem that pyarrow knows (s3://, gs://, hdfs://, file://)."""
    if "tls_verify_certificates" in path.rpartition("?")[2]:  # pyarrow takes it from a URI, and from nowhere else
        what, do = "certificates are always verified", "name the server's own: tls_ca_file_path=/path/to.pem"
        raise UserError(what, without_credentials(path), got="tls_verify_certificates", do=do)
    try:
        if "://" in path:
            filesystem, root = pyarrow.fs.FileSystem.from_uri(path)
            return (_patient(filesystem) if filesystem.type_name == "s3" else filesystem), root.rstrip("/")
        return pyarrow.fs.LocalFileSystem(), path.rstrip("/")
    except (pa.ArrowException, OSError) as error:
        shown = without_credentials(path)
        got = str(error).replace(path, shown)
        do = "check the address, and write what is special in a key or secret as in %2F for /"
        raise UserError("cannot open the filesystem", shown, got=got, do=do) from None


def _patient(filesystem: Any) -> pyarrow.fs.FileSystem:
    """The same S3 with our timeouts and retries. What the URI said of it is known as what pickle would write."""
    _, (options,) = filesystem.__reduce__()
    options |= {"connect_timeout": _CONNECT_TIMEOUT_S, "request_timeout": _SILENCE_TIMEOUT_S}
    options |= {"allow_delayed_open": True}  # a small file is then one PUT
    if not options["proxy_options"]["host"]:
        del options["proxy_options"]
    retries = pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=_MAX_ATTEMPTS)
    return pyarrow.fs.S3FileSystem(**options, retry_strategy=retries)


def without_credentials(path: str) -> str:
    """An address as people may see it: no user, key, secret, and no options after a question mark."""
    scheme, mark, rest = path.partition("://")
    if not mark:
        return path
    user, _, address = rest.rpartition("@")
    if user and "/" in user and ":" not in user:
        address = rest  # the @ is part of a name
    return scheme + mark + address.partition("?")[0]


def list_folder(filesystem: pyarrow.fs.FileSystem, path: str, *, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
    """What lies in a folder; nothing when it is not there."""
    try:
        return list(filesystem.get_file_info(pyarrow.fs.FileSelector(path, True, recursive)))
    except (pa.ArrowException, OSError) as error:
        do = "check the path, the rights to read it and the network"
        raise UserError("a folder cannot be listed", path, got=first_line(error), do=do) from None


def fingerprint(filesystem: pyarrow.fs.FileSystem, path: str) -> dict[str, Any]:
    """A file's size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            beat()
    return {"bytes": size, "sha256": digest.hexdigest()}


def first_line(error: Exception) -> str:
    """What a library says, without what it adds on further lines."""
    return str(error).partition("\n")[0]
