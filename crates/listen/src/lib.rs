//! The listening room: which addresses are listened on, who gets a place, and how long a client may take to say what it
//! wants; and how others are connected to. What is said is the service's, but for what HTTP answers to a request that is
//! none of its own.

mod address;
mod answer;
mod dial;
mod http;
mod port;
mod shares;
mod threads;

pub use address::{Advertised, Listening, loopback};
pub use answer::{Asked, Posted, Refusal, complete};
pub use dial::{dial, resolve};
pub use http::{PatientListener, PatientStream};
pub use port::Port;
pub use shares::{Place, Shares};
pub use threads::{GREETING, threads};
