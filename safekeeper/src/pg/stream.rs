//! Sending committed WAL as it comes.

use std::time::Duration;

use anyhow::bail;
use pgstrata_ids::Lsn;
use pgstrata_wire::postgres::{Frontend, StandbyStatus};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::postgres_time_us;
use super::session::{Receiver, Sender, Session};
use crate::chain_reader::ChainReader;
use crate::verifier::{Next, Verifier};

/// Most WAL in one message, in bytes (`MAX_SEND_SIZE` of walsender.c).
const MAX_SEND: usize = 128 << 10;

/// Silence after which a keepalive is sent.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);

/// Silence of the client after which it is given up.
const DEAD_AFTER: Duration = Duration::from_secs(60);

/// Client's messages not yet looked at.
const INBOX: usize = 16;

/// Streams from `start` until the client ends it. Returns the receiver for the next command.
pub async fn run(
    session: &Session,
    start: Lsn,
    receiver: Receiver,
    sender: &mut Sender,
) -> anyhow::Result<Receiver> {
    let (inbox_in, inbox) = mpsc::channel(INBOX);
    // Receiving is a task of its own so that a long send never leaves status updates unread.
    let receiving = tokio::spawn(receive(receiver, inbox_in));
    let archive = session.state.archive.clone();
    let reader =
        ChainReader::new(session.state.timelines.clone(), session.timeline.clone(), archive);
    sender.out.copy_both();
    sender.flush().await?;
    let heard = Instant::now();
    let mut streaming = Streaming { session, reader, at: start, verifier: None, inbox, heard };
    let ended = streaming.run(sender).await;
    if let Err(error) = &ended {
        sender.out.error(false, "58P01", &error.to_string());
        sender.flush().await?;
        receiving.abort();
        bail!("{error:#}");
    }
    drop(streaming);
    sender.out.copy_done();
    sender.out.command_complete("START_REPLICATION");
    receiving.await?
}

/// Passes messages on until the copy ends.
async fn receive(
    mut receiver: Receiver,
    inbox: mpsc::Sender<Frontend>,
) -> anyhow::Result<Receiver> {
    loop {
        let Some(message) = receiver.next().await? else { bail!("the client is gone") };
        let ends = matches!(message, Frontend::CopyDone | Frontend::CopyFail | Frontend::Terminate);
        if matches!(message, Frontend::Terminate) {
            bail!("the client left");
        }
        if inbox.send(message).await.is_err() || ends {
            return Ok(receiver);
        }
    }
}

struct Streaming<'a> {
    session: &'a Session,
    reader: ChainReader,
    at: Lsn,
    /// Of what is sent, once there is something, and up to where.
    verifier: Option<(Verifier, Lsn)>,
    inbox: mpsc::Receiver<Frontend>,
    heard: Instant,
}

impl Streaming<'_> {
    async fn run(&mut self, sender: &mut Sender) -> anyhow::Result<()> {
        let mut commit = self.session.timeline.watch_commit();
        let mut sent = Instant::now();
        loop {
            if self.session.timeline.is_left() {
                bail!("other safekeepers keep this timeline by now");
            }
            if self.session.timeline.is_retired() {
                bail!("this safekeeper's WAL of the timeline is damaged and is being mended");
            }
            let end = *commit.borrow_and_update();
            while self.at < end {
                self.send_some(end, sender).await?;
                sent = Instant::now();
                while let Ok(message) = self.inbox.try_recv() {
                    if self.take(&message, sender).await? {
                        return Ok(());
                    }
                }
            }
            let keepalive_at = sent + KEEPALIVE_AFTER;
            tokio::select! {
                changed = commit.changed() => changed?,
                message = self.inbox.recv() => {
                    let Some(message) = message else { bail!("the client is gone") };
                    if self.take(&message, sender).await? {
                        return Ok(());
                    }
                }
                () = tokio::time::sleep_until(keepalive_at) => {
                    let silent = self.heard.elapsed();
                    if silent > DEAD_AFTER {
                        bail!("the client said nothing for {} s", silent.as_secs());
                    }
                    sender.out.keepalive(self.at, postgres_time_us(), silent > DEAD_AFTER / 2);
                    sender.flush().await?;
                    sent = Instant::now();
                }
            }
        }
    }

    async fn send_some(&mut self, end: Lsn, sender: &mut Sender) -> anyhow::Result<()> {
        let mut buffer = vec![0; MAX_SEND.min((end - self.at) as usize)];
        let count = self.read_checked(end, &mut buffer).await?;
        let filled: Result<(), std::convert::Infallible> =
            sender.out.xlog_data(self.at, end, postgres_time_us(), |out| {
                out.extend_from_slice(&buffer[..count]);
                Ok(())
            });
        // Infallible: the bytes were read before.
        let Ok(()) = filled;
        sender.flush().await?;
        self.at = self.at + count as u64;
        Ok(())
    }

    /// Reads what comes next, as far as it is whole and right. A record ends at `end`, so nothing that could be sent is held
    /// back for long.
    async fn read_checked(&mut self, end: Lsn, buffer: &mut [u8]) -> anyhow::Result<usize> {
        if self.verifier.as_ref().is_some_and(|(_, until)| self.at >= *until) {
            self.verifier = None;
        }
        let (verifier, until) = match &mut self.verifier {
            Some(verifier) => verifier,
            none => none.insert(self.reader.verifier(self.at).await?),
        };
        let end = end.min(*until);
        let mut read = Vec::new();
        loop {
            let (at, count) = match verifier.next(end) {
                Next::Take => return Ok(verifier.take(buffer, end)),
                Next::Read { at, count } => (at, count),
                Next::Unfinished => bail!("no record ends at {end}, which is committed"),
            };
            if !read.is_empty() {
                // A long record is read to its end first: others have their turn meanwhile. What follows each commit is read at
                // once, since to wait for a turn costs as much as the rest of it.
                tokio::task::yield_now().await;
            }
            read.resize(count, 0);
            let count = self.reader.read(at, &mut read).await?;
            if let Err(error) = verifier.give(&read[..count]) {
                let right = verifier.right_until();
                self.reader.suspect(right, &error.to_string());
                bail!(
                    "WAL after {right} is damaged on this safekeeper, or in the archive: {error}"
                );
            }
        }
    }

    /// True if the client wants no more.
    async fn take(&mut self, message: &Frontend, sender: &mut Sender) -> anyhow::Result<bool> {
        self.heard = Instant::now();
        match message {
            Frontend::Status(status) => {
                self.note(status);
                if status.reply_requested {
                    sender.out.keepalive(self.at, postgres_time_us(), false);
                    sender.flush().await?;
                }
                Ok(false)
            }
            Frontend::CopyDone | Frontend::CopyFail => Ok(true),
            _ => Ok(false),
        }
    }

    fn note(&self, status: &StandbyStatus) {
        if self.session.is_page_server {
            self.session.timeline.note_consistent(status.flush_lsn);
        }
    }
}
