"""Scanning tars: against ``tarfile``'s own reading, and under every kind of damage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from midge.runtime.errors import UserError
from midge.runtime.tar_scan import CUT_OFF, LEAVES_FOLDER, NOT_A_FILE, Member, clean_name, header_mismatch, scan_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\\", categories=["L", "N", "P"]), min_size=1)
PATHS = st.lists(NAMES.filter(lambda name: name not in {".", ".."}), min_size=1, max_size=3).map("/".join)


def make_tar(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special(name: str, kind: bytes, target: str = "") -> bytes:
    """One member that is no plain file, as a whole tar without its end mark."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tar") / "x.tar"


@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=1500)), max_size=8),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_every_member_stands_where_tarfile_reads_it(file: Path, members: list[tuple[str, bytes]], format: int) -> None:
    file.write_bytes(content := make_tar(members, format))
    scan = scan_tar(file)
    assert scan.whole
    assert [(name, content[offset : offset + size]) for name, offset, size in scan.members] == members
    for name, offset, size in scan.members:
        assert not header_mismatch(content[offset - 512 : offset], f"/data/x.tar/{name}", size)


@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=900)), min_size=1, max_size=5),
    st.sampled_from(FORMATS[1:]),
    st.data(),
)
def test_of_a_cut_tar_all_is_listed_whose_header_is_left(
    file: Path, members: list[tuple[str, bytes]], format: int, data: st.DataObject
) -> None:
    content = make_tar(members, format)
    file.write_bytes(content)
    whole = scan_tar(file)
    cut = data.draw(st.integers(512, len(content) - 1))
    file.write_bytes(content[:cut])
    try:
        scan = scan_tar(file)
    except UserError as error:  # cut within the first header
        assert "no uncompressed tar" in str(error) and cut < whole.members[0].offset
        return
    listed = [member for member in whole.members if member.offset <= cut]
    assert scan.members == [m._replace(size=CUT_OFF) if m.offset + m.size > cut else m for m in listed]
    end = max(member.offset + -(-member.size // 512) * 512 for member in whole.members)
    assert scan.whole == (cut >= end + 512)


@settings(max_examples=300)
@given(
    st.lists(st.tuples(PATHS, st.binary(max_size=600)), min_size=1, max_size=4),
    st.sampled_from(FORMATS[1:]),
    st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4),
)
def test_a_damaged_tar_gives_an_error_of_one_line_or_members_within_it(
    file: Path, members: list[tuple[str, bytes]], format: int, damage: list[tuple[int, bytes]]
) -> None:
    content = bytearray(make_tar(members, format))
    for place, junk in damage:
        place %= len(content)
        content[place : place + len(junk)] = junk
    check_scan_of(file, bytes(content))


@given(st.binary(max_size=4000))
def test_any_bytes(file: Path, content: bytes) -> None:
    check_scan_of(file, content)


def check_scan_of(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        scan = scan_tar(file)
    except UserError as error:
        assert "\n" not in str(error)
        return
    for member in scan.members:
        assert 512 <= member.offset <= len(content)
        assert member.size >= CUT_OFF and member.offset + member.size <= len(content)
        assert member.name == clean_name(member.name)
        if member.size >= 0:
            assert not member.name.startswith("/") and ".." not in member.name.split("/")


def test_damage_between_members_is_not_taken_for_the_end(file: Path) -> None:
    content = bytearray(make_tar([("a.png", b"x" * 600), ("b.png", b"y"), ("c.png", b"z")]))
    second = 512 + 1024
    content[second + 148 : second + 156] = b"0000000\0"  # the checksum of the second header
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged at byte {second} .*fetch it again, or remove it"):
        scan_tar(file)


def test_links_and_paths_that_leave_are_listed_as_refused(file: Path) -> None:
    file.write_bytes(
        special("a/link.png", tarfile.SYMTYPE, "/etc/passwd")
        + special("a/hard.png", tarfile.LNKTYPE, "../../x.png")
        + special("a/pipe.png", tarfile.FIFOTYPE)
        + special("a/", tarfile.DIRTYPE)
        + make_tar([("../up.png", b"1"), ("/etc/x.png", b"2"), ("a/../../b.png", b"3"), ("./a/ok.png", b"4")])
    )
    assert [(name, size) for name, _, size in scan_tar(file).members] == [
        ("a/link.png", NOT_A_FILE),
        ("a/hard.png", NOT_A_FILE),
        ("a/pipe.png", NOT_A_FILE),
        ("../up.png", LEAVES_FOLDER),
        ("/etc/x.png", LEAVES_FOLDER),
        ("a/../../b.png", LEAVES_FOLDER),
        ("a/ok.png", 1),
    ]


def test_a_negative_size_does_not_send_it_back(file: Path) -> None:
    header = bytearray(make_tar([("a.png", b"")])[:512])
    header[124:136] = (-1024 & (1 << 96) - 1).to_bytes(12, "big")  # base 256, two's complement
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    file.write_bytes(make_tar([("first.png", b"x")])[:1024] + bytes(header) + bytes(1024))
    with pytest.raises(UserError, match=r"is damaged at byte 1024 \(a negative size\)"):
        scan_tar(file)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_of_gigabytes_is_not_read(file: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, 3 << 30
    with file.open("wb") as out:
        out.write(make_tar([("first.png", b"x")])[:1024] + info.tobuf(tarfile.GNU_FORMAT))
        out.truncate(4 << 30)  # a hole: it takes no space
    with pytest.raises(UserError, match="a header of more than 65536 bytes"):
        scan_tar(file)
    file.unlink()


def test_a_huge_member_is_listed_with_its_size(file: Path) -> None:
    info = tarfile.TarInfo("huge.png")
    info.size = 20 << 30
    with file.open("wb") as out:
        out.write(info.tobuf(tarfile.GNU_FORMAT))
        assert out.flush() is None and scan_tar(file) == ([Member("huge.png", 512, CUT_OFF)], False)
        out.truncate(512 + info.size)  # a hole: it takes no space
    assert scan_tar(file) == ([Member("huge.png", 512, 20 << 30)], False)
    file.unlink()


def test_a_compressed_tar_is_named(file: Path) -> None:
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(UserError, match="is no uncompressed tar"):
        scan_tar(file)


def test_control_characters_do_not_reach_the_terminal(file: Path) -> None:
    file.write_bytes(make_tar([("a/\x1b[2J\n.png", b"")]))
    assert scan_tar(file).members[0].name == "a/?[2J?.png"
