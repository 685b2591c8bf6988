//! LSNs, terms, identifiers and page keys: the words every other crate speaks.
//!
//! Owns the types, their text forms and their order. Does no I/O and knows nothing about how
//! any of them is stored.

mod branch_name;
mod id;
mod key;
mod lsn;
mod timeline;

pub use branch_name::{BranchNameError, MAX_BRANCH_NAME, check_branch_name};
pub use id::{
    Generation, IdError, Incarnation, Member, NodeId, SystemId, TenantId, Term, TimelineId,
};
pub use key::{Fork, Key, KeyError, KeyKind, RelTag, SlruKind};
pub use lsn::{Lsn, LsnError, PAGE_SIZE, SEGMENT_SIZE_DEFAULT};
pub use timeline::{
    SMALLEST_SEGMENT, SMALLEST_SIMULATED, TimelineParameters, TimelineParametersError,
};
