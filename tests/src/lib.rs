//! End-to-end tests with real PostgreSQL.
