//! What programs of other versions send: older ones less than is known here, newer ones more.
//!
//! The texts are what was sent first: a line of them is never changed while a program that sends it may run. A field that is
//! added has a default, and stands in none of them.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Code, Failure, compute, pageserver, safekeeper};
use crate::broker::{Listing, Publication, Role, Which};

const ID: &str = "11111111111111111111111111111111";

/// The same with another field in each of its objects.
fn with_more(value: Value) -> Value {
    match value {
        Value::Object(fields) => {
            let mut more: serde_json::Map<_, _> = fields
                .into_iter()
                // Which is a map, whose keys are names.
                .map(|(name, value)| match name == "bad_safekeepers" {
                    true => (name, value),
                    false => (name, with_more(value)),
                })
                .collect();
            more.insert("of_tomorrow".into(), serde_json::json!([{ "a": 1 }, null]));
            Value::Object(more)
        }
        Value::Array(all) => Value::Array(all.into_iter().map(with_more).collect()),
        other => other,
    }
}

/// What was sent first is read, and so is more than is sent today.
fn is_read<T: Serialize + DeserializeOwned + PartialEq + Debug>(first: &str) -> T {
    let first = first.replace("ID", ID);
    let read: T = serde_json::from_str(&first).unwrap_or_else(|error| panic!("{error}: {first}"));
    let more = with_more(serde_json::to_value(&read).unwrap());
    let again: T = serde_json::from_value(more.clone()).unwrap_or_else(|e| panic!("{e}: {more}"));
    assert_eq!(again, read);
    read
}

#[test]
fn answers_of_older_and_newer_services_are_read() {
    is_read::<Failure>(r#"{"error":"no"}"#);
    is_read::<compute::Report>(
        r#"{"state":"running","branch":"main","timeline_id":"ID","uri":"postgresql://h:1/postgres","data_dir":"/d",
            "pid":1,"postgres_pid":null,"term":3,"start_lsn":"0/1","commit_lsn":"0/2","start_ms":4,"steps":[["elected",1]],
            "read_only":false}"#,
    );
    is_read::<safekeeper::Status>(
        r#"{"id":1,"incarnation":"ID","zone":"","timelines":[{"tenant_id":"ID","timeline_id":"ID","system_id":"5",
            "pg_version":15,"segment_size":16777216,"start_lsn":"0/1","term":2,"flush_lsn":"0/3","commit_lsn":"0/2",
            "available_lsn":"0/1","archived_lsn":"0/0","remote_consistent_lsn":"0/0"}]}"#,
    );
    is_read::<Vec<pageserver::Branch>>(
        r#"[{"name":"main","timeline_id":"ID","tenant_id":"ID","ancestor":null,"start_lsn":"0/1","start_prev":"0/0",
            "last_record_lsn":"0/2","remote_lsn":"0/1","logical_size":null,"system_id":5,"pg_version":15,
            "segment_size":16777216,"created":"2026-01-01T00:00:00Z","failure":null}]"#,
    );
    is_read::<pageserver::LsnAnswer>(r#"{"lsn":"0/1","time":null}"#);
    is_read::<pageserver::Reached>(r#"{"last_record_lsn":"0/1"}"#);
    is_read::<pageserver::Deleted>(r#"{"deleted":"main"}"#);
    is_read::<pageserver::Compacted>(r#"{"compacted":3}"#);
    is_read::<Vec<pageserver::Layer>>(
        r#"[{"name":"n","kind":"delta","level":0,"start_lsn":"0/0","end_lsn":"0/1","min_key":"00","max_key":"ff","size":9}]"#,
    );
    is_read::<Listing>(&format!(r#"{{"nodes":[{PUBLICATION}]}}"#));
}

const PUBLICATION: &str = r#"{"node":3,"role":"safekeeper","addresses":{"wal":"127.0.0.1:5"},"timelines":[{"tenant_id":"ID",
    "timeline_id":"ID","term":4,"flush_lsn":"0/2","commit_lsn":"0/1","archived_lsn":"0/0","remote_consistent_lsn":"0/0"}]}"#;

#[test]
fn requests_of_older_and_newer_clients_are_read() {
    is_read::<Publication>(PUBLICATION);
    assert_eq!(is_read::<Which>("{}"), Which::default());
    let create = is_read::<pageserver::CreateBranch>(r#"{"name":"new","from":"main"}"#);
    let (name, from) = ("new".into(), "main".into());
    assert_eq!(create, pageserver::CreateBranch { name, from, ..Default::default() });
    is_read::<pageserver::Listed>("{}");
    is_read::<pageserver::Named>(r#"{"name":"main"}"#);
    is_read::<pageserver::OfTimeline>(r#"{"id":"ID"}"#);
    is_read::<pageserver::Rename>(r#"{"name":"main","to":"old"}"#);
    is_read::<pageserver::To>(r#"{"to":"old"}"#);
    is_read::<pageserver::LsnAt>(r#"{"name":"main"}"#);
    is_read::<pageserver::Wait>(r#"{"name":"main","lsn":"0/1"}"#);
    is_read::<pageserver::PageAt>(r#"{"name":"main","rel":"1663/5/16384","block":0}"#);
    is_read::<pageserver::Import>(r#"{"tenant":"ID","timeline":"ID","name":"main"}"#);
    is_read::<pageserver::AsOf>(r#"{"lsn":"0/1"}"#);
}

#[test]
fn words_of_newer_services_are_read() {
    let of_tomorrow = "\"of_tomorrow\"";
    assert_eq!(serde_json::from_str::<Code>(of_tomorrow).unwrap(), Code::Unknown);
    let state = serde_json::from_str::<compute::State>(of_tomorrow).unwrap();
    assert_eq!(state, compute::State::Unknown);
    let kind = serde_json::from_str::<pageserver::LayerKind>(of_tomorrow).unwrap();
    assert_eq!(kind, pageserver::LayerKind::Unknown);
    // One node of a new kind hides none of the others.
    let other = PUBLICATION.replace("safekeeper", "of_tomorrow");
    let listing = format!(r#"{{"nodes":[{other},{PUBLICATION}]}}"#).replace("ID", ID);
    let roles = serde_json::from_str::<Listing>(&listing).unwrap().nodes.into_iter();
    assert!(roles.map(|node| node.role).eq([Role::Unknown, Role::Safekeeper]));
}
