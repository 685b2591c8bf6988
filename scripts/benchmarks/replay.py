"""WAL ingest and redo beside stock PostgreSQL's replay of the same bytes, each pinned to one core; page reads in process."""
import json, re, shutil, statistics, subprocess, tarfile
from pathlib import Path

from .common import BIN, Server, directory_for_postgres, initdb, run, sql

ONE_CORE = ("taskset", "-c", "0")
# Nothing may be slowed by checkpoints or by the disk: replay itself is what is compared.
QUIET = "-c fsync=off -c max_wal_size=200GB -c checkpoint_timeout=1d -c shared_buffers=1GB -c wal_keep_size=200GB"


class Recorded:
    """A cluster before some work, and the WAL of that work."""

    def __init__(self, root, name, before, work, full_page_writes):
        self.name = name
        self.directory = directory_for_postgres(root / re.sub(r"\W+", "-", name))
        data, self.pristine = self.directory / "data", self.directory / "pristine"
        initdb(data)
        if before:
            server = Server(data, QUIET)
            before(server.uri)
            server.stop("fast")
        self.tar = self.directory / "base.tar"
        with tarfile.open(self.tar, "w") as archive:
            archive.add(data, arcname=".", filter=lambda entry: None if "/pg_wal/0" in entry.name else entry)
        server = Server(data, f"{QUIET} -c full_page_writes={full_page_writes} -c autovacuum_naptime=5")
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
        server = Server(data, f"{QUIET} -c log_min_messages=log", prefix=ONE_CORE)
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


def recordings(transactions, scale):
    init = pgbench("-i", "-q", "-s", str(scale))
    load = pgbench("-n", "-c", "8", "-j", "2", "-t", str(transactions // 8))
    yield "pgbench, full_page_writes=off", init, load, "off"
    yield "pgbench, full_page_writes=on", init, load, "on"
    yield "pgbench -i", None, init, "on"


def ingest(program, root, rounds, transactions, scale):
    head = f"{'WAL of':<30} {'MB':>6} {'records':>9}  {'system':<20} {'MB/s':>7} {'records/s':>10} {'/ stock':>8}"
    print(head, flush=True)
    for name, before, work, writes in recordings(transactions, scale):
        recorded = Recorded(root, name, before, work, writes)
        stock, ours = [], []
        for _ in range(rounds):
            stock.append(recorded.stock_replay())
            ours.append(recorded.ours(program, "ingest")[0])
        facts = ours[0]
        decode = recorded.ours(program, "decode")[0]["seconds"]
        theirs = statistics.median(stock)
        # Redo into pages in memory: of WAL as it comes, and of its last part alone, on one core and on all.
        redo = [recorded.ours(program, "redo") for _ in range(rounds)]
        redo_rows = []
        for at, row in enumerate(redo[0][:3]):
            redo_rows.append((row["what"], statistics.median(one[at]["seconds"] for one in redo)))
        parallel = recorded.ours(program, "redo", pinned=False)[3]
        for system, seconds in (
            ("stock", theirs),
            ("pgstrata ingest", statistics.median(one["seconds"] for one in ours)),
            ("  decode", decode),
            *((f"  {what}", seconds) for what, seconds in redo_rows),
            (f"  {parallel['what']}", parallel["seconds"]),
        ):
            print(
                f"{name:<30} {facts['bytes'] / 1e6:>6.0f} {facts['records']:>9}  {system:<20} "
                f"{facts['bytes'] / 1e6 / seconds:>7.0f} {facts['records'] / seconds:>10.0f} {theirs / seconds:>8.2f}",
                flush=True,
            )
        recorded.drop()


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


def pages(program, root):
    recorded = Recorded(root, "pages", None, make_pages, "off")
    print(f"{'pieces a page':<14} {'from':<7} {'readers':>7} {'pages':>7} {'p50 us':>8} {'p99 us':>8} {'pages/s':>9}")
    for row in recorded.ours(program, "pages", *recorded.facts, pinned=False):
        print(
            f"{row['relation']:<14} {row['from']:<7} {row['readers']:>7} {row['pages']:>7} "
            f"{row['p50_us']:>8.1f} {row['p99_us']:>8.1f} {row['pages_per_s']:>9.0f}",
            flush=True,
        )
    recorded.drop()
