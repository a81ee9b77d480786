"""The native API that takes an adapter as a file: an archive of what PEFT saved, such as that of an export for PEFT."""

from __future__ import annotations

import errno
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Self

from fastapi import APIRouter, Request
from fastapi.concurrency import contextmanager_in_threadpool

from fortwo import disk
from fortwo.adapters.peft_files import PICKLES
from fortwo.adapters.version_files import CONFIG, MANIFEST, TENSORS
from fortwo.errors import InvalidAdapter, InvalidRequest
from fortwo.jobs.planner import check_name_available
from fortwo.records import Json
from fortwo.server.multipart import Form, form_schema, read_form
from fortwo.server.native import version_body
from fortwo.server.state import AppState, AppStateDep

WANTED = (CONFIG, TENSORS, MANIFEST, *PICKLES)  # a pickle is refused by whoever reads the folder
CHUNK = 1 << 20
LONGEST_HEADER = 1 << 20  # bytes of names and attributes of a file in a .tar
_ABOUT_THE_NEXT = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DAMAGED = (
    OSError,  # gzip, bz2 and zipfile raise it for damaged content
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
    NotImplementedError,
)

FORM = form_schema(["file", "name"], name={"type": "string"})

router = APIRouter(prefix="/api/adapters", tags=["adapters"])


@router.post(
    "/import", status_code=201, summary="Publish an adapter that is uploaded as an archive", openapi_extra=FORM
)
async def import_upload(request: Request, state: AppStateDep) -> Json:
    """`file` is a .tar, .tar.gz or .zip with adapter_config.json and adapter_model.safetensors in any folder of it;
    `name` is the adapter's, which gets its next version if it exists."""
    async with contextmanager_in_threadpool(state.files.draft()) as draft:
        form = await read_form(request, draft / ".received")
        name, filename = checked(form)
        return await state.control.run(request, lambda _: _import(state, name, filename, draft))


def checked(form: Form) -> tuple[str, str]:
    """The adapter's name and that of the file. Raises InvalidRequest for a field that is missing or not known."""
    fields = dict(form.fields)
    name = fields.pop("name", "").strip()
    for unknown in fields:
        raise InvalidRequest(f"{unknown} is not a known field.", param=unknown, hint="Send name and file.")
    if form.filename is None or not name:
        missing = "file" if form.filename is None else "name"
        raise InvalidRequest(f"{missing} is missing.", param=missing, hint="Add it.", code="missing_parameter")
    return name, form.filename


def _import(state: AppState, name: str, filename: str, draft: Path) -> Json:
    from fortwo.engine.adapter_import import import_adapter

    check_name_available(name, state.catalog)
    folder = draft / "adapter"
    folder.mkdir()
    try:
        unpack(draft / ".received", folder, state.settings.max_upload_mb << 20)
        version = import_adapter(name, folder, state.catalog, state.adapters, state.registry)
    except InvalidAdapter as error:
        parts = (error.message, error.hint)
        message, hint = (part and part.replace(f"{folder}/", "").replace(str(folder), filename) for part in parts)
        raise InvalidAdapter(message or "", param="file", hint=hint, code=error.code) from None
    return version_body(state, version)


def unpack(archive: Path, folder: Path, most_bytes: int) -> None:
    """Write the files of an adapter that the archive holds into `folder`. Nothing else of it is written, and no path or
    link in it is followed. Raises InvalidAdapter for what is no archive, is damaged, holds a file twice, or holds more
    than `most_bytes`, and StorageFailed for a full disk."""
    left = most_bytes
    try:
        for name, size, opened in _members(archive):
            left -= max(size, 0)  # a damaged header may have a negative one
            if left < 0:
                raise InvalidAdapter(
                    f"The files in the archive have more than {most_bytes >> 20} MiB.",
                    hint="Pack the adapter's files alone, allow more with FORTWO_MAX_UPLOAD_MB, or import the adapter "
                    "from a folder.",
                )
            target = folder / PurePosixPath(name.replace("\\", "/")).name
            if target.name not in WANTED:
                continue
            if target.exists():
                raise InvalidAdapter(
                    f"The archive holds {target.name} twice.", hint="Pack the files of one adapter alone."
                )
            with opened() as source, target.open("xb") as written:
                shutil.copyfileobj(source, written, CHUNK)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise disk.storage_failed(folder, error) from error
        raise InvalidAdapter(
            f"The archive cannot be read: {error}.", hint="Pack it again, without a password."
        ) from None


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """The plain files in an archive: their names, the most bytes that can be read of them, and what opens them. To pass
    one in a compressed .tar, its bytes are unpacked."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, partial(packed.open, info)
        return
    with ExitStack() as stack:
        try:
            packed_tar = stack.enter_context(tarfile.open(archive, tarinfo=_Header))
        except tarfile.ReadError:
            raise InvalidAdapter(
                "The file is no archive.", hint="Send a .tar, .tar.gz or .zip with the files that PEFT saved."
            ) from None
        for member in packed_tar:
            if member.isfile():
                yield member.name, member.size, partial(_opened, packed_tar, member)
        assert packed_tar.fileobj is not None
        packed_tar.fileobj.read(CHUNK)  # gzip has its checksum at the end


class _Header(tarfile.TarInfo):
    """A header of a .tar. One that says more about the next file than LONGEST_HEADER bytes is refused, because tarfile
    holds that in memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        found = super().frombuf(buf, encoding, errors)
        if found.type in _ABOUT_THE_NEXT and found.size > LONGEST_HEADER:
            raise InvalidAdapter(
                f"The archive has a header of {found.size:,} bytes; at most {LONGEST_HEADER:,} are read.",
                hint="Pack the adapter's files again.",
            )
        return found


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None  # it is a plain file
    return file
