//! Connecting to others: where a name is, and which of its addresses answers.

mod dial;
mod names;

pub use dial::{dial, dial_by, dial_to, host};
pub use names::{Names, look_up};
