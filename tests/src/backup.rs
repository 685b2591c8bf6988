//! A client of `BASE_BACKUP`, for servers newer than the `pg_basebackup` that is installed.
//!
//! It speaks just enough of the replication protocol (PostgreSQL 15 and later) to unpack the
//! archives into a directory.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::give_to_postgres;

/// What a server answered.
pub struct Backup {
    /// The rows before and after the archives, as text.
    pub rows: Vec<Vec<Option<String>>>,
    /// The manifest, if it was asked for.
    pub manifest: Vec<u8>,
    /// Archives in the order they came: name, location of the tablespace, tar.
    pub archives: Vec<(String, String, Vec<u8>)>,
}

struct Connection(TcpStream);

impl Connection {
    fn open(port: u16, options: &str) -> Connection {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let mut body = 0x0003_0000_u32.to_be_bytes().to_vec();
        let parameters = [("user", "postgres"), ("replication", "true"), ("options", options)];
        for text in parameters.iter().flat_map(|(name, value)| [name, value]) {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        body.push(0);
        stream.write_all(&(body.len() as u32 + 4).to_be_bytes()).unwrap();
        stream.write_all(&body).unwrap();
        let mut connection = Connection(stream);
        while connection.message().unwrap().0 != b'Z' {}
        connection
    }

    /// The next message; an error's text if it is one.
    fn message(&mut self) -> Result<(u8, Vec<u8>), String> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).map_err(|error| error.to_string())?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
        let mut body = vec![0; length as usize - 4];
        self.0.read_exact(&mut body).map_err(|error| error.to_string())?;
        match head[0] {
            b'E' => Err(String::from_utf8_lossy(&body).replace('\0', " ")),
            kind => Ok((kind, body)),
        }
    }
}

fn row(body: &[u8]) -> Vec<Option<String>> {
    let mut rest = &body[2..];
    let mut row = Vec::new();
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = i32::from_be_bytes(*length);
        let value = usize::try_from(length).ok().map(|length| &tail[..length]);
        row.push(value.map(|value| String::from_utf8_lossy(value).into_owned()));
        rest = &tail[length.max(0) as usize..];
    }
    row
}

fn string(bytes: &[u8]) -> (String, &[u8]) {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap();
    (String::from_utf8_lossy(&bytes[..end]).into_owned(), &bytes[end + 1..])
}

/// Takes a base backup. `options` are those of the connection, `arguments` those of the command.
/// An error is the server's.
pub fn take(port: u16, options: &str, arguments: &str) -> Result<Backup, String> {
    let mut connection = Connection::open(port, options);
    let query = format!("BASE_BACKUP ({arguments})\0");
    let mut message = vec![b'Q'];
    message.extend_from_slice(&(query.len() as u32 + 4).to_be_bytes());
    message.extend_from_slice(query.as_bytes());
    connection.0.write_all(&message).unwrap();
    let mut backup = Backup { rows: Vec::new(), manifest: Vec::new(), archives: Vec::new() };
    let mut in_manifest = false;
    loop {
        let (kind, body) = connection.message()?;
        match (kind, body.split_first()) {
            (b'Z', _) => return Ok(backup),
            (b'D', _) => backup.rows.push(row(&body)),
            (b'd', Some((b'n', rest))) => {
                let (name, rest) = string(rest);
                let (location, _) = string(rest);
                backup.archives.push((name, location, Vec::new()));
            }
            (b'd', Some((b'm', _))) => in_manifest = true,
            (b'd', Some((b'd', rest))) if in_manifest => backup.manifest.extend_from_slice(rest),
            (b'd', Some((b'd', rest))) => {
                backup.archives.last_mut().unwrap().2.extend_from_slice(rest);
            }
            _ => {}
        }
    }
}

impl Backup {
    /// Unpacks the archives below `root`: the data directory becomes `root/data`, and tablespaces
    /// `root/<oid>`, with the links of the data directory put right. Returns the data directory.
    pub fn unpack(&self, root: &Path) -> std::path::PathBuf {
        let data = root.join("data");
        std::fs::create_dir_all(&data).unwrap();
        for (name, _, tar) in &self.archives {
            let directory = match name.strip_suffix(".tar").unwrap() {
                "base" => data.clone(),
                oid => root.join(oid),
            };
            std::fs::create_dir_all(&directory).unwrap();
            tar::Archive::new(tar.as_slice()).unpack(&directory).unwrap();
        }
        for (name, location, _) in &self.archives {
            let oid = name.strip_suffix(".tar").unwrap();
            if location.is_empty() || oid == "base" {
                continue;
            }
            let link = data.join("pg_tblspc").join(oid);
            assert_eq!(std::fs::read_link(&link).unwrap(), Path::new(location));
            std::fs::remove_file(&link).unwrap();
            std::os::unix::fs::symlink(root.join(oid), &link).unwrap();
        }
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).unwrap();
        give_to_postgres(root);
        data
    }
}
