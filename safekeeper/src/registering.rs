//! Saying in object storage who this safekeeper is: before that it is made a member of nothing.
//!
//! It is tried until it succeeds. Why it does not is in the log, once for each reason, and in the status for as long as it lasts.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgstrata_format::registration::Registration;

use crate::decisions::Decisions;
use crate::timelines::Timelines;

/// Longest wait for object storage before the ready line.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum State {
    /// The first attempt is under way.
    Tries,
    /// The last attempt failed.
    Failed(String),
    /// It has.
    Done,
}

/// How far it is. Clones share that.
#[derive(Clone, Debug)]
pub struct Registering(Arc<Mutex<State>>);

impl Default for Registering {
    fn default() -> Registering {
        Registering(Arc::new(Mutex::new(State::Tries)))
    }
}

impl Registering {
    /// Why it has not registered yet; `None` once it has.
    pub fn error(&self) -> Option<String> {
        match &*self.0.lock() {
            State::Tries => Some("object storage has not answered yet".to_owned()),
            State::Failed(why) => Some(why.clone()),
            State::Done => None,
        }
    }

    fn note(&self, said: Result<(), String>) {
        let mut state = self.0.lock();
        match (&*state, &said) {
            (State::Failed(before), Err(why)) if before == why => {}
            (_, Err(error)) => {
                tracing::warn!(error, "can't register in the object store; it is tried again");
            }
            (State::Failed(_), Ok(())) => tracing::info!("registered in the object store"),
            (_, Ok(())) => {}
        }
        *state = said.map_or_else(State::Failed, |()| State::Done);
    }

    /// Before anybody hears that we are ready, but for an object store that doesn't answer. Then it is tried until it does; what
    /// was founded before works without.
    pub async fn begin(&self, decisions: Decisions, own: Registration, timelines: Arc<Timelines>) {
        let registering = self.clone();
        let undecided = timelines.undecided();
        let mut trying = tokio::spawn(async move {
            let say = async || {
                decisions.note_undecided(&undecided).await?;
                timelines.undecided_are_noted();
                decisions.register(&own).await
            };
            loop {
                registering.note(say().await);
                if registering.error().is_none() {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        // Or it goes on by itself.
        let _ = tokio::time::timeout(PATIENCE, &mut trying).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_it_has_not_registered_is_known_until_it_has() {
        let registering = Registering::default();
        assert!(registering.error().unwrap().contains("has not answered yet"));
        registering.note(Err("no space".to_owned()));
        assert_eq!(registering.clone().error().unwrap(), "no space");
        registering.note(Ok(()));
        assert_eq!(registering.error(), None);
    }
}
