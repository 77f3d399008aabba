"""Members of a tar, read on past what is damaged, which is named and counted."""

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: a header is one, a file's content is filled up to a whole one
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
NO_FILE = b"DV"  # types of GNU tar that are neither a file nor lost: what a folder held, the name of a volume


class TarFault(NamedTuple):
    """A part of a tar that is lost: damaged, or of a kind that is not read."""

    member: str  # its name, "" where no header tells it
    reason: str


class TarMembers:
    """The files of a tar in their order, whatever is damaged between them; `faults` is whole when all have been seen.

    A tar ends in two blocks of zeros, and after them another may follow, as `cat` joins them. A header that cannot be read is
    a fault, and the next is looked for block by block.
    """

    def __init__(self, file: BinaryIO):
        """Read `file`, which can seek, from its beginning; ValueError for one that is compressed, empty, or no tar."""
        self.faults: list[TarFault] = []
        # A TarFile refuses a damaged first header: it is opened on an empty archive, and given one header at a time.
        self._opened = tarfile.TarFile(fileobj=io.BytesIO(bytes(2 * BLOCK)))
        self._opened.fileobj = self._file = file
        self._size, self._before = file.seek(0, io.SEEK_END), ""
        file.seek(0)
        start = file.read(BLOCK)
        if kind := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
            raise ValueError(f"compressed by {kind}")
        if not start:
            raise ValueError("empty file")

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Yield the regular files that are there as a whole."""
        at, first, zeros, lost, count = 0, 0, 0, None, 0
        while at < self._size:
            member, after = self._read_header(at)
            if isinstance(member, tarfile.TarInfo):
                self._judge_gap(at, first, zeros, lost)
                first, zeros, lost, count = (at if zeros > 1 else first), 0, None, count + 1
                if member.offset_data + (0 if member.issparse() else member.size) > self._size:
                    self._lose(f"cut at byte {self._size}, inside of this file", member.name)
                    return
                if self._is_file(member):
                    yield member
                self._before = member.name
            elif member == "zeros":
                zeros += 1
            else:
                # A zeroed header is one block of zeros before content.
                lost, zeros = (at - BLOCK * (zeros == 1) if lost is None else lost), 0
            at = after
        if not count and lost is not None:
            raise ValueError("no header of a tar in it")
        self._judge_end(at, zeros, lost)

    def _read_header(self, at: int) -> tuple[tarfile.TarInfo | str, int]:
        """Return the member whose header is at a byte, "zeros" or "damaged", and where the next header is to be."""
        self._file.seek(at)
        block = self._file.read(BLOCK)
        if not block.strip(b"\0"):
            return "zeros", at + BLOCK
        if not block[148:156].strip(b"01234567 \0"):  # the check sum's place; content is seldom digits there
            self._file.seek(at)
            try:
                member = tarfile.TarInfo.fromtarfile(self._opened)
            except (tarfile.TarError, ValueError, OverflowError, MemoryError):
                return "damaged", at + BLOCK
            if member.size >= 0 and self._opened.offset > at:
                return member, self._opened.offset
        return "damaged", at + BLOCK

    def _judge_gap(self, at: int, first: int, zeros: int, lost: int | None) -> None:
        """Add the fault in what lies between the last member and the one at byte `at` of an archive that began at `first`.

        The zeros at the end of an archive are two blocks, or fill its last record of 20 blocks: an archive of 7 has 13.
        """
        if lost is not None:
            self._lose(f"no header can be read at byte {lost}{self._after()}: what lies there up to byte {at} is lost")
        elif zeros == 1 or zeros > 2 and (at - first) % tarfile.RECORDSIZE:
            self._lose(f"zeros at byte {at - zeros * BLOCK}{self._after()} where a header should be")

    def _judge_end(self, at: int, zeros: int, lost: int | None) -> None:
        """Add the faults at the end of the file, `at`, which `zeros` blocks of zeros are before."""
        if lost is not None:
            end = min(at, self._size) - zeros * BLOCK
            self._lose(f"no header can be read at byte {lost}{self._after()}: what lies there up to byte {end} is lost")
        elif zeros < 2:
            self._lose(f"cut at byte {self._size}{self._after()}: it does not end in end-of-archive blocks")
        elif not self._before and self._size > tarfile.RECORDSIZE:
            self._lose("nothing but zeros")

    def _is_file(self, member: tarfile.TarInfo) -> bool:
        """Return whether a member is a regular file; links and the like are faults."""
        if member.issym() or member.islnk():
            kind = "symbolic" if member.issym() else "hard"
            self._lose(f"a {kind} link to {member.linkname}, which is not followed; make the tar with "
                       "--dereference --hard-dereference", member.name)  # fmt: skip
        elif member.issparse():
            self._lose("a sparse file, which is not read; make the tar without --sparse", member.name)
        elif not member.isreg() and not member.isdir() and member.type not in NO_FILE:
            self._lose("neither a file nor a folder", member.name)
        return member.isreg() and not member.issparse()

    def _after(self) -> str:
        return f" after {self._before}" if self._before else ""

    def _lose(self, reason: str, member: str = "") -> None:
        self.faults.append(TarFault(member, reason))
