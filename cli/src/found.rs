//! `found`: the first branch of a page server that has none, for those who start the services
//! themselves; `up` does the same on its own.

use std::env::VarError;
use std::io::{PipeReader, Write};
use std::os::unix::fs::fchown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{Uid, User};
use pgstrata_http_client::Access;
use pgstrata_identity::Identity;
use pgstrata_ids::TenantId;
use pgstrata_wire::http::pageserver::Branch;

use crate::cluster::{ensure_user, find_postgres};
use crate::http::Service;
use crate::remote::Remote;
use crate::services::Services;
use crate::{files, out, process};

/// Where the password of the superuser is given: a command line is for everybody on the machine to read.
const PASSWORD: &str = "POSTGRES_PASSWORD";

/// Arguments of `found`.
#[derive(clap::Args)]
pub struct FoundArguments {
    /// HTTP interface of the page server, host:port [default: the one that the broker of --cluster names]
    #[arg(long)]
    pub pageserver_http: Option<String>,
    /// Directory with the certificate to show to it: an admin's
    #[arg(long, value_name = "DIR", requires = "pageserver_http")]
    tls: Option<PathBuf>,
    /// Name of the branch
    #[arg(long, default_value = "main")]
    branch: String,
    /// Tenant that it is of: computes need a certificate of this one [default: a new one]
    #[arg(long)]
    tenant: Option<TenantId>,
    /// Directory of PostgreSQL's programs [default: the newest of 15 to 18 that is installed]
    #[arg(long, env = "PGSTRATA_PG_BIN")]
    pg_bin: Option<PathBuf>,
    /// User that initdb runs as when this is run by root
    #[arg(long, default_value = "postgres")]
    pg_user: String,
    /// Make the cluster with page checksums, also before PostgreSQL 18, where they are the default
    #[arg(long)]
    data_checksums: bool,
}

/// The page server that was named, or that of a cluster elsewhere.
fn pageserver(arguments: &FoundArguments, remote: Option<&Remote>) -> Result<Service> {
    let access = match &arguments.tls {
        None => Access::Local,
        Some(directory) => Access::Certificate(Identity::open(directory)?),
    };
    match (&arguments.pageserver_http, remote) {
        (Some(address), _) => Ok(Service::pageserver_by(address, &access)),
        (None, Some(remote)) => remote.pageserver(),
        (None, None) => bail!("no page server is named: give --pageserver-http, or --cluster"),
    }
}

/// Makes the branch by `initdb`, unless it is there.
pub fn found(arguments: &FoundArguments, remote: Option<&Remote>) -> Result<()> {
    let pageserver = pageserver(arguments, remote)?;
    let name = &arguments.branch;
    let rows: Vec<Branch> = pageserver.get("/v1/branches", &[])?;
    if rows.iter().any(|row| row.name == *name) {
        return out::line(&format!("branch {name} is there"));
    }
    let pg_bin = find_postgres(arguments.pg_bin.as_deref())?;
    let user = match ensure_user(&arguments.pg_user)? {
        Some(user) if Uid::effective().is_root() => User::from_name(&user)?,
        _ => None,
    };
    let temporary = tempfile::Builder::new().prefix("pgstrata-found-").tempdir()?;
    let password = match std::env::var(PASSWORD) {
        Ok(password) => Some(password),
        Err(VarError::NotPresent) => None,
        Err(VarError::NotUnicode(_)) => {
            bail!("{PASSWORD} is not UTF-8, which a password has to be")
        }
    };
    let make = Make { data_checksums: arguments.data_checksums, password };
    let archive = initdb(&pg_bin, temporary.path(), user.as_ref(), &make)?;
    let tenant = arguments.tenant.unwrap_or_else(|| TenantId(rand::random())).to_string();
    import(pageserver, &tenant, name, &archive)?;
    out::line(&format!("branch {name} was made"))
}

/// What is special about a new database.
#[derive(Default)]
pub struct Make {
    /// Its pages have checksums, whatever the version's default.
    pub data_checksums: bool,
    /// The superuser's password. Without one nobody connects as him where a password is asked for.
    pub password: Option<String>,
}

/// A new database, as stock PostgreSQL makes it, as a tar, made in `parent`, which becomes `user`'s. Everything in it is
/// read by that user as well: who could put links into it reads nothing by them that he could not read himself.
pub fn initdb(pg_bin: &Path, parent: &Path, user: Option<&User>, make: &Make) -> Result<Vec<u8>> {
    let directory = parent.join("data");
    let as_user = |program: &Path| {
        let mut command = Command::new(program);
        command.current_dir("/").env("LC_ALL", "C.UTF-8");
        if let Some(user) = user {
            command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).env("HOME", "/");
        }
        command
    };
    files::own_directory(parent, 0o700, user, None)?;
    let mut command = as_user(&pg_bin.join("initdb"));
    command
        .arg("-D")
        .arg(&directory)
        .args(["-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", "-N"])
        .args(make.data_checksums.then_some("--data-checksums"));
    let input = match &make.password {
        None => Stdio::null(),
        Some(password) => {
            command.arg("--pwfile=/dev/stdin");
            pipe_with(password, user)?.into()
        }
    };
    let output = process::output_of(&mut command, input).context("can't run initdb")?;
    if !output.status.success() {
        bail!("initdb failed: {}", cause(&output.stderr));
    }
    let mut command = as_user(Path::new("tar"));
    command.args(["--format=ustar", "--sort=name", "-cf", "-", "-C"]).arg(&directory).args(PARTS);
    let output = process::output(&mut command).context("can't run tar")?;
    if !output.status.success() {
        bail!("tar failed: {}", cause(&output.stderr));
    }
    Ok(output.stdout)
}

/// What a password has at most, in bytes: it is to go into a pipe that nobody reads yet.
const MAX_PASSWORD: usize = 1024;

/// The end of a pipe from which `user`, and nobody else, reads a password: no file is left by whatever happens.
fn pipe_with(password: &str, user: Option<&User>) -> Result<PipeReader> {
    // PostgreSQL takes the first line, and would not say that there is more.
    ensure!(
        !password.is_empty() && !password.contains(['\n', '\r']),
        "{PASSWORD} is empty or has a line break: a password is one line"
    );
    let size = password.len();
    ensure!(
        size <= MAX_PASSWORD,
        "{PASSWORD} has {size} bytes, and can't have more than {MAX_PASSWORD}"
    );
    let (reader, mut writer) = std::io::pipe().context("can't make a pipe")?;
    if let Some(user) = user {
        // initdb opens it anew, by its name.
        fchown(&reader, Some(user.uid.as_raw()), Some(user.gid.as_raw()))
            .context("can't give a pipe away")?;
    }
    writer.write_all(password.as_bytes()).context("can't write into a pipe")?;
    Ok(reader)
}

/// Lines of a failed program's output that are shown, at most.
const CAUSE_LINES: usize = 3;

/// Why a program failed, of what it wrote, in one line. `initdb` says that first, and last what it removes.
fn cause(output: &[u8]) -> String {
    const MARKS: &[&str] = &["error:", "FATAL:", "PANIC:"];
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let is_cause = |line: &&str| MARKS.iter().any(|mark| line.contains(mark));
    let mut shown: Vec<_> = lines.iter().copied().filter(is_cause).take(CAUSE_LINES).collect();
    if shown.is_empty() {
        shown = lines[lines.len().saturating_sub(CAUSE_LINES)..].to_vec();
    }
    match shown.is_empty() {
        true => "without a word".into(),
        false => shown.join("; "),
    }
}

/// What the page server wants of a data directory.
const PARTS: &[&str] = &["base", "global", "pg_xact", "pg_multixact", "pg_commit_ts"];

/// Makes a tar of a data directory a tenant's first branch.
pub fn import(pageserver: Service, tenant: &str, name: &str, archive: &[u8]) -> Result<()> {
    let timeline = pgstrata_ids::TimelineId(rand::random()).to_string();
    let query = [("tenant", tenant), ("timeline", timeline.as_str()), ("name", name)];
    pageserver.patient()?.post::<Branch>("/v1/import", &query, archive).map(drop)
}

#[cfg(test)]
mod tests {
    use super::cause;

    #[test]
    fn the_cause_is_shown_and_not_what_is_removed_afterwards() {
        let full = b"initdb: error: could not write file \"x/base\": No space left on device\n\
                     initdb: removing data directory \"x\"\n";
        let expected = "initdb: error: could not write file \"x/base\": No space left on device";
        assert_eq!(cause(full), expected);
        let bootstrap =
            b"2026-01-01 UTC [7] FATAL:  could not write to file: No space left on device\n\
                          child process exited with exit code 1\n\
                          initdb: removing data directory \"x\"\n";
        assert!(
            cause(bootstrap).ends_with("FATAL:  could not write to file: No space left on device")
        );
        assert_eq!(cause(b"one\n\ntwo\nthree\nfour\n"), "two; three; four");
        assert_eq!(cause(b"\n"), "without a word");
    }
}
