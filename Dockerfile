# One image with every program of pgstrata and stock PostgreSQL 15.
FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
RUN cargo build --locked --release --package pgstrata-cli --package pgstrata-safekeeper --package pgstrata-pageserver \
    --package pgstrata-storage-broker --package pgstrata-compute-shim --package pgstrata-preload

FROM debian:bookworm-slim
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql-15 util-linux ca-certificates curl \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/safekeeper /src/target/release/pageserver \
     /src/target/release/storage-broker /src/target/release/compute-shim \
     /src/target/release/libpgstrata_preload.so /src/target/release/pgstrata /usr/local/bin/
ENV PGSTRATA_PG_BIN=/usr/lib/postgresql/15/bin
VOLUME /data
