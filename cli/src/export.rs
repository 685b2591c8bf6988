//! `cluster export`: writes the file that `--cluster` names.

use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, anyhow, ensure};
use pgstrata_identity::SmallFile;

use crate::auth::writing;
use crate::cluster::Cluster;
use crate::cluster_file::{ClusterFile, Written, read_token};
use crate::out;
use crate::remote::Remote;

/// Verbs of `cluster`.
#[derive(clap::Subcommand)]
pub enum ClusterVerb {
    /// Write the file that --cluster names, and ask the broker once with it
    ///
    /// Without options it is of the local cluster in --dir, which 'up' made, and works on this machine:
    ///
    ///   pgstrata cluster export here.toml
    ///
    /// Of services on other machines it needs the broker's URL, and what is shown to them: the certificate of an admin, or a
    /// token with the certificates of the CAs whose services it is shown to.
    ///
    ///   pgstrata cluster export prod.toml --broker https://broker.example.org:50051 --tls pki/admin-me
    ///   pgstrata cluster export prod.toml --broker https://broker.example.org:50051 --ca pki/ca.pem --token-file token
    ///
    /// A token is copied into the file, which nobody else can read. Directories and other files are named in it: those beside
    /// it, or below, relative to it, so that all of it may be moved together.
    #[command(verbatim_doc_comment)]
    Export(ExportArguments),
}

/// Arguments of `cluster export`.
#[derive(clap::Args)]
pub struct ExportArguments {
    /// File to write; one that this command wrote is replaced
    file: PathBuf,
    /// URL of the broker [default: that of the local cluster]
    #[arg(long)]
    broker: Option<String>,
    /// Certificates of CAs whose services a token is shown to
    #[arg(long, requires = "broker")]
    ca: Option<PathBuf>,
    /// Directory of the certificate to show, as 'pgstrata auth issue --role admin' makes it
    #[arg(long, value_name = "DIR", requires = "broker", conflicts_with = "token_file")]
    tls: Option<PathBuf>,
    /// File with the token to show, as 'pgstrata auth token' prints it
    #[arg(long, value_name = "FILE", requires = "broker")]
    token_file: Option<PathBuf>,
    /// HTTP interface of the page server, host:port [default: the one that the broker names]
    #[arg(long, requires = "broker")]
    pageserver_http: Option<String>,
    /// Object store, for WAL that safekeepers no longer keep
    #[arg(long, requires = "broker")]
    object_store: Option<String>,
    /// Endpoint of an S3 server other than AWS
    #[arg(long, requires = "object_store")]
    s3_endpoint: Option<String>,
}

/// Bytes of a file in the place of ours that are looked at, at most.
const LIMIT_BYTES: u64 = 64 << 10;

/// A path as it is written into a file in this directory, both absolute.
fn from_directory(path: &Path, directory: &Path) -> Result<String> {
    let path = path.canonicalize().with_context(|| format!("can't find {}", path.display()))?;
    let written = path.strip_prefix(directory).unwrap_or(&path);
    let text = written.to_str();
    Ok(text.with_context(|| format!("{} is no text", path.display()))?.to_owned())
}

fn of_others(arguments: &ExportArguments, broker: &str, directory: &Path) -> Result<Written> {
    let named = |path: &Option<PathBuf>| {
        path.as_ref().map(|path| from_directory(path, directory)).transpose()
    };
    Ok(Written {
        broker: broker.to_owned(),
        ca: named(&arguments.ca)?,
        tls: named(&arguments.tls)?,
        token: arguments.token_file.as_deref().map(read_token).transpose()?,
        token_file: None,
        pageserver_http: arguments.pageserver_http.clone(),
        object_store: arguments.object_store.clone(),
        s3_endpoint: arguments.s3_endpoint.clone(),
    })
}

fn of_local(cluster: &Cluster) -> Written {
    Written {
        broker: format!("http://127.0.0.1:{}", cluster.state.broker),
        object_store: Some(cluster.object_store()),
        s3_endpoint: cluster.state.s3_endpoint.clone(),
        ..Written::default()
    }
}

/// Refuses to write over what is something else.
fn check_place(path: &Path) -> Result<()> {
    if !path.try_exists().with_context(|| format!("can't look at {}", path.display()))? {
        return Ok(());
    }
    let remedy = "name another file to write";
    let there = SmallFile::read(path, LIMIT_BYTES, remedy)?;
    ensure!(
        Written::parse(&there.bytes).is_ok(),
        "{} is there already, and is no cluster's file: {remedy}",
        path.display()
    );
    Ok(())
}

/// `cluster export`.
pub fn export(arguments: &ExportArguments, open: impl FnOnce() -> Result<Cluster>) -> Result<()> {
    // Before root becomes a cluster's owner, who may see another directory in the place of a relative one.
    let path = absolute(&arguments.file)?;
    let name = path.file_name().and_then(|name| name.to_str()).context("FILE is no file's name")?;
    let directory = path.parent().context("FILE is no file's name")?;
    let directory = directory
        .canonicalize()
        .with_context(|| format!("can't write to {}", directory.display()))?;
    let written = match &arguments.broker {
        Some(broker) => of_others(arguments, broker, &directory)?,
        None => of_local(&open()?),
    };
    let path = directory.join(name);
    check_place(&path)?;
    // As whoever uses it will read it.
    let text = written.to_text();
    let written = Written::parse(text.as_bytes()).map_err(|why| anyhow!("{why}"))?;
    let remote = Remote::of(&path, ClusterFile::of(written, &directory)?);
    writing::put(&directory, name, &text, writing::PRIVATE)?;
    match remote.nodes() {
        Ok(nodes) => out::line(&format!(
            "{}: the broker {} lists {} services",
            path.display(),
            remote.broker_url(),
            nodes.len()
        )),
        Err(error) => {
            eprintln!(
                "pgstrata: warning: {} is written, but does not work now: {error:#}",
                path.display()
            );
            Ok(())
        }
    }
}
