"""WAL ingest and redo beside stock PostgreSQL's replay of the same bytes, each pinned to one core; page reads in process."""
import json, re, shutil, statistics, subprocess, tarfile, tempfile
from pathlib import Path

from .common import BIN, Server, directory_for_postgres, initdb, run, sql

ROOT = Path(__file__).resolve().parent.parent.parent

ONE_CORE = ("taskset", "-c", "0")
# Nothing may be slowed by checkpoints or by the disk: replay itself is what is compared.
QUIET = "-c fsync=off -c max_wal_size=200GB -c checkpoint_timeout=1d -c shared_buffers=1GB -c wal_keep_size=200GB"


class Recorded:
    """A cluster before some work, and the WAL of that work."""

    def __init__(self, root, name, before, work, full_page_writes, bin=BIN):
        self.name, self.bin = name, bin
        self.directory = directory_for_postgres(root / re.sub(r"\W+", "-", name))
        data, self.pristine = self.directory / "data", self.directory / "pristine"
        initdb(data, bin)
        if before:
            server = Server(data, QUIET, bin=bin)
            before(server.uri)
            server.stop("fast")
        self.tar = self.directory / "base.tar"
        with tarfile.open(self.tar, "w") as archive:
            archive.add(data, arcname=".", filter=lambda entry: None if "/pg_wal/0" in entry.name else entry)
        server = Server(data, f"{QUIET} -c full_page_writes={full_page_writes} -c autovacuum_naptime=5", bin=bin)
        try:
            # The page server starts at a whole segment.
            sql(server.uri, "select pg_switch_wal()")
            run(["cp", "-a", data, self.pristine])
            self.facts = work(server.uri)
        finally:
            server.stop()
        self.wal = self.directory / "wal"
        run(["mv", data / "pg_wal", self.wal])
        run(["rm", "-rf", data, self.pristine / "pg_wal", self.pristine / "postmaster.pid"])

    def stock_replay(self):
        """Seconds that a stock server's startup process takes, by its own words."""
        data = self.directory / "replay"
        run(["cp", "-a", self.pristine, data])
        run(["cp", "-a", self.wal, data / "pg_wal"])
        Path(f"{data}.log").unlink(missing_ok=True)
        server = Server(data, f"{QUIET} -c log_min_messages=log", prefix=ONE_CORE, bin=self.bin)
        server.stop()
        log = Path(f"{data}.log").read_text()
        run(["rm", "-rf", data])
        found = re.search(r"redo done at .* elapsed: ([\d.]+) s", log)
        if not found:
            raise SystemExit(f"stock replay of {self.name}: {log[-2000:]}")
        return float(found.group(1))

    def ours(self, program, mode, *arguments, pinned=True):
        command = [*(ONE_CORE if pinned else ()), program, mode, "--data", self.tar, "--wal", self.wal, *arguments]
        done = subprocess.run([str(part) for part in command], text=True, capture_output=True)
        if done.returncode:
            raise SystemExit(f"replay {mode} of {self.name}: {done.stderr.strip()}")
        return [json.loads(line) for line in done.stdout.splitlines()]

    def drop(self):
        shutil.rmtree(self.directory)


def pgbench(*arguments):
    return lambda uri: run([BIN / "pgbench", *arguments, uri])


def script(name, *arguments):
    """The directory that a script finds, or fetches first."""
    command = [ROOT / "scripts" / name, *map(str, arguments)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return Path(done.stdout.strip())


def regression_suite(uri):
    """The core regression suite of 15, on any version."""
    source = script("fetch-suite")
    port = uri.rsplit(":", 1)[1].split("/")[0]
    with tempfile.TemporaryDirectory(prefix="pgstrata-suite-") as place:
        Path(place).chmod(0o755)
        work = directory_for_postgres(Path(place) / "work")
        subprocess.run([ROOT / "scripts/run-suite", "regress", work, "127.0.0.1", port, source], check=True)


def tpcc(transactions, warehouses):
    """Loading, and a mix of transactions."""
    scripts = Path(__file__).parent / "tpcc"
    mix = (("order", 45), ("payment", 43), ("delivery", 4), ("read", 8))

    def load(uri):
        text = (scripts / "schema.sql").read_text()
        run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-v", f"W={warehouses}", uri], input=text)

    def work(uri):
        with tempfile.TemporaryDirectory(prefix="pgstrata-tpcc-") as place:
            Path(place).chmod(0o755)
            files = []
            for name, weight in mix:
                shutil.copy(scripts / f"{name}.sql", place)
                files += ["-f", f"{place}/{name}.sql@{weight}"]
            clients = ["-n", "-c", "8", "-j", "2", "-t", str(transactions // 8)]
            run([BIN / "pgbench", *clients, "-D", f"W={warehouses}", *files, uri])

    return load, work


def recordings(transactions, scale, bin=BIN):
    """Name, what is there before, the work, full_page_writes, the server's programs."""
    init = pgbench("-i", "-q", "-s", str(scale))
    load = pgbench("-n", "-c", "8", "-j", "2", "-t", str(transactions // 8))
    yield "pgbench, full_page_writes=off", init, load, "off", bin
    yield "pgbench, full_page_writes=on", init, load, "on", bin
    yield "pgbench -i", None, init, "on", bin


def redo_recordings(transactions, scale, versions):
    for version in versions:
        bin = BIN if version == 15 else script("fetch-postgres", version)
        for name, *recording in recordings(transactions, scale, bin):
            yield f"{version}, {name}", *recording
        yield f"{version}, TPC-C-like", *tpcc(transactions // 4, max(1, scale // 2)), "on", bin
        yield f"{version}, regression suite", None, regression_suite, "on", bin


HEAD = f"{'WAL of':<34} {'MB':>6} {'records':>9}  {'system':<20} {'MB/s':>7} {'records/s':>10} {'/ stock':>8}"


def print_rows(name, facts, stock, rows):
    for system, seconds in (("stock", stock), *rows):
        print(
            f"{name:<34} {facts['bytes'] / 1e6:>6.0f} {facts['records']:>9}  {system:<20} "
            f"{facts['bytes'] / 1e6 / seconds:>7.0f} {facts['records'] / seconds:>10.0f} {stock / seconds:>8.2f}",
            flush=True,
        )


def ingest(program, root, rounds, transactions, scale, others):
    """The page server's whole way into layers. `others` are other programs of ours, by name."""
    print(HEAD, flush=True)
    for name, *recording in recordings(transactions, scale):
        recorded = Recorded(root, name, *recording)
        stock, ours, theirs = [], [], {name: [] for name in others}
        for number in range(rounds):
            stock.append(recorded.stock_replay())
            # Who comes first is not always the same: it finds another disk.
            turns = [lambda: ours.append(recorded.ours(program, "ingest")[0])]
            for other, path in others.items():
                turns.append(
                    lambda other=other, path=path: theirs[other].append(recorded.ours(path, "ingest")[0]["seconds"])
                )
            for turn in turns[:: 1 if number % 2 else -1]:
                turn()
        seconds = statistics.median(one["seconds"] for one in ours)
        decode = recorded.ours(program, "decode")[0]["seconds"]
        rows = [("pgstrata ingest", seconds), ("  decode", decode)]
        rows += [(f"{other}: ingest", statistics.median(times)) for other, times in theirs.items()]
        print_rows(name, ours[0], statistics.median(stock), rows)
        recorded.drop()


def redo(program, root, rounds, transactions, scale, versions=(15, 17)):
    """Native redo into pages in memory, on one core; its parts, and all cores."""
    print(HEAD, flush=True)
    rebuilt = []
    for name, *recording in redo_recordings(transactions, scale, versions):
        recorded = Recorded(root, name, *recording)
        stock, ours = [], []
        for _ in range(rounds):
            stock.append(recorded.stock_replay())
            ours.append(recorded.ours(program, "redo"))
        rows = []
        for at, row in enumerate(ours[0][:4]):
            rows.append((row["what"], statistics.median(one[at]["seconds"] for one in ours)))
        # Pages are independent: as many threads as there are cores.
        parallel = recorded.ours(program, "redo", pinned=False)[4]
        rows.append((parallel["what"], parallel["seconds"]))
        print_rows(name, ours[0][0], statistics.median(stock), rows)
        rebuilt += [(name, row) for row in recorded.ours(program, "rebuild")]
        recorded.drop()
    print(f"\n{'a page from':<34} {'pieces':>7} {'pages':>8} {'p50 us':>8} {'p99 us':>8}")
    for name, row in rebuilt:
        print(f"{name:<34} {row['pieces']:>7} {row['pages']:>8} {row['p50_us']:>8.2f} {row['p99_us']:>8.2f}")


def make_pages(uri):
    """Tables whose pages have no, 10 and 100 changes since they were written whole."""
    paths = []
    for pieces in (0, 10, 100):
        table = f"pieces_{pieces}"
        sql(uri, f"create table {table} (a int, b int) with (fillfactor = 10, autovacuum_enabled = off)")
        # About 20 rows a page at this fill factor; then there is room for 100 new versions.
        sql(uri, f"insert into {table} select n, 0 from generate_series(0, 399999) n")
        sql(uri, f"alter table {table} set (fillfactor = 100)")
        for change in range(0, pieces, 10):
            half = f"(ctid::text::point)[1]::int % 2 = {change // 10 % 2}"
            sql(uri, f"update {table} set b = b + 1 where {half}")
        path = sql(uri, f"select pg_relation_filepath('{table}')").split("/")
        paths += ["--rel", f"{pieces}=1663/{path[1]}/{path[2]}"]
    return paths


def pages(program, root, others):
    recorded = Recorded(root, "pages", None, make_pages, "off")
    print(f"{'pieces a page':<14} {'from':<7} {'readers':>7} {'pages':>7} {'p50 us':>8} {'p99 us':>8} {'pages/s':>9}")
    for label, path in {"": program, **others}.items():
        for row in recorded.ours(path, "pages", *recorded.facts, pinned=False):
            print(
                f"{row['relation']:<14} {row['from']:<7} {row['readers']:>7} {row['pages']:>7} "
                f"{row['p50_us']:>8.1f} {row['p99_us']:>8.1f} {row['pages_per_s']:>9.0f}  {label}",
                flush=True,
            )
    recorded.drop()
