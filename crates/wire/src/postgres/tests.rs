//! What clients really send, and any bytes at all.

use pgstrata_ids::Lsn;
use proptest::prelude::*;

use super::*;

#[test]
fn commands_of_pg_receivewal_and_walreceiver() {
    let slot = |name: &str, logical| Command::CreateSlot { name: name.into(), logical };
    let start = |slot: Option<&str>, start: u64, timeline| Command::StartReplication {
        slot: slot.map(str::to_owned),
        start: Lsn(start),
        timeline,
    };
    for (text, expected) in [
        ("IDENTIFY_SYSTEM", Command::IdentifySystem),
        ("identify_system;", Command::IdentifySystem),
        ("SHOW wal_segment_size", Command::Show("wal_segment_size".into())),
        ("TIMELINE_HISTORY 2", Command::TimelineHistory(2)),
        ("CREATE_REPLICATION_SLOT \"a b\" PHYSICAL (RESERVE_WAL)", slot("a b", false)),
        ("CREATE_REPLICATION_SLOT x TEMPORARY PHYSICAL RESERVE_WAL", slot("x", false)),
        ("CREATE_REPLICATION_SLOT x LOGICAL pgoutput", slot("x", true)),
        ("READ_REPLICATION_SLOT \"x\"", Command::ReadSlot("x".into())),
        ("DROP_REPLICATION_SLOT \"x\" WAIT", Command::DropSlot("x".into())),
        ("START_REPLICATION 0/1000000 TIMELINE 1", start(None, 0x100_0000, Some(1))),
        ("START_REPLICATION SLOT \"x\" 1/0 TIMELINE 3", start(Some("x"), 1 << 32, Some(3))),
        ("START_REPLICATION SLOT \"x\" PHYSICAL 1/0", start(Some("x"), 1 << 32, None)),
        ("BASE_BACKUP (LABEL 'x', FAST)", Command::BaseBackup("(LABEL 'x', FAST)".into())),
        ("SELECT pg_catalog.set_config('search_path', '', false);", Command::SetConfig),
        (" ; ", Command::Empty),
    ] {
        assert_eq!(parse(text), Ok(expected), "{text}");
    }
    for text in ["DROP TABLE x", "START_REPLICATION x", "SHOW", "START_REPLICATION 0/0 ( x )"] {
        assert!(parse(text).is_err(), "{text}");
    }
}

#[test]
fn options_are_split_as_postgres_does() {
    let packet = StartupPacket {
        minor_version: 0,
        parameters: vec![(
            "options".into(),
            "-c pgstrata.tenant=ab --pgstrata.timeline=cd -cx=1 -c y=a\\ b -c x=2".into(),
        )],
    };
    assert_eq!(packet.setting("pgstrata.tenant").as_deref(), Some("ab"));
    assert_eq!(packet.setting("pgstrata.timeline").as_deref(), Some("cd"));
    assert_eq!(packet.setting("x").as_deref(), Some("2"));
    assert_eq!(packet.setting("y").as_deref(), Some("a b"));
    assert_eq!(packet.setting("z"), None);
}

#[test]
fn startup_packets() {
    let mut body = (3u32 << 16).to_be_bytes().to_vec();
    body.extend_from_slice(b"user\0x\0replication\0true\0\0");
    let Ok(Startup::Session(packet)) = Startup::decode(&body) else { panic!("no session") };
    assert_eq!(packet.get("replication"), Some("true"));
    assert_eq!(Startup::decode(&80_877_103u32.to_be_bytes()), Ok(Startup::SslRequest));
    assert!(Startup::decode(&body[..body.len() - 1]).is_err());
    assert!(Startup::decode(&(2u32 << 16).to_be_bytes()).is_err());
}

#[test]
fn golden_messages() {
    let mut writer = BackendWriter::default();
    writer.ready_for_query();
    writer.keepalive(Lsn(0x0102), 3, true);
    let filled: Result<(), ()> = writer.xlog_data(Lsn(1), Lsn(2), 3, |out| {
        out.push(9);
        Ok(())
    });
    assert_eq!(filled, Ok(()));
    let expected = [
        &[b'Z', 0, 0, 0, 5, b'I', b'd', 0, 0, 0, 22, b'k'][..],
        &[0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 3, 1],
        &[b'd', 0, 0, 0, 30, b'w', 0, 0, 0, 0, 0, 0, 0, 1],
        &[0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3, 9],
    ];
    assert_eq!(writer.bytes, expected.concat());
    let before = writer.bytes.clone();
    assert_eq!(writer.xlog_data(Lsn(1), Lsn(2), 3, |_| Err(())), Err(()));
    assert_eq!(writer.bytes, before);
}

/// libpq of 18 asks for 3.2 when told to, and for options that may come: it must hear what it gets.
#[test]
fn a_newer_protocol_is_answered_with_the_version_that_is_spoken() {
    let mut packet = StartupPacket::default();
    let first = |packet: &StartupPacket| {
        let mut writer = BackendWriter::default();
        writer.welcome(packet, "18.0");
        writer.bytes[0]
    };
    assert_eq!(first(&packet), b'R');
    packet.minor_version = 2;
    assert_eq!(first(&packet), b'v');
    packet.minor_version = 0;
    packet.parameters.push(("_pq_.test".into(), "1".into()));
    assert_eq!(first(&packet), b'v');
}

#[test]
fn a_result_is_columns_rows_and_an_end() {
    let mut writer = BackendWriter::default();
    writer.columns(&[text_column("a")]);
    writer.row(&[Some("x")]);
    writer.row(&[None]);
    writer.command_complete("SELECT");
    let expected = [
        &b"T\0\0\0\x1a\0\x01a\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0"[..],
        b"D\0\0\0\x0b\0\x01\0\0\0\x01x",
        b"D\0\0\0\x0a\0\x01\xff\xff\xff\xff",
        b"C\0\0\0\x0bSELECT\0",
    ];
    assert_eq!(writer.bytes, expected.concat());
    writer.bytes.clear();
    writer.result(&[text_column("a")], Some(&[Some("x")]), "SELECT");
    assert_eq!(writer.bytes, [expected[0], expected[1], expected[3]].concat());
}

#[test]
fn status_updates() {
    let mut message = vec![b'd', 0, 0, 0, 38, b'r'];
    for value in [1u64, 2, 3, 4] {
        message.extend_from_slice(&value.to_be_bytes());
    }
    message.push(1);
    let status = StandbyStatus {
        write_lsn: Lsn(1),
        flush_lsn: Lsn(2),
        apply_lsn: Lsn(3),
        reply_requested: true,
    };
    assert_eq!(split(&message), Ok(Some((Frontend::Status(status), message.len()))));
    for end in 0..message.len() {
        assert_eq!(split(&message[..end]), Ok(None));
    }
}

proptest! {
    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200), text: String) {
        let _ = split(&bytes);
        let _ = Startup::decode(&bytes);
        let _ = parse(&text);
        let _ = settings_of(&text);
    }
}
