//! The one interface over every backend.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::claim;
use crate::environment;
use crate::error::{BlobError, chain, too_large};
use crate::local::{Intent, LocalDirectory};
use crate::location::Location;
use crate::remote::{Got, Remote};

/// Longest object that [`Store::check`] reads back, in bytes; what it writes is shorter.
const PROBE_LIMIT: u64 = 1000;

/// Longest wait for a directory. A busy disk answers in seconds, a network file system whose server
/// starts anew in less than a minute; after that whoever waits should know, and tell.
const PATIENCE: Duration = Duration::from_secs(60);

/// Operations in a directory at once, at most. Those that hang hold a thread each until they end,
/// which may be never, and the runtime's threads are needed for more than this.
const LOCAL_AT_ONCE: usize = 64;

/// The same of those that write.
const WRITES_AT_ONCE: usize = 32;

/// What a put-if-absent did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is there now, and was not before.
    Created,
    /// An object of that name was there already; it was not changed.
    Exists,
}

/// What a compare-and-swap did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasOutcome {
    /// The object has the new content, and this version.
    Swapped(Version),
    /// The object was not the expected one; it was not changed.
    Conflict,
}

/// Which content of an object was seen; opaque to callers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Version {
    /// What the store answered with the object.
    Tag {
        /// Entity tag.
        e_tag: Option<String>,
        /// Version, in a store that keeps several.
        version: Option<String>,
    },
    /// The content itself, where comparing it is cheap.
    Content(Bytes),
}

/// One object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its path in the store.
    pub path: String,
    /// Bytes.
    pub size: u64,
}

#[derive(Debug)]
enum Backend {
    Local(LocalDirectory),
    Remote(Remote),
}

/// What becomes of an operation that an [`Interceptor`] was asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is performed.
    Perform,
    /// It fails, and nothing was done.
    Refuse,
    /// It is performed, and fails as if the answer had been lost.
    LoseAnswer,
}

/// Is asked before every operation: how tests make a store fail as real ones do.
pub trait Interceptor: std::fmt::Debug + Send + Sync {
    /// What becomes of this operation. `action` is `read`, `write`, `swap`, `delete` or `list`.
    fn verdict(&self, action: &'static str, path: &str) -> Verdict;

    /// Is waited for twice: before an operation is performed, and before its caller hears of it. It takes no time, unless a test
    /// says so.
    fn pause(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }
}

/// An object store. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    backend: Arc<Backend>,
    name: Arc<str>,
    interceptor: Option<Arc<dyn Interceptor>>,
    /// Turns of those that read a directory, each held until its operation has ended.
    turns: Arc<Semaphore>,
    /// The same for those that write: a disk may hang for these only, and is read meanwhile.
    writes: Arc<Semaphore>,
    /// Longest wait for a directory.
    patience: Duration,
    /// Token of the claim under which the store is written.
    pub(crate) claim: Option<Arc<str>>,
}

/// What an operation does in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Does {
    Reads,
    Lists,
    Writes,
}

/// Opens a directory, unless it does not answer.
fn open_directory(
    path: PathBuf,
    is_claimed: bool,
    patience: Duration,
) -> io::Result<LocalDirectory> {
    let (answer, opened) = mpsc::channel();
    std::thread::Builder::new().name("store".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = answer.send(match is_claimed {
            true => LocalDirectory::open_claimed(&path),
            false => LocalDirectory::open(&path),
        });
    })?;
    opened.recv_timeout(patience).unwrap_or_else(|_| Err(io::Error::other(silence(patience))))
}

/// What is said of a directory that does not answer.
fn silence(patience: Duration) -> String {
    format!("it has not answered for {} s", patience.as_secs_f64())
}

impl Store {
    /// Opens the store. A directory is created if missing; a bucket is not. Reaching S3 is not
    /// tried here: see [`Store::check`].
    pub fn open(location: &Location, s3_endpoint: Option<&str>) -> Result<Store, BlobError> {
        Store::open_under(location, s3_endpoint, None)
    }

    /// The same for one who writes it under this claim, if there is one: see [`Store::check_claim`]. A directory that has
    /// no claim is not made or written, now or later: it is in the place of a store that is away.
    pub fn open_under(
        location: &Location,
        s3_endpoint: Option<&str>,
        claim: Option<&str>,
    ) -> Result<Store, BlobError> {
        let name = location.to_string();
        let unusable = |cause| BlobError::Unusable { store: name.clone(), cause };
        let backend = match location {
            Location::Directory(path) => Backend::Local(
                open_directory(path.clone(), claim.is_some(), PATIENCE)
                    .map_err(|error| unusable(error.to_string()))?,
            ),
            Location::S3 { bucket, prefix } => {
                environment::check(s3_endpoint).map_err(unusable)?;
                let remote = Remote::s3(bucket, prefix, s3_endpoint);
                Backend::Remote(remote.map_err(|error| unusable(chain(&error)))?)
            }
            Location::Memory => Backend::Remote(Remote::memory()),
        };
        Ok(Store {
            backend: Arc::new(backend),
            name: name.into(),
            interceptor: None,
            turns: Arc::new(Semaphore::new(LOCAL_AT_ONCE)),
            writes: Arc::new(Semaphore::new(WRITES_AT_ONCE)),
            patience: PATIENCE,
            claim: claim.map(Arc::from),
        })
    }

    /// The same store, for one who writes it under this claim: see [`Store::check_claim`].
    pub fn under(&self, claim: Option<&str>) -> Store {
        Store { claim: claim.map(Arc::from), ..self.clone() }
    }

    /// The same store, with another longest wait for a directory: for tests.
    pub fn with_patience(&self, patience: Duration) -> Store {
        Store { patience, ..self.clone() }
    }

    /// The same store, with somebody who is asked before every operation. What is read through
    /// [`Store::local_path`] passes by.
    pub fn intercepted(&self, interceptor: Arc<dyn Interceptor>) -> Store {
        Store { interceptor: Some(interceptor), ..self.clone() }
    }

    async fn guarded<T>(
        &self,
        action: &'static str,
        path: &str,
        work: impl Future<Output = Result<T, BlobError>>,
    ) -> Result<T, BlobError> {
        let Some(asked) = &self.interceptor else { return work.await };
        asked.pause().await;
        let answer = match asked.verdict(action, path) {
            Verdict::Perform => work.await,
            Verdict::Refuse => Err(self.failed(action, path, "refused by an interceptor".into())),
            Verdict::LoseAnswer => work.await.and_then(|_| {
                Err(self.failed(action, path, "its answer was lost by an interceptor".into()))
            }),
        };
        asked.pause().await;
        answer
    }

    /// The location, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that holds an object, if the store is a directory on this machine. Only for reading.
    pub fn local_path(&self, path: &str) -> Option<PathBuf> {
        match &*self.backend {
            Backend::Local(directory) => Some(directory.file(path)),
            Backend::Remote(_) => None,
        }
    }

    /// Proves that the store can be reached, written, read and listed, and tells whether it
    /// enforces put-if-absent and compare-and-swap. A few S3 look-alikes accept the conditions and
    /// ignore them; with those, nothing stops two page servers from overwriting each other.
    pub async fn check(&self) -> Result<bool, BlobError> {
        let path = format!("probe/{:016x}", rand::random::<u64>());
        let unusable = |error: BlobError| match error {
            BlobError::Failed { cause, .. } => {
                let hint = match *self.backend {
                    Backend::Remote(_) if environment::without_credentials() => {
                        " (AWS_ACCESS_KEY_ID is not set)"
                    }
                    _ => "",
                };
                BlobError::Unusable { store: self.name.to_string(), cause: cause + hint }
            }
            BlobError::NotFound { .. } => BlobError::Unusable {
                store: self.name.to_string(),
                cause: "it does not exist (create the bucket first)".into(),
            },
            other => other,
        };
        let checked = self.check_conditions(&path).await;
        let deleted = self.delete(&path).await;
        let honoured = checked.map_err(unusable)?;
        deleted.map_err(unusable)?;
        Ok(honoured)
    }

    async fn check_conditions(&self, path: &str) -> Result<bool, BlobError> {
        let [one, two, three] = [&b"1"[..], b"2", b"3"].map(Bytes::from_static);
        self.put_if_absent(path, one.clone()).await?;
        let second = self.put_if_absent(path, two.clone()).await?;
        let (content, version) = self.get_versioned(path, PROBE_LIMIT).await?;
        if second != PutOutcome::Exists || content != one {
            return Ok(false);
        }
        let swapped = self.compare_and_swap(path, Some(&version), two.clone()).await?;
        let again = self.compare_and_swap(path, Some(&version), three).await?;
        let content = self.get(path, PROBE_LIMIT).await?;
        let swapped = matches!(swapped, CasOutcome::Swapped(_));
        Ok(swapped && again == CasOutcome::Conflict && content == two)
    }

    fn failed(&self, action: &'static str, path: &str, cause: String) -> BlobError {
        BlobError::Failed { action, store: self.name.to_string(), path: path.into(), cause }
    }

    fn remote_error(
        &self,
        action: &'static str,
        path: &str,
        error: object_store::Error,
    ) -> BlobError {
        match error {
            object_store::Error::NotFound { .. } => {
                BlobError::NotFound { store: self.name.to_string(), path: path.into() }
            }
            error => self.failed(action, path, chain(&error)),
        }
    }

    /// Runs a blocking file operation off the asynchronous threads.
    async fn local<T: Send + 'static>(
        &self,
        action: &'static str,
        path: &str,
        work: impl FnOnce(&LocalDirectory, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, BlobError> {
        let work = |local: &LocalDirectory, path: &str, _: &Intent| work(local, path);
        self.local_counted(Does::Reads, action, path, work).await
    }

    /// The same for what changes the store.
    async fn local_write<T: Send + 'static>(
        &self,
        action: &'static str,
        path: &str,
        work: impl FnOnce(&LocalDirectory, &str, &Intent) -> io::Result<T> + Send + 'static,
    ) -> Result<T, BlobError> {
        self.local_counted(Does::Writes, action, path, work).await
    }

    /// The same. It is waited for as long as it goes on counting what it has done.
    ///
    /// A write that is not waited for any more is given up: it does not appear later, when its caller has gone on
    /// without it. Only one that hangs in the very step by which it appears may be there afterwards, as with an answer
    /// that was lost.
    async fn local_counted<T: Send + 'static>(
        &self,
        does: Does,
        action: &'static str,
        path: &str,
        work: impl FnOnce(&LocalDirectory, &str, &Intent) -> io::Result<T> + Send + 'static,
    ) -> Result<T, BlobError> {
        let backend = Arc::clone(&self.backend);
        let turns = match does {
            Does::Writes => Arc::clone(&self.writes),
            Does::Reads | Does::Lists => Arc::clone(&self.turns),
        };
        // The claim is looked for, and written, where there is none.
        let is_marked = path != claim::OBJECT;
        let is_claimed = self.claim.is_some();
        let owned = path.to_owned();
        let going = Arc::new(Intent::default());
        let theirs = Arc::clone(&going);
        let mut answer = Box::pin(async move {
            let turn = turns.acquire_owned().await.map_err(io::Error::other)?;
            let task = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                match &*backend {
                    Backend::Local(local) => {
                        let check = || match is_marked {
                            true => local.check_there(is_claimed),
                            false => Ok(()),
                        };
                        if does == Does::Writes {
                            check()?;
                        }
                        let answer = work(local, &owned, &theirs);
                        // What is not in another directory may be in the store.
                        let is_missing = answer
                            .as_ref()
                            .is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
                        if is_missing || does == Does::Lists {
                            check()?;
                        }
                        answer
                    }
                    Backend::Remote(_) => Err(io::Error::other("not a local store")),
                }
            });
            task.await.map_err(io::Error::other)?
        });
        let mut last = false;
        let answered = loop {
            let before = going.steps();
            match tokio::time::timeout(self.patience, &mut answer).await {
                Ok(answered) => break answered,
                Err(_) if going.steps() != before => {}
                Err(_) if going.give_up() || last => {
                    return Err(self.failed(action, path, silence(self.patience)));
                }
                // It is about to appear: the one thing that is better waited for.
                Err(_) => last = true,
            }
        };
        answered.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                BlobError::NotFound { store: self.name.to_string(), path: path.into() }
            }
            _ => self.failed(action, path, error.to_string()),
        })
    }

    /// The whole object. One of more than `limit` bytes is an error, and is not read.
    pub async fn get(&self, path: &str, limit: u64) -> Result<Bytes, BlobError> {
        self.get_versioned(path, limit).await.map(|(bytes, _)| bytes)
    }

    /// The whole object and which version it is, for [`Store::compare_and_swap`]. One of more than `limit` bytes is an
    /// error, and is not read.
    pub async fn get_versioned(
        &self,
        path: &str,
        limit: u64,
    ) -> Result<(Bytes, Version), BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    let get = move |local: &LocalDirectory, path: &str| local.get(path, limit);
                    let bytes = self.local("read", path, get).await?;
                    Ok((bytes.clone(), Version::Content(bytes)))
                }
                Backend::Remote(remote) => match remote.get(path, limit).await {
                    Ok(Got::Whole(bytes, version)) => Ok((bytes, version)),
                    Ok(Got::Longer(size)) => Err(BlobError::Failed {
                        action: "read",
                        store: self.name.to_string(),
                        path: path.to_owned(),
                        cause: too_large(size, limit),
                    }),
                    Err(error) => Err(self.remote_error("read", path, error)),
                },
            }
        };
        self.guarded("read", path, work).await
    }

    /// Bytes `range` of the object; shorter if the object ends before.
    pub async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    self.local("read", path, move |local, path| local.get_range(path, range)).await
                }
                Backend::Remote(remote) => remote
                    .get_range(path, range)
                    .await
                    .map_err(|error| self.remote_error("read", path, error)),
            }
        };
        self.guarded("read", path, work).await
    }

    /// Writes the object, replacing any of that name.
    pub async fn put(&self, path: &str, bytes: Bytes) -> Result<(), BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    self.local_write("write", path, move |local, path, intent| {
                        local.put(path, &bytes, intent)
                    })
                    .await
                }
                Backend::Remote(remote) => remote
                    .put(path, bytes)
                    .await
                    .map_err(|error| self.remote_error("write", path, error)),
            }
        };
        self.guarded("write", path, work).await
    }

    /// Writes the object unless one of that name is there. After a lost answer and a retry,
    /// `Exists` may mean our own earlier attempt: callers whose content identifies them should
    /// read it back.
    pub async fn put_if_absent(&self, path: &str, bytes: Bytes) -> Result<PutOutcome, BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    self.local_write("write", path, move |local, path, intent| {
                        local.put_if_absent(path, &bytes, intent)
                    })
                    .await
                }
                Backend::Remote(remote) => remote
                    .put_if_absent(path, bytes)
                    .await
                    .map_err(|error| self.remote_error("write", path, error)),
            }
        };
        self.guarded("write", path, work).await
    }

    /// Replaces the object if it is still the `expected` one (`None`: if it is absent).
    ///
    /// A conflict is reported only after reading the object back: if it holds exactly `bytes`,
    /// an earlier attempt of ours got through although its answer was lost, and that is success.
    /// Contents must therefore be unique to their writer.
    pub async fn compare_and_swap(
        &self,
        path: &str,
        expected: Option<&Version>,
        bytes: Bytes,
    ) -> Result<CasOutcome, BlobError> {
        let work = async {
            let remote = match &*self.backend {
                Backend::Local(_) => {
                    let expected = expected.cloned();
                    return self
                        .local_write("swap", path, move |local, path, intent| {
                            local.compare_and_swap(path, expected.as_ref(), &bytes, intent)
                        })
                        .await;
                }
                Backend::Remote(remote) => remote,
            };
            let outcome = remote
                .compare_and_swap(path, expected, bytes.clone())
                .await
                .map_err(|error| self.remote_error("swap", path, error))?;
            if outcome == CasOutcome::Conflict {
                match remote.get(path, bytes.len() as u64).await {
                    Ok(Got::Whole(current, version)) if current == bytes => {
                        return Ok(CasOutcome::Swapped(version));
                    }
                    Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                    Err(error) => return Err(self.remote_error("read", path, error)),
                }
            }
            Ok(outcome)
        };
        self.guarded("swap", path, work).await
    }

    /// Deletes the object; success if it was not there.
    pub async fn delete(&self, path: &str) -> Result<(), BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    self.local_write("delete", path, |local, path, intent| {
                        local.delete(path, intent)
                    })
                    .await
                }
                Backend::Remote(remote) => remote
                    .delete(path)
                    .await
                    .map_err(|error| self.remote_error("delete", path, error)),
            }
        };
        self.guarded("delete", path, work).await
    }

    /// Every object below `prefix`, a path of whole components, sorted by path.
    pub async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, BlobError> {
        let work = async {
            match &*self.backend {
                Backend::Local(_) => {
                    let list = |local: &LocalDirectory, prefix: &str, intent: &Intent| {
                        local.list(prefix, intent)
                    };
                    self.local_counted(Does::Lists, "list", prefix, list).await
                }
                Backend::Remote(remote) => remote
                    .list(prefix)
                    .await
                    .map_err(|error| self.remote_error("list", prefix, error)),
            }
        };
        self.guarded("list", prefix, work).await
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A failed helper fails the test.
mod tests {
    use rustix::fs::{FlockOperation, flock};

    use super::*;

    /// A store in a directory, and what keeps it from answering a swap while it is held.
    fn hanging(directory: &std::path::Path) -> (Store, std::fs::File) {
        let store = Store::open(&Location::Directory(directory.to_owned()), None).unwrap();
        let store = store.with_patience(Duration::from_secs(1));
        let lock = std::fs::File::open(directory.join(".lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        (store, lock)
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn h2_a_directory_that_does_not_answer_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let (store, lock) = hanging(directory.path());
        let first = Bytes::from_static(b"first");
        let error = store.compare_and_swap("index", None, first).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains("'index'") && text.contains("not answered for 1 s"), "{text}");
        // What needs no lock is answered.
        assert!(store.get("index", 10).await.unwrap_err().is_not_found());

        // Its caller was told that it failed, and goes on without it: it is not done later either.
        drop(lock);
        let patient = store.with_patience(PATIENCE);
        let all = WRITES_AT_ONCE as u32;
        drop(Arc::clone(&store.writes).acquire_many_owned(all).await.unwrap());
        assert!(patient.get("index", 10).await.unwrap_err().is_not_found());
        let second = Bytes::from_static(b"second");
        let swapped = patient.compare_and_swap("index", None, second).await.unwrap();
        assert!(matches!(swapped, CasOutcome::Swapped(_)));
        assert_eq!(patient.list("").await.unwrap().len(), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn h2_what_hangs_in_a_directory_takes_a_bounded_number_of_threads() {
        let directory = tempfile::tempdir().unwrap();
        let (store, lock) = hanging(directory.path());
        let hang = |n: usize| {
            let store = store.clone();
            let path = format!("index-{n}");
            tokio::spawn(async move { store.compare_and_swap(&path, None, Bytes::new()).await })
        };
        let all: Vec<_> = (0..2 * WRITES_AT_ONCE).map(hang).collect();
        for one in all {
            assert!(one.await.unwrap().unwrap_err().to_string().contains("not answered"));
        }
        let others = Arc::clone(&store.writes);
        assert_eq!(others.available_permits(), 0);
        let one_more = store.put("x", Bytes::new()).await.unwrap_err();
        assert!(one_more.to_string().contains("not answered"), "{one_more}");
        // Who only reads goes on.
        assert!(store.get("x", 1).await.unwrap_err().is_not_found());
        // None is done later.
        drop(lock);
        let patient = store.with_patience(PATIENCE);
        drop(others.acquire_many(WRITES_AT_ONCE as u32).await.unwrap());
        assert_eq!(patient.list("").await.unwrap(), []);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_goes_on_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _lock) = hanging(directory.path());
        let store = store.with_patience(Duration::from_millis(300));
        let slow = |_: &LocalDirectory, _: &str, going: &Intent| {
            for _ in 0..20 {
                std::thread::sleep(Duration::from_millis(30));
                going.advance();
            }
            Ok(7)
        };
        assert_eq!(store.local_counted(Does::Lists, "list", "", slow).await.unwrap(), 7);
    }
}
