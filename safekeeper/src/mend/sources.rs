//! Who may have what is damaged here: other members, whose logs agree with the own one up to where the histories part, and
//! the archive, up to where what is committed is known to be the same here.

use pgstrata_ids::{Lsn, Member, Term};
use pgstrata_quorum::{Configuration, TermHistory};

use super::relief::relieves;

/// What a member says of its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Said {
    /// Who.
    pub member: Member,
    /// The members that it knows of.
    pub configuration: Configuration,
    /// The highest term that it promised.
    pub term: Term,
    /// First byte that it has.
    pub available_lsn: Lsn,
    /// End of its durable log.
    pub flush_lsn: Lsn,
    /// What it knows to be committed.
    pub commit_lsn: Lsn,
    /// Which term wrote which of its bytes.
    pub history: TermHistory,
}

/// A way to WAL of others.
pub trait Source: Send {
    /// The name by which people know it.
    fn name(&self) -> String;
    /// What it says now; `None` if it is the archive, which knows of committed WAL only.
    fn said(&mut self) -> Result<Option<Said>, String>;
    /// Bytes of `[from, to)` from its begin on: committed ones, or with a `term` those that are durable while that decides.
    fn read(&mut self, from: Lsn, to: Lsn, term: Term) -> Result<Vec<u8>, String>;
}

/// Most of what another one says of itself that is passed on, in bytes: it may quote what was said here.
const MOST_SAID: usize = 200;

fn brief(mut said: String) -> String {
    if said.len() > MOST_SAID {
        said.truncate(said.floor_char_boundary(MOST_SAID));
        said.push_str(" ...");
    }
    said
}

struct Asked {
    source: Box<dyn Source>,
    said: Option<Said>,
    /// Up to here its committed WAL is the own one.
    committed: Lsn,
    /// Up to here its durable WAL is.
    durable: Lsn,
    is_trusted: bool,
    /// What came of it, for people.
    news: String,
}

/// All of them.
pub struct Sources {
    own: TermHistory,
    asked: Vec<Asked>,
    last: Option<usize>,
    /// Those that can't be asked, and why, for people.
    silent: Vec<String>,
}

impl Sources {
    /// Asks everybody. The own log has this history, and is known to be committed up to `commit_lsn`; it begins at `start_lsn`.
    pub fn ask(
        own: TermHistory,
        start_lsn: Lsn,
        commit_lsn: Lsn,
        sources: Vec<Box<dyn Source>>,
        silent: Vec<String>,
    ) -> Sources {
        let mut all = Sources { own, asked: Vec::new(), last: None, silent };
        for mut source in sources {
            match source.said() {
                Ok(said) => {
                    let news = match &said {
                        Some(said) => {
                            format!("has WAL from {} to {}", said.available_lsn, said.flush_lsn)
                        }
                        None => "was not needed".to_owned(),
                    };
                    let (committed, durable) = (commit_lsn, commit_lsn);
                    let is_trusted = true;
                    all.asked.push(Asked { source, said, committed, durable, is_trusted, news });
                }
                Err(error) => {
                    all.silent.push(format!("{} can't be asked: {}", source.name(), brief(error)));
                }
            }
        }
        let mut known = commit_lsn;
        for asked in &mut all.asked {
            let Some(said) = &asked.said else { continue };
            // Where no entry is shared some were merged, and what is committed on both is the same.
            let base = commit_lsn.min(said.commit_lsn).max(start_lsn);
            let agreed = |end: Lsn| all.own.divergence(Lsn::MAX, &said.history, end, base).min(end);
            asked.committed = agreed(said.commit_lsn);
            asked.durable = agreed(said.flush_lsn);
            known = known.max(asked.committed);
        }
        // What is committed is the same everywhere.
        for asked in all.asked.iter_mut().filter(|asked| asked.said.is_none()) {
            (asked.committed, asked.durable) = (known, known);
        }
        all
    }

    /// Who the members are by now, as far as they know.
    pub fn newest_configuration(&self) -> Option<&Configuration> {
        let said = self.asked.iter().filter_map(|asked| asked.said.as_ref());
        said.map(|said| &said.configuration).max_by_key(|configuration| configuration.number())
    }

    /// Bytes of `[from, to)` from its begin on, which are those that were here; none if nobody has them.
    pub fn fetch(&mut self, from: Lsn, to: Lsn) -> Vec<u8> {
        for index in 0..self.asked.len() {
            let asked = &mut self.asked[index];
            let trimmed = asked.said.as_ref().is_some_and(|said| said.available_lsn > from);
            if !asked.is_trusted || trimmed || from >= asked.durable.max(asked.committed) {
                continue;
            }
            match asked.read(from, to) {
                Ok(bytes) if bytes.is_empty() => {
                    asked.news = format!("gave nothing from {from} on");
                }
                Ok(bytes) => {
                    self.last = Some(index);
                    return bytes;
                }
                Err(error) => asked.news = brief(error),
            }
        }
        Vec::new()
    }

    /// What was fetched last is no WAL either. False if it is not known any more whose that was.
    pub fn distrust_last(&mut self) -> bool {
        let Some(index) = self.last.take() else { return false };
        self.asked[index].is_trusted = false;
        self.asked[index].news = "gave what is no WAL".to_owned();
        true
    }

    /// Whether what one of them knows to be committed shows that nobody depends on what was here.
    pub fn relieve(&self, bound: Option<Lsn>) -> bool {
        let said = self.asked.iter().filter_map(|asked| asked.said.as_ref());
        said.into_iter().any(|said| relieves(&self.own, bound, &said.history, said.commit_lsn))
    }

    /// Who was asked, and what came of it, for people.
    pub fn asked(&self) -> String {
        let asked =
            self.asked.iter().map(|asked| format!("{} {}", asked.source.name(), asked.news));
        let all: Vec<String> = asked.chain(self.silent.iter().cloned()).collect();
        match all.is_empty() {
            true => "nobody, as there is nobody".to_owned(),
            false => all.join(", "),
        }
    }
}

impl Asked {
    fn read(&mut self, from: Lsn, to: Lsn) -> Result<Vec<u8>, String> {
        if from < self.committed {
            return self.source.read(from, to.min(self.committed), Term(0));
        }
        let Some(before) = self.said.clone() else { return Ok(Vec::new()) };
        let bytes = self.source.read(from, to.min(self.durable), before.term)?;
        // It may have followed another winner meanwhile: what its history was before it was read, and is still, it was all the
        // time, as its last term only rises.
        let after = self.source.said()?;
        let same = after.as_ref().is_some_and(|after| {
            after.history == before.history
                && after.term == before.term
                && after.flush_lsn >= before.flush_lsn
        });
        match same {
            true => Ok(bytes),
            false => Err("follows somebody else by now".to_owned()),
        }
    }
}
