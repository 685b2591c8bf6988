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
NOTHING = "none needed: it changes nothing that is kept"
STOPPED = "state: `followed_state_equals_a_stopped_cluster` compares `pg_control` with a stopped server's"
RECORD_ORACLES = {
    "XLOG/CHECKPOINT_SHUTDOWN": STOPPED,
    "XLOG/PARAMETER_CHANGE": STOPPED,
    "Transaction/ASSIGNMENT": NOTHING,
    "Transaction/INVALIDATION": NOTHING,
    "XLOG/NOOP": NOTHING,
    "XLOG/SWITCH": "none needed but that the records behind it are found, and they are",
    "XLOG/OVERWRITE_CONTRECORD": "none needed but that the records behind it are found, and they are",
    "XLOG/END_OF_RECOVERY": "the records behind it are found on the new timeline; its counters are in no comparison",
    "XLOG/RESTORE_POINT": NOTHING,
    "XLOG/BACKUP_END": NOTHING,
    "LogicalMessage/MESSAGE": NOTHING,
    "Standby/LOCK": NOTHING,
    "Standby/INVALIDATIONS": NOTHING,
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
KINDS = {
    "main": "main forks",
    "vm": "visibility maps",
    "init": "init forks",
    "pg_control": "`pg_control`: the fields that recovery determines",
    "replorigin_checkpoint": "progress of replication origins",
    "pg_twophase": "prepared transactions",
    "pg_filenode.map": "relation maps",
}


def oracle(record, counts, files):
    """What holds a record's effect against PostgreSQL's."""
    if record in RECORD_ORACLES:
        return RECORD_ORACLES[record]
    if counts["compared"]:
        return "image"
    if counts["restored"]:
        return "image: it always carries the whole page; later records on it are compared"
    found = files.get(record)
    if found:
        seen = ", ".join(f"{number(count)} on {version}" for version, count in sorted(found.items()))
        return f"files: {seen}"
    return "**none**"


def number(value):
    return f"{value:,}".replace(",", " ")


def cell(counts):
    if not counts or not (counts["records"] or counts["compared"]):
        return ""
    return f"{number(counts['records'])} / {number(counts['compared'])}"


def add(into, counts):
    for name in ("records", "compared", "restored", "mismatches"):
        into[name] += counts[name]


def server(report):
    return report["server"].removeprefix("postgres (PostgreSQL) ").split(" ")[0].rstrip(")")


def runs_table(reports):
    print("| server | suite | records | pages compared | pages without a base | differ | not supported | record kinds |")
    print("|---|---|---|---|---|---|---|---|")
    for report in reports:
        values = [number(report[name]) for name in ("records", "pages_compared", "pages_without_base", "mismatches", "unsupported")]
        print(f"| {server(report)} | {report['suite']} | {' | '.join(values)} | {len(report['by_record'])} |")


def files_section(reports):
    """The comparisons of base backups with what stock PostgreSQL recovered. Returns how many differences there are."""
    rows = [row for report in reports for row in report["lsns"]]
    differences = sum(len(row["differences"]) for row in rows)
    files, pages = (sum(row[name] for row in rows) for name in ("files", "pages"))
    print("## Files\n")
    print("What is not on pages has no images. `scripts/redo-files` runs a suite on a managed compute, and beside it what makes")
    print("records without images; then, at LSNs all over the run, a base backup from the page server is compared, file by file and")
    print("byte by byte, with what stock PostgreSQL recovers to that LSN. The masks are in the head of that script.\n")
    print(f"**{number(len(rows))} LSNs, {number(files)} files, {number(pages)} pages compared: {number(differences)} differences.**\n")
    print("| server | suite | records | LSNs | in mid-transaction | with prepared transactions | files | pages | differences | seed |")
    print("|---" * 10 + "|")
    for report in reports:
        lsns = report["lsns"]
        values = [report["records"], len(lsns)]
        values += [sum(row[name] > 0 for row in lsns) for name in ("transactions", "prepared")]
        values += [sum(row[name] for row in lsns) for name in ("files", "pages")]
        values.append(sum(len(row["differences"]) for row in lsns))
        print(f"| {server(report)} | {report['suite']} | {' | '.join(number(value) for value in values)} | {report['seed']} |")
    print()
    kinds = collections.defaultdict(lambda: [0, 0])
    for row in rows:
        for kind, (count, pages) in row["kinds"].items():
            kinds[kind][0] += count
            kinds[kind][1] += pages
    print("| what | files | pages |")
    print("|---|---|---|")
    for kind, (count, pages) in sorted(kinds.items()):
        print(f"| {KINDS.get(kind, f'`{kind}`')} | {number(count)} | {number(pages) if pages else ''} |")
    print()
    for report in reports:
        for row in report["lsns"]:
            for line in row["differences"]:
                print(f"* {server(report)}, {report['suite']}, {row['lsn']}: {line}")
    return differences


def main(work):
    paths = sorted(pathlib.Path(work).glob("*.json"))
    files_reports = [json.loads(path.read_text()) for path in paths if path.name.startswith("files-")]
    reports = [json.loads(path.read_text()) for path in paths if not path.name.startswith("files-")]
    order = list(SUITES)
    files_reports.sort(key=lambda report: (report["version"], order.index(report["suite"])))
    files = collections.defaultdict(collections.Counter)
    for report in files_reports:
        for record, count in report["by_record"].items():
            files[record][report["version"]] += count
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

    wrong_files = files_section(files_reports) if files_reports else 0
    print("## Records that no run met\n")
    print("| version | kinds | met | not met |")
    print("|---|---|---|---|")
    for version in versions:
        met = {record for record in kinds if version in kinds[record]}
        missing = sorted(possible[version] - met)
        count = len(possible[version])
        print(f"| {version} | {count} | {count - len(missing)} | {', '.join(missing) or 'none'} |")
    print("\n`XLOG/NOOP` is written by nothing in PostgreSQL (but by pgstrata). `Heap/HOT_UPDATE+INIT` can't be written: the page of a")
    print("HOT update has the old version too, and `+INIT` means that the new one is alone (`log_heap_update`). A kind with and")
    print("without `+INIT` counts as two.\n")

    print("## Records\n")
    print("A kind's first row is all of it; the rows below are its branches: the blocks that the record refers to, by their ids")
    print("(`+init` rebuilt from zeros, `+image` restored), and the flags that are set. Cells are records / pages compared. The oracle")
    print("is `image` where the page that PostgreSQL put into the record is compared; `files` where the record's effect is in the files")
    print("that are compared with stock recovery, with the number of such records in these runs before the last LSN.\n")
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
            print(f"| **{record.split('/', 1)[1]}** | {cells} | {oracle(record, whole, files)} |")
            found = branches[record]
            if len(found) > 1 or (found and "" not in found):
                for branch in sorted(found):
                    cells = " | ".join(cell(found[branch][version]) for version in versions)
                    print(f"| {branch or 'nothing set'} | {cells} | |")
        print()
    return 1 if total["mismatches"] or total["unsupported"] or wrong_files else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
