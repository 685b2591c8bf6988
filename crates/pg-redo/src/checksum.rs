//! Page checksums (storage/checksum_impl.h): 32 interleaved FNV-1a-like sums, folded into 16 bits.

use crate::page::Page;

const LANES: usize = 32;
const PRIME: u32 = 16_777_619;

/// Start values of the lanes.
const START: [u32; LANES] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

fn step(sum: u32, value: u32) -> u32 {
    let mixed = sum ^ value;
    mixed.wrapping_mul(PRIME) ^ (mixed >> 17)
}

/// The checksum of a page with this block number in its fork; never 0. The stored checksum does not count.
pub fn pd_checksum(page: &Page, block: u32) -> u16 {
    let mut sums = START;
    for (row, bytes) in page.chunks_exact(LANES * 4).enumerate() {
        for (lane, raw) in bytes.chunks_exact(4).enumerate() {
            let mut word = u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]);
            if row == 0 && lane == 2 {
                word &= 0xFFFF_0000;
            }
            sums[lane] = step(sums[lane], word);
        }
    }
    for _ in 0..2 {
        for sum in &mut sums {
            *sum = step(*sum, 0);
        }
    }
    let folded = sums.iter().fold(0, |folded, sum| folded ^ sum) ^ block;
    (folded % 65_535 + 1) as u16
}

/// Sets the page's checksum, unless it was never initialised: such a page stays all zeros.
pub fn set_checksum(page: &mut Page, block: u32) {
    if !crate::page::is_new(page) {
        let checksum = pd_checksum(page, block);
        page[8..10].copy_from_slice(&checksum.to_le_bytes());
    }
}
