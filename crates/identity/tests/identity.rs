//! Directories of certificates, and whom a handshake lets in.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;

use common::{BOTH, COMPUTE, Ca, Directory, SAFEKEEPER, Wanted, connected, sockets, soon};
use pgstrata_identity::{
    Clients, Identity, Role, Stream, Whom, client_without_certificate, peer_role,
};
use pgstrata_ids::NodeId;
use rcgen::ExtendedKeyUsagePurpose;
use rcgen::KeyPair;

const PAGESERVER: &str = "pgstrata://pageserver/one";

fn refused(directory: &Directory) -> String {
    let text = directory.open().unwrap_err();
    assert!(text.contains("; ") && !text.contains('\n'), "{text}");
    text
}

#[test]
fn a_directory_says_who_we_are() {
    let ca = Ca::new();
    let directory = ca.directory(&Wanted::role(&SAFEKEEPER));
    let identity = directory.open().unwrap();
    assert_eq!(identity.role(), Role::Safekeeper(NodeId(3)));
    assert_eq!(identity.certificate().names, ["localhost", "127.0.0.1"]);
    assert_eq!(identity.certificate().days_left(jiff::Timestamp::now()), 0);
    assert_eq!(identity.trouble(), None);
    let key = fs::read_to_string(directory.file("key.pem")).unwrap();
    let shown = format!("{identity:?} {:?}", identity.server(Clients::MustHaveCertificate, &[]));
    assert!(!shown.contains(&key.lines().nth(1).unwrap()[..20]), "{shown}");
    // What does not change is made once.
    let twice = [0, 1].map(|_| identity.server(Clients::MustHaveCertificate, &[b"http/1.1"]));
    assert_eq!(twice[0].alpn_protocols, [b"http/1.1"]);
}

#[test]
fn configs_are_made_once() {
    let ca = Ca::new();
    let directory = ca.directory(&Wanted::role(&SAFEKEEPER));
    let identity = Identity::open(directory.path()).unwrap();
    let server = |clients, protocols: &[&[u8]]| identity.server(clients, protocols);
    let one = server(Clients::MustHaveCertificate, &[b"a"]);
    assert!(Arc::ptr_eq(&one, &server(Clients::MustHaveCertificate, &[b"a"])));
    assert!(!Arc::ptr_eq(&one, &server(Clients::MayHaveCertificate, &[b"a"])));
    assert!(!Arc::ptr_eq(&one, &server(Clients::MustHaveCertificate, &[b"b"])));
    let client = identity.client(Whom::Broker, &[]);
    assert!(Arc::ptr_eq(&client, &identity.client(Whom::Broker, &[])));
    assert!(!Arc::ptr_eq(&client, &identity.client(Whom::Pageserver, &[])));
}

#[test]
fn what_is_wrong_with_a_directory_is_said() {
    let ca = Ca::new();
    let fresh = || ca.directory(&Wanted::role(&SAFEKEEPER));
    for name in ["ca.pem", "cert.pem", "key.pem"] {
        let directory = fresh();
        fs::remove_file(directory.file(name)).unwrap();
        let text = refused(&directory);
        assert!(text.contains(name) && text.contains("not there"), "{text}");
        for (content, words) in [
            ("", "there is no"),
            ("nonsense", "there is no"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", ""),
            ("-----BEGIN CERTIFICATE-----\nAAAA", ""),
        ] {
            directory.put(name, content);
            let text = refused(&directory);
            assert!(text.contains(name) && text.contains(words), "{name} {content}: {text}");
        }
        directory.put(name, &"x".repeat(300_000));
        assert!(refused(&directory).contains("longer"));
        fs::remove_file(directory.file(name)).unwrap();
        symlink("/dev/zero", directory.file(name)).unwrap();
        assert!(refused(&directory).contains("no regular file"));
    }

    // A key of another certificate, and a certificate of another CA.
    let directory = fresh();
    directory.put("key.pem", &KeyPair::generate().unwrap().serialize_pem());
    assert!(refused(&directory).contains("not the key of the certificate in cert.pem"));
    let directory = fresh();
    directory.put("ca.pem", &Ca::new().pem);
    let text = refused(&directory);
    assert!(text.contains("cert.pem") && text.contains("not one that the CAs in ca.pem"), "{text}");
    // Beside the right one it does no harm.
    directory.put("ca.pem", &format!("{}{}", Ca::new().pem, ca.pem));
    directory.open().unwrap();
    // A service's certificate among the CAs.
    let (other, _) = ca.issue(&Wanted::role(&COMPUTE));
    directory.put("ca.pem", &format!("{}{other}", ca.pem));
    let text = refused(&directory);
    assert!(text.contains("certificate 2 in it") && text.contains("no CA's"), "{text}");

    let text = refused(&ca.directory(&Wanted { seconds: -60, ..Wanted::role(&SAFEKEEPER) }));
    assert!(text.contains("expired at 20"), "{text}");
    let text = refused(&ca.directory(&Wanted { uris: &[], ..Wanted::role(&SAFEKEEPER) }));
    assert!(text.contains("no URI"), "{text}");
    let two = [SAFEKEEPER, COMPUTE];
    let text = refused(&ca.directory(&Wanted { uris: &two, ..Wanted::role(&SAFEKEEPER) }));
    assert!(text.contains(SAFEKEEPER) && text.contains(COMPUTE), "{text}");
    let text = refused(&ca.directory(&Wanted::role(&"https://example.com/")));
    assert!(text.contains("'https://example.com/'"), "{text}");
    let usages = [ExtendedKeyUsagePurpose::CodeSigning];
    assert!(
        !refused(&ca.directory(&Wanted { usages: &usages, ..Wanted::role(&SAFEKEEPER) }))
            .is_empty()
    );
    // One usage is enough.
    ca.directory(&Wanted { usages: &BOTH[..1], ..Wanted::role(&SAFEKEEPER) }).open().unwrap();
    ca.directory(&Wanted { usages: &BOTH[1..], ..Wanted::role(&SAFEKEEPER) }).open().unwrap();
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let directory = Ca::new().directory(&Wanted::role(&SAFEKEEPER));
    let mode = |mode| {
        let permissions = fs::Permissions::from_mode(mode);
        fs::set_permissions(directory.file("key.pem"), permissions).unwrap();
    };
    for bad in [0o644, 0o604, 0o666, 0o620, 0o660] {
        mode(bad);
        let text = refused(&directory);
        assert!(text.contains("key.pem") && text.contains("chmod"), "{text}");
    }
    for good in [0o600, 0o400, 0o700] {
        mode(good);
        directory.open().unwrap();
    }
    // A group may read what root gave it.
    mode(0o640);
    assert_eq!(directory.open().is_ok(), rustix::process::geteuid().is_root());
}

#[test]
fn files_that_change_are_used_once_they_fit_together() {
    let ca = Ca::new();
    let directory = ca.directory(&Wanted::role(&SAFEKEEPER));
    let identity = directory.open().unwrap();
    let (certificate, key) = ca.issue(&Wanted::role(&PAGESERVER));
    directory.put("cert.pem", &certificate);
    // A new certificate with the old key.
    assert_eq!(identity.role(), Role::Safekeeper(NodeId(3)));
    assert!(identity.trouble().unwrap().contains("not the key"));
    directory.put("key.pem", &key);
    assert_eq!(identity.role().to_string(), PAGESERVER);
    assert_eq!(identity.trouble(), None);
    // What was made of the old files is not given out any more.
    let compute = ca.identity(COMPUTE);
    let (near, far) =
        connected(&compute, Whom::Pageserver, &identity, Clients::MustHaveCertificate);
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.peer_role().unwrap().to_string(), PAGESERVER);
    assert_eq!(far.peer_role().unwrap().to_string(), COMPUTE);
    for stream in [near, far] {
        let shown = stream.peer_certificate().unwrap();
        assert_eq!(shown.role().as_ref().ok(), stream.peer_role());
    }
    // An expired one does not take the place of a valid one.
    let (certificate, key) = ca.issue(&Wanted { seconds: -60, ..Wanted::role(&SAFEKEEPER) });
    directory.put("cert.pem", &certificate);
    directory.put("key.pem", &key);
    assert!(identity.trouble().unwrap().contains("expired"));
    assert_eq!(identity.role().to_string(), PAGESERVER);
}

#[test]
fn an_expired_certificate_in_use_is_trouble() {
    let directory = Ca::new().directory(&Wanted { seconds: 2, ..Wanted::role(&SAFEKEEPER) });
    let identity = directory.open().unwrap();
    assert_eq!(identity.trouble(), None);
    std::thread::sleep(std::time::Duration::from_secs(4));
    let text = identity.trouble().unwrap();
    assert!(text.contains("cert.pem") && text.contains("expired"), "{text}");
}

#[test]
fn both_sides_know_each_other() {
    let (near, far) = common::pair();
    assert_eq!(near.peer_role().unwrap().to_string(), SAFEKEEPER);
    assert_eq!(far.peer_role().unwrap().to_string(), COMPUTE);
    assert!(near.is_tls() && near.protocol().is_none());
}

#[test]
fn protocols_are_agreed_on() {
    let ca = Ca::new();
    let (compute, server) = (ca.identity(COMPUTE), ca.identity(PAGESERVER));
    let connect = |client: &[&[u8]], of_server: &[&[u8]]| {
        let (near, far) = sockets();
        let config = server.server(Clients::MustHaveCertificate, of_server);
        let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
        let config = compute.client(Whom::Pageserver, client);
        let near = Stream::connect(near, config, "127.0.0.1", soon());
        (near, accepting.join().unwrap())
    };
    let (near, far) = connect(&[b"x", b"postgresql"], &[b"postgresql"]);
    assert_eq!(near.unwrap().protocol(), Some(&b"postgresql"[..]));
    assert_eq!(far.unwrap().protocol(), Some(&b"postgresql"[..]));
    let (near, far) = connect(&[], &[b"postgresql"]);
    assert_eq!(near.unwrap().protocol(), None);
    assert_eq!(far.unwrap().protocol(), None);
    let (near, far) = connect(&[b"http/1.1"], &[b"postgresql"]);
    for error in [near.unwrap_err(), far.unwrap_err()] {
        assert!(error.to_string().contains("another protocol"), "{error}");
    }
}

#[test]
fn a_client_talks_to_whom_it_wants_only() {
    let ca = Ca::new();
    let compute = ca.identity(COMPUTE);
    let safekeeper = ca.identity(SAFEKEEPER);
    let tenant = COMPUTE.rsplit('/').next().unwrap().parse().unwrap();
    for (whom, expected) in [
        (Whom::Safekeeper(Some(NodeId(4))), "pgstrata://safekeeper/4"),
        (Whom::Pageserver, "a page server"),
        (Whom::Broker, "a broker"),
        (Whom::Compute(tenant), COMPUTE),
    ] {
        let (near, far) = connected(&compute, whom, &safekeeper, Clients::MustHaveCertificate);
        let text = near.unwrap_err().to_string();
        assert!(text.contains(SAFEKEEPER) && text.contains(expected), "{text}");
        let text = far.unwrap_err().to_string();
        assert!(text.contains("refused") && text.contains("role"), "{text}");
    }
    let whom = Whom::Safekeeper(Some(NodeId(3)));
    let (near, far) = connected(&compute, whom, &safekeeper, Clients::MustHaveCertificate);
    assert!(near.is_ok() && far.is_ok());
    let (near, _) = {
        let (near, far) = sockets();
        let config = safekeeper.server(Clients::MustHaveCertificate, &[]);
        let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
        let config = compute.client(Whom::Safekeeper(None), &[]);
        (Stream::connect(near, config, "example.com", soon()), accepting.join())
    };
    let text = near.unwrap_err().to_string();
    assert!(text.contains("example.com"), "{text}");
}

/// What a client hears that a server refuses.
fn heard(stream: std::io::Result<Stream>) -> String {
    let mut buffer = [0; 1];
    match stream {
        Ok(stream) => (&stream).read(&mut buffer).unwrap_err().to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn other_cas_and_none_are_refused_on_both_sides() {
    let (ca, other) = (Ca::new(), Ca::new());
    let server = ca.identity(SAFEKEEPER);
    let whom = || Whom::Safekeeper(None);
    for clients in [Clients::MustHaveCertificate, Clients::MayHaveCertificate] {
        // Of another CA on both sides: the client says so.
        let (near, far) = connected(&other.identity(COMPUTE), whom(), &server, clients);
        let text = near.unwrap_err().to_string();
        assert!(text.contains("not of a CA in ca.pem"), "{text}");
        let text = far.unwrap_err().to_string();
        assert!(text.contains("not in its ca.pem"), "{text}");

        // A client that believes the server's CA, and is of another one.
        let (certificate, key) = other.issue(&Wanted::role(&COMPUTE));
        let both = format!("{}{}", ca.pem, other.pem);
        let stranger = Directory::new(&both, &certificate, &key).open().unwrap();
        let (near, far) = connected(&stranger, whom(), &server, clients);
        let text = far.unwrap_err().to_string();
        assert!(text.contains("not of a CA in ca.pem"), "{text}");
        let text = heard(near);
        assert!(text.contains("not in its ca.pem"), "{text}");
    }
}

#[test]
fn a_ca_of_the_same_name_is_another_one() {
    let (ca, other) = (Ca::named("x"), Ca::named("x"));
    let server = ca.identity(SAFEKEEPER);
    let whom = Whom::Safekeeper(None);
    let (near, _) =
        connected(&other.identity(COMPUTE), whom, &server, Clients::MustHaveCertificate);
    let text = near.unwrap_err().to_string();
    assert!(text.contains("has the name of one in ca.pem"), "{text}");
    // Both are believed where both are in the file.
    let both = format!("{}{}", other.pem, ca.pem);
    let (certificate, key) = ca.issue(&Wanted::role(&COMPUTE));
    Directory::new(&both, &certificate, &key).open().unwrap();
}

/// A configuration that checks nothing, and shows this chain.
fn careless(chain: &str, key: &str, ca: &Ca) -> Arc<rustls::ClientConfig> {
    use rustls::pki_types::pem::PemObject;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let chain = CertificateDer::pem_slice_iter(chain.as_bytes()).map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
    let builder = rustls::ClientConfig::builder_with_provider(pgstrata_identity::provider());
    let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).unwrap();
    Arc::new(builder.with_root_certificates(roots).with_client_auth_cert(chain, key).unwrap())
}

#[test]
fn a_server_refuses_certificates_that_are_not_in_order() {
    let ca = Ca::new();
    let server = ca.identity(SAFEKEEPER);
    let self_signed = {
        let key = KeyPair::generate().unwrap();
        let certificate = Wanted::role(&COMPUTE).params().self_signed(&key).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    let two = [COMPUTE, SAFEKEEPER];
    let cases = [
        (self_signed, "not of a CA", "not in its ca.pem"),
        (ca.issue(&Wanted { seconds: -60, ..Wanted::role(&COMPUTE) }), "expired", "expired"),
        (ca.issue(&Wanted::role(&"https://x/")), "'https://x/'", "role"),
        (ca.issue(&Wanted { uris: &[], ..Wanted::role(&COMPUTE) }), "no URI", "role"),
        (ca.issue(&Wanted { uris: &two, ..Wanted::role(&COMPUTE) }), "more than one", "role"),
        (ca.issue(&Wanted { usages: &BOTH[..1], ..Wanted::role(&COMPUTE) }), "", "certificate"),
    ];
    for clients in [Clients::MustHaveCertificate, Clients::MayHaveCertificate] {
        for ((certificate, key), at_server, at_client) in &cases {
            let (near, far) = sockets();
            let config = server.server(clients, &[]);
            let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
            let config = careless(certificate, key, &ca);
            let near = Stream::connect(near, config, "localhost", soon());
            let text = heard(near);
            assert!(text.contains("refused") && text.contains(at_client), "{at_client}: {text}");
            let text = accepting.join().unwrap().unwrap_err().to_string();
            assert!(text.contains(at_server), "{at_server}: {text}");
            // Whose it is, is for whoever looks for what does not come in.
            let names = ["not of a CA", "expired", ""].contains(at_server);
            assert_eq!(names, text.contains(&format!("says that it is of {COMPUTE}")), "{text}");
        }
    }
}

#[test]
fn a_client_without_certificate_is_nobody_or_refused() {
    let ca = Ca::new();
    let directory = ca.directory(&Wanted::role(&PAGESERVER));
    let server = directory.open().unwrap();
    let path = directory.file("ca.pem");
    let connect = |clients, whom| {
        let (near, far) = sockets();
        let config = server.server(clients, &[]);
        let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
        let config = client_without_certificate(&path, whom, &[]).unwrap();
        let near = Stream::connect(near, config, "localhost", soon());
        (near, accepting)
    };
    let (near, accepting) = connect(Clients::MayHaveCertificate, Whom::Pageserver);
    let (near, far) = (near.unwrap(), accepting.join().unwrap().unwrap());
    assert_eq!(far.peer_role(), None);
    assert_eq!(near.peer_role().unwrap().to_string(), PAGESERVER);
    (&near).write_all(b"token").unwrap();
    let mut buffer = [0; 5];
    (&far).read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"token");

    let (near, accepting) = connect(Clients::MustHaveCertificate, Whom::Pageserver);
    let text = heard(near);
    assert!(text.contains("needs a certificate of us"), "{text}");
    let text = accepting.join().unwrap().unwrap_err().to_string();
    assert!(text.contains("no certificate was shown"), "{text}");

    let (near, accepting) = connect(Clients::MayHaveCertificate, Whom::Broker);
    let text = near.unwrap_err().to_string();
    assert!(text.contains(PAGESERVER) && text.contains("a broker"), "{text}");
    accepting.join().unwrap().unwrap_err();

    let error = client_without_certificate(&directory.file("none"), Whom::Broker, &[]).unwrap_err();
    assert!(error.to_string().contains("not there"), "{error}");
    assert!(peer_role(&[]).is_err());
}

#[test]
fn a_lasting_configuration_follows_the_files() {
    let (ca, other) = (Ca::new(), Ca::new());
    let directory = ca.directory(&Wanted::role(&COMPUTE));
    let compute = directory.open().unwrap();
    let config = Arc::new(compute.lasting_client(Whom::Pageserver, &[b"http/1.1"]));
    assert_eq!(config.alpn_protocols, [b"http/1.1"]);
    let connect = |server: &Identity| {
        let (near, far) = sockets();
        let of_server = server.server(Clients::MustHaveCertificate, &[b"http/1.1"]);
        let accepting = std::thread::spawn(move || Stream::accept(far, of_server, soon()));
        let near = Stream::connect(near, Arc::clone(&config), "localhost", soon());
        (near, accepting.join().unwrap())
    };
    let (near, far) = connect(&ca.identity(PAGESERVER));
    assert_eq!(near.unwrap().peer_role().unwrap().to_string(), PAGESERVER);
    assert_eq!(far.unwrap().peer_role().unwrap().to_string(), COMPUTE);
    let (near, _) = connect(&ca.identity(SAFEKEEPER));
    assert!(near.unwrap_err().to_string().contains("a page server was expected"));
    let (near, _) = connect(&other.identity(PAGESERVER));
    assert!(near.unwrap_err().to_string().contains("not of a CA"));
    // Another certificate of another CA, and both CAs are believed.
    let admin = "pgstrata://admin/alice";
    let (certificate, key) = other.issue(&Wanted::role(&admin));
    directory.put("ca.pem", &format!("{}{}", other.pem, ca.pem));
    directory.put("key.pem", &key);
    directory.put("cert.pem", &certificate);
    let (near, far) = connect(&other.identity(PAGESERVER));
    near.unwrap();
    assert_eq!(far.unwrap().peer_role().unwrap().to_string(), admin);
}

#[test]
fn sessions_are_not_resumed() {
    let ca = Ca::new();
    let (compute, server) = (ca.identity(COMPUTE), ca.identity(PAGESERVER));
    let client = compute.client(Whom::Pageserver, &[]);
    let config = server.server(Clients::MustHaveCertificate, &[]);
    assert_eq!((config.send_tls13_tickets, config.max_early_data_size), (0, 0));
    for _ in 0..3 {
        let (near, far) = sockets();
        let config = Arc::clone(&config);
        let accepting = std::thread::spawn(move || Stream::accept(far, config, soon()));
        let near = Stream::connect(near, Arc::clone(&client), "localhost", soon()).unwrap();
        let far = accepting.join().unwrap().unwrap();
        (&far).write_all(b"x").unwrap();
        (&near).read_exact(&mut [0]).unwrap();
        for stream in [near, far] {
            let Stream::Tls(tls) = stream else { unreachable!() };
            assert_eq!(tls.handshake_kind(), Some(rustls::HandshakeKind::Full));
        }
    }
}
