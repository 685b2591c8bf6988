"""The fields of pg_control that recovery to an LSN determines (catalog/pg_control.h, PostgreSQL 15 to 18).

Left out: positions, times, the timeline, the state and full_page_writes, which tell how one got there, and what initdb
determined.
"""

import struct

# Of the copy of the last checkpoint, at 40.
FIELDS = {
    "nextXid": (64, "Q"),
    "nextOid": (72, "I"),
    "nextMulti": (76, "I"),
    "nextMultiOffset": (80, "I"),
    "oldestXid": (84, "I"),
    "oldestXidDB": (88, "I"),
    "oldestMulti": (92, "I"),
    "oldestMultiDB": (96, "I"),
    "oldestCommitTsXid": (112, "I"),
    "newestCommitTsXid": (116, "I"),
    "oldestActiveXid": (120, "I"),
    # Settings that standbys depend on.
    "wal_level": (172, "i"),
    "wal_log_hints": (176, "?"),
    "max_connections": (180, "i"),
    "max_worker_processes": (184, "i"),
    "max_wal_senders": (188, "i"),
    "max_prepared_transactions": (192, "i"),
    "max_locks_per_transaction": (196, "i"),
    "track_commit_timestamp": (200, "?"),
    "data_checksum_version": (252, "I"),
}


def state(control):
    """6: in production."""
    return struct.unpack_from("<I", control, 16)[0]


def fields(control):
    found = {"system_identifier": struct.unpack_from("<Q", control)[0]}
    found["catalog_version"] = struct.unpack_from("<I", control, 12)[0]
    for name, (offset, kind) in FIELDS.items():
        found[name] = struct.unpack_from("<" + kind, control, offset)[0]
    return found
