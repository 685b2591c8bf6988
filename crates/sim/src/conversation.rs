//! Conversations that were recorded: what each side sent, in turn, as text that a review can read.
//!
//! ```text
//! # what it is
//! > 0102 6*0 03       a client's bytes, hexadecimal; `6*0` is six zeros
//! < 04                the server's answer
//! ```

use std::fmt::Write as _;

/// Zeros from so many on are counted.
const MANY: usize = 5;

/// Who sent something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Whoever connected.
    Client,
    /// Whoever was connected to.
    Server,
}

/// One piece of a conversation.
pub type Turn = (Side, Vec<u8>);

/// Reads a conversation; an error names the line.
pub fn read(text: &str) -> Result<Vec<Turn>, String> {
    let mut turns = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let wrong = || format!("line {}: {line}", number + 1);
        let (side, bytes) = match line.as_bytes().first() {
            None | Some(b'#') => continue,
            Some(b'>') => (Side::Client, &line[1..]),
            Some(b'<') => (Side::Server, &line[1..]),
            Some(_) => return Err(wrong()),
        };
        turns.push((side, bytes_of(bytes).ok_or_else(wrong)?));
    }
    Ok(turns)
}

fn bytes_of(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    for word in text.split_ascii_whitespace() {
        match word.strip_suffix("*0") {
            Some(count) => bytes.resize(bytes.len() + count.parse::<usize>().ok()?, 0),
            None if word.len() % 2 == 0 => {
                let digits = |at: usize| u8::from_str_radix(word.get(at..at + 2)?, 16).ok();
                let all: Option<Vec<u8>> = (0..word.len()).step_by(2).map(digits).collect();
                bytes.extend(all?);
            }
            None => return None,
        }
    }
    Some(bytes)
}

/// Writes a conversation, `about` it on top.
pub fn write(about: &str, turns: &[Turn]) -> String {
    let mut text = format!("# {about}\n");
    for (side, bytes) in turns {
        text.push(if *side == Side::Client { '>' } else { '<' });
        text.push(' ');
        let mut rest = &bytes[..];
        while let Some(first) = rest.first() {
            let zeros = rest.iter().take_while(|byte| **byte == 0).count();
            // Writing to a string can't fail.
            let _ = match zeros >= MANY {
                true => write!(text, " {zeros}*0 "),
                false => write!(text, "{first:02x}"),
            };
            rest = &rest[if zeros >= MANY { zeros } else { 1 }..];
        }
        let length = text.trim_end().len();
        text.truncate(length);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let turns = vec![
            (Side::Client, vec![1, 0, 0, 2]),
            (Side::Server, [&[3][..], &[0; 20], &[4; 3], &[0; 5]].concat()),
            (Side::Client, vec![0; 9]),
        ];
        let text = write("a test", &turns);
        assert_eq!(text, "# a test\n> 01000002\n< 03 20*0 040404 5*0\n>  9*0\n");
        assert_eq!(read(&text).unwrap(), turns);
        for wrong in ["? 00", "> 0", "> 0g", "> x*0"] {
            assert_eq!(read(wrong).unwrap_err(), format!("line 1: {wrong}"));
        }
    }
}
