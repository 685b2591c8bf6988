//! Messages of a server.

use pgstrata_ids::Lsn;

use super::StartupPacket;

/// A column of a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    name: &'a str,
    type_oid: u32,
    size: i16,
}

/// A column of type `text`.
pub fn text_column(name: &str) -> Column<'_> {
    Column { name, type_oid: 25, size: -1 }
}

/// A column of type `int8`.
pub fn int8_column(name: &str) -> Column<'_> {
    Column { name, type_oid: 20, size: 8 }
}

/// Collects messages to be sent together.
#[derive(Clone, Debug, Default)]
pub struct BackendWriter {
    /// What was collected; clear it when it has been sent.
    pub bytes: Vec<u8>,
}

impl BackendWriter {
    fn message(&mut self, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
        self.bytes.push(kind);
        let at = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        body(&mut self.bytes);
        let length = (self.bytes.len() - at) as u32;
        self.bytes[at..at + 4].copy_from_slice(&length.to_be_bytes());
    }

    /// The client has to show a password, as it is.
    pub fn ask_for_password(&mut self) {
        self.message(b'R', |out| out.extend_from_slice(&3u32.to_be_bytes()));
    }

    /// The client is let in: what it needs to know until its first command.
    pub fn welcome(&mut self, packet: &StartupPacket, server_version: &str) {
        let options = packet.protocol_options();
        if packet.minor_version > 0 || !options.is_empty() {
            self.negotiate_protocol_version(&options);
        }
        self.message(b'R', |out| out.extend_from_slice(&0u32.to_be_bytes()));
        for (name, value) in [
            ("server_version", server_version),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("DateStyle", "ISO, MDY"),
            ("TimeZone", "UTC"),
        ] {
            self.parameter_status(name, value);
        }
        // A key for cancelling; nothing can be cancelled here.
        self.message(b'K', |out| out.extend_from_slice(&[0; 8]));
        self.ready_for_query();
    }

    /// Only minor version 0 is spoken here, and none of these options.
    fn negotiate_protocol_version(&mut self, options: &[&str]) {
        self.message(b'v', |out| {
            out.extend_from_slice(&(3u32 << 16).to_be_bytes());
            out.extend_from_slice(&(options.len() as u32).to_be_bytes());
            options.iter().for_each(|option| text(out, option));
        });
    }

    /// A setting that clients want to know.
    fn parameter_status(&mut self, name: &str, value: &str) {
        self.message(b'S', |out| {
            text(out, name);
            text(out, value);
        });
    }

    /// The next command may come.
    pub fn ready_for_query(&mut self) {
        self.message(b'Z', |out| out.push(b'I'));
    }

    /// A result of one row, or none; values in text form.
    pub fn result(&mut self, columns: &[Column<'_>], row: Option<&[Option<&str>]>, tag: &str) {
        self.columns(columns);
        row.into_iter().for_each(|row| self.row(row));
        self.command_complete(tag);
    }

    /// The columns of the rows that follow.
    pub fn columns(&mut self, columns: &[Column<'_>]) {
        self.message(b'T', |out| {
            out.extend_from_slice(&(columns.len() as u16).to_be_bytes());
            for column in columns {
                text(out, column.name);
                out.extend_from_slice(&[0; 6]);
                out.extend_from_slice(&column.type_oid.to_be_bytes());
                out.extend_from_slice(&column.size.to_be_bytes());
                out.extend_from_slice(&(-1i32).to_be_bytes());
                out.extend_from_slice(&[0; 2]);
            }
        });
    }

    /// A row; values in text form.
    pub fn row(&mut self, row: &[Option<&str>]) {
        self.message(b'D', |out| {
            out.extend_from_slice(&(row.len() as u16).to_be_bytes());
            for value in row {
                let length = value.map_or(-1, |value| value.len() as i32);
                out.extend_from_slice(&length.to_be_bytes());
                out.extend_from_slice(value.unwrap_or_default().as_bytes());
            }
        });
    }

    /// A command is done.
    pub fn command_complete(&mut self, tag: &str) {
        self.message(b'C', |out| text(out, tag));
    }

    /// The query was empty.
    pub fn empty_query(&mut self) {
        self.message(b'I', |_| {});
    }

    /// Something failed. `fatal` means that the connection ends.
    pub fn error(&mut self, fatal: bool, sqlstate: &str, message: &str) {
        let severity = if fatal { "FATAL" } else { "ERROR" };
        self.message(b'E', |out| {
            for (field, value) in
                [(b'S', severity), (b'V', severity), (b'C', sqlstate), (b'M', message)]
            {
                out.push(field);
                text(out, value);
            }
            out.push(0);
        });
    }

    /// From here on both sides send copy data.
    pub fn copy_both(&mut self) {
        self.message(b'W', |out| out.extend_from_slice(&[0; 3]));
    }

    /// From here on this side sends copy data.
    pub fn copy_out(&mut self) {
        self.message(b'H', |out| out.extend_from_slice(&[0; 3]));
    }

    /// Copy data of one message, in two parts.
    pub fn copy_data(&mut self, kind: &[u8], data: &[u8]) {
        self.message(b'd', |out| {
            out.extend_from_slice(kind);
            out.extend_from_slice(data);
        });
    }

    /// No more copy data comes.
    pub fn copy_done(&mut self) {
        self.message(b'c', |_| {});
    }

    /// WAL from `start`; `fill` appends its bytes. `end` is the newest position that could be
    /// sent now; the time is in microseconds since 2000-01-01.
    pub fn xlog_data<E>(
        &mut self,
        start: Lsn,
        end: Lsn,
        time_us: i64,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let at = self.bytes.len();
        let mut filled = Ok(());
        self.message(b'd', |out| {
            out.push(b'w');
            out.extend_from_slice(&start.0.to_be_bytes());
            out.extend_from_slice(&end.0.to_be_bytes());
            out.extend_from_slice(&time_us.to_be_bytes());
            filled = fill(out);
        });
        if filled.is_err() {
            self.bytes.truncate(at);
        }
        filled
    }

    /// "Still here", and how far WAL could be sent.
    pub fn keepalive(&mut self, end: Lsn, time_us: i64, reply_requested: bool) {
        self.message(b'd', |out| {
            out.push(b'k');
            out.extend_from_slice(&end.0.to_be_bytes());
            out.extend_from_slice(&time_us.to_be_bytes());
            out.push(u8::from(reply_requested));
        });
    }
}

/// A string and its terminating zero; zeros inside are left out.
fn text(out: &mut Vec<u8>, text: &str) {
    out.extend(text.bytes().filter(|&byte| byte != 0));
    out.push(0);
}
