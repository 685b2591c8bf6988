//! Limits of running services (`/proc/PID/limits`, `man 2 getrlimit`), and what the kernel must be able to do.

use super::finding::{Finding, Severity};

const CHECK: &str = "limits";

/// Descriptors with which a service works, and below which it does not for long.
const FILES: u64 = 1024;
const FEWEST_FILES: u64 = 256;
/// Processes and threads, of all that a user runs.
const PROCESSES: u64 = 1024;
/// Bytes of the longest file: PostgreSQL's of a relation, and the longest segment of WAL.
const FILE_SIZE: u64 = 1 << 30;

/// Those that matter here; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    files: Option<u64>,
    processes: Option<u64>,
    file_size: Option<u64>,
    address_space: Option<u64>,
}

impl Limits {
    /// From the kernel's text; `None` where that is another than it should be.
    pub fn parse(text: &str) -> Option<Limits> {
        let soft = |name: &str| -> Option<Option<u64>> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            match line.split_ascii_whitespace().next()? {
                "unlimited" => Some(None),
                number => number.parse().ok().map(Some),
            }
        };
        Some(Limits {
            files: soft("Max open files ")?,
            processes: soft("Max processes ")?,
            file_size: soft("Max file size ")?,
            address_space: soft("Max address space ")?,
        })
    }
}

/// Limits of a service.
pub fn check(object: &str, limits: Option<Limits>) -> Vec<Finding> {
    let finding = |severity, text: &str| Finding::new(CHECK, object, severity, text);
    let Some(limits) = limits else {
        return vec![finding(
            Severity::Unknown,
            "not looked at: the limits of its process can't be read",
        )];
    };
    let mut found = Vec::new();
    let below = |limit: Option<u64>, least: u64| limit.filter(|limit| *limit < least);
    if let Some(files) = below(limits.files, FILES) {
        let severity = if files < FEWEST_FILES { Severity::Danger } else { Severity::Warning };
        let text = format!(
            "it may open {files} files and connections: let it have {FILES} at least (LimitNOFILE=, ulimit -n)"
        );
        found.push(finding(severity, &text));
    }
    if let Some(processes) = below(limits.processes, PROCESSES) {
        let text = format!(
            "its user may run {processes} processes and threads: let there be {PROCESSES} at least (LimitNPROC=, ulimit -u)"
        );
        found.push(finding(Severity::Warning, &text));
    }
    if let Some(bytes) = below(limits.file_size, FILE_SIZE) {
        let text = format!(
            "its files end at {bytes} bytes, and WAL and tables need more: set no limit (LimitFSIZE=, ulimit -f)"
        );
        found.push(finding(Severity::Danger, &text));
    }
    if let Some(bytes) = limits.address_space {
        let text = format!("its memory ends at {bytes} bytes: set no limit (LimitAS=, ulimit -v)");
        found.push(finding(Severity::Warning, &text));
    }
    if found.is_empty() {
        let files = limits.files.map_or("any number of".to_owned(), |files| files.to_string());
        found.push(finding(Severity::Ok, &format!("it may open {files} files and connections")));
    }
    found
}

/// Whether the kernel, or what filters calls of it in a container, gives memory that has a descriptor: a compute's page cache
/// is in such.
pub fn check_kernel() -> Finding {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    match memfd_create(c"pgstrata-doctor", MFdFlags::MFD_CLOEXEC) {
        Ok(_) => {
            Finding::new(CHECK, "kernel", Severity::Ok, "it has what computes need (memfd_create)")
        }
        Err(error) => {
            let text = format!(
                "memfd_create fails ({error}), and no compute can start: use another kernel, or allow the call"
            );
            Finding::new(CHECK, "kernel", Severity::Danger, &text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(files: &str, processes: &str, file_size: &str, address_space: &str) -> String {
        format!(
            "Limit                     Soft Limit           Hard Limit           Units     \n\
             Max cpu time              unlimited            unlimited            seconds   \n\
             Max file size             {file_size}            unlimited            bytes     \n\
             Max processes             {processes}               96333                processes \n\
             Max open files            {files}                 524288               files     \n\
             Max address space         {address_space}            unlimited            bytes     \n"
        )
    }

    #[test]
    fn limits_that_are_too_low_are_said() {
        use Severity::{Danger, Ok, Warning};
        let none = "unlimited";
        for (limits, expected) in [
            ([none, none, none, none], &[Ok][..]),
            (["1024", "1024", "1073741824", none], &[Ok]),
            (["1023", none, none, none], &[Warning]),
            (["256", none, none, none], &[Warning]),
            (["255", "1023", none, none], &[Danger, Warning]),
            ([none, none, "1073741823", "99"], &[Danger, Warning]),
        ] {
            let [files, processes, file_size, address_space] = limits;
            let read = Limits::parse(&text(files, processes, file_size, address_space));
            let found: Vec<_> =
                check("it", read).into_iter().map(|finding| finding.severity).collect();
            assert_eq!(found, expected, "{limits:?}");
        }
        let found = check("it", Limits::parse(&text("512", none, none, none)));
        let expected = "it may open 512 files and connections: let it have 1024 at least (LimitNOFILE=, ulimit -n)";
        assert_eq!(found[0].text, expected);
    }

    #[test]
    fn limits_of_another_form_are_not_known() {
        for bad in ["", "Max open files", &text("many", "1", "1", "1")] {
            assert_eq!(Limits::parse(bad), None, "{bad}");
        }
        assert_eq!(check("it", None)[0].severity, Severity::Unknown);
        let own = std::fs::read_to_string("/proc/self/limits").unwrap();
        assert!(Limits::parse(&own).is_some(), "{own}");
        assert_eq!(check_kernel().severity, Severity::Ok);
    }
}
