//! PostgreSQL's configuration files, read to know what a user asked for.
//!
//! Owns the grammar of `postgresql.conf` and its includes. It judges nothing, and misses nothing that PostgreSQL takes:
//! a line that this does not understand stops PostgreSQL itself at its start.

use std::fs::OpenOptions;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::plain_file::plain_file;

/// Files included by files included by files: PostgreSQL's own limit (`CONF_FILE_MAX_DEPTH` in utils/conffiles.h).
const MAX_DEPTH: usize = 10;
/// Bytes of one file, at most.
const MAX_FILE: u64 = 16 << 20;
/// Files in all, at most.
const MAX_FILES: usize = 1000;

/// A setting in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The setting's name, in lower case.
    pub name: String,
    /// Its value, without quotes.
    pub value: String,
    /// Where it stands, for people.
    pub place: String,
}

/// What the files of a data directory say, in the order in which it counts: the last entry of a name wins.
/// An error where there is more than we read: PostgreSQL would follow what we have not seen.
/// Where another `config_file` was given, that is read in the place of `postgresql.conf`.
pub fn read(data: &Path, config_file: Option<&str>) -> Result<Vec<Entry>> {
    let mut reader = Reader { entries: Vec::new(), files: 0 };
    // One that is relative is relative to where the server is started, which is where we are.
    let first = config_file.map_or_else(|| data.join("postgresql.conf"), PathBuf::from);
    reader.file(&first, 0)?;
    reader.file(&data.join("postgresql.auto.conf"), 0)?;
    Ok(reader.entries)
}

/// The entry that counts.
pub fn find<'a>(entries: &'a [Entry], name: &str) -> Option<&'a Entry> {
    entries.iter().rev().find(|entry| entry.name == name)
}

struct Reader {
    entries: Vec<Entry>,
    files: usize,
}

impl Reader {
    fn file(&mut self, path: &Path, depth: usize) -> Result<()> {
        // PostgreSQL refuses more of them itself.
        if depth > MAX_DEPTH {
            return Ok(());
        }
        self.files += 1;
        ensure!(self.files <= MAX_FILES, "the configuration has more than {MAX_FILES} files");
        // What can't be read stops PostgreSQL, or is nothing to it.
        let Ok(file) = plain_file(path, OpenOptions::new().read(true)) else { return Ok(()) };
        let mut bytes = Vec::new();
        if file.take(MAX_FILE + 1).read_to_end(&mut bytes).is_err() {
            return Ok(());
        }
        ensure!(
            bytes.len() as u64 <= MAX_FILE,
            "{} has more than {MAX_FILE} bytes: a configuration file can't have so many",
            path.display()
        );
        let text = String::from_utf8_lossy(&bytes);
        let directory = path.parent().unwrap_or(Path::new("/"));
        for (number, line) in text.lines().enumerate() {
            let Some((name, value)) = parse(line) else { continue };
            match name.as_str() {
                "include" | "include_if_exists" => {
                    self.file(&directory.join(value), depth + 1)?;
                }
                "include_dir" => self.directory(&directory.join(value), depth + 1)?,
                _ => {
                    let file = path.file_name().unwrap_or(path.as_os_str()).display();
                    let place = format!("{file} line {}", number + 1);
                    self.entries.push(Entry { name, value, place });
                }
            }
        }
        Ok(())
    }

    /// Every `*.conf` in it that is not hidden, in the order of the names.
    fn directory(&mut self, path: &Path, depth: usize) -> Result<()> {
        let Ok(found) = std::fs::read_dir(path) else { return Ok(()) };
        let mut files: Vec<PathBuf> = found.flatten().map(|entry| entry.path()).collect();
        files.retain(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            name.ends_with(".conf") && !name.starts_with('.')
        });
        files.sort();
        files.iter().try_for_each(|file| self.file(file, depth))
    }
}

/// `name = value # comment`, where `=` is optional and the value may be quoted.
fn parse(line: &str) -> Option<(String, String)> {
    let line = line.trim_start();
    let named =
        |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '.') || !c.is_ascii();
    let length = line.find(|c| !named(c)).unwrap_or(line.len());
    let (name, rest) = line.split_at(length);
    if name.is_empty() {
        return None;
    }
    let rest = rest.trim_start();
    let rest = rest.strip_prefix('=').unwrap_or(rest).trim_start();
    let value = match rest.strip_prefix('\'') {
        Some(quoted) => unquote(quoted),
        None => {
            let end = rest.find(|c: char| c.is_whitespace() || c == '#').unwrap_or(rest.len());
            rest[..end].to_owned()
        }
    };
    Some((name.to_ascii_lowercase(), value))
}

/// The text before the closing quote: `''` and backslash escapes stand for characters.
fn unquote(text: &str) -> String {
    let mut value = String::new();
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' if chars.peek() == Some(&'\'') => {
                chars.next();
                value.push('\'');
            }
            '\'' => break,
            '\\' => match chars.next() {
                Some('n') => value.push('\n'),
                Some('r') => value.push('\r'),
                Some('t') => value.push('\t'),
                Some('b') => value.push('\u{8}'),
                Some('f') => value.push('\u{c}'),
                Some(digit @ '0'..='7') => {
                    let mut number = digit.to_digit(8).unwrap_or(0);
                    for _ in 0..2 {
                        match chars.peek().and_then(|next| next.to_digit(8)) {
                            Some(next) => number = number * 8 + next,
                            None => break,
                        }
                        chars.next();
                    }
                    value.push(char::from_u32(number & 0xFF).unwrap_or(' '));
                }
                Some(other) => value.push(other),
                None => break,
            },
            other => value.push(other),
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_postgresql_reads_them() {
        let cases = [
            ("wal_level = minimal", Some(("wal_level", "minimal"))),
            ("  WAL_Level minimal# why", Some(("wal_level", "minimal"))),
            ("wal_level='min\\151mal' # octal", Some(("wal_level", "minimal"))),
            ("archive_command = 'cp %p ''x y''#'", Some(("archive_command", "cp %p 'x y'#"))),
            ("a.b=1", Some(("a.b", "1"))),
            ("# wal_level = minimal", None),
            ("", None),
        ];
        for (line, expected) in cases {
            let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
            assert_eq!(parse(line), expected, "{line}");
        }
    }

    #[test]
    fn includes_are_followed_and_the_last_entry_wins() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            "postgresql.conf",
            "fsync = on\ninclude 'a.conf'\ninclude_dir = 'conf.d'\nloop = 1\n",
        );
        write("a.conf", "fsync = off\ninclude 'a.conf'\n");
        write("conf.d/2.conf", "wal_level = logical\n");
        write("conf.d/1.conf", "wal_level = minimal\n");
        write("conf.d/.3.conf", "wal_level = hidden\n");
        write("postgresql.auto.conf", "port = '7'\n");
        let entries = read(directory.path(), None).unwrap();
        let value = |name| find(&entries, name).map(|entry| entry.value.as_str());
        assert_eq!(value("fsync"), Some("off"));
        assert_eq!(value("wal_level"), Some("logical"));
        assert_eq!(find(&entries, "port").unwrap().place, "postgresql.auto.conf line 1");
        assert_eq!(value("include"), None);
        let other = directory.path().join("conf.d/2.conf").display().to_string();
        let entries = read(directory.path(), Some(&other)).unwrap();
        assert_eq!(entries.len(), 2, "{entries:?}");
        // What is not looked at could say anything.
        let long = format!("{}\nwal_level = minimal\n", "#".repeat(MAX_FILE as usize));
        write("a.conf", &long);
        assert!(read(directory.path(), None).unwrap_err().to_string().contains("a.conf"));
    }
}
