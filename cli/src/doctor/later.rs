//! Looks that may hang: a disk, a name service, a process that was stopped. Each has a thread, which is left behind where
//! it does not come back in time; the process ends without it.

use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

/// What a look will have found.
pub struct Later<T>(Receiver<T>);

impl<T: Send + 'static> Later<T> {
    /// Begins to look.
    pub fn start(look: impl FnOnce() -> T + Send + 'static) -> Later<T> {
        let (sender, receiver) = sync_channel(1);
        // Nobody may want it any more.
        std::thread::spawn(move || sender.send(look()));
        Later(receiver)
    }

    /// Waits for it; `None` if it does not come in time, or the look panicked.
    pub fn wait(self, deadline: Instant) -> Option<T> {
        self.0.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn what_hangs_is_left_behind() {
        let began = Instant::now();
        let soon = || Instant::now() + Duration::from_millis(50);
        let hung = Later::start(|| std::thread::sleep(Duration::from_secs(60)));
        assert_eq!(hung.wait(soon()), None);
        assert_eq!(Later::start(|| 7).wait(Instant::now() + Duration::from_secs(20)), Some(7));
        assert_eq!(Later::<u8>::start(|| panic!("on purpose")).wait(soon()), None);
        assert!(began.elapsed() < Duration::from_secs(30));
    }
}
