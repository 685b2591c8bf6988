"""Commits of three zones that are far from each other, beside stock PostgreSQL whose receivers are in the same zones."""
import random, re, statistics, subprocess, time
from pathlib import Path

from .common import BIN, STARTED, as_user, directory_for_postgres, end, initdb, run
from .network import Network, lacks
from .tls import Services

ZONES = ("zone-a", "zone-b", "zone-c")
STOCK, OURS = "stock, ANY 2 of 3", "pgstrata, TLS"
# PostgreSQL flushes its WAL one at a time, and a flush of ours lasts until a quorum has answered: it is worth some waiting
# that one takes along what others are about to commit. A delay counts only from so many active transactions on, and stock
# PostgreSQL's flush is local: it gains nothing by it.
GATHERED, DELAY_US, SIBLINGS = "  commit_delay 3 ms", 3000, 5
# Between any two zones the round trip is 40 ms, and 1 % of packets are lost in each direction.
NEAR, FAR = (0, 0), (20, 1)
PORT = 5432
PATIENCE_S = 60


class Stock:
    """A stock server in the first zone, a synchronous receiver in each; any two make a commit."""

    def __init__(self, directory, network):
        self.directory, self.network, self.receivers = directory, network, []
        self.data, self.port = directory / "data", PORT
        STARTED.callback(self.stop)
        initdb(self.data)
        with open(self.data / "pg_hba.conf", "a") as allowed:
            allowed.write("host replication postgres 10.99.0.0/24 trust\n")
        options = f"-c port={PORT} -c listen_addresses=* -c unix_socket_directories= -c max_wal_size=4GB"
        options += " -c synchronous_commit=on -c synchronous_standby_names='ANY 2 (a,b,c)'"
        if self.control("-l", f"{self.data}.log", "-o", options, "start"):
            raise SystemExit(Path(f"{self.data}.log").read_text())
        for zone in ZONES:
            name = zone[-1]
            run(["mkdir", directory / name])
            target = f"host={ZONES[0]} port={PORT} user=postgres application_name={name}"
            command = [BIN / "pg_receivewal", "-D", directory / name, "--synchronous", "-d", target]
            log = open(directory / f"{name}.log", "a")
            self.receivers.append(subprocess.Popen(network.on(zone, as_user(command)), cwd="/", stderr=log))
        deadline = time.time() + PATIENCE_S
        while self.sql("select count(*) from pg_stat_replication where sync_state = 'quorum'") != "3":
            if time.time() > deadline:
                raise SystemExit("receivers do not come")
            time.sleep(0.1)

    def control(self, *arguments):
        command = [BIN / "pg_ctl", "-D", self.data, "-w", "-t", str(PATIENCE_S), *arguments]
        done = subprocess.run(self.network.on(ZONES[0], as_user(command)), cwd="/", stdout=subprocess.DEVNULL)
        return done.returncode

    def run(self, command):
        return self.network.run(ZONES[0], command)

    def sql(self, text):
        return self.run([*client("psql", self), "-XAtqc", text]).strip()

    def stop(self):
        if (self.data / "postmaster.pid").exists():
            self.control("-m", "immediate", "stop")
        for receiver in self.receivers:
            receiver.terminate()
            end(receiver)
        self.receivers = []


def client(program, system):
    return [BIN / program, "-h", "127.0.0.1", "-p", str(system.port), "-U", "postgres", "-d", "postgres"]


def percentile(values, percent):
    return values[min(len(values) - 1, len(values) * percent // 100)]


def measure(system, clients, seconds, script, options=""):
    """Transactions a second; their average, median and 99th percentile in ms."""
    logs = system.directory / "latency"
    directory_for_postgres(logs)
    command = ["env", f"PGOPTIONS={options}", *client("pgbench", system), "-n", "-c", str(clients), "-j", str(min(clients, 2))]
    text = system.run([*command, "-T", str(seconds), "-l", f"--log-prefix={logs}/t", *script])
    value = lambda key: float(re.search(rf"{key} = ([\d.]+)", text).group(1))
    latencies = []
    for log in logs.iterdir():
        latencies += [int(line.split()[2]) / 1000 for line in log.read_text().splitlines()]
        log.unlink()
    logs.rmdir()
    latencies.sort()
    return value("tps"), value("latency average"), percentile(latencies, 50), percentile(latencies, 99)


def rounds_of(systems, rounds, seconds, clients, script):
    """Medians of rounds of all systems."""
    runs = {STOCK: (systems[STOCK], ""), OURS: (systems[OURS], "")}
    if clients > SIBLINGS:
        runs[GATHERED] = systems[OURS], f"-c commit_delay={DELAY_US}"
    results = {name: [] for name in runs}
    for _ in range(rounds):
        for name, (system, options) in random.sample(list(runs.items()), len(runs)):
            results[name].append(measure(system, clients, seconds, script, options))
    return {name: [statistics.median(column) for column in zip(*rows)] for name, rows in results.items()}


def print_rows(what, median):
    for name, (tps, average, p50, p99) in median.items():
        latency = f"{average:>8.1f} {p50:>7.1f} {p99:>7.1f}"
        print(f"{what}  {name:<19} {tps:>6.0f} {latency} {tps / median[STOCK][0]:>8.2f}", flush=True)


def far(root, programs, quick):
    lacking = lacks(programs)
    if lacking:
        print(f"skipped: zones need {lacking}")
        return
    scale, rounds, seconds, settle = (2, 1, 2, 1) if quick else (20, 3, 8, 7)
    network = Network(directory_for_postgres(root / "network"), programs, ZONES)
    systems = {
        STOCK: Stock(directory_for_postgres(root / "far-stock"), network),
        OURS: Services(directory_for_postgres(root / "far-pgstrata"), programs, True, network),
    }
    for system in systems.values():
        system.run([*client("pgbench", system), "-i", "-q", "-s", str(scale)])
        system.sql("create table one (a bigint generated always as identity, b int)")
    insert = root / "insert-far.sql"
    insert.write_text("insert into one (b) values (1);\n")
    insert.chmod(0o644)
    workloads = {"single-row insert": ["-f", str(insert)], "TPC-B": ["-b", "tpcb-like"]}
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    print(f"far: a round trip of {2 * FAR[0]} ms, {FAR[1]} % of packets lost in each direction; TCP with {congestion}")
    print(f"{'zones':<5} {'workload':<18} {'clients':>7}  {'':<19} {'TPS':>6} {'mean ms':>8} {'p50':>7} {'p99':>7} {'/ stock':>8}")
    # Near, it is seen what everything but the distance takes: short rounds are enough.
    for zones, line, duration in (("near", NEAR, max(1, seconds // 4)), ("far", FAR, seconds)):
        network.set(*line)
        # TCP measures the way anew: some of its memory is of ten seconds.
        for system in systems.values():
            measure(system, 8, settle, workloads["TPC-B"])
        before = network.set(*line)
        for workload, script in workloads.items():
            for clients in (1, 8, 32):
                median = rounds_of(systems, rounds, duration, clients, script)
                print_rows(f"{zones:<5} {workload:<18} {clients:>7}", median)
        after = network.set(*line)
        frames = {name: after[name] - before[name] for name in after}
        print(
            f"{zones}: {frames['forwarded']} packets forwarded, of which {frames['late']} more than 1 ms late; "
            f"{frames['lost']} lost; {frames['dropped']} dropped by a full queue",
            flush=True,
        )
