//! What lies on disk and in object storage: one file per kind.
