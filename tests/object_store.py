"""A bucket in memory behind `gs://`, that can fail at any operation and shows what is half written, as some do."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any, ClassVar

from fsspec.implementations.memory import MemoryFile, MemoryFileSystem


class Bucket(MemoryFileSystem):
    """`failing` is asked at every operation with its name and path, and raises what goes wrong there."""

    cachable = False
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failing: Callable[[str, str], None] = staticmethod(lambda operation, path: None)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/") if path.strip("/") else ""

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode, **options)
        type(self).failing("open", path)
        return _Upload(self, path)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        type(self).failing("copy", path2)
        super().cp_file(path1, path2, **options)

    def _rm(self, path: str) -> None:
        type(self).failing("remove", path)
        super()._rm(path)


class _Upload(io.BytesIO):
    """Closing it stores what it has, also when writing has failed before: that is what fsspec's files do."""

    def __init__(self, bucket: Bucket, path: str) -> None:
        super().__init__()
        self._bucket, self._path = bucket, path

    def write(self, data: Any) -> int:
        type(self._bucket).failing("write", self._path)
        return super().write(data)

    def close(self) -> None:
        if not self.closed:
            data = self.getvalue()
            super().close()
            self._bucket.store[self._path] = MemoryFile(self._bucket, self._path, data)
            self._bucket.store[self._path].seek(0)
            type(self._bucket).failing("close", self._path)


class Failure:
    """Fails at the n-th operation of a kind, and counts all."""

    def __init__(self, operation: str, number: int = 1, *, always_after: bool = False) -> None:
        self.operation, self.number, self.count, self._always = operation, number, 0, always_after

    def __call__(self, operation: str, path: str) -> None:
        self.count += operation == self.operation
        if operation == self.operation and (self.count == self.number or (self._always and self.count > self.number)):
            raise OSError(f"the network is gone at {operation} {self.number}")
