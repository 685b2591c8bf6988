//! What a check found.

use crate::branch::{self, Branch};
use crate::error::RecordKind;
use pgstrata_ids::{Lsn, RelTag};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::fmt;

/// Mismatches and unsupported records that are described; all are counted.
const DESCRIBED: usize = 100;

/// Counts of one kind of record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Records.
    pub records: u64,
    /// Blocks compared.
    pub compared: u64,
    /// Blocks that the record gives whole, by an image: there is nothing to compare them with.
    pub restored: u64,
    /// Blocks that differ.
    pub mismatches: u64,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.records += other.records;
        self.compared += other.compared;
        self.restored += other.restored;
        self.mismatches += other.mismatches;
    }
}

/// A block that differs.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// The record after which it differs.
    pub record: RecordKind,
    /// Start of the record.
    pub lsn: Lsn,
    /// Relation and fork.
    pub rel: RelTag,
    /// Block number.
    pub block: u32,
    /// The block's id in the record; `None` if the record does not refer to it.
    pub role: Option<u8>,
    /// How it differs.
    pub difference: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { record, lsn, rel, block, role, difference } = self;
        write!(f, "{record} at {lsn}, ")?;
        match role {
            Some(role) => write!(f, "block reference {role}, ")?,
            None => write!(f, "not referred to, ")?,
        }
        write!(f, "{rel} block {block}: {difference}")
    }
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Records read.
    pub records: u64,
    /// Blocks compared.
    pub compared: u64,
    /// Blocks that could not be compared, because their earlier content is not known.
    pub without_base: u64,
    /// Blocks that differ.
    pub mismatches: u64,
    /// Visibility map pages, compared strictly, on which the image lacks bits that replay still has.
    pub visibility_pending: u64,
    /// Records that cannot be replayed.
    pub unsupported: u64,
    /// The first mismatches, in the order of the WAL.
    pub mismatch_list: Vec<Mismatch>,
    /// The first records that cannot be replayed, and why.
    pub unsupported_list: Vec<String>,
    counts: FxHashMap<(RecordKind, Branch), Counts>,
}

impl Report {
    /// By record kind, as `Heap/INSERT`.
    pub fn by_record(&self) -> BTreeMap<String, Counts> {
        let mut by_record: BTreeMap<String, Counts> = BTreeMap::new();
        for ((kind, _), counts) in &self.counts {
            by_record.entry(kind.to_string()).or_default().add(*counts);
        }
        by_record
    }

    /// By record kind and by what of it there was: the blocks that it referred to, and its flags.
    pub fn by_branch(&self) -> BTreeMap<String, BTreeMap<String, Counts>> {
        let mut by_branch: BTreeMap<String, BTreeMap<String, Counts>> = BTreeMap::new();
        for ((kind, branch), counts) in &self.counts {
            let name = branch::describe(*kind, *branch);
            by_branch.entry(kind.to_string()).or_default().entry(name).or_default().add(*counts);
        }
        by_branch
    }

    /// Adds what another part of the same check found.
    pub fn merge(&mut self, other: &Report) {
        self.records += other.records;
        self.compared += other.compared;
        self.without_base += other.without_base;
        self.mismatches += other.mismatches;
        self.visibility_pending += other.visibility_pending;
        self.unsupported += other.unsupported;
        self.mismatch_list.extend_from_slice(&other.mismatch_list);
        self.mismatch_list.sort_by_key(|mismatch| (mismatch.lsn, mismatch.role));
        self.mismatch_list.truncate(DESCRIBED);
        self.unsupported_list.extend_from_slice(&other.unsupported_list);
        self.unsupported_list.truncate(DESCRIBED);
        for ((kind, branch), counts) in &other.counts {
            self.count(*kind, *branch, *counts);
        }
    }

    pub(crate) fn count(&mut self, kind: RecordKind, branch: Branch, counts: Counts) {
        self.counts.entry((kind, branch)).or_default().add(counts);
    }

    pub(crate) fn describe_unsupported(&mut self, text: String) {
        if self.unsupported_list.len() < DESCRIBED {
            self.unsupported_list.push(text);
        }
    }

    pub(crate) fn describe_mismatch(&mut self, mismatch: Mismatch) {
        if self.mismatch_list.len() < DESCRIBED {
            self.mismatch_list.push(mismatch);
        }
    }
}
