//! Names that are looked up, by who may wait for it and no longer than that.
//!
//! The system's look-up waits as long as its name servers are silent: 5 s for each, often more, and can't be ended. So it runs
//! on a thread of its own, one at a time for each name, and what it finds late is there for who asks next. A service may
//! move, so nothing old is taken while name servers answer as they do: what was found up to a minute ago serves only where a
//! new look-up fails, or says nothing for 200 ms.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, LazyLock};
use std::thread::Builder;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Names that are remembered, and threads that look up, at most; more by those whose names are just being asked for by
/// several threads at once, where all places change hands.
const MAX_NAMES: usize = 256;

/// How old an answer may be that is taken without asking again: requests come in pairs.
const FRESH: Duration = Duration::from_secs(1);

/// How long a look-up may be silent before an old answer serves.
const PATIENCE: Duration = Duration::from_millis(200);

/// How old an answer may be that serves.
const KEPT: Duration = Duration::from_secs(60);

static SYSTEM: LazyLock<Names> =
    LazyLock::new(|| Names::new(MAX_NAMES, PATIENCE, |name| Ok(name.to_socket_addrs()?.collect())));

/// The addresses of `HOST:PORT`, of which there is at least one, as the system knows them: see the module. An error if they
/// aren't known by `deadline`.
pub fn look_up(name: &str, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
    SYSTEM.look_up(name, deadline)
}

type Ask = dyn Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync;

/// What was found, and what finds it.
pub struct Names {
    ask: Arc<Ask>,
    most: usize,
    patience: Duration,
    known: Mutex<HashMap<String, Arc<Name>>>,
}

#[derive(Default)]
struct Name {
    state: Mutex<State>,
    changed: Condvar,
}

/// Changed by the thread that looks up, and by who starts it.
#[derive(Default)]
struct State {
    is_asked: bool,
    found: Option<(Vec<SocketAddr>, Instant)>,
    /// Why the last look-up found nothing, if it did not.
    failure: Option<String>,
    used: Option<Instant>,
}

impl State {
    fn within(&self, age: Duration) -> Option<Vec<SocketAddr>> {
        let (found, at) = self.found.as_ref()?;
        (at.elapsed() < age).then(|| found.clone())
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Names").field("most", &self.most).finish_non_exhaustive()
    }
}

impl Names {
    /// Remembers `most` names, found by `ask`, which may be silent for `patience` before an old answer serves.
    pub fn new(
        most: usize,
        patience: Duration,
        ask: impl Fn(&str) -> io::Result<Vec<SocketAddr>> + Send + Sync + 'static,
    ) -> Names {
        Names { ask: Arc::new(ask), most, patience, known: Mutex::default() }
    }

    /// See [`look_up`].
    pub fn look_up(&self, name: &str, deadline: Instant) -> io::Result<Vec<SocketAddr>> {
        // An address is no name: nothing is asked.
        if let Ok(address) = name.parse() {
            return Ok(vec![address]);
        }
        let failed = |kind, why: &str| io::Error::new(kind, format!("looking up {name}: {why}"));
        let Some(known) = self.name(name) else {
            let why = format!("{} other names are being looked up", self.most);
            return Err(failed(io::ErrorKind::WouldBlock, &why));
        };
        let since = Instant::now();
        let mut state = known.state.lock();
        state.used = Some(since);
        if let Some(found) = state.within(FRESH) {
            return Ok(found);
        }
        if !state.is_asked {
            match self.ask(name, &known) {
                Ok(()) => state.is_asked = true,
                Err(error) => state.failure = Some(format!("no thread for it: {error}")),
            }
        }
        let patience = deadline.min(since + self.patience);
        while state.is_asked && Instant::now() < patience {
            known.changed.wait_until(&mut state, patience);
        }
        // An answer that came just now is one of these.
        if let Some(found) = state.within(KEPT) {
            return Ok(found);
        }
        while state.is_asked && Instant::now() < deadline {
            known.changed.wait_until(&mut state, deadline);
        }
        match (state.within(KEPT), state.is_asked, &state.failure) {
            (Some(found), ..) => Ok(found),
            (None, true, _) => {
                Err(failed(io::ErrorKind::TimedOut, "no name server answered in time"))
            }
            (None, false, failure) => {
                let why = failure.as_deref().unwrap_or("it has no address");
                Err(failed(io::ErrorKind::NotFound, why))
            }
        }
    }

    /// The place of a name; for a new one, where there are too many, instead of the one that was longest not asked for. None
    /// where all are being looked up.
    fn name(&self, name: &str) -> Option<Arc<Name>> {
        let mut known = self.known.lock();
        if let Some(name) = known.get(name) {
            return Some(name.clone());
        }
        if known.len() >= self.most {
            let idle = known.iter().filter_map(|(name, known)| {
                let state = known.state.lock();
                (!state.is_asked).then(|| (state.used, name.clone()))
            });
            let (_, oldest) = idle.min()?;
            known.remove(&oldest);
        }
        Some(known.entry(name.to_owned()).or_default().clone())
    }

    fn ask(&self, name: &str, known: &Arc<Name>) -> io::Result<()> {
        let (ask, name, known) = (self.ask.clone(), name.to_owned(), known.clone());
        let look_up = move || {
            let answer = ask(&name);
            let mut state = known.state.lock();
            state.is_asked = false;
            state.failure = None;
            match answer {
                Ok(found) if !found.is_empty() => state.found = Some((found, Instant::now())),
                Ok(_) => {}
                Err(error) => state.failure = Some(error.to_string()),
            }
            known.changed.notify_all();
        };
        Builder::new().name("look up".into()).spawn(look_up).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const NAME: &str = "broker:1";
    const SHORT: Duration = Duration::from_millis(20);

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 1))
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    /// Names whose look-ups end when the test says with what; and how many began.
    fn told(patience: Duration) -> (Names, Sender<io::Result<Vec<SocketAddr>>>, Arc<AtomicUsize>) {
        let (say, said): (_, Receiver<io::Result<Vec<SocketAddr>>>) = channel();
        let (said, begun) = (Mutex::new(said), Arc::new(AtomicUsize::new(0)));
        let count = begun.clone();
        let names = Names::new(2, patience, move |_| {
            count.fetch_add(1, Ordering::SeqCst);
            said.lock().recv().unwrap_or_else(|_| Err(io::Error::other("the test is over")))
        });
        (names, say, begun)
    }

    /// As if it had been found that long ago.
    fn age(names: &Names, by: Duration) {
        for name in names.known.lock().values() {
            if let Some((_, at)) = &mut name.state.lock().found {
                *at -= by;
            }
        }
    }

    #[test]
    fn an_address_is_not_looked_up() {
        let (names, _, begun) = told(SHORT);
        let found =
            ["10.0.0.1:1", "[::1]:1"].map(|name| names.look_up(name, Instant::now()).unwrap());
        assert_eq!(found, [vec![at(1)], vec!["[::1]:1".parse().unwrap()]]);
        assert_eq!(begun.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_is_found_late_is_there_for_who_asks_next() {
        let (names, say, begun) = told(SHORT);
        for _ in 0..3 {
            let begun = Instant::now();
            let error = names.look_up(NAME, begun + Duration::from_millis(20)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(begun.elapsed() < Duration::from_secs(5), "who asks waits no longer than told");
        }
        say.send(Ok(vec![at(1)])).unwrap();
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(1)]);
        assert_eq!(begun.load(Ordering::SeqCst), 1, "one look-up at a time");
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(1)]);
        assert_eq!(begun.load(Ordering::SeqCst), 1, "a second request soon after the first");
    }

    #[test]
    fn a_name_that_moved_is_found_where_it_is() {
        let (names, say, _) = told(Duration::from_secs(20));
        say.send(Ok(vec![at(1)])).unwrap();
        names.look_up(NAME, soon()).unwrap();
        age(&names, FRESH);
        say.send(Ok(vec![at(2)])).unwrap();
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(2)]);
    }

    #[test]
    fn an_old_answer_serves_while_name_servers_are_silent_or_refuse() {
        let (names, say, begun) = told(SHORT);
        say.send(Ok(vec![at(1)])).unwrap();
        names.look_up(NAME, soon()).unwrap();
        age(&names, FRESH);
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(1)], "silent");
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(1)], "silent still");
        let refuse = |why: &'static str| say.send(Err(io::Error::other(why))).unwrap();
        refuse("try again");
        while names.known.lock()[NAME].state.lock().is_asked {
            std::thread::yield_now();
        }
        refuse("try again");
        assert_eq!(names.look_up(NAME, soon()).unwrap(), [at(1)], "refused");
        assert_eq!(begun.load(Ordering::SeqCst), 3);
        age(&names, KEPT);
        refuse("no such name");
        let error = names.look_up(NAME, soon()).unwrap_err().to_string();
        assert_eq!(error, "looking up broker:1: no such name");
        say.send(Ok(vec![])).unwrap();
        let error = names.look_up(NAME, soon()).unwrap_err().to_string();
        assert_eq!(error, "looking up broker:1: it has no address");
    }

    #[test]
    fn names_are_forgotten_where_there_are_more_than_places() {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (say, said) = channel::<()>();
        let said = Mutex::new(said);
        let names = Names::new(2, SHORT, move |name| {
            if name.starts_with("silent") {
                let _ = said.lock().recv();
            }
            Ok(vec![at(1 + NEXT.fetch_add(1, Ordering::SeqCst) as u8)])
        });
        for name in ["a:1", "b:1", "c:1", "d:1"] {
            names.look_up(name, soon()).unwrap();
            assert!(names.known.lock().len() <= 2);
        }
        // Those that are being looked up keep their places, and their threads are as many.
        let wait = Duration::from_millis(10);
        let kinds = ["silent-1:1", "silent-2:1", "e:1"]
            .map(|name| names.look_up(name, Instant::now() + wait).unwrap_err().kind());
        let (late, full) = (io::ErrorKind::TimedOut, io::ErrorKind::WouldBlock);
        assert_eq!(kinds, [late, late, full]);
        drop(say);
        names.look_up("silent-1:1", soon()).unwrap();
        names.look_up("silent-2:1", soon()).unwrap();
        names.look_up("e:1", soon()).unwrap();
    }
}
