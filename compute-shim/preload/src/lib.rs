//! The library preloaded into PostgreSQL.
