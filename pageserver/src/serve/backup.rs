//! `BASE_BACKUP`: archives and a manifest, in the form of PostgreSQL 15 and later.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};

use anyhow::{Result, bail};
use pgstrata_wire::postgres::BackendWriter;
use sha2::{Digest, Sha256};

use crate::directory::{self, CleanShutdown, Contents, Entry, RelationReader};
use crate::serve::pg::Target;
use crate::serve::protocol::Client;

const CHUNK: usize = 64 * 1024;

/// What the client asked for.
#[derive(Debug, Default)]
struct Options {
    progress: bool,
    wal: bool,
    manifest: bool,
}

/// Reads `(NAME value, NAME 'text', ...)`.
fn parse(text: &str) -> Result<Options> {
    let mut options = Options::default();
    let text = text.trim().trim_start_matches('(').trim_end_matches(')');
    for item in text.split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (name, value) = item.split_once(char::is_whitespace).unwrap_or((item, "true"));
        let value = value.trim().trim_matches('\'').to_ascii_lowercase();
        let on = !matches!(value.as_str(), "false" | "off" | "0" | "no");
        match name.to_ascii_uppercase().as_str() {
            "PROGRESS" => options.progress = on,
            "WAL" => options.wal = on,
            "MANIFEST" => options.manifest = on,
            "TARGET" if value != "client" => bail!("backup target '{value}' is not supported"),
            "COMPRESSION" if value != "none" => bail!("server-side compression is not supported"),
            "INCREMENTAL" => bail!("incremental backups are not supported"),
            // Of a consistent past, checkpoints, waiting and rates have no meaning.
            _ => {}
        }
    }
    Ok(options)
}

/// The files of the backup, for its manifest.
#[derive(Default)]
struct Manifest {
    files: String,
}

impl Manifest {
    fn add(&mut self, path: &str, size: u64, crc: u32) {
        let separator = if self.files.is_empty() { "" } else { ",\n" };
        let checksum: String = crc.to_le_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        // Paths are ours: digits, letters, slashes. Writing to a string can't fail.
        let _ = write!(
            self.files,
            "{separator}{{ \"Path\": \"{path}\", \"Size\": {size}, \"Last-Modified\": \
             \"1970-01-01 00:00:00 GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \
             \"{checksum}\" }}"
        );
    }

    fn finish(self, version: u32, system_id: u64, shutdown: &CleanShutdown) -> String {
        let mut text = String::new();
        match version {
            ..17 => text.push_str("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n"),
            _ => {
                let _ = write!(
                    text,
                    "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": \
                     {system_id},\n"
                );
            }
        }
        let _ = write!(
            text,
            "\"Files\": [\n{}\n],\n\"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"{}\", \
             \"End-LSN\": \"{}\" }}\n],\n",
            self.files, shutdown.checkpoint, shutdown.end
        );
        let digest = Sha256::digest(text.as_bytes());
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let _ = writeln!(text, "\"Manifest-Checksum\": \"{digest}\"}}");
        text
    }
}

/// Sends bytes as pieces of the copy stream.
struct CopyWriter<'a> {
    client: &'a mut Client,
    pending: Vec<u8>,
    sent: u64,
}

impl CopyWriter<'_> {
    fn send(&mut self) -> io::Result<()> {
        if !self.pending.is_empty() {
            self.client.say(|out| out.copy_data(b"d", &self.pending))?;
            self.sent += self.pending.len() as u64;
        }
        self.pending.clear();
        Ok(())
    }
}

impl Write for CopyWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() >= CHUNK {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// Counts and checks what passes through, for the manifest.
struct Checksummed<R> {
    inner: R,
    crc: u32,
    size: u64,
}

impl<R: Read> Read for Checksummed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.crc = crc32c::crc32c_append(self.crc, &buffer[..count]);
        self.size += count as u64;
        Ok(count)
    }
}

type Archive<'a> = tar::Builder<CopyWriter<'a>>;

fn append(
    archive: &mut Archive<'_>,
    manifest: &mut Manifest,
    path: &str,
    manifest_path: &str,
    size: u64,
    content: impl Read,
) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(0o600);
    header.set_size(size);
    header.set_mtime(0);
    let mut content = Checksummed { inner: content, crc: 0, size: 0 };
    archive.append_data(&mut header, path, &mut content)?;
    if content.size != size {
        bail!("'{path}' has {} bytes where {size} were announced", content.size);
    }
    // The manifest does not list WAL, nor the control file of the archive's own end.
    if !path.starts_with("pg_wal/") {
        manifest.add(manifest_path, size, content.crc);
    }
    Ok(())
}

fn directory_entry(archive: &mut Archive<'_>, path: &str) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(tar::EntryType::Directory);
    header.set_mode(0o700);
    header.set_size(0);
    header.set_mtime(0);
    Ok(archive.append_data(&mut header, format!("{path}/"), io::empty())?)
}

/// Settings without which the directory would not start, or would not start as the same cluster.
fn configuration(target: &Target) -> Result<Vec<(&'static str, String)>> {
    let control = target.timeline.control_state(target.lsn)?.control;
    let settings = format!(
        "# Written by pgstrata: a backup has no configuration of its own.\n\
         max_connections = {}\n\
         max_worker_processes = {}\n\
         max_wal_senders = {}\n\
         max_prepared_transactions = {}\n\
         max_locks_per_transaction = {}\n\
         track_commit_timestamp = {}\n",
        control.max_connections,
        control.max_worker_processes,
        control.max_wal_senders,
        control.max_prepared_xacts,
        control.max_locks_per_xact,
        if control.track_commit_timestamp { "on" } else { "off" },
    );
    let access = "# Written by pgstrata: adapt before this server listens to others.\n\
                  local all all trust\n\
                  host all all 127.0.0.1/32 trust\n\
                  host all all ::1/128 trust\n\
                  local replication all trust\n\
                  host replication all 127.0.0.1/32 trust\n\
                  host replication all ::1/128 trust\n";
    Ok(vec![
        ("postgresql.conf", settings),
        ("postgresql.auto.conf", String::new()),
        ("pg_hba.conf", access.to_owned()),
        ("pg_ident.conf", String::new()),
    ])
}

/// Tablespaces with a location of their own. Those without (`allow_in_place_tablespaces`) are
/// directories of the data directory like any other.
fn tablespaces_outside(target: &Target) -> Result<BTreeMap<u32, String>> {
    let all = directory::tablespaces(&target.timeline, target.lsn)?;
    Ok(all.into_iter().filter(|(_, location)| !location.is_empty()).collect())
}

/// Everything of the backup, by archive: `None` is the data directory, others are tablespaces.
fn plan<'a>(
    target: &'a Target,
    options: &Options,
) -> Result<BTreeMap<Option<u32>, Vec<Entry<'a>>>> {
    let mut archives: BTreeMap<Option<u32>, Vec<Entry<'a>>> = BTreeMap::new();
    archives.entry(None).or_default();
    let outside = tablespaces_outside(target)?;
    for oid in outside.keys() {
        archives.entry(Some(*oid)).or_default();
    }
    for (name, content) in configuration(target)? {
        let entry = Entry::File(name.to_owned(), content.into_bytes());
        archives.entry(None).or_default().push(entry);
    }
    let wal = options.wal.then_some(&target.shutdown);
    let contents = Contents::Whole { wal, shutdown: &target.shutdown };
    directory::walk(&target.timeline, target.lsn, &contents, &mut |entry| {
        let path = match &entry {
            Entry::Directory(path) | Entry::File(path, _) => path,
            Entry::Relation { path, .. } => path,
        };
        let oid = path
            .strip_prefix("pg_tblspc/")
            .and_then(|rest| rest.split('/').next()?.parse::<u32>().ok())
            .filter(|oid| outside.contains_key(oid));
        archives.entry(oid).or_default().push(entry);
        Ok(())
    })?;
    Ok(archives)
}

fn entry_size(entry: &Entry<'_>) -> u64 {
    match entry {
        Entry::Directory(_) => 0,
        Entry::File(_, content) => content.len() as u64,
        Entry::Relation { blocks, .. } => u64::from(*blocks) * 8192,
    }
}

/// Answers `BASE_BACKUP`.
pub fn send(client: &mut Client, target: &Target, text: &str) -> Result<()> {
    let options = parse(text)?;
    let archives = plan(target, &options)?;
    let locations = tablespaces_outside(target)?;
    let checksums = target.timeline.control_state(target.lsn)?.control.data_checksum_version != 0;
    let shutdown = &target.shutdown;

    let start = vec![Some(shutdown.checkpoint.to_string()), Some("1".into())];
    client.result(&["recptr", "tli"], &[start], "SELECT")?;
    // PostgreSQL sends tablespaces first and the data directory last.
    let order = archives.keys().rev().copied();
    let rows: Vec<_> = order
        .clone()
        .map(|oid| {
            let size: u64 = archives[&oid].iter().map(entry_size).sum();
            let location = oid.and_then(|oid| locations.get(&oid).cloned());
            let kilobytes = options.progress.then(|| (size / 1024).to_string());
            vec![oid.map(|oid| oid.to_string()), location, kilobytes]
        })
        .collect();
    client.result(&["spcoid", "spclocation", "size"], &rows, "SELECT")?;
    client.say(BackendWriter::copy_out)?;

    let mut manifest = Manifest::default();
    for oid in order {
        let name = oid.map_or_else(|| "base.tar".to_owned(), |oid| format!("{oid}.tar"));
        let location = oid.and_then(|oid| locations.get(&oid).cloned()).unwrap_or_default();
        client.say(|out| out.copy_data(b"n", format!("{name}\0{location}\0").as_bytes()))?;
        let writer = CopyWriter { client: &mut *client, pending: Vec::new(), sent: 0 };
        let mut archive = tar::Builder::new(writer);
        let prefix = oid.map(|oid| format!("pg_tblspc/{oid}/"));
        for entry in &archives[&oid] {
            let inside = |path: &str| match &prefix {
                None => Some(path.to_owned()),
                Some(prefix) => path.strip_prefix(prefix).map(str::to_owned),
            };
            match entry {
                Entry::Directory(path) => {
                    // The root of a tablespace is the archive itself.
                    if let Some(path) = inside(path) {
                        directory_entry(&mut archive, &path)?;
                    }
                }
                Entry::File(path, content) => {
                    let name = inside(path).unwrap_or_default();
                    let size = content.len() as u64;
                    append(&mut archive, &mut manifest, &name, path, size, content.as_slice())?;
                }
                Entry::Relation { path, rel, first, blocks, timeline, lsn } => {
                    let name = inside(path).unwrap_or_default();
                    let size = u64::from(*blocks) * 8192;
                    let reader =
                        RelationReader::new(timeline, *rel, *first, *blocks, *lsn, checksums);
                    append(&mut archive, &mut manifest, &name, path, size, reader)?;
                }
            }
        }
        // The data directory's archive comes last, with the links to the others.
        for (oid, location) in locations.iter().filter(|_| oid.is_none()) {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            header.set_size(0);
            header.set_mtime(0);
            archive.append_link(&mut header, format!("pg_tblspc/{oid}"), location)?;
        }
        let mut writer = archive.into_inner()?;
        writer.flush()?;
        if options.progress {
            let sent = writer.sent;
            client.say(|out| out.copy_data(b"p", &sent.to_be_bytes()))?;
        }
    }
    if options.manifest {
        let info = &target.timeline.info;
        let text = manifest.finish(info.version.major(), info.system_id.0, shutdown);
        client.say(|out| out.copy_data(b"m", &[]))?;
        for chunk in text.as_bytes().chunks(CHUNK) {
            client.say(|out| out.copy_data(b"d", chunk))?;
        }
    }
    client.say(BackendWriter::copy_done)?;
    let end = vec![Some(shutdown.end.to_string()), Some("1".into())];
    client.result(&["recptr", "tli"], &[end], "SELECT")?;
    Ok(client.complete("BASE_BACKUP")?)
}
