"""What runs beside a suite: loops of SQL scripts, each with its own connection, until the suite has ended."""

import os
import pathlib
import subprocess
import threading

from .cluster import CLIENTS

SCRIPTS = pathlib.Path(__file__).resolve().parent / "side"
# Database of each loop. VACUUM FULL of catalogs must not wait for what is prepared.
LOOPS = {
    "two_phase": "side",
    "relations": "side",
    "long": "side",
    "origins": "side",
    "tablespaces": "side",
    "upkeep": "side",
    "databases": "side",
    "mapped": "side_mapped",
}
# Transactions per second of row locks.
RATE = 40
# No script takes nearly as long.
PATIENCE_S = 300


class Side:
    def __init__(self, port, location, log):
        self.log = open(log, "ab")
        self.environment = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": "postgres"}
        # What is prepared holds locks, and the loop that would end it must not wait for one that waits for these.
        self.environment["PGOPTIONS"] = "-c lock_timeout=1s"
        self.counts = dict.fromkeys(LOOPS, 0)
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self.loop, args=names) for names in LOOPS.items()]
        self.pgbench = None
        for database in ("side", "side_mapped"):
            self.psql("postgres", "-c", f"create database {database}")
        self.psql("side", "-v", f"location={location}", "-f", SCRIPTS / "setup.sql")

    def psql(self, database, *arguments):
        command = [f"{CLIENTS}/psql", "-XAqt", "-d", database, *arguments]
        subprocess.run(command, env=self.environment, stdout=self.log, stderr=self.log, stdin=subprocess.DEVNULL, timeout=PATIENCE_S)

    def loop(self, name, database):
        while not self.ended.is_set():
            self.counts[name] += 1
            self.psql(database, "-v", f"n={self.counts[name]}", "-f", SCRIPTS / f"{name}.sql")
            # The suite is to have its share, and a script may fail at once.
            self.ended.wait(0.5)

    def __enter__(self):
        command = [f"{CLIENTS}/pgbench", "-n", "-c", "4", "-R", str(RATE), "-T", "86400", "-f", SCRIPTS / "multixact.sql", "side"]
        self.pgbench = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log)
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.pgbench.kill()
        self.pgbench.wait()
        for thread in self.threads:
            thread.join()
        self.log.close()

    def rounds(self):
        return ", ".join(f"{name} {count}" for name, count in self.counts.items())
