//! One connection of the WAL port: the socket, the clock and the pauses of a [`Conversation`].

use std::sync::Arc;
use std::time::Instant;

use pgstrata_identity::Stream;
use pgstrata_listen::Peer;
use pgstrata_wire::FrameBuffer;

use super::conversation::{Conversation, Step};
use super::{Limits, Served, Waiting};

/// Most that is taken from the socket before it is written and synced, in bytes: it bounds the
/// latency of a commit behind a bulk load.
const RECEIVE_BUFFER: usize = 1 << 20;

/// See the module.
pub struct Connection {
    stream: Stream,
    waiting: Arc<Waiting>,
    limits: Limits,
    conversation: Conversation<Stream>,
}

impl Connection {
    /// A connection that has said nothing yet.
    pub fn new(stream: Stream, peer: Peer, waiting: Arc<Waiting>, served: &Served) -> Connection {
        let (timelines, pace) = (Arc::clone(&served.timelines), Arc::clone(&served.pace));
        let conversation = Conversation::new(stream.clone(), peer, timelines, pace);
        Connection { stream, waiting, limits: served.limits, conversation }
    }

    /// Serves until the other side leaves, or does something that can't be served.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut input = FrameBuffer::new(RECEIVE_BUFFER);
        // Since when a message is on its way; most come whole, and nobody looks at a clock.
        let mut begun: Option<Instant> = None;
        let mut is_waiting = true;
        while input.fill(&mut &self.stream)? {
            while let Step::GoesOn(pause) = self.conversation.step(&mut input, Instant::now())? {
                begun = None;
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                }
            }
            if input.kind().is_none() {
                begun = None;
            } else if begun.get_or_insert_with(Instant::now).elapsed() > self.limits.message {
                anyhow::bail!("a message did not come whole within {:?}", self.limits.message);
            }
            if is_waiting && self.conversation.is_about_one() {
                is_waiting = false;
                self.stream.set_read_timeout(Some(self.limits.idle))?;
                self.waiting.is_over();
            }
        }
        Ok(())
    }
}
