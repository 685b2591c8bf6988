use pgstrata_world::{Plan, World};
fn main() {
    let mut args = std::env::args().skip(1);
    let from: u64 = args.next().unwrap().parse().unwrap();
    let count: u64 = args.next().unwrap().parse().unwrap();
    let begun = std::time::Instant::now();
    let mut all = pgstrata_world::Outcome::default();
    for seed in from..from + count {
        let o = World::new(&Plan::new(seed), None, count == 1).run();
        for line in &o.trace {
            println!("{line}");
        }
        all.events += o.events;
        all.simulated_us += o.simulated_us;
        all.elections += o.elections;
        all.crashes += o.crashes;
        all.copies += o.copies;
        all.archived += o.archived;
        all.trimmed += o.trimmed;
        all.committed_bytes += o.committed_bytes;
        if let Some(v) = o.violation {
            println!("seed {seed}: {v}");
        }
    }
    let s = begun.elapsed().as_secs_f64();
    println!("{count} in {s:.2} s: {:.0}/s {all:?}", count as f64 / s);
}
