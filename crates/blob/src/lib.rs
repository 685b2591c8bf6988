//! Object storage: one interface over S3, a local directory and memory.
//!
//! Owns atomic whole-object writes, put-if-absent, compare-and-swap, and the retries that make
//! their outcomes unambiguous. Every write is durable when the call returns. Does not know what
//! the objects mean, nor when one may be deleted; but for one, which says whose a store is.

mod bucket;
pub mod claim;
mod durable;
mod environment;
mod error;
mod local;
mod location;
mod remote;
mod store;

pub use bucket::create_bucket;
pub use environment::hide_credentials;
pub use error::BlobError;
pub use local::open_regular;
pub use location::{Location, LocationError};
pub use store::{CasOutcome, Interceptor, ObjectInfo, PutOutcome, Store, Verdict, Version};
