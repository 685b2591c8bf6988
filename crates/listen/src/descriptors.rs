//! Descriptors: as many as whoever runs the process allows, of which connections get a part only. What a service has to open
//! for itself must not fail because of those who connect.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections of one port get so small a part of all descriptors at most: there are three ports, and a connection that has
/// not said yet what it wants may have two.
const PART: u64 = 8;

/// Lets this process have as many descriptors as it may. To be called before ports are opened.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!("the limit on descriptors stays at {:?}: {error}", limit.current);
    }
}

/// So many connections at once, or fewer where there are few descriptors.
pub fn places(most: usize) -> usize {
    let part = getrlimit(Resource::Nofile).current.map(|limit| limit / PART);
    let part = part.and_then(|part| usize::try_from(part).ok()).unwrap_or(most);
    most.min(part).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_service() {
        raise_descriptor_limit();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert_eq!(places(5), 5);
        let all = limit.current.unwrap_or(u64::MAX);
        assert!(places(usize::MAX) as u64 <= all / PART || limit.current.is_none());
    }
}
