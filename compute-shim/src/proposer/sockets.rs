//! Connections as the system has them, in one epoll.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use pgstrata_identity::{Identity, Stream};
use pgstrata_ids::NodeId;

use super::config::{ProposerConfig, ProposerError, WalSource};
use super::dialing::{Dialer, Dialing};
use super::driver::Driver;
use super::network::{Network, Ready, Wire};
use super::poller::Poller;

/// The token of connections that were made: they are taken in the next turn.
const DIAL_TOKEN: u64 = u64::MAX;

impl Wire for Stream {
    fn holds_more(&self) -> bool {
        Stream::holds_more(self)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Sockets {
    poller: Poller,
    dialer: Dialer,
    /// By token.
    dialings: Vec<Dialing>,
    ready: Vec<Ready>,
}

impl Sockets {
    /// Shows this identity to whom it connects to, if there is one.
    pub fn new(identity: Option<Identity>) -> Result<Sockets, ProposerError> {
        let poller = Poller::new().map_err(ProposerError::system("can't create an epoll"))?;
        let dialer = Dialer::new(identity)
            .and_then(|dialer| poller.add_signals(dialer.wake(), DIAL_TOKEN).map(|()| dialer))
            .map_err(ProposerError::system("can't create an eventfd"))?;
        Ok(Sockets { poller, dialer, dialings: Vec::new(), ready: Vec::new() })
    }

    /// Ends a wait, too, whenever this eventfd is written to, which nobody reads.
    pub fn watch_signals(&self, fd: impl AsFd) -> Result<(), ProposerError> {
        let added = self.poller.add_signals(fd, DIAL_TOKEN);
        added.map_err(ProposerError::system("can't watch an eventfd"))
    }
}

impl Network for Sockets {
    type Wire = Stream;

    fn dial(&mut self, token: u64, node: NodeId, address: &str) -> Option<io::Result<Stream>> {
        let index = token as usize;
        if self.dialings.len() <= index {
            self.dialings.resize_with(index + 1, Dialing::default);
        }
        let made = self.dialings[index].poll(node, address, &self.dialer)?;
        Some(made.and_then(|stream| {
            self.poller.add(stream.tcp(), token, true)?;
            Ok(stream)
        }))
    }

    fn is_dialing(&self, token: u64) -> bool {
        self.dialings.get(token as usize).is_some_and(Dialing::is_under_way)
    }

    fn tell_of_room(&mut self, token: u64, wire: &Stream, is_told: bool) -> io::Result<()> {
        self.poller.change(wire.tcp(), token, is_told)
    }
}

impl Driver<Sockets> {
    /// One that has said nothing yet, and [yields](Driver::new) or not.
    pub fn of_sockets(
        config: ProposerConfig,
        yields_above: Option<pgstrata_ids::Term>,
    ) -> Result<Driver<Sockets>, ProposerError> {
        let sockets = Sockets::new(config.identity.clone())?;
        Driver::new(config, yields_above, sockets, Instant::now())
    }

    /// Sends what there is to send, then waits for something to happen, at most `wait`, and looks at that.
    pub fn turn(
        &mut self,
        source: Option<&mut (dyn WalSource + '_)>,
        wait: Duration,
    ) -> Result<(), ProposerError> {
        let wait = self.begin_turn(Instant::now(), source, wait);
        let mut ready = std::mem::take(&mut self.network.ready);
        let waited = self.network.poller.wait(wait, &mut ready);
        ready.retain(|event| event.token != DIAL_TOKEN);
        self.end_turn(Instant::now(), &ready);
        self.network.ready = ready;
        waited.map_err(ProposerError::system("can't wait for sockets"))
    }
}
