//! Taking what was decided of a timeline's members.

use pgstrata_quorum::{Chain, Refusal};
use pgstrata_wire::safekeeper::{Message, RefusedReason};

use super::Timeline;
use crate::storage_error::StorageError;

fn failed(error: StorageError) -> RefusedReason {
    RefusedReason::Storage(error.to_string())
}

impl Timeline {
    /// Whether this log may go on by these decisions. One that others went on without is kept from now on, durably.
    pub fn admit_decision(&self, decided: &Chain) -> Result<(), RefusedReason> {
        let own = self.configuration();
        if !decided.goes_on_from(&own) {
            let number = own.number();
            return Err(RefusedReason::Quorum(Refusal::OtherMembers { number }));
        }
        // One that was never told who they are was not asked either when they began anew, or changed so often.
        let unasked = !own.is_known() && !decided.begins_with_the_first();
        let went_on = unasked || decided.began_without(&own, self.own);
        if decided.newest().contains(self.own) {
            return self.refuse_given_up(went_on);
        }
        if went_on || !decided.shows_leaving(self.own) {
            // Others went on without its word, and may lack what it has.
            self.keep().map_err(failed)?;
        }
        Ok(())
    }

    /// Takes the newest of decisions that were admitted, durably on return.
    pub fn follow_decision(&self, decided: &Chain) -> Result<(), RefusedReason> {
        match self.configure(decided.newest()) {
            Ok(None) => Ok(()),
            Ok(Some(Message::Refused(reason))) => Err(reason),
            Ok(Some(_)) => Err(RefusedReason::Storage("a configuration was answered".into())),
            Err(error) => Err(failed(error)),
        }
    }

    /// Refuses to be a member again with a log that others went on without: it may have what was given up.
    fn refuse_given_up(&self, went_on: bool) -> Result<(), RefusedReason> {
        if went_on {
            // Also if it is no member later.
            self.keep().map_err(failed)?;
        } else if !self.is_kept().map_err(failed)? {
            return Ok(());
        }
        let text = "the members of this timeline went on without this safekeeper, which may have what they lack: it \
                    becomes a member again only with a new directory";
        Err(RefusedReason::Storage(text.into()))
    }
}
