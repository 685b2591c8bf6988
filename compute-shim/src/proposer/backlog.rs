//! The newest WAL, kept in memory until every safekeeper has it or there is too much.

use std::collections::VecDeque;

use bytes::Bytes;
use pgstrata_ids::{Lsn, Term};
use pgstrata_quorum::Append;
use pgstrata_wire::safekeeper::AppendHead;

use super::config::WalChunk;

/// Distance of the record boundaries that are remembered of dropped WAL, in bytes.
const BOUNDARY_DISTANCE: u64 = 1 << 20;

/// Most boundaries remembered.
const MAX_BOUNDARIES: usize = 65_536;

/// A piece of WAL with the frame that carries it: both the same for all safekeepers.
#[derive(Clone, Debug)]
pub struct Piece {
    pub start: Lsn,
    pub record_end: Lsn,
    /// What it says of what is committed: as much as was known when it was made.
    pub commit_lsn: Lsn,
    pub head: AppendHead,
    pub payload: Bytes,
}

impl Piece {
    /// The frame for a piece of WAL.
    pub fn new(term: Term, chunk: WalChunk, commit_lsn: Lsn) -> Piece {
        let append = Append {
            term,
            start: chunk.start,
            length: chunk.bytes.len() as u64,
            record_end: chunk.record_end,
            commit_lsn,
        };
        let head = AppendHead::new(&append, &chunk.bytes);
        let WalChunk { start, record_end, bytes: payload } = chunk;
        Piece { start, record_end, commit_lsn, head, payload }
    }

    /// Position after the last byte.
    pub fn end(&self) -> Lsn {
        self.start + self.payload.len() as u64
    }
}

/// See the module.
#[derive(Debug)]
pub struct Backlog {
    pieces: VecDeque<Piece>,
    base: Lsn,
    end: Lsn,
    boundaries: VecDeque<Lsn>,
    /// Most bytes in memory, but for the last piece.
    limit: u64,
}

impl Backlog {
    /// An empty log that ends at `start`, a record boundary, and keeps so many bytes in memory.
    pub fn new(start: Lsn, limit: u64) -> Backlog {
        let boundaries = [start].into();
        Backlog { pieces: VecDeque::new(), base: start, end: start, boundaries, limit }
    }

    /// First byte in memory.
    pub fn base(&self) -> Lsn {
        self.base
    }

    /// Position after the last byte.
    pub fn end(&self) -> Lsn {
        self.end
    }

    /// Adds a piece, which starts at the end.
    pub fn push(&mut self, piece: Piece) {
        debug_assert_eq!(piece.start, self.end);
        self.end = piece.end();
        self.pieces.push_back(piece);
    }

    /// The piece that holds `at`, which is in memory.
    pub fn piece_at(&self, at: Lsn) -> Option<&Piece> {
        let index = self.pieces.partition_point(|piece| piece.end() <= at);
        self.pieces.get(index).filter(|piece| piece.start <= at)
    }

    /// Drops what everyone has (before `needed`), and more if there is too much.
    pub fn trim(&mut self, needed: Lsn) {
        while let Some(first) = self.pieces.front() {
            let end = first.end();
            if end > needed && self.end - self.base <= self.limit {
                return;
            }
            let record_end = first.record_end;
            self.pieces.pop_front();
            self.base = end;
            self.remember(record_end);
        }
    }

    /// Takes note of a record boundary before the memory begins.
    pub fn remember(&mut self, boundary: Lsn) {
        if self.boundaries.back().is_none_or(|&last| boundary >= last + BOUNDARY_DISTANCE) {
            self.boundaries.push_back(boundary);
            if self.boundaries.len() > MAX_BOUNDARIES {
                self.boundaries.pop_front();
            }
        }
    }

    /// Makes all pieces those of another term: the same bytes, which are sent anew.
    pub fn restamp(&mut self, term: Term, commit_lsn: Lsn) {
        for piece in &mut self.pieces {
            let (start, record_end, bytes) = (piece.start, piece.record_end, piece.payload.clone());
            *piece = Piece::new(term, WalChunk { start, bytes, record_end }, commit_lsn);
        }
    }

    /// The last remembered boundary at or before `lsn`, if any.
    pub fn boundary_before(&self, lsn: Lsn) -> Option<Lsn> {
        let index = self.boundaries.partition_point(|&boundary| boundary <= lsn);
        index.checked_sub(1).and_then(|index| self.boundaries.get(index)).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, length: usize) -> Piece {
        let bytes = Bytes::from(vec![7; length]);
        let record_end = Lsn(start + length as u64);
        Piece::new(Term(1), WalChunk { start: Lsn(start), bytes, record_end }, Lsn(0))
    }

    #[test]
    fn pieces_are_found_until_all_have_them() {
        let mut backlog = Backlog::new(Lsn(8), 1 << 20);
        backlog.push(piece(8, 8));
        backlog.push(piece(16, 8));
        assert_eq!(backlog.piece_at(Lsn(8)).unwrap().start, Lsn(8));
        assert_eq!(backlog.piece_at(Lsn(15)).unwrap().start, Lsn(8));
        assert_eq!(backlog.piece_at(Lsn(16)).unwrap().start, Lsn(16));
        assert!(backlog.piece_at(Lsn(24)).is_none());
        backlog.trim(Lsn(20));
        assert_eq!(backlog.base(), Lsn(16));
        assert!(backlog.piece_at(Lsn(8)).is_none());
    }

    #[test]
    fn memory_is_bounded_and_boundaries_stay() {
        let mut backlog = Backlog::new(Lsn(0), 64 << 20);
        let length = 4 << 20;
        for n in 0..40 {
            backlog.push(piece(n * length, length as usize));
            backlog.trim(Lsn(0));
        }
        assert!(backlog.end() - backlog.base() <= 64 << 20);
        assert_eq!(backlog.boundary_before(Lsn(length * 3 + 1)), Some(Lsn(length * 3)));
        assert_eq!(backlog.boundary_before(Lsn(0)), Some(Lsn(0)));
    }
}
