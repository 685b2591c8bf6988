//! Clients that say exactly what a test wants to the ports of services, and with which certificate: what such a one gets.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgstrata_identity::rustls::pki_types::pem::PemObject;
use pgstrata_identity::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use pgstrata_identity::rustls::{ClientConfig, RootCertStore};
use pgstrata_identity::{Stream, provider};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a client shows.
#[derive(Clone)]
pub enum Shown {
    /// Plain text.
    Nothing,
    /// TLS, with a certificate or without.
    Tls(Arc<ClientConfig>),
}

/// TLS of a client that believes the CA in a file, and shows the certificate and the key in a directory, if any.
pub fn tls(ca: &Path, own: Option<&Path>, protocols: &[&[u8]]) -> Shown {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(ca).unwrap() {
        roots.add(certificate.unwrap()).unwrap();
    }
    let builder = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(own) => {
            let chain = CertificateDer::pem_file_iter(own.join("cert.pem")).unwrap();
            let chain = chain.map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_file(own.join("key.pem")).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Shown::Tls(Arc::new(config))
}

/// Connects to a port whose TLS begins at once.
pub fn connect(address: &str, shown: &Shown) -> io::Result<Stream> {
    secure(plain(address)?, shown)
}

fn plain(address: &str) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(address)?;
    tcp.set_read_timeout(Some(PATIENCE))?;
    tcp.set_write_timeout(Some(PATIENCE))?;
    Ok(tcp)
}

fn secure(tcp: TcpStream, shown: &Shown) -> io::Result<Stream> {
    match shown {
        Shown::Nothing => Ok(Stream::from(tcp)),
        Shown::Tls(config) => {
            Stream::connect(tcp, Arc::clone(config), "localhost", Instant::now() + PATIENCE)
        }
    }
}

/// The status and the text of an HTTP answer.
pub fn http(
    address: &str,
    shown: &Shown,
    token: Option<&str>,
    request: &str,
    body: &str,
) -> io::Result<(u16, String)> {
    let mut stream = connect(address, shown)?;
    let token = token.map(|token| format!("Authorization: Bearer {token}\r\n"));
    let head = format!(
        "{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n{}\r\n",
        body.len(),
        token.unwrap_or_default()
    );
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    let status = text.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok());
    let status = status.ok_or_else(|| io::Error::other("it is no HTTP"))?;
    Ok((status, text))
}

/// Begins a session of PostgreSQL's protocol. Whether it is let in, or what it is told instead.
pub fn postgres(
    address: &str,
    shown: &Shown,
    token: Option<&str>,
    options: &str,
) -> io::Result<Result<(), String>> {
    let mut tcp = plain(address)?;
    if let Shown::Tls(_) = shown {
        tcp.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f])?;
        let mut answer = [0];
        tcp.read_exact(&mut answer)?;
        if answer != *b"S" {
            return Err(io::Error::other("it speaks no TLS"));
        }
    }
    let mut stream = secure(tcp, shown)?;
    let mut body = vec![0, 3, 0, 0];
    for text in ["user", "token", "replication", "true", "options", options] {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    }
    body.push(0);
    stream.write_all(&(body.len() as u32 + 4).to_be_bytes())?;
    stream.write_all(&body)?;
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head)?;
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let mut body = vec![0; length - 4];
        stream.read_exact(&mut body)?;
        match (head[0], body.as_slice()) {
            (b'R', [0, 0, 0, 0]) => return Ok(Ok(())),
            (b'R', [0, 0, 0, 3]) => {
                let Some(token) = token else { return Ok(Err("a password is asked for".into())) };
                let mut message = vec![b'p'];
                message.extend_from_slice(&(token.len() as u32 + 5).to_be_bytes());
                message.extend_from_slice(token.as_bytes());
                message.push(0);
                stream.write_all(&message)?;
            }
            (b'E', body) => return Ok(Err(String::from_utf8_lossy(body).into_owned())),
            (kind, _) => return Err(io::Error::other(format!("message {kind} was not expected"))),
        }
    }
}
