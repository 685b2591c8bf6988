//! What lies in object storage and in safekeepers' directories.

use crate::input::Input;
use pgstrata_format::layer::{self, FOOTER_SIZE, Footer, HEADER_SIZE, LayerHeader};
use pgstrata_format::{archived::Extent, claim::Claim, index::TimelineIndex, resting, safekeeper};
use pgstrata_ids::NodeId;

/// A layer file, or another stored kind: `u8 kind`, then the file. Of kinds 1 to 3 the checksums are put right.
pub fn layer(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() {
        1 => file(&with_checksums(input.0)),
        2 => block(&with_block_checksum(input.0)),
        3 => {
            let mut bytes = input.0.to_vec();
            seal_kind(&mut bytes);
            let _ = safekeeper::decode_identity(&bytes);
            let _ = safekeeper::decode_members(&bytes);
            let _ = resting::decode_resting(&bytes, NodeId(1));
            let _ = safekeeper::decode_flushed(&bytes);
            let _ = safekeeper::decode_committed(&bytes);
            let _ = safekeeper::TimelineControl::decode(&bytes, NodeId(1));
            let length = (bytes.len() as u32).to_le_bytes();
            let skipped = [&0x184D_2A57_u32.to_le_bytes()[..], &length, &bytes].concat();
            let _ = Extent::decode(&skipped);
        }
        4 => {
            let body = input.0;
            let document = |begin: &str, sealed: bool| {
                let before = if sealed { crc32c::crc32c(begin.as_bytes()) } else { 0 };
                let line = format!("{begin}{:08x}\n", crc32c::crc32c_append(before, body));
                [line.as_bytes(), body].concat()
            };
            let _ = TimelineIndex::decode(&document("pgstrata-index 1 ", false));
            let _ = TimelineIndex::decode(&document("pgstrata-index 3 ", true));
            let _ = TimelineIndex::decode(body);
            let _ = Claim::decode(&document("pgstrata-claim 1 ", true));
            let _ = Claim::decode(body);
        }
        _ => {
            file(input.0);
            block(input.0);
            let _ = TimelineIndex::decode(input.0);
        }
    }
}

fn put(bytes: &mut [u8], at: usize, crc: u32) {
    bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

fn with_checksums(file: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    if file.len() < HEADER_SIZE + FOOTER_SIZE {
        return file;
    }
    let crc = crc32c::crc32c(&file[..132]);
    put(&mut file, 132, crc);
    let footer = file.len() - FOOTER_SIZE;
    let mut word = [0; 8];
    word.copy_from_slice(&file[footer..footer + 8]);
    let index = u64::from_le_bytes(word).min(footer as u64) as usize;
    let (body_crc, index_crc) =
        (crc32c::crc32c(&file[..index]), crc32c::crc32c(&file[index..footer]));
    put(&mut file, footer + 24, index_crc);
    put(&mut file, footer + 28, body_crc);
    let crc = crc32c::crc32c(&file[footer..footer + 36]);
    put(&mut file, footer + 36, crc);
    file
}

fn with_block_checksum(block: &[u8]) -> Vec<u8> {
    let mut block = block.to_vec();
    if block.len() > 4 {
        let crc = crc32c::crc32c(&block[4..]);
        put(&mut block, 0, crc);
    }
    block
}

/// The header of safekeepers' files: length and checksum of the body at 12 and 16, its own checksum at 20.
fn seal_kind(bytes: &mut [u8]) {
    if bytes.len() < 24 {
        return;
    }
    let length = bytes.len() as u32 - 24;
    put(bytes, 12, length);
    let crc = crc32c::crc32c(&bytes[24..]);
    put(bytes, 16, crc);
    let crc = crc32c::crc32c(&bytes[..20]);
    put(bytes, 20, crc);
}

fn file(bytes: &[u8]) {
    let _ = LayerHeader::decode(bytes);
    if let Some(at) = bytes.len().checked_sub(FOOTER_SIZE) {
        let _ = Footer::decode(&bytes[at..], bytes.len() as u64);
    }
    let Ok((_, _, handles)) = layer::verify(bytes) else { return };
    for handle in handles {
        let start = handle.offset as usize;
        if let Some(stored) = bytes.get(start..).and_then(|rest| rest.get(..handle.length as usize))
        {
            block(stored);
        }
    }
}

fn block(stored: &[u8]) {
    let Ok(plain) = layer::decode_block(stored) else { return };
    for entry in layer::entries(&plain) {
        let Ok(entry) = entry else { return };
        assert!(plain.get(entry.value).is_some());
    }
}
