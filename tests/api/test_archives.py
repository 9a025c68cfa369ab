"""What may be taken out of an archive, and the archives that are refused."""

from __future__ import annotations

import gzip
import io
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tinkerapi.api.bodies.archives import MAX_MEMBERS, take_files
from training.errors import InvalidRequest

WANTED = ("a.json", "b.bin")
Members = dict[str, bytes]


def as_tar(members: Members, mode: str = "w", format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def as_zip(members: Members, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


FORMS: dict[str, Callable[[Members], bytes]] = {
    "zip": as_zip,
    "stored zip": lambda members: as_zip(members, zipfile.ZIP_STORED),
    "tar": as_tar,
    "tar.gz": lambda members: as_tar(members, "w:gz"),
    "GNU tar": lambda members: as_tar(members, "w", tarfile.GNU_FORMAT),
}


@pytest.fixture
def take(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Take the wanted files; what was written."""

    def run(archive: bytes, max_bytes: int = 2**20) -> dict[str, bytes]:
        folder = tmp_path / "taken"
        folder.mkdir()
        take_files(io.BytesIO(archive), WANTED, folder, max_bytes=max_bytes, field="archive")
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    return run


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("folder", ["", "./", "adapter/", "deep/" * 40], ids=len)
def test_the_wanted_files_are_taken_from_any_folder(take, form, folder):
    content = bytes(range(256)) * 1000
    members = {f"{folder}README.md": b"x", f"{folder}b.bin": content, f"{folder}a.json": b"{}"}
    assert take(form(members)) == {"a.json": b"{}", "b.bin": content}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"../a.json": b""}, "leaves the archive"),
        ({"x/../../README.md": b""}, "leaves the archive"),
        ({"/etc/a.json": b""}, "leaves the archive"),
        ({"..\\a.json": b""}, "leaves the archive"),
        ({"one/a.json": b"", "two/a.json": b""}, "send one adapter"),
        ({f"{i}": b"" for i in range(MAX_MEMBERS + 1)}, "members"),
        ({"a.json": b"x" * (2**20 + 1)}, "unpacks to more"),
        ({"a.json": b"x" * 2**19, "b.bin": b"x" * (2**19 + 1)}, "unpacks to more"),
    ],
    ids=str,
)
def test_an_archive_that_is_more_than_an_adapter_is_refused(take, form, members, named):
    with pytest.raises(InvalidRequest, match=named) as refusal:
        take(form(members))
    assert str(refusal.value).startswith("archive: ")


def test_a_bomb_is_refused_before_it_fills_memory_whatever_its_members_are_called(take):
    bomb = gzip.compress(as_tar({"README.md": bytes(2**26)}))
    tracemalloc.start()
    with pytest.raises(InvalidRequest, match="unpacks to more"):
        take(bomb)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_huge_extended_header_is_not_read_into_memory(take):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**30
    bomb = gzip.compress(header.tobuf() + bytes(2**24))
    with pytest.raises(InvalidRequest, match="oversized header"):
        take(bomb, max_bytes=2**31)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_in_place_of_a_file_is_refused(take, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InvalidRequest, match="is a link or a device"):
        take(file.getvalue())


def test_a_link_in_a_zip_is_refused(take):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        info = zipfile.ZipInfo("a.json")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(InvalidRequest, match="is a link or a device"):
        take(file.getvalue())


def test_another_compression_is_refused(take):
    with pytest.raises(InvalidRequest, match="expected deflate"):
        take(as_zip({"a.json": b"{}"}, zipfile.ZIP_LZMA))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_an_archive_that_was_cut_off_or_changed_is_refused_or_gives_its_files(tmp_path, form):
    content = bytes(range(256)) * 40
    whole = form({"a.json": b"{}", "b.bin": content})
    step = max(1, len(whole) // 60)
    for number, cut in enumerate(range(0, len(whole), step)):
        flipped = bytearray(whole)
        flipped[cut] ^= 0x55
        for kind, broken in (("cut", whole[:cut]), ("flipped", bytes(flipped))):
            folder = tmp_path / f"{number}-{kind}"
            folder.mkdir()
            try:
                take_files(io.BytesIO(broken), WANTED, folder, max_bytes=2**20, field="archive")
            except InvalidRequest:
                continue
            assert {path.name for path in folder.iterdir()} <= set(WANTED)


@pytest.mark.parametrize(
    "garbage", [b"", b"x", b"\x1f\x8b", b"PK\x03\x04", b"PK\x05\x06" + bytes(9)]
)
def test_what_is_no_archive_is_refused(take, garbage):
    with pytest.raises(InvalidRequest, match=r"expected a \.zip, \.tar or \.tar\.gz"):
        take(garbage)
