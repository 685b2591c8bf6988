//! Programs: those of this release, which are beside this one, PostgreSQL's, and the user whom PostgreSQL runs as.

use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use super::finding::{Finding, Severity};
use crate::cluster::{PG_USER, find_postgres, major_version};

const CHECK: &str = "programs";

/// What every cluster is run by.
const NAMES: [&str; 5] =
    ["storage-broker", "safekeeper", "pageserver", "compute-shim", "libpgstrata_preload.so"];

/// Which of the programs are not beside this one. To be asked before another user is become, who may not get there.
pub fn missing() -> Vec<PathBuf> {
    let Ok(own) = std::env::current_exe() else { return Vec::new() };
    let all = NAMES.into_iter().map(|name| own.with_file_name(name));
    all.filter(|path| !path.is_file()).collect()
}

/// Programs of this release.
pub fn check_own(missing: &[PathBuf]) -> Vec<Finding> {
    let finding = |severity, text: &str| Finding::new(CHECK, "pgstrata", severity, text);
    if missing.is_empty() {
        return vec![finding(
            Severity::Ok,
            "the services, and the library that is preloaded into computes, are beside it",
        )];
    }
    let text =
        |path: &PathBuf| format!("{} is not there: install the whole release", path.display());
    missing.iter().map(|path| finding(Severity::Danger, &text(path))).collect()
}

/// The programs of PostgreSQL in a directory, or the newest that is installed, and their major version. May hang.
pub fn postgres(asked: Option<&Path>) -> Result<(PathBuf, u32), String> {
    let found =
        find_postgres(asked).and_then(|path| major_version(&path).map(|major| (path, major)));
    found.map_err(|error| format!("{error:#}"))
}

/// PostgreSQL, and the version that the cluster is of, if there is one. Nothing comes back where it hangs.
pub fn check_postgres(found: Option<Result<(PathBuf, u32), String>>, own: Option<u32>) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, "postgres", severity, text);
    match (found, own) {
        (None, _) => finding(
            Severity::Danger,
            "it does not say its version in time: see whether its disk answers",
        ),
        (Some(Err(error)), _) => {
            finding(Severity::Danger, &format!("no compute can start here: {error}"))
        }
        (Some(Ok((path, major))), Some(own)) if major != own => {
            let text = format!(
                "no compute can start here: the cluster is of PostgreSQL {own}, and {} has {major}: name programs of the same \
                 version ('pgstrata up --pg-bin')",
                path.display()
            );
            finding(Severity::Danger, &text)
        }
        (Some(Ok((path, major))), _) => {
            finding(Severity::Ok, &format!("PostgreSQL {major} is in {}", path.display()))
        }
    }
}

/// The user whom PostgreSQL would run as where root runs this; none otherwise. `name` is the one that the cluster says.
pub fn check_user(name: Option<&str>) -> Option<Finding> {
    if !Uid::effective().is_root() {
        return None;
    }
    let name = name.unwrap_or(PG_USER);
    Some(user(name, User::from_name(name).ok().flatten().map(|user| user.uid.is_root())))
}

/// Whether the user is root, if there is one.
fn user(name: &str, is_root: Option<bool>) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, "user", severity, text);
    match is_root {
        Some(false) => finding(Severity::Ok, &format!("PostgreSQL runs as {name}")),
        Some(true) => finding(
            Severity::Danger,
            &format!("PostgreSQL does not run as {name}, who is root: name another (--pg-user)"),
        ),
        // Which 'up' makes.
        None if name == PG_USER => finding(
            Severity::Ok,
            &format!("'pgstrata up' makes the user {name}, as whom PostgreSQL runs"),
        ),
        None => finding(
            Severity::Danger,
            &format!("there is no user {name}, as whom PostgreSQL runs: make one"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_that_are_missing_are_named() {
        assert_eq!(check_own(&[])[0].severity, Severity::Ok);
        let found = check_own(&["/a/safekeeper".into(), "/a/pageserver".into()]);
        let texts: Vec<_> = found.iter().map(|finding| finding.text.as_str()).collect();
        let expected = [
            "/a/safekeeper is not there: install the whole release",
            "/a/pageserver is not there: install the whole release",
        ];
        assert_eq!(texts, expected);
        assert!(found.iter().all(|finding| finding.severity == Severity::Danger));
    }

    #[test]
    fn postgresql_is_of_the_clusters_version() {
        let found = |major| Some(Ok((PathBuf::from("/pg/bin"), major)));
        for (found, own, expected) in [
            (found(15), None, Severity::Ok),
            (found(18), Some(18), Severity::Ok),
            (found(18), Some(15), Severity::Danger),
            (Some(Err("none".to_owned())), None, Severity::Danger),
            (None, None, Severity::Danger),
        ] {
            assert_eq!(check_postgres(found.clone(), own).severity, expected, "{found:?} {own:?}");
        }
        assert_eq!(check_postgres(found(15), None).text, "PostgreSQL 15 is in /pg/bin");
        assert!(postgres(Some(Path::new("/nowhere"))).unwrap_err().contains("/nowhere"));
    }

    #[test]
    fn postgresql_has_a_user_that_is_not_root() {
        for (name, is_root, expected) in [
            ("postgres", Some(false), Severity::Ok),
            ("postgres", None, Severity::Ok),
            ("alice", None, Severity::Danger),
            ("root", Some(true), Severity::Danger),
        ] {
            assert_eq!(user(name, is_root).severity, expected, "{name} {is_root:?}");
        }
    }
}
