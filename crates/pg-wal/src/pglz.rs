//! PostgreSQL's own compression, decoding only (common/pg_lzcompress.c).
//!
//! A control byte, lowest bit first, says for each of the next eight items whether it is a literal byte (0) or a copy
//! of earlier output (1). A copy is two bytes: length - 3 in the low half of the first, distance in the high half of
//! the first (times 16) and the second; a length of 18 is continued in a third byte.

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// Decompresses `input` to exactly fill `out`, using all of `input`.
pub(crate) fn decompress(input: &[u8], out: &mut [u8]) -> Result<(), Corrupt> {
    let mut from = 0;
    let mut to = 0;
    let byte = |at: usize| input.get(at).copied().ok_or(Corrupt);
    while from < input.len() && to < out.len() {
        let control = byte(from)?;
        from += 1;
        for bit in 0..8 {
            if from >= input.len() || to >= out.len() {
                break;
            }
            if control >> bit & 1 == 0 {
                out[to] = byte(from)?;
                from += 1;
                to += 1;
                continue;
            }
            let (first, second) = (byte(from)?, byte(from + 1)?);
            from += 2;
            let mut length = usize::from(first & 0x0F) + 3;
            let distance = usize::from(first & 0xF0) << 4 | usize::from(second);
            if length == 18 {
                length += usize::from(byte(from)?);
                from += 1;
            }
            if distance == 0 || distance > to {
                return Err(Corrupt);
            }
            // PostgreSQL cuts a copy that would overrun the output; the ends must still agree.
            length = length.min(out.len() - to);
            for _ in 0..length {
                out[to] = out[to - distance];
                to += 1;
            }
        }
    }
    if from == input.len() && to == out.len() { Ok(()) } else { Err(Corrupt) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn literals_and_overlapping_copies() {
        // "ab", then 6 bytes from 2 back, then "c".
        let input = [0b0000_0100, b'a', b'b', 0x03, 0x02, b'c'];
        let mut out = [0; 9];
        assert_eq!(decompress(&input, &mut out), Ok(()));
        assert_eq!(&out, b"abababab\x63");
    }

    #[test]
    fn long_copies_have_a_third_byte() {
        let input = [0b0000_0010, b'x', 0x0F, 0x01, 20];
        let mut out = [0; 39];
        assert_eq!(decompress(&input, &mut out), Ok(()));
        assert_eq!(out, [b'x'; 39]);
    }

    #[test]
    fn both_ends_must_meet() {
        let input = [0, b'a', b'b'];
        assert_eq!(decompress(&input, &mut [0; 1]), Err(Corrupt));
        assert_eq!(decompress(&input, &mut [0; 3]), Err(Corrupt));
        assert_eq!(decompress(&[1, 0x00, 0x01], &mut [0; 3]), Err(Corrupt), "before the start");
    }

    proptest! {
        #[test]
        fn no_input_panics(input: Vec<u8>, length in 0usize..9000) {
            let _ = decompress(&input, &mut vec![0; length]);
        }
    }
}
