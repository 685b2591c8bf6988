//! The CA, and certificates that it issues.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use jiff::Timestamp;
use pgstrata_identity::rustls::pki_types::CertificateDer;
use pgstrata_identity::rustls::pki_types::pem::PemObject;
use pgstrata_identity::{CA_FILE, CERTIFICATE_FILE, Certificate, Identity, KEY_FILE, Kind, Role};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use super::keys::{KEYS_DIRECTORY, SIGNING_KEY_FILE};
use super::writing::{self, PRIVATE, PUBLIC};
use crate::{files, out};

/// The CA's key.
pub const CA_KEY_FILE: &str = "ca-key.pem";

/// More than any of these files has, in bytes.
pub const LIMIT_BYTES: u64 = 256 * 1024;

const CA_DAYS: u32 = 3650;
const SECONDS_A_DAY: u64 = 86_400;

/// Certificates are valid from so long ago on: clocks differ.
const EARLIER: Duration = Duration::from_secs(3600);

/// What services on one machine are reached by.
const LOOPBACK: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

fn since_epoch(time: Timestamp) -> Duration {
    Duration::from_secs(time.as_second().unsigned_abs())
}

/// Sets from when until when it is valid.
fn set_validity(params: &mut CertificateParams, now: Timestamp, until: Timestamp) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_epoch(now) - EARLIER;
    params.not_after = epoch + since_epoch(until);
}

fn after_days(now: Timestamp, days: u32) -> Result<Timestamp> {
    Ok(now.checked_add(Duration::from_secs(u64::from(days) * SECONDS_A_DAY))?)
}

fn named(name: String) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

/// A text file that must be there.
pub fn read_text(path: &Path) -> Result<String> {
    let bytes = files::read(path, LIMIT_BYTES)?.with_context(|| {
        format!(
            "{} is not there: 'pgstrata auth init --dir DIR' makes it, and --dir names that directory",
            path.display()
        )
    })?;
    String::from_utf8(bytes)
        .map_err(|_| anyhow!("{} is no PEM: put the right one there", path.display()))
}

/// `auth init`.
pub fn init(dir: &Path) -> Result<()> {
    let is_free = match fs::read_dir(dir) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => true,
        Err(error) => return Err(error).with_context(|| format!("can't read {}", dir.display())),
    };
    ensure!(
        is_free,
        "{} is not empty, and nothing in it is overwritten: name another directory with --dir",
        dir.display()
    );
    let now = Timestamp::now();
    let until = after_days(now, CA_DAYS)?;
    let mut params = CertificateParams::default();
    // Two CAs are to have two names: their certificates are told apart by that.
    params.distinguished_name = named(format!("pgstrata CA {:08x}", rand::random::<u32>()));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, now, until);
    let key = KeyPair::generate().context("can't make a key")?;
    let certificate = params.self_signed(&key).context("can't make a CA")?;

    let absolute = std::path::absolute(dir)?;
    let parent = absolute.parent().context("the root directory is none for keys")?;
    fs::create_dir_all(parent).with_context(|| format!("can't create {}", parent.display()))?;
    let stage = writing::stage(parent)?;
    writing::put(stage.path(), CA_FILE, &certificate.pem(), PUBLIC)?;
    writing::put(stage.path(), CA_KEY_FILE, &key.serialize_pem(), PRIVATE)?;
    super::keys::make(stage.path())?;
    writing::publish(stage, parent, &absolute)?;
    let dir = dir.display();
    out::line(&format!(
        "{dir} has a CA, valid until {until:.0}, and a key that signs tokens. Whoever gets {CA_KEY_FILE} or \
         {SIGNING_KEY_FILE} can be anybody: they stay here.\n\n\
         Next, for each service, compute and person:\n  \
         pgstrata auth issue --dir {dir} --role safekeeper --name 1 --host HOST\n\
         For tools that have no certificate, after copying {dir}/{KEYS_DIRECTORY} to services:\n  \
         pgstrata auth token --dir {dir} --scope admin --ttl 1h"
    ))
}

/// The CA that issues: the first in its file. Those behind it are believed too, as while one CA takes another's place.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: Certificate,
    pem: String,
}

impl Authority {
    fn open(dir: &Path) -> Result<Authority> {
        let path = dir.join(CA_FILE);
        let pem = read_text(&path)?;
        let wrong = || format!("{} holds no CA: put the right one there", path.display());
        let der =
            CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|error| anyhow!("{error}"));
        let der = der.with_context(wrong)?;
        let certificate = Certificate::read(&der).with_context(wrong)?;
        let key_path = dir.join(CA_KEY_FILE);
        // What is wrong with a key is not said: it would have to be quoted.
        let key = KeyPair::from_pem(&read_text(&key_path)?).map_err(|_| {
            anyhow!("{} holds no private key: put the right one there", key_path.display())
        })?;
        let issuer = Issuer::from_ca_cert_der(&der, key).with_context(wrong)?;
        Ok(Authority { issuer, certificate, pem })
    }

    /// A certificate and its key (PEM), and until when it is valid.
    fn issue(
        &self,
        role: &Role,
        hosts: &[String],
        days: u32,
    ) -> Result<(String, String, Timestamp)> {
        let now = Timestamp::now();
        let end = self.certificate.not_after;
        ensure!(
            now < end,
            "the CA has expired at {end:.0}: make a new one with 'pgstrata auth init'"
        );
        let until = after_days(now, days)?.min(end);
        let mut params = CertificateParams::default();
        params.distinguished_name = named(format!("{}-{}", role.kind(), role.name()));
        params.subject_alt_names = vec![SanType::URI(role.to_string().try_into()?)];
        for host in hosts {
            params.subject_alt_names.push(match host.parse::<IpAddr>() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(host.as_str().try_into()?),
            });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Services are each other's clients.
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, until);
        let key = KeyPair::generate().context("can't make a key")?;
        let certificate =
            params.signed_by(&key, &self.issuer).context("can't issue a certificate")?;
        Ok((certificate.pem(), key.serialize_pem(), until))
    }
}

/// Names of the certificate that is renewed. `None` if there is none.
fn former_hosts(directory: &Path) -> Result<Option<Vec<String>>> {
    let path = directory.join(CERTIFICATE_FILE);
    let Some(pem) = files::read(&path, LIMIT_BYTES)? else { return Ok(None) };
    let read = || Certificate::read(&CertificateDer::from_pem_slice(&pem).ok()?).ok();
    match read() {
        Some(certificate) => Ok(Some(certificate.names)),
        None => bail!(
            "{} is no certificate, so its hosts are not known: name them with --host",
            path.display()
        ),
    }
}

/// `auth issue`.
pub fn issue(dir: &Path, kind: Kind, name: &str, hosts: &[String], days: u32) -> Result<()> {
    let role = Role::named(kind, name)?;
    let authority = Authority::open(dir)?;
    let directory = dir.join(format!("{kind}-{name}"));
    let is_client = matches!(kind, Kind::Compute | Kind::Admin);
    let hosts = match hosts {
        [] => match former_hosts(&directory)? {
            Some(former) => former,
            None if is_client => Vec::new(),
            None => LOOPBACK.map(str::to_owned).to_vec(),
        },
        hosts => hosts.to_vec(),
    };
    let (certificate, key, until) = authority.issue(&role, &hosts, days)?;
    let stage = writing::stage(dir)?;
    writing::put(stage.path(), CA_FILE, &authority.pem, PUBLIC)?;
    writing::put(stage.path(), KEY_FILE, &key, PRIVATE)?;
    writing::put(stage.path(), CERTIFICATE_FILE, &certificate, PUBLIC)?;
    // As the service will do: for instance, the key may not be that of the first CA.
    if let Err(trouble) = Identity::open(stage.path()) {
        bail!(
            "a certificate issued by {} is not believed: {}; see whether {CA_FILE} and {CA_KEY_FILE} belong together, and \
             this machine's clock",
            dir.display(),
            trouble.what
        );
    }
    let renewed = directory.exists();
    match renewed {
        true => {
            ensure!(directory.is_dir(), "{} is no directory: remove it", directory.display());
            // The key before the certificate, or the other way round: until both are there they don't fit together, and a
            // service stays with those that it has read.
            writing::exchange(stage.path(), &directory, &[CA_FILE, KEY_FILE, CERTIFICATE_FILE])?;
        }
        false => writing::publish(stage, dir, &directory)?,
    }
    let names = if hosts.is_empty() { String::new() } else { format!(" at {}", hosts.join(", ")) };
    let done = if renewed { "renewed" } else { "issued" };
    out::line(&format!(
        "{done} {}: {role}{names}, valid until {until:.0}; copy it to where it is used, for --tls",
        directory.display()
    ))
}
