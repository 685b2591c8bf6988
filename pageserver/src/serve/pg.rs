//! PostgreSQL's replication protocol on the page server: `pg_basebackup` at any LSN.
//!
//! The branch and the LSN come in the connection's options:
//! `options='-c pgstrata.branch=main -c pgstrata.lsn=0/1A2B3C8'`. The backup is a directory that
//! was shut down cleanly at that LSN, so it needs no recovery.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use pgstrata_ids::{Lsn, TimelineId};
use pgstrata_listen::{Deed, Peer, Security};
use pgstrata_wire::postgres::{BackendWriter, Command, Frontend, parse};
use tokio::net::TcpListener;

use crate::directory::CleanShutdown;
use crate::repository::{Moment, Repository};
use crate::serve::backup;
use crate::serve::protocol::Client;
use crate::timeline::Timeline;

/// Base backups at once: each reads everything.
const SESSIONS: usize = 64;

/// What a client's options may say to us.
const OPTIONS: [&str; 3] = ["pgstrata.branch", "pgstrata.timeline", "pgstrata.lsn"];

/// Accepts connections until the process ends.
pub async fn serve(listeners: Vec<TcpListener>, repository: Arc<Repository>, security: Security) {
    let greet = move |tcp| {
        let security = security.clone();
        async move { pgstrata_listen::postgres(tcp, &security).await }
    };
    let serve = move |(stream, peer, packet)| {
        if let Err(error) = session(Client::new(stream, packet), &peer, &repository) {
            tracing::debug!("replication connection: {error:#}");
        }
    };
    pgstrata_listen::threads(listeners, "replication", SESSIONS, greet, serve).await;
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

fn target(client: &Client, peer: &Peer, repository: &Repository) -> Result<Target> {
    let options: HashMap<_, _> = client.packet.settings().into_iter().collect();
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
    peer.check(Deed::TakeBackup(timeline.info.tenant))?;
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

fn session(mut client: Client, peer: &Peer, repository: &Repository) -> Result<()> {
    if client.packet.get("replication").is_none_or(|value| value == "false") {
        let text = "the page server answers replication connections only (pg_basebackup); connect \
                    to a compute for SQL";
        return Ok(client.error(true, "0A000", text)?);
    }
    let target = match target(&client, peer, repository) {
        Ok(target) => target,
        Err(error) => return Ok(client.error(true, "22023", &format!("{error:#}"))?),
    };
    client.welcome(&format!("{}.0", target.timeline.info.version.major()))?;
    while let Some(message) = client.read()? {
        match message {
            Frontend::Terminate => break,
            Frontend::Query(text) => {
                if let Err(error) = query(&mut client, &target, &text) {
                    client.error(false, "XX000", &format!("{error:#}"))?;
                }
                client.ready()?;
            }
            // What is left of a copy that ended: also flush and sync.
            Frontend::Status(_)
            | Frontend::CopyData
            | Frontend::CopyDone
            | Frontend::CopyFail
            | Frontend::Unsupported(b'H' | b'S') => {}
            Frontend::Password(_) => bail!("a password is not expected"),
            Frontend::Unsupported(kind) => {
                bail!("message {:?} is not expected", char::from(kind));
            }
        }
    }
    Ok(())
}

fn query(client: &mut Client, target: &Target, text: &str) -> Result<()> {
    let info = &target.timeline.info;
    match parse(text)? {
        Command::Empty => client.say(BackendWriter::empty_query)?,
        Command::IdentifySystem => {
            let row = vec![
                Some(info.system_id.to_string()),
                Some("1".into()),
                Some(target.shutdown.end.to_string()),
                None,
            ];
            let columns = ["systemid", "timeline", "xlogpos", "dbname"];
            client.result(&columns, &[row], "IDENTIFY_SYSTEM")?;
        }
        Command::Show(name) => {
            let value = match name.as_str() {
                "wal_segment_size" => format!("{}MB", info.segment_size >> 20),
                "data_directory_mode" => "0700".into(),
                "server_version" => format!("{}.0", info.version.major()),
                "server_version_num" => format!("{}", info.version.major() * 10_000),
                _ => bail!("the page server has no setting \"{name}\""),
            };
            client.result(&[&name], &[vec![Some(value)]], "SHOW")?;
        }
        Command::CreateSlot { name, .. } => {
            // Nothing needs holding back: the history is kept anyway.
            let row = vec![Some(name), Some(target.shutdown.checkpoint.to_string()), None, None];
            let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"];
            client.result(&columns, &[row], "CREATE_REPLICATION_SLOT")?;
        }
        Command::DropSlot(_) => client.complete("DROP_REPLICATION_SLOT")?,
        Command::StartReplication { start, .. } => {
            stream_wal(client, &target.shutdown, start)?;
            client.complete("START_STREAMING")?;
        }
        Command::BaseBackup(options) => backup::send(client, target, &options)?,
        Command::SetConfig => {
            client.result(&["set_config"], &[vec![Some(String::new())]], "SELECT 1")?;
        }
        Command::TimelineHistory(_) | Command::ReadSlot(_) => {
            bail!("the page server answers what a base backup asks: ask a safekeeper for WAL")
        }
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
    client.say(BackendWriter::copy_both)?;
    let mut at = from;
    while at < shutdown.end {
        let start = (at - shutdown.segment_start) as usize;
        let end = ((shutdown.end - shutdown.segment_start) as usize).min(start + 128 * 1024);
        let bytes = &shutdown.segment[start..end];
        client.say(|out| {
            let Ok(()) = out.xlog_data(at, shutdown.end, 0, |out| {
                out.extend_from_slice(bytes);
                Ok::<_, std::convert::Infallible>(())
            });
        })?;
        at = shutdown.segment_start + end as u64;
    }
    client.flush()?;
    loop {
        match client.read()? {
            None => bail!("the client went away"),
            Some(Frontend::CopyDone) => break,
            Some(Frontend::Terminate) => bail!("the client ended the session in a copy"),
            // Answered so that the client looks at its end position.
            Some(Frontend::Status(_) | Frontend::CopyData) => {
                client.say(|out| out.keepalive(shutdown.end, 0, false))?;
                client.flush()?;
            }
            Some(_) => {}
        }
    }
    Ok(client.say(BackendWriter::copy_done)?)
}
