//! The one-way switch that a failed write or sync throws: the process ends, nothing is retried.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Shared by everything that writes.
#[derive(Clone, Debug, Default)]
pub struct Latch(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    reason: Mutex<Option<String>>,
    thrown: Notify,
}

impl Latch {
    /// Throws it; the first reason stays.
    pub fn throw(&self, reason: &str) {
        self.0.reason.lock().get_or_insert_with(|| reason.to_owned());
        self.0.thrown.notify_waiters();
        self.0.thrown.notify_one();
    }

    /// Why it was thrown, if it was.
    pub fn reason(&self) -> Option<String> {
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
