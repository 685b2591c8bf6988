//! Services that run on this machine, by their command lines: what they were told of directories and certificates.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::limits::Limits;

/// Bytes of a command line that are read, at most.
const LONGEST: u64 = 64 << 10;
/// Processes that are looked at, at most.
const MOST: usize = 100_000;

/// A service that runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Running {
    /// Its process.
    pub pid: u32,
    /// Which program it is.
    pub program: String,
    arguments: Vec<String>,
}

impl Running {
    /// Of a command line as the kernel has it; `None` of what is no service.
    fn parse(pid: u32, cmdline: &[u8]) -> Option<Running> {
        let text = String::from_utf8_lossy(cmdline);
        let mut arguments = text.trim_end_matches('\0').split('\0').map(str::to_owned);
        let program = arguments.next()?;
        let program = Path::new(&program).file_name()?.to_str()?.to_owned();
        let is_ours = ["storage-broker", "safekeeper", "pageserver", "compute-shim"]
            .contains(&program.as_str());
        is_ours.then(|| Running { pid, program, arguments: arguments.collect() })
    }

    /// A process, if it is a service.
    pub fn of(pid: u32) -> Option<Running> {
        let mut cmdline = Vec::new();
        let file = fs::File::open(format!("/proc/{pid}/cmdline")).ok()?;
        file.take(LONGEST).read_to_end(&mut cmdline).ok()?;
        Running::parse(pid, &cmdline)
    }

    /// All that run on this machine, as far as we may see.
    pub fn all() -> Vec<Running> {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten().take(MOST);
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut all: Vec<_> = pids.filter_map(Running::of).collect();
        all.sort_by_key(|running| running.pid);
        all
    }

    /// What an option was given: the last counts.
    pub fn option(&self, name: &str) -> Option<&str> {
        let mut given = None;
        let mut arguments = self.arguments.iter();
        while let Some(argument) = arguments.next() {
            if argument == name {
                given = arguments.next().map(String::as_str);
            } else if let Some(value) =
                argument.strip_prefix(name).and_then(|rest| rest.strip_prefix('='))
            {
                given = Some(value);
            }
        }
        given
    }

    /// A directory that an option names. It may be relative to where the process is, which it may not show.
    pub fn directory(&self, name: &str) -> Option<PathBuf> {
        let path = Path::new(self.option(name)?);
        let place = || fs::read_link(format!("/proc/{}/cwd", self.pid)).ok();
        match path.is_absolute() {
            true => Some(path.to_owned()),
            false => Some(place()?.join(path)),
        }
    }

    /// Whether it is in a container, where paths lead elsewhere than here. Of another user's process only root is told;
    /// where we are not, it is taken to be beside us.
    pub fn is_contained(&self) -> bool {
        let mounts = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
        match (mounts("self"), mounts(&self.pid.to_string())) {
            (Some(ours), Some(its)) => ours != its,
            _ => false,
        }
    }

    /// What it is called in findings.
    pub fn object(&self) -> String {
        let of = |option: &str| self.option(option).map(str::to_owned);
        let which = match self.program.as_str() {
            "safekeeper" => of("--id").map(|id| format!("safekeeper-{id}")),
            "compute-shim" => of("--branch").map(|branch| format!("compute-{branch}")),
            _ => None,
        };
        which.unwrap_or_else(|| self.program.clone())
    }

    /// Whether it was told of this broker, or is it: then the port is.
    pub fn is_of(&self, broker: &str) -> bool {
        let broker = broker.trim_end_matches('/');
        if self.program != "storage-broker" {
            return self
                .option("--broker")
                .is_some_and(|told| told.trim_end_matches('/') == broker);
        }
        let port =
            |address: &str| address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
        let known = ["--advertise-http", "--advertise", "--listen"]
            .into_iter()
            .filter_map(|name| self.option(name));
        let mut ports =
            known.flat_map(|all| all.split(',')).filter_map(port).filter(|port| *port != 0);
        port(broker).is_some_and(|broker| ports.any(|own| own == broker))
    }

    /// Its limits.
    pub fn limits(&self) -> Option<Limits> {
        Limits::parse(&fs::read_to_string(format!("/proc/{}/limits", self.pid)).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running(cmdline: &str) -> Option<Running> {
        Running::parse(7, cmdline.replace(' ', "\0").as_bytes())
    }

    #[test]
    fn services_are_known_by_their_command_lines() {
        let safekeeper = running("/opt/bin/safekeeper --id 3 --tls=/tls/3 --dir /srv/3 --broker https://b:1/ --tls /tls/4 ").unwrap();
        assert_eq!(safekeeper.object(), "safekeeper-3");
        assert_eq!(safekeeper.directory("--tls"), Some("/tls/4".into()));
        assert_eq!(safekeeper.directory("--dir"), Some("/srv/3".into()));
        assert_eq!(safekeeper.directory("--token-keys"), None);
        assert!(safekeeper.is_of("https://b:1") && !safekeeper.is_of("https://b:11"));
        let broker = running("storage-broker --listen 0.0.0.0:50051,[::]:50051").unwrap();
        assert_eq!(broker.object(), "storage-broker");
        assert!(broker.is_of("https://b.example.org:50051") && !broker.is_of("https://b:1"));
        assert!(!running("storage-broker --listen 127.0.0.1:0").unwrap().is_of("https://b:0"));
        assert_eq!(running("compute-shim --branch main").unwrap().object(), "compute-main");
        for other in ["", "bash safekeeper", "/usr/bin/pageserver-tool", "safekeeper\0\0x/"] {
            assert!(
                running(other).is_none_or(|running| running.program == "safekeeper"),
                "{other}"
            );
        }
        assert_eq!(Running::parse(7, &[0xff, 0, 0xfe]), None);
        assert_eq!(Running::of(std::process::id()), None, "this is a test");
    }
}
