//! Explores larger bounds than the tests do: `cargo run --release --example explore --features
//! explorer -- first=1 second=1 crashes=2 ...`. Prints what was visited, and a trace if something is wrong.

use pgstrata_quorum::explorer::{Beginning, Bounds, explore};

fn main() {
    let mut bounds = Bounds {
        records: [1, 1],
        beginning: Beginning::Fresh,
        five: false,
        crashes: 0,
        restarts: 0,
        duplicates: 0,
        reconnects: 0,
        copies: 0,
        follows: 0,
        proofs: 0,
        tidings: 0,
        changes: 0,
        undos: 0,
        learns: 0,
        made_up: 0,
        wipes: 0,
        pieces: false,
        late_flush: false,
    };
    let mut most_states = 20_000_000;
    for argument in std::env::args().skip(1) {
        let (name, value) = argument.split_once('=').unwrap_or((&argument, "1"));
        let number: usize = value.parse().unwrap_or(0);
        match name {
            "first" => bounds.records[0] = number as u8,
            "second" => bounds.records[1] = number as u8,
            "elected" => bounds.beginning = Beginning::Elected,
            "retaken" => bounds.beginning = Beginning::Retaken,
            "retaken_longer" => bounds.beginning = Beginning::RetakenLonger,
            "heard" => bounds.beginning = Beginning::Heard,
            "divided" => bounds.beginning = Beginning::Divided,
            "joint" => bounds.beginning = Beginning::Joint,
            "replaced" => bounds.beginning = Beginning::Replaced,
            "five" => bounds.five = number > 0,
            "crashes" => bounds.crashes = number as u8,
            "restarts" => bounds.restarts = number as u8,
            "duplicates" => bounds.duplicates = number as u8,
            "reconnects" => bounds.reconnects = number as u8,
            "copies" => bounds.copies = number as u8,
            "follows" => bounds.follows = number as u8,
            "proofs" => bounds.proofs = number as u8,
            "tidings" => bounds.tidings = number as u8,
            "changes" => bounds.changes = number as u8,
            "undos" => bounds.undos = number as u8,
            "learns" => bounds.learns = number as u8,
            "made_up" => bounds.made_up = number as u8,
            "wipes" => bounds.wipes = number as u8,
            "pieces" => bounds.pieces = number > 0,
            "late_flush" => bounds.late_flush = number > 0,
            "states" => most_states = number,
            other => {
                eprintln!("explore: no bound is named '{other}'");
                std::process::exit(2);
            }
        }
    }
    let started = std::time::Instant::now();
    let outcome = explore(bounds, None, most_states, false);
    println!("{bounds:?}\n{outcome:?}\n{:?}", started.elapsed());
    std::process::exit(i32::from(outcome.violation.is_some()));
}
