//! The listening room: which addresses are listened on, who gets a place, and how long a client may take to say what it
//! wants. What is said is the service's, but for what HTTP answers to a request that is
//! none of its own.

mod address;
mod answer;
mod api;
mod asynchronous;
mod descriptors;
mod http;
mod kinds;
mod log;
mod peer;
mod port;
mod postgres;
mod security;
mod shares;
mod sparing;
mod threads;
mod who;

pub use address::{Advertised, Listening, address};
pub use answer::{Asked, Placed, Posted, Refusal, complete};
pub use api::{Answers, Api, Documented, Operation, Takes};
pub use asynchronous::AsyncStream;
pub use descriptors::{places, raise_descriptor_limit};
pub use http::{HttpLimits, serve_http};
pub use kinds::{Alive, Document, Done, Metrics, Octets, Ready, Tar, alive};
pub use log::log;
pub use peer::{Deed, Forbidden, Peer};
pub use port::Port;
pub use postgres::{Opened, open};
pub use security::{Security, SecurityArguments, peer_of};
pub use shares::{Place, Shares};
pub use sparing::Sparing;
pub use threads::{GREETING, certified, postgres, threads};
pub use who::{Need, Who};
