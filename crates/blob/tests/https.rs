//! A store behind HTTPS, whose certificate is of a CA that the machine knows: cryptography is there, and is asked.
//!
//! One test in a program of its own, which says by its environment which CAs the machine knows.

#![allow(clippy::unwrap_used)]

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pgstrata_blob::{Location, Store};
use pgstrata_identity::Stream;
use pgstrata_identity::rustls::ServerConfig;
use pgstrata_identity::rustls::pki_types::PrivatePkcs8KeyDer;
use pgstrata_tests::S3_ENVIRONMENT;
use pgstrata_tests::other_s3::OtherS3;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};

/// A CA's certificate (PEM), and how a server speaks whose certificate it issued.
fn certified() -> (String, Arc<ServerConfig>) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&key).unwrap();
    let issuer = Issuer::new(params, key);
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let chain = vec![params.signed_by(&key, &issuer).unwrap().der().clone()];
    let key = PrivatePkcs8KeyDer::from(key.serialize_der());
    let builder = ServerConfig::builder_with_provider(pgstrata_identity::provider());
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    (ca.pem(), Arc::new(builder.with_single_cert(chain, key.into()).unwrap()))
}

/// Passes on what comes by TLS, and the answers. Returns its URL.
fn terminate(config: Arc<ServerConfig>, to: String) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for tcp in listener.incoming() {
            let (config, to) = (Arc::clone(&config), to.clone());
            thread::spawn(move || -> io::Result<()> {
                let near = Stream::accept(tcp?, config, Instant::now() + Duration::from_secs(10))?;
                let far = Stream::from(TcpStream::connect(to)?);
                let (mut from, mut into) = (far.clone(), near.clone());
                thread::spawn(move || {
                    let _ = io::copy(&mut from, &mut into);
                    let _ = into.shutdown(Shutdown::Both);
                });
                io::copy(&mut &near, &mut &far)?;
                far.shutdown(Shutdown::Write)
            });
        }
    });
    format!("https://{address}")
}

#[test]
fn a_store_behind_https() {
    let (ca, config) = certified();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ca.pem");
    std::fs::write(&path, ca).unwrap();
    // SAFETY: this is the only test of this program, and it has started no thread yet.
    unsafe {
        std::env::set_var("SSL_CERT_FILE", &path);
        S3_ENVIRONMENT.iter().for_each(|(name, value)| std::env::set_var(name, value));
    }
    let server = OtherS3::start(None);
    let endpoint = terminate(config, server.endpoint.strip_prefix("http://").unwrap().to_owned());
    // One that the machine does not know.
    let stranger = terminate(certified().1, "127.0.0.1:1".to_owned());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        pgstrata_blob::create_bucket("pgstrata-test", Some(&endpoint)).await.unwrap();
        let location: Location = "s3://pgstrata-test/p".parse().unwrap();
        let store = Store::open(&location, Some(&endpoint)).unwrap();
        let content = Bytes::from(vec![7; 3 << 20]);
        store.put("one", content.clone()).await.unwrap();
        assert_eq!(store.get("one", 4 << 20).await.unwrap(), content);
        let refused = pgstrata_blob::create_bucket("pgstrata-test", Some(&stranger)).await;
        let text = format!("{:#}", refused.unwrap_err());
        assert!(text.contains("ertificate"), "{text}");
    });
}
