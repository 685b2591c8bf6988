//! Which addresses are listened on.

use std::net::SocketAddr;

/// An address and port, as the command line gives it. Only this machine can reach it: nothing authenticates clients yet.
pub fn loopback(text: &str) -> Result<SocketAddr, String> {
    let address: SocketAddr = text
        .parse()
        .map_err(|_| "expected an address and port such as 127.0.0.1:5454".to_owned())?;
    match address.ip().is_loopback() {
        true => Ok(address),
        false => Err(format!(
            "{} can be reached from other machines, and authentication is not configured; listen \
             on 127.0.0.1",
            address.ip()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_listened_on() {
        for good in ["127.0.0.1:0", "[::1]:5"] {
            assert!(loopback(good).is_ok(), "{good}");
        }
        for bad in ["0.0.0.0:5", "[::]:5", "localhost", "127.0.0.1"] {
            assert!(loopback(bad).is_err(), "{bad}");
        }
    }
}
