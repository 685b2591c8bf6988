"""A safekeeper is lost and replaced under load: what commits cost meanwhile, how fast, and after kill -9 anywhere."""
import filecmp, json, os, random, shutil, signal, statistics, subprocess, time

from .commits import Strata
from .common import BIN, as_user, directory_for_postgres, run, sql

CLIENTS = 8
# WAL alone, and no pages: a message is written and means nothing.
FILL = "select count(pg_logical_emit_message(false, 'fill', repeat(md5(n::text), 31250))) from generate_series(1, {n}) n"


def percentile(values, share):
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


class Load:
    """pgbench until it is told to end, with the latency of each transaction."""

    def __init__(self, uri, directory, name):
        self.prefix = directory / name
        command = [BIN / "pgbench", "-n", "-N", "-c", CLIENTS, "-j", 1, "-T", 86400, "-l", f"--log-prefix={self.prefix}", uri]
        self.child = subprocess.Popen(as_user(command), cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def end(self):
        """Latencies in ms. Whether a client met an error shows in what it says before."""
        failed = self.child.poll()
        self.child.send_signal(signal.SIGINT)
        said = self.child.communicate()[1]
        if failed is not None:
            raise SystemExit(f"pgbench ended: {said.strip()}")
        logs = list(self.prefix.parent.glob(self.prefix.name + ".*"))
        return [int(line.split()[2]) / 1000 for log in logs for line in log.read_text().splitlines() if len(line.split()) >= 6]


def row(name, latencies, seconds):
    print(
        f"{name:<22} {len(latencies) / seconds:>8.0f} {statistics.median(latencies):>8.2f} {percentile(latencies, 0.99):>8.2f} "
        f"{max(latencies):>9.1f}",
        flush=True,
    )
    return percentile(latencies, 0.99)


class Lost:
    def __init__(self, root, programs, gigabytes):
        self.directory = directory_for_postgres(root / "replace")
        self.system = Strata(self.directory, programs)
        self.uri = self.system.uri
        run([BIN / "pgbench", "-i", "-q", "-s", 10, self.uri])
        self.keep_all()
        messages = int(gigabytes * 1000)
        began = time.monotonic()
        while messages > 0:
            sql(self.uri, FILL.format(n=min(messages, 200)))
            messages -= 200
        print(f"{gigabytes} GB of WAL written in {time.monotonic() - began:.0f} s", flush=True)

    def branch(self):
        return json.loads(self.system.cli("branch", "list", "--json"))[0]

    def keep_all(self):
        """Nothing is archived from now on, and so nothing removed: the name of a segment in object storage is taken."""
        branch = self.branch()
        wal = self.system.directory / "objects" / "tenants" / branch["tenant_id"] / "timelines" / branch["timeline_id"] / "wal"
        lsn = int(sql(self.uri, "select pg_current_wal_flush_lsn() - '0/0'"))
        for number in range(lsn >> 24, (lsn >> 24) + 3):
            path = wal / f"00000001{number >> 8:08X}{number & 255:08X}.zst"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(b"taken")

    def ids(self):
        return [safekeeper["id"] for safekeeper in json.loads(self.system.cli("safekeeper", "list", "--json"))]

    def files(self, node):
        branch = self.branch()
        return self.system.directory / f"safekeeper-{node}" / branch["tenant_id"] / branch["timeline_id"]

    def size(self, node):
        path = self.files(node)
        return sum(file.stat().st_size for file in path.iterdir() if len(file.name) == 24) if path.exists() else 0

    def pid(self, name):
        processes = json.loads(self.system.cli("status", "--json"))["processes"]
        return next((process["pid"] for process in processes if process["name"] == name), None)

    def lose(self, node):
        os.kill(self.pid(f"safekeeper-{node}"), signal.SIGKILL)
        time.sleep(0.2)
        shutil.rmtree(self.system.directory / f"safekeeper-{node}")

    def replace(self, node):
        return subprocess.Popen([*self.system.command, "safekeeper", "replace", str(node)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def copy(self, node):
        """cp of the same bytes, to the disk: seconds."""
        target = self.directory / "copied"
        began = time.monotonic()
        run(["cp", "-r", self.files(node), target])
        run(["sync", "-f", target])
        seconds = time.monotonic() - began
        run(["rm", "-r", target])
        return seconds

    def compare(self):
        """The same segments everywhere, but for the last ones, which are being written or may be made ahead."""
        nodes = self.ids()
        names = sorted(file.name for file in self.files(nodes[0]).iterdir() if len(file.name) == 24)[:-3]
        for node in nodes[1:]:
            for name in names:
                if not filecmp.cmp(self.files(nodes[0]) / name, self.files(node) / name, shallow=False):
                    raise SystemExit(f"segment {name} differs between safekeepers {nodes[0]} and {node}")
        return len(names)


def replace(root, programs, quick):
    gigabytes, seconds, kills = (0.3, 4, 3) if quick else (float(os.environ.get("REPLACE_GB", "20")), 30, 20)
    lost = Lost(root, programs, gigabytes)
    print(f"{'':<22} {'TPS':>8} {'p50 ms':>8} {'p99 ms':>8} {'longest':>9}")
    load = Load(lost.uri, lost.directory, "three")
    time.sleep(seconds)
    row("three members", load.end(), seconds)
    nodes = lost.ids()
    lost.lose(nodes[1])
    load = Load(lost.uri, lost.directory, "two")
    time.sleep(seconds)
    before = row("one is gone", load.end(), seconds)
    size, copied = lost.size(nodes[0]), lost.copy(nodes[0])
    load = Load(lost.uri, lost.directory, "replaced")
    time.sleep(1)
    began = time.monotonic()
    command = lost.replace(nodes[1])
    said = command.communicate()
    took = time.monotonic() - began
    if command.returncode:
        raise SystemExit(said[1])
    during = row("it is replaced", load.end(), took + 1)
    print(f"p99 while it is replaced / before: {during / before:.2f}")
    print(f"{size / 1e9:.1f} GB in {took:.1f} s, {size / took / 1e6:.0f} MB/s; cp and sync of the same: {copied:.1f} s, {size / copied / 1e6:.0f} MB/s")
    print(f"{lost.compare()} segments are the same on all", flush=True)
    # The process that catches up is killed, wherever it is, and the command given again.
    nodes = lost.ids()
    lost.lose(nodes[0])
    size = lost.size(nodes[1])
    load = Load(lost.uri, lost.directory, "killed")
    began = time.monotonic()
    killed = 0
    while killed < kills:
        command = lost.replace(nodes[0])
        # A share of the bytes further each time.
        goal = size * (killed + random.random()) / kills
        while command.poll() is None:
            newcomer = max(int(path.name.split("-")[1]) for path in lost.system.directory.glob("safekeeper-*") if path.is_dir())
            pid = lost.pid(f"safekeeper-{newcomer}")
            if newcomer not in nodes and pid and lost.size(newcomer) >= goal:
                os.kill(pid, signal.SIGKILL)
                killed += 1
                command.kill()
                break
            time.sleep(0.05)
        command.wait()
        if command.returncode == 0:
            break
        # It starts the one that was killed, and fails since another one is lost.
        subprocess.run([*lost.system.command, "up", "--pg-bin", str(BIN)], capture_output=True)
    command = lost.replace(nodes[0])
    said = command.communicate()
    if command.returncode and "there is no safekeeper" not in said[1]:
        raise SystemExit(said[1])
    took = time.monotonic() - began
    row(f"{killed} kills of it", load.end(), took)
    quorum = json.loads(lost.system.cli("quorum", "show", "--branch", "main", "--json"))
    if quorum["joint"] or sorted(member["id"] for member in quorum["members"]) != sorted(lost.ids()):
        raise SystemExit(f"the members are not those that they should be: {quorum}")
    print(f"replaced after {killed} kills in {took:.0f} s; {lost.compare()} segments are the same on all", flush=True)
    lost.system.stop()
