//! One client: startup, commands, and their answers.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use pgstrata_ids::{Lsn, TenantId, TimelineId};
use pgstrata_listen::{AsyncStream, Deed, Opened, Peer};
use pgstrata_wire::postgres::{
    BackendWriter, CONFIGURATION, Command, Frontend, StartupPacket, int8_column, parse, split,
    text_column,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::time::Instant;

use super::{PgState, stream};
use crate::timeline::Timeline;

/// SQLSTATE of those who may not do what they ask for.
const FORBIDDEN: &str = "42501";

/// A client that neither streams nor asks anything for this long is closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);

/// A message that has begun must have come whole by then.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);

/// A client that takes nothing of what is sent for this long is closed.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes received at once.
const RECEIVE_CHUNK: usize = 8 << 10;

/// A client's side of the connection.
#[derive(Debug)]
pub struct Receiver {
    half: ReadHalf<AsyncStream>,
    buffer: Vec<u8>,
}

impl Receiver {
    /// Waits for the next message; `None` if the client is gone.
    pub async fn next(&mut self) -> anyhow::Result<Option<Frontend>> {
        let mut deadline = Instant::now() + MESSAGE_TIMEOUT;
        loop {
            if let Some((message, size)) = split(&self.buffer)? {
                self.buffer.drain(..size);
                return Ok(Some(message));
            }
            let mut chunk = [0; RECEIVE_CHUNK];
            let count = match self.buffer.is_empty() {
                true => {
                    let count = self.half.read(&mut chunk).await?;
                    deadline = Instant::now() + MESSAGE_TIMEOUT;
                    count
                }
                false => tokio::time::timeout_at(deadline, self.half.read(&mut chunk))
                    .await
                    .context("a message did not come whole in time")??,
            };
            if count == 0 {
                return Ok(None);
            }
            self.buffer.extend_from_slice(&chunk[..count]);
        }
    }
}

/// The server's side.
#[derive(Debug)]
pub struct Sender {
    half: WriteHalf<AsyncStream>,
    pub out: BackendWriter,
}

impl Sender {
    /// Sends what was collected.
    pub async fn flush(&mut self) -> std::io::Result<()> {
        let sending = async {
            self.half.write_all(&self.out.bytes).await?;
            // What TLS holds back leaves too.
            self.half.flush().await
        };
        tokio::time::timeout(WRITE_TIMEOUT, sending).await??;
        self.out.bytes.clear();
        Ok(())
    }
}

/// What the client asked for when it connected.
#[derive(Debug)]
pub struct Session {
    pub state: PgState,
    pub timeline: Arc<Timeline>,
    /// True for a page server: its flush position says what it no longer needs.
    pub is_page_server: bool,
}

/// Serves one client until it leaves.
pub async fn run(opened: Opened, state: PgState) -> anyhow::Result<()> {
    let Opened { stream, peer, packet } = opened;
    let (read, write) = tokio::io::split(stream);
    let mut receiver = Receiver { half: read, buffer: Vec::new() };
    let mut sender = Sender { half: write, out: BackendWriter::default() };
    let session = match open(&packet, &peer, state).await {
        Ok(session) => session,
        Err((sqlstate, message)) => {
            sender.out.error(true, sqlstate, &message);
            sender.flush().await?;
            // It was told. A page server asks again and again for branches that never had a compute.
            tracing::debug!("a PostgreSQL client is refused: {message}");
            return Ok(());
        }
    };
    let version = format!("{}.0 (pgstrata)", session.timeline.parameters().pg_version);
    sender.out.welcome(&packet, &version);
    sender.flush().await?;
    loop {
        let next = tokio::time::timeout(IDLE_TIMEOUT, receiver.next()).await;
        match next.context("the client asked for nothing for a minute")?? {
            None | Some(Frontend::Terminate) => return Ok(()),
            Some(Frontend::Query(query)) => {
                receiver = session.query(&query, receiver, &mut sender).await?;
                sender.out.ready_for_query();
                sender.flush().await?;
            }
            Some(Frontend::Unsupported(kind)) => {
                let text =
                    format!("message '{}' is not for a replication connection", kind as char);
                sender.out.error(true, "0A000", &text);
                sender.flush().await?;
                bail!("{text}");
            }
            Some(Frontend::Password(_)) => bail!("a password was not asked for"),
            // What is left of a copy that has ended.
            Some(_) => {}
        }
    }
}

type Refused = (&'static str, String);

async fn open(packet: &StartupPacket, peer: &Peer, state: PgState) -> Result<Session, Refused> {
    let replication = packet.get("replication").unwrap_or_default().to_ascii_lowercase();
    if !["true", "on", "yes", "1", "database"].contains(&replication.as_str()) {
        let text =
            "a safekeeper serves replication connections only: connect with replication=true";
        return Err(("0A000", text.to_owned()));
    }
    let id = |name: &str| packet.setting(name);
    let timeline = match (id("pgstrata.tenant"), id("pgstrata.timeline")) {
        (Some(tenant), Some(timeline)) => {
            let invalid = |error: pgstrata_ids::IdError| ("22023", error.to_string());
            let tenant: TenantId = tenant.parse().map_err(invalid)?;
            let timeline: TimelineId = timeline.parse().map_err(invalid)?;
            // Before anything is said of what is there.
            let allowed = peer.check(Deed::FollowWal(tenant));
            allowed.map_err(|forbidden| (FORBIDDEN, forbidden.to_string()))?;
            let found = state.timelines.get_to_follow_async((tenant, timeline)).await;
            found.map_err(|reason| ("3D000", format!("timeline {timeline}: {reason}")))?
        }
        (None, None) => {
            let unnamed = || {
                let text = "say which timeline: options='-c pgstrata.tenant=<32 hexadecimal digits> \
                            -c pgstrata.timeline=<32 hexadecimal digits>'";
                ("3D000", text.to_owned())
            };
            let key = state.timelines.only_key().ok_or_else(unnamed)?;
            let allowed = peer.check(Deed::FollowWal(key.0));
            allowed.map_err(|forbidden| (FORBIDDEN, forbidden.to_string()))?;
            let found = state.timelines.get_to_follow_async(key).await;
            found.map_err(|reason| ("3D000", format!("timeline {}: {reason}", key.1)))?
        }
        _ => {
            let text = "pgstrata.tenant and pgstrata.timeline go together";
            return Err(("22023", text.to_owned()));
        }
    };
    let is_page_server = packet.setting("pgstrata.role").as_deref() == Some("pageserver");
    if is_page_server {
        let allowed = peer.check(Deed::NoteIngested);
        allowed.map_err(|forbidden| (FORBIDDEN, forbidden.to_string()))?;
    }
    Ok(Session { state, timeline, is_page_server })
}

impl Session {
    async fn query(
        &self,
        query: &str,
        receiver: Receiver,
        sender: &mut Sender,
    ) -> anyhow::Result<Receiver> {
        match parse(query) {
            Ok(Command::StartReplication { start, timeline, .. }) => {
                return self.start_replication(start, timeline, receiver, sender).await;
            }
            Ok(command) => self.answer(&command, &mut sender.out),
            Err(error) => sender.out.error(false, "42601", &error.to_string()),
        }
        Ok(receiver)
    }

    fn answer(&self, command: &Command, out: &mut BackendWriter) {
        let parameters = self.timeline.parameters();
        let timeline = parameters.pg_timeline.to_string();
        match command {
            Command::Empty => out.empty_query(),
            Command::IdentifySystem => {
                let columns = [
                    text_column("systemid"),
                    int8_column("timeline"),
                    text_column("xlogpos"),
                    text_column("dbname"),
                ];
                let system = parameters.system_id.to_string();
                let position = self.timeline.commit_lsn().to_string();
                let row = [Some(system.as_str()), Some(&timeline), Some(&position), None];
                out.result(&columns, Some(&row), "IDENTIFY_SYSTEM");
            }
            Command::Show(name) => match self.setting(name) {
                Some(value) => {
                    out.result(&[text_column("setting")], Some(&[Some(&value)]), "SHOW");
                }
                None => {
                    let text = format!("unrecognized configuration parameter \"{name}\"");
                    out.error(false, "42704", &text);
                }
            },
            // Slots hold nothing back: WAL stays readable from the archive after it was trimmed.
            Command::CreateSlot { name, logical: false } => {
                let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"];
                let row = [Some(name.as_str()), Some("0/0"), None, None];
                out.result(&columns.map(text_column), Some(&row), "CREATE_REPLICATION_SLOT");
            }
            Command::CreateSlot { .. } => {
                let text = "a safekeeper has no logical replication slots: decode on a compute";
                out.error(false, "0A000", text);
            }
            Command::ReadSlot(_) => {
                let columns = [
                    text_column("slot_type"),
                    text_column("restart_lsn"),
                    int8_column("restart_tli"),
                ];
                out.result(&columns, Some(&[None, None, None]), "READ_REPLICATION_SLOT");
            }
            Command::DropSlot(_) => out.command_complete("DROP_REPLICATION_SLOT"),
            Command::SetConfig => {
                out.result(&[text_column("set_config")], Some(&[Some("")]), "SELECT 1");
            }
            Command::TimelineHistory(number) => {
                let text = format!("this safekeeper has no history file of timeline {number}");
                out.error(false, "58P01", &text);
            }
            Command::BaseBackup(_) => {
                let text = "a safekeeper has WAL only: take base backups from the page server";
                out.error(false, "0A000", text);
            }
            Command::StartReplication { .. } => {}
        }
    }

    fn setting(&self, name: &str) -> Option<String> {
        let parameters = self.timeline.parameters();
        Some(match name {
            "wal_segment_size" => match parameters.segment_size >> 20 {
                1024 => "1GB".to_owned(),
                megabytes => format!("{megabytes}MB"),
            },
            "data_directory_mode" => "0700".to_owned(),
            "server_version" => format!("{}.0", parameters.pg_version),
            "server_version_num" => format!("{}0000", parameters.pg_version),
            CONFIGURATION => self.timeline.configuration_number().to_string(),
            "integer_datetimes" => "on".to_owned(),
            "wal_block_size" | "block_size" => "8192".to_owned(),
            _ => return None,
        })
    }

    async fn start_replication(
        &self,
        start: Lsn,
        timeline: Option<u32>,
        receiver: Receiver,
        sender: &mut Sender,
    ) -> anyhow::Result<Receiver> {
        let ours = self.timeline.parameters().pg_timeline;
        if let Some(wanted) = timeline.filter(|&wanted| wanted != ours) {
            let text = format!("timeline {wanted} was asked for, this WAL is of timeline {ours}");
            sender.out.error(false, "55000", &text);
            return Ok(receiver);
        }
        stream::run(self, start, receiver, sender).await
    }
}
