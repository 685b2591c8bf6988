//! Where safekeepers and the page server are: as whoever started this compute said, and as the broker says now.
//!
//! Soft state. Nobody waits for the broker here: what is asked for is answered from what was said and heard so far, and
//! asking makes a thread ask the broker again, at most once a second. A compute that is connected to all never asks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::{Condvar, Mutex};
use pgstrata_http_client::{Access, Broker, News};
use pgstrata_ids::{NodeId, TimelineId};
use pgstrata_wire::broker::{Listing, PUBLISH_INTERVAL_S, Publication, Role};

use crate::proposer::Members;

/// The two ports of a page server that a compute needs, as `host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pageserver {
    /// The page service.
    pub pages: String,
    /// The HTTP interface.
    pub http: String,
}

/// What whoever started the compute said.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// WAL ports of safekeepers, as `host:port`.
    pub safekeepers: BTreeMap<NodeId, String>,
    /// The page server.
    pub pageserver: Option<Pageserver>,
    /// URL of the broker.
    pub broker: Option<String>,
}

/// What the broker said last.
#[derive(Debug, Default)]
struct Heard {
    safekeepers: BTreeMap<NodeId, String>,
    /// Safekeepers that have the timeline.
    holders: Vec<NodeId>,
    pageserver: Option<Pageserver>,
    /// Why there is no answer, if there was none the last time.
    trouble: Option<String>,
}

/// See the module.
#[derive(Debug)]
pub struct Places {
    said: Said,
    heard: Mutex<Heard>,
    /// Whether somebody has asked since the broker was asked last.
    wanted: Mutex<bool>,
    asked: Condvar,
}

impl Places {
    /// For a compute of `timeline`; without one it is not known yet, and any page server may know.
    pub fn start(said: Said, access: &Access, timeline: Option<TimelineId>) -> Result<Arc<Places>> {
        let broker = said.broker.as_deref().map(|url| Broker::new(url, access));
        let places = Arc::new(Places {
            said,
            heard: Mutex::default(),
            wanted: Mutex::new(false),
            asked: Condvar::new(),
        });
        if let Some(broker) = broker {
            let heir = Arc::downgrade(&places);
            let keep_asking = move || {
                let mut news = News::default();
                while let Some(places) = heir.upgrade() {
                    if places.is_wanted() {
                        let listing = broker.nodes(timeline);
                        news.note(broker.url(), &listing);
                        places.hear(listing);
                    }
                    drop(places);
                    std::thread::sleep(Duration::from_secs(PUBLISH_INTERVAL_S));
                }
            };
            std::thread::Builder::new()
                .name("broker".into())
                .spawn(keep_asking)
                .context("can't start a thread")?;
        }
        Ok(places)
    }

    /// Waits a while for somebody to ask.
    fn is_wanted(&self) -> bool {
        let mut wanted = self.wanted.lock();
        if !*wanted {
            self.asked.wait_for(&mut wanted, Duration::from_secs(PUBLISH_INTERVAL_S));
        }
        std::mem::take(&mut wanted)
    }

    fn want(&self) {
        if self.said.broker.is_some() {
            *self.wanted.lock() = true;
            self.asked.notify_all();
        }
    }

    fn hear(&self, listing: Result<Listing>) {
        let found = listing.map(heard);
        let mut heard = self.heard.lock();
        match found {
            Ok(found) => *heard = found,
            // What it said before may still be right.
            Err(error) => heard.trouble = Some(format!("{error:#}")),
        }
    }

    /// Page servers to try, best first.
    pub fn pageservers(&self) -> Vec<Pageserver> {
        self.want();
        let heard = self.heard.lock().pageserver.clone();
        both(self.said.pageserver.clone(), heard)
    }

    /// Why nothing is known of what one looked for.
    pub fn describe(&self) -> String {
        match (&self.said.broker, &self.heard.lock().trouble) {
            (None, _) => "no broker was named that could say where it is".to_owned(),
            (Some(broker), None) => format!("the broker {broker} has not heard of it"),
            (Some(broker), Some(trouble)) => format!("the broker {broker}: {trouble}"),
        }
    }
}

/// What was said and what was heard; once, if they are the same.
fn both<T: PartialEq>(said: Option<T>, heard: Option<T>) -> Vec<T> {
    let heard = heard.filter(|heard| said.as_ref() != Some(heard));
    said.into_iter().chain(heard).collect()
}

impl Members for Places {
    fn addresses(&self, node: NodeId) -> Vec<String> {
        self.want();
        let heard = self.heard.lock().safekeepers.get(&node).cloned();
        both(self.said.safekeepers.get(&node).cloned(), heard)
    }

    fn holders(&self) -> Vec<NodeId> {
        self.want();
        self.heard.lock().holders.clone()
    }

    fn describe(&self) -> String {
        Places::describe(self)
    }
}

fn heard(listing: Listing) -> Heard {
    let mut heard = Heard::default();
    let mut best = None;
    for node in listing.nodes {
        match node.role {
            Role::Safekeeper => {
                let id = node.node();
                if !node.timelines.is_empty() {
                    heard.holders.push(id);
                }
                heard.safekeepers.extend(node.addresses.wal.map(|address| (id, address)));
            }
            Role::Pageserver => {
                let rank = rank(&node);
                let (Some(pages), Some(http)) = (node.addresses.pages, node.addresses.http) else {
                    continue;
                };
                if best.is_none_or(|best| best < rank) {
                    best = Some(rank);
                    heard.pageserver = Some(Pageserver { pages, http });
                }
            }
            Role::Unknown => {}
        }
    }
    heard
}

/// One that has the timeline, of these the one that was started last: its node id is its generation.
fn rank(pageserver: &Publication) -> (bool, u64) {
    (!pageserver.timelines.is_empty(), pageserver.node)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use pgstrata_ids::{Lsn, TenantId};
    use pgstrata_sim::slow_server;
    use pgstrata_wire::broker::{Addresses, TimelineProgress};

    use super::*;

    fn node(role: Role, id: u64, port: u16, has_timeline: bool) -> Publication {
        let address = |name: &str| Some(format!("{name}:{port}"));
        let progress = TimelineProgress {
            tenant_id: TenantId([1; 16]),
            timeline_id: TimelineId([2; 16]),
            term: 0,
            flush_lsn: Lsn(8),
            commit_lsn: Lsn(8),
            archived_lsn: Lsn(0),
            remote_consistent_lsn: Lsn(0),
        };
        Publication {
            node: id,
            role,
            zone: String::new(),
            addresses: Addresses {
                wal: address("wal"),
                pg: None,
                http: address("http"),
                pages: address("pages"),
            },
            timelines: if has_timeline { vec![progress] } else { Vec::new() },
        }
    }

    #[test]
    fn the_page_server_is_the_last_that_has_the_timeline() {
        let nodes = vec![
            node(Role::Safekeeper, 3, 1, true),
            node(Role::Safekeeper, 4, 1, false),
            node(Role::Pageserver, 7, 2, true),
            node(Role::Pageserver, 9, 3, true),
            node(Role::Pageserver, 11, 4, false),
        ];
        let found = heard(Listing { nodes });
        let all = [3, 4].map(|id| (NodeId(id), "wal:1".to_owned()));
        assert_eq!(found.safekeepers, BTreeMap::from(all));
        assert_eq!(found.holders, [NodeId(3)]);
        let expected = Pageserver { pages: "pages:3".into(), http: "http:3".into() };
        assert_eq!(found.pageserver, Some(expected));
        let nodes = vec![node(Role::Pageserver, 7, 2, false), node(Role::Pageserver, 6, 3, false)];
        assert_eq!(heard(Listing { nodes }).pageserver.unwrap().pages, "pages:2");
        assert_eq!(heard(Listing::default()).pageserver, None);
    }

    #[test]
    fn what_was_said_comes_first_and_what_was_heard_is_kept() {
        let said = Said {
            safekeepers: BTreeMap::from([(NodeId(1), "a:1".into()), (NodeId(2), "wal:2".into())]),
            broker: Some("http://127.0.0.1:1".into()),
            ..Said::default()
        };
        let places = Places::start(said, &Access::Local, None).unwrap();
        let nodes = (1..4).map(|id| node(Role::Safekeeper, id, id as u16, false)).collect();
        places.hear(Ok(Listing { nodes }));
        places.hear(Err(anyhow::anyhow!("gone")));
        assert_eq!(places.addresses(NodeId(1)), ["a:1", "wal:1"]);
        assert_eq!(places.addresses(NodeId(2)), ["wal:2"]);
        assert_eq!(places.addresses(NodeId(3)), ["wal:3"]);
        assert!(places.addresses(NodeId(4)).is_empty());
        assert!(places.describe().contains("gone"), "{}", places.describe());
    }

    #[test]
    fn the_broker_is_asked_when_somebody_asks() {
        const ANSWER: &[&str] = &[
            "HTTP/1.0 200 OK\r\n\r\n",
            r#"{"nodes":[{"node":5,"role":"safekeeper","addresses":{"wal":"x:1"},"timelines":[]}]}"#,
        ];
        let url = slow_server(ANSWER, Duration::from_millis(50)).unwrap();
        let places =
            Places::start(Said { broker: Some(url), ..Said::default() }, &Access::Local, None)
                .unwrap();
        let since = Instant::now();
        while places.addresses(NodeId(5)) != ["x:1"] {
            assert!(since.elapsed() < Duration::from_secs(20), "{}", places.describe());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
