//! The state of some cluster, before its first record.

use pgstrata_ids::Lsn;
use pgstrata_pg_redo::ControlState;
use pgstrata_pg_wal::{CheckPoint, ControlFile, DbState, PgVersion};

/// The state of a cluster that was just made. `log_hints`: hint bits are logged, by way of `wal_log_hints`.
pub fn control(version: PgVersion, log_hints: bool, commit_ts: bool) -> ControlState {
    ControlState::from_pg_control(&ControlFile {
        version,
        system_identifier: 1,
        state: DbState::InProduction,
        time: 0,
        checkpoint: Lsn(64),
        checkpoint_copy: CheckPoint { next_xid: 1000, next_multi: 1, ..CheckPoint::default() },
        unlogged_lsn: Lsn(1000),
        min_recovery_point: Lsn(0),
        min_recovery_point_tli: 0,
        backup_start_point: Lsn(0),
        backup_end_point: Lsn(0),
        backup_end_required: false,
        wal_level: 1,
        wal_log_hints: log_hints,
        max_connections: 100,
        max_worker_processes: 8,
        max_wal_senders: 10,
        max_prepared_xacts: 0,
        max_locks_per_xact: 64,
        track_commit_timestamp: commit_ts,
        max_align: 8,
        float_format: 0,
        block_size: 8192,
        relation_segment_blocks: 131_072,
        wal_block_size: 8192,
        wal_segment_size: 16 << 20,
        name_data_length: 64,
        index_max_keys: 32,
        toast_max_chunk_size: 1996,
        large_object_block_size: 2048,
        float8_by_value: true,
        data_checksum_version: 0,
        default_char_signedness: true,
        mock_authentication_nonce: [0; 32],
    })
}
