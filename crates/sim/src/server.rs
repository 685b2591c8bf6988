//! A server that takes its time.

use std::io::{BufRead, BufReader, Result, Write};
use std::net::TcpListener;
use std::time::Duration;

/// A server that answers one HTTP request with these pieces, a pause after each. Returns its URL.
pub fn slow_server(pieces: &'static [&'static str], pause: Duration) -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}", listener.local_addr()?);
    std::thread::spawn(move || -> Result<()> {
        let (mut socket, _) = listener.accept()?;
        let lines = BufReader::new(socket.try_clone()?).lines();
        lines.map_while(Result::ok).find(|line| line.is_empty());
        for piece in pieces {
            socket.write_all(piece.as_bytes())?;
            std::thread::sleep(pause);
        }
        Ok(())
    });
    Ok(url)
}
