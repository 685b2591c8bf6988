//! `auth show`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use pgstrata_identity::rustls::pki_types::CertificateDer;
use pgstrata_identity::rustls::pki_types::pem::PemObject;
use pgstrata_identity::{CA_FILE, CERTIFICATE_FILE, Certificate, Identity};
use serde_json::{Value, json};

use super::authority::{LIMIT_BYTES, read_text};
use super::keys;
use crate::{files, out, table};

fn validity(certificate: &Certificate) -> Value {
    json!({
        "subject": certificate.subject,
        "not_after": format!("{:.0}", certificate.not_after),
        "days_left": certificate.days_left(Timestamp::now()),
    })
}

/// All certificates in a file.
pub fn certificates_in(path: &Path) -> Result<Vec<Certificate>> {
    let pem = read_text(path)?;
    let read = |der: Result<CertificateDer<'_>, _>| -> Result<Certificate> {
        let der = der.map_err(|error| anyhow::anyhow!("{error:?}"))?;
        Ok(Certificate::read(&der)?)
    };
    let read: Result<Vec<_>> = CertificateDer::pem_slice_iter(pem.as_bytes()).map(read).collect();
    read.with_context(|| format!("{} can't be read: put the right one there", path.display()))
}

/// One directory that is given to `--tls`, and what is wrong with it.
fn identity(directory: &Path) -> Value {
    let read = || -> Result<Certificate> {
        let bytes = files::read(&directory.join(CERTIFICATE_FILE), LIMIT_BYTES)?;
        let bytes = bytes.context("it is not there")?;
        let der = CertificateDer::from_pem_slice(&bytes).map_err(|_| anyhow::anyhow!("no PEM"))?;
        Ok(Certificate::read(&der)?)
    };
    let mut row = match read() {
        Ok(certificate) => {
            let mut row = validity(&certificate);
            row["role"] = json!(certificate.role().ok().map(|role| role.to_string()));
            row["names"] = json!(certificate.names);
            row
        }
        // What is wrong with it is said below.
        Err(_) => json!({}),
    };
    row["directory"] = json!(directory);
    row["trouble"] = json!(Identity::open(directory).err().map(|trouble| trouble.to_string()));
    row
}

fn identities(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).with_context(|| format!("can't read {}", dir.display()))? {
        let entry = entry?;
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !is_hidden && entry.path().join(CERTIFICATE_FILE).exists() {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// `auth show`.
pub fn show(dir: &Path, directory: Option<&Path>, as_json: bool) -> Result<()> {
    let (certificates, token_keys) = match directory {
        Some(directory) => (vec![identity(directory)], None),
        None => {
            let signing = keys::signing_key(dir).map(|key| key.kid().to_owned()).ok();
            let key = |kid: String| json!({ "signs": signing.as_ref() == Some(&kid), "kid": kid });
            let keys: Vec<Value> = keys::public_keys(dir)?.into_iter().map(key).collect();
            (identities(dir)?.iter().map(|path| identity(path)).collect(), Some(keys))
        }
    };
    let authorities = certificates_in(&directory.unwrap_or(dir).join(CA_FILE))?;
    let authorities: Vec<_> = authorities.iter().map(validity).collect();
    if as_json {
        let mut document = json!({ "authorities": authorities, "certificates": certificates });
        document["token_keys"] = json!(token_keys.unwrap_or_default());
        return out::line(&document.to_string());
    }
    let mut rows: Vec<Value> = Vec::new();
    for mut row in authorities {
        row["what"] = json!("CA");
        rows.push(row);
    }
    for mut row in certificates {
        let names = row["names"]
            .as_array()
            .map(|names| names.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","));
        row["names"] = json!(names.filter(|names| !names.is_empty()));
        row["what"] = json!("certificate");
        rows.push(row);
    }
    for mut row in token_keys.unwrap_or_default() {
        row["what"] = json!(if row["signs"] == true { "token key, signs" } else { "token key" });
        row["subject"] = row["kid"].clone();
        rows.push(row);
    }
    table::print(&["what", "subject", "role", "not_after", "days_left", "names", "trouble"], &rows)
}
