//! The backend side of PostgreSQL's protocol, as far as a base backup needs it. Blocking.

use std::collections::HashMap;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use pgstrata_listen::GREETING;

const PROTOCOL_3: u32 = 196_608;
const SSL_REQUEST: u32 = 80_877_103;
const GSS_REQUEST: u32 = 80_877_104;
const CANCEL_REQUEST: u32 = 80_877_102;
/// Longest message that a client sends us.
const MESSAGE_LIMIT: usize = 1 << 20;
const TEXT_OID: u32 = 25;

/// How long a session may be silent: a client of a base backup says something every ten seconds
/// while it receives WAL, and little else is waited for.
const SILENCE: Duration = Duration::from_secs(300);
/// How many times a client may ask for encryption before it says what it wants.
const ENCRYPTION_REQUESTS: u32 = 2;

/// A stream of which the bytes that are waited for have to come in time, all together.
struct Timed {
    stream: TcpStream,
    deadline: Option<Instant>,
}

impl Read for Timed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left =
            self.deadline.map_or(SILENCE, |end| end.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(buffer)
    }
}

/// A client, after the start-up exchange.
pub struct Client {
    reader: BufReader<Timed>,
    writer: BufWriter<TcpStream>,
    /// What it said when it connected.
    pub parameters: HashMap<String, String>,
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

impl Client {
    /// Reads the start-up message. `None` if the client wanted something else than a session.
    pub fn accept(stream: TcpStream) -> Result<Option<Client>> {
        stream.set_nodelay(true)?;
        let deadline = Some(Instant::now() + GREETING);
        let mut reader = BufReader::new(Timed { stream: stream.try_clone()?, deadline });
        let mut writer = BufWriter::with_capacity(256 * 1024, stream);
        let mut encryption_requests = 0;
        loop {
            let length = read_u32(&mut reader)? as usize;
            ensure!((8..=10_000).contains(&length), "a start-up message of {length} bytes");
            let code = read_u32(&mut reader)?;
            let mut body = vec![0; length - 8];
            reader.read_exact(&mut body)?;
            match code {
                SSL_REQUEST | GSS_REQUEST => {
                    encryption_requests += 1;
                    ensure!(
                        encryption_requests <= ENCRYPTION_REQUESTS,
                        "it asks for encryption only"
                    );
                    writer.write_all(b"N")?;
                    writer.flush()?;
                }
                CANCEL_REQUEST => return Ok(None),
                code if code >> 16 == PROTOCOL_3 >> 16 => {
                    let mut parameters = HashMap::new();
                    let mut texts =
                        body.split(|&byte| byte == 0).map(|text| String::from_utf8_lossy(text));
                    while let (Some(name), Some(value)) = (texts.next(), texts.next()) {
                        if name.is_empty() {
                            break;
                        }
                        parameters.insert(name.into_owned(), value.into_owned());
                    }
                    reader.get_mut().deadline = None;
                    return Ok(Some(Client { reader, writer, parameters }));
                }
                code => bail!("protocol {code:#x}"),
            }
        }
    }

    /// The settings in the connection's `options`, `-c name=value` or `--name=value`.
    pub fn options(&self) -> HashMap<String, String> {
        let text = self.parameters.get("options").map_or("", String::as_str);
        let mut settings = HashMap::new();
        let mut words = text.split_ascii_whitespace();
        while let Some(word) = words.next() {
            let setting = match word.strip_prefix("-c") {
                Some("") => words.next(),
                Some(rest) => Some(rest),
                None => word.strip_prefix("--"),
            };
            if let Some((name, value)) = setting.and_then(|setting| setting.split_once('=')) {
                settings.insert(name.to_owned(), value.to_owned());
            }
        }
        settings
    }

    /// Sends one message.
    pub fn send(&mut self, kind: u8, body: &[u8]) -> io::Result<()> {
        self.writer.write_all(&[kind])?;
        self.writer.write_all(&(body.len() as u32 + 4).to_be_bytes())?;
        self.writer.write_all(body)
    }

    /// Sends what was buffered.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Says welcome.
    pub fn welcome(&mut self, server_version: &str) -> io::Result<()> {
        self.send(b'R', &0u32.to_be_bytes())?;
        for (name, value) in [
            ("server_version", server_version),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "UTC"),
        ] {
            self.send(b'S', format!("{name}\0{value}\0").as_bytes())?;
        }
        self.send(b'K', &[0; 8])?;
        self.ready()
    }

    /// Ready for the next query.
    pub fn ready(&mut self) -> io::Result<()> {
        self.send(b'Z', b"I")?;
        self.flush()
    }

    /// Reads a message: its kind and body. `None` at the end of the session.
    pub fn read(&mut self) -> Result<Option<(u8, Vec<u8>)>> {
        let mut kind = [0];
        if self.reader.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let length = read_u32(&mut self.reader)? as usize;
        ensure!((4..=MESSAGE_LIMIT).contains(&length), "a message of {length} bytes");
        let mut body = vec![0; length - 4];
        self.reader.read_exact(&mut body)?;
        Ok(Some((kind[0], body)))
    }

    /// An error that ends a query (or, if `fatal`, the session).
    pub fn error(&mut self, fatal: bool, state: &str, text: &str) -> io::Result<()> {
        let severity = if fatal { "FATAL" } else { "ERROR" };
        let text = text.replace('\0', " ");
        let body = format!("S{severity}\0V{severity}\0C{state}\0M{text}\0\0");
        self.send(b'E', body.as_bytes())?;
        self.flush()
    }

    /// A result set of text columns, without its completion.
    pub fn rows(&mut self, columns: &[&str], rows: &[Vec<Option<String>>]) -> io::Result<()> {
        let mut body = (columns.len() as u16).to_be_bytes().to_vec();
        for column in columns {
            body.extend_from_slice(column.as_bytes());
            body.push(0);
            body.extend_from_slice(&[0; 6]);
            body.extend_from_slice(&TEXT_OID.to_be_bytes());
            body.extend_from_slice(&(-1i16).to_be_bytes());
            body.extend_from_slice(&(-1i32).to_be_bytes());
            body.extend_from_slice(&[0; 2]);
        }
        self.send(b'T', &body)?;
        for row in rows {
            let mut body = (row.len() as u16).to_be_bytes().to_vec();
            for value in row {
                match value {
                    None => body.extend_from_slice(&(-1i32).to_be_bytes()),
                    Some(value) => {
                        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
                        body.extend_from_slice(value.as_bytes());
                    }
                }
            }
            self.send(b'D', &body)?;
        }
        Ok(())
    }

    /// A command is complete.
    pub fn complete(&mut self, tag: &str) -> io::Result<()> {
        self.send(b'C', format!("{tag}\0").as_bytes())
    }
}
