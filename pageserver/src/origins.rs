//! `pg_logical/replorigin_checkpoint`: how far replication origins have come.
//!
//! PostgreSQL writes it at checkpoints and reads it when it starts (replication/logical/origin.c):
//!
//! ```text
//! u32  0x1257DADE
//! for each origin: u16 its number, 6 zeros, u64 LSN at the origin
//! u32  CRC-32C of all before
//! ```

use anyhow::{Result, ensure};

/// Where it lies in a data directory.
pub const ORIGINS_FILE: &str = "pg_logical/replorigin_checkpoint";
const MAGIC: u32 = 0x1257_DADE;
const ENTRY: usize = 16;
/// Marks changes that are not to be replicated; it has no progress (`DoNotReplicateId`).
pub const DO_NOT_REPLICATE: u16 = u16::MAX;

/// The file, from origins and their LSNs.
pub fn encode(origins: impl IntoIterator<Item = (u16, u64)>) -> Vec<u8> {
    let mut file = MAGIC.to_le_bytes().to_vec();
    for (node, lsn) in origins {
        file.extend_from_slice(&u64::from(node).to_le_bytes());
        file.extend_from_slice(&lsn.to_le_bytes());
    }
    let crc = crc32c::crc32c(&file);
    file.extend_from_slice(&crc.to_le_bytes());
    file
}

/// Reads what [`encode`] or PostgreSQL wrote.
pub fn decode(file: &[u8]) -> Result<Vec<(u16, u64)>> {
    let ends = file.split_last_chunk::<4>().and_then(|(content, crc)| {
        let (magic, entries) = content.split_first_chunk::<4>()?;
        Some((content, u32::from_le_bytes(*magic), entries, u32::from_le_bytes(*crc)))
    });
    let Some((content, magic, entries, crc)) = ends else {
        anyhow::bail!("{} bytes are no progress of origins", file.len());
    };
    ensure!(magic == MAGIC, "the progress of origins has the magic number {magic:#010x}");
    ensure!(crc32c::crc32c(content) == crc, "the progress of origins has a wrong checksum");
    let (entries, rest) = entries.as_chunks::<ENTRY>();
    ensure!(rest.is_empty(), "the progress of origins ends inside of an origin");
    Ok(entries
        .iter()
        .map(|entry| {
            let word =
                |at: usize| entry[at..at + 8].iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
            (word(0) as u16, word(8))
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by PostgreSQL 15: 3 origins.
    const WRITTEN: &[u8] = &[
        0xde, 0xda, 0x57, 0x12, 0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x01, 0x00, 0x00,
        0x00, 0x01, 0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x00,
        0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0x03, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x03,
        0x00, 0x00, 0x00, 0x01, 0x00, 0x00, 0x00, 0xe9, 0x1c, 0x21, 0xf7,
    ];

    #[test]
    fn the_file_is_postgresqls() {
        let origins = vec![(1, 0x100000001), (2, 0x100000002), (3, 0x100000003)];
        assert_eq!(decode(WRITTEN).ok(), Some(origins.clone()));
        assert_eq!(encode(origins), WRITTEN);
    }

    #[test]
    fn damage_is_noticed() {
        for at in 0..WRITTEN.len() {
            let mut file = WRITTEN.to_vec();
            file[at] ^= 1;
            assert!(decode(&file).is_err(), "byte {at}");
            assert!(decode(&WRITTEN[..at]).is_err(), "{at} bytes");
        }
    }
}
