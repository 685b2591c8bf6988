//! Limits on who connects to a port, and for how long: what a port needs to be safe from clients
//! that say nothing, or say it slowly. What is said on it is the service's.

mod http;
mod shares;

pub use http::{PatientListener, PatientStream};
pub use shares::{Place, Shares};
