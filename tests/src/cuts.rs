//! Safekeepers of a local cluster that are cut off: from all, or from some, both ways or one way only.
//!
//! The cluster is in a network of its own, where packet filters drop what one sends another. Nobody is told of it: nothing
//! is refused or reset, packets are just gone, and a connection of a process that ended meanwhile stays half open.
//!
//! All of a local cluster have the loopback's address, so that a packet does not say by itself whose it is. A safekeeper runs with a
//! group of its own, by which the first packet of each connection that it makes is known; that marks the connection. Whom it goes
//! to is said by the port. For root only.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;
use tempfile::TempDir;

use crate::{Cluster, programs, running_as_root};

/// The group of a safekeeper is this and its node id: no group of the machine's own.
const FIRST_GROUP: u32 = 1_500_000;
/// The chain with what is dropped.
const CHAIN: &str = "cut";
/// What a cluster runs besides safekeepers.
const OTHERS: [&str; 4] =
    ["storage-broker", "pageserver", "compute-shim", "libpgstrata_preload.so"];

/// Whom a safekeeper is cut off from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Party {
    Everybody,
    Computes,
    PageServer,
    Safekeeper(u64),
    Broker,
    ObjectStore,
}

/// Which packets are lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Both,
    ToSafekeeper,
    FromSafekeeper,
}

/// The network that the calling thread is in; it ends with those who are in it.
pub struct Cuts {
    programs: TempDir,
    /// Port of the server with the cluster's objects.
    store: u16,
}

fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        false => {
            let complaint = String::from_utf8_lossy(&output.stderr);
            Err(format!("{program} {}: {}", arguments.join(" "), complaint.trim_end()))
        }
    }
}

fn iptables(arguments: &str) -> Result<String, String> {
    run("iptables", &arguments.split_whitespace().collect::<Vec<_>>())
}

/// Does something in a thread that is in a network of its own, with all that it starts. It is told why, if there can be none.
pub fn inside<T: Send>(what: impl FnOnce(Result<(), String>) -> T + Send) -> T {
    let enter = || {
        if !running_as_root() {
            return Err("that needs root".to_owned());
        }
        // SAFETY: only the network becomes another one, and only for this thread.
        let entered = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
        entered.map_err(|error| format!("there can be no network of its own: {error}"))?;
        run("ip", &["link", "set", "lo", "up"])?;
        iptables(&format!("-N {CHAIN}"))?;
        iptables(&format!("-A INPUT -p tcp -j {CHAIN}"))?;
        // Nothing passes for being out of order: what comes after a cut is.
        let liberal = "/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
        fs::write(liberal, "1").map_err(|error| format!("{liberal}: {error}"))
    };
    std::thread::scope(|scope| match scope.spawn(|| what(enter())).join() {
        Ok(done) => done,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl Cuts {
    /// For a cluster that is run with [`Cuts::programs`] in this network, and has its objects behind this port.
    pub fn new(store: u16) -> Cuts {
        let directory = TempDir::with_prefix("pgstrata-programs-").unwrap();
        let at = |name: &str| directory.path().join(name);
        let real = programs().canonicalize().unwrap();
        // The command finds the others beside itself, wherever a link to it is.
        fs::copy(real.join("pgstrata"), at("pgstrata")).unwrap();
        for name in OTHERS {
            symlink(real.join(name), at(name)).unwrap();
        }
        let script = format!(
            "#!/bin/sh\n\
             set -e\n\
             for word; do [ \"$before\" != --id ] || id=$word; before=$word; done\n\
             group=$(({FIRST_GROUP} + id))\n\
             rule=\"OUTPUT -p tcp --syn -m owner --gid-owner $group -j CONNMARK --set-mark $id\"\n\
             iptables -w -t mangle -C $rule 2>/dev/null || iptables -w -t mangle -A $rule\n\
             exec setpriv --regid $group --clear-groups -- '{}' \"$@\"\n",
            real.join("safekeeper").display()
        );
        fs::write(at("safekeeper"), script).unwrap();
        fs::set_permissions(at("safekeeper"), fs::Permissions::from_mode(0o755)).unwrap();
        Cuts { programs: directory, store }
    }

    /// Where the cluster's programs have to be taken from. It has to be run by root.
    pub fn programs(&self) -> &Path {
        self.programs.path()
    }

    /// From now on, packets between a safekeeper and this one are lost.
    pub fn cut(&self, cluster: &Cluster, id: u64, from: Party, way: Way) {
        let state = fs::read(state_file(cluster)).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        let ports = |id: u64| -> [u64; 3] {
            let places = state["safekeepers"].as_array().unwrap();
            let place = places.iter().find(|place| place["id"] == id).unwrap();
            ["wal", "pg", "http"].map(|name| place[name].as_u64().unwrap())
        };
        let own = ports(id);
        let list = |ports: &[u64]| ports.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
        // Connections that the other one makes: where to, and how they are marked; and those that it accepts.
        let (made, accepted) = match from {
            Party::Everybody => (Some((list(&own), None)), Some(None)),
            Party::Computes => (Some((list(&own[..1]), Some(0))), None),
            Party::PageServer => (Some((list(&own[1..2]), Some(0))), None),
            Party::Safekeeper(other) => {
                (Some((list(&own), Some(other))), Some(Some(list(&ports(other)))))
            }
            Party::Broker => (None, Some(Some(state["broker"].to_string()))),
            Party::ObjectStore => (None, Some(Some(self.store.to_string()))),
        };
        let mut rules = Vec::new();
        let mut drop = |ports: Option<(&str, &str)>, mark: Option<u64>, direction: &str| {
            let ports = ports
                .map(|(end, ports)| format!("-m multiport --{end} {ports} "))
                .unwrap_or_default();
            let mark = mark.map(|mark| format!("-m connmark --mark {mark} ")).unwrap_or_default();
            rules.push(format!("-p tcp {ports}{mark}-m conntrack --ctdir {direction}"));
        };
        if let Some((ports, mark)) = &made {
            if way != Way::FromSafekeeper {
                drop(Some(("dports", ports)), *mark, "ORIGINAL");
            }
            if way != Way::ToSafekeeper {
                drop(Some(("sports", ports)), *mark, "REPLY");
            }
        }
        if let Some(ports) = &accepted {
            if way != Way::FromSafekeeper {
                drop(ports.as_deref().map(|ports| ("sports", ports)), Some(id), "REPLY");
            }
            if way != Way::ToSafekeeper {
                drop(ports.as_deref().map(|ports| ("dports", ports)), Some(id), "ORIGINAL");
            }
        }
        for rule in rules {
            iptables(&format!("-A {CHAIN} {rule} -j DROP")).unwrap();
        }
    }

    /// Everybody hears everybody again. Returns how many packets were lost.
    pub fn heal(&self) -> u64 {
        let listed = iptables(&format!("-L {CHAIN} -v -n -x")).unwrap();
        iptables(&format!("-F {CHAIN}")).unwrap();
        let first = |line: &str| line.split_whitespace().next()?.parse::<u64>().ok();
        listed.lines().filter_map(first).sum()
    }
}

fn state_file(cluster: &Cluster) -> PathBuf {
    cluster.dir().join("cluster.json")
}
