//! TLS on a blocking socket that one thread reads while another writes.
//!
//! Three locks, taken in this order, each by whoever needs it:
//!
//! | lock | what it keeps | held across |
//! |---|---|---|
//! | `incoming` | bytes that were read from the socket and not decrypted | reading from the socket |
//! | `outgoing` | records that were encrypted and have not left | writing to the socket |
//! | `session` | the state of TLS | decrypting or encrypting, never a wait |
//!
//! Records must leave in the order in which they were encrypted, so a writer holds `outgoing` from before it encrypts until
//! all of it has left. A reader never waits for that lock, nor for the socket to take something: two peers that both write
//! and don't get on until the other reads would wait for each other forever. What TLS itself has to say when it reads (an
//! alert; the answer to a change of keys) leaves at once if nobody writes and the socket takes it; otherwise the next
//! writer takes it along, and nothing depends on its being soon.
//!
//! A timeout of reading leaves what came so far in `incoming`. A timeout of writing ends writing for good: the caller can't
//! be told how many of its bytes left, and would send some twice. On a socket that does not block, and has no timeout of
//! writing, it is no end: what was encrypted is kept, and leaves with the next write or flush.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::net::SendFlags;
use rustls::Connection;

use crate::explain::tls_error;
use crate::handshake::handshake;
use crate::{Certificate, Role};

/// What is read from the socket at once, in bytes: a few records of TLS, of which none is longer than 16,645 bytes.
const INCOMING_BYTES: usize = 64 * 1024;

/// See the module.
pub struct Tls {
    tcp: TcpStream,
    /// Who it is, and the certificate that says so.
    peer: Option<(Role, Certificate)>,
    protocol: Option<Vec<u8>>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    session: Mutex<Connection>,
}

struct Incoming {
    bytes: Box<[u8]>,
    /// Which of them are yet to be decrypted.
    from: usize,
    until: usize,
    /// The socket has no more.
    ended: bool,
    /// Why nothing more can be decrypted.
    failed: Option<rustls::Error>,
}

#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    /// How many of them have left.
    sent: usize,
    /// Why nothing is written any more.
    failed: Option<io::ErrorKind>,
}

impl Tls {
    /// Makes the handshake.
    pub(crate) fn new(
        tcp: TcpStream,
        mut session: Connection,
        deadline: Instant,
    ) -> io::Result<Tls> {
        handshake(&tcp, &mut session, deadline)?;
        let peer = match session.peer_certificates() {
            None | Some([]) => None,
            // The verifier has read the same.
            Some([own, ..]) => Some(
                Certificate::read(own)
                    .and_then(|certificate| Ok((certificate.role()?, certificate)))
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?,
            ),
        };
        let incoming = Incoming {
            bytes: vec![0; INCOMING_BYTES].into_boxed_slice(),
            from: 0,
            until: 0,
            ended: false,
            failed: None,
        };
        Ok(Tls {
            tcp,
            peer,
            protocol: session.alpn_protocol().map(<[u8]>::to_vec),
            incoming: Mutex::new(incoming),
            outgoing: Mutex::default(),
            session: Mutex::new(session),
        })
    }

    pub(crate) fn peer_role(&self) -> Option<&Role> {
        self.peer.as_ref().map(|(role, _)| role)
    }

    pub(crate) fn peer_certificate(&self) -> Option<&Certificate> {
        self.peer.as_ref().map(|(_, certificate)| certificate)
    }

    pub(crate) fn protocol(&self) -> Option<&[u8]> {
        self.protocol.as_deref()
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// How the handshake went.
    pub fn handshake_kind(&self) -> Option<rustls::HandshakeKind> {
        self.session.lock().handshake_kind()
    }

    /// Takes new keys for what is sent from now on, and asks the peer to do so. It happens by itself where a key has
    /// encrypted as much as it may: this is for tests of that.
    #[doc(hidden)]
    pub fn refresh_keys(&self) -> io::Result<()> {
        self.session.lock().refresh_traffic_keys().map_err(tls_error)
    }

    /// Reads some bytes; none at the end that the peer meant. An end that it did not say by TLS is `UnexpectedEof`.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let mut incoming = self.incoming.lock();
        let incoming = &mut *incoming;
        loop {
            let mut session = self.session.lock();
            let decrypted = incoming.decrypt(&mut session, buffer);
            let has_to_say = session.wants_write();
            drop(session);
            if has_to_say {
                self.send_without_waiting();
            }
            if let Some(count) = decrypted? {
                return Ok(count);
            }
            match (&self.tcp).read(&mut incoming.bytes)? {
                0 => incoming.ended = true,
                count => (incoming.from, incoming.until) = (0, count),
            }
        }
    }

    /// See [`crate::Stream::holds_more`].
    pub(crate) fn holds_more(&self) -> bool {
        let incoming = self.incoming.lock();
        if incoming.from < incoming.until || incoming.failed.is_some() {
            return true;
        }
        // Nothing new: it only tells what is there. What is wrong is for reading to say.
        let state = self.session.lock().process_new_packets();
        state.map_or(true, |state| state.plaintext_bytes_to_read() > 0 || state.peer_has_closed())
    }

    /// Writes some bytes, 64 KiB at most: these have left when it returns, on a socket that blocks.
    pub(crate) fn write(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut outgoing = self.outgoing.lock();
        // First what an earlier call left behind: until it has left, nothing of this call is taken.
        self.finish(&mut outgoing)?;
        if slices.iter().all(|slice| slice.is_empty()) {
            return Ok(0);
        }
        let mut session = self.session.lock();
        let taken = session.writer().write_vectored(slices)?;
        outgoing.take_from(&mut session)?;
        drop(session);
        match self.finish(&mut outgoing) {
            Err(error) if outgoing.failed.is_some() => Err(error),
            // It leaves later.
            Ok(()) | Err(_) => Ok(taken),
        }
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        self.finish(&mut self.outgoing.lock())
    }

    /// Sends what there is to send. Any error but that of a socket that does not block is the last one.
    fn finish(&self, outgoing: &mut Outgoing) -> io::Result<()> {
        if let Some(failed) = outgoing.failed {
            return Err(io::Error::new(failed, "writing on this connection ended before"));
        }
        let result = outgoing.send(|bytes| (&self.tcp).write(bytes));
        if let Err(error) = &result {
            let waits = error.kind() == io::ErrorKind::WouldBlock;
            if !waits || self.tcp.write_timeout()?.is_some() {
                outgoing.failed = Some(error.kind());
            }
        }
        result
    }

    /// What TLS has to say, unless somebody writes, and as far as the socket takes it now.
    fn send_without_waiting(&self) {
        if let Some(mut outgoing) = self.outgoing.try_lock() {
            self.send_now(&mut outgoing, |_| {});
        }
    }

    /// Who writes next finds what does not leave, and the error if there is one.
    fn send_now(&self, outgoing: &mut Outgoing, say: impl FnOnce(&mut Connection)) {
        if outgoing.failed.is_some() {
            return;
        }
        let mut session = self.session.lock();
        say(&mut session);
        let taken = outgoing.take_from(&mut session);
        drop(session);
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        if taken.is_ok() {
            let _ = outgoing.send(|bytes| Ok(rustix::net::send(&self.tcp, bytes, flags)?));
        }
    }

    /// See [`crate::Stream::shutdown`].
    pub(crate) fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        if how != Shutdown::Read {
            self.say_end();
        }
        self.tcp.shutdown(how)
    }

    /// Tells the peer that nothing comes after this, and lets nothing come; unless somebody writes.
    fn say_end(&self) {
        if let Some(mut outgoing) = self.outgoing.try_lock() {
            self.send_now(&mut outgoing, |session| session.send_close_notify());
            outgoing.failed.get_or_insert(io::ErrorKind::BrokenPipe);
        }
    }
}

impl Incoming {
    /// Decrypts until there is something to read, and reads it. `None` if more has to come from the socket first.
    fn decrypt(
        &mut self,
        session: &mut Connection,
        buffer: &mut [u8],
    ) -> io::Result<Option<usize>> {
        loop {
            match session.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let text = "the connection broke off";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
                }
                read => return read.map(Some),
            }
            if let Some(error) = &self.failed {
                return Err(tls_error(error.clone()));
            }
            if self.from == self.until && !self.ended {
                return Ok(None);
            }
            let mut rest = &self.bytes[self.from..self.until];
            session.read_tls(&mut rest)?;
            self.from = self.until - rest.len();
            if let Err(error) = session.process_new_packets() {
                // What was decrypted before is read yet.
                self.failed = Some(error);
            }
        }
    }
}

impl Outgoing {
    fn take_from(&mut self, session: &mut Connection) -> io::Result<()> {
        while session.wants_write() {
            session.write_tls(&mut self.bytes)?;
        }
        Ok(())
    }

    fn send(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        while self.sent < self.bytes.len() {
            match write(&self.bytes[self.sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        Ok(())
    }
}

impl Drop for Tls {
    fn drop(&mut self) {
        self.say_end();
    }
}

/// Without keys and what was said.
impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("tcp", &self.tcp).field("peer", &self.peer).finish()
    }
}
