"""A client of PostgreSQL's replication protocol: base backups and WAL, of servers of 15 and later.

pg_basebackup and pg_receivewal refuse servers that are newer than they are, and clients of 15 are all that is at hand.
"""

import os
import pathlib
import socket
import struct
import tarfile
import tempfile

SEGMENT = 16 << 20


class ServerError(Exception):
    """What the server answered instead."""


def lsn_number(text):
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def lsn_text(number):
    return f"{number >> 32:X}/{number & 0xFFFFFFFF:X}"


class Connection:
    def __init__(self, port, options=""):
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.input = self.socket.makefile("rb", buffering=1 << 20)
        parameters = ["user", "postgres", "replication", "true", "options", options, ""]
        body = struct.pack("!I", 0x30000) + b"".join(text.encode() + b"\0" for text in parameters)
        self.socket.sendall(struct.pack("!I", len(body) + 4) + body)
        while self.message()[0] != b"Z":
            pass

    def message(self):
        head = self.input.read(5)
        if len(head) < 5:
            raise ServerError("the server is gone")
        kind, length = head[:1], struct.unpack("!I", head[1:])[0]
        body = self.input.read(length - 4)
        if kind == b"E":
            raise ServerError(body.replace(b"\0", b" ").decode(errors="replace"))
        return kind, body

    def query(self, text):
        body = text.encode() + b"\0"
        self.socket.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)

    def close(self):
        self.input.close()
        self.socket.close()


def _row(body):
    row, at = [], 2
    while at < len(body):
        (length,) = struct.unpack_from("!i", body, at)
        at += 4
        row.append(None if length < 0 else body[at:at + length].decode())
        at += max(length, 0)
    return row


def base_backup(port, options, target):
    """Unpacks a base backup into `target`, tablespaces into pg_tblspc instead of links.

    Returns the LSNs at which it starts and ends, and the tablespaces' locations by oid.
    """
    target = pathlib.Path(target)
    target.mkdir(mode=0o700)
    connection = Connection(port, options)
    connection.query("BASE_BACKUP (LABEL 'redo-files', CHECKPOINT 'fast', WAL false, MANIFEST 'no')")
    rows, locations, archives = [], {}, []
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        archive = None
        while True:
            kind, body = connection.message()
            if kind == b"Z":
                break
            if kind == b"D":
                rows.append(_row(body))
            elif kind == b"d" and body[:1] == b"n":
                name, location = body[1:].split(b"\0")[:2]
                archive = open(os.path.join(directory, name.decode()), "wb")
                archives.append(archive)
                if name != b"base.tar":
                    locations[int(name[:-4])] = location.decode()
            elif kind == b"d" and body[:1] == b"d":
                archive.write(body[1:])
        connection.close()
        # The data directory comes last, and its links must not be followed.
        for archive in reversed(archives):
            archive.close()
            name = os.path.basename(archive.name)
            where = target if name == "base.tar" else target / "pg_tblspc" / name[:-4]
            if where.is_symlink():
                where.unlink()
            where.mkdir(exist_ok=True)
            with tarfile.open(archive.name) as tar:
                tar.extractall(where)
    return rows[0][0], rows[-1][0], locations


def receive_wal(port, options, start, end, directory):
    """Writes the WAL from the segment of `start` to `end` into segment files, the last one filled up with zeros."""
    at = lsn_number(start) // SEGMENT * SEGMENT
    end = lsn_number(end)
    connection = Connection(port, options)
    connection.query(f"START_REPLICATION PHYSICAL {lsn_text(at)} TIMELINE 1")
    output = None
    while at < end:
        kind, body = connection.message()
        if kind != b"d" or body[:1] != b"w":
            continue
        if struct.unpack_from("!Q", body, 1)[0] != at:
            raise ServerError(f"the WAL goes on at {lsn_text(at)}")
        data = memoryview(body)[25:]
        while data:
            if at % SEGMENT == 0 or output is None:
                number = at // SEGMENT
                name = f"{1:08X}{number // 256:08X}{number % 256:08X}"
                if output:
                    output.close()
                output = open(os.path.join(directory, name), "wb")
                output.truncate(SEGMENT)
            part = data[:SEGMENT - at % SEGMENT]
            output.write(part)
            at += len(part)
            data = data[len(part):]
    output.close()
    connection.close()
