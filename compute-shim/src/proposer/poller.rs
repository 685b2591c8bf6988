//! Waiting for several descriptors at once.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

use super::network::Ready;

/// Descriptors reported by one wait; the rest are reported by the next.
const MAX_EVENTS: usize = 32;

/// An epoll instance, level-triggered but for [`Poller::add_signals`].
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

fn flags(writable: bool) -> epoll::EventFlags {
    match writable {
        true => epoll::EventFlags::IN | epoll::EventFlags::OUT,
        false => epoll::EventFlags::IN,
    }
}

impl Poller {
    /// An instance that watches nothing yet.
    pub fn new() -> io::Result<Poller> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        Ok(Poller { epoll })
    }

    /// Watches a descriptor; closing it ends that.
    pub fn add(&self, fd: impl AsFd, token: u64, writable: bool) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags(writable))?)
    }

    /// Watches an eventfd that nobody reads: each write to it is reported once.
    pub fn add_signals(&self, fd: impl AsFd, token: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), flags)?)
    }

    /// Changes whether room to write is reported.
    pub fn change(&self, fd: impl AsFd, token: u64, writable: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(token), flags(writable))?)
    }

    /// Waits until something happens or the time is over.
    pub fn wait(&self, timeout: Duration, ready: &mut Vec<Ready>) -> io::Result<()> {
        ready.clear();
        let timeout = Timespec {
            tv_sec: timeout.as_secs().min(3600) as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        };
        let mut events = [const { MaybeUninit::uninit() }; MAX_EVENTS];
        let events = match epoll::wait(&self.epoll, &mut events, Some(&timeout)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let broken = epoll::EventFlags::ERR | epoll::EventFlags::HUP;
        ready.extend(events.iter().map(|event| {
            let flags = event.flags;
            Ready {
                token: event.data.u64(),
                readable: flags.intersects(epoll::EventFlags::IN | broken),
                writable: flags.intersects(epoll::EventFlags::OUT | broken),
            }
        }));
        Ok(())
    }
}
