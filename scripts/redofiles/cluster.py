"""A local cluster of pgstrata, driven by its command."""

import json
import os
import shutil
import subprocess

CLIENTS = "/usr/lib/postgresql/15/bin"


def as_postgres(command):
    """The command as an unprivileged user, if we are root."""
    command = [str(part) for part in command]
    if os.geteuid() == 0:
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", "--", *command]
    return command


def give_to_postgres(path):
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "postgres:", path], check=True)


class Cluster:
    def __init__(self, directory, programs, binaries):
        self.directory, self.programs, self.binaries = directory, programs, binaries
        self.port = None

    def cli(self, *arguments):
        command = [self.programs / "pgstrata", "--dir", self.directory, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"redo-files: pgstrata {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def json(self, *arguments):
        return json.loads(self.cli(*arguments, "--json"))

    def up(self):
        uri = self.cli("up", "--pg-bin", str(self.binaries))
        self.port = int(uri.rsplit(":", 1)[1].split("/")[0])

    def start(self, settings):
        self.up()
        for name, value in settings.items():
            self.sql(f"alter system set {name} = '{value}'")
        self.cli("compute", "stop", "main")
        self.up()

    def sql(self, statement):
        command = [f"{CLIENTS}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(self.port)]
        done = subprocess.run([*command, "-U", "postgres", "-d", "postgres", "-c", statement], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"redo-files: {statement}: {done.stderr.strip()}")
        return done.stdout.strip()

    def flushed(self):
        return self.sql("select pg_current_wal_flush_lsn()")

    def stop(self):
        """Ends the compute. Returns the end of what it committed."""
        self.cli("compute", "stop", "main")
        return self.json("lsn")["lsn"]

    def pg_port(self, role):
        processes = self.json("status")["processes"]
        address = next(process["pg"] for process in processes if process["role"] == role)
        return int(address.rsplit(":", 1)[1])

    def safekeeper_options(self):
        main = self.json("branch", "list")[0]
        return f"-c pgstrata.tenant={main['tenant_id']} -c pgstrata.timeline={main['timeline_id']}"

    def dump(self, wal):
        """The records of a directory of WAL, one a line."""
        command = [self.programs / "pgstrata", "wal", "dump", "--wal", wal]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def down(self):
        if self.directory.exists():
            subprocess.run([self.programs / "pgstrata", "--dir", self.directory, "down"], capture_output=True)
            shutil.rmtree(self.directory, ignore_errors=True)
