//! What the command prints: an answer that can't be written is a failure with a line, not a panic.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

/// Whether the reader went away, as `| head` does when it has seen enough.
static READER_LEFT: AtomicBool = AtomicBool::new(false);

/// Standard output, which remembers that its reader left.
pub struct Out;

fn note<T>(result: io::Result<T>) -> io::Result<T> {
    if let Err(error) = &result
        && error.kind() == io::ErrorKind::BrokenPipe
    {
        READER_LEFT.store(true, Ordering::Relaxed);
    }
    result
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        note(io::stdout().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        note(io::stdout().flush())
    }
}

/// Whether nobody reads what is printed any more: then nothing failed.
pub fn reader_left() -> bool {
    READER_LEFT.load(Ordering::Relaxed)
}

/// Prints bytes.
pub fn bytes(bytes: &[u8]) -> Result<()> {
    Out.write_all(bytes).and_then(|()| Out.flush()).context("can't write the answer")
}

/// Prints a line.
pub fn line(text: &str) -> Result<()> {
    bytes(format!("{text}\n").as_bytes())
}
