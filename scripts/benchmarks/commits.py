"""Commit latency and TPS beside stock PostgreSQL, interleaved; what is sent and stored for it."""
import json, random, re, statistics, subprocess, time, urllib.request
from pathlib import Path

from .common import BIN, STARTED, Server, as_user, directory_for_postgres, initdb, run, sql

STOCK, QUORUM, OURS = "stock, local fsync", "stock, ANY 2 of 3", "pgstrata"
# A system with this behind its name is another's twin: what they do counts as one's.
AGAIN = " again"


class Stock:
    """A stock server; with receivers, commits wait for any two of three."""

    def __init__(self, directory, receivers):
        self.children = []
        self.server = None
        STARTED.callback(self.stop)
        initdb(directory / "data")
        options = "-c max_wal_size=4GB"
        if receivers:
            options += " -c synchronous_standby_names='ANY 2 (r1,r2,r3)'"
        self.server = Server(directory / "data", options)
        self.uri = self.server.uri
        for name in ("r1", "r2", "r3") if receivers else ():
            run(["mkdir", directory / name])
            target = f"{self.uri}?application_name={name}"
            command = [BIN / "pg_receivewal", "-D", directory / name, "--synchronous", "-d", target]
            self.children.append(subprocess.Popen(as_user(command), cwd="/", stderr=subprocess.DEVNULL))
        time.sleep(1)

    def stop(self):
        for child in self.children:
            child.terminate()
        if self.server:
            self.server.stop()
        for child in self.children:
            child.wait()


class Strata:
    def __init__(self, directory, programs):
        self.directory = directory / "cluster"
        self.command = [str(programs / "pgstrata"), "--dir", str(self.directory)]
        STARTED.callback(self.stop)
        self.uri = self.cli("up", "--pg-bin", str(BIN))

    def cli(self, *arguments):
        done = subprocess.run([*self.command, *arguments], text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return done.stdout.strip()

    def sent(self):
        """Bytes sent to safekeepers by main's compute."""
        processes = json.loads(self.cli("status", "--json"))["processes"]
        address = next(row["http"] for row in processes if row["role"] == "compute")
        address = address.removeprefix("http://")
        with urllib.request.urlopen(f"http://{address}/metrics") as answer:
            text = answer.read().decode()
        return int(re.search(r"^pgstrata_compute_sent_bytes_total (\d+)", text, re.M).group(1))

    def stored(self):
        """Bytes of layers and of archived WAL in object storage."""
        layers = wal = 0
        for path in (self.directory / "objects").rglob("*"):
            if path.is_file() and path.suffix == ".zst":
                wal += path.stat().st_size
            elif path.is_file():
                layers += path.stat().st_size
        return layers, wal

    def stop(self):
        # An 'up' that failed may have been about to make it.
        if (self.directory / "cluster.json").exists():
            self.cli("down")


def pgbench(uri, clients, seconds, script):
    text = run([BIN / "pgbench", "-n", "-c", clients, "-j", min(clients, 2), "-T", seconds, *script, uri])
    value = lambda key: float(next(line for line in text.splitlines() if key in line).split("=")[1].split()[0])
    return value("tps ="), value("latency average")


def start_all(root, programs, scale, others):
    """All systems, loaded. `others` are directories of other programs of ours, by name: to compare, each of ours is there
    twice, in the order A B B A, as two clusters of the same programs differ by some percent."""
    systems = {}
    ours = {OURS: programs, **others}
    if others:
        ours |= {name + AGAIN: path for name, path in reversed(ours.items())}
    for name, make in (
        (STOCK, lambda directory: Stock(directory, False)),
        (QUORUM, lambda directory: Stock(directory, True)),
        *((name, lambda directory, path=path: Strata(directory, path)) for name, path in ours.items()),
    ):
        systems[name] = make(directory_for_postgres(root / re.sub(r"\W+", "-", name)))
        run([BIN / "pgbench", "-i", "-q", "-s", scale, systems[name].uri])
        sql(systems[name].uri, "create table one (a bigint generated always as identity, b int)")
    return systems


def commits(systems, root, rounds, seconds):
    insert = Path(root) / "insert.sql"
    insert.write_text("insert into one (b) values (1);\n")
    insert.chmod(0o644)
    workloads = {"single-row insert": ["-f", str(insert)], "TPC-B": ["-b", "tpcb-like"]}
    print(f"{'workload':<18} {'clients':>7}  {'system':<20} {'TPS':>9} {'latency ms':>11} {'/ (a)':>7} {'/ (b)':>7}")
    for workload, script in workloads.items():
        for clients in (1, 8, 32):
            results = {name.removesuffix(AGAIN): [] for name in systems}
            for _ in range(rounds):
                # In no fixed order: what runs after what was seen to be worth some percent.
                for name, system in random.sample(list(systems.items()), len(systems)):
                    results[name.removesuffix(AGAIN)].append(pgbench(system.uri, clients, seconds, script))
            median = {n: tuple(statistics.median(r[i] for r in rs) for i in (0, 1)) for n, rs in results.items()}
            a, b = median[STOCK][0], median[QUORUM][0]
            for name, (tps, latency) in median.items():
                print(
                    f"{workload:<18} {clients:>7}  {name:<20} {tps:>9.0f} {latency:>11.3f} {tps / a:>7.2f} {tps / b:>7.2f}",
                    flush=True,
                )


def bytes_of(systems, transactions):
    """What one TPC-B transaction costs on the wire, and what its WAL becomes in object storage."""
    lsn = lambda uri: int(sql(uri, "select pg_current_wal_lsn() - '0/0'"))
    rows = {}
    for name in (STOCK, OURS):
        uri = systems[name].uri
        sql(uri, "checkpoint")
        before = lsn(uri)
        sent = systems[name].sent() if name == OURS else 0
        run([BIN / "pgbench", "-n", "-c", 8, "-j", 2, "-t", transactions // 8, uri])
        wal = lsn(uri) - before
        sent = systems[name].sent() - sent if name == OURS else 3 * wal
        rows[name] = wal / transactions, sent / transactions
    print(f"{'TPC-B transaction':<24} {'WAL bytes':>10} {'sent to three':>14}")
    for name, (wal, sent) in rows.items():
        note = "" if name == OURS else "  (by pg_receivewal, without the protocol)"
        print(f"{name:<24} {wal:>10.0f} {sent:>14.0f}{note}")
    strata = systems[OURS]
    strata.cli("compact")
    status = json.loads(strata.cli("branch", "list", "--json"))
    end = next(row["last_record_lsn"] for row in status if row["name"] == "main")
    high, low = end.split("/")
    wal = (int(high, 16) << 32) + int(low, 16)
    layers, archive = strata.stored()
    print(
        f"object storage after {wal / 1e6:.0f} MB of WAL: {layers / 1e6:.0f} MB of layers "
        f"({layers / wal:.2f} a byte of WAL), {archive / 1e6:.0f} MB of archived WAL ({archive / wal:.2f})",
        flush=True,
    )


def starts(root, programs, scales):
    """Branch and compute start at several sizes, taking turns."""
    systems = {}
    try:
        for scale in scales:
            strata = Strata(directory_for_postgres(root / f"scale-{scale}"), programs)
            systems[scale] = strata, [], []
            run([BIN / "pgbench", "-i", "-q", "-s", scale, strata.uri])
            strata.cli("compact")
        for number in range(7):
            for strata, starts, branches in systems.values():
                began = time.perf_counter()
                strata.cli("branch", "create", f"b{number}")
                branches.append((time.perf_counter() - began) * 1000)
                began = time.perf_counter()
                row = json.loads(strata.cli("compute", "start", f"b{number}", "--json"))
                run(["psql", "-XAtq", row["uri"], "-c", "select count(*) from pgbench_branches"])
                starts.append((time.perf_counter() - began) * 1000)
                strata.cli("compute", "stop", f"b{number}", "--immediate")
        print(f"{'pgbench scale':<14} {'branch ms':>10} {'start to first query ms':>24}   (medians, worst in brackets)")
        for scale, (_, starts, branches) in systems.items():
            print(
                f"{scale:<14} {statistics.median(branches):>5.0f} [{max(branches):.0f}] "
                f"{statistics.median(starts):>14.0f} [{max(starts):.0f}]",
                flush=True,
            )
    finally:
        for strata, _, _ in systems.values():
            strata.stop()
