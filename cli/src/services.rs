//! The services that a command talks to: those of a cluster on this machine, or of one that a file tells of.
//!
//! Who only talks to services takes them from here, and works off the machine. Who starts, stops or looks at processes, or at
//! a cluster's directory, takes a [`Cluster`].

use anyhow::Result;
use pgstrata_http_client::Access;
use pgstrata_identity::Identity;
use pgstrata_ids::{Lsn, NodeId};
use pgstrata_wire::http::pageserver::Branch;

use crate::cluster::Cluster;
use crate::cluster_file::Archive;
use crate::http::Service;
use crate::members::Seen;
use crate::remote::ask_each;
use crate::status::{Answers, PATIENCE, STATUS};
use crate::{branch, up};

/// Where a cluster's WAL is.
pub struct WalPlaces {
    /// WAL ports of safekeepers, as `host:port`, with the node that is to be found there where that is asked for.
    pub safekeepers: Vec<(Option<NodeId>, String)>,
    /// What is shown to them.
    pub identity: Option<Identity>,
    /// Where segments are that safekeepers no longer keep.
    pub archive: Option<Archive>,
}

/// See the module.
pub trait Services {
    /// The page server's HTTP interface.
    fn pageserver(&self) -> Result<Service>;

    /// What processes say of themselves, for listings: who does not answer is not in it.
    fn answers(&self) -> Answers;

    /// How far a branch is committed: no less than what any client was told, as far as those can say who are there. `None`
    /// if nobody knows its timeline yet.
    fn committed(&self, row: &Branch) -> Result<Option<Lsn>>;

    /// Where WAL is read.
    fn wal_places(&self) -> Result<WalPlaces>;

    /// The safekeepers, each asked what it keeps.
    fn safekeepers(&self) -> Result<Vec<Seen>>;

    /// Whether commands start and stop its processes.
    fn is_here(&self) -> bool {
        false
    }

    /// Whether it is known that what a safekeeper had is gone.
    fn is_lost(&self, _: NodeId) -> bool {
        false
    }
}

impl Services for Cluster {
    fn pageserver(&self) -> Result<Service> {
        Ok(Service::pageserver(&self.pageserver_http()?))
    }

    fn answers(&self) -> Answers {
        Answers::ask(self)
    }

    fn committed(&self, row: &Branch) -> Result<Option<Lsn>> {
        Ok(branch::committed(&self.answers(), row))
    }

    fn safekeepers(&self) -> Result<Vec<Seen>> {
        let places = &self.state.safekeepers;
        Ok(ask_each(places, |place| {
            let address = format!("127.0.0.1:{}", place.http);
            let service = Service::local(&address, &Access::Local);
            let quick = Service { timeout: PATIENCE, ..Service::local(&address, &Access::Local) };
            let said = quick.get(STATUS, &[]);
            let address = format!("127.0.0.1:{}", place.wal);
            Seen { node: NodeId(place.id), address, service, said }
        }))
    }

    fn is_here(&self) -> bool {
        true
    }

    fn is_lost(&self, node: NodeId) -> bool {
        let mut places = self.state.safekeepers.iter().filter(|place| place.id == node.0);
        places.any(|place| up::has_lost_directory(&self.dir, place))
    }

    fn wal_places(&self) -> Result<WalPlaces> {
        let places = self.state.safekeepers.iter();
        Ok(WalPlaces {
            safekeepers: places.map(|place| (None, format!("127.0.0.1:{}", place.wal))).collect(),
            identity: None,
            archive: Some((self.object_store(), self.state.s3_endpoint.clone())),
        })
    }
}
