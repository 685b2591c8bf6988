//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use pgstrata_listen::{Advertised, SecurityArguments, address};

use crate::background::ScrubArguments;
use crate::disk_space::DiskArguments;
use crate::pace::CatchUpArguments;

/// Keeps the write-ahead log of PostgreSQL timelines durable, as one member of a quorum.
///
/// Run three or more, each on its own disk and best each in its own zone. A commit is durable
/// when a majority of a timeline's members has it on disk. Any minority may be lost at any time.
///
/// When all ports are bound, one line of JSON goes to standard output:
/// {"ready":true,"wal":"127.0.0.1:5454","pg":"127.0.0.1:5455","http":"127.0.0.1:5456"}
#[derive(Clone, Debug, Parser)]
#[command(name = "safekeeper", version)]
pub struct Args {
    /// Directory of this safekeeper; created if missing. All state is in it, and it must not be
    /// copied or restored from a backup: a safekeeper that forgets promises endangers commits.
    #[arg(long)]
    pub dir: PathBuf,

    /// Node id, a number unique in the cluster. Needed the first time; later it must be the same.
    /// An empty directory under an old id is another member than the one that was lost: it takes
    /// part in what is founded from then on, and in what it was made a member of.
    #[arg(long)]
    pub id: Option<u64>,

    /// Name of the failure zone that this safekeeper is in. A majority of members in one zone is
    /// reported.
    #[arg(long, default_value = "")]
    pub zone: String,

    /// Addresses for proposers and peers, comma-separated. Port 0 takes any free one.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    pub listen_wal: Vec<SocketAddr>,

    /// Addresses for PostgreSQL replication clients (page server, pg_receivewal, standbys).
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    pub listen_pg: Vec<SocketAddr>,

    /// Addresses for status, metrics and health.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:0", value_delimiter = ',', value_parser = address)]
    pub listen_http: Vec<SocketAddr>,

    /// Where computes and peers find this safekeeper's WAL port; they are told by the broker. A
    /// name is looked up anew for each connection; port 0 is the one that is listened on. Without
    /// it: the first address of --listen-wal. The other two likewise.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_wal: Option<Advertised>,

    /// Where page servers find its PostgreSQL port.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_pg: Option<Advertised>,

    /// Where its HTTP port is found.
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise_http: Option<Advertised>,

    #[command(flatten)]
    pub security: SecurityArguments,

    /// Base URL of the storage broker, such as http://127.0.0.1:50051. Everything works without
    /// it, from what was last known.
    #[arg(long)]
    pub broker: Option<String>,

    /// Where full WAL segments are archived, and where it is decided who the members of each timeline are: a
    /// directory, or s3://bucket/prefix. The same for all safekeepers and page servers of a cluster.
    #[arg(long)]
    pub object_store: String,

    /// Token of the claim on the object store under which this safekeeper archives: once another
    /// cluster has taken the store, nothing is stored there. Without it that is not checked.
    #[arg(long)]
    pub claim: Option<String>,

    #[command(flatten)]
    pub space: DiskArguments,

    #[command(flatten)]
    pub scrub: ScrubArguments,

    /// How WAL is fetched that is missing here.
    #[command(flatten)]
    pub catch_up: CatchUpArguments,

    /// A timeline with which nothing has happened for so many seconds comes to rest: it has no file open and nothing in memory
    /// but a few numbers, until somebody needs it. Where many are open, after 10 s.
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    pub rest_after: u64,

    /// The end of a timeline's WAL that nobody has written to for so many seconds is archived too, though its segment is not
    /// full: then nothing of it is lost with all safekeepers.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub archive_tail_after: u64,

    /// Of a timeline that has been at rest for so many seconds, and of which all WAL is archived, nothing is kept on this disk
    /// but a few small files. Its WAL is fetched when somebody needs it. 0: it is always kept.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    pub archive_only_after: u64,

    /// Forget where other members were: this directory is a copy, and they may be those of its
    /// original. Computes and the broker tell where they are now.
    #[arg(long)]
    pub forget_peers: bool,

    /// Endpoint of an S3-compatible store such as MinIO, for s3:// object stores.
    #[arg(long)]
    pub s3_endpoint: Option<String>,
}
