//! SP-GiST records.
use crate::error::Step;
use pgstrata_pg_wal::PgVersion;
pub(crate) fn main_length(_v: PgVersion, _o: u8, _b: u8, main: &[u8]) -> Step<usize> {
    Ok(main.len())
}
