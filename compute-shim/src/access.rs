//! Who may connect to PostgreSQL itself. That is the user's to say, in `pg_hba.conf`; until he does, it is one of the
//! files here, by whether the server can be reached from other machines.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use anyhow::{Context, Result};

/// Where it is said.
pub const FILE: &str = "pg_hba.conf";

/// For a server that only this machine reaches: whoever is on it may do everything.
pub const ON_LOOPBACK: &str = "\
# Written once by the compute shim. It listens on loopback addresses only.
local all all trust
host all all 127.0.0.1/32 trust
host all all ::1/128 trust
local replication all trust
host replication all 127.0.0.1/32 trust
host replication all ::1/128 trust
";

/// For one that other machines reach, where `pg_ident.conf` is somebody's: his maps may be for anything.
pub const BEYOND_LOOPBACK: &str = "\
# Written by the compute shim, because this server listens beyond loopback addresses: nobody connects without a password,
# from this machine neither. By its Unix socket, a user of the system connects as the role of the same name.
# Change anything here, and it stays as it is.
local all all peer
host all all all scram-sha-256
local replication all peer
host replication all all scram-sha-256
";

/// For one that other machines reach, with [`map`] as `pg_ident.conf`: whoever the server runs as is its superuser, by
/// whichever name.
pub const BEYOND_LOOPBACK_MAPPED: &str = "\
# Written by the compute shim, because this server listens beyond loopback addresses: nobody connects without a password,
# from this machine neither. By its Unix socket, a user of the system connects as the role of the same name, and the one that
# the server runs as as 'postgres' too (pg_ident.conf).
# Change anything here, and it stays as it is.
local all all peer map=compute
host all all all scram-sha-256
local replication all peer map=compute
host replication all all scram-sha-256
";

/// What says who may connect by the Unix socket as whom.
pub const MAP_FILE: &str = "pg_ident.conf";

/// `pg_ident.conf` for [`BEYOND_LOOPBACK_MAPPED`], where the server runs as this user of the system.
pub fn map(user: &str) -> String {
    let user = user.replace('"', "");
    format!(
        "# Written by the compute shim for its pg_hba.conf.\ncompute \"{user}\" postgres\ncompute /^(.*)$ \\1\n"
    )
}

fn addresses(listen: &str) -> impl Iterator<Item = &str> {
    listen.split(',').map(|one| one.trim().trim_matches('"')).filter(|one| !one.is_empty())
}

fn is_loopback(address: &str) -> bool {
    address.eq_ignore_ascii_case("localhost")
        || address.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a server with these `listen_addresses` can be reached from other machines. A name that is not `localhost`
/// counts as one of theirs.
pub fn is_open(listen: &str) -> bool {
    addresses(listen).any(|address| !is_loopback(address))
}

/// Whether one of us wrote this `pg_hba.conf`.
pub fn is_ours(text: &str) -> bool {
    [ON_LOOPBACK, BEYOND_LOOPBACK, BEYOND_LOOPBACK_MAPPED].contains(&text)
}

/// The file that fits `listen`; `mapped` if `pg_ident.conf` is, or may become, ours.
pub fn fitting(listen: &str, mapped: bool) -> &'static str {
    match (is_open(listen), mapped) {
        (false, _) => ON_LOOPBACK,
        (true, true) => BEYOND_LOOPBACK_MAPPED,
        (true, false) => BEYOND_LOOPBACK,
    }
}

/// Fails where a server would find no address to listen on: before it is started, another one would be fenced for it.
pub fn check_free(listen: &str, port: u16) -> Result<()> {
    let mut last = None;
    for address in addresses(listen) {
        let tried = match address.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) if address == "*" => {
                vec![(Ipv4Addr::UNSPECIFIED, port).into(), (Ipv6Addr::UNSPECIFIED, port).into()]
            }
            Err(_) if is_loopback(address) => {
                vec![(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
            }
            // A name: PostgreSQL looks it up, and that may take long.
            Err(_) => return Ok(()),
        };
        for address in tried {
            match TcpListener::bind(address) {
                // One is enough for PostgreSQL.
                Ok(_) => return Ok(()),
                Err(error) => last = Some((address, error)),
            }
        }
    }
    match last {
        Some((address, error)) => Err(error).with_context(|| format!("can't listen on {address}")),
        None => Ok(()),
    }
}

/// The URI by which a server is reached, from this machine if it can be.
pub fn uri(listen: &str, port: u16, socket_directory: &Path) -> String {
    let host = |address: &str| match address.parse() {
        Ok(IpAddr::V4(v4)) if v4.is_unspecified() => "127.0.0.1".to_owned(),
        Ok(IpAddr::V6(v6)) if v6.is_unspecified() => "[::1]".to_owned(),
        Ok(IpAddr::V6(v6)) => format!("[{v6}]"),
        _ if address == "*" => "127.0.0.1".to_owned(),
        _ => address.to_owned(),
    };
    let hosts: Vec<String> = addresses(listen).map(host).collect();
    let near = hosts.iter().find(|host| is_loopback(host.trim_matches(['[', ']'])));
    match near.or(hosts.first()) {
        Some(host) => format!("postgresql://postgres@{host}:{port}/postgres"),
        None => {
            let mut directory = String::new();
            for &byte in socket_directory.as_os_str().as_encoded_bytes() {
                match byte {
                    b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'_' | b'-' => {
                        directory.push(char::from(byte));
                    }
                    // Writing to a string does not fail.
                    _ => drop(write!(directory, "%{byte:02X}")),
                }
            }
            format!("postgresql://postgres@/postgres?host={directory}&port={port}")
        }
    }
}

/// The fields of a line of `pg_hba.conf`, as far as they are needed: a list with commas is one, and so is a quoted word.
fn fields(line: &str) -> Vec<String> {
    let mut fields: Vec<String> = Vec::new();
    let mut goes_on = false;
    let blank = |c: char| c.is_whitespace() || c == ',';
    let mut rest = line.trim_start_matches(blank);
    while !rest.is_empty() && !rest.starts_with('#') {
        let mut quoted = false;
        let end = rest.find(|c: char| {
            quoted ^= c == '"';
            !quoted && (c.is_whitespace() || c == '#')
        });
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        // After a comma a list goes on, blanks or not.
        let plain = word.replace('"', "");
        match fields.last_mut() {
            Some(list) if goes_on => list.push_str(&plain),
            _ => fields.push(plain),
        }
        goes_on = word.ends_with(',');
        rest = after.trim_start_matches(blank);
    }
    fields
}

/// Lines with their numbers, those that end with a backslash joined with the next, as PostgreSQL does.
fn lines(text: &str) -> Vec<(usize, String)> {
    let mut joined: Vec<(usize, String)> = Vec::new();
    let mut goes_on = false;
    for (at, line) in text.lines().enumerate() {
        let part = line.strip_suffix('\\').unwrap_or(line);
        match joined.last_mut() {
            Some((_, whole)) if goes_on => whole.push_str(part),
            _ => joined.push((at + 1, part.to_owned())),
        }
        goes_on = part.len() < line.len();
    }
    joined
}

/// From where a line lets people in without a password, if that is from beyond this machine.
fn trusts(line: &str) -> Option<String> {
    let fields = fields(line);
    let [kind, _, _, address, rest @ ..] = &fields[..] else { return None };
    if !kind.starts_with("host") {
        return None;
    }
    // ADDRESS, ADDRESS/BITS, or ADDRESS MASK.
    let (network, bits) = address.split_once('/').unwrap_or((address, ""));
    let network: Option<IpAddr> = network.parse().ok();
    let has_mask = network.is_some() && bits.is_empty();
    let (mask, method) = match has_mask {
        true => (rest.first()?.parse::<IpAddr>().ok(), rest.get(1)?),
        false => (None, rest.first()?),
    };
    // All of 127.0.0.0/8 is this machine, but a wider mask is more than that.
    let least = match network {
        Some(IpAddr::V4(_)) => 8,
        _ => 128,
    };
    let bits = bits.parse().unwrap_or(match mask {
        Some(IpAddr::V4(mask)) => mask.to_bits().leading_ones(),
        Some(IpAddr::V6(mask)) => mask.to_bits().leading_ones(),
        None => 0,
    });
    let is_near = match network {
        Some(network) => network.is_loopback() && bits >= least,
        None => ["localhost", "samehost"].contains(&address.as_str()),
    };
    (method == "trust" && !is_near).then(|| address.clone())
}

/// What to say of a `pg_hba.conf` where a server listens beyond this machine. Files that it includes are not looked at.
pub fn warnings(text: &str, listen: &str) -> Vec<String> {
    let trusting = lines(text).into_iter().filter_map(|(at, line)| Some((at, trusts(&line)?)));
    let warning = |(number, from): (usize, String)| {
        format!(
            "pg_hba.conf line {number} lets anybody in from {from} without a password (trust), and the server listens on \
             {listen}: say scram-sha-256 there"
        )
    };
    trusting.map(warning).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_this_machine() {
        for near in ["127.0.0.1", "localhost", " ::1 , 127.0.0.2", "", "LOCALHOST", "\"127.0.0.1\""]
        {
            assert!(!is_open(near), "{near}");
        }
        for open in ["*", "0.0.0.0", "::", "127.0.0.1,10.0.0.5", "db.example.org", "localhost,*"] {
            assert!(is_open(open), "{open}");
        }
    }

    #[test]
    fn a_file_of_ours_follows_what_is_listened_on_and_an_edited_one_stays() {
        assert_eq!(fitting("127.0.0.1", true), ON_LOOPBACK);
        assert_eq!(fitting("*", true), BEYOND_LOOPBACK_MAPPED);
        assert_eq!(fitting("localhost, ::", false), BEYOND_LOOPBACK);
        let edited = format!("{ON_LOOPBACK}host all all 10.0.0.0/8 trust\n");
        assert!(!is_ours(&edited) && is_ours(ON_LOOPBACK) && is_ours(BEYOND_LOOPBACK_MAPPED));
        assert!(!BEYOND_LOOPBACK.contains("trust") && !BEYOND_LOOPBACK_MAPPED.contains("trust"));
        assert!(map("al\"ice").contains("\ncompute \"alice\" postgres\n"));
        assert!(warnings(ON_LOOPBACK, "*").is_empty());
    }

    #[test]
    fn lines_that_trust_other_machines_are_said() {
        for (line, from) in [
            ("host all all all trust", Some("all")),
            ("host all all 10.0.0.0/8 trust", Some("10.0.0.0/8")),
            ("hostssl all all 0.0.0.0 0.0.0.0 trust # why", Some("0.0.0.0")),
            ("  hostnossl \"my db\" \"a,b\" samenet trust", Some("samenet")),
            ("host all all 127.0.0.1/0 trust", Some("127.0.0.1/0")),
            ("host all all ::1/0 trust", Some("::1/0")),
            ("host all all 127.0.0.1 0.0.0.0 trust", Some("127.0.0.1")),
            ("host all all db.example.org \"trust\"", Some("db.example.org")),
            ("host postgres, template1 a,b , all trust", Some("all")),
            ("host postgres, template1 all all trust", Some("all")),
            ("host all all 127.0.0.1 255.255.255.255 trust", None),
            ("host all all 127.0.0.0/8 trust", None),
            ("host all all ::1/128 trust", None),
            ("host all all localhost trust", None),
            ("host all all all scram-sha-256", None),
            ("# host all all all trust", None),
            ("local all all trust", None),
            ("host all", None),
            ("host all all 10.0.0.1", None),
            ("", None),
        ] {
            assert_eq!(trusts(line).as_deref(), from, "{line}");
        }
        // Lines that go on are one, with the number of its first.
        let text = "local all all peer\nhost all all \\\n all \\\ntrust\n#\nhost all all 10.0.0.0/8 trust\n";
        let said = warnings(text, "*");
        assert!(said.len() == 2 && said[0].contains("line 2 ") && said[0].contains("from all "));
        assert!(said[1].contains("line 6 ") && said[1].contains("10.0.0.0/8"), "{said:?}");
    }

    #[test]
    fn a_port_that_is_taken_everywhere_is_noticed() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = taken.local_addr().expect("its address").port();
        for listen in ["127.0.0.1", "127.0.0.1,192.0.2.1", "192.0.2.1"] {
            assert!(check_free(listen, port).is_err(), "{listen}");
        }
        for listen in ["127.0.0.1,127.0.0.2", "", "127.0.0.1,db.example.org"] {
            assert!(check_free(listen, port).is_ok(), "{listen}");
        }
    }

    #[test]
    fn uris_lead_to_the_server() {
        let directory = Path::new("/var/a b");
        for (listen, expected) in [
            ("127.0.0.1", "postgresql://postgres@127.0.0.1:7/postgres"),
            ("*", "postgresql://postgres@127.0.0.1:7/postgres"),
            ("10.0.0.5, localhost", "postgresql://postgres@localhost:7/postgres"),
            ("::", "postgresql://postgres@[::1]:7/postgres"),
            ("fd00::5", "postgresql://postgres@[fd00::5]:7/postgres"),
            ("db.example.org", "postgresql://postgres@db.example.org:7/postgres"),
            ("", "postgresql://postgres@/postgres?host=/var/a%20b&port=7"),
        ] {
            assert_eq!(uri(listen, 7, directory), expected, "{listen}");
        }
    }
}
