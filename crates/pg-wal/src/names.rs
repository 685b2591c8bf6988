//! Names of resource managers and records as `pg_waldump` prints them (access/rmgrlist.h, the `*_identify` functions of
//! access/rmgrdesc).

use crate::PgVersion;

macro_rules! rmgrs {
    ($($number:literal $constant:ident $name:literal)*) => {
        /// Numbers of the built-in resource managers (access/rmgrlist.h).
        pub mod rmgr {
            $(#[doc = $name] pub const $constant: u8 = $number;)*
        }

        /// A built-in resource manager's name.
        pub fn rmgr_name(rmgr: u8) -> Option<&'static str> {
            match rmgr {
                $($number => Some($name),)*
                _ => None,
            }
        }
    };
}

rmgrs! {
    0 XLOG "XLOG"
    1 TRANSACTION "Transaction"
    2 STORAGE "Storage"
    3 CLOG "CLOG"
    4 DATABASE "Database"
    5 TABLESPACE "Tablespace"
    6 MULTIXACT "MultiXact"
    7 RELMAP "RelMap"
    8 STANDBY "Standby"
    9 HEAP2 "Heap2"
    10 HEAP "Heap"
    11 BTREE "Btree"
    12 HASH "Hash"
    13 GIN "Gin"
    14 GIST "Gist"
    15 SEQUENCE "Sequence"
    16 SPGIST "SPGist"
    17 BRIN "BRIN"
    18 COMMIT_TS "CommitTs"
    19 REPLICATION_ORIGIN "ReplicationOrigin"
    20 GENERIC "Generic"
    21 LOGICAL_MESSAGE "LogicalMessage"
}

/// The `+INIT` flag of heap and BRIN records, and "xinfo follows" of transaction records.
const FLAG: u8 = 0x80;

/// A record's name. `info` may carry all eight bits.
pub fn record_name(version: PgVersion, rmgr: u8, info: u8) -> Option<&'static str> {
    let info = info & 0xF0;
    let without_flag = info & !FLAG;
    let flagged = info & FLAG != 0;
    match rmgr {
        rmgr::XLOG => xlog(version, info),
        rmgr::TRANSACTION => transaction(without_flag),
        rmgr::STORAGE => match info {
            0x10 => Some("CREATE"),
            0x20 => Some("TRUNCATE"),
            _ => None,
        },
        rmgr::CLOG | rmgr::COMMIT_TS => match info {
            0x00 => Some("ZEROPAGE"),
            0x10 => Some("TRUNCATE"),
            _ => None,
        },
        rmgr::DATABASE => match info {
            0x00 => Some("CREATE_FILE_COPY"),
            0x10 => Some("CREATE_WAL_LOG"),
            0x20 => Some("DROP"),
            _ => None,
        },
        rmgr::TABLESPACE => match info {
            0x00 => Some("CREATE"),
            0x10 => Some("DROP"),
            _ => None,
        },
        rmgr::MULTIXACT => match info {
            0x00 => Some("ZERO_OFF_PAGE"),
            0x10 => Some("ZERO_MEM_PAGE"),
            0x20 => Some("CREATE_ID"),
            0x30 => Some("TRUNCATE_ID"),
            _ => None,
        },
        rmgr::RELMAP => (info == 0).then_some("UPDATE"),
        rmgr::STANDBY => match info {
            0x00 => Some("LOCK"),
            0x10 => Some("RUNNING_XACTS"),
            0x20 => Some("INVALIDATIONS"),
            _ => None,
        },
        rmgr::HEAP2 => heap2(version, without_flag, flagged),
        rmgr::HEAP => heap(without_flag, flagged),
        rmgr::BTREE => btree(info),
        rmgr::HASH => hash(info),
        rmgr::GIN => gin(info),
        rmgr::GIST => gist(info),
        rmgr::SEQUENCE => (info == 0).then_some("LOG"),
        rmgr::SPGIST => spgist(info),
        rmgr::BRIN => brin(without_flag, flagged),
        rmgr::REPLICATION_ORIGIN => match info {
            0x00 => Some("SET"),
            0x10 => Some("DROP"),
            _ => None,
        },
        rmgr::GENERIC => Some("Generic"),
        rmgr::LOGICAL_MESSAGE => (info == 0).then_some("MESSAGE"),
        _ => None,
    }
}

fn xlog(version: PgVersion, info: u8) -> Option<&'static str> {
    Some(match info {
        0x00 => "CHECKPOINT_SHUTDOWN",
        0x10 => "CHECKPOINT_ONLINE",
        0x20 => "NOOP",
        0x30 => "NEXTOID",
        0x40 => "SWITCH",
        0x50 => "BACKUP_END",
        0x60 => "PARAMETER_CHANGE",
        0x70 => "RESTORE_POINT",
        0x80 => "FPW_CHANGE",
        0x90 => "END_OF_RECOVERY",
        0xA0 => "FPI_FOR_HINT",
        0xB0 => "FPI",
        0xD0 => "OVERWRITE_CONTRECORD",
        0xE0 if version >= PgVersion::V17 => "CHECKPOINT_REDO",
        _ => return None,
    })
}

fn transaction(opcode: u8) -> Option<&'static str> {
    Some(match opcode {
        0x00 => "COMMIT",
        0x10 => "PREPARE",
        0x20 => "ABORT",
        0x30 => "COMMIT_PREPARED",
        0x40 => "ABORT_PREPARED",
        0x50 => "ASSIGNMENT",
        0x60 => "INVALIDATION",
        _ => return None,
    })
}

fn heap2(version: PgVersion, opcode: u8, flagged: bool) -> Option<&'static str> {
    let pruned_in_17 = version >= PgVersion::V17;
    Some(match (opcode, flagged) {
        (0x50, true) => "MULTI_INSERT+INIT",
        (_, true) => return None,
        (0x00, _) => "REWRITE",
        (0x10, _) if pruned_in_17 => "PRUNE_ON_ACCESS",
        (0x20, _) if pruned_in_17 => "PRUNE_VACUUM_SCAN",
        (0x30, _) if pruned_in_17 => "PRUNE_VACUUM_CLEANUP",
        (0x10, _) => "PRUNE",
        (0x20, _) => "VACUUM",
        (0x30, _) => "FREEZE_PAGE",
        (0x40, _) => "VISIBLE",
        (0x50, _) => "MULTI_INSERT",
        (0x60, _) => "LOCK_UPDATED",
        _ => "NEW_CID",
    })
}

fn heap(opcode: u8, flagged: bool) -> Option<&'static str> {
    Some(match (opcode, flagged) {
        (0x00, false) => "INSERT",
        (0x00, true) => "INSERT+INIT",
        (0x10, false) => "DELETE",
        (0x20, false) => "UPDATE",
        (0x20, true) => "UPDATE+INIT",
        (0x30, false) => "TRUNCATE",
        (0x40, false) => "HOT_UPDATE",
        (0x40, true) => "HOT_UPDATE+INIT",
        (0x50, false) => "HEAP_CONFIRM",
        (0x60, false) => "LOCK",
        (0x70, false) => "INPLACE",
        _ => return None,
    })
}

fn btree(info: u8) -> Option<&'static str> {
    Some(match info {
        0x00 => "INSERT_LEAF",
        0x10 => "INSERT_UPPER",
        0x20 => "INSERT_META",
        0x30 => "SPLIT_L",
        0x40 => "SPLIT_R",
        0x50 => "INSERT_POST",
        0x60 => "DEDUP",
        0x70 => "DELETE",
        0x80 => "UNLINK_PAGE",
        0x90 => "UNLINK_PAGE_META",
        0xA0 => "NEWROOT",
        0xB0 => "MARK_PAGE_HALFDEAD",
        0xC0 => "VACUUM",
        0xD0 => "REUSE_PAGE",
        0xE0 => "META_CLEANUP",
        _ => return None,
    })
}

fn hash(info: u8) -> Option<&'static str> {
    Some(match info {
        0x00 => "INIT_META_PAGE",
        0x10 => "INIT_BITMAP_PAGE",
        0x20 => "INSERT",
        0x30 => "ADD_OVFL_PAGE",
        0x40 => "SPLIT_ALLOCATE_PAGE",
        0x50 => "SPLIT_PAGE",
        0x60 => "SPLIT_COMPLETE",
        0x70 => "MOVE_PAGE_CONTENTS",
        0x80 => "SQUEEZE_PAGE",
        0x90 => "DELETE",
        0xA0 => "SPLIT_CLEANUP",
        0xB0 => "UPDATE_META_PAGE",
        0xC0 => "VACUUM_ONE_PAGE",
        _ => return None,
    })
}

fn gin(info: u8) -> Option<&'static str> {
    Some(match info {
        0x10 => "CREATE_PTREE",
        0x20 => "INSERT",
        0x30 => "SPLIT",
        0x40 => "VACUUM_PAGE",
        0x50 => "DELETE_PAGE",
        0x60 => "UPDATE_META_PAGE",
        0x70 => "INSERT_LISTPAGE",
        0x80 => "DELETE_LISTPAGE",
        0x90 => "VACUUM_DATA_LEAF_PAGE",
        _ => return None,
    })
}

fn gist(info: u8) -> Option<&'static str> {
    Some(match info {
        0x00 => "PAGE_UPDATE",
        0x10 => "DELETE",
        0x20 => "PAGE_REUSE",
        0x30 => "PAGE_SPLIT",
        0x60 => "PAGE_DELETE",
        0x70 => "ASSIGN_LSN",
        _ => return None,
    })
}

fn spgist(info: u8) -> Option<&'static str> {
    Some(match info {
        0x10 => "ADD_LEAF",
        0x20 => "MOVE_LEAFS",
        0x30 => "ADD_NODE",
        0x40 => "SPLIT_TUPLE",
        0x50 => "PICKSPLIT",
        0x60 => "VACUUM_LEAF",
        0x70 => "VACUUM_ROOT",
        0x80 => "VACUUM_REDIRECT",
        _ => return None,
    })
}

fn brin(opcode: u8, flagged: bool) -> Option<&'static str> {
    Some(match (opcode, flagged) {
        (0x00, false) => "CREATE_INDEX",
        (0x10, false) => "INSERT",
        (0x10, true) => "INSERT+INIT",
        (0x20, false) => "UPDATE",
        (0x20, true) => "UPDATE+INIT",
        (0x30, false) => "SAMEPAGE_UPDATE",
        (0x40, false) => "REVMAP_EXTEND",
        (0x50, false) => "DESUMMARIZE",
        _ => return None,
    })
}
