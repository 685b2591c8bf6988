//! Mending a timeline whose segments are damaged: what is missing or wrong comes from other members or the archive.
//!
//! Why nothing that was acknowledged is lost by it, and nobody is elected who lacks it, is said in `docs/consensus.md`,
//! "A torn end, or damage, and how it is mended". In short: what is put in place is, byte for byte, what was there; or it is
//! shown that nobody depends on what was there.

use pgstrata_format::quorum::Quorum;
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

/// What is to become of a timeline whose WAL is damaged here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is mended.
    Mended,
    /// Others keep it, and have what is here: its files are removed, as those of one that is not damaged are.
    LetGo,
    /// Others went on without what is here, and may lack it: it is left as it is, whatever they say of it.
    Kept,
}

/// That, by the names of its files, its own configuration, and what is decided of its members, as far as that can be read.
pub fn fate(
    names: &[String],
    own: &Configuration,
    decided: Option<&Quorum>,
    member: Member,
) -> Fate {
    if names.iter().any(|name| name == KEEP) {
        return Fate::Kept;
    }
    if own.is_known() && !own.contains(member) {
        // Where others had gone on without its word it would have been kept before it took that.
        return Fate::LetGo;
    }
    let decided = decided.filter(|decided| decided.chain.newest().number() > own.number());
    match decided {
        Some(decided) if decided.went_on_without(own, member) => Fate::Kept,
        Some(Quorum { chain, .. }) if chain.began_without(own, member) => Fate::Kept,
        Some(Quorum { chain, .. }) if !chain.newest().contains(member) => {
            match chain.goes_on_from(own) && chain.shows_leaving(member) {
                true => Fate::LetGo,
                false => Fate::Kept,
            }
        }
        _ => Fate::Mended,
    }
}

#[cfg(test)]
mod tests {
    use pgstrata_format::quorum::GivenUp;
    use pgstrata_ids::{Incarnation, Lsn, NodeId};
    use pgstrata_quorum::Chain;
    use pgstrata_sim::wal::parameters;

    use super::*;

    fn member(node: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation([1; 16]) }
    }

    fn members(nodes: &[u64]) -> Vec<Member> {
        nodes.iter().map(|&node| member(node)).collect()
    }

    fn fate_of(names: &[&str], own: &Configuration, decided: Option<&Chain>) -> Fate {
        let names = names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let of = parameters(Lsn(1 << 24));
        let decided = decided.map(|chain| Quorum::founded(of, chain.clone()));
        fate(&names, own, decided.as_ref(), member(1))
    }

    #[test]
    fn what_is_kept_for_others_is_not_touched() {
        let of = |nodes: &[u64]| Configuration::new(7, members(nodes)).unwrap();
        let plain = ["control", "flushed"];
        assert_eq!(fate_of(&plain, &of(&[1, 2, 3]), None), Fate::Mended);
        assert_eq!(fate_of(&["control", KEEP], &of(&[1, 2, 3]), None), Fate::Kept);
        assert_eq!(fate_of(&["control", KEEP], &of(&[2, 3]), None), Fate::Kept);
        assert_eq!(fate_of(&plain, &of(&[2, 3]), None), Fate::LetGo);
    }

    #[test]
    fn what_others_took_over_is_let_go_also_where_that_was_not_heard_of() {
        let plain = ["control", "flushed"];
        let founded = Chain::found(members(&[1, 2, 3])).unwrap();
        let own = founded.newest().clone();
        assert_eq!(fate_of(&plain, &own, Some(&founded)), Fate::Mended);
        let joint = founded.change_to(members(&[2, 3, 4])).unwrap();
        assert_eq!(
            fate_of(&plain, &own, Some(&joint)),
            Fate::Mended,
            "it is needed until that ends"
        );
        let ended = joint.change_ended().unwrap();
        assert_eq!(fate_of(&plain, &own, Some(&ended)), Fate::LetGo);
        let back = ended.change_to(members(&[1, 2, 3])).unwrap();
        assert_eq!(fate_of(&plain, &own, Some(&back)), Fate::Mended, "a member again");
        // It took the end of the change before it was damaged: what it would be given again begins anew.
        assert_eq!(fate_of(&plain, ended.newest(), Some(&back)), Fate::LetGo);
        let without = founded.recovered(member(2), members(&[2])).unwrap();
        assert_eq!(fate_of(&plain, &own, Some(&without)), Fate::Kept, "nobody asked it");
        // Whatever they decide of it later, who never heard of it: that it is one of them, and that it leaves again.
        let joint = without.change_to(members(&[2, 1])).unwrap();
        let back = joint.change_ended().unwrap();
        let leaves = back.change_to(members(&[2, 3])).unwrap();
        for later in [&joint, &back, &leaves, &leaves.change_ended().unwrap()] {
            assert_eq!(fate_of(&plain, &own, Some(later)), Fate::Kept, "{later:?}");
        }
    }

    /// There are more changes since then than are remembered: that it was given up is written down elsewhere.
    #[test]
    fn what_was_given_up_long_ago_is_not_touched() {
        let founded = Chain::found(members(&[1, 2, 3])).unwrap();
        let mut chain = founded.recovered(member(2), members(&[2])).unwrap();
        let number = chain.newest().number();
        while !chain.configurations()[0].contains(member(1)) {
            chain = chain.change_to(members(&[2, 1])).unwrap().change_undone().unwrap();
        }
        chain = chain.change_to(members(&[2, 1])).unwrap().change_ended().unwrap();
        let mut decided = Quorum::founded(parameters(Lsn(1 << 24)), chain);
        let fate = |decided: &Quorum| {
            fate(&["control".to_owned()], founded.newest(), Some(decided), member(1))
        };
        assert_eq!(fate(&decided), Fate::Mended);
        decided.given_up =
            decided.given_up.with(GivenUp { number, lsn: Lsn(1 << 24), last_record: None });
        assert_eq!(fate(&decided), Fate::Kept);
    }
}
