//! Requests to the HTTP interfaces of our services: how they are made, and how a refusal is read.
//!
//! Blocking: whoever asks has a thread to wait on. A proxy that the environment names is for the object store, and never
//! used here.

mod agent;
mod bearer;
mod broker;
mod names;
mod shown;
mod tls;

pub use agent::{Access, Answer, Timing, accepted, agent, explained, refusal};
pub use bearer::Bearer;
pub use broker::{Broker, News};
pub use shown::certificate_of;
