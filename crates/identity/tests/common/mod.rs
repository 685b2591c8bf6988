//! A CA for tests, and directories of what it issues.

#![allow(clippy::unwrap_used, dead_code)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgstrata_identity::{Clients, Identity, Stream, Whom};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use tempfile::TempDir;

pub const SAFEKEEPER: &str = "pgstrata://safekeeper/3";
pub const COMPUTE: &str = "pgstrata://compute/000102030405060708090a0b0c0d0eff";

pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pub pem: String,
}

/// What a certificate is to be.
pub struct Wanted<'a> {
    pub uris: &'a [&'a str],
    pub usages: &'a [ExtendedKeyUsagePurpose],
    /// Until when it is valid, from now on, in seconds; from an hour before that on, or before now.
    pub seconds: i64,
}

pub const BOTH: [ExtendedKeyUsagePurpose; 2] =
    [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];

impl<'a> Wanted<'a> {
    pub fn role(uri: &'a &'a str) -> Wanted<'a> {
        Wanted { uris: std::slice::from_ref(uri), usages: &BOTH, seconds: 3600 }
    }

    pub fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test");
        params.subject_alt_names = vec![
            SanType::DnsName("localhost".try_into().unwrap()),
            SanType::IpAddress([127, 0, 0, 1].into()),
        ];
        let uri = |uri: &&str| SanType::URI((*uri).try_into().unwrap());
        params.subject_alt_names.extend(self.uris.iter().map(uri));
        params.extended_key_usages = self.usages.to_vec();
        let now = rcgen::date_time_ymd(1970, 1, 1) + now();
        let away = Duration::from_secs(self.seconds.unsigned_abs());
        params.not_after = if self.seconds < 0 { now - away } else { now + away };
        params.not_before = params.not_after.min(now) - Duration::from_secs(3600);
        params
    }
}

fn now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap()
}

impl Ca {
    pub fn new() -> Ca {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        Ca::named(&format!("test CA {}", NUMBER.fetch_add(1, Ordering::Relaxed)))
    }

    pub fn named(name: &str) -> Ca {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Ca { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate and its key.
    pub fn issue(&self, wanted: &Wanted) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        (wanted.params().signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    pub fn directory(&self, wanted: &Wanted) -> Directory {
        let (certificate, key) = self.issue(wanted);
        Directory::new(&self.pem, &certificate, &key)
    }

    pub fn identity(&self, uri: &str) -> Identity {
        self.directory(&Wanted::role(&uri)).open().unwrap()
    }
}

pub struct Directory(pub TempDir);

impl Directory {
    pub fn new(ca: &str, certificate: &str, key: &str) -> Directory {
        let directory = Directory(tempfile::tempdir().unwrap());
        directory.put("ca.pem", ca);
        directory.put("cert.pem", certificate);
        directory.put("key.pem", key);
        directory
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// As whoever renews does: another file takes the place.
    pub fn put(&self, name: &str, content: &str) {
        let temporary = self.file(&format!("{name}.tmp"));
        fs::write(&temporary, content).unwrap();
        fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600)).unwrap();
        fs::rename(temporary, self.file(name)).unwrap();
    }

    pub fn open(&self) -> Result<Identity, String> {
        Identity::looking_every(self.path(), Duration::ZERO).map_err(|error| error.to_string())
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// Two ends of a connection: the client's, and the server's.
pub fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    for socket in [&client, &server] {
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    }
    (client, server)
}

/// What came of a handshake on both sides, the client's first.
pub fn connected(
    client: &Identity,
    whom: Whom,
    server: &Identity,
    clients: Clients,
) -> (std::io::Result<Stream>, std::io::Result<Stream>) {
    let (near, far) = sockets();
    let config = server.server(clients, &[]);
    let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
    let stream = Stream::connect(near, client.client(whom, &[]), "localhost", soon());
    (stream, accepting.join().unwrap())
}

/// A connection between a compute and a safekeeper.
pub fn pair() -> (Stream, Stream) {
    let ca = Ca::new();
    let (compute, safekeeper) = (ca.identity(COMPUTE), ca.identity(SAFEKEEPER));
    let (near, far) =
        connected(&compute, Whom::Safekeeper(None), &safekeeper, Clients::MustHaveCertificate);
    (near.unwrap(), far.unwrap())
}
