//! What a compute's driver has of its connections: the ends of wires, which the world carries bytes between.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::io::{self, IoSlice, Read, Write};
use std::rc::Rc;

use pgstrata_compute_shim::proposer::{Network, Ready, Wire};
use pgstrata_ids::NodeId;

/// A connection that a driver has asked for.
#[derive(Debug)]
enum Dial {
    Asked(NodeId),
    UnderWay,
    Made(usize),
    Failed(io::ErrorKind),
}

/// One end.
#[derive(Debug)]
struct End {
    token: u64,
    /// Written, and not on its way yet.
    output: Vec<u8>,
    /// On its way: what the other end has not taken is room that is taken here.
    underway: usize,
    window: usize,
    /// Has come, and was not read.
    input: VecDeque<u8>,
    /// The other end has closed it, or was gone.
    end: Option<io::ErrorKind>,
    /// Whether it is told when there is room.
    wants_room: bool,
    is_left: bool,
}

impl End {
    fn room(&self) -> usize {
        self.window.saturating_sub(self.output.len() + self.underway)
    }
}

#[derive(Debug, Default)]
struct State {
    dials: BTreeMap<u64, Dial>,
    /// By number of the connection.
    ends: BTreeMap<usize, End>,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Wires(Rc<RefCell<State>>);

/// The driver's side of a connection.
#[derive(Debug)]
pub struct Handle {
    connection: usize,
    wires: Wires,
}

impl Wires {
    /// What happened since they were looked at last, and was not taken.
    pub fn ready(&self) -> Vec<Ready> {
        let state = self.0.borrow();
        let ends = state.ends.values().filter(|end| !end.is_left);
        let ready = ends.map(|end| Ready {
            token: end.token,
            readable: !end.input.is_empty() || end.end.is_some(),
            writable: end.wants_room && (end.room() > 0 || end.end.is_some()),
        });
        ready.filter(|ready| ready.readable || ready.writable).collect()
    }

    /// Connections that are to be made.
    pub fn asked(&self) -> Vec<(u64, NodeId)> {
        let mut asked = Vec::new();
        for (&token, dial) in &mut self.0.borrow_mut().dials {
            if let Dial::Asked(node) = *dial {
                *dial = Dial::UnderWay;
                asked.push((token, node));
            }
        }
        asked
    }

    pub fn made(&self, token: u64, connection: usize, window: usize) {
        let mut state = self.0.borrow_mut();
        state.dials.insert(token, Dial::Made(connection));
        let end = End {
            token,
            output: Vec::new(),
            underway: 0,
            window,
            input: VecDeque::new(),
            end: None,
            wants_room: true,
            is_left: false,
        };
        state.ends.insert(connection, end);
    }

    pub fn failed(&self, token: u64, why: io::ErrorKind) {
        self.0.borrow_mut().dials.insert(token, Dial::Failed(why));
    }

    /// Room on each is so much at least from now on.
    pub fn widen(&self, window: usize) {
        for end in self.0.borrow_mut().ends.values_mut() {
            end.window = end.window.max(window);
        }
    }

    /// What is to be carried, of each connection.
    pub fn take_output(&self) -> Vec<(usize, Vec<u8>)> {
        let mut taken = Vec::new();
        for (&connection, end) in &mut self.0.borrow_mut().ends {
            if !end.output.is_empty() {
                end.underway += end.output.len();
                taken.push((connection, std::mem::take(&mut end.output)));
            }
        }
        taken
    }

    /// Connections that the driver has closed since it was asked last.
    pub fn take_left(&self) -> Vec<usize> {
        let mut state = self.0.borrow_mut();
        let left = state.ends.iter().filter(|(_, end)| end.is_left && end.output.is_empty());
        let left: Vec<usize> = left.map(|(&connection, _)| connection).collect();
        left.iter().for_each(|connection| drop(state.ends.remove(connection)));
        left
    }

    /// The other end has taken so much. True if somebody waits for the room.
    pub fn arrived(&self, connection: usize, bytes: usize) -> bool {
        let mut state = self.0.borrow_mut();
        let Some(end) = state.ends.get_mut(&connection) else { return false };
        end.underway = end.underway.saturating_sub(bytes);
        end.wants_room
    }

    /// Bytes come.
    pub fn receive(&self, connection: usize, bytes: &[u8]) {
        if let Some(end) = self.0.borrow_mut().ends.get_mut(&connection) {
            end.input.extend(bytes);
        }
    }

    /// Nothing comes any more after what has come.
    pub fn close(&self, connection: usize, is_reset: bool) {
        if let Some(end) = self.0.borrow_mut().ends.get_mut(&connection) {
            let why = match is_reset {
                true => io::ErrorKind::ConnectionReset,
                false => io::ErrorKind::UnexpectedEof,
            };
            end.end.get_or_insert(why);
        }
    }
}

impl Network for Wires {
    type Wire = Handle;

    fn dial(&mut self, token: u64, node: NodeId, _: &str) -> Option<io::Result<Handle>> {
        let dials = &mut self.0.borrow_mut().dials;
        match dials.remove(&token) {
            None => {
                dials.insert(token, Dial::Asked(node));
                None
            }
            Some(Dial::Made(connection)) => Some(Ok(Handle { connection, wires: self.clone() })),
            Some(Dial::Failed(why)) => Some(Err(why.into())),
            Some(under_way) => {
                dials.insert(token, under_way);
                None
            }
        }
    }

    fn is_dialing(&self, token: u64) -> bool {
        self.0.borrow().dials.contains_key(&token)
    }

    fn tell_of_room(&mut self, _: u64, wire: &Handle, is_told: bool) -> io::Result<()> {
        if let Some(end) = self.0.borrow_mut().ends.get_mut(&wire.connection) {
            end.wants_room = is_told;
        }
        Ok(())
    }
}

impl Handle {
    fn with<T>(&self, act: impl FnOnce(&mut End) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.wires.0.borrow_mut();
        state.ends.get_mut(&self.connection).map_or(Err(io::ErrorKind::NotConnected.into()), act)
    }
}

impl Wire for Handle {
    fn holds_more(&self) -> bool {
        self.with(|end| Ok(!end.input.is_empty())).unwrap_or(false)
    }
}

impl Read for Handle {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.with(|end| match (end.input.is_empty(), end.end) {
            (false, _) => end.input.read(buffer),
            (true, Some(io::ErrorKind::UnexpectedEof)) => Ok(0),
            (true, Some(why)) => Err(why.into()),
            (true, None) => Err(io::ErrorKind::WouldBlock.into()),
        })
    }
}

impl Write for Handle {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(buffer)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.with(|end| {
            if end.end == Some(io::ErrorKind::ConnectionReset) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let room = end.room();
            if room == 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let before = end.output.len();
            for slice in slices {
                let taken = slice.len().min(room - (end.output.len() - before));
                end.output.extend_from_slice(&slice[..taken]);
            }
            Ok(end.output.len() - before)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // Nobody has it any more, or the driver goes with all of them.
        if let Some(end) = self.wires.0.borrow_mut().ends.get_mut(&self.connection) {
            end.is_left = true;
        }
    }
}
