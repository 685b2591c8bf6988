//! PostgreSQL's replication protocol on the page server: `pg_basebackup` at any LSN.
//!
//! The branch and the LSN come in the connection's options:
//! `options='-c pgstrata.branch=main -c pgstrata.lsn=0/1A2B3C8'`. The backup is a directory that
//! was shut down cleanly at that LSN, so it needs no recovery.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use pgstrata_ids::{Lsn, TimelineId};
use tokio::net::TcpListener;

use crate::directory::CleanShutdown;
use crate::repository::{Moment, Repository};
use crate::serve::backup;
use crate::serve::protocol::Client;
use crate::timeline::Timeline;

/// Base backups at once: each reads everything.
const SESSIONS: usize = 64;
/// The least that any client begins with: a length and a code.
const FIRST_BYTES: usize = 8;

/// What a client's options may say to us.
const OPTIONS: [&str; 3] = ["pgstrata.branch", "pgstrata.timeline", "pgstrata.lsn"];

/// Accepts connections until the process ends.
pub async fn serve(listener: TcpListener, repository: Arc<Repository>) {
    pgstrata_listen::threads(listener, "replication", FIRST_BYTES, SESSIONS, move |stream| {
        if let Err(error) = session(stream, &repository) {
            tracing::debug!("replication connection: {error:#}");
        }
    })
    .await;
}

/// A client's branch, and the moment that all of its session is about.
pub struct Target {
    /// The branch.
    pub timeline: Arc<Timeline>,
    /// As of when.
    pub lsn: Lsn,
    /// The clean shutdown that ends the backup's WAL.
    pub shutdown: CleanShutdown,
}

/// How long a backup waits for what it is taken of.
const PATIENCE: Duration = Duration::from_secs(60);

fn target(client: &Client, repository: &Repository) -> Result<Target> {
    let options = client.options();
    // With a misspelt one the backup would be of something else than what was asked for.
    let ours = |name: &&String| name.starts_with("pgstrata.");
    if let Some(name) = options.keys().filter(ours).find(|name| !OPTIONS.contains(&name.as_str())) {
        bail!("there is no option {name}: there are {}", OPTIONS.join(", "));
    }
    let timeline = match (options.get("pgstrata.timeline"), options.get("pgstrata.branch")) {
        (Some(id), _) => repository.timeline(id.parse::<TimelineId>()?)?,
        (None, Some(name)) => repository.branch(name)?,
        (None, None) => repository.branch("main")?,
    };
    let moment = match options.get("pgstrata.lsn") {
        Some(lsn) => Moment::Lsn(lsn.parse()?),
        None => Moment::Now,
    };
    let (lsn, record_start) = repository.resolve_moment(&timeline, moment)?;
    timeline.wait(lsn, PATIENCE).map_err(anyhow::Error::msg)?;
    let state = timeline.control_state(lsn)?;
    let shutdown = CleanShutdown::new(&state, timeline.info.segment_size, lsn, record_start);
    Ok(Target { timeline, lsn, shutdown })
}

fn session(stream: TcpStream, repository: &Repository) -> Result<()> {
    let Some(mut client) = Client::accept(stream)? else { return Ok(()) };
    if client.parameters.get("replication").is_none_or(|value| value == "false") {
        let text = "the page server answers replication connections only (pg_basebackup); connect \
                    to a compute for SQL";
        return Ok(client.error(true, "0A000", text)?);
    }
    let target = match target(&client, repository) {
        Ok(target) => target,
        Err(error) => return Ok(client.error(true, "22023", &format!("{error:#}"))?),
    };
    client.welcome(&format!("{}.0", target.timeline.info.version.major()))?;
    while let Some((kind, body)) = client.read()? {
        match kind {
            b'X' => break,
            b'Q' => {
                let text = String::from_utf8_lossy(&body);
                let text = text.trim_end_matches('\0').trim().trim_end_matches(';');
                if let Err(error) = query(&mut client, &target, text) {
                    client.error(false, "XX000", &format!("{error:#}"))?;
                }
                client.ready()?;
            }
            // What is left of a copy that ended.
            b'd' | b'c' | b'f' | b'H' | b'S' => {}
            other => bail!("message {:?} is not expected", char::from(other)),
        }
    }
    Ok(())
}

fn query(client: &mut Client, target: &Target, text: &str) -> Result<()> {
    let mut words = text.split_ascii_whitespace();
    let command = words.next().unwrap_or_default().to_ascii_uppercase();
    let info = &target.timeline.info;
    match command.as_str() {
        "IDENTIFY_SYSTEM" => {
            let row = vec![
                Some(info.system_id.to_string()),
                Some("1".into()),
                Some(target.shutdown.end.to_string()),
                None,
            ];
            client.rows(&["systemid", "timeline", "xlogpos", "dbname"], &[row])?;
            client.complete("IDENTIFY_SYSTEM")?;
        }
        "SHOW" => {
            let name = words.next().unwrap_or_default().to_ascii_lowercase();
            let value = match name.as_str() {
                "wal_segment_size" => format!("{}MB", info.segment_size >> 20),
                "data_directory_mode" => "0700".into(),
                "server_version" => format!("{}.0", info.version.major()),
                "server_version_num" => format!("{}", info.version.major() * 10_000),
                _ => bail!("the page server has no setting \"{name}\""),
            };
            client.rows(&[&name], &[vec![Some(value)]])?;
            client.complete("SHOW")?;
        }
        "CREATE_REPLICATION_SLOT" => {
            // Nothing needs holding back: the history is kept anyway.
            let name = words.next().unwrap_or_default().trim_matches('"').to_owned();
            let row = vec![Some(name), Some(target.shutdown.checkpoint.to_string()), None, None];
            let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"];
            client.rows(&columns, &[row])?;
            client.complete("CREATE_REPLICATION_SLOT")?;
        }
        "DROP_REPLICATION_SLOT" => client.complete("DROP_REPLICATION_SLOT")?,
        "START_REPLICATION" => {
            let from = text
                .split_ascii_whitespace()
                .find_map(|word| word.parse::<Lsn>().ok())
                .context("START_REPLICATION without an LSN")?;
            stream_wal(client, &target.shutdown, from)?;
            client.complete("START_STREAMING")?;
        }
        "BASE_BACKUP" => backup::send(client, target, &text[command.len()..])?,
        _ => bail!("the page server does not know the command \"{command}\""),
    }
    Ok(())
}

/// Sends the segment that ends in the clean shutdown, and waits for the client to have enough.
fn stream_wal(client: &mut Client, shutdown: &CleanShutdown, from: Lsn) -> Result<()> {
    if from < shutdown.segment_start || from > shutdown.end {
        bail!(
            "WAL from {from} is not here: a backup's WAL is {} to {}",
            shutdown.segment_start,
            shutdown.end
        );
    }
    client.send(b'W', &[0, 0, 0])?;
    let mut at = from;
    while at < shutdown.end {
        let start = (at - shutdown.segment_start) as usize;
        let end = ((shutdown.end - shutdown.segment_start) as usize).min(start + 128 * 1024);
        let mut body = vec![b'w'];
        body.extend_from_slice(&at.0.to_be_bytes());
        body.extend_from_slice(&shutdown.end.0.to_be_bytes());
        body.extend_from_slice(&[0; 8]);
        body.extend_from_slice(&shutdown.segment[start..end]);
        client.send(b'd', &body)?;
        at = shutdown.segment_start + end as u64;
    }
    client.flush()?;
    loop {
        match client.read()? {
            None => bail!("the client went away"),
            Some((b'c', _)) => break,
            Some((b'X', _)) => bail!("the client ended the session in a copy"),
            // A status update: answer so that the client looks at its end position.
            Some((b'd', _)) => {
                let mut body = vec![b'k'];
                body.extend_from_slice(&shutdown.end.0.to_be_bytes());
                body.extend_from_slice(&[0; 9]);
                client.send(b'd', &body)?;
                client.flush()?;
            }
            Some(_) => {}
        }
    }
    Ok(client.send(b'c', &[])?)
}
