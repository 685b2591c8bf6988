//! Who makes connections, and says when something comes on them: sockets where this runs, and another thing where it is simulated.

use std::fmt::Debug;
use std::io::{self, Read, Write};

use pgstrata_ids::NodeId;

/// One connection, which never waits: what can't be done now is [`io::ErrorKind::WouldBlock`].
pub trait Wire: Read + Write + Debug {
    /// Whether reading would give something although nobody will say that it does: what came with what was read before.
    fn holds_more(&self) -> bool;
}

/// Makes wires. Each belongs to a token, which whoever waits for something to happen is told.
pub trait Network: Debug {
    /// What it makes.
    type Wire: Wire;

    /// A connection to a safekeeper, or why there is none; nothing while it is being made: then it is to be asked for again once
    /// something happens. Whether there is room to write to it is told from the beginning.
    fn dial(&mut self, token: u64, node: NodeId, address: &str) -> Option<io::Result<Self::Wire>>;

    /// Whether a connection is being made.
    fn is_dialing(&self, token: u64) -> bool;

    /// Has it told, or not, whenever there is room to write.
    fn tell_of_room(&mut self, token: u64, wire: &Self::Wire, is_told: bool) -> io::Result<()>;
}

/// What happened on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ready {
    /// Which one's.
    pub token: u64,
    /// There is something to read, or an error to be met by reading.
    pub readable: bool,
    /// There is room to write, or an error to be met by writing.
    pub writable: bool,
}
