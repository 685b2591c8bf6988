"""Recovery by stock PostgreSQL."""

import pathlib
import re
import shutil
import signal
import subprocess
import time

from . import control
from .cluster import as_postgres, give_to_postgres
from .compare import CONTROL

SETTINGS = """
restore_command = 'cp "{wal}/%f" "%p"'
recovery_target_lsn = '{lsn}'
recovery_target_inclusive = off
recovery_target_action = promote
recovery_target_timeline = current
hot_standby = off
allow_in_place_tablespaces = on
autovacuum = off
max_logical_replication_workers = 0
checkpoint_timeout = 1d
log_checkpoints = on
fsync = off
listen_addresses = ''
unix_socket_directories = '{sockets}'
"""
IN_PRODUCTION = 6


def start_of(base):
    """Where recovery of a base backup starts."""
    label = (pathlib.Path(base) / "backup_label").read_text()
    return re.search(r"START WAL LOCATION: ([0-9A-F/]+)", label)[1]


def recover(binaries, base, target, wal, lsn, outside):
    """Makes `target` what the base backup is at the LSN, with everything written. `outside` is where a tablespace lies;
    what was there is gone."""
    subprocess.run(["cp", "-a", base, target], check=True)
    for entry in outside.iterdir():
        shutil.rmtree(entry)
    with open(target / "postgresql.auto.conf", "a") as settings:
        settings.write(SETTINGS.format(wal=wal, lsn=lsn, sockets=target))
    (target / "recovery.signal").touch()
    give_to_postgres(target)
    log = target / "logfile"
    with open(log, "wb") as output:
        server = subprocess.Popen(as_postgres([binaries / "postgres", "-D", target]), stdout=output, stderr=output, cwd="/")
    # pg_ctl would wait no longer than until recovery begins.
    while server.poll() is None and not is_ready(target):
        time.sleep(0.05)
    server.send_signal(signal.SIGQUIT)
    server.wait()
    text = log.read_text(errors="replace")
    # Whatever was in memory was written by the checkpoint at the end of recovery.
    stopped = re.search(r"recovery stopping (before|after) WAL location", text)
    written = re.search(r"checkpoint starting: .*end-of-recovery", text) and "checkpoint complete" in text
    if not stopped or not written or control.state((target / CONTROL).read_bytes()) != IN_PRODUCTION:
        raise SystemExit(f"redo-files: recovery to {lsn} failed: {text[-2000:]}")


def is_ready(data):
    """Whether the server has left recovery: the eighth line of postmaster.pid."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return False
    return len(lines) > 7 and lines[7].strip() == "ready"
