//! Mending a timeline whose segments are damaged: what is missing or wrong comes from other members or the archive.
//!
//! Why nothing that was acknowledged is lost by it, and nobody is elected who lacks it, is said in `docs/consensus.md`,
//! "A torn end, or damage, and how it is mended". In short: what is put in place is, byte for byte, what was there; or it is
//! shown that nobody depends on what was there.

use pgstrata_ids::Member;
use pgstrata_quorum::Configuration;

use crate::timeline::KEEP;

pub mod check;
mod log;
mod relief;
mod sources;

pub use log::{DamagedLog, Lack, Mended};
pub use relief::relieves;
pub use sources::{Said, Source, Sources};

/// Whether a timeline's log may be changed to mend it: not one that is kept for what others lack, whatever they say of it, nor
/// one of which others are the members by now. An error says why, for people.
pub fn may_be_mended(
    names: &[String],
    configuration: &Configuration,
    own: Member,
) -> Result<(), String> {
    if names.iter().any(|name| name == KEEP) {
        return Err("the members of this timeline went on without this safekeeper, which may have what they lack, and its WAL \
                    is damaged here: it is left as it is"
            .to_owned());
    }
    if configuration.is_known() && !configuration.contains(own) {
        return Err("other safekeepers keep this timeline by now, and its WAL is damaged here: what is here is of no \
                    further use, if they lack nothing"
            .to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{Incarnation, NodeId};

    use super::*;

    #[test]
    fn what_is_kept_for_others_is_not_touched() {
        let member = |node: u64| Member { node: NodeId(node), incarnation: Incarnation([1; 16]) };
        let of = |nodes: &[u64]| {
            Configuration::new(7, nodes.iter().map(|&node| member(node)).collect()).unwrap()
        };
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let plain = names(&["control", "flushed"]);
        assert_eq!(may_be_mended(&plain, &of(&[1, 2, 3]), member(1)), Ok(()));
        let kept = names(&["control", KEEP]);
        assert!(may_be_mended(&kept, &of(&[1, 2, 3]), member(1)).is_err());
        assert!(may_be_mended(&plain, &of(&[2, 3]), member(1)).is_err());
    }
}
