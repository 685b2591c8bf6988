//! Reads records from a directory of WAL segments, as in `pg_wal` or an archive.

use anyhow::{Context as _, bail};
use pgstrata_ids::{Lsn, PAGE_SIZE};
use pgstrata_pg_wal::{PgVersion, Record, WalDecoder, WalError};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

/// Bytes read at a time.
const CHUNK: usize = 256 * 1024;
const LONG_HEADER: usize = 40;

/// The segments of a directory: for each position the one of the newest timeline.
pub struct SegmentDirectory {
    segments: BTreeMap<u64, PathBuf>,
    segment_size: u64,
    version: PgVersion,
}

impl SegmentDirectory {
    /// Lists a directory.
    pub fn open(directory: &Path) -> anyhow::Result<SegmentDirectory> {
        let mut found: Vec<(u32, u32, u32, PathBuf)> = Vec::new();
        let entries = std::fs::read_dir(directory)
            .with_context(|| format!("cannot list the WAL directory {}", directory.display()))?;
        for entry in entries {
            let entry = entry?;
            if let Some((tli, high, low)) = entry.file_name().to_str().and_then(parse_name) {
                found.push((tli, high, low, entry.path()));
            }
        }
        found.sort();
        let Some((.., first)) = found.first() else {
            bail!("{} holds no WAL segments", directory.display());
        };
        let (segment_size, version) = read_header(first)?;
        let per_high = (1u64 << 32) / segment_size;
        let segments = found
            .into_iter()
            .map(|(_, high, low, path)| (u64::from(high) * per_high + u64::from(low), path))
            .collect();
        Ok(SegmentDirectory { segments, segment_size, version })
    }

    /// PostgreSQL's version, from the first segment.
    pub fn version(&self) -> PgVersion {
        self.version
    }

    /// Bytes of the segments that hold `from` or come after it, up to the first that is missing.
    pub fn bytes_from(&self, from: Lsn) -> u64 {
        let first = from.segment_number(self.segment_size);
        let numbers = (first..).take_while(|number| self.segments.contains_key(number));
        (numbers.count() as u64 * self.segment_size)
            .saturating_sub(from.segment_offset(self.segment_size))
    }

    /// Reads records from the first segment's start, or from the page that holds `from`.
    pub fn reader(&self, from: Option<Lsn>) -> anyhow::Result<SegmentReader<'_>> {
        let start = match (from, self.segments.keys().next()) {
            (Some(from), _) => Lsn(from.0 - from.page_offset()),
            (None, Some(first)) => Lsn(first * self.segment_size),
            (None, None) => bail!("there are no WAL segments"),
        };
        let decoder = WalDecoder::new(start, self.segment_size).with_version(self.version);
        Ok(SegmentReader {
            directory: self,
            decoder,
            file: None,
            buffer: vec![0; CHUNK],
            stopped: None,
        })
    }
}

/// Timeline and the two halves of the segment number.
fn parse_name(name: &str) -> Option<(u32, u32, u32)> {
    if name.len() != 24 || !name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let part = |at: usize| u32::from_str_radix(&name[at..at + 8], 16).ok();
    Some((part(0)?, part(8)?, part(16)?))
}

fn read_header(path: &Path) -> anyhow::Result<(u64, PgVersion)> {
    let mut header = [0; LONG_HEADER];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut header))
        .with_context(|| format!("cannot read the WAL segment {}", path.display()))?;
    let magic = u16::from_le_bytes([header[0], header[1]]);
    let size = u32::from_le_bytes([header[32], header[33], header[34], header[35]]);
    let Some(version) = PgVersion::from_wal_magic(magic) else {
        bail!("{} is not a WAL segment of PostgreSQL 15 to 18", path.display());
    };
    if !size.is_power_of_two() || size < 1 << 20 {
        bail!("{} has the impossible segment size {size}", path.display());
    }
    Ok((u64::from(size), version))
}

/// Where reading stopped.
#[derive(Debug)]
pub enum Stop {
    /// The WAL ends there, as every log does.
    End,
    /// The next segment is not in the directory.
    NoSegment,
    /// Something is wrong.
    Error(WalError),
}

/// Records of a directory, in order.
pub struct SegmentReader<'a> {
    directory: &'a SegmentDirectory,
    decoder: WalDecoder,
    file: Option<(u64, File)>,
    buffer: Vec<u8>,
    stopped: Option<Stop>,
}

impl SegmentReader<'_> {
    /// Calls `each` with every record until it returns false; says where and why reading stopped.
    pub fn for_each(
        &mut self,
        mut each: impl FnMut(Record<'_>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<(Lsn, Stop)> {
        loop {
            loop {
                match self.decoder.poll() {
                    Ok(Some(record)) => {
                        if !each(record)? {
                            return Ok((self.decoder.position(), Stop::End));
                        }
                    }
                    Ok(None) => break,
                    Err(error) => {
                        let stop =
                            if error.is_end_of_wal() { Stop::End } else { Stop::Error(error) };
                        return Ok((self.decoder.position(), stop));
                    }
                }
            }
            self.feed()?;
            if let Some(stop) = self.stopped.take() {
                return Ok((self.decoder.position(), stop));
            }
        }
    }

    fn feed(&mut self) -> anyhow::Result<()> {
        let at = self.decoder.feed_position();
        let size = self.directory.segment_size;
        let number = at.segment_number(size);
        if self.file.as_ref().is_none_or(|(open, _)| *open != number) {
            let Some(path) = self.directory.segments.get(&number) else {
                self.stopped = Some(Stop::NoSegment);
                return Ok(());
            };
            let file = File::open(path)
                .with_context(|| format!("cannot open the WAL segment {}", path.display()))?;
            self.file = Some((number, file));
        }
        let Some((_, file)) = &self.file else { return Ok(()) };
        let offset = at.segment_offset(size);
        let wanted = CHUNK.min((size - offset) as usize);
        let length = file.read_at(&mut self.buffer[..wanted], offset)?;
        if length == 0 {
            self.stopped = Some(Stop::NoSegment);
        }
        self.decoder.feed(&self.buffer[..length]);
        Ok(())
    }
}

/// An error for WAL that stopped in the middle, with advice.
pub fn stop_error(error: &WalError) -> anyhow::Error {
    anyhow::anyhow!(
        "{error}; everything before is valid. If the log was copied while it was being written, copy it again"
    )
}

const _: () = assert!(CHUNK.is_multiple_of(PAGE_SIZE));
