//! Machines with addresses and names of their own: network namespaces, joined by a bridge in another one. The machine that
//! runs the test has no way to them, and nothing of its own is changed. For root only.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

/// See the module. All of them end with this; processes in them have to have ended before.
pub struct Hosts {
    names: Vec<String>,
    directory: TempDir,
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {complaint}");
}

impl Hosts {
    /// Hosts of these names: at 10.99.0.1 the first, and so on.
    pub fn new(names: &[&str]) -> Hosts {
        let directory = TempDir::with_prefix("pgstrata-hosts-").unwrap();
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let hosts = Hosts { names, directory };
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
        format!("pgs{}-{host}", std::process::id())
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

    /// Makes everything that a host sends late, and loses some of it. False where the kernel has no `netem`.
    pub fn slow_down(&self, host: &str, delay_ms: u32, loss_percent: u32) -> bool {
        let own = self.namespace(host);
        let what = format!("delay {delay_ms}ms loss {loss_percent}%");
        let output = Command::new("tc")
            .args(["-n", &own])
            .args(format!("qdisc replace dev eth0 root netem {what}").split(' '))
            .output()
            .unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        let has_none = complaint.contains("qdisc kind is unknown");
        assert!(output.status.success() || has_none, "tc: {complaint}");
        !has_none
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.names.iter().map(String::as_str).chain(["switch"]) {
            let _ = Command::new("ip").args(["netns", "del", &self.namespace(name)]).output();
        }
    }
}
