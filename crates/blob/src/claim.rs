//! Whose a store is. One object says which cluster directory may write it; whoever writes checks that it is still so.

use bytes::Bytes;
use pgstrata_format::claim::LIMIT;
pub use pgstrata_format::claim::{Claim, Place, Refusal};

use crate::{BlobError, CasOutcome, Store, Version};

/// The object.
pub(crate) const OBJECT: &str = "claim";

/// Why a store is not to be written.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody else may.
    #[error(
        "object store {store} belongs to the cluster in {} on host '{}', which was started {} and \
         is the only one that may write it",
        .claim.place.path, .claim.place.host, .claim.since
    )]
    Held {
        /// The store.
        store: String,
        /// Whose it is.
        claim: Box<Claim>,
        /// Why it is not ours.
        refusal: Refusal,
    },
    /// It is nobody's, and was somebody's: most likely another directory is in its place.
    #[error(
        "object store {0} is away, or has lost the object '{OBJECT}', which says whose it is: put the directory back, or \
         mount it, and everything goes on by itself. Only where all the rest is there, and this is the only cluster that \
         writes it, 'pgstrata down' and 'pgstrata up --take-over' write that object again"
    )]
    Gone(String),
    /// It can't be told.
    #[error(
        "object '{OBJECT}' in {store}, which says whose the store is, can't be read: {cause}. Where \
         it is certain that no other cluster writes this store, remove that object"
    )]
    Unreadable {
        /// The store.
        store: String,
        /// What is wrong with it.
        cause: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] BlobError),
}

/// The claim as it was found.
pub struct Found {
    store: Store,
    claim: Option<(Claim, Version)>,
}

impl Found {
    /// Reads the claim.
    pub async fn read(store: &Store) -> Result<Found, ClaimError> {
        let (bytes, version) = match store.get_versioned(OBJECT, LIMIT).await {
            Ok(found) => found,
            Err(error) if error.is_not_found() => {
                return Ok(Found { store: store.clone(), claim: None });
            }
            Err(error) => return Err(error.into()),
        };
        match Claim::decode(&bytes) {
            Ok(claim) => Ok(Found { store: store.clone(), claim: Some((claim, version)) }),
            Err(error) => Err(ClaimError::Unreadable {
                store: store.name().to_owned(),
                cause: error.to_string(),
            }),
        }
    }

    /// The claim, if there is one.
    pub fn claim(&self) -> Option<&Claim> {
        self.claim.as_ref().map(|(claim, _)| claim)
    }

    /// Says whose the store is.
    pub fn refuse(&self, refusal: Refusal) -> ClaimError {
        match &self.claim {
            Some((claim, _)) => held(&self.store, claim, refusal),
            None => ClaimError::Gone(self.store.name().to_owned()),
        }
    }

    /// Replaces it by `claim`, if it is still what was found. False if it is not.
    pub async fn replace(self, claim: &Claim) -> Result<bool, ClaimError> {
        let version = self.claim.as_ref().map(|(_, version)| version);
        let bytes = Bytes::from(claim.encode());
        let swapped = self.store.compare_and_swap(OBJECT, version, bytes).await?;
        Ok(matches!(swapped, CasOutcome::Swapped(_)))
    }
}

fn held(store: &Store, claim: &Claim, refusal: Refusal) -> ClaimError {
    let claim = Box::new(claim.clone());
    ClaimError::Held { store: store.name().to_owned(), claim, refusal }
}

impl Store {
    /// Whether the store is still that of whoever started us, if we were told of a claim.
    pub async fn check_claim(&self) -> Result<(), ClaimError> {
        let Some(token) = &self.claim else { return Ok(()) };
        match Found::read(self).await?.claim {
            Some((claim, _)) if claim.token == **token => Ok(()),
            Some((claim, _)) => Err(held(self, &claim, Refusal::Another)),
            None => Err(ClaimError::Gone(self.name().to_owned())),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // A failed helper fails the test.
mod tests {
    use super::*;
    use crate::Location;

    fn claim(token: &str) -> Claim {
        let place = Place {
            machine: "m".into(),
            host: "h".into(),
            path: format!("/{token}"),
            device: 1,
            inode: 2,
        };
        let since = "2026-01-01T00:00:00Z".into();
        Claim { token: token.into(), place, since, store_inode: None }
    }

    async fn check(store: &Store, token: &str) -> Result<(), ClaimError> {
        store.under(Some(token)).check_claim().await
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_two_that_take_a_store_at_once_one_gets_it() {
        let directory = tempfile::tempdir().unwrap();
        for location in [Location::Memory, Location::Directory(directory.path().to_owned())] {
            let store = Store::open(&location, None).unwrap();
            assert!(matches!(check(&store, "a").await, Err(ClaimError::Gone(_))));
            let [first, second] = [Found::read(&store).await, Found::read(&store).await];
            assert!(first.unwrap().replace(&claim("a")).await.unwrap());
            assert!(!second.unwrap().replace(&claim("b")).await.unwrap());
            check(&store, "a").await.unwrap();
            let error = check(&store, "b").await.unwrap_err();
            assert!(error.to_string().contains("/a on host 'h'"), "{error}");

            // And so if it was somebody's before.
            let [first, second] = [Found::read(&store).await, Found::read(&store).await];
            assert!(first.unwrap().replace(&claim("c")).await.unwrap());
            assert!(!second.unwrap().replace(&claim("d")).await.unwrap());
            check(&store, "c").await.unwrap();
            assert!(matches!(check(&store, "a").await, Err(ClaimError::Held { .. })));
        }
    }

    /// Another directory is in its place, with all that makes a store but for what is in it.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_directory_that_has_lost_its_claim_is_neither_written_nor_believed() {
        let directory = tempfile::tempdir().unwrap();
        let (root, aside) = (directory.path().join("store"), directory.path().join("aside"));
        let location = Location::Directory(root.clone());
        let first = Store::open(&location, None).unwrap();
        assert!(Found::read(&first).await.unwrap().replace(&claim("a")).await.unwrap());
        for token in [Some("a"), None] {
            let store = Store::open_under(&location, None, token).unwrap();
            store.put("t/object", Bytes::from_static(b"one")).await.unwrap();
            let (_, version) = store.get_versioned("t/object", 10).await.unwrap();
            std::fs::rename(&root, &aside).unwrap();
            std::fs::create_dir(&root).unwrap();
            if token.is_some() {
                std::fs::write(root.join(".lock"), "").unwrap();
            }
            let two = || Bytes::from_static(b"two");
            let errors = [
                store.put("t/object", two()).await.unwrap_err(),
                store.put_if_absent("t/object", two()).await.unwrap_err(),
                store.compare_and_swap("t/object", Some(&version), two()).await.unwrap_err(),
                store.compare_and_swap("t/other", None, two()).await.unwrap_err(),
                store.delete("t/object").await.unwrap_err(),
                store.get("t/object", 10).await.unwrap_err(),
                store.get_range("t/object", 0..1).await.unwrap_err(),
                store.list("t").await.unwrap_err(),
            ];
            for error in errors {
                let is_said = error.to_string().contains("the store is away");
                assert!(is_said && !error.is_not_found(), "{error}");
            }
            let left = std::fs::read_dir(&root).unwrap().count();
            assert_eq!(left, usize::from(token.is_some()));
            if token.is_some() {
                assert!(matches!(store.check_claim().await, Err(ClaimError::Gone(_))));
            }
            std::fs::remove_dir_all(&root).unwrap();
            std::fs::rename(&aside, &root).unwrap();
            let swapped = store.compare_and_swap("t/object", Some(&version), two()).await.unwrap();
            assert!(matches!(swapped, CasOutcome::Swapped(_)));
            assert!(store.get("t/none", 10).await.unwrap_err().is_not_found());
        }
    }

    #[tokio::test]
    async fn a_claim_that_can_not_be_read_is_nobodys_to_take() {
        let store = Store::open(&Location::Memory, None).unwrap();
        for rubbish in [&b"rubbish"[..], b"", &[b'x'; LIMIT as usize + 1]] {
            store.put(OBJECT, Bytes::from(rubbish)).await.unwrap();
            let error = Found::read(&store).await.err().unwrap().to_string();
            assert!(error.contains("'claim'"), "{error}");
            assert!(check(&store, "a").await.is_err());
        }
    }
}
