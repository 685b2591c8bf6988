//! Branches, as the page server and safekeepers have them, and settings that computes did not follow.

use pgstrata_ids::{Lsn, TimelineId};
use pgstrata_wire::http::pageserver::Branch;
use pgstrata_wire::http::safekeeper;

use super::finding::{Finding, Severity};
use crate::branch;
use crate::members::short::{self, Safekeepers, Short};

const CHECK: &str = "branches";
const MEMBERS: &str = "members";
const SETTINGS: &str = "settings";

/// Bytes of WAL that may wait to be taken in, or to be archived: those of a burst.
const BEHIND: u64 = 1 << 30;

/// How far safekeepers are with a timeline.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Progress {
    commit: Lsn,
    archived: Lsn,
}

impl Progress {
    /// The farthest of them.
    fn of<'a>(
        timeline: TimelineId,
        said: impl Iterator<Item = &'a safekeeper::Status>,
    ) -> Option<Progress> {
        let all =
            said.flat_map(|status| &status.timelines).filter(|one| one.timeline_id == timeline);
        all.map(|one| Progress { commit: one.commit_lsn, archived: one.archived_lsn }).reduce(
            |a, b| Progress {
                commit: a.commit.max(b.commit),
                archived: a.archived.max(b.archived),
            },
        )
    }
}

fn lag(until: Lsn, reached: Lsn) -> Option<String> {
    let bytes = until.0.saturating_sub(reached.0);
    (bytes > BEHIND).then(|| format!("{:.1} GiB", bytes as f64 / BEHIND as f64))
}

fn troubles(row: &Branch, progress: Option<Progress>) -> Vec<(Severity, String)> {
    if let Some(failure) = &row.failure {
        let text = format!("it is not served from here on: {failure}");
        return vec![(Severity::Danger, text)];
    }
    let unreadable = branch::unreadable(row);
    let severity = |line: &String| match Some(line) == unreadable.as_ref() {
        true => Severity::Danger,
        false => Severity::Warning,
    };
    let mut found: Vec<_> =
        branch::troubles(row).into_iter().map(|line| (severity(&line), line)).collect();
    let Some(progress) = progress else { return found };
    if let Some(lag) = lag(progress.commit, row.last_record_lsn) {
        let text = format!("the page server is {lag} of WAL behind: see its load, and its log");
        found.push((Severity::Warning, text));
    }
    if let Some(lag) = lag(progress.commit, progress.archived) {
        let text = format!(
            "{lag} of WAL are with the safekeepers only, and not archived: see whether the object store takes them"
        );
        found.push((Severity::Warning, text));
    }
    found
}

/// Branches, or why they are not known.
pub fn check(rows: &Result<Vec<Branch>, String>, said: &[safekeeper::Status]) -> Vec<Finding> {
    let rows = match rows {
        Ok(rows) => rows,
        Err(why) => {
            let text = format!("not looked at: {why}");
            return vec![Finding::new(CHECK, "branches", Severity::Unknown, &text)];
        }
    };
    let mut found = Vec::new();
    for row in rows {
        let progress = Progress::of(row.timeline_id, said.iter());
        let of_row = troubles(row, progress).into_iter();
        found
            .extend(of_row.map(|(severity, text)| Finding::new(CHECK, &row.name, severity, &text)));
    }
    if found.is_empty() {
        let text = match rows.len() {
            1 => "the one that there is is served, and its WAL taken in and archived".to_owned(),
            count => format!("all {count} are served, and their WAL taken in and archived"),
        };
        found.push(Finding::new(CHECK, "branches", Severity::Ok, &text));
    }
    found
}

/// Branches that fewer safekeepers keep than should. Of those that nobody tells of it is said elsewhere that they are not known.
pub fn check_members(
    rows: &Result<Vec<Branch>, String>,
    said: &[safekeeper::Status],
    safekeepers: &Safekeepers,
) -> Vec<Finding> {
    let Ok(rows) = rows else { return Vec::new() };
    let found = short::find(rows, said, safekeepers);
    if found.is_empty() {
        let text = "no branch that is told of has fewer members than it should";
        return vec![Finding::new(MEMBERS, "branches", Severity::Ok, text)];
    }
    let finding = |one: &Short| Finding::new(MEMBERS, &one.object(), Severity::Warning, &one.text);
    found.iter().map(finding).collect()
}

/// What a compute decided otherwise than it was asked.
pub fn check_settings(object: &str, warnings: &[String]) -> Vec<Finding> {
    warnings
        .iter()
        .map(|warning| Finding::new(SETTINGS, object, Severity::Warning, warning))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn id(letter: char) -> String {
        letter.to_string().repeat(32)
    }

    fn row() -> Branch {
        let row = json!({
            "name": "main", "timeline_id": id('a'), "tenant_id": id('b'), "ancestor": null, "start_lsn": "0/8",
            "start_prev": "0/0", "last_record_lsn": Lsn(5 * GIB).to_string(), "remote_lsn": "0/8", "logical_size": null,
            "system_id": 1, "pg_version": 15, "segment_size": 16 << 20, "created": "", "failure": null,
        });
        serde_json::from_value(row).unwrap()
    }

    fn status(timeline: char, commit: u64, archived: u64) -> safekeeper::Status {
        let timeline = json!({
            "tenant_id": id('b'), "timeline_id": id(timeline), "system_id": "1", "pg_version": 15, "segment_size": 16 << 20,
            "start_lsn": "0/8", "term": 1, "flush_lsn": Lsn(commit).to_string(), "commit_lsn": Lsn(commit).to_string(),
            "available_lsn": "0/8", "archived_lsn": Lsn(archived).to_string(), "remote_consistent_lsn": "0/8",
        });
        safekeeper::Status {
            timelines: vec![serde_json::from_value(timeline).unwrap()],
            ..Default::default()
        }
    }

    fn found(change: impl Fn(&mut Branch), said: &[safekeeper::Status]) -> Vec<(Severity, String)> {
        let mut row = row();
        change(&mut row);
        check(&Ok(vec![row]), said).into_iter().map(|one| (one.severity, one.text)).collect()
    }

    #[test]
    fn a_branch_that_is_not_served_is_a_danger() {
        use Severity::{Danger, Ok, Warning};
        let served = "the one that there is is served, and its WAL taken in and archived";
        assert_eq!(found(|_| {}, &[]), [(Ok, served.to_owned())]);
        let failed = found(|row| row.failure = Some("a record".into()), &[]);
        assert_eq!(failed, [(Danger, "it is not served from here on: a record".to_owned())]);
        let upload = found(|row| row.upload_failure = Some("no".into()), &[]);
        assert_eq!(upload, [(Warning, "uploads fail: no".to_owned())]);
        let pages =
            found(|row| (row.unreadable_pages, row.unreadable_page) = (2, Some("x".into())), &[]);
        assert_eq!(pages, [(Danger, "2 pages can't be made, one of them: x".to_owned())]);
        let unknown = check(&Err("no answer".into()), &[]);
        assert_eq!(
            (unknown[0].severity, unknown[0].text.as_str()),
            (Severity::Unknown, "not looked at: no answer")
        );
    }

    #[test]
    fn a_branch_that_falls_behind_is_said() {
        let texts = |commit: u64, archived: u64| {
            let said = [status('a', commit, archived), status('a', 8, 8), status('c', 99 * GIB, 8)];
            found(|_| {}, &said)
                .into_iter()
                .map(|(severity, text)| (severity, text.split(':').next().unwrap().to_owned()))
                .collect::<Vec<_>>()
        };
        assert_eq!(texts(6 * GIB, 5 * GIB)[0].0, Severity::Ok);
        let ingest = (Severity::Warning, "the page server is 2.0 GiB of WAL behind".to_owned());
        assert_eq!(texts(7 * GIB, 7 * GIB), [ingest]);
        let archive = "1.5 GiB of WAL are with the safekeepers only, and not archived".to_owned();
        assert_eq!(texts(5 * GIB, 7 * GIB / 2), [(Severity::Warning, archive)]);
    }

    #[test]
    fn what_a_compute_decided_otherwise_is_said() {
        let found = check_settings("compute-main", &["archive_mode is off".to_owned()]);
        assert_eq!((&*found[0].check, found[0].severity), ("settings", Severity::Warning));
        assert_eq!(check_settings("compute-main", &[]), []);
    }
}
