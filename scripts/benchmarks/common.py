"""What every benchmark needs: PostgreSQL's programs, an unprivileged user, free ports."""
import contextlib, os, pwd, socket, subprocess
from pathlib import Path

BIN = Path(os.environ.get("PGSTRATA_PG_BIN", "/usr/lib/postgresql/15/bin"))

# Ends whatever was started, on every way out: each says how before it starts anything, so that a start that fails
# half-way leaves nothing either. What has ended already is ended again, which does nothing.
STARTED = contextlib.ExitStack()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def as_user(command):
    """PostgreSQL does not run as root."""
    command = [str(part) for part in command]
    if os.getuid() != 0:
        return command
    return ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups", "--", *command]


def run(command, **options):
    done = subprocess.run(as_user(command), cwd="/", text=True, capture_output=True, **options)
    if done.returncode:
        raise SystemExit(f"{command[0]}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def end(child):
    """Waits for one that was told to end; not for ever."""
    try:
        child.wait(timeout=60)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def sql(uri, text):
    return run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", uri, "-c", text]).strip()


def directory_for_postgres(directory):
    directory.mkdir()
    directory.chmod(0o755)
    if os.getuid() == 0:
        postgres = pwd.getpwnam("postgres")
        os.chown(directory, postgres.pw_uid, postgres.pw_gid)
    return directory


class Server:
    """A stock server on a data directory."""

    def __init__(self, data, options="", prefix=(), bin=BIN):
        self.data, self.port, self.bin, self.prefix = data, free_port(), bin, prefix
        self.options = f"-c port={self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= {options}"
        self.uri = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        STARTED.callback(self.stop)
        self.start()

    def start(self):
        command = [self.bin / "pg_ctl", "-D", self.data, "-w", "-t", 600, "-l", f"{self.data}.log", "-o", self.options, "start"]
        run([*self.prefix, *command])

    def stop(self, mode="immediate"):
        command = [self.bin / "pg_ctl", "-D", self.data, "-w", "-t", 600, "-m", mode, "stop"]
        subprocess.run(as_user(command), cwd="/", capture_output=True)


def initdb(data, bin=BIN):
    run([bin / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "-N"])
