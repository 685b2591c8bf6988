//! The listening room: which addresses are listened on, who gets a place, and how long a client may take to say what it
//! wants. What is said is the service's, but for what HTTP answers to a request that is none of its own.

mod address;
mod answer;
mod api;
mod http;
mod kinds;
mod log;
mod port;
mod shares;
mod threads;

pub use address::loopback;
pub use answer::{Asked, Placed, Posted, Refusal, complete};
pub use api::{Answers, Api, Documented, Operation, Takes};
pub use http::{PatientListener, PatientStream};
pub use kinds::{Alive, Document, Done, Metrics, Octets, Ready, Tar, alive};
pub use log::log;
pub use port::Port;
pub use shares::{Place, Shares};
pub use threads::{GREETING, threads};
