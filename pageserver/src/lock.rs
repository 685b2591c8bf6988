//! Locks, and the rule that none is held while something slow is waited for.
//!
//! A [`Mutex`] or an [`RwLock`] guards memory, for moments: whoever answers requests may take it. A [`Turn`] is for those
//! who do something slow one after the other, and is never taken by what is answered from memory. Each thread counts the
//! locks that it holds, and tests fail where one waits for the object store ([`wait_for`]) or for a turn with one of them
//! held. Other kinds of locks and `Handle::block_on` are refused by clippy (`clippy.toml` beside this crate's `Cargo.toml`);
//! a runtime is made by `main` only.
#![expect(clippy::disallowed_types, clippy::disallowed_methods, reason = "here they are wrapped")]

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use tokio::runtime::Handle;

thread_local! {
    static HELD: Cell<u32> = const { Cell::new(0) };
}

/// Fails tests where this thread holds a lock.
pub fn assert_none_held() {
    debug_assert_eq!(HELD.get(), 0, "a lock is held while something slow is waited for");
}

/// Waits for work on the object store, on a thread that may wait.
pub fn wait_for<F: Future>(runtime: &Handle, work: F) -> F::Output {
    assert_none_held();
    runtime.block_on(work)
}

/// A guard that is counted.
pub struct Held<G>(G);

impl<G> Held<G> {
    fn new(guard: G) -> Held<G> {
        HELD.set(HELD.get() + 1);
        Held(guard)
    }
}

impl<G> Drop for Held<G> {
    fn drop(&mut self) {
        HELD.set(HELD.get() - 1);
    }
}

impl<G: Deref> Deref for Held<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.0
    }
}

impl<G: DerefMut> DerefMut for Held<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.0
    }
}

/// Guards memory, for moments.
#[derive(Debug, Default)]
pub struct Mutex<T>(parking_lot::Mutex<T>);

impl<T> Mutex<T> {
    /// With this value.
    pub const fn new(value: T) -> Mutex<T> {
        Mutex(parking_lot::Mutex::new(value))
    }

    /// The value, to look at and to change.
    pub fn lock(&self) -> Held<parking_lot::MutexGuard<'_, T>> {
        Held::new(self.0.lock())
    }
}

/// Guards memory, for moments, for many readers.
#[derive(Debug, Default)]
pub struct RwLock<T>(parking_lot::RwLock<T>);

impl<T> RwLock<T> {
    /// With this value.
    pub const fn new(value: T) -> RwLock<T> {
        RwLock(parking_lot::RwLock::new(value))
    }

    /// The value, to look at.
    pub fn read(&self) -> Held<parking_lot::RwLockReadGuard<'_, T>> {
        Held::new(self.0.read())
    }

    /// The value, to look at and to change.
    pub fn write(&self) -> Held<parking_lot::RwLockWriteGuard<'_, T>> {
        Held::new(self.0.write())
    }
}

/// Whose turn it is to do something slow, and what those who do it share.
#[derive(Debug, Default)]
pub struct Turn<T>(parking_lot::Mutex<T>);

impl<T> Turn<T> {
    /// With this value.
    pub const fn new(value: T) -> Turn<T> {
        Turn(parking_lot::Mutex::new(value))
    }

    /// Waits for those who came before.
    pub fn take(&self) -> parking_lot::MutexGuard<'_, T> {
        assert_none_held();
        self.0.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h2_no_lock_is_held_while_the_store_is_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (mutex, lock, turn) = (Mutex::new(1), RwLock::new(2), Turn::new(3));
        let wait = || wait_for(runtime.handle(), async { 4 });
        let caught = |held: &dyn Fn() -> i32| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(held)).is_err()
        };
        assert_eq!(*turn.take() + wait(), 7);
        assert!(caught(&|| *mutex.lock() + wait()));
        assert!(caught(&|| *lock.read() + wait()));
        assert!(caught(&|| *lock.write() + *turn.take()));
        // What was held is given back, whatever happened.
        *mutex.lock() += 1;
        *lock.write() += 1;
        assert_eq!(*mutex.lock() + *lock.read(), 5);
        assert_eq!(wait(), 4);
    }
}
