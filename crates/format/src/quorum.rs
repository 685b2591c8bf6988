//! Who the members of a timeline's quorum are, and were: the object that decides it.
//!
//! A [document](crate::document) whose first line begins with "pgstrata-quorum ", at
//! `tenants/TENANT/timelines/TIMELINE/quorum`. It is created when the timeline is founded, and then advanced by
//! compare-and-swap only; what it says is decided the moment that the swap succeeds. With it comes what the timeline is, so
//! that a new member needs nobody's word for that either.
//!
//! ```text
//! {"tenant_id":"...","timeline_id":"...","system_id":"...","pg_version":18,"pg_timeline":1,"segment_size":16777216,
//!  "start_lsn":"0/1000000","ancestor_id":null,
//!  "configurations":[{"number":1,"members":[{"id":1,"incarnation":"..."}],"incoming":[]}]}
//! ```
//! The newest configurations are kept, oldest first ([`pgstrata_quorum::MAX_CHAIN`]). Where all members were lost, and new ones
//! went on with what is archived, `"restored"` says from where on, and by which configuration: `{"number":2,"lsn":"0/1234568"}`; and where some or all were given up, `"given_up"`
//! how far the archive was right then, for each time: `[{"number":2,"lsn":"0/1234568","last_record":"0/1234500"}]`. `"deleted":true` ends it all: nobody keeps the timeline from then on.

use pgstrata_ids::{Lsn, Member, NodeId, SystemId, TenantId, TimelineId, TimelineParameters};
use pgstrata_quorum::{Chain, Configuration};
use serde::{Deserialize, Serialize};

use crate::FormatError;
use crate::document::Kind;

const KIND: Kind = Kind {
    what: "timeline's quorum",
    prefix: "pgstrata-quorum ",
    version: 2,
    first_version: 1,
    sealed_from: 1,
};

/// For what has nothing that an older program would leave out.
const FIRST: Kind = Kind { version: 1, ..KIND };

/// Bytes of one, at most: 64 configurations of two groups of 15, of some 80 bytes each.
pub const LIMIT: u64 = 256 << 10;

/// A timeline and its members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quorum {
    /// What the timeline is.
    pub parameters: TimelineParameters,
    /// Who its members are, and were.
    pub chain: Chain,
    /// Whether it had been there before there was this object: its first members have copies, and one that has none has
    /// lost it.
    pub is_older: bool,
    /// All members were lost, and others were made members, who have what is archived; the last time that this happened.
    pub restored: Option<Restored>,
    /// What of the archive is not of the log that goes on, since those who wrote it were given up.
    pub given_up: AllGivenUp,
    /// The branch was deleted: its members remove what they have, and what is archived. It never comes back.
    pub is_deleted: bool,
}

/// New members went on with what is archived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Number of the configuration that they were made members by. Logs of before may have what they lack.
    pub number: u64,
    /// What was archived then goes at least this far: nobody who has nothing may begin with less.
    pub lsn: Lsn,
}

/// Members were given up when the archive had whole records up to there. What it has after that of them is not of the log that
/// goes on, and other WAL may be committed in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GivenUp {
    /// Number of the configuration that goes on without them: what they write has lower ones.
    pub number: u64,
    /// End of the last record that was whole there.
    pub lsn: Lsn,
    /// Where that record starts, if that is known.
    pub last_record: Option<Lsn>,
}

/// How often members may be given up of one timeline, where the log went on each time.
pub const MAX_GIVEN_UP: usize = 256;

/// Each time that members were given up, the first one first. One that says no more than a later one does is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllGivenUp(Vec<GivenUp>);

impl AllGivenUp {
    /// With one more, of a higher number.
    pub fn with(&self, next: GivenUp) -> AllGivenUp {
        let said = |one: &GivenUp| one.number < next.number && one.lsn < next.lsn;
        let mut all: Vec<GivenUp> = self.0.iter().copied().filter(said).collect();
        all.push(next);
        AllGivenUp(all)
    }

    /// How far WAL up to `end`, written by who knew of configuration `number`, is of the log that goes on, if not all of it is:
    /// as far as when that was first given up.
    pub fn denies(&self, number: u64, end: Lsn) -> Option<&GivenUp> {
        self.0.iter().find(|one| number < one.number).filter(|one| end > one.lsn)
    }

    /// Whether who knows of configuration `number` was given up himself, for all that is known here.
    pub fn includes(&self, number: u64) -> bool {
        self.0.last().is_some_and(|last| number < last.number)
    }

    /// The last time.
    pub fn last(&self) -> Option<&GivenUp> {
        self.0.last()
    }

    /// Whether nobody ever was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether there is no room for another one.
    pub fn is_full(&self) -> bool {
        self.0.len() >= MAX_GIVEN_UP
    }

    fn checked(all: Vec<GivenUp>) -> Result<AllGivenUp, FormatError> {
        let rise = |pair: &[GivenUp]| pair[0].number < pair[1].number && pair[0].lsn < pair[1].lsn;
        match all.len() <= MAX_GIVEN_UP && all.windows(2).all(rise) {
            true => Ok(AllGivenUp(all)),
            false => Err(corrupt("what was given up is out of order, or too much")),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Point {
    number: u64,
    lsn: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    last_record: Option<String>,
}

impl From<Restored> for Point {
    fn from(restored: Restored) -> Point {
        Point { number: restored.number, lsn: restored.lsn.to_string(), last_record: None }
    }
}

impl From<&GivenUp> for Point {
    fn from(point: &GivenUp) -> Point {
        Point {
            number: point.number,
            lsn: point.lsn.to_string(),
            last_record: point.last_record.map(|lsn| lsn.to_string()),
        }
    }
}

impl Point {
    fn read(&self) -> Result<GivenUp, FormatError> {
        Ok(GivenUp {
            number: self.number,
            lsn: parsed(&self.lsn)?,
            last_record: self.last_record.as_deref().map(parsed).transpose()?,
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Document {
    tenant_id: String,
    timeline_id: String,
    system_id: String,
    pg_version: u32,
    pg_timeline: u32,
    segment_size: u32,
    start_lsn: String,
    ancestor_id: Option<String>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    is_older: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    restored: Option<Point>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    given_up: Vec<Point>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    deleted: bool,
    configurations: Vec<Step>,
}

#[derive(Serialize, Deserialize)]
struct Step {
    number: u64,
    members: Vec<Named>,
    incoming: Vec<Named>,
}

#[derive(Serialize, Deserialize)]
struct Named {
    id: u64,
    incarnation: String,
}

impl Quorum {
    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let named = |group: &[Member]| {
            let named = |member: &Member| Named {
                id: member.node.0,
                incarnation: member.incarnation.to_string(),
            };
            group.iter().map(named).collect()
        };
        let step = |configuration: &Configuration| Step {
            number: configuration.number(),
            members: named(configuration.members()),
            incoming: named(configuration.incoming()),
        };
        let parameters = &self.parameters;
        let is_new = self.restored.is_some() || !self.given_up.is_empty() || self.is_deleted;
        let kind = if is_new { &KIND } else { &FIRST };
        kind.encode(&Document {
            tenant_id: parameters.tenant.to_string(),
            timeline_id: parameters.timeline.to_string(),
            system_id: parameters.system_id.to_string(),
            pg_version: parameters.pg_version,
            pg_timeline: parameters.pg_timeline,
            segment_size: parameters.segment_size,
            start_lsn: parameters.start_lsn.to_string(),
            ancestor_id: parameters.ancestor.map(|ancestor| ancestor.to_string()),
            is_older: self.is_older,
            restored: self.restored.map(Point::from),
            given_up: self.given_up.0.iter().map(Point::from).collect(),
            deleted: self.is_deleted,
            configurations: self.chain.configurations().iter().map(step).collect(),
        })
    }

    /// Reads the object's bytes.
    pub fn decode(bytes: &[u8]) -> Result<Quorum, FormatError> {
        let document: Document = KIND.decode(bytes)?;
        let ancestor = document.ancestor_id.as_deref().map(parsed).transpose()?;
        let parameters = TimelineParameters {
            tenant: parsed(&document.tenant_id)?,
            timeline: parsed(&document.timeline_id)?,
            system_id: SystemId(parsed(&document.system_id)?),
            pg_version: document.pg_version,
            pg_timeline: document.pg_timeline,
            segment_size: document.segment_size,
            start_lsn: parsed(&document.start_lsn)?,
            ancestor,
        };
        parameters.check_own().map_err(corrupt)?;
        let steps = document.configurations.iter().map(configuration);
        let chain = Chain::of(steps.collect::<Result<_, FormatError>>()?).map_err(corrupt)?;
        let restored = |point: Point| -> Result<Restored, FormatError> {
            Ok(Restored { number: point.number, lsn: parsed(&point.lsn)? })
        };
        let restored = document.restored.map(restored).transpose()?;
        let given_up = document.given_up.iter().map(Point::read);
        let given_up = AllGivenUp::checked(given_up.collect::<Result<_, FormatError>>()?)?;
        let (is_older, is_deleted) = (document.is_older, document.deleted);
        Ok(Quorum { parameters, chain, is_older, restored, given_up, is_deleted })
    }

    /// That of a timeline that was founded just now.
    pub fn founded(parameters: TimelineParameters, chain: Chain) -> Quorum {
        Quorum {
            parameters,
            chain,
            is_older: false,
            restored: None,
            given_up: AllGivenUp::default(),
            is_deleted: false,
        }
    }

    /// Whether members were given up since there was the configuration `own`, which is the newest that `member` knows, and it was
    /// none of those who went on: its log may have what was given up, also if it had left before that.
    pub fn went_on_without(&self, own: &Configuration, member: Member) -> bool {
        if self.restored.is_some_and(|restored| own.number() < restored.number) {
            // What was given up then is not written down by older versions.
            return true;
        }
        let Some(last) = self.given_up.last() else { return false };
        let went_on = self.chain.configurations().iter().find(|one| one.number() == last.number);
        own.number() < last.number && !went_on.is_some_and(|one| one.contains(member))
    }

    /// Where a timeline's object is.
    pub fn object_name(tenant: TenantId, timeline: TimelineId) -> String {
        format!("tenants/{tenant}/timelines/{timeline}/quorum")
    }
}

fn corrupt(error: impl std::fmt::Display) -> FormatError {
    FormatError::corrupt(KIND.what, error.to_string())
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, FormatError> {
    text.parse().map_err(corrupt)
}

fn configuration(step: &Step) -> Result<Configuration, FormatError> {
    let group = |named: &[Named]| -> Result<Vec<Member>, FormatError> {
        let member = |named: &Named| {
            Ok(Member { node: NodeId(named.id), incarnation: parsed(&named.incarnation)? })
        };
        named.iter().map(member).collect()
    };
    let (members, incoming) = (group(&step.members)?, group(&step.incoming)?);
    Configuration::joint(step.number, members, incoming).map_err(corrupt)
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::Incarnation;
    use pgstrata_quorum::{MAX_CHAIN, MAX_MEMBERS};
    use proptest::prelude::*;

    use super::*;

    fn group(nodes: impl IntoIterator<Item = u64>, life: u8) -> Vec<Member> {
        let member = |node| Member { node: NodeId(node), incarnation: Incarnation([life; 16]) };
        nodes.into_iter().map(member).collect()
    }

    fn quorum(chain: Chain) -> Quorum {
        let parameters = TimelineParameters {
            tenant: TenantId([1; 16]),
            timeline: TimelineId([2; 16]),
            system_id: SystemId(u64::MAX),
            pg_version: 18,
            pg_timeline: 1,
            segment_size: 16 << 20,
            start_lsn: Lsn(16 << 20),
            ancestor: Some(TimelineId([4; 16])),
        };
        Quorum::founded(parameters, chain)
    }

    fn changed() -> Quorum {
        let chain = Chain::found(group(1..=3, 5)).unwrap();
        quorum(chain.change_to(group([1, 2, 4], 5)).unwrap())
    }

    #[test]
    fn who_went_on_is_not_left_behind_and_who_knows_no_later_members_is() {
        let (two, others) = (group([2], 5)[0], group([1, 2], 5));
        let founded = Chain::found(group(1..=3, 5)).unwrap();
        let chain = founded.recovered(two, others.clone()).unwrap();
        let number = chain.newest().number();
        let point = GivenUp { number, lsn: Lsn(16 << 20), last_record: None };
        let mut decided = quorum(chain.change_ended().unwrap());
        decided.given_up = decided.given_up.with(point);
        let went_on_without = |decided: &Quorum, own: u64, node: u64| {
            let own = Configuration::new(own, group(1..=3, 5)).unwrap();
            decided.went_on_without(&own, group([node], 5)[0])
        };
        // Who was not asked, and who was never a member, or had left before: not who goes on.
        assert!(went_on_without(&decided, 1, 3) && went_on_without(&decided, 1, 4));
        assert!(!went_on_without(&decided, 1, 1) && !went_on_without(&decided, 1, 2));
        // Another directory of one that does is another member.
        assert!(decided.went_on_without(founded.newest(), group([1], 6)[0]));
        // Who knows of those members, or later ones, was not given up before.
        assert!(!went_on_without(&decided, number, 3) && !went_on_without(&decided, 9, 3));
        // Nobody was given up.
        assert!(!went_on_without(&quorum(founded.clone()), 1, 3));
        // Others began anew with what is archived: nobody of those before went on. Older versions wrote only that.
        let restored = founded.restored(group([4, 5, 6], 5)).unwrap();
        let number = restored.newest().number();
        let lsn = Lsn(16 << 20);
        let decided =
            Quorum { restored: Some(Restored { number, lsn }), ..quorum(restored.clone()) };
        assert!([1, 2, 3].iter().all(|&node| went_on_without(&decided, 1, node)));
        assert!(!went_on_without(&decided, number, 4));
        // So many changes ago that nothing shows who went on.
        let mut long = quorum(chain);
        long.given_up = long.given_up.with(point);
        while long.chain.configurations()[0].number() <= point.number {
            let next = match long.chain.newest().incoming().is_empty() {
                true => long.chain.change_to(group([1, 2, 4], 5)).unwrap(),
                false => long.chain.change_undone().unwrap(),
            };
            long.chain = next;
        }
        assert!(went_on_without(&long, 1, 1));
    }

    #[test]
    fn golden_bytes() {
        let text = String::from_utf8(changed().encode()).unwrap();
        let (line, document) = text.split_once('\n').unwrap();
        assert!(line.starts_with("pgstrata-quorum 1 "), "{line}");
        let deleted = Quorum { is_deleted: true, ..changed() }.encode();
        assert!(deleted.starts_with(b"pgstrata-quorum 2 "));
        let five = "05".repeat(16);
        let member = |node: u64| format!(r#"{{"id":{node},"incarnation":"{five}"}}"#);
        let old = format!("[{},{},{}]", member(1), member(2), member(3));
        let new = format!("[{},{},{}]", member(1), member(2), member(4));
        let expected = format!(
            r#"{{"tenant_id":"{}","timeline_id":"{}","system_id":"18446744073709551615","pg_version":18,"pg_timeline":1,"segment_size":16777216,"start_lsn":"0/1000000","ancestor_id":"{}","configurations":[{{"number":1,"members":{old},"incoming":[]}},{{"number":2,"members":{old},"incoming":{new}}}]}}"#,
            "01".repeat(16),
            "02".repeat(16),
            "04".repeat(16),
        );
        assert_eq!(document, expected);
    }

    #[test]
    fn round_trip_and_every_flipped_bit_is_found() {
        let bytes = changed().encode();
        assert_eq!(Quorum::decode(&bytes), Ok(changed()));
        let older = Quorum { is_older: true, ..changed() };
        assert_eq!(Quorum::decode(&older.encode()), Ok(older));
        let first = GivenUp { number: 2, lsn: Lsn(0x123_4568), last_record: Some(Lsn(0x123_4500)) };
        let given_up = AllGivenUp::default().with(first);
        let restored = Some(Restored { number: 2, lsn: Lsn(0x123_4560) });
        let restored = Quorum { restored, given_up: given_up.clone(), ..changed() };
        assert_eq!(Quorum::decode(&restored.encode()), Ok(restored));
        let given_up =
            given_up.with(GivenUp { number: 5, lsn: Lsn(0x123_4570), last_record: None });
        let twice = Quorum { given_up, ..changed() };
        assert_eq!(Quorum::decode(&twice.encode()), Ok(twice));
        let deleted = Quorum { is_deleted: true, ..changed() };
        assert_eq!(Quorum::decode(&deleted.encode()), Ok(deleted));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut broken = bytes.clone();
                broken[at] ^= 1 << bit;
                assert!(Quorum::decode(&broken).is_err(), "byte {at} bit {bit}");
            }
        }
    }

    #[test]
    fn what_who_was_given_up_archived_is_told_apart() {
        let point = |number: u64, lsn: u64| GivenUp { number, lsn: Lsn(lsn), last_record: None };
        let given_up = AllGivenUp::default().with(point(4, 100));
        let limit = |all: &AllGivenUp, number: u64, end: u64| {
            all.denies(number, Lsn(end)).map(|one| one.lsn.0)
        };
        assert_eq!((limit(&given_up, 3, 101), limit(&given_up, 3, 100)), (Some(100), None));
        assert_eq!((limit(&given_up, 4, 101), limit(&given_up, 5, 200)), (None, None));
        // Who was given up first stays so, whatever was given up since.
        let twice = given_up.with(point(7, 150));
        assert_eq!((limit(&twice, 3, 120), limit(&twice, 3, 200)), (Some(100), Some(100)));
        assert_eq!((limit(&twice, 4, 120), limit(&twice, 6, 200)), (None, Some(150)));
        assert!(twice.includes(6) && !twice.includes(7));
        // Less than what was known then: that is all that is right of either.
        let less = twice.with(point(9, 90));
        assert_eq!((limit(&less, 3, 95), limit(&less, 8, 95)), (Some(90), Some(90)));
        assert_eq!(less, AllGivenUp::default().with(point(9, 90)));
    }

    #[test]
    fn the_most_that_was_given_up_is_within_the_limit_too() {
        let mut all = AllGivenUp::default();
        for at in 1..=MAX_GIVEN_UP as u64 {
            assert!(!all.is_full());
            let lsn = Lsn(u64::MAX - 1000 + at);
            all = all.with(GivenUp { number: u64::MAX - 1000 + at, lsn, last_record: Some(lsn) });
        }
        assert!(all.is_full());
        let most = u64::MAX - MAX_MEMBERS as u64..u64::MAX;
        let mut chain = Chain::found(group(most.clone(), 0)).unwrap();
        for life in 1..MAX_CHAIN as u8 {
            chain = chain.change_to(group(most.clone(), life)).unwrap().change_ended().unwrap();
        }
        let longest = Quorum { given_up: all, ..quorum(chain) };
        assert!(longest.encode().len() as u64 <= LIMIT, "{}", longest.encode().len());
        assert_eq!(Quorum::decode(&longest.encode()), Ok(longest));
    }

    #[test]
    fn the_longest_is_within_the_limit() {
        let most = u64::MAX - MAX_MEMBERS as u64..u64::MAX;
        let mut chain = Chain::found(group(most.clone(), 0)).unwrap();
        for life in 1..MAX_CHAIN as u8 {
            chain = chain.change_to(group(most.clone(), life)).unwrap().change_ended().unwrap();
        }
        let longest = quorum(chain).encode();
        assert!(longest.len() as u64 <= LIMIT, "{}", longest.len());
        assert!(Quorum::decode(&longest).is_ok());
    }

    #[test]
    fn what_is_no_chain_is_refused() {
        let member = r#"{"id":1,"incarnation":"05050505050505050505050505050505"}"#;
        for configurations in [
            "[]".to_owned(),
            r#"[{"number":1,"members":[],"incoming":[]}]"#.to_owned(),
            format!(r#"[{{"number":0,"members":[{member}],"incoming":[]}}]"#),
            format!(r#"[{{"number":1,"members":[{member},{member}],"incoming":[]}}]"#),
            format!(
                r#"[{{"number":1,"members":[{member}],"incoming":[]}},{{"number":3,"members":[{member}],"incoming":[]}}]"#
            ),
            r#"[{"number":1,"members":[{"id":1,"incarnation":"5"}],"incoming":[]}]"#.to_owned(),
        ] {
            let mut document: serde_json::Value = {
                let bytes = changed().encode();
                let at = bytes.iter().position(|&byte| byte == b'\n').unwrap();
                serde_json::from_slice(&bytes[at..]).unwrap()
            };
            document["configurations"] = serde_json::from_str(&configurations).unwrap();
            let error = Quorum::decode(&KIND.encode(&document)).unwrap_err().to_string();
            assert!(error.contains("timeline's quorum"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Quorum::decode(&bytes);
            let _ = Quorum::decode(&[&KIND.encode(&1)[..20], &bytes].concat());
        }
    }
}
