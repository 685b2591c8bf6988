//! Connections that are made without keeping the loop waiting: the look-up of the name, the connection, the handshake of TLS.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use pgstrata_dial::dial_to;
use pgstrata_identity::{Identity, Stream, Whom};
use pgstrata_ids::NodeId;
use rustix::event::{EventfdFlags, eventfd};

/// A connection that isn't made by then is given up. The look-up of its name comes before, and ends by itself.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Who dials, and what it wakes: the loop that waits.
#[derive(Clone, Debug)]
pub struct Dialer {
    identity: Option<Identity>,
    wake: Arc<OwnedFd>,
}

impl Dialer {
    /// Shows this identity, if there is one.
    pub fn new(identity: Option<Identity>) -> io::Result<Dialer> {
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        Ok(Dialer { identity, wake })
    }

    /// Written to when a connection was made, or failed. Nobody reads it.
    pub fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

/// One connection to a safekeeper that is to be made. At most one thread is at it.
#[derive(Debug, Default)]
pub struct Dialing {
    asked: Option<(String, Receiver<io::Result<Stream>>)>,
}

impl Dialing {
    /// Whether a connection is being made.
    pub fn is_under_way(&self) -> bool {
        self.asked.is_some()
    }

    /// The connection, which does not block, or why there is none; nothing while it is being made: then ask again. One to
    /// another address than the one that is asked for now is waited for, and thrown away.
    pub fn poll(
        &mut self,
        node: NodeId,
        address: &str,
        dialer: &Dialer,
    ) -> Option<io::Result<Stream>> {
        let Some((asked_for, made)) = &self.asked else {
            return self.start(node, address, dialer).err().map(Err);
        };
        let made = match made.try_recv() {
            Ok(made) => made,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => Err(io::Error::other("the thread ended early")),
        };
        let is_asked_for = asked_for == address;
        self.asked = None;
        is_asked_for.then_some(made)
    }

    fn start(&mut self, node: NodeId, address: &str, dialer: &Dialer) -> io::Result<()> {
        let (sender, receiver) = channel();
        let (to, dialer) = (address.to_owned(), dialer.clone());
        let dial = move || {
            let whom = Whom::Safekeeper(Some(node));
            let made = dial_to(&to, whom, dialer.identity.as_ref(), CONNECT_TIMEOUT);
            let made = made.and_then(|stream| {
                stream.tcp().set_nonblocking(true)?;
                Ok(stream)
            });
            // Nobody waits any more if the link is gone.
            let _ = sender.send(made);
            // Full only after 2^64 of these.
            let _ = rustix::io::write(&*dialer.wake, &1u64.to_ne_bytes());
        };
        std::thread::Builder::new().name("dial".into()).spawn(dial)?;
        self.asked = Some((address.to_owned(), receiver));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Instant;

    use super::*;

    fn wait(dialing: &mut Dialing, address: &str, dialer: &Dialer) -> io::Result<Stream> {
        let since = Instant::now();
        loop {
            assert!(since.elapsed() < Duration::from_secs(20));
            match dialing.poll(NodeId(1), address, dialer) {
                Some(made) => return made,
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn h4_a_name_is_looked_up_beside_the_loop() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("localhost:{}", listener.local_addr().unwrap().port());
        let dialer = Dialer::new(None).unwrap();
        let mut dialing = Dialing::default();
        assert!(dialing.poll(NodeId(1), &address, &dialer).is_none(), "the first call only asks");
        let stream = wait(&mut dialing, &address, &dialer).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), listener.local_addr().unwrap());
        let mut count = [0; 8];
        rustix::io::read(dialer.wake(), &mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1, "who waits is woken");
    }

    #[test]
    fn a_connection_to_another_address_is_none() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (dialer, mut dialing) = (Dialer::new(None).unwrap(), Dialing::default());
        assert!(dialing.poll(NodeId(1), "127.0.0.3:1", &dialer).is_none());
        let stream = wait(&mut dialing, &address, &dialer).unwrap();
        assert_eq!(stream.peer_addr().unwrap().to_string(), address);
        assert!(wait(&mut dialing, "127.0.0.3:1", &dialer).is_err());
    }
}
