//! The backend side of PostgreSQL's protocol, as far as a base backup needs it. Blocking.

use std::io::{self, BufReader, BufWriter, Read, Write};
use std::time::Duration;

use anyhow::{Result, ensure};
use pgstrata_identity::Stream;
use pgstrata_wire::postgres::{
    BackendWriter, Frontend, MAX_MESSAGE, StartupPacket, split, text_column,
};

/// How long a session may be silent: a client of a base backup says something every ten seconds
/// while it receives WAL, and little else is waited for.
const SILENCE: Duration = Duration::from_secs(300);

/// A stream that is not silent for too long.
struct Timed {
    stream: Stream,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(SILENCE))?;
        self.stream.read(buffer)
    }
}

/// A client, after the start-up exchange.
pub struct Client {
    reader: BufReader<Timed>,
    writer: BufWriter<Stream>,
    /// Messages that are about to be written.
    out: BackendWriter,
    /// What it said when it connected.
    pub packet: StartupPacket,
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

impl Client {
    /// A client that was let in.
    pub fn new(stream: Stream, packet: StartupPacket) -> Client {
        let reader = BufReader::new(Timed { stream: stream.clone() });
        let writer = BufWriter::with_capacity(256 * 1024, stream);
        Client { reader, writer, out: BackendWriter::default(), packet }
    }

    /// Buffers messages.
    pub fn say(&mut self, messages: impl FnOnce(&mut BackendWriter)) -> io::Result<()> {
        messages(&mut self.out);
        self.writer.write_all(&self.out.bytes)?;
        self.out.bytes.clear();
        Ok(())
    }

    /// Sends what was buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Says welcome.
    pub fn welcome(&mut self, server_version: &str) -> io::Result<()> {
        self.out.welcome(&self.packet, server_version);
        self.say(|_| {})?;
        self.flush()
    }

    /// Ready for the next query.
    pub fn ready(&mut self) -> io::Result<()> {
        self.say(BackendWriter::ready_for_query)?;
        self.flush()
    }

    /// Reads a message. `None` at the end of the session.
    pub fn read(&mut self) -> Result<Option<Frontend>> {
        let mut message = vec![0; 1];
        if self.reader.read(&mut message)? == 0 {
            return Ok(None);
        }
        let length = read_u32(&mut self.reader)?;
        ensure!((4..=MAX_MESSAGE).contains(&(length as usize)), "a message of {length} bytes");
        message.extend_from_slice(&length.to_be_bytes());
        message.resize(1 + length as usize, 0);
        self.reader.read_exact(&mut message[5..])?;
        Ok(split(&message)?.map(|(message, _)| message))
    }

    /// An error that ends a query (or, if `fatal`, the session).
    pub fn error(&mut self, fatal: bool, state: &str, text: &str) -> io::Result<()> {
        self.say(|out| out.error(fatal, state, text))?;
        self.flush()
    }

    /// A result set of text columns.
    pub fn result(
        &mut self,
        columns: &[&str],
        rows: &[Vec<Option<String>>],
        tag: &str,
    ) -> io::Result<()> {
        let columns: Vec<_> = columns.iter().map(|name| text_column(name)).collect();
        self.say(|out| {
            out.columns(&columns);
            for row in rows {
                let row: Vec<_> = row.iter().map(Option::as_deref).collect();
                out.row(&row);
            }
            out.command_complete(tag);
        })
    }

    /// A command is complete.
    pub fn complete(&mut self, tag: &str) -> io::Result<()> {
        self.say(|out| out.command_complete(tag))
    }
}
