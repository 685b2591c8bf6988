# One image with every program of pgstrata, and stock PostgreSQL 15 as Debian packages it.
#
#   docker build .                    compiles the programs
#   docker build --target local .     takes those of this machine, which is Debian 12: cargo build --release
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --package pgstrata-cli --package pgstrata-safekeeper --package pgstrata-pageserver \
    --package pgstrata-storage-broker --package pgstrata-compute-shim --package pgstrata-preload

FROM debian:bookworm-slim AS base
# Without a server of Debian's own: it would be made while PostgreSQL is installed.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      postgresql-common curl ca-certificates util-linux \
 && sed -i 's/^#\?create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-15 \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -o postgres -g postgres -m 700 /data /var/lib/postgresql/compute
COPY compose/certificates /usr/local/bin/
COPY compose/curlrc /etc/pgstrata/.curlrc
COPY compose/cluster.toml /etc/pgstrata/cluster.toml
ENV PGSTRATA_PG_BIN=/usr/lib/postgresql/15/bin CURL_HOME=/etc/pgstrata
# No service needs more rights than PostgreSQL has.
USER postgres

FROM base AS local
COPY target/release/safekeeper target/release/pageserver target/release/storage-broker target/release/compute-shim \
     target/release/libpgstrata_preload.so target/release/pgstrata /usr/local/bin/

FROM base
COPY --from=build /src/target/release/safekeeper /src/target/release/pageserver /src/target/release/storage-broker \
     /src/target/release/compute-shim /src/target/release/libpgstrata_preload.so /src/target/release/pgstrata \
     /usr/local/bin/
