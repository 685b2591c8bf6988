//! Which of PostgreSQL's settings a compute decides, and why.
//!
//! Owns the rules; `docs/settings.md` lists every setting of every version with what follows for it. What a user asked
//! for and does not get is said in the server's log and in the compute's report.

use pgstrata_pg_wal::{ControlFile, PgVersion};

use crate::conf::{self, Entry};

/// A setting that a compute decides.
#[derive(Clone, Copy, Debug)]
pub struct Forced {
    /// The setting.
    pub name: &'static str,
    /// What it is set to.
    pub value: &'static str,
    /// Why nobody else may.
    pub why: &'static str,
    /// The versions that know it.
    pub versions: (u32, u32),
    /// Only in a read-only compute.
    pub read_only: bool,
}

const fn always(name: &'static str, value: &'static str, why: &'static str) -> Forced {
    Forced { name, value, why, versions: (15, 18), read_only: false }
}

const fn read_only(name: &'static str, value: &'static str, why: &'static str) -> Forced {
    Forced { name, value, why, versions: (15, 18), read_only: true }
}

/// Settings with one right value, whoever asks for another.
pub const FORCED: &[Forced] = &[
    always("fsync", "on", "a sync of WAL is what makes a commit durable on a quorum"),
    always("wal_sync_method", "fdatasync", "it is this call that waits for the quorum"),
    always("restart_after_crash", "off", "after a crash the compute starts again from the quorum"),
    always("data_sync_retry", "off", "the directory is disposable: nothing is ever synced again"),
    always("archive_mode", "off", "pgstrata archives WAL itself; no archive_command is called"),
    always("dynamic_shared_memory_type", "mmap", "shared memory goes with the compute's directory"),
    always("wal_recycle", "off", "WAL files are disposable, and new ones cost nothing"),
    always("wal_init_zero", "off", "WAL files are disposable, and new ones cost nothing"),
    Forced {
        versions: (18, 18),
        ..always("io_method", "worker", "io_uring reads files past the preload library")
    },
    // A standby that ends its recovery writes WAL that nobody keeps.
    read_only("restore_command", "", "a read-only compute stays at its LSN"),
    read_only("primary_conninfo", "", "a read-only compute stays at its LSN"),
    read_only("recovery_target", "", "a read-only compute can't be promoted"),
    read_only("recovery_target_lsn", "", "a read-only compute can't be promoted"),
    read_only("recovery_target_name", "", "a read-only compute can't be promoted"),
    read_only("recovery_target_time", "", "a read-only compute can't be promoted"),
    read_only("recovery_target_xid", "", "a read-only compute can't be promoted"),
    Forced {
        versions: (15, 15),
        ..read_only("promote_trigger_file", "", "a read-only compute can't be promoted")
    },
    read_only("hot_standby", "on", "a read-only compute is there to be queried"),
    // Tablespaces are directories here, not links: a compute's files are all below its data directory. A standby takes
    // that for damage unless it is allowed (CheckTablespaceDirectory in access/transam/xlogrecovery.c). Nobody can
    // create a tablespace in it.
    read_only("allow_in_place_tablespaces", "on", "tablespaces are directories of the compute"),
];

/// Settings whose value is chosen when a compute is started, by name and reason.
pub const CHOSEN: &[(&str, &str)] = &[
    ("data_directory", "the compute's own directory"),
    ("port", "given when the compute is started: compute start --port"),
    ("unix_socket_directories", "the compute's own directory"),
    (
        "listen_addresses",
        "127.0.0.1 unless asked for; beyond this machine, a pg_hba.conf that you have not changed lets in nobody without \
         a password",
    ),
    (
        "wal_level",
        "minimal leaves changes out of the WAL, which is all that is kept: replica is the least",
    ),
    (
        "full_page_writes",
        "off unless asked for: pages can't tear in storage that is only appended to",
    ),
    ("max_connections", "at least what it was when transactions that are still prepared began"),
    (
        "max_worker_processes",
        "at least what it was when transactions that are still prepared began",
    ),
    ("max_wal_senders", "at least what it was when transactions that are still prepared began"),
    (
        "max_prepared_transactions",
        "at least what it was when transactions that are still prepared began",
    ),
    (
        "max_locks_per_transaction",
        "at least what it was when transactions that are still prepared began",
    ),
];

/// What a server listens on, unless more is asked for. Not PostgreSQL's default, which is a name.
const LOOPBACK: &str = "127.0.0.1";

/// How many of these have nothing to do with what is asked for.
const CHOSEN_AT_START: usize = 3;

/// Sizes of a server's shared memory, which a standby must have at least as its primary had them
/// (CheckRequiredParameterValues in access/transam/xlogrecovery.c): name, what the cluster ran with last, and
/// PostgreSQL's default.
pub type Sizes = [(&'static str, i32, i32); 5];

/// See [`Sizes`].
pub fn sizes(control: &ControlFile) -> Sizes {
    [
        ("max_connections", control.max_connections, 100),
        ("max_worker_processes", control.max_worker_processes, 8),
        ("max_wal_senders", control.max_wal_senders, 10),
        ("max_prepared_transactions", control.max_prepared_xacts, 0),
        ("max_locks_per_transaction", control.max_locks_per_xact, 64),
    ]
}

/// What is known when a server is about to be started.
pub struct Situation<'a> {
    /// PostgreSQL's version.
    pub version: PgVersion,
    /// It only answers queries.
    pub read_only: bool,
    /// What the cluster ran with last.
    pub sizes: Sizes,
    /// Transactions that were prepared and have not ended.
    pub prepared: bool,
    /// What its files say.
    pub files: &'a [Entry],
    /// What was given when the compute was started, `name=value`.
    pub given: &'a [(String, String)],
}

/// What to start a server with.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Decided {
    /// Name and value; these override everything.
    pub options: Vec<(String, String)>,
    /// What a user asked for and does not get, a line each.
    pub warnings: Vec<String>,
    /// What the server listens on, as `listen_addresses` has it.
    pub listen: String,
    /// Where the lines are that say who may connect, if not in the data directory: `hba_file`.
    pub hba_file: Option<String>,
}

/// What the user asked for, and where.
fn asked<'a>(situation: &'a Situation<'a>, name: &str) -> Option<(&'a str, String)> {
    asked_of(situation.given, situation.files, name)
}

fn asked_of<'a>(
    given: &'a [(String, String)],
    files: &'a [Entry],
    name: &str,
) -> Option<(&'a str, String)> {
    let given = given.iter().rev().find(|(given, _)| given == name);
    let given = given.map(|(_, value)| (value.as_str(), "given at the start".to_owned()));
    given.or_else(|| {
        conf::find(files, name).map(|entry| (entry.value.as_str(), entry.place.clone()))
    })
}

/// What a server will listen on, by what was given and what its files say.
pub fn listen(given: &[(String, String)], files: &[Entry]) -> String {
    let asked = asked_of(given, files, "listen_addresses");
    asked.map_or_else(|| LOOPBACK.to_owned(), |(value, _)| value.to_owned())
}

/// Whether two values of a setting mean the same, as far as the forced ones need it.
fn same(a: &str, b: &str) -> bool {
    let plain = |text: &str| match text.trim().to_ascii_lowercase().as_str() {
        "on" | "true" | "yes" | "1" | "t" | "tr" | "tru" | "y" | "ye" => "on".to_owned(),
        "off" | "false" | "no" | "0" | "of" | "f" | "fa" | "fal" | "fals" | "n" => "off".to_owned(),
        other => other.to_owned(),
    };
    plain(a) == plain(b)
}

/// Decides what a server runs with.
pub fn decide(situation: &Situation) -> Decided {
    let mut decided = Decided::default();
    let major = situation.version.major();
    for forced in FORCED {
        let known = (forced.versions.0..=forced.versions.1).contains(&major);
        if !known || (forced.read_only && !situation.read_only) {
            continue;
        }
        decided.options.push((forced.name.to_owned(), forced.value.to_owned()));
        if let Some((value, place)) = asked(situation, forced.name)
            && !same(value, forced.value)
        {
            decided.warn(forced.name, value, &place, forced.value, forced.why);
        }
    }
    // Its other values are as good as any.
    if let Some((value, place)) = asked(situation, "wal_level")
        && same(value, "minimal")
    {
        let why = "minimal leaves changes out of the WAL, and they would be lost";
        decided.options.push(("wal_level".into(), "replica".into()));
        decided.warn("wal_level", value, &place, "replica", why);
    }
    let full_page_writes =
        asked(situation, "full_page_writes").is_some_and(|(value, _)| same(value, "on"));
    let full_page_writes = if full_page_writes { "on" } else { "off" };
    decided.options.push(("full_page_writes".into(), full_page_writes.into()));
    decide_sizes(situation, &mut decided);
    decided.hba_file = asked(situation, "hba_file").map(|(value, _)| value.to_owned());
    decided.listen = listen(situation.given, situation.files);
    if asked(situation, "listen_addresses").is_none() {
        decided.options.push(("listen_addresses".into(), LOOPBACK.into()));
    }
    for (name, why) in CHOSEN.iter().take(CHOSEN_AT_START) {
        if let Some(entry) = conf::find(situation.files, name) {
            let (value, place) = (&entry.value, &entry.place);
            decided
                .warnings
                .push(format!("{name} = {value} ({place}) is not followed: it is {why}"));
        }
    }
    decided
}

fn decide_sizes(situation: &Situation, decided: &mut Decided) {
    // A primary may be given less room than it had, as long as nothing holds any of it.
    if !situation.read_only && !situation.prepared {
        return;
    }
    for (name, least, default) in situation.sizes {
        let asked = asked(situation, name);
        let value = asked.as_ref().and_then(|(value, _)| value.parse().ok());
        if value.unwrap_or(default) >= least {
            continue;
        }
        let text = least.to_string();
        if let Some((value, place)) = &asked
            && !situation.read_only
        {
            let why = "transactions are prepared that began with so much";
            decided.warn(name, value, place, &text, why);
        }
        decided.options.push((name.into(), text));
    }
}

impl Decided {
    fn warn(&mut self, name: &str, asked: &str, place: &str, value: &str, why: &str) {
        let value = if value.is_empty() { "''" } else { value };
        self.warnings.push(format!(
            "{name} = {asked} ({place}) is not followed: it is {value} here, because {why}"
        ));
    }
}

/// Lines for the first `postgresql.conf` of a directory: a branch starts with no less room than its cluster had.
pub fn first_sizes(sizes: Sizes) -> String {
    let ours = |name: &str| if name == "max_prepared_transactions" { 64 } else { 0 };
    let line = |(name, had, default): (&str, i32, i32)| {
        let value = had.max(default).max(ours(name));
        (value > default).then(|| format!("{name} = {value}\n"))
    };
    sizes.into_iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFAULTS: Sizes = [
        ("max_connections", 100, 100),
        ("max_worker_processes", 8, 8),
        ("max_wal_senders", 10, 10),
        ("max_prepared_transactions", 200, 0),
        ("max_locks_per_transaction", 64, 64),
    ];

    fn entry(name: &str, value: &str) -> Entry {
        let place = "postgresql.auto.conf line 3".to_owned();
        Entry { name: name.into(), value: value.into(), place }
    }

    fn situation<'a>(files: &'a [Entry], given: &'a [(String, String)]) -> Situation<'a> {
        let version = PgVersion::V15;
        Situation { version, read_only: false, sizes: DEFAULTS, prepared: false, files, given }
    }

    fn value<'a>(decided: &'a Decided, name: &str) -> Option<&'a str> {
        let mut found = decided.options.iter().filter(|(option, _)| option == name);
        let value = found.next().map(|(_, value)| value.as_str());
        assert!(found.next().is_none(), "{name} is decided twice");
        value
    }

    #[test]
    fn l1_minimal_wal_is_never_run_with() {
        for text in ["minimal", "MINIMAL"] {
            let files = [entry("wal_level", "logical"), entry("wal_level", text)];
            let decided = decide(&situation(&files, &[]));
            assert_eq!(value(&decided, "wal_level"), Some("replica"));
            assert!(decided.warnings[0].contains("postgresql.auto.conf line 3"));
            let given = [("wal_level".to_owned(), "logical".to_owned())];
            assert_eq!(value(&decide(&situation(&files, &given)), "wal_level"), None);
            let given = [("wal_level".to_owned(), text.to_owned())];
            assert_eq!(value(&decide(&situation(&[], &given)), "wal_level"), Some("replica"));
        }
        assert_eq!(value(&decide(&situation(&[], &[])), "wal_level"), None);
    }

    #[test]
    fn l22_what_is_not_followed_is_said() {
        let files = [
            entry("archive_mode", "always"),
            entry("fsync", "off"),
            entry("data_sync_retry", "false"),
        ];
        let decided = decide(&situation(&files, &[]));
        assert_eq!(value(&decided, "archive_mode"), Some("off"));
        assert_eq!(value(&decided, "fsync"), Some("on"));
        assert_eq!(decided.warnings.len(), 2, "{:?}", decided.warnings);
        assert!(decided.warnings.iter().any(|line| line.starts_with("archive_mode = always (")));
    }

    #[test]
    fn full_page_writes_are_for_those_who_ask() {
        assert_eq!(value(&decide(&situation(&[], &[])), "full_page_writes"), Some("off"));
        let files = [entry("full_page_writes", "true")];
        assert_eq!(value(&decide(&situation(&files, &[])), "full_page_writes"), Some("on"));
    }

    #[test]
    fn a_server_listens_on_loopback_until_more_is_asked_for() {
        let decided = decide(&situation(&[], &[]));
        assert_eq!(value(&decided, "listen_addresses"), Some("127.0.0.1"));
        let files = [entry("listen_addresses", "10.0.0.5"), entry("hba_file", "/etc/hba")];
        let decided = decide(&situation(&files, &[]));
        assert_eq!(value(&decided, "listen_addresses"), None);
        assert_eq!(decided.listen, "10.0.0.5");
        assert_eq!(decided.hba_file.as_deref(), Some("/etc/hba"));
        assert!(decided.warnings.is_empty());
        let given = [("listen_addresses".to_owned(), "*".to_owned())];
        assert_eq!(decide(&situation(&files, &given)).listen, "*");
    }

    #[test]
    fn l2_nothing_ends_the_recovery_of_a_read_only_compute() {
        let files = [entry("recovery_target_name", "x"), entry("promote_trigger_file", "/tmp/go")];
        let read_only = Situation { read_only: true, ..situation(&files, &[]) };
        let decided = decide(&read_only);
        assert_eq!(value(&decided, "recovery_target_name"), Some(""));
        assert_eq!(value(&decided, "promote_trigger_file"), Some(""));
        assert_eq!(decided.warnings.len(), 2);
        assert_eq!(value(&decide(&situation(&files, &[])), "recovery_target_name"), None);
        let of_16 = Situation { version: PgVersion::V16, ..read_only };
        assert_eq!(value(&decide(&of_16), "promote_trigger_file"), None);
    }

    #[test]
    fn l13_prepared_transactions_find_the_room_they_had() {
        assert!(first_sizes(DEFAULTS).contains("max_prepared_transactions = 200\n"));
        let files = [entry("max_prepared_transactions", "20"), entry("max_connections", "300")];
        // Less room is fine as long as nothing is prepared.
        assert_eq!(value(&decide(&situation(&files, &[])), "max_prepared_transactions"), None);
        let prepared = Situation { prepared: true, ..situation(&files, &[]) };
        let decided = decide(&prepared);
        assert_eq!(value(&decided, "max_prepared_transactions"), Some("200"));
        assert_eq!(value(&decided, "max_connections"), None);
        assert_eq!(decided.warnings.len(), 1);
    }
}
