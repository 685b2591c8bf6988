//! Room: bytes and files that a file system still takes. A safekeeper without room takes no WAL, and a full disk is what most
//! failures of databases begin with.

use std::path::Path;

use nix::sys::statvfs::statvfs;

use super::finding::{Finding, Severity};
use super::place::{Keeps, Place};

const CHECK: &str = "space";

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// What is free, of how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// Bytes, without those that are kept back for root, as `df` counts.
    pub total: u64,
    free: u64,
    /// Files; none of both where there is no limit.
    files: u64,
    free_files: u64,
}

impl Space {
    /// Of the file system that a directory is in; `None` where it does not say.
    pub fn of(path: &Path) -> Option<Space> {
        let about = statvfs(path).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(about.fragment_size());
        let used = about.blocks().saturating_sub(about.blocks_free());
        Some(Space {
            total: bytes(used.saturating_add(about.blocks_available())),
            free: bytes(about.blocks_available()),
            files: about.files(),
            free_files: about.files_available(),
        })
    }
}

/// Whether less than this part of all is free.
fn is_below(percent: u64, free: u64, total: u64) -> bool {
    u128::from(free) * 100 < u128::from(total) * u128::from(percent)
}

fn size(bytes: u64) -> String {
    match bytes {
        GIB.. => format!("{:.1} GiB", bytes as f64 / GIB as f64),
        _ => format!("{:.1} MiB", bytes as f64 / MIB as f64),
    }
}

/// Room of a place.
pub fn check(place: &Place, space: Option<Space>) -> Vec<Finding> {
    let finding = |severity, text: &str| Finding::new(CHECK, &place.object, severity, text);
    let path = place.path.display();
    let Some(space) = space else {
        let text = format!("not looked at: the file system of {path} does not say how full it is");
        return vec![finding(Severity::Unknown, &text)];
    };
    let Space { total, free, files, free_files } = space;
    let severity = match place.keeps {
        // Small in most containers. What does not fit there is put on disk.
        Keeps::Memory if is_below(10, free, total) => Severity::Warning,
        Keeps::Memory => Severity::Ok,
        _ if is_below(2, free, total) || free < 128 * MIB => Severity::Danger,
        _ if is_below(10, free, total) || free < GIB => Severity::Warning,
        _ => Severity::Ok,
    };
    let said = format!("{} of {} are free in {path}", size(free), size(total));
    let text = match severity {
        Severity::Ok => said,
        _ => format!("{said}: make room, or give it a larger one"),
    };
    let mut findings = vec![finding(severity, &text)];
    let severity = match () {
        () if is_below(2, free_files, files) => Severity::Danger,
        () if is_below(10, free_files, files) => Severity::Warning,
        () => return findings,
    };
    let text = format!(
        "{free_files} of {files} files can still be made in {path}: remove some, or give it a larger one"
    );
    findings.push(finding(severity, &text));
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn severities(space: Space, keeps: Keeps) -> Vec<Severity> {
        let place = Place::new("it", "/a", keeps);
        check(&place, Some(space)).into_iter().map(|finding| finding.severity).collect()
    }

    #[test]
    fn little_room_is_said_before_there_is_none() {
        use Severity::{Danger, Ok, Warning};
        for (total, free, expected) in [
            (100 * GIB, 50 * GIB, Ok),
            (100 * GIB, 10 * GIB, Ok),
            (100 * GIB, 10 * GIB - 1, Warning),
            (100 * GIB, 2 * GIB, Warning),
            (100 * GIB, 2 * GIB - 1, Danger),
            (2 * GIB, GIB, Ok),
            (2 * GIB, GIB - 1, Warning),
            (GIB, 128 * MIB, Warning),
            (GIB, 128 * MIB - 1, Danger),
            (u64::MAX, u64::MAX / 2, Ok),
            (0, 0, Danger),
        ] {
            let space = Space { total, free, files: 0, free_files: 0 };
            for keeps in [Keeps::Wal, Keeps::Objects, Keeps::Cache] {
                assert_eq!(severities(space, keeps), [expected], "{free} of {total}");
            }
        }
    }

    #[test]
    fn shared_memory_is_no_danger() {
        let space = |total, free| Space { total, free, files: 0, free_files: 0 };
        for (space, expected) in [
            (space(64 * MIB, 63 * MIB), Severity::Ok),
            (space(64 * MIB, 6 * MIB), Severity::Warning),
            (space(64 * MIB, 0), Severity::Warning),
        ] {
            assert_eq!(severities(space, Keeps::Memory), [expected]);
        }
    }

    #[test]
    fn files_are_counted_where_there_is_a_limit() {
        use Severity::{Danger, Ok, Warning};
        let space =
            |free_files| Space { total: 100 * GIB, free: 90 * GIB, files: 1000, free_files };
        for (free_files, expected) in [(100, &[Ok][..]), (99, &[Ok, Warning]), (19, &[Ok, Danger])]
        {
            assert_eq!(severities(space(free_files), Keeps::Wal), expected);
        }
        let place = Place::new("it", "/a", Keeps::Wal);
        let texts: Vec<_> =
            check(&place, Some(space(19))).into_iter().map(|one| one.text).collect();
        let expected = [
            "90.0 GiB of 100.0 GiB are free in /a",
            "19 of 1000 files can still be made in /a: remove some, or give it a larger one",
        ];
        assert_eq!(texts, expected);
        assert_eq!(check(&place, None)[0].severity, Severity::Unknown);
    }
}
