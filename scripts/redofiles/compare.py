"""Compares two data directories file by file. What is masked, and why: scripts/redo-files."""

import pathlib
import re
import struct

from . import control

PAGE = 8192
PAGE_VERSION = struct.pack("<H", PAGE | 4)
GIST_SPECIAL, GIST = struct.pack("<H", PAGE - 16), struct.pack("<H", 0xFF81)
GIST_TUPLES_DELETED = 4
# Nothing in there comes from the WAL.
NOT_IN_WAL = re.compile(
    r"(pg_wal|pg_subtrans|pg_stat|pg_stat_tmp|pg_notify|pg_serial|pg_snapshots|pg_dynshmem|pg_replslot"
    r"|pg_logical/(mappings|snapshots)|log)/"
    r"|[^/]*\.(conf|auto\.conf|signal|done|old|pid|opts|log)$"
    # Where the preload library hides the compute's own.
    r"|global/pg_control\.pgstrata$"
    r"|(backup_label|tablespace_map|backup_manifest|current_logfiles|logfile)$"
    r"|(.*/)?pg_internal\.init(\.[0-9]+)?$"
    r"|(.*/)?pgsql_tmp"
)
RELATION = re.compile(r"(?:base|global|pg_tblspc)/(?:.*/)?(\d+)(_[a-z]+)?(\.\d+)?$")
# A database's directory in a tablespace.
PLACE = re.compile(r"pg_tblspc/\d+/[^/]+/\d+/$")
TEMPORARY = re.compile(r"(?:base|pg_tblspc)/(?:.*/)?t\d+_\d+(_[a-z]+)?(\.\d+)?$")
SLRU = re.compile(r"(pg_xact|pg_multixact/members|pg_multixact/offsets|pg_commit_ts)/[0-9A-F]+$")
ORIGINS = "pg_logical/replorigin_checkpoint"
CONTROL = "global/pg_control"


def entries(root):
    """Paths of files and directories below `root`, directories with a slash at their end. Tablespaces' links count as
    directories."""
    found, pending = set(), [pathlib.Path(root)]
    while pending:
        for path in pending.pop().iterdir():
            name = str(path.relative_to(root))
            if path.is_dir():
                pending.append(path)
                name += "/"
            if not NOT_IN_WAL.match(name) and not TEMPORARY.match(name):
                found.add(name)
    return found


class Comparison:
    def __init__(self, ours, stock):
        self.ours, self.stock = pathlib.Path(ours), pathlib.Path(stock)
        self.files = self.pages = 0
        self.differences = []
        self.kinds = {}

    def differ(self, path, what):
        self.differences.append(f"{path}: {what}")

    def run(self):
        ours, stock = entries(self.ours), entries(self.stock)
        for path in sorted(ours | stock):
            relation = RELATION.match(path)
            if relation and relation[2] == "_fsm":
                continue
            if path not in ours or path not in stock:
                there = self.ours if path in ours else self.stock
                self.missing(path, there / path, "not on the page server" if path in stock else "only on the page server")
            elif not path.endswith("/"):
                self.file(path, relation)
        return self

    def missing(self, path, file, what):
        size = "" if path.endswith("/") else f" ({file.stat().st_size} bytes)"
        if PLACE.match(path) and not any(file.iterdir()):
            return
        # A file without content: no origin has progressed.
        if path == ORIGINS and file.stat().st_size == 8:
            return
        self.differ(path, what + size)

    def count(self, kind, pages):
        files, before = self.kinds.get(kind, (0, 0))
        self.kinds[kind] = (files + 1, before + pages)
        self.files += 1
        self.pages += pages

    def file(self, path, relation):
        a, b = (self.ours / path).read_bytes(), self.expected(path, relation).read_bytes()
        slru = SLRU.match(path)
        pages = -(-max(len(a), len(b)) // PAGE) if relation or slru else 0
        name = path.rsplit("/", 1)[-1]
        kind = slru[1] if slru else path.split("/")[0] if path.startswith("pg_twophase") else name
        self.count((relation[2] or "_main")[1:] if relation else kind, pages)
        if path == CONTROL:
            a, b = control.fields(a), control.fields(b)
            for field in a:
                if a[field] != b[field]:
                    self.differ(path, f"{field} is {a[field]}, stock has {b[field]}")
        elif path == ORIGINS:
            a, b = origins(a), origins(b)
            if a != b:
                self.differ(path, f"{a}, stock has {b}")
        elif slru:
            self.slru(path, a, b)
        elif relation:
            if len(a) != len(b):
                self.differ(path, f"{len(a)} bytes, stock has {len(b)}")
            if a != b:
                self.blocks(path, a, b)
        elif a != b:
            at = next((at for at, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))
            self.differ(path, f"{len(a)} and {len(b)} bytes, the first different one at {at}")

    def expected(self, path, relation):
        """The file on the other side. Of an unlogged relation's main fork, the init fork that it is a copy of."""
        if relation and not relation[2]:
            segment = relation[3] or ""
            init = self.stock / f"{path.removesuffix(segment)}_init{segment}"
            if init.exists():
                return init
        return self.stock / path

    def slru(self, path, a, b):
        length = max(len(a), len(b))
        a, b = a.ljust(length, b"\0"), b.ljust(length, b"\0")
        for at in range(0, length, PAGE):
            self.bytes(f"{path} page {at // PAGE}", a[at:at + PAGE], b[at:at + PAGE])

    def blocks(self, path, a, b):
        for at in range(0, min(len(a), len(b)), PAGE):
            ours, stock = bytearray(a[at:at + PAGE]), bytearray(b[at:at + PAGE])
            if ours == stock:
                continue
            place = f"{path} block {at // PAGE}"
            ours[8:10] = stock[8:10] = b"\0\0"
            for page in (ours, stock):
                if page[18:20] == PAGE_VERSION and page[16:18] == GIST_SPECIAL and page[-2:] == GIST:
                    page[-4] &= ~GIST_TUPLES_DELETED & 0xFF
            if ours == stock:
                continue
            positions = [f"{high:X}/{low:X}" for page in (ours, stock) for high, low in [struct.unpack_from("<2I", page)]]
            self.bytes(f"{place} (LSN {positions[0]}, stock {positions[1]})", ours, stock)

    def bytes(self, place, ours, stock):
        if ours == stock:
            return
        different = [at for at in range(len(ours)) if ours[at] != stock[at]]
        at = different[0]
        shown = slice(at, min(different[-1] + 1, at + 16))
        self.differ(place, f"{len(different)} bytes from {at}: {ours[shown].hex()}, stock has {stock[shown].hex()}")


def origins(content):
    """Progress by origin: the order is that of slots in shared memory."""
    states = content[4:-4]
    return {node: lsn for node, lsn in (struct.unpack_from("<H6xQ", states, at) for at in range(0, len(states), 16))}
