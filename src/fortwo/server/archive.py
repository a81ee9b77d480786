"""A folder as a .tar file that is streamed: nothing is written to the disk, and its size is known before it begins."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from starlette.responses import StreamingResponse

PART_BYTES = 1 << 20


class TarResponse(StreamingResponse):
    """files: names in the archive, and where each lies. filename: what a browser saves it as."""

    def __init__(self, files: Sequence[tuple[str, Path]], filename: str) -> None:
        entries = [(_header(name, path), path) for name, path in files]
        size = sum(len(header) + _padded(path.stat().st_size) for header, path in entries) + 2 * tarfile.BLOCKSIZE
        headers = {"Content-Length": str(size), "Content-Disposition": f'attachment; filename="{filename}"'}
        super().__init__(_parts(entries), headers=headers, media_type="application/x-tar")


def _header(name: str, path: Path) -> bytes:
    about = path.stat()
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = about.st_size, int(about.st_mtime), 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _padded(size: int) -> int:
    return size + -size % tarfile.BLOCKSIZE


def _parts(entries: Sequence[tuple[bytes, Path]]) -> Iterator[bytes]:
    with ExitStack() as stack:
        # All are open before the first byte is sent, so that removing them meanwhile cuts nothing off.
        opened = [(header, stack.enter_context(path.open("rb"))) for header, path in entries]
        for header, file in opened:
            yield header
            while part := file.read(PART_BYTES):
                yield part
            yield b"\0" * (-file.tell() % tarfile.BLOCKSIZE)
    yield b"\0" * (2 * tarfile.BLOCKSIZE)
