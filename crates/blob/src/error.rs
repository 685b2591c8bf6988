//! What can go wrong between us and the object store.

/// An object operation failed. `store` and `path` say where.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// The object is not there.
    #[error("object '{path}' does not exist in {store}")]
    NotFound {
        /// The object store.
        store: String,
        /// The object.
        path: String,
    },
    /// The store refused or could not be reached, after retries.
    #[error("{action} of object '{path}' in {store} failed: {cause}")]
    Failed {
        /// What was attempted.
        action: &'static str,
        /// The object store.
        store: String,
        /// The object or prefix.
        path: String,
        /// The innermost explanation.
        cause: String,
    },
    /// The store can't be used at all.
    #[error("object store {store} can't be used: {cause}")]
    Unusable {
        /// The object store.
        store: String,
        /// Why, and what to do.
        cause: String,
    },
}

impl BlobError {
    /// True if the object was simply not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, BlobError::NotFound { .. })
    }
}

/// What is said of an object that is longer than its reader can use.
pub(crate) fn too_large(size: u64, limit: u64) -> String {
    format!("it has {size} bytes, and can't have more than {limit}: it is not what it should be")
}

/// The messages of an error and its sources, in one line without repetition.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let message = cause.to_string();
        if !text.contains(&message) {
            text = format!("{text}: {message}");
        }
        source = cause.source();
    }
    text.replace('\n', " ")
}
