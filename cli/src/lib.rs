//! What the `pgstrata` command is made of, as far as it needs no running service.

pub mod wal_offline;
