//! The one-way switch that a failed write or sync throws: the process ends, nothing is retried.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Throws `latch` at every panic, on any thread: what it left half done is not known, and a task
/// that is gone would be missed only when its work is. Whoever watches the latch ends the process.
pub fn throw_on_panic(latch: &Latch) {
    let latch = latch.clone();
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        before(panic);
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("of no name");
        latch.throw(&format!("thread {name} ended by mistake, which is a bug: {panic}"));
    }));
}

/// Shared by everything that writes.
#[derive(Clone, Debug, Default)]
pub struct Latch(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Set after the reason: every write asks.
    is_thrown: AtomicBool,
    reason: Mutex<Option<String>>,
    thrown: Notify,
}

impl Latch {
    /// Throws it; the first reason stays.
    pub fn throw(&self, reason: &str) {
        self.0.reason.lock().get_or_insert_with(|| reason.to_owned());
        self.0.is_thrown.store(true, Ordering::Release);
        self.0.thrown.notify_waiters();
        self.0.thrown.notify_one();
    }

    /// Why it was thrown, if it was.
    pub fn reason(&self) -> Option<String> {
        if !self.0.is_thrown.load(Ordering::Acquire) {
            return None;
        }
        self.0.reason.lock().clone()
    }

    /// Waits until it is thrown.
    pub async fn thrown(&self) -> String {
        loop {
            if let Some(reason) = self.reason() {
                return reason;
            }
            self.0.thrown.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h8_a_panic_on_any_thread_is_known() {
        let latch = Latch::default();
        throw_on_panic(&latch);
        let ended = std::thread::Builder::new().name("some-work".into()).spawn(|| panic!("why"));
        assert!(ended.unwrap().join().is_err());
        let reason = latch.reason().unwrap();
        assert!(reason.contains("some-work") && reason.contains("why"), "{reason}");
    }
}
