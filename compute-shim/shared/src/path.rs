//! Paths below a data directory, as PostgreSQL writes them.

/// A segment file of a relation fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SegmentId {
    /// Tablespace oid.
    pub spc: u32,
    /// Database oid, 0 for shared relations.
    pub db: u32,
    /// Relation file number.
    pub rel: u32,
    /// Fork number.
    pub fork: u8,
    /// Segment number.
    pub segment: u32,
}

/// What a path below the data directory names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    /// A relation segment.
    Relation(SegmentId),
    /// A database's directory in a tablespace.
    Database {
        /// Tablespace oid.
        spc: u32,
        /// Database oid.
        db: u32,
    },
    /// A WAL segment: timeline number and the two halves of the segment's number.
    Wal {
        /// Timeline number.
        timeline: u32,
        /// High half.
        high: u32,
        /// Low half.
        low: u32,
    },
    /// The control file.
    Control,
    /// The file that asks a standby to end its recovery (`PROMOTE_SIGNAL_FILE`).
    Promote,
    /// Anything else.
    Other,
}

const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

fn number(text: &[u8]) -> Option<u32> {
    if text.is_empty() || text.len() > 10 || text[0] == b'0' && text.len() > 1 {
        return None;
    }
    let mut value: u64 = 0;
    for &byte in text {
        if !byte.is_ascii_digit() {
            return None;
        }
        value = value * 10 + u64::from(byte - b'0');
    }
    u32::try_from(value).ok()
}

fn hexadecimal(text: &[u8]) -> Option<u32> {
    let mut value: u32 = 0;
    for &byte in text {
        value = value << 4 | (byte as char).to_digit(16)?;
    }
    Some(value)
}

fn split(text: &[u8], separator: u8) -> (&[u8], Option<&[u8]>) {
    match text.iter().position(|&byte| byte == separator) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    }
}

fn relation(spc: u32, db: u32, name: &[u8]) -> Named {
    let (name, segment) = split(name, b'.');
    let segment = match segment {
        None => Some(0),
        Some(text) => number(text).filter(|&segment| segment > 0),
    };
    let (rel, fork) = split(name, b'_');
    let fork = match fork {
        None => Some(0),
        Some(b"fsm") => Some(1),
        Some(b"vm") => Some(2),
        Some(b"init") => Some(3),
        Some(_) => None,
    };
    match (number(rel), fork, segment) {
        (Some(rel), Some(fork), Some(segment)) => {
            Named::Relation(SegmentId { spc, db, rel, fork, segment })
        }
        _ => Named::Other,
    }
}

fn in_database(spc: u32, rest: &[u8]) -> Named {
    let (db, name) = split(rest, b'/');
    match (number(db), name) {
        (Some(db), None | Some(b"")) => Named::Database { spc, db },
        (Some(db), Some(name)) => relation(spc, db, name),
        (None, _) => Named::Other,
    }
}

/// Writes `path` without empty parts, `.` and `..`, where it has any, and returns it as it is otherwise. One that does not
/// fit is returned as it is too.
pub fn canonical<'a>(path: &'a [u8], buffer: &'a mut [u8]) -> &'a [u8] {
    let is_plain = |part: &[u8]| !matches!(part, b"" | b"." | b"..");
    let below = path.strip_prefix(b"/").unwrap_or(path);
    if below.split(|&byte| byte == b'/').all(is_plain) || path.len() > buffer.len() {
        return path;
    }
    let root = path.len() - below.len();
    buffer[..root].copy_from_slice(&path[..root]);
    let mut end = root;
    for part in below.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                let parent = buffer[root..end].iter().rposition(|&byte| byte == b'/');
                end = parent.map_or(root, |at| root + at);
            }
            _ => {
                if end > root {
                    buffer[end] = b'/';
                    end += 1;
                }
                buffer[end..end + part.len()].copy_from_slice(part);
                end += part.len();
            }
        }
    }
    &buffer[..end]
}

/// What `path` names; `data` is the data directory's absolute path without a slash at its end.
/// Relative paths are below the data directory, which PostgreSQL makes its working directory.
pub fn parse(path: &[u8], data: &[u8]) -> Named {
    let mut rest = path;
    if let Some(below) = rest.strip_prefix(data)
        && below.first() == Some(&b'/')
    {
        rest = &below[1..];
    }
    while let Some(below) = rest.strip_prefix(b"./") {
        rest = below;
    }
    let (first, below) = split(rest, b'/');
    if first == b"global" && below.unwrap_or_default().is_empty() {
        return Named::Database { spc: GLOBAL_TABLESPACE, db: 0 };
    }
    let Some(below) = below else {
        return if first == b"promote" { Named::Promote } else { Named::Other };
    };
    match first {
        b"base" => in_database(DEFAULT_TABLESPACE, below),
        b"global" if below == b"pg_control" => Named::Control,
        b"global" => relation(GLOBAL_TABLESPACE, 0, below),
        b"pg_tblspc" => {
            let (spc, below) = split(below, b'/');
            let (version, below) = split(below.unwrap_or_default(), b'/');
            match (number(spc), version.starts_with(b"PG_"), below) {
                (Some(spc), true, Some(below)) => in_database(spc, below),
                _ => Named::Other,
            }
        }
        b"pg_wal" if below.len() == 24 => {
            let parts =
                (hexadecimal(&below[..8]), hexadecimal(&below[8..16]), hexadecimal(&below[16..]));
            match parts {
                (Some(timeline), Some(high), Some(low)) => Named::Wal { timeline, high, low },
                _ => Named::Other,
            }
        }
        _ => Named::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(path: &str) -> Named {
        parse(path.as_bytes(), b"/data/x")
    }

    fn rel(spc: u32, db: u32, rel: u32, fork: u8, segment: u32) -> Named {
        Named::Relation(SegmentId { spc, db, rel, fork, segment })
    }

    #[test]
    fn relations() {
        assert_eq!(parsed("base/5/1259"), rel(1663, 5, 1259, 0, 0));
        assert_eq!(parsed("./base/5/1259_vm"), rel(1663, 5, 1259, 2, 0));
        assert_eq!(parsed("/data/x/base/5/1259_init"), rel(1663, 5, 1259, 3, 0));
        assert_eq!(parsed("base/5/16384_fsm.3"), rel(1663, 5, 16384, 1, 3));
        assert_eq!(parsed("global/1262"), rel(1664, 0, 1262, 0, 0));
        assert_eq!(
            parsed("pg_tblspc/16400/PG_15_202209061/5/16401.12"),
            rel(16400, 5, 16401, 0, 12)
        );
    }

    #[test]
    fn others() {
        for path in [
            "base/5/t3_16384",
            "base/5/PG_VERSION",
            "base/5/pg_internal.init",
            "base/5/16384.0",
            "base/5/016384",
            "base/5/16384_foo",
            "base/pgsql_tmp/x",
            "global/pg_filenode.map",
            "/other/base/5/1259",
            "/data/xy/base/5/1259",
            "base",
            "",
            "pg_wal/xlogtemp.12",
            "pg_wal/000000010000000000000001.partial",
        ] {
            assert_eq!(parsed(path), Named::Other, "{path}");
        }
    }

    #[test]
    fn l14_one_file_has_one_name() {
        let canonical = |path: &str| {
            let mut buffer = [0; 64];
            String::from_utf8(canonical(path.as_bytes(), &mut buffer).to_vec()).unwrap()
        };
        for (path, plain) in [
            ("base/5/1259", "base/5/1259"),
            ("base//5/./1259", "base/5/1259"),
            ("./base/5/1259/", "base/5/1259"),
            ("base/5/../5/1259", "base/5/1259"),
            ("/data/x/../x//base/5/1259", "/data/x/base/5/1259"),
            ("/../base", "/base"),
            ("a/../../base", "base"),
            ("", ""),
        ] {
            assert_eq!(canonical(path), plain, "{path}");
        }
        let long = "x//".repeat(40);
        assert_eq!(canonical(&long), long);
    }

    #[test]
    fn directories_wal_and_control() {
        assert_eq!(parsed("base/5"), Named::Database { spc: 1663, db: 5 });
        assert_eq!(parsed("base/5/"), Named::Database { spc: 1663, db: 5 });
        assert_eq!(
            parsed("pg_tblspc/16400/PG_15_202209061/5"),
            Named::Database { spc: 16400, db: 5 }
        );
        for path in ["global", "./global", "global/", "/data/x/global"] {
            assert_eq!(parsed(path), Named::Database { spc: 1664, db: 0 });
        }
        assert_eq!(parsed("global/pg_control"), Named::Control);
        for path in ["promote", "./promote", "/data/x/promote"] {
            assert_eq!(parsed(path), Named::Promote);
        }
        assert_eq!(
            parsed("pg_wal/0000000100000002000000AB"),
            Named::Wal { timeline: 1, high: 2, low: 0xAB }
        );
    }
}
