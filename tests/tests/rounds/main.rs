//! Rounds of bad nights: in each, some of the machines of a cluster die, stand still, are cut off or lose their disks, under
//! load. What a client was told is committed is there afterwards, and all copies of the WAL are the same at the end.

#![allow(clippy::unwrap_used)]

mod watch;

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use pgstrata_tests::cuts::{self, Cuts, Party, Way};
use pgstrata_tests::other_s3::OtherS3;
use pgstrata_tests::{Cluster, S3_ENVIRONMENT, signal, thorough, wait_gone};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;
use watch::{Checker, compare_copies};

/// Rounds after which everything that was ever told is looked for, not only what is new.
const CHECK_ALL_EVERY: u32 = 25;

/// What goes wrong in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Trouble {
    /// A minority loses its disk, and is replaced.
    Wiped,
    /// All processes of the cluster are killed at once.
    AllKilled,
    /// One stands still for a while.
    Stopped,
    /// Three members become five, or five three.
    Changed,
    /// One that is well is replaced.
    Replaced,
    /// Any processes are killed.
    SomeKilled,
    /// Any safekeepers are cut off, see [`Night::cut_off`].
    CutOff,
    /// Each safekeeper has a trouble of its own, see [`Night::each_its_own`].
    EachItsOwn,
}

const TROUBLES: [Trouble; 8] = [
    Trouble::Wiped,
    Trouble::AllKilled,
    Trouble::Stopped,
    Trouble::Changed,
    Trouble::Replaced,
    Trouble::SomeKilled,
    Trouble::CutOff,
    Trouble::EachItsOwn,
];

/// What is done while some are cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// Another compute is elected.
    ComputeKilled,
    /// Those who are cut off start again, and connections to who they were before stay half open.
    Restarted,
    /// One who is cut off from all is given up, and another one is put in its place.
    Replaced,
}

struct Night {
    cluster: Cluster,
    cuts: Option<Cuts>,
    random: StdRng,
    checker: Checker,
    members: Vec<u64>,
    /// Of all processes, by name, as the round began: who is asked later may not answer.
    pids: BTreeMap<String, u64>,
    /// Longest cut, in milliseconds.
    longest_cut: u64,
    packets: u64,
    /// How often each trouble was there, and the longest time without a commit.
    seen: BTreeMap<String, (u32, Duration)>,
}

fn name(id: u64) -> String {
    format!("safekeeper-{id}")
}

impl Night {
    fn any(&mut self) -> u64 {
        *self.members.choose(&mut self.random).unwrap()
    }

    /// Each of them or not, but one at least.
    fn some(&mut self) -> Vec<u64> {
        let members = self.members.clone();
        let some: Vec<u64> = members.into_iter().filter(|_| self.random.random_bool(0.5)).collect();
        if some.is_empty() { vec![self.any()] } else { some }
    }

    fn is_minority(&self, count: usize) -> bool {
        count <= (self.members.len() - 1) / 2
    }

    fn sleep_up_to(&mut self, most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.random.random_range(0..most_ms)));
    }

    fn kill(&self, name: &str) {
        signal(self.pids[name], Signal::KILL);
        wait_gone(self.pids[name]);
    }

    fn wipe(&self, id: u64) {
        std::fs::remove_dir_all(self.cluster.dir().join(name(id))).unwrap();
    }

    fn replace(&self, id: u64) {
        self.cluster.cli(&["safekeeper", "replace", &id.to_string()]);
        self.forget(id);
    }

    /// A thousand rounds would fill the disk with what those had who left.
    fn forget(&self, id: u64) {
        let _ = std::fs::remove_dir_all(self.cluster.dir().join(name(id)));
    }

    /// Returns what it was, in more words.
    fn trouble(&mut self, what: Trouble) -> String {
        match what {
            Trouble::Wiped => {
                let one = self.any();
                self.kill(&name(one));
                self.wipe(one);
                self.checker.goes_on("one is wiped");
                self.replace(one);
            }
            Trouble::AllKilled => self.cluster.kill_everything(),
            Trouble::Stopped => {
                let one = self.any();
                let pid = self.pids[&name(one)];
                signal(pid, Signal::STOP);
                self.sleep_up_to(2000);
                self.checker.goes_on("one stands still");
                signal(pid, Signal::CONT);
            }
            Trouble::Changed if self.members.len() == 3 => {
                self.cluster.cli(&["safekeeper", "add"]);
                self.cluster.cli(&["safekeeper", "add"]);
            }
            Trouble::Changed => {
                for id in &self.members[..2] {
                    self.cluster.cli(&["safekeeper", "remove", &id.to_string()]);
                    self.forget(*id);
                }
            }
            Trouble::Replaced => {
                let one = self.any();
                self.replace(one);
            }
            Trouble::SomeKilled => {
                let others = ["pageserver", "storage-broker", "compute-main"];
                for process in others {
                    if self.random.random_bool(0.5) {
                        self.kill(process);
                    }
                }
                let some: Vec<u64> =
                    self.members.iter().copied().filter(|_| self.random.random_bool(0.5)).collect();
                some.into_iter().for_each(|id| self.kill(&name(id)));
            }
            Trouble::CutOff => return self.cut_off(),
            Trouble::EachItsOwn => return self.each_its_own(),
        }
        String::new()
    }

    fn way(&mut self) -> Way {
        let ways = [Way::Both, Way::Both, Way::ToSafekeeper, Way::FromSafekeeper];
        *ways.choose(&mut self.random).unwrap()
    }

    fn heal(&mut self) {
        self.packets += self.cuts.as_ref().unwrap().heal();
    }

    /// Some are cut off from somebody for a while, in which something else may go wrong.
    fn cut_off(&mut self) -> String {
        let who = self.some();
        let from = [
            Some(Party::Everybody),
            Some(Party::Everybody),
            Some(Party::Computes),
            Some(Party::PageServer),
            Some(Party::Broker),
            Some(Party::ObjectStore),
            // From each other, and from the rest.
            None,
        ];
        let (mut from, way) = (*from.choose(&mut self.random).unwrap(), self.way());
        if self.packets == 0 {
            // The first is seen to cut something off: to others it may have nothing to say for as long as it lasts.
            from = Some(Party::Everybody);
        }
        let cuts = self.cuts.as_ref().unwrap();
        for id in &who {
            match from {
                Some(party) => cuts.cut(&self.cluster, *id, party, way),
                None => {
                    for other in self.members.iter().filter(|other| *other != id) {
                        cuts.cut(&self.cluster, *id, Party::Safekeeper(*other), way);
                    }
                }
            }
        }
        // Who has a way to a majority goes on.
        let goes_on = self.is_minority(who.len())
            || !matches!(from, Some(Party::Everybody | Party::Computes));
        let all = [Meanwhile::ComputeKilled, Meanwhile::Restarted, Meanwhile::Replaced];
        let meanwhile = match all.choose(&mut self.random).unwrap() {
            _ if self.random.random_bool(0.4) => Meanwhile::Nothing,
            // A compute starts with what the page server has taken in.
            Meanwhile::ComputeKilled
                if from == Some(Party::PageServer) && who.len() == self.members.len() =>
            {
                Meanwhile::Nothing
            }
            Meanwhile::Replaced
                if !self.is_minority(who.len()) || from != Some(Party::Everybody) =>
            {
                Meanwhile::Nothing
            }
            other => *other,
        };
        self.sleep_up_to(1000);
        match meanwhile {
            Meanwhile::Nothing => {}
            Meanwhile::ComputeKilled => self.kill("compute-main"),
            Meanwhile::Restarted => who.iter().for_each(|id| self.kill(&name(*id))),
            Meanwhile::Replaced => self.replace(who[0]),
        }
        let rest = if goes_on { "a majority is left" } else { "no majority is left" };
        let said = format!("{who:?} from {from:?}, {way:?}, {rest}, meanwhile {meanwhile:?}");
        if goes_on {
            self.cluster.up();
            self.checker.goes_on(&said);
        }
        self.sleep_up_to(self.longest_cut);
        self.heal();
        said
    }

    /// For each of them one of all troubles, or none; no majority loses its disks.
    fn each_its_own(&mut self) -> String {
        let (mut stopped, mut wiped, mut said) = (Vec::new(), Vec::new(), Vec::new());
        for id in self.members.clone() {
            let what = match self.random.random_range(0..5) {
                0 => {
                    self.kill(&name(id));
                    "killed"
                }
                1 => {
                    let pid = self.pids[&name(id)];
                    signal(pid, Signal::STOP);
                    stopped.push(pid);
                    "stopped"
                }
                2 if self.cuts.is_some() => {
                    let way = self.way();
                    let cuts = self.cuts.as_ref().unwrap();
                    cuts.cut(&self.cluster, id, Party::Everybody, way);
                    "cut off"
                }
                3 if self.is_minority(wiped.len() + 1) => {
                    self.kill(&name(id));
                    self.wipe(id);
                    wiped.push(id);
                    "wiped"
                }
                _ => "well",
            };
            said.push(format!("{id} {what}"));
            self.sleep_up_to(300);
        }
        self.sleep_up_to(self.longest_cut);
        stopped.into_iter().for_each(|pid| signal(pid, Signal::CONT));
        if self.cuts.is_some() {
            self.heal();
        }
        // It says of those that are wiped that they can't start.
        self.cluster.try_cli(&["up"]);
        wiped.into_iter().for_each(|id| self.replace(id));
        said.join(", ")
    }

    /// Returns where the compute is.
    fn round(&mut self, round: u32, what: Trouble) -> String {
        let shown = self.cluster.json(&["quorum", "show"]);
        let members = shown["members"].as_array().unwrap();
        self.members = members.iter().map(|member| member["id"].as_u64().unwrap()).collect();
        let status = self.cluster.status();
        let processes = status["processes"].as_array().unwrap();
        let pids = processes.iter().map(|process| {
            let name = process["name"].as_str().unwrap().to_owned();
            let pid = process["pid"].as_u64();
            (name.clone(), pid.unwrap_or_else(|| panic!("{name} is dead")))
        });
        self.pids = pids.collect();
        let since = Instant::now();
        self.checker.take_longest();
        let said = self.trouble(what);
        let uri = self.cluster.up();
        self.checker.goes_on(&format!("round {round}, {what:?} {said}"));
        let longest = self.checker.take_longest();
        let more = ["a majority is left", "no majority is left"];
        let more = more.into_iter().find(|more| said.contains(more)).unwrap_or_default();
        let seen = self.seen.entry(format!("{what:?} {more}")).or_default();
        *seen = (seen.0 + 1, seen.1.max(longest));
        println!(
            "round {round}: {what:?} {said}, {} members, {:.1?}, {longest:.1?} without a commit",
            self.members.len(),
            since.elapsed()
        );
        uri
    }
}

fn number_of(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn bad_nights(cuts_are_possible: Result<(), String>) {
    // All of them are there, in a few rounds too.
    let few = TROUBLES.len() as u32;
    let asked = number_of("PGSTRATA_TEST_ROUNDS").map(|rounds| rounds as u32);
    let rounds = asked.unwrap_or(if thorough() { 100 } else { few });
    let seed = number_of("PGSTRATA_TEST_SEED").unwrap_or_else(|| rand::random_range(0..1_000_000));
    println!("{rounds} rounds, PGSTRATA_TEST_SEED={seed}");
    let store = match &cuts_are_possible {
        Ok(()) => Some(OtherS3::start(None)),
        Err(why) => {
            assert!(!thorough(), "nobody can be cut off: {why}");
            // Not what a test that passes prints, which nobody sees.
            let line = format!("rounds of bad nights: nobody is cut off, for {why}\n");
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            None
        }
    };
    let cuts = store
        .as_ref()
        .map(|store| Cuts::new(store.endpoint.rsplit_once(':').unwrap().1.parse().unwrap()));
    let cluster = match (&store, &cuts) {
        (Some(store), Some(cuts)) => {
            store.make_bucket("bucket");
            let options = ["--run-as", "root", "--object-store", "s3://bucket/cluster"];
            let options = [&options[..], &["--s3-endpoint", &store.endpoint]];
            Cluster::with(&options.concat(), &S3_ENVIRONMENT).with_programs(cuts.programs())
        }
        _ => Cluster::new(),
    };
    let checker = Checker::start(&cluster);
    let mut night = Night {
        cluster,
        cuts,
        random: StdRng::seed_from_u64(seed),
        checker,
        members: Vec::new(),
        pids: BTreeMap::new(),
        longest_cut: if rounds > few { 10_000 } else { 1000 },
        packets: 0,
        seen: BTreeMap::new(),
    };
    let mut checked = 0;
    let only = std::env::var("PGSTRATA_TEST_TROUBLES").ok();
    let is_wanted = |trouble: &Trouble| {
        only.as_ref().is_none_or(|only| only.split(',').any(|one| one == format!("{trouble:?}")))
    };
    let troubles: Vec<Trouble> = TROUBLES.into_iter().filter(is_wanted).collect();
    for round in 1..=rounds {
        let what = match troubles.get(round as usize - 1) {
            Some(trouble) => *trouble,
            None => *troubles.choose(&mut night.random).unwrap(),
        };
        if what == Trouble::CutOff && night.cuts.is_none() {
            continue;
        }
        let uri = night.round(round, what);
        if rounds <= CHECK_ALL_EVERY || round % CHECK_ALL_EVERY == 0 || round == rounds {
            checked = 0;
        }
        checked = night.checker.check(&uri, checked, &format!("round {round}"));
    }
    let commits = night.checker.end();
    let (copies, bytes) = compare_copies(&night.cluster);
    for (what, (count, longest)) in &night.seen {
        println!("{what}: {count} rounds, {longest:.1?} without a commit at most");
    }
    println!(
        "{rounds} rounds, {commits} commits, {} packets lost, the last {bytes} bytes of {copies} copies are the same",
        night.packets
    );
    let are_cut = night.cuts.is_some() && only.is_none() && rounds >= few;
    assert!(!are_cut || night.packets > 0, "nobody was cut off");
}

/// As many rounds as `PGSTRATA_TEST_ROUNDS` says; a few, or a hundred with all tests. Of those troubles only that
/// `PGSTRATA_TEST_TROUBLES` names, if it is there. What is left where it fails: see `PGSTRATA_TEST_KEEP`.
#[test]
fn nothing_is_lost_in_rounds_of_bad_nights() {
    cuts::inside(bad_nights);
}
