//! Looking again at what others may have changed meanwhile, until it is as it should be, or a deadline has passed.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::TELL_EVERY;

/// So long it is looked again, after the first look.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a look has shown.
pub enum Looked<T> {
    /// It is as it should be.
    Done(T),
    /// It is not yet: what is still to come, for people.
    NotYet(String),
}

/// Looks until it is done, with a pause between two looks, and says every few seconds what is still to come.
pub fn until_done<T>(
    clock: impl Fn() -> Instant,
    pause: Duration,
    mut look: impl FnMut() -> Result<Looked<T>>,
) -> Result<T> {
    let mut began = None;
    let mut told = clock();
    loop {
        let what = match look()? {
            Looked::Done(done) => return Ok(done),
            Looked::NotYet(what) => what,
        };
        let now = clock();
        let since = *began.get_or_insert(now);
        ensure!(
            now.saturating_duration_since(since) < PATIENCE,
            "{what}, and it has been so for {} s: the same command goes on",
            PATIENCE.as_secs()
        );
        if now.saturating_duration_since(told) > TELL_EVERY {
            told = now;
            eprintln!("pgstrata: {what}");
        }
        std::thread::sleep(pause);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Looks with a clock that goes on by so much with each look, and returns how many looks there were.
    fn looked(each: Duration, done_after: u32) -> (Result<()>, u32) {
        let (start, looks) = (Instant::now(), Cell::new(0));
        let clock = || start + each * looks.get();
        let done = until_done(clock, Duration::ZERO, || {
            looks.set(looks.get() + 1);
            Ok(match looks.get() > done_after {
                true => Looked::Done(()),
                false => Looked::NotYet("some are missing".to_owned()),
            })
        });
        (done, looks.get())
    }

    #[test]
    fn it_is_looked_for_as_long_as_there_is_time_however_often() {
        let (done, looks) = looked(Duration::from_millis(200), 500);
        assert!(done.is_ok());
        assert_eq!(looks, 501);
        // A first look that takes as long as copying does costs none of the time.
        assert!(looked(PATIENCE - Duration::from_secs(1), 1).0.is_ok());
    }

    #[test]
    fn what_is_never_done_ends_at_a_deadline_and_says_what_it_was() {
        let (done, looks) = looked(Duration::from_secs(1), u32::MAX);
        let error = done.unwrap_err().to_string();
        let expected = "some are missing, and it has been so for 120 s: the same command goes on";
        assert_eq!(error, expected);
        assert_eq!(looks, 121);
    }
}
