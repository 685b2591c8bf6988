//! Machines with addresses and names of their own: network namespaces, joined by a bridge in another one. The machine that
//! runs the test has no way to them, and nothing of its own is changed. For root only.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tempfile::TempDir;

use crate::far_switch::{FarSwitch, Frames};

/// What names of our networks begin with; the process follows that made them.
const PREFIX: &str = "pgstrata-net-";

/// See the module. All of them end with this; processes in them have to have ended before.
pub struct Hosts {
    names: Vec<String>,
    directory: TempDir,
    far: BTreeMap<String, FarSwitch>,
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {complaint}");
}

/// Ends networks whose test was killed: their names begin with its process id.
fn remove_leftovers() {
    let Ok(networks) = fs::read_dir("/run/netns") else { return };
    let names = networks.filter_map(|network| network.ok()?.file_name().into_string().ok());
    for name in names.filter(|name| name.starts_with(PREFIX)) {
        let process = name[PREFIX.len()..].split('-').next().unwrap_or_default();
        let is_number = !process.is_empty() && process.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && !PathBuf::from("/proc").join(process).exists() {
            // Another test may be about to do the same.
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

impl Hosts {
    /// Hosts of these names: at 10.99.0.1 the first, and so on.
    pub fn new(names: &[&str]) -> Hosts {
        remove_leftovers();
        let directory = TempDir::with_prefix("pgstrata-hosts-").unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let hosts = Hosts { names, directory, far: BTreeMap::new() };
        let switch = hosts.namespace("switch");
        ip(&format!("netns add {switch}"));
        ip(&format!("-n {switch} link add bridge type bridge"));
        ip(&format!("-n {switch} link set bridge up"));
        let mut known = String::from("127.0.0.1 localhost\n");
        for (at, name) in hosts.names.iter().enumerate() {
            let (own, address) = (hosts.namespace(name), format!("10.99.0.{}", at + 1));
            ip(&format!("netns add {own}"));
            ip(&format!("-n {switch} link add to-{name} type veth peer name eth0 netns {own}"));
            ip(&format!("-n {switch} link set to-{name} master bridge up"));
            ip(&format!("-n {own} addr add {address}/24 dev eth0"));
            ip(&format!("-n {own} link set eth0 up"));
            ip(&format!("-n {own} link set lo up"));
            known += &format!("{address} {name}\n");
        }
        fs::write(hosts.known(), known).unwrap();
        hosts
    }

    /// One that no other test, and no other run of this one, has.
    fn namespace(&self, host: &str) -> String {
        format!("{PREFIX}{}-{host}", std::process::id())
    }

    fn known(&self) -> PathBuf {
        self.directory.path().join("hosts")
    }

    /// What a command has to begin with to run on a host. It stays the same process.
    pub fn on(&self, host: &str) -> Vec<String> {
        let known = format!("mount --bind {} /etc/hosts && exec \"$@\"", self.known().display());
        let network = format!("--net=/run/netns/{}", self.namespace(host));
        ["nsenter", &network, "--", "unshare", "--mount", "--", "sh", "-c", &known, "sh"]
            .map(str::to_owned)
            .to_vec()
    }

    /// Pulls a host's plug.
    pub fn cut(&self, host: &str) {
        ip(&format!("-n {} link set to-{host} down", self.namespace("switch")));
    }

    /// Puts it back.
    pub fn heal(&self, host: &str) {
        ip(&format!("-n {} link set to-{host} up", self.namespace("switch")));
    }

    /// Moves a host far away: everything to it and from it takes half of a round trip, and some of it is lost.
    pub fn slow_down(&mut self, host: &str, round_trip_ms: u32, loss_percent: u32) {
        if !self.far.contains_key(host) {
            self.put_far_switch(host, &[]);
        }
        let far = self.far.get_mut(host).unwrap();
        far.set(f64::from(round_trip_ms) / 2.0, f64::from(loss_percent));
    }

    /// Puts a switch that can delay and lose between a host and the others, with options of `far-switch`.
    pub fn put_far_switch(&mut self, host: &str, options: &[&str]) {
        let switch = self.namespace("switch");
        ip(&format!("-n {switch} link add far-{host} type bridge"));
        ip(&format!("-n {switch} link set far-{host} up"));
        let ends = [format!("a-{host}"), format!("b-{host}")];
        let network = format!("--net=/run/netns/{switch}");
        let far = FarSwitch::start(&["nsenter", &network, "--"], options, &ends);
        self.far.insert(host.to_owned(), far);
        ip(&format!("-n {switch} link set {} master bridge up", ends[0]));
        ip(&format!("-n {switch} link set {} master far-{host} up", ends[1]));
        ip(&format!("-n {switch} link set to-{host} master far-{host}"));
    }

    /// Brings a host back to where the others are. Returns what became of the frames to it and from it.
    pub fn speed_up(&mut self, host: &str) -> Frames {
        let far = self.far.remove(host).unwrap();
        let switch = self.namespace("switch");
        ip(&format!("-n {switch} link set to-{host} master bridge"));
        let frames = far.end();
        ip(&format!("-n {switch} link del far-{host}"));
        frames
    }

    /// Does something on a host: sockets that are made by it stay there.
    pub fn inside<T: Send>(&self, host: &str, what: impl FnOnce() -> T + Send) -> T {
        let network = fs::File::open(format!("/run/netns/{}", self.namespace(host))).unwrap();
        // A thread's own network ends with it.
        let inside = || {
            move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            what()
        };
        std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.far.clear();
        for name in self.names.iter().map(String::as_str).chain(["switch"]) {
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(name)]).output();
        }
    }
}
