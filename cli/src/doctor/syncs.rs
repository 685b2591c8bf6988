//! How long it takes until a write is on the disk, measured as a safekeeper writes: what is faster than any disk is none.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::finding::{Finding, Severity};

const CHECK: &str = "syncs";

/// Writes that are measured, at most; and for how long.
const WRITES: usize = 300;
const LONGEST: Duration = Duration::from_millis(1500);
/// Bytes of a write.
const BLOCK: usize = 4096;
/// Faster than any device that keeps what it was given: a battery-backed cache at the end of a bus takes some tens of
/// microseconds.
const TOO_FAST: Duration = Duration::from_micros(20);
/// Slower than what a database can live with.
const SLOW: Duration = Duration::from_millis(50);

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    writes: usize,
    /// Of a write with its sync.
    median: Duration,
}

/// Writes and syncs in a file without a name, which is gone however this ends.
pub fn measure(directory: &Path) -> io::Result<Measured> {
    let file = tempfile::tempfile_in(directory)?;
    let block = [0x5a; BLOCK];
    let end = Instant::now() + LONGEST;
    // The first one allocates what the others overwrite, as a safekeeper's segment is there before it is written.
    write(&file, &block, WRITES)?;
    let mut taken = Vec::with_capacity(WRITES);
    for number in 0..WRITES {
        taken.push(write(&file, &block, number)?);
        if Instant::now() > end {
            break;
        }
    }
    taken.sort_unstable();
    let median = taken.get(taken.len() / 2).copied().unwrap_or_default();
    Ok(Measured { writes: taken.len(), median })
}

fn write(file: &File, block: &[u8; BLOCK], number: usize) -> io::Result<Duration> {
    let began = Instant::now();
    file.write_all_at(block, (number * BLOCK) as u64)?;
    file.sync_data()?;
    Ok(began.elapsed())
}

/// What a measurement says. One that did not come back in time is `None`.
pub fn check(object: &str, path: &Path, measured: Option<&io::Result<Measured>>) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, object, severity, text);
    let path = path.display();
    let Measured { writes, median } = match measured {
        None => {
            let text = format!(
                "a write to {path} has not reached the disk in time: see whether the disk answers (dmesg)"
            );
            return finding(Severity::Danger, &text);
        }
        Some(Err(error)) if error.raw_os_error() == Some(nix::libc::EIO) => {
            let text = format!("a write to {path} failed ({error}): replace that disk");
            return finding(Severity::Danger, &text);
        }
        // Full, read-only or closed to us: other checks say what is wrong with that.
        Some(Err(error)) => {
            return finding(
                Severity::Unknown,
                &format!("not measured: can't write in {path}: {error}"),
            );
        }
        Some(Ok(measured)) => *measured,
    };
    let said = format!("a write is on the disk in {median:.1?} (the median of {writes} in {path})");
    match () {
        () if median < TOO_FAST => {
            let text = format!(
                "{said}, which is faster than any disk: syncs may not be real there (a cache that is lost with the power, a \
                 setting of the hypervisor, libeatmydata)"
            );
            finding(Severity::Warning, &text)
        }
        () if median > SLOW => {
            let text = format!(
                "{said}, and each commit waits for that: use a faster disk, or one that is less busy"
            );
            finding(Severity::Warning, &text)
        }
        () => finding(Severity::Ok, &said),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_fast_is_no_disk() {
        let check = |micros: u64| {
            let measured = Ok(Measured { writes: 300, median: Duration::from_micros(micros) });
            let found = check("it", Path::new("/a"), Some(&measured));
            (found.severity, found.text)
        };
        let said = "a write is on the disk in 20.0µs (the median of 300 in /a)";
        assert_eq!(check(20), (Severity::Ok, said.to_owned()));
        let (severity, text) = check(19);
        assert_eq!(severity, Severity::Warning);
        assert!(text.contains("faster than any disk"), "{text}");
        assert_eq!(check(50_000).0, Severity::Ok);
        assert_eq!(check(50_001).0, Severity::Warning);
    }

    #[test]
    fn what_fails_or_hangs_is_told_apart() {
        let check = |error: io::Error| check("it", Path::new("/a"), Some(&Err(error))).severity;
        assert_eq!(check(io::Error::from_raw_os_error(nix::libc::EIO)), Severity::Danger);
        assert_eq!(check(io::ErrorKind::PermissionDenied.into()), Severity::Unknown);
        assert_eq!(check(io::ErrorKind::StorageFull.into()), Severity::Unknown);
        assert_eq!(super::check("it", Path::new("/a"), None).severity, Severity::Danger);
    }

    #[test]
    fn a_measurement_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let measured = measure(directory.path()).unwrap();
        assert!(measured.writes > 0 && measured.median > Duration::ZERO, "{measured:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        assert_eq!(
            measure(&directory.path().join("none")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
