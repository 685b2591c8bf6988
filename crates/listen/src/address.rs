//! Which addresses are listened on, and by which others are told to come.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::str::FromStr;

use socket2::{Domain, Protocol, Socket, Type};

use crate::Security;

/// Connections that the system completes before they are accepted.
const BACKLOG: i32 = 1024;

/// Longest name of a host, in bytes: the Domain Name System's.
const LONGEST_HOST: usize = 253;

/// An address and port, as the command line gives it.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "expected an address and port such as 127.0.0.1:5454 or [::1]:5454".to_owned())
}

/// Where others find a port, as the command line gives it: `HOST:PORT`, the host a name or an address. With port 0 it is
/// the port that is listened on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advertised {
    host: String,
    port: u16,
}

impl FromStr for Advertised {
    type Err = String;

    fn from_str(text: &str) -> Result<Advertised, String> {
        let wrong = || format!("'{text}' is no HOST:PORT such as safekeeper-1.example.org:5454");
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        let address = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(inside) => Some(IpAddr::V6(inside.parse::<Ipv6Addr>().map_err(|_| wrong())?)),
            None => host.parse().ok(),
        };
        match address {
            Some(address) => check_reachable(address)?,
            None => {
                let is_usual = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
                if host.is_empty() || host.len() > LONGEST_HOST || !host.bytes().all(is_usual) {
                    return Err(wrong());
                }
            }
        }
        Ok(Advertised { host: host.to_owned(), port })
    }
}

impl fmt::Display for Advertised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// Nobody can connect to the address that stands for all of a machine's.
fn check_reachable(address: IpAddr) -> Result<(), String> {
    match address.is_unspecified() {
        true => Err(format!("{address} stands for all addresses of a machine, and leads nowhere")),
        false => Ok(()),
    }
}

/// One port of a service, listened on at any number of addresses.
#[derive(Debug)]
pub struct Listening {
    listeners: Vec<TcpListener>,
    /// The first address that is listened on.
    pub first: SocketAddr,
}

impl Listening {
    /// Binds all of `addresses`, of which there is one at least: on loopback only, unless clients have to show who they
    /// are.
    pub fn bind(addresses: &[SocketAddr], security: &Security) -> io::Result<Listening> {
        let bound = |address: &SocketAddr| {
            security.check_address(*address)?;
            bind(*address).map_err(|error| {
                io::Error::new(error.kind(), format!("can't listen on {address}: {error}"))
            })
        };
        let listeners = addresses.iter().map(bound).collect::<io::Result<Vec<_>>>()?;
        let first = listeners.first().ok_or_else(|| io::Error::other("no address to listen on"))?;
        let first = first.local_addr()?;
        Ok(Listening { listeners, first })
    }

    /// Where others are told to come, as `HOST:PORT`: what was `asked` for with `--advertise-NAME`, or the first address,
    /// which must lead somewhere then.
    pub fn advertised(&self, name: &str, asked: Option<&Advertised>) -> io::Result<String> {
        match asked {
            Some(Advertised { host, port: 0 }) => Ok(format!("{host}:{}", self.first.port())),
            Some(advertised) => Ok(advertised.to_string()),
            None => {
                check_reachable(self.first.ip()).map_err(|why| {
                    io::Error::other(format!(
                        "{why}: say with --advertise-{name} where others come"
                    ))
                })?;
                Ok(self.first.to_string())
            }
        }
    }

    /// For threads.
    pub fn blocking(self) -> Vec<TcpListener> {
        self.listeners
    }

    /// For tasks of the runtime that this is called in.
    pub fn asynchronous(self) -> io::Result<Vec<tokio::net::TcpListener>> {
        let converted = self.listeners.into_iter().map(|listener| {
            listener.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(listener)
        });
        converted.collect()
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        // [::] is all addresses of IPv6, so that 0.0.0.0 can be named beside it.
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn only_loopback_is_listened_on() {
        for text in ["0.0.0.0:0", "[::]:0"] {
            let bound = Listening::bind(&[address(text).unwrap()], &Security::default());
            let error = bound.unwrap_err().to_string();
            assert!(error.contains("--tls"), "{error}");
        }
        assert!(address("localhost").is_err() && address("127.0.0.1").is_err());
    }

    #[test]
    fn what_is_advertised_leads_somewhere() {
        let long = format!("{}:5", "a".repeat(LONGEST_HOST + 1));
        for good in ["a:5", "safekeeper-1.zone_a.example.org:5454", "10.0.0.1:0", "[fd00::1]:7"] {
            assert_eq!(good.parse::<Advertised>().unwrap().to_string(), good);
        }
        for bad in [
            "",
            "a",
            ":5",
            "a:",
            "a:65536",
            "a b:5",
            "0.0.0.0:5",
            "[::]:5",
            "::1:5x",
            "[a]:5",
            &long,
        ] {
            assert!(bad.parse::<Advertised>().is_err(), "{bad}");
        }
    }

    #[test]
    fn one_port_is_listened_on_at_several_addresses() {
        let first: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let port = Listening::bind(&[first], &Security::default()).unwrap().first.port();
        let addresses: Vec<SocketAddr> = [format!("127.0.0.1:{port}"), format!("127.0.0.2:{port}")]
            .iter()
            .map(|text| text.parse().unwrap())
            .collect();
        let advertised = "db.example.org:0".parse().unwrap();
        let listening = Listening::bind(&addresses, &Security::default()).unwrap();
        let advertised = listening.advertised("x", Some(&advertised)).unwrap();
        assert_eq!(advertised, format!("db.example.org:{port}"));
        for address in &addresses {
            TcpStream::connect(address).unwrap();
        }
        let taken = Listening::bind(&addresses, &Security::default()).unwrap_err().to_string();
        assert!(taken.contains(&addresses[0].to_string()), "{taken}");
        assert!(taken.contains("Address already in use"), "{taken}");
        drop(listening);
        let listening = Listening::bind(&addresses, &Security::default()).unwrap();
        assert_eq!(listening.advertised("x", None).unwrap(), addresses[0].to_string());
    }

    #[test]
    fn all_addresses_are_advertised_by_none() {
        let first = SocketAddr::from(([0, 0, 0, 0], 7));
        let listening = Listening { listeners: Vec::new(), first };
        let error = listening.advertised("wal", None).unwrap_err().to_string();
        assert!(error.contains("--advertise-wal"), "{error}");
        let name = "localhost:0".parse().unwrap();
        assert!(listening.advertised("wal", Some(&name)).is_ok());
    }
}
