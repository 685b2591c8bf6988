//! What a change of members says while it waits: at once of which branches no majority answers, and then how far it is, less and
//! less often.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pgstrata_wire::http::safekeeper::{Member, Quorum, Status};

use super::{Key, MOST_NAMED, TELL_EVERY};

/// Longest pause between two lines that tell how far it is: each is twice as long as the one before.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Says a line, unless this command has said it before: it looks again and again.
pub fn say_once(line: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(line.to_owned()) {
        eprintln!("pgstrata: {line}");
    }
}

/// Names of branches, as far as they are known.
pub type Names = BTreeMap<Key, String>;

/// What people call a timeline.
pub fn named(names: &Names, key: Key) -> String {
    match names.get(&key) {
        Some(name) => format!("branch '{name}'"),
        None => format!("timeline {}", key.1),
    }
}

/// How far the branches are that are changed, as it is told by whoever changes one of them.
pub struct Progress {
    names: Names,
    done: AtomicUsize,
    all: usize,
    /// When the next line is due, and how long the pause after it is.
    next: Mutex<(Instant, Duration)>,
}

impl Progress {
    /// That of so many branches, none of which is done.
    pub fn new(names: Names, all: usize) -> Progress {
        let next = Mutex::new((Instant::now() + TELL_EVERY, TELL_EVERY));
        Progress { names, done: AtomicUsize::new(0), all, next }
    }

    /// What people call a timeline.
    pub fn named(&self, key: Key) -> String {
        named(&self.names, key)
    }

    /// One more is done.
    pub fn add_done(&self) {
        self.done.fetch_add(1, Ordering::Relaxed);
    }

    /// How many are.
    pub fn done(&self) -> usize {
        self.done.load(Ordering::Relaxed)
    }

    /// Tells how far it is, if that is due: of one branch, whichever comes first.
    pub fn tell(&self, key: Key, why: &str) {
        if self.is_due(Instant::now()) {
            let (done, all) = (self.done(), self.all);
            eprintln!("pgstrata: {done} of {all} branches; {}: {why}", self.named(key));
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, pause) = *next;
        if now < at {
            return false;
        }
        let pause = (pause * 2).min(LONGEST_PAUSE);
        *next = (now + pause, pause);
        true
    }
}

/// Members that say nothing of a timeline, if so many that no majority is left of those who decide; else `None`.
pub fn silent_majority(key: Key, quorum: &Quorum, said: &[&Status]) -> Option<Vec<u64>> {
    let tells = |member: &Member| {
        let mut its = said.iter().filter(|status| status.id == member.id);
        its.any(|status| {
            status.incarnation == member.incarnation
                && status.timelines.iter().any(|one| (one.tenant_id, one.timeline_id) == key)
        })
    };
    let silent: Vec<u64> =
        quorum.members.iter().filter(|one| !tells(one)).map(|one| one.id).collect();
    (2 * (quorum.members.len() - silent.len()) <= quorum.members.len()).then_some(silent)
}

/// What is said of branches that no majority answers for, in as many lines as there are different ones of members. Each is named
/// with who is silent; and both ways out, since nobody but who reads it knows whether they come back.
pub fn stalled(names: &Names, branches: &[(Key, Vec<u64>, Vec<u64>)]) -> Vec<String> {
    let mut alike: BTreeMap<(&[u64], &[u64]), Vec<Key>> = BTreeMap::new();
    for (key, members, silent) in branches {
        alike.entry((members, silent)).or_default().push(*key);
    }
    let list = |ids: &[u64]| ids.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    let line = |((members, silent), keys): ((&[u64], &[u64]), Vec<Key>)| {
        let shown: Vec<String> =
            keys.iter().take(MOST_NAMED).map(|key| named(names, *key)).collect();
        let others = match keys.len() - shown.len() {
            0 => String::new(),
            count => format!(" and {count} more"),
        };
        // To be copied where it is one.
        let one = names.get(&keys[0]).filter(|_| keys.len() == 1);
        let branch = one.map_or("BRANCH", String::as_str);
        format!(
            "{}{others}: no majority of the members ({}) answers, without which nothing is committed or changed; silent: {}. Bring \
             them back ('pgstrata up' starts those of this machine), or, if they are gone for good, go on without them by 'pgstrata \
             quorum recover --branch {branch} --accept-loss'; without that flag it says what would be lost",
            shown.join(", "),
            list(members),
            list(silent)
        )
    };
    alike.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use pgstrata_ids::{TenantId, TimelineId};

    use super::*;

    fn key(n: u8) -> Key {
        (TenantId([1; 16]), TimelineId([n; 16]))
    }

    #[test]
    fn lines_become_rare_whoever_waits_and_however_long() {
        let progress = Progress::new(Names::new(), 100);
        let start = Instant::now();
        let lines = |seconds: u64| {
            let moments = (0..10 * seconds).map(|tenth| start + Duration::from_millis(100 * tenth));
            moments.filter(|now| progress.is_due(*now)).count()
        };
        let first = lines(120);
        assert!((3..=4).contains(&first), "{first}");
    }

    #[test]
    fn a_branch_is_told_of_by_name_once_with_both_ways_out() {
        let names: Names = (1..=6).map(|n| (key(n), format!("b{n}"))).collect();
        let silent = |n| (key(n), vec![1, 2, 3], vec![2, 3]);
        let lines = stalled(&names, &[silent(1)]);
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("branch 'b1': no majority"), "{lines:?}");
        assert!(lines[0].contains("(1, 2, 3)") && lines[0].contains("silent: 2, 3."), "{lines:?}");
        assert!(lines[0].contains("quorum recover --branch b1 --accept-loss"), "{lines:?}");
        let many: Vec<_> = (1..=5).map(silent).chain([(key(6), vec![1], vec![1])]).collect();
        let lines = stalled(&names, &many);
        assert_eq!(lines.len(), 2);
        assert!(
            lines[1].starts_with("branch 'b1', branch 'b2', branch 'b3' and 2 more: "),
            "{lines:?}"
        );
        assert!(
            lines[0].starts_with("branch 'b6': ") && lines[1].contains("--branch BRANCH"),
            "{lines:?}"
        );
    }
}
