//! What the page server answers: pages over its own protocol, everything else over HTTP, base
//! backups over PostgreSQL's protocol.

mod backup;
pub mod http;
pub mod pages;
pub mod pg;
mod protocol;
pub mod service;
pub mod sizes;
