"""Writes docs/redo-coverage.md from the results of scripts/redo-coverage, to standard output.

Fails if a page differed or a record could not be replayed.
"""

import collections
import json
import pathlib
import sys

SUITES = {
    "workload": "`cli/tests/workload.sql`, row locks by several sessions, pgbench",
    "rare": "`cli/tests/rare.sql`, with restarts, a torn record and a promotion",
    "minimal": "indexes on relations that skip WAL (`wal_level=minimal`)",
    "regress": "the core regression suite of 15",
    "isolation": "the isolation suite of 15",
    "contrib": "the regression suites of 15's contrib modules",
}
# Where no image can tell: what holds a record's effect against PostgreSQL's.
STATE = "state: `followed_state_equals_a_stopped_cluster` compares files, byte for byte, with those of a stopped server"
LATER = "pages: those of later records are wrong if it is"
NOTHING = "none needed: it changes nothing that is kept"
ORACLES = {
    "CLOG": STATE,
    "CommitTs": STATE,
    "MultiXact": STATE,
    "RelMap": STATE,
    "Transaction": STATE,
    "XLOG": STATE,
    "Database": LATER,
    "Storage": LATER,
    "Tablespace": "test: `pageserver` and `tests` list the directories",
    "Standby": NOTHING,
    "LogicalMessage": NOTHING,
    "ReplicationOrigin": "test: base backups carry the origins' progress",
}
RECORD_ORACLES = {
    "Transaction/ASSIGNMENT": NOTHING,
    "Transaction/INVALIDATION": NOTHING,
    "XLOG/NOOP": NOTHING,
    "XLOG/SWITCH": "the records behind it are found",
    "XLOG/OVERWRITE_CONTRECORD": "the records behind it are found",
    "XLOG/RESTORE_POINT": NOTHING,
    "XLOG/BACKUP_END": LATER,
    "XLOG/FPI": "image: the record is nothing but the page; later records on it are compared",
    "XLOG/FPI_FOR_HINT": "image: the record is nothing but the page; later records on it are compared",
    "Heap/TRUNCATE": NOTHING,
    "Heap2/NEW_CID": NOTHING,
    "Heap2/REWRITE": NOTHING,
    "Btree/REUSE_PAGE": NOTHING,
    "Gist/PAGE_REUSE": NOTHING,
    "Gist/ASSIGN_LSN": NOTHING,
}
VERSIONS = (15, 16, 17, 18)


def oracle(record, counts):
    if record in RECORD_ORACLES:
        return RECORD_ORACLES[record]
    if counts["compared"]:
        return "image"
    if counts["restored"]:
        return "image: it always carries the whole page; later records on it are compared"
    return ORACLES.get(record.split("/")[0], "**none**")


def number(value):
    return f"{value:,}".replace(",", " ")


def cell(counts):
    if not counts or not (counts["records"] or counts["compared"]):
        return ""
    return f"{number(counts['records'])} / {number(counts['compared'])}"


def add(into, counts):
    for name in ("records", "compared", "restored", "mismatches"):
        into[name] += counts[name]


def runs_table(reports):
    print("| server | suite | records | pages compared | pages without a base | differ | not supported | record kinds |")
    print("|---|---|---|---|---|---|---|---|")
    for report in reports:
        values = [number(report[name]) for name in ("records", "pages_compared", "pages_without_base", "mismatches", "unsupported")]
        server = report["server"].removeprefix("postgres (PostgreSQL) ").split(" ")[0].rstrip(")")
        print(f"| {server} | {report['suite']} | {' | '.join(values)} | {len(report['by_record'])} |")


def main(work):
    reports = [json.loads(path.read_text()) for path in sorted(pathlib.Path(work).glob("*.json"))]
    order = list(SUITES)
    reports.sort(key=lambda report: (report["version"], order.index(report["suite"])))
    kinds = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
    branches = collections.defaultdict(lambda: collections.defaultdict(lambda: collections.defaultdict(collections.Counter)))
    for report in reports:
        for record, counts in report["by_record"].items():
            add(kinds[record][report["version"]], counts)
        for record, found in report["by_branch"].items():
            for branch, counts in found.items():
                add(branches[record][branch][report["version"]], counts)
    possible = {}
    for report in reports:
        possible[report["version"]] = set(report["kinds"])
    versions = [version for version in VERSIONS if version in possible]

    print("# Redo coverage\n")
    print("Written by `scripts/redo-coverage`; do not edit. How redo works and how to read a mismatch: [redo.md](redo.md).\n")
    print("WAL was made with `wal_consistency_checking=all` and `full_page_writes=off`, so that it holds every changed page")
    print("as PostgreSQL left it and no record hides behind a full-page image. `wal check-redo --strict` replayed it natively")
    print("and compared every page under PostgreSQL's masks; visibility maps and all-visible flags too, which PostgreSQL's own")
    print("check leaves out.\n")
    total = collections.Counter()
    for report in reports:
        for name in ("records", "pages_compared", "mismatches", "unsupported", "visibility_pending"):
            total[name] += report[name]
    print(f"**{number(total['records'])} records, {number(total['pages_compared'])} pages compared: {number(total['mismatches'])} differ, "
          f"{number(total['unsupported'])} records are not supported.** {number(total['visibility_pending'])} pages of visibility maps had bits that")
    print("PostgreSQL had cleared already for a record that came after: a backend clears them before it writes its record.\n")
    print("## Runs\n")
    runs_table(reports)
    print()
    for suite in SUITES:
        if any(report["suite"] == suite for report in reports):
            print(f"* **{suite}**: {SUITES[suite]}.")
    print("\nOn servers newer than 15 the suites of 15 print what their own would not, and tests of functions that are gone fail;")
    print("the WAL counts all the same.\n")
    differing = [(report, line) for report in reports for line in report["mismatch_list"] + report["unsupported_list"]]
    if differing:
        print("## What differs\n")
        for report, line in differing:
            print(f"* {report['server']}, {report['suite']}: {line}")
        print()

    print("## Records that no run met\n")
    print("| version | kinds | met | not met |")
    print("|---|---|---|---|")
    for version in versions:
        met = {record for record in kinds if version in kinds[record]}
        missing = sorted(possible[version] - met)
        count = len(possible[version])
        print(f"| {version} | {count} | {count - len(missing)} | {', '.join(missing) or 'none'} |")
    print("\n`XLOG/NOOP` is written by nothing in PostgreSQL (but by pgstrata). A kind with and without `+INIT` counts as two.\n")

    print("## Records\n")
    print("A kind's first row is all of it; the rows below are its branches: the blocks that the record refers to, by their ids")
    print("(`+init` rebuilt from zeros, `+image` restored), and the flags that are set. Cells are records / pages compared.\n")
    managers = sorted({record.split("/")[0] for record in kinds})
    for manager in managers:
        print(f"### {manager}\n")
        header = " | ".join(str(version) for version in versions)
        print(f"| record | {header} | oracle |")
        print("|---" * (len(versions) + 2) + "|")
        for record in sorted(record for record in kinds if record.split("/")[0] == manager):
            whole = collections.Counter()
            for version in versions:
                whole.update(kinds[record][version])
            cells = " | ".join(cell(kinds[record][version]) for version in versions)
            print(f"| **{record.split('/', 1)[1]}** | {cells} | {oracle(record, whole)} |")
            found = branches[record]
            if len(found) > 1 or (found and "" not in found):
                for branch in sorted(found):
                    cells = " | ".join(cell(found[branch][version]) for version in versions)
                    print(f"| {branch or 'nothing set'} | {cells} | |")
        print()
    return 1 if total["mismatches"] or total["unsupported"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
