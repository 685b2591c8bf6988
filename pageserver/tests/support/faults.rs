//! An object store that fails on command.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use pgstrata_blob::{Interceptor, Verdict};
use pgstrata_pageserver::lock::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

/// Fails so many of a thousand operations; of those that write, some after they were done.
#[derive(Debug)]
pub struct Faults {
    per_mille: AtomicU32,
    indexes_only: AtomicBool,
    /// How many failed.
    pub failed: AtomicU64,
    random: Mutex<SmallRng>,
}

impl Faults {
    pub fn new(seed: u64) -> Faults {
        let random = Mutex::new(SmallRng::seed_from_u64(seed));
        Faults {
            per_mille: AtomicU32::new(0),
            indexes_only: AtomicBool::new(false),
            failed: AtomicU64::new(0),
            random,
        }
    }

    /// Of all operations.
    pub fn set(&self, per_mille: u32) {
        self.indexes_only.store(false, Ordering::SeqCst);
        self.per_mille.store(per_mille, Ordering::SeqCst);
    }

    /// Of those on timelines' indexes.
    pub fn set_for_indexes(&self, per_mille: u32) {
        self.indexes_only.store(true, Ordering::SeqCst);
        self.per_mille.store(per_mille, Ordering::SeqCst);
    }

    pub fn are_on(&self) -> bool {
        self.per_mille.load(Ordering::SeqCst) > 0
    }
}

impl Interceptor for Faults {
    fn verdict(&self, action: &'static str, path: &str) -> Verdict {
        if self.indexes_only.load(Ordering::SeqCst) && !path.ends_with("/index") {
            return Verdict::Perform;
        }
        let mut random = self.random.lock();
        if random.random_range(0..1000) >= self.per_mille.load(Ordering::SeqCst) {
            return Verdict::Perform;
        }
        self.failed.fetch_add(1, Ordering::SeqCst);
        match matches!(action, "write" | "swap" | "delete") && random.random_bool(0.5) {
            true => Verdict::LoseAnswer,
            false => Verdict::Refuse,
        }
    }
}
