//! What crosses the network.

use crate::input::Input;
use pgstrata_wire::pages::{HELLO_SIZE, Hello, PagesReply, PagesRequest, REPLY_SIZE, REQUEST_SIZE};
use pgstrata_wire::{FrameBuffer, frame, postgres, safekeeper};

/// A message: `u8 kind of connection`, then what was received.
pub fn wire(data: &[u8]) {
    let mut input = Input(data);
    match input.u8() % 5 {
        0 => message(input.u8(), input.0),
        1 => frames(&mut input),
        2 => pages(input.0),
        3 => startup(input.0),
        _ => session(input.0),
    }
}

/// A message that decodes must encode to what decodes to it again.
fn message(kind: u8, body: &[u8]) {
    // What an older compute says is only read.
    let _ = safekeeper::version2::decode(kind, body);
    let Ok(found) = safekeeper::decode(kind, body) else { return };
    let mut bytes = Vec::new();
    let stamp = frame::Stamp::In(safekeeper::WAL.speaks.highest());
    safekeeper::encode(&found, stamp, &mut bytes);
    let framed = frame::split(&bytes);
    assert!(framed.is_ok(), "an encoded message is a frame");
    if let Ok(Some(framed)) = framed {
        let again = safekeeper::decode(framed.kind, framed.body);
        assert_eq!(again.as_ref(), Ok(&found), "what was encoded decodes to the same");
    }
}

fn frames(input: &mut Input<'_>) {
    let piece = usize::from(input.u8()) + 1;
    let mut buffer = FrameBuffer::new(64);
    while !input.is_empty() {
        let mut bytes = input.take(piece);
        while !bytes.is_empty() {
            assert!(matches!(buffer.fill(&mut bytes), Ok(true)));
        }
        loop {
            let size = match buffer.next() {
                Ok(Some(found)) => {
                    message(found.kind, found.body);
                    found.size
                }
                Ok(None) => break,
                Err(_) => return,
            };
            buffer.consume(size);
        }
    }
}

fn sized<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut sized = [0; N];
    let length = bytes.len().min(N);
    sized[..length].copy_from_slice(&bytes[..length]);
    sized
}

fn pages(bytes: &[u8]) {
    if let Ok(hello) = Hello::decode(&sized::<HELLO_SIZE>(bytes)) {
        assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
    }
    if let Ok(request) = PagesRequest::decode(&sized::<REQUEST_SIZE>(bytes)) {
        assert_eq!(PagesRequest::decode(&request.encode()), Ok(request));
    }
    if let Ok(reply) = PagesReply::decode(&sized::<REPLY_SIZE>(bytes)) {
        assert_eq!(PagesReply::decode(&reply.encode()), Ok(reply));
    }
}

fn startup(bytes: &[u8]) {
    if let Ok(postgres::Startup::Session(packet)) = postgres::Startup::decode(bytes) {
        let _ = (packet.get("user"), packet.setting("application_name"));
    }
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = postgres::parse(text);
        let _ = postgres::settings_of(text);
    }
}

fn session(mut bytes: &[u8]) {
    while let Ok(Some((message, size))) = postgres::split(bytes) {
        if let postgres::Frontend::Query(text) = message {
            let _ = postgres::parse(&text);
        }
        assert!(size > 0 && size <= bytes.len());
        bytes = &bytes[size..];
    }
}
