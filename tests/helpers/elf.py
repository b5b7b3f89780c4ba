"""Read ELF files without binutils."""

import mmap
import struct
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2  # kinds of program headers
_NEEDED, _STRTAB = 1, 5  # tags of the dynamic section


def needed(library: Path) -> list[str]:
    """Return the names of the shared libraries that a 64-bit little-endian library needs."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        assert data[:6] == b"\x7fELF\x02\x01"
        offset, size, number = (
            struct.unpack_from(form, data, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56))
        )
        headers = [struct.unpack_from("<IIQQQQ", data, offset + size * index) for index in range(number)]
        [(start, length)] = [(at, in_file) for kind, _, at, _, _, in_file in headers if kind == _DYNAMIC]
        entries = list(struct.iter_unpack("<qQ", data[start : start + length]))
        strings = next(value for tag, value in entries if tag == _STRTAB)  # an address
        table = next(
            strings - address + at
            for kind, _, at, address, _, in_file in headers
            if kind == _LOAD and address <= strings < address + in_file
        )
        names = (table + value for tag, value in entries if tag == _NEEDED)
        return [data[at : data.find(b"\0", at)].decode() for at in names]
