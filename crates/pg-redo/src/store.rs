//! Where a check keeps pages.

use crate::page::Page;
use pgstrata_ids::RelTag;
use std::collections::BTreeMap;

/// What a store knows of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Its content was written to the buffer.
    Page,
    /// It does not exist: zeros.
    Missing,
    /// It may exist, but its content is not known.
    Unknown,
}

/// Where a check keeps pages: all of them, or those of one partition ([`crate::partition`]).
pub trait PageStore {
    /// Errors of the store itself.
    type Error;
    /// Reads a block.
    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Self::Error>;
    /// Keeps a block.
    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Self::Error>;
    /// Forgets blocks from `blocks` on.
    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Self::Error>;
    /// Forgets a relation.
    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> Result<(), Self::Error>;
    /// Forgets a database in a tablespace.
    fn drop_database(&mut self, spc: u32, db: u32) -> Result<(), Self::Error>;
    /// Copies a database: `from` and `to` are tablespace and database.
    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> Result<(), Self::Error>;
}

/// Pages in memory, for tests and small checks. What it does not have is unknown, except after a truncation or drop.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    pages: BTreeMap<(RelTag, u32), Box<Page>>,
}

impl PageStore for MemoryStore {
    type Error = std::convert::Infallible;

    fn load(&mut self, rel: RelTag, block: u32, page: &mut Page) -> Result<Loaded, Self::Error> {
        Ok(match self.pages.get(&(rel, block)) {
            Some(found) => {
                *page = **found;
                Loaded::Page
            }
            None => Loaded::Unknown,
        })
    }

    fn store(&mut self, rel: RelTag, block: u32, page: &Page) -> Result<(), Self::Error> {
        self.pages.insert((rel, block), Box::new(*page));
        Ok(())
    }

    fn truncate(&mut self, rel: RelTag, blocks: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, block), _| *other != rel || *block < blocks);
        Ok(())
    }

    fn drop_relation(&mut self, spc: u32, db: u32, rel: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, _), _| (other.spc, other.db, other.rel) != (spc, db, rel));
        Ok(())
    }

    fn drop_database(&mut self, spc: u32, db: u32) -> Result<(), Self::Error> {
        self.pages.retain(|(other, _), _| (other.spc, other.db) != (spc, db));
        Ok(())
    }

    fn copy_database(&mut self, from: (u32, u32), to: (u32, u32)) -> Result<(), Self::Error> {
        let copies: Vec<_> = self
            .pages
            .iter()
            .filter(|((rel, _), _)| (rel.spc, rel.db) == from)
            .map(|((rel, block), page)| {
                ((RelTag { spc: to.0, db: to.1, ..*rel }, *block), page.clone())
            })
            .collect();
        self.pages.extend(copies);
        Ok(())
    }
}
