//! The object store: whether it can be read and written, and whose it is.

use std::path::Path;

use anyhow::{Context, Result};
use pgstrata_blob::claim::Found;
use pgstrata_blob::{Location, Store};

use super::finding::{Finding, Severity};
use crate::cluster::Cluster;
use crate::cluster_file::Archive;
use crate::{claim, http};

const CHECK: &str = "store";
const OBJECT: &str = "objects";

/// What came of a probe.
#[derive(Debug, PartialEq, Eq)]
pub enum Probed {
    /// It is written and read, and keeps two writers apart if this is true.
    Written(bool),
    /// It is read; that it is written was not tried.
    Read,
    /// It is not, and why.
    Failed(String),
    /// It asks for credentials that this command was not given, and why.
    Closed(String),
}

/// Whether S3 was asked without credentials in our environment.
fn is_closed(location: &str) -> bool {
    let is_s3 = matches!(location.parse(), Ok(Location::S3 { .. }));
    is_s3 && std::env::var_os("AWS_ACCESS_KEY_ID").is_none()
}

fn probed(location: &str, tried: Result<Probed>) -> Probed {
    tried.unwrap_or_else(|error| match is_closed(location) {
        true => Probed::Closed(format!("{error:#}")),
        false => Probed::Failed(format!("{error:#}")),
    })
}

/// Tries that of a local cluster, as `up` does before it starts anything. May hang.
pub fn probe(cluster: &Cluster) -> Probed {
    let tried = claim::look(cluster)
        .and_then(|store| http::block_on(async { Ok(Probed::Written(store.check().await?)) }));
    probed(&cluster.object_store(), tried)
}

/// Reads that of a cluster elsewhere: writing it is for its services. May hang.
pub fn read((location, s3_endpoint): &Archive) -> Probed {
    let tried = || -> Result<Probed> {
        let parsed: Location = location.parse()?;
        if let Location::Directory(path) = &parsed {
            // Opening would make one.
            Path::is_dir(path).then_some(()).with_context(|| format!("{location} is not there"))?;
        }
        let store = Store::open(&parsed, s3_endpoint.as_deref())?;
        http::block_on(async { Ok(Found::read(&store).await?) })?;
        Ok(Probed::Read)
    };
    probed(location, tried())
}

/// What a probe says. One that did not come back in time is `None`.
pub fn check(location: &str, probed: Option<Probed>) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, OBJECT, severity, text);
    match probed {
        Some(Probed::Written(true)) => {
            finding(Severity::Ok, &format!("{location} is read and written"))
        }
        Some(Probed::Written(false)) => {
            let text = format!(
                "{location} ignores 'If-None-Match' or 'If-Match', with which two page servers are kept from overwriting each \
                 other: use one that honours both"
            );
            finding(Severity::Danger, &text)
        }
        Some(Probed::Read) => finding(
            Severity::Ok,
            &format!("{location} is read from here; whether it is written, its services say"),
        ),
        Some(Probed::Failed(why)) => finding(Severity::Danger, &why),
        Some(Probed::Closed(why)) => {
            let text = format!("not looked at, for want of credentials (AWS_ACCESS_KEY_ID): {why}");
            finding(Severity::Unknown, &text)
        }
        None => finding(
            Severity::Danger,
            &format!("{location} does not answer: see its disk, or its network"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_fails_is_told_from_one_that_is_closed_to_us() {
        for (probed, expected) in [
            (Some(Probed::Written(true)), Severity::Ok),
            (Some(Probed::Written(false)), Severity::Danger),
            (Some(Probed::Read), Severity::Ok),
            (Some(Probed::Failed("no".into())), Severity::Danger),
            (Some(Probed::Closed("no".into())), Severity::Unknown),
            (None, Severity::Danger),
        ] {
            assert_eq!(check("/objects", probed).severity, expected);
        }
    }

    #[test]
    fn a_directory_is_read_and_never_made() {
        let directory = tempfile::tempdir().unwrap();
        let of = |name: &str| (directory.path().join(name).display().to_string(), None);
        assert_eq!(read(&of("")), Probed::Read);
        let Probed::Failed(why) = read(&of("none")) else { panic!("it is there") };
        assert!(why.ends_with("none is not there"), "{why}");
        assert!(!directory.path().join("none").exists());
    }
}
