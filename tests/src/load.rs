//! Clients that commit rows without end, and remember which were acknowledged.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use postgres::{Client, NoTls};

/// What is known of one client's rows, which have numbers in sequence.
#[derive(Default)]
struct Progress {
    acknowledged: BTreeSet<i64>,
    /// Rows whose commit failed: they may be there or not.
    unknown: BTreeSet<i64>,
    errors: Vec<String>,
    /// Since when this client waits for an acknowledgement, reconnecting included.
    begun: Option<Instant>,
    longest: Duration,
}

/// Clients that write until this is finished.
pub struct Load {
    ended: Arc<AtomicBool>,
    clients: Vec<Arc<Mutex<Progress>>>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// Between a client's commits: they are to be many, not to take the processors from those that are watched.
const PAUSE: Duration = Duration::from_millis(10);

/// What a load needs in its database.
pub const SCHEMA: &str =
    "create table load (client int, number bigint, filler text, primary key (client, number))";

fn write(uri: &str, client: usize, ended: &AtomicBool, progress: &Mutex<Progress>) {
    let mut connection: Option<Client> = None;
    let mut number = 0i64;
    while !ended.load(Ordering::SeqCst) {
        progress.lock().unwrap().begun.get_or_insert_with(Instant::now);
        let done = match &mut connection {
            None => Client::connect(uri, NoTls).map(|made| connection = Some(made)),
            Some(connection) => {
                number += 1;
                let text = format!(
                    "insert into load values ({client}, {number}, repeat(md5('{number}'), 8))"
                );
                let done = connection.batch_execute(&text);
                let mut progress = progress.lock().unwrap();
                if done.is_ok() {
                    progress.acknowledged.insert(number);
                    let waited = progress.begun.take().map(|begun| begun.elapsed());
                    progress.longest = progress.longest.max(waited.unwrap_or_default());
                } else {
                    progress.unknown.insert(number);
                }
                done
            }
        };
        if let Err(error) = done {
            connection = None;
            progress.lock().unwrap().errors.push(format!("client {client}: {error:?}"));
        }
        std::thread::sleep(PAUSE);
    }
}

impl Load {
    /// Starts clients of this database, which has the [`SCHEMA`].
    pub fn start(uri: &str, clients: usize) -> Load {
        let ended = Arc::new(AtomicBool::new(false));
        let progress: Vec<_> = (0..clients).map(|_| Arc::default()).collect();
        let threads = progress.iter().cloned().enumerate().map(|(client, progress)| {
            let (uri, ended) = (uri.to_owned(), Arc::clone(&ended));
            std::thread::spawn(move || write(&uri, client, &ended, &progress))
        });
        let threads = threads.collect();
        Load { ended, clients: progress, threads }
    }

    /// How long anybody waited for an acknowledgement since this was called last, or still waits; and what failed.
    pub fn take(&self) -> (Duration, Vec<String>) {
        let mut longest = Duration::ZERO;
        let mut errors = Vec::new();
        for client in &self.clients {
            let mut progress = client.lock().unwrap();
            let waiting = progress.begun.map(|begun| begun.elapsed()).unwrap_or_default();
            longest = longest.max(std::mem::take(&mut progress.longest)).max(waiting);
            errors.append(&mut progress.errors);
        }
        (longest, errors)
    }

    fn acknowledged(&self) -> Vec<usize> {
        self.clients.iter().map(|client| client.lock().unwrap().acknowledged.len()).collect()
    }

    /// Waits until every client has had commits acknowledged that began after this call.
    pub fn wait_for_progress(&self, patience: Duration) {
        let before = self.acknowledged();
        let deadline = Instant::now() + patience;
        while !self.acknowledged().iter().zip(&before).all(|(now, before)| *now > before + 1) {
            assert!(Instant::now() < deadline, "commits do not go on within {patience:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the clients.
    pub fn stop(&mut self, patience: Duration) {
        self.ended.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + patience;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() {
                assert!(Instant::now() < deadline, "a client's commit hangs");
                std::thread::sleep(Duration::from_millis(5));
            }
            thread.join().unwrap();
        }
    }

    /// Checks that the rows are there that were acknowledged, once, and none that nobody wrote. Returns how many.
    pub fn check(&self, client: &mut Client) -> usize {
        let mut total = 0;
        for (number, progress) in self.clients.iter().enumerate() {
            let progress = progress.lock().unwrap();
            let query = format!("select number from load where client = {number}");
            let rows = client.query(&query, &[]).unwrap();
            let found: BTreeSet<i64> = rows.iter().map(|row| row.get(0)).collect();
            assert_eq!(rows.len(), found.len(), "a row of client {number} is there twice");
            let lost: Vec<_> = progress.acknowledged.difference(&found).collect();
            assert!(lost.is_empty(), "client {number}: acknowledged and gone: {lost:?}");
            let known: BTreeSet<i64> = &progress.acknowledged | &progress.unknown;
            let strange: Vec<_> = found.difference(&known).collect();
            assert!(strange.is_empty(), "client {number}: nobody wrote {strange:?}");
            total += progress.acknowledged.len();
        }
        assert!(total > 0, "nothing was written");
        total
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::SeqCst);
    }
}
