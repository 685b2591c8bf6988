"""What certificates cost: a cluster whose services show them to each other, beside one on plain text, started alike."""
import json, os, random, re, shutil, statistics, subprocess, time
from pathlib import Path

from .commits import pgbench
from .common import BIN, STARTED, as_user, directory_for_postgres, end, free_port, run, sql

PLAIN, TLS = "plain text", "TLS"
AGAIN = " again"
# Clusters of the same programs differ by some percent, lastingly: each kind is there twice.
ORDER = (PLAIN, TLS, TLS + AGAIN, PLAIN + AGAIN)


class Services:
    """Services that are started one by one, as on several machines: all on loopback, or in the zones of a network, with
    one safekeeper in each and everything else in the first."""

    def __init__(self, directory, programs, secured, network=None):
        self.directory, self.programs, self.secured, self.network = directory, directory / "bin", secured, network
        self.children = {}
        STARTED.callback(self.stop)
        # Where PostgreSQL's user gets at them.
        self.programs.mkdir()
        self.programs.chmod(0o755)
        for name in ("compute-shim", "libpgstrata_preload.so", "pgstrata", "safekeeper", "pageserver", "storage-broker"):
            shutil.copy(programs / name, self.programs / name)
        self.tenant = os.urandom(16).hex()
        if secured:
            self.auth("init")
        broker = self.start("broker", "b", "storage-broker", "--listen", self.listen)
        scheme = "https" if secured else "http"
        self.broker = f"{scheme}://{self.name(broker['http'])}"
        common = ["--broker", self.broker, "--object-store", str(directory / "objects")]
        for number in ("1", "2", "3"):
            host = self.host("safekeeper", number)
            arguments = [*common, "--id", number, "--zone", host, *self.ports(host, "wal", "pg", "http")]
            self.start("safekeeper", number, "safekeeper", *arguments, own=True)
        arguments = [*common, *self.ports(self.host("pageserver", "p"), "pages", "pg", "http")]
        pageserver = self.start("pageserver", "p", "pageserver", *arguments, own=True)
        found = ["found", "--pageserver-http", self.name(pageserver["http"]), "--tenant", self.tenant]
        self.run([self.programs / "pgstrata", *found, *self.tls("admin", "me"), "--pg-bin", BIN])
        self.port = free_port()
        self.uri = f"postgresql://postgres@127.0.0.1:{self.port}/postgres"
        self.compute()

    def host(self, role, name):
        if not self.network:
            return "localhost"
        return self.network.zones[int(name) - 1 if role == "safekeeper" else 0]

    @property
    def listen(self):
        return "0.0.0.0:0" if self.network else "127.0.0.1:0"

    def ports(self, host, *ports):
        return [word for port in ports for word in (f"--listen-{port}", self.listen, f"--advertise-{port}", f"{host}:0")]

    def name(self, address):
        return address.replace(self.listen.removesuffix(":0"), self.host("", ""))

    def run(self, command):
        return self.network.run(self.host("", ""), command) if self.network else run(command)

    def sql(self, text):
        return self.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", self.uri, "-c", text]).strip()

    def on(self, host, command):
        return self.network.on(host, as_user(command)) if self.network else as_user(command)

    def auth(self, *arguments):
        command = [self.programs / "pgstrata", "auth", *arguments, "--dir", self.directory / "pki"]
        subprocess.run(as_user(command), check=True, capture_output=True, cwd="/")

    def tls(self, role, name):
        if not self.secured:
            return []
        self.auth("issue", "--role", role, "--name", name, "--host", self.host(role, name))
        return ["--tls", str(self.directory / "pki" / f"{role}-{name}")]

    def start(self, role, name, program, *arguments, own=False):
        command = [self.programs / program, *arguments, *self.tls(role, name)]
        if own:
            command += ["--dir", self.directory / f"{role}-{name}"]
        log = open(self.directory / f"{role}-{name}.log", "a")
        command = self.on(self.host(role, name), command)
        child = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, stderr=log, text=True)
        self.children[role + name] = child
        line = child.stdout.readline()
        if not line:
            raise SystemExit(f"{program} does not start: {Path(log.name).read_text()}")
        return json.loads(line)

    def compute(self):
        """A compute with nothing in its cache."""
        former = self.children.pop("compute" + self.tenant, None)
        if former:
            former.terminate()
            end(former)
        arguments = ["--branch", "main", "--port", str(self.port), "--safekeepers", "1,2,3", "--broker", self.broker]
        self.start("compute", self.tenant, "compute-shim", *arguments, "--pg-bin", str(BIN), own=True)
        deadline = time.time() + 60
        asks = self.on(self.host("", ""), ["psql", "-XAtq", self.uri, "-c", "select 1"])
        while subprocess.run(asks, capture_output=True, cwd="/").returncode:
            if time.time() > deadline:
                raise SystemExit("the compute does not serve")
            time.sleep(0.05)

    def stop(self):
        for child in reversed(self.children.values()):
            child.terminate()
            end(child)
        self.children = {}


def row(what, results, unit):
    """Medians, and the median of the ratios of what was measured in the same round: rounds differ more than kinds do."""
    median = {name: statistics.median(values) for name, values in results.items()}
    ratio = statistics.median(secured / plain for secured, plain in zip(results[TLS], results[PLAIN]))
    print(
        f"{what:<34} {median[PLAIN]:>10.0f} {median[TLS]:>10.0f} {unit:<7} TLS / plain {ratio:.3f}",
        flush=True,
    )


def rounds(systems, count, measure):
    results = {PLAIN: [], TLS: []}
    for _ in range(count):
        for name, system in random.sample(list(systems.items()), len(systems)):
            results[name.removesuffix(AGAIN)].append(measure(system))
    return results


def cold_scan(system):
    """Pages a second of a scan that finds nothing in any cache of the compute."""
    system.compute()
    pages = int(sql(system.uri, "select pg_relation_size('pgbench_accounts') / 8192"))
    began = time.perf_counter()
    sql(system.uri, "set max_parallel_workers_per_gather = 0; select count(*) from pgbench_accounts")
    return pages / (time.perf_counter() - began)


def cold_lookups(system, scale, count):
    """Look-ups a second by 8 sessions, most of which need a page that the compute lacks."""
    system.compute()
    command = [BIN / "pgbench", "-n", "-S", "-c", 8, "-j", 2, "-t", count // 8, "-s", scale, system.uri]
    return float(re.search(r"tps = ([\d.]+)", run(command)).group(1))


def tls(root, programs, quick):
    scale, count, seconds = (2, 1, 1) if quick else (20, 12, 2)
    systems = {}
    for name in ORDER:
        directory = directory_for_postgres(root / ("tls-" + re.sub(r"\W+", "-", name)))
        systems[name] = Services(directory, programs, name.startswith(TLS))
        run([BIN / "pgbench", "-i", "-q", "-s", scale, systems[name].uri])
        sql(systems[name].uri, "create table one (a bigint generated always as identity, b int)")
    insert = root / "insert-tls.sql"
    insert.write_text("insert into one (b) values (1);\n")
    insert.chmod(0o644)
    print(f"{'':<34} {PLAIN:>10} {TLS:>10}")
    for what, script in (("single-row insert", ["-f", insert]), ("TPC-B", ["-b", "tpcb-like"])):
        for clients in (1, 8):
            measure = lambda system: pgbench(system.uri, clients, seconds, script)[0]
            row(f"{what}, {clients} clients", rounds(systems, count, measure), "TPS")
    row("cold scan", rounds(systems, (count + 1) // 2, cold_scan), "pages/s")
    lookups = lambda system: cold_lookups(system, scale, 800 if quick else 16000)
    row("cold look-ups, 8 clients", rounds(systems, (count + 1) // 2, lookups), "TPS")
