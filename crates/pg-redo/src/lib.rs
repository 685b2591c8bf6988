//! Native redo of PostgreSQL WAL records on pages.
