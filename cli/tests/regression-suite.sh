#!/bin/bash
# Checks native redo and the dump on the WAL of PostgreSQL's own regression suite (about 2 million records).
#
#   cli/tests/regression-suite.sh SOURCE [WORK]
#
# SOURCE is an unpacked and configured PostgreSQL source tree of the installed version, in which `make -C
# src/test/regress` was run. On Debian: `apt-get source postgresql-15` (needs a deb-src line), `./configure
# --without-icu --without-readline --without-zlib`. WORK is a directory for the cluster (default: a temporary one);
# the WAL takes 4 GB with lz4. PGSTRATA_PG_BIN names another server than Debian's 15. As root, the server runs as
# user postgres.
set -euo pipefail
bin=${PGSTRATA_PG_BIN:-/usr/lib/postgresql/15/bin}
source=$(realpath "$1")
work=$(realpath -m "${2:-$(mktemp -d)}")
cd "$(dirname "$0")/../.."
cargo build --release --package pgstrata-cli --example wal_offline
check=$PWD/target/release/examples/wal_offline

mkdir -p "$work"
as=()
if [ "$(id -u)" = 0 ]; then
    chown postgres "$work" && chmod 755 "$work"
    chown -R postgres "$source/src/test/regress"
    as=(setpriv --reuid=postgres --regid=postgres --clear-groups)
fi
cd "$work"
"${as[@]}" "$bin/initdb" -D "$work/data" -U postgres -A trust --no-sync > /dev/null
cat >> "$work/data/postgresql.conf" <<C
listen_addresses = ''
unix_socket_directories = '$work'
fsync = off
full_page_writes = off
wal_consistency_checking = 'all'
wal_compression = lz4
max_wal_size = 50GB
wal_keep_size = 50GB
max_prepared_transactions = 10
C
cp -a "$work/data" "$work/base"
"${as[@]}" "$bin/pg_ctl" -D "$work/data" -l "$work/log" -w start > /dev/null
trap '"${as[@]}" "$bin/pg_ctl" -D "$work/data" -m immediate stop > /dev/null 2>&1 || true' EXIT
cd "$source/src/test/regress"
"${as[@]}" env PGUSER=postgres ./pg_regress --bindir="$bin" --dlpath=. --inputdir=. --outputdir="$work" \
    --host="$work" --schedule=./parallel_schedule --max-concurrent-tests=20
"${as[@]}" "$bin/pg_ctl" -D "$work/data" -m fast -w stop > /dev/null
trap - EXIT

first=$("$check" dump --wal "$work/data/pg_wal" | sed -n '1s/ .*//p')
"$check" dump --wal "$work/data/pg_wal" |
    awk '{ split($1, p, "/"); printf "%s/%08s %s %s\n", p[1], p[2], $6, $8 }' | sed 's|/ *|/|g' > "$work/ours"
# It fails at the end of the WAL, as it does for every live log.
{ "$bin/pg_waldump" -p "$work/data/pg_wal" -s "$first" 2> /dev/null || true; } |
    sed -E 's|^rmgr: .* len \(rec/tot\): *([0-9]+)/ *([0-9]+), tx: *([0-9]+), lsn: ([0-9A-F]+/[0-9A-F]+), .*|\4 \3 \1/\2|' \
    > "$work/theirs"
# Both as position, transaction, lengths; positions without leading zeros.
cmp <(sed -E 's|/0+|/|' "$work/ours") <(sed -E 's|/0+|/|' "$work/theirs")
echo "dump: $(wc -l < "$work/ours") records as pg_waldump has them"
"$check" check-redo --data "$work/base" --wal "$work/data/pg_wal"
