use std::collections::BTreeSet;

use pgstrata_env::replace_file;

use super::contents::SECTOR;
use super::*;

fn path(name: &str) -> std::path::PathBuf {
    Path::new("/safekeeper").join(name)
}

fn disk(seed: u64) -> SimDisk {
    let disk = SimDisk::new(seed);
    disk.create_directory(Path::new("/safekeeper")).unwrap();
    disk.sync_directory(Path::new("/")).unwrap();
    disk
}

/// A file of 16 sectors of ones, synced, with its name.
fn with_ones(seed: u64) -> SimDisk {
    let disk = disk(seed);
    let file = disk.create(&path("file")).unwrap();
    file.write_at(&[1; 16 * SECTOR], 0).unwrap();
    file.sync_all().unwrap();
    disk.sync_directory(Path::new("/safekeeper")).unwrap();
    disk
}

/// Everything that can be found, in so many tries.
fn outcomes<T: Ord>(tries: u64, outcome: impl Fn(u64) -> T) -> BTreeSet<T> {
    (0..tries).map(outcome).collect()
}

#[test]
fn what_is_synced_lasts() {
    for seed in 0..50 {
        let disk = with_ones(seed);
        disk.lose_power();
        assert_eq!(disk.read_all(&path("file")).unwrap(), [1; 16 * SECTOR]);
    }
}

#[test]
fn unsynced_sectors_last_each_for_itself_and_whole() {
    let found = outcomes(300, |seed| {
        let disk = with_ones(seed);
        disk.open(&path("file")).unwrap().write_at(&[2; 2 * SECTOR + 10], 100).unwrap();
        disk.lose_power();
        let bytes = disk.read_all(&path("file")).unwrap();
        let old_or_new = |sector: usize| {
            let start = sector * SECTOR;
            let new = |at: usize| (100..2 * SECTOR + 110).contains(&at);
            let sector = &bytes[start..start + SECTOR];
            let is_new =
                sector.iter().enumerate().all(|(at, &byte)| byte == 1 + u8::from(new(start + at)));
            assert!(is_new || sector.iter().all(|&byte| byte == 1), "{sector:?}");
            is_new
        };
        assert!(bytes[3 * SECTOR..].iter().all(|&byte| byte == 1));
        [old_or_new(0), old_or_new(1), old_or_new(2)]
    });
    assert_eq!(found.len(), 8, "every subset");
}

#[test]
fn what_was_written_between_two_syncs_can_last_as_it_was_at_any_time() {
    let found = outcomes(300, |seed| {
        let disk = with_ones(seed);
        let file = disk.open(&path("file")).unwrap();
        for value in 2..=4 {
            file.write_at(&[value; 8], 0).unwrap();
        }
        disk.lose_power();
        disk.read_all(&path("file")).unwrap()[0]
    });
    assert_eq!(found, BTreeSet::from([1, 2, 3, 4]));
}

#[test]
fn names_last_from_the_sync_of_their_directory_on() {
    let found = outcomes(300, |seed| {
        let disk = with_ones(seed);
        disk.create(&path("new")).unwrap();
        disk.rename(&path("file"), &path("other")).unwrap();
        disk.lose_power();
        disk.list(Path::new("/safekeeper")).unwrap()
    });
    let all: [&[&str]; 4] = [&["file"], &["file", "new"], &["new", "other"], &["other"]];
    assert_eq!(
        found,
        all.into_iter().map(|names| names.iter().map(|&name| name.to_owned()).collect()).collect()
    );

    let disk = with_ones(1);
    disk.rename(&path("file"), &path("other")).unwrap();
    disk.sync_directory(Path::new("/safekeeper")).unwrap();
    disk.lose_power();
    assert_eq!(disk.list(Path::new("/safekeeper")).unwrap(), ["other"]);
}

#[test]
fn a_name_may_be_of_a_file_that_lost_what_it_had() {
    let found = outcomes(100, |seed| {
        let disk = disk(seed);
        disk.create(&path("file")).unwrap().write_at(&[7; 8], 0).unwrap();
        disk.sync_directory(Path::new("/safekeeper")).unwrap();
        disk.lose_power();
        disk.read_all(&path("file")).unwrap()
    });
    assert_eq!(found, BTreeSet::from([vec![], vec![0; 8], vec![7; 8]]));
}

#[test]
fn a_file_that_is_replaced_is_the_old_or_the_new_one() {
    for operations in 0..8 {
        let found = outcomes(50, |seed| {
            let disk = disk(seed);
            replace_file(&disk, &path("control"), b"old").unwrap();
            disk.stop_after(operations);
            let done = replace_file(&disk, &path("control"), b"newer").is_ok();
            assert_eq!(disk.has_stopped(), operations <= 5);
            disk.lose_power();
            (done, disk.read_all(&path("control")).unwrap())
        });
        let (old, new) = (b"old".to_vec(), b"newer".to_vec());
        let expected = match operations {
            // Created, written, synced.
            0..=3 => BTreeSet::from([(false, old)]),
            // Renamed, but the directory is not synced.
            4 => BTreeSet::from([(false, old), (false, new)]),
            _ => BTreeSet::from([(true, new)]),
        };
        assert_eq!(found, expected, "{operations}");
    }
}

#[test]
fn after_a_failed_sync_the_cache_has_what_the_device_lacks() {
    let found = outcomes(50, |seed| {
        let disk = with_ones(seed);
        let file = disk.open(&path("file")).unwrap();
        file.write_at(&[2; 8], 0).unwrap();
        disk.fail_sync_after(0);
        file.sync_data().unwrap_err();
        // Nothing seems to be wrong.
        file.sync_data().unwrap();
        let mut byte = [0];
        file.read_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [2]);
        file.evict().unwrap();
        file.read_at(&mut byte, 0).unwrap();
        byte[0]
    });
    assert_eq!(found, BTreeSet::from([1, 2]));
}

#[test]
fn a_process_that_ends_loses_nothing_but_its_files() {
    let disk = with_ones(1);
    let file = disk.open(&path("file")).unwrap();
    file.write_at(&[2; 8], 0).unwrap();
    disk.end_process();
    file.write_at(&[3; 8], 0).unwrap_err();
    assert_eq!(disk.read_all(&path("file")).unwrap()[0], 2);
}

#[test]
fn a_full_disk_takes_what_there_is_room_for() {
    let disk = with_ones(1);
    disk.set_full(true);
    let file = disk.open(&path("file")).unwrap();
    file.write_at(&[2; 8], 0).unwrap();
    let full = |error: io::Error| error.kind() == io::ErrorKind::StorageFull;
    assert!(full(file.write_at(&[2; 8], 16 * SECTOR as u64).unwrap_err()));
    assert!(full(file.reserve(1 << 20).unwrap_err()));
    assert!(full(disk.create(&path("new")).unwrap_err()));
    disk.set_full(false);
    disk.create(&path("new")).unwrap();
}

#[test]
fn zeros_take_no_memory() {
    let disk = disk(1);
    let file = disk.create(&path("segment")).unwrap();
    file.reserve(1 << 20).unwrap();
    file.write_at(&vec![0; 1 << 20], 0).unwrap();
    file.write_at(&[1; 8], 5000).unwrap();
    assert!(disk.footprint() < 8192, "{}", disk.footprint());
    assert_eq!(file.size().unwrap(), 1 << 20);
}

#[test]
fn the_same_seed_loses_the_same() {
    let run = |seed| {
        let disk = with_ones(seed);
        disk.open(&path("file")).unwrap().write_at(&[2; 16 * SECTOR], 0).unwrap();
        disk.lose_power();
        disk.read_all(&path("file")).unwrap()
    };
    assert_eq!(run(3), run(3));
    assert_ne!(outcomes(20, run).len(), 1);
}

#[test]
fn a_directory_is_removed_with_what_is_in_it_or_some_of_it_is_left() {
    let left = outcomes(60, |seed| {
        let disk = with_ones(seed);
        disk.create_directory(&path("inside")).unwrap();
        disk.create(&path("inside/more")).unwrap();
        disk.sync_directory(&path("inside")).unwrap();
        disk.sync_directory(Path::new("/safekeeper")).unwrap();
        let before = disk.operations();
        disk.stop_after(seed % 5);
        let removed = disk.remove_all(Path::new("/safekeeper"));
        assert_eq!(removed.is_ok(), seed % 5 == 4, "{} operations", disk.operations() - before);
        disk.end_process();
        disk.list(Path::new("/")).unwrap().len()
            + disk.list(Path::new("/safekeeper")).unwrap_or_default().len()
            + disk.list(&path("inside")).unwrap_or_default().len()
    });
    // The file, the other, the directory that it was in, and the whole.
    assert_eq!(left, BTreeSet::from([0, 1, 2, 3, 4]));
}
