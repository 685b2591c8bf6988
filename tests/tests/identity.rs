//! A cluster whose services show certificates to each other, and what everybody else gets from each of its ports: each cell of
//! the table in docs/security.md, and callers that the table does not even know.

#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use pgstrata_identity::{Role, Scope};
use pgstrata_ids::{Lsn, NodeId, SystemId, TenantId, TimelineId, TimelineParameters};
use pgstrata_listen::{Deed, Peer};
use pgstrata_quorum::ProposerId;
use pgstrata_tests::raw::{self, Shown};
use pgstrata_tests::services::Services;
use pgstrata_tests::{
    connect, free_port, give_to_postgres, pg_bin, programs, signal, unprivileged,
};
use pgstrata_wire::FrameBuffer;
use pgstrata_wire::frame::Stamp;
use pgstrata_wire::pages::{Hello, PAGES, PagesReply, REPLY_SIZE, Status};
use pgstrata_wire::safekeeper::{Greeting, Message, RefusedReason, WAL, decode, encode};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustix::process::Signal;
use serde_json::Value;

const TENANT: TenantId = TenantId([0x11; 16]);
const OTHER: TenantId = TenantId([0x22; 16]);

fn text<'a>(said: &'a Value, name: &str) -> &'a str {
    said[name].as_str().unwrap()
}

/// Services with certificates, on loopback: that they are asked for there too is what makes them needed elsewhere.
struct Secured {
    services: Services,
    pki: PathBuf,
    broker: String,
    /// Ports by name: wal, pg, http of safekeeper 3; pages, pageserver-pg, pageserver-http; broker; compute.
    ports: Vec<(&'static str, String)>,
    uri: String,
    timeline: TimelineId,
}

fn auth(pki: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(programs().join("pgstrata"));
    let output = command.arg("auth").args(arguments).arg("--dir").arg(pki).output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {complaint}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn issue(pki: &Path, role: &str, name: &str) -> PathBuf {
    auth(pki, &["issue", "--role", role, "--name", name, "--host", "localhost"]);
    pki.join(format!("{role}-{name}"))
}

impl Secured {
    fn start() -> Secured {
        let mut services = Services::new();
        let pki = services.path("pki");
        auth(&pki, &["init"]);
        let keys = pki.join("token-keys").display().to_string();
        let tls = |role: &str, name: &str| issue(&pki, role, name).display().to_string();
        let security =
            |tls: String| vec!["--tls".to_owned(), tls, "--token-keys".to_owned(), keys.clone()];
        let start = |services: &mut Services, name: &str, program: &str, arguments: Vec<String>| {
            let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
            services.start(name, program, &arguments)
        };
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mut ports = Vec::new();
        let named = |address: &str| address.replace("127.0.0.1", "localhost");

        let listen = words("--listen 127.0.0.1:0");
        let said = start(
            &mut services,
            "broker",
            "storage-broker",
            [listen, security(tls("broker", "b"))].concat(),
        );
        let broker = format!("https://{}", named(text(&said, "http")));
        ports.push(("broker", named(text(&said, "http"))));
        let store = services.path("objects").display().to_string();
        let common = |service: &str| {
            words(&format!(
                "--broker {broker} --object-store {store} --advertise-pg localhost:0 --advertise-http localhost:0 {service}"
            ))
        };
        for id in 1..=3 {
            let own = common(&format!("--id {id} --advertise-wal localhost:0"));
            let own = [own, security(tls("safekeeper", &id.to_string()))].concat();
            let said = start(&mut services, &format!("safekeeper-{id}"), "safekeeper", own);
            if id == 3 {
                ports.push(("wal", named(text(&said, "wal"))));
                ports.push(("pg", named(text(&said, "pg"))));
                ports.push(("http", named(text(&said, "http"))));
            }
        }
        let own =
            [common("--advertise-pages localhost:0"), security(tls("pageserver", "p"))].concat();
        let said = start(&mut services, "pageserver", "pageserver", own);
        ports.push(("pages", named(text(&said, "pages"))));
        ports.push(("pageserver-pg", named(text(&said, "pg"))));
        ports.push(("pageserver-http", named(text(&said, "http"))));

        let admin = issue(&pki, "admin", "me");
        // It is not only root's: 'found' runs as PostgreSQL's user.
        let of_postgres = services.path("of-postgres");
        std::fs::create_dir(&of_postgres).unwrap();
        let own = |from: &Path, name: &str| {
            let to = of_postgres.join(name);
            assert!(Command::new("cp").arg("-r").args([from, &to]).status().unwrap().success());
            give_to_postgres(&to);
            to.display().to_string()
        };
        let (admin, tenant) = (own(&admin, "admin"), TENANT.to_string());
        let http = ports.last().unwrap().1.clone();
        services.run(
            "pgstrata",
            &["found", "--pageserver-http", &http, "--tls", &admin, "--tenant", &tenant],
        );
        let compute = own(&issue(&pki, "compute", &tenant), "compute");
        let port = free_port();
        let arguments = words(&format!(
            "--branch main --port {port} --safekeepers 1,2,3 --broker {broker} --tls {compute} --token-keys {}",
            own(&pki.join("token-keys"), "token-keys")
        ));
        let said = start(&mut services, "compute", "compute-shim", arguments);
        ports.push(("compute", named(text(&said, "http"))));
        let uri = format!("postgresql://postgres@127.0.0.1:{port}/postgres");
        let mut secured =
            Secured { services, pki, broker, ports, uri, timeline: TimelineId([0; 16]) };
        secured.timeline = secured.find_timeline();
        secured
    }

    fn port(&self, name: &str) -> &str {
        &self.ports.iter().find(|(other, _)| *other == name).unwrap().1
    }

    fn shown(&self, own: Option<&Path>) -> Shown {
        raw::tls(&self.pki.join("ca.pem"), own, &[])
    }

    fn find_timeline(&self) -> TimelineId {
        let admin = self.shown(Some(&self.pki.join("admin-me")));
        let asked =
            raw::http(self.port("pageserver-http"), &admin, None, "GET /v1/branch?name=main", "");
        let (status, answer) = asked.unwrap();
        assert_eq!(status, 200, "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let row: Value = serde_json::from_str(body).unwrap();
        row["timeline_id"].as_str().unwrap().parse().unwrap()
    }

    /// A conversation of one message with the WAL port: whether it was let do that.
    fn wal(&self, shown: &Shown, message: &Message<'_>) -> io::Result<bool> {
        let mut stream = raw::connect(self.port("wal"), shown)?;
        let mut bytes = Vec::new();
        encode(message, Stamp::First(WAL.speaks), &mut bytes);
        stream.write_all(&bytes)?;
        let mut input = FrameBuffer::new(1 << 16);
        loop {
            if let Some(frame) = input.next().map_err(io::Error::other)? {
                let answer = decode(frame.kind, frame.body).map_err(io::Error::other)?;
                return Ok(!matches!(answer, Message::Refused(RefusedReason::Forbidden(_))));
            }
            if !input.fill(&mut stream)? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Whether a caller is let do it, really. An error is how he is kept out at the door.
    fn attempt(&self, deed: Deed, caller: &Caller) -> io::Result<bool> {
        let (shown, token) = (&caller.shown, caller.token.as_deref());
        let http = |port: &str, request: &str, body: &str| {
            let (status, text) = raw::http(self.port(port), shown, token, request, body)?;
            assert!(!(500..600).contains(&status), "{}: {request}: {text}", caller.name);
            Ok(![401, 403].contains(&status))
        };
        let postgres = |port: &str, options: &str| {
            raw::postgres(self.port(port), shown, token, options).map(|said| said.is_ok())
        };
        let publish = |role: &str| {
            let body = format!(r#"{{"node":3,"role":"{role}","addresses":{{}},"timelines":[]}}"#);
            http("broker", "POST /v1/publish", &body)
        };
        let follow = format!("-c pgstrata.tenant={TENANT} -c pgstrata.timeline={}", self.timeline);
        match deed {
            Deed::SeeHealth => {
                let asked = ["broker", "http", "pageserver-http", "compute"];
                let asked = asked.map(|port| http(port, "GET /healthz", ""));
                agree(asked.into_iter().collect())
            }
            Deed::SeeService => {
                let asked = ["broker", "http", "pageserver-http", "compute"];
                let asked = asked.map(|port| http(port, "GET /metrics", ""));
                agree(asked.into_iter().collect())
            }
            Deed::SeeNodes => http("broker", "GET /v1/nodes", ""),
            Deed::PublishSafekeeper(_) => publish("safekeeper"),
            Deed::PublishPageserver => publish("pageserver"),
            Deed::ChangeMembers => {
                // Of a timeline that nobody has.
                let timeline = TimelineId([0x34; 16]);
                let asked = format!("tenant_id={TENANT}&timeline_id={timeline}&nodes=1,2,3");
                http("http", &format!("POST /v1/members?{asked}"), "")
            }
            Deed::AppendWal(tenant) => {
                let parameters = TimelineParameters {
                    tenant,
                    // One that nobody needs.
                    timeline: TimelineId([0x33; 16]),
                    system_id: SystemId(1),
                    pg_version: 15,
                    pg_timeline: 1,
                    segment_size: 16 << 20,
                    start_lsn: Lsn(16 << 20),
                    ancestor: None,
                };
                let (addresses, proposer) = (Vec::new(), ProposerId([0x44; 16]));
                let greeting = Greeting { parameters, known: 0, addresses, proposer };
                self.wal(shown, &Message::Greeting(greeting))
            }
            Deed::ReadWal(tenant) => self.wal(shown, &Message::Open(tenant, self.timeline)),
            Deed::FollowWal(_) => postgres("pg", &follow),
            Deed::NoteIngested => postgres("pg", &format!("{follow} -c pgstrata.role=pageserver")),
            Deed::ReadPages(tenant) => {
                let mut stream = raw::connect(self.port("pages"), shown)?;
                let (versions, timeline) = (PAGES.speaks, self.timeline);
                stream.write_all(&Hello { versions, tenant, timeline }.encode())?;
                let mut head = [0; REPLY_SIZE];
                stream.read_exact(&mut head)?;
                let reply = PagesReply::decode(&head).map_err(io::Error::other)?;
                Ok(reply.status == Status::Done)
            }
            Deed::SeeBranch(_) => http("pageserver-http", "GET /v1/branch?name=main", ""),
            Deed::ChangeBranch(_) => {
                http("pageserver-http", "POST /v1/branch/compact?name=main", "")
            }
            Deed::TakeBackup(_) => postgres("pageserver-pg", "-c pgstrata.branch=main"),
        }
    }
}

/// All ports of a kind answer alike.
fn agree(asked: io::Result<Vec<bool>>) -> io::Result<bool> {
    let asked = asked?;
    assert!(asked.iter().all(|answer| *answer == asked[0]), "{asked:?}");
    Ok(asked[0])
}

/// Somebody who wants something, and who he is if what he shows is good.
struct Caller {
    name: String,
    shown: Shown,
    token: Option<String>,
    peer: Option<Peer>,
}

/// A certificate with this URI and until this year, by a CA that is made for it or by the one in `pki`.
fn forge(into: &Path, pki: Option<&Path>, uri: Option<&str>, year: i32) {
    let ca_key = match pki {
        Some(pki) => KeyPair::from_pem(&std::fs::read_to_string(pki.join("ca-key.pem")).unwrap()),
        None => KeyPair::generate(),
    };
    let ca_key = ca_key.unwrap();
    let issuer = match pki {
        Some(pki) => {
            let pem = std::fs::read_to_string(pki.join("ca.pem")).unwrap();
            rcgen::Issuer::from_ca_cert_pem(&pem, ca_key).unwrap()
        }
        None => rcgen::Issuer::new(CertificateParams::default(), ca_key),
    };
    let key = KeyPair::generate().unwrap();
    let mut parameters = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let names = uri.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
    parameters.subject_alt_names.extend(names);
    parameters.not_after = rcgen::date_time_ymd(year, 1, 1);
    let certificate = parameters.signed_by(&key, &issuer).unwrap();
    std::fs::create_dir(into).unwrap();
    std::fs::write(into.join("cert.pem"), certificate.pem()).unwrap();
    std::fs::write(into.join("key.pem"), key.serialize_pem()).unwrap();
}

fn callers(secured: &Secured) -> Vec<Caller> {
    let pki = &secured.pki;
    let mut callers = Vec::new();
    let mut add = |name: &str, shown: Shown, token: Option<String>, peer: Option<Peer>| {
        callers.push(Caller { name: name.to_owned(), shown, token, peer });
    };
    let certified = [
        (Role::Safekeeper(NodeId(3)), pki.join("safekeeper-3")),
        (Role::Safekeeper(NodeId(4)), issue(pki, "safekeeper", "4")),
        (Role::Pageserver("p".into()), pki.join("pageserver-p")),
        (Role::Broker("b".into()), pki.join("broker-b")),
        (Role::Compute(TENANT), pki.join(format!("compute-{TENANT}"))),
        (Role::Compute(OTHER), issue(pki, "compute", &OTHER.to_string())),
        (Role::Admin("me".into()), pki.join("admin-me")),
    ];
    for (role, directory) in certified {
        let shown = secured.shown(Some(&directory));
        add(&role.to_string(), shown, None, Some(Peer::Certified(role)));
    }
    let anonymous = || secured.shown(None);
    for scope in [Scope::Admin, Scope::Read, Scope::Tenant(TENANT), Scope::Tenant(OTHER)] {
        let token = auth(pki, &["token", "--scope", &scope.to_string(), "--ttl", "1h"]);
        add(&format!("token {scope}"), anonymous(), Some(token), Some(Peer::Bearer(scope)));
    }
    // Whom the table calls nobody, and worse.
    add("nobody", anonymous(), None, Some(Peer::Unknown));
    add("plain text", Shown::Nothing, None, None);
    let admin = auth(pki, &["token", "--scope", "admin", "--ttl", "1h"]);
    add("plain text with a token", Shown::Nothing, Some(admin.clone()), None);
    let mut other = admin.clone().into_bytes();
    let middle = other.len() / 2;
    other[middle] = if other[middle] == b'A' { b'B' } else { b'A' };
    add("a token that was changed", anonymous(), Some(String::from_utf8(other).unwrap()), None);
    let strange = secured.services.path("strange-pki");
    auth(&strange, &["init"]);
    let token = auth(&strange, &["token", "--scope", "admin", "--ttl", "1h"]);
    add("a token of another key", anonymous(), Some(token), None);
    let short = auth(pki, &["token", "--scope", "admin", "--ttl", "1s"]);
    std::thread::sleep(std::time::Duration::from_millis(2100));
    add("a token that expired", anonymous(), Some(short), None);
    add("a token of nonsense", anonymous(), Some("a.b.c".into()), None);
    let forged = |name: &str, pki: Option<&Path>, uri: Option<&str>, year: i32| {
        let into = secured.services.path(name);
        forge(&into, pki, uri, year);
        into
    };
    let admin = "pgstrata://admin/me";
    let bad = [
        ("expired", forged("expired", Some(pki), Some(admin), 2020)),
        ("of another CA", forged("self-signed", None, Some(admin), 2100)),
        ("without a role", forged("roleless", Some(pki), None, 2100)),
        ("of an unknown role", forged("unknown", Some(pki), Some("pgstrata://king/me"), 2100)),
    ];
    for (name, directory) in bad {
        add(name, secured.shown(Some(&directory)), None, None);
    }
    callers
}

const DEEDS: [Deed; 14] = [
    Deed::SeeHealth,
    Deed::SeeService,
    Deed::SeeNodes,
    Deed::PublishSafekeeper(NodeId(3)),
    Deed::PublishPageserver,
    Deed::AppendWal(TENANT),
    Deed::ChangeMembers,
    Deed::ReadWal(TENANT),
    Deed::FollowWal(TENANT),
    Deed::NoteIngested,
    Deed::ReadPages(TENANT),
    Deed::SeeBranch(TENANT),
    Deed::ChangeBranch(TENANT),
    Deed::TakeBackup(TENANT),
];

#[test]
fn everybody_gets_what_the_table_says() {
    let mut secured = Secured::start();
    let http = secured.port("compute").to_owned();
    wait_serving(&secured, &http);
    let mut client = connect(&secured.uri);
    client.batch_execute("create table t as select generate_series(1, 1000) a").unwrap();
    let mut wrong = Vec::new();
    let callers = callers(&secured);
    for caller in &callers {
        for deed in DEEDS {
            let expected = caller.peer.as_ref().is_some_and(|peer| peer.may(deed));
            let found = secured.attempt(deed, caller);
            if found.as_ref().is_ok_and(|found| *found) != expected {
                wrong.push(format!("{}: {deed}: {found:?} and not {expected}", caller.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // Why somebody was refused is logged, in one line every ten seconds at most.
    let expired = callers.iter().find(|caller| caller.name == "expired").unwrap();
    std::thread::sleep(std::time::Duration::from_secs(11));
    assert!(secured.attempt(Deed::ReadPages(TENANT), expired).is_err());
    // It is told before that is written.
    let said = || {
        let log = secured.services.log("pageserver");
        let named = "it says that it is of pgstrata://admin/";
        (log.contains("the certificate has expired") && log.contains(named), log)
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while !said().0 {
        assert!(std::time::Instant::now() < deadline, "{}", said().1);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    // Nobody fell over it, and nobody wrote down what is secret.
    client.batch_execute("insert into t values (0)").unwrap();
    drop(client);
    secured.services.kill("compute");
    let names = ["broker", "safekeeper-1", "safekeeper-2", "safekeeper-3", "pageserver", "compute"];
    for name in names {
        let log = secured.services.log(name);
        assert!(!log.contains("PRIVATE") && !log.contains("panicked"), "{name}: {log}");
        for token in callers.iter().filter_map(|caller| caller.token.as_ref()) {
            assert!(!log.contains(token.as_str()), "{name} wrote a token down: {log}");
        }
    }
}

fn wait_serving(secured: &Secured, address: &str) {
    let admin = secured.shown(Some(&secured.pki.join("admin-me")));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let asked = raw::http(address, &admin, None, "GET /readyz", "");
        if asked.as_ref().is_ok_and(|(status, _)| *status == 200) {
            return;
        }
        let log = secured.services.log("compute");
        assert!(std::time::Instant::now() < deadline, "{asked:?}: {log}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn postgresqls_own_clients_come_in_with_a_token() {
    let mut secured = Secured::start();
    let http = secured.port("compute").to_owned();
    wait_serving(&secured, &http);
    let mut client = connect(&secured.uri);
    client.batch_execute("create table t as select generate_series(1, 1000) a").unwrap();
    let token =
        auth(&secured.pki, &["token", "--scope", &format!("tenant:{TENANT}"), "--ttl", "1h"]);
    let readable = secured.services.path("ca-for-all.pem");
    std::fs::copy(secured.pki.join("ca.pem"), &readable).unwrap();
    let port = |name: &str| secured.port(name).rsplit_once(':').unwrap().1.to_owned();
    let connection = |name: &str, options: &str| {
        format!(
            "host=localhost port={} user=token dbname=replication sslmode=verify-full sslrootcert={} options='{options}'",
            port(name),
            readable.display()
        )
    };
    let run = |program: &str, arguments: &[&str], password: &str| {
        let mut command = unprivileged(&pg_bin().join(program), arguments);
        let output = command.env("PGPASSWORD", password).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let into = secured.services.path("taken");
    std::fs::create_dir(&into).unwrap();
    give_to_postgres(&into);
    let backup = into.join("backup").display().to_string();
    let from = connection("pageserver-pg", "-c pgstrata.branch=main");
    let (taken, said) = run("pg_basebackup", &["-d", &from, "-D", &backup, "-X", "fetch"], &token);
    assert!(taken && into.join("backup/PG_VERSION").exists(), "{said}");
    let (taken, said) =
        run("pg_basebackup", &["-d", &from, "-D", &backup, "-X", "fetch"], "nonsense");
    assert!(!taken && said.contains("no token"), "{said}");

    let options = format!("-c pgstrata.tenant={TENANT} -c pgstrata.timeline={}", secured.timeline);
    let from = connection("pg", &options);
    let received = into.join("wal").display().to_string();
    std::fs::create_dir(&received).unwrap();
    give_to_postgres(received.as_ref());
    let lsn: String =
        client.query_one("select pg_current_wal_flush_lsn()::text", &[]).unwrap().get(0);
    client.batch_execute("insert into t select generate_series(1, 100)").unwrap();
    let arguments = ["-d", &from, "-D", &received, "--endpos", &lsn, "--no-loop"];
    let (taken, said) = run("pg_receivewal", &arguments, &token);
    assert!(taken && std::fs::read_dir(&received).unwrap().count() > 0, "{said}");
    let answer =
        run("psql", &[&format!("{from} replication=true"), "-c", "IDENTIFY_SYSTEM"], &token);
    assert!(answer.0, "{}", answer.1);
    // A stock standby, made of a base backup of the compute, follows a safekeeper. (One of the page server ends with a shutdown
    // that the branch's WAL does not have.)
    let standby = into.join("standby");
    let place = standby.display().to_string();
    let (taken, said) =
        run("pg_basebackup", &["-d", &secured.uri, "-D", &place, "-X", "fetch"], "");
    assert!(taken, "{said}");
    let free = free_port().to_string();
    let settings = format!(
        "primary_conninfo = '{} password={token}'\nport = {free}\nlisten_addresses = ''\nunix_socket_directories = '{}'\n",
        from.replace('\'', "''"),
        into.display()
    );
    let mut file =
        std::fs::File::options().append(true).open(standby.join("postgresql.auto.conf")).unwrap();
    file.write_all(settings.as_bytes()).unwrap();
    std::fs::write(standby.join("standby.signal"), "").unwrap();
    client.batch_execute("insert into t values (-1)").unwrap();
    let mut command = unprivileged(&pg_bin().join("postgres"), &["-D", &place]);
    let log = std::fs::File::create(secured.services.path("standby.log")).unwrap();
    let mut server = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    let socket = into.display().to_string();
    let ask = ["-XAtq", "-h", &socket, "-p", &free, "-U", "postgres"];
    let ask = [&ask[..], &["-c", "select count(*) from t where a = -1"]].concat();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    let found = loop {
        let output = unprivileged(&pg_bin().join("psql"), &ask).output().unwrap();
        let found = String::from_utf8(output.stdout).unwrap().trim() == "1";
        if found || std::time::Instant::now() > deadline {
            break found;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    };
    signal(u64::from(server.id()), Signal::INT);
    server.wait().unwrap();
    assert!(found, "{}", secured.services.log("standby"));
    // Without TLS no password is even asked for.
    let plain = from.replace("verify-full", "disable");
    let (taken, said) =
        run("psql", &[&format!("{plain} replication=true"), "-c", "IDENTIFY_SYSTEM"], &token);
    assert!(!taken && said.contains("TLS only"), "{said}");
    let _ = secured.broker;
    drop(client);
    secured.services.kill("compute");
}
