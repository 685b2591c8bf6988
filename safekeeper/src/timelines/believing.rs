//! Whose word on a timeline counts. Members that were given up may live on, and not have heard of it: what they count as committed
//! is not, after where the log parted, and nobody is to have it from them.

use pgstrata_format::quorum::{AllGivenUp, Quorum};
use pgstrata_ids::TimelineParameters;
use pgstrata_quorum::Configuration;

use super::Timelines;

/// See the module.
#[derive(Clone, Debug)]
pub struct Believed {
    /// Number of the newest configuration that is known here.
    own: u64,
    /// Who was given up; `None` if that can't be read now.
    given_up: Option<AllGivenUp>,
    /// Number of the configuration by which others began anew with what is archived; 0 if nobody did.
    restored: u64,
}

/// That number. Older releases wrote nothing else of those who were given up.
pub fn restored_by(decided: Option<&Quorum>) -> u64 {
    decided.and_then(|decided| decided.restored).map_or(0, |restored| restored.number)
}

impl Believed {
    /// By what is known here, and what is decided, as far as that can be read.
    pub fn new(own: u64, given_up: Option<AllGivenUp>, restored: u64) -> Believed {
        Believed { own, given_up, restored }
    }

    /// Whether who knows of this configuration, and of no later one, is believed. One that knows of no less than is known here was
    /// not given up before that; of another one it stands where it is decided.
    pub fn includes(&self, told: &Configuration) -> bool {
        let number = told.number();
        number >= self.own
            || (number >= self.restored
                && self.given_up.as_ref().is_some_and(|given_up| !given_up.includes(number)))
    }
}

impl Timelines {
    /// Who of those is believed that know of these configurations. Reads what is decided only if one of them knows less than is
    /// known here. For threads that may wait.
    pub fn believed<'a>(
        &self,
        parameters: &TimelineParameters,
        own: u64,
        told: impl IntoIterator<Item = &'a Configuration>,
    ) -> Believed {
        if told.into_iter().all(|told| told.number() >= own) {
            return Believed::new(own, None, 0);
        }
        let id = parameters.timeline;
        match self.context.decisions.read((parameters.tenant, id)) {
            // Of before there was anything to give up by.
            Ok(None) => Believed::new(own, Some(AllGivenUp::default()), 0),
            Ok(Some(decided)) => {
                let restored = restored_by(Some(&decided));
                Believed::new(own, Some(decided.given_up), restored)
            }
            Err(error) => {
                tracing::info!(timeline = %id, %error, "who knows less of the members is not believed");
                Believed::new(own, None, 0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_format::quorum::GivenUp;
    use pgstrata_ids::{Incarnation, Lsn, Member, NodeId};

    use super::*;

    #[test]
    fn who_was_given_up_and_may_not_know_it_is_not_believed() {
        let of = |number| {
            let member = Member { node: NodeId(1), incarnation: Incarnation([1; 16]) };
            Configuration::new(number, vec![member]).unwrap()
        };
        let point = GivenUp { number: 4, lsn: Lsn(100), last_record: None };
        let given_up = AllGivenUp::default().with(point);
        let includes = |own, given_up: Option<&AllGivenUp>, told: u64| {
            Believed::new(own, given_up.cloned(), 0).includes(&of(told))
        };
        // One that lags, and was not given up.
        assert!(includes(7, Some(&given_up), 4) && includes(7, Some(&given_up), 6));
        assert!(!includes(7, Some(&given_up), 3) && !includes(4, Some(&given_up), 3));
        assert!(includes(7, Some(&AllGivenUp::default()), 1));
        // This one is behind itself, and learns more first.
        assert!(includes(2, Some(&given_up), 3));
        // Where an older release wrote only that others began anew.
        let restored = |told| Believed::new(7, Some(AllGivenUp::default()), 4).includes(&of(told));
        assert!(restored(4) && !restored(3));
        // While it can't be read nobody is believed who knows less.
        assert!(includes(7, None, 7) && includes(7, None, 8) && !includes(7, None, 6));
    }
}
