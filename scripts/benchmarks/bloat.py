"""How a table and its indexes grow under updates when each start of a compute loses the free space map."""
import os, re
from pathlib import Path

from .commits import OURS, STOCK, Stock, Strata
from .common import BIN, directory_for_postgres, run, sql

TABLE = """
create table bloat (id int primary key, changed int, pad text) with (autovacuum_vacuum_scale_factor = 0.05);
create index bloat_changed on bloat (changed);
insert into bloat select n, n, repeat(md5(n::text), 8) from generate_series(1, {rows}) n;
vacuum analyze bloat;
"""
# Not a heap-only update: the indexed column changes. Some rows go, and as many come.
SCRIPT = r"""
\set id random(1, :rows)
\set other random(1, :rows)
update bloat set changed = changed + 1, pad = repeat(md5(random()::text), 8) where id = :id;
delete from bloat where id = :other;
insert into bloat values (:other, 0, repeat(md5(random()::text), 8)) on conflict do nothing;
"""


class Restarted:
    """One of the systems, restarted between rounds."""

    def __init__(self, name, root, programs, rows):
        directory = directory_for_postgres(root / ("bloat-" + re.sub(r"\W+", "-", name)))
        self.system = Stock(directory, False) if name == STOCK else Strata(directory, programs)
        settings = ["alter system set autovacuum_naptime = '1s'", "select pg_reload_conf()"]
        for statement in settings + TABLE.format(rows=rows).split(";\n"):
            sql(self.system.uri, statement)

    def restart(self):
        if isinstance(self.system, Strata):
            self.system.cli("compute", "stop", "main")
            self.system.uri = self.system.cli("up", "--pg-bin", str(BIN))
        else:
            server = self.system.server
            server.stop("fast")
            server.start()

    def sizes(self):
        row = sql(self.system.uri, "select pg_relation_size('bloat') || ' ' || pg_indexes_size('bloat')")
        return [int(size) / 1e6 for size in row.split()]


def bloat(root, programs, rounds, transactions, rows):
    script = Path(root) / "bloat.sql"
    script.write_text(SCRIPT)
    script.chmod(0o644)
    systems = {}
    try:
        for name in (STOCK, OURS):
            systems[name] = Restarted(name, root, programs, rows)
        print(f"{'restarts':<10} {'table MB, stock':>16} {'pgstrata':>9} {'indexes MB, stock':>18} {'pgstrata':>9}")
        for number in range(rounds + 1):
            (table, indexes), (our_table, our_indexes) = (systems[name].sizes() for name in (STOCK, OURS))
            print(f"{number:<10} {table:>16.1f} {our_table:>9.1f} {indexes:>18.1f} {our_indexes:>9.1f}", flush=True)
            if number < rounds:
                for system in systems.values():
                    system.restart()
                    clients = ["-n", "-c", "4", "-j", "2", "-t", str(transactions // 4), "-D", f"rows={rows}"]
                    # How long commits take is no matter here.
                    environment = {**os.environ, "PGOPTIONS": "-c synchronous_commit=off"}
                    run([BIN / "pgbench", *clients, "-f", script, system.system.uri], env=environment)
    finally:
        for system in systems.values():
            system.system.stop()
