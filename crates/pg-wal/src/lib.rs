//! PostgreSQL WAL decoding and encoding, versions 15-18.
