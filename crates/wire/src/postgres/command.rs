//! Replication commands, by `repl_gram.y`.

use pgstrata_ids::Lsn;

/// A command of a replication connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Nothing but space.
    Empty,
    /// Who are you?
    IdentifySystem,
    /// A setting's value.
    Show(String),
    /// The history file of a timeline.
    TimelineHistory(u32),
    /// A physical slot.
    CreateSlot {
        /// Its name.
        name: String,
        /// For logical decoding, which isn't served here.
        logical: bool,
    },
    /// Where a slot is.
    ReadSlot(String),
    /// Remove a slot.
    DropSlot(String),
    /// Stream WAL.
    StartReplication {
        /// On behalf of this slot.
        slot: Option<String>,
        /// From here on.
        start: Lsn,
        /// PostgreSQL's timeline number, if given.
        timeline: Option<u32>,
    },
    /// A base backup, with its options as they were written.
    BaseBackup(String),
    /// What clients send to be safe from search paths; answered with an empty string.
    SetConfig,
}

/// A command that isn't understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("replication command not understood: {0}")]
pub struct CommandError(pub String);

/// Reads one command.
pub fn parse(text: &str) -> Result<Command, CommandError> {
    let text = text.trim().trim_end_matches(';').trim_end();
    let words = words(text);
    let word = |index: usize| words.get(index).map(String::as_str).unwrap_or_default();
    let is = |index: usize, expected: &str| word(index).eq_ignore_ascii_case(expected);
    let error = || CommandError(text.chars().take(200).collect());
    if words.is_empty() {
        return Ok(Command::Empty);
    }
    match word(0).to_ascii_uppercase().as_str() {
        "IDENTIFY_SYSTEM" => Ok(Command::IdentifySystem),
        "SHOW" if words.len() == 2 => Ok(Command::Show(word(1).to_ascii_lowercase())),
        "TIMELINE_HISTORY" => word(1).parse().map(Command::TimelineHistory).map_err(|_| error()),
        "CREATE_REPLICATION_SLOT" if words.len() >= 2 => {
            let physical = words.iter().any(|word| word.eq_ignore_ascii_case("PHYSICAL"));
            Ok(Command::CreateSlot { name: word(1).to_owned(), logical: !physical })
        }
        "READ_REPLICATION_SLOT" if words.len() == 2 => Ok(Command::ReadSlot(word(1).to_owned())),
        "DROP_REPLICATION_SLOT" if words.len() >= 2 => Ok(Command::DropSlot(word(1).to_owned())),
        "BASE_BACKUP" => Ok(Command::BaseBackup(text["BASE_BACKUP".len()..].trim().to_owned())),
        "SELECT" if text.contains("set_config") => Ok(Command::SetConfig),
        "START_REPLICATION" => {
            let mut at = 1;
            let slot = is(at, "SLOT").then(|| word(2).to_owned());
            at += if slot.is_some() { 2 } else { 0 };
            at += usize::from(is(at, "PHYSICAL"));
            let start = word(at).parse().map_err(|_| error())?;
            let timeline = match is(at + 1, "TIMELINE") {
                true => Some(word(at + 2).parse().map_err(|_| error())?),
                false if word(at + 1).is_empty() => None,
                false => return Err(error()),
            };
            Ok(Command::StartReplication { slot, start, timeline })
        }
        _ => Err(error()),
    }
}

/// Words, quoted names, and nothing about parentheses: none is needed inside them.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let (word, after) = match rest.strip_prefix('"') {
            Some(quoted) => {
                let end = quoted.find('"').unwrap_or(quoted.len());
                (&quoted[..end], quoted[end..].strip_prefix('"').unwrap_or_default())
            }
            None => {
                let separator = |c: char| c.is_whitespace() || "(),".contains(c);
                let end = rest.find(separator).unwrap_or(rest.len());
                (&rest[..end], rest[end..].trim_start_matches(separator))
            }
        };
        if !word.is_empty() {
            words.push(word.to_owned());
        }
        rest = after.trim_start();
    }
    words
}
