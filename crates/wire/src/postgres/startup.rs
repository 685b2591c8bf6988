//! The first packet of a connection.

use crate::DecodeError;

/// Longest startup packet, in bytes (`MAX_STARTUP_PACKET_LENGTH`).
pub const MAX_STARTUP: usize = 10_000;

/// What a client may say first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// Asks for TLS: answered with one byte, then it starts again.
    SslRequest,
    /// Asks for GSSAPI encryption: likewise.
    GssRequest,
    /// Wants a query of another connection cancelled; there is no answer.
    Cancel,
    /// Wants a session.
    Session(StartupPacket),
}

/// Parameters of a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StartupPacket {
    /// The protocol's minor version that is asked for; 0 is understood by all.
    pub minor_version: u16,
    /// Names and values, as sent.
    pub parameters: Vec<(String, String)>,
}

impl Startup {
    /// The packet after its length word.
    pub fn decode(body: &[u8]) -> Result<Startup, DecodeError> {
        let (code, rest) = body.split_first_chunk().ok_or(DecodeError::Short("startup packet"))?;
        match u32::from_be_bytes(*code) {
            80_877_103 => Ok(Startup::SslRequest),
            80_877_104 => Ok(Startup::GssRequest),
            80_877_102 => Ok(Startup::Cancel),
            version if version >> 16 == 3 => {
                let parameters = parameters(rest)?;
                Ok(Startup::Session(StartupPacket { minor_version: version as u16, parameters }))
            }
            _ => Err(DecodeError::Impossible("protocol version (3.x is supported)")),
        }
    }
}

fn parameters(mut rest: &[u8]) -> Result<Vec<(String, String)>, DecodeError> {
    let mut parameters = Vec::new();
    let mut text = || -> Result<String, DecodeError> {
        let end = rest.iter().position(|&byte| byte == 0);
        let end = end.ok_or(DecodeError::Short("startup parameter"))?;
        let text = std::str::from_utf8(&rest[..end])
            .map_err(|_| DecodeError::Impossible("startup parameter"))?
            .to_owned();
        rest = &rest[end + 1..];
        Ok(text)
    };
    loop {
        let name = text()?;
        if name.is_empty() {
            return Ok(parameters);
        }
        parameters.push((name, text()?));
    }
}

impl StartupPacket {
    /// Options of the protocol itself that it asks for.
    pub fn protocol_options(&self) -> Vec<&str> {
        let names = self.parameters.iter().map(|(name, _)| name.as_str());
        names.filter(|name| name.starts_with("_pq_.")).collect()
    }

    /// All settings in the `options` parameter, in their order: of two with one name the last counts.
    pub fn settings(&self) -> Vec<(String, String)> {
        settings_of(self.get("options").unwrap_or_default())
    }

    /// A parameter's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// The value of `-c name=value` (or `--name=value`) in the `options` parameter.
    pub fn setting(&self, name: &str) -> Option<String> {
        self.settings().into_iter().rev().find(|(key, _)| key == name).map(|(_, value)| value)
    }
}

/// Splits command-line options into settings: `-c name=value`, `-cname=value`, `--name=value`.
/// A backslash takes the next character as it is (`pg_split_opts`).
pub fn settings_of(options: &str) -> Vec<(String, String)> {
    let mut words = Vec::new();
    let mut word = None;
    let mut characters = options.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' => word.get_or_insert_with(String::new).extend(characters.next()),
            space if space.is_ascii_whitespace() => words.extend(word.take()),
            other => word.get_or_insert_with(String::new).push(other),
        }
    }
    words.extend(word);
    let mut settings = Vec::new();
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let setting = match word.strip_prefix("--").or_else(|| word.strip_prefix("-c")) {
            Some("") => words.next(),
            Some(setting) => Some(setting.to_owned()),
            None => None,
        };
        if let Some((name, value)) = setting.as_deref().and_then(|text| text.split_once('=')) {
            settings.push((name.to_owned(), value.to_owned()));
        }
    }
    settings
}
