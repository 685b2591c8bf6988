//! Who gave no answer lately. A machine that is gone, or cut off, refuses nothing: each question to it takes all of the patience
//! that there is for one, and a change of members asks several, for each timeline.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgstrata_ids::NodeId;

/// Longest wait for a member's answer: it may wait for object storage itself before it gives one.
pub const PATIENCE: Duration = Duration::from_secs(6);

/// The same for one that was silent lately: enough for one that is back.
const LITTLE_PATIENCE: Duration = Duration::from_millis(500);

/// After so long it is waited for again as if nothing had been.
const LATELY: Duration = Duration::from_secs(30);

/// See the module.
#[derive(Debug, Default)]
pub struct Silence(Mutex<BTreeMap<NodeId, Instant>>);

impl Silence {
    /// How long to wait for an answer of this one.
    pub fn patience(&self, node: NodeId) -> Duration {
        let mut silent = self.0.lock();
        silent.retain(|_, since| since.elapsed() < LATELY);
        match silent.contains_key(&node) {
            true => LITTLE_PATIENCE,
            false => PATIENCE,
        }
    }

    /// It has answered, or was waited for so long in vain. What it refuses at once costs nobody anything.
    pub fn note(&self, node: NodeId, answered: bool, waited: Duration) {
        let mut silent = self.0.lock();
        if answered {
            silent.remove(&node);
        } else if waited >= PATIENCE {
            silent.insert(node, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_silent_is_not_waited_for_as_long_again() {
        let silence = Silence::default();
        let (one, other) = (NodeId(1), NodeId(2));
        silence.note(one, false, Duration::from_millis(3));
        assert_eq!(silence.patience(one), PATIENCE, "it refused, and was not silent");
        silence.note(one, false, PATIENCE);
        assert_eq!(silence.patience(one), LITTLE_PATIENCE);
        assert_eq!(silence.patience(other), PATIENCE);
        let before = silence.0.lock()[&one];
        silence.note(one, false, LITTLE_PATIENCE);
        assert_eq!(silence.0.lock()[&one], before, "it is waited for again some time");
        *silence.0.lock().get_mut(&one).unwrap() -= LATELY;
        assert_eq!(silence.patience(one), PATIENCE);
        silence.note(one, false, PATIENCE);
        silence.note(one, true, Duration::ZERO);
        assert_eq!(silence.patience(one), PATIENCE);
    }
}
