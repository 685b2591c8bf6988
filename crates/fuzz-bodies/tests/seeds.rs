//! The bodies of the fuzz targets on stable Rust: on every seed, on changes of the seeds, and on random bytes.
#![allow(clippy::expect_used)]

use pgstrata_fuzz_bodies::TARGETS;
use proptest::prelude::*;
use std::path::Path;
use std::sync::LazyLock;

/// The seeds of every target, read once.
static SEEDS: LazyLock<Vec<Vec<Vec<u8>>>> =
    LazyLock::new(|| TARGETS.iter().map(|(name, _)| seeds(name)).collect());

/// Inputs by target. What was found once is a seed.
fn seeds(target: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(&directory)
        .expect("the seeds are there")
        .map(|entry| entry.expect("a seed").path())
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a seed")).collect()
}

#[test]
fn no_seed_panics() {
    for ((name, body), seeds) in TARGETS.iter().zip(&*SEEDS) {
        assert!(!seeds.is_empty(), "no seeds of {name}");
        seeds.iter().for_each(|seed| body(seed));
    }
}

/// A change of a byte, a number, or the length.
fn change(seed: &mut Vec<u8>, (kind, at, value): (u8, usize, u32)) {
    let at = at % (seed.len() + 1);
    match kind {
        0 => seed.truncate(at),
        1 if at + 2 <= seed.len() => {
            seed[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes())
        }
        2 if at + 4 <= seed.len() => seed[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        3 => seed.insert(at, value as u8),
        _ if at < seed.len() => seed[at] = value as u8,
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_change_of_a_seed_panics(
        which in any::<usize>(),
        changes in prop::collection::vec((0u8..8, any::<usize>(), any::<u32>()), 1..6),
    ) {
        for ((_, body), seeds) in TARGETS.iter().zip(&*SEEDS) {
            let mut seed = seeds[which % seeds.len()].clone();
            changes.iter().for_each(|one| change(&mut seed, *one));
            body(&seed);
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        TARGETS.iter().for_each(|(_, body)| body(&bytes));
    }
}
