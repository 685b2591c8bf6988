//! Sending committed WAL as it comes: the connection and the reader around what [decides](super::feeding).

use std::time::Instant;

use anyhow::bail;
use pgstrata_ids::Lsn;
use pgstrata_wire::postgres::Frontend;
use tokio::sync::mpsc;

use super::feeding::{Feeding, Next, Standing};
use super::postgres_time_us;
use super::session::{Receiver, Sender, Session};
use crate::chain_reader::ChainReader;
use crate::checked_reader::CheckedReader;

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
    let reader = CheckedReader::new(reader);
    sender.out.copy_both();
    sender.flush().await?;
    let feeding = Feeding::new(start, Instant::now());
    let mut streaming = Streaming { session, reader, feeding, inbox };
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
    reader: CheckedReader,
    feeding: Feeding,
    inbox: mpsc::Receiver<Frontend>,
}

impl Streaming<'_> {
    async fn run(&mut self, sender: &mut Sender) -> anyhow::Result<()> {
        let mut commit = self.session.timeline.watch_commit();
        loop {
            let end = *commit.borrow_and_update();
            match self.feeding.next(Instant::now(), end, self.standing()) {
                Next::Wal { at, end, most } => {
                    let mut buffer = vec![0; most];
                    let count = self.reader.read(at, end, &mut buffer).await?;
                    let out = &mut sender.out;
                    self.feeding.wal(&buffer[..count], end, postgres_time_us(), out);
                    self.flush(sender).await?;
                    while !self.feeding.is_done()
                        && let Ok(message) = self.inbox.try_recv()
                    {
                        self.take(&message);
                    }
                }
                Next::Keepalive(is_question) => {
                    self.feeding.keepalive(is_question, postgres_time_us(), &mut sender.out);
                    self.flush(sender).await?;
                }
                Next::Wait(until) => {
                    tokio::select! {
                        changed = commit.changed() => changed?,
                        message = self.inbox.recv() => match message {
                            Some(message) => self.take(&message),
                            None => bail!("the client is gone"),
                        },
                        () = tokio::time::sleep_until(until.into()) => {}
                    }
                }
                Next::Done => return Ok(()),
                Next::Ended(error) => return Err(error.into()),
            }
        }
    }

    fn standing(&self) -> Standing {
        match (self.session.timeline.is_left(), self.session.timeline.is_retired()) {
            (true, _) => Standing::Left,
            (false, true) => Standing::Retired,
            (false, false) => Standing::Kept,
        }
    }

    async fn flush(&mut self, sender: &mut Sender) -> std::io::Result<()> {
        sender.flush().await?;
        self.feeding.sent(Instant::now());
        Ok(())
    }

    fn take(&mut self, message: &Frontend) {
        let status = self.feeding.take(message, Instant::now());
        if let Some(status) = status.filter(|_| self.session.is_page_server) {
            self.session.timeline.note_consistent(status.flush_lsn);
        }
    }
}
