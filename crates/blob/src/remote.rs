//! Backends of the `object_store` crate: S3 and memory.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode, PutOptions,
    PutPayload, RetryConfig, UpdateVersion,
};

use crate::store::{CasOutcome, ObjectInfo, PutOutcome, Version};

/// What reading an object gave.
pub(crate) enum Got {
    Whole(Bytes, Version),
    /// It has so many bytes, more than was allowed, and was not read.
    Longer(u64),
}

#[derive(Debug)]
pub(crate) struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: String,
}

impl Remote {
    pub(crate) fn memory() -> Remote {
        Remote { store: Arc::new(InMemory::new()), prefix: String::new() }
    }

    /// Credentials and region come from the usual `AWS_*` variables.
    pub(crate) fn s3(
        bucket: &str,
        prefix: &str,
        endpoint: Option<&str>,
    ) -> Result<Remote, object_store::Error> {
        // For HTTPS; and the client panics without.
        pgstrata_identity::install_provider();
        // Long enough to ride out a restart of the store, short enough that a wrong endpoint is
        // reported while somebody is still watching. The crate's back-off has jitter.
        let retry = RetryConfig {
            backoff: BackoffConfig {
                init_backoff: Duration::from_millis(50),
                max_backoff: Duration::from_secs(5),
                base: 2.0,
            },
            max_retries: 8,
            retry_timeout: Duration::from_secs(30),
        };
        let client = ClientOptions::new()
            .with_connect_timeout(Duration::from_secs(3))
            .with_timeout(Duration::from_secs(60));
        let mut builder = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_client_options(client)
            .with_conditional_put(S3ConditionalPut::ETagMatch);
        if let Some(endpoint) = endpoint {
            builder = builder
                .with_endpoint(endpoint)
                .with_virtual_hosted_style_request(false)
                .with_allow_http(endpoint.starts_with("http://"));
        }
        Ok(Remote { store: Arc::new(builder.build()?), prefix: prefix.to_owned() })
    }

    fn path(&self, path: &str) -> Path {
        match self.prefix.is_empty() {
            true => Path::from(path),
            false => Path::from(format!("{}/{path}", self.prefix)),
        }
    }

    pub(crate) async fn get(&self, path: &str, limit: u64) -> Result<Got, Error> {
        let result = self.store.get(&self.path(path)).await?;
        // Known before the body is read.
        if result.meta.size > limit {
            return Ok(Got::Longer(result.meta.size));
        }
        let version =
            Version::Tag { e_tag: result.meta.e_tag.clone(), version: result.meta.version.clone() };
        Ok(Got::Whole(result.bytes().await?, version))
    }

    pub(crate) async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Bytes, Error> {
        self.store.get_range(&self.path(path), range).await
    }

    pub(crate) async fn put(&self, path: &str, bytes: Bytes) -> Result<(), Error> {
        self.store.put(&self.path(path), PutPayload::from_bytes(bytes)).await.map(drop)
    }

    pub(crate) async fn put_if_absent(
        &self,
        path: &str,
        bytes: Bytes,
    ) -> Result<PutOutcome, Error> {
        let options = PutOptions::from(PutMode::Create);
        let path = self.path(path);
        let payload = PutPayload::from_bytes(bytes);
        match self.store.put_opts(&path, payload, options).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(PutOutcome::Exists),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn compare_and_swap(
        &self,
        path: &str,
        expected: Option<&Version>,
        bytes: Bytes,
    ) -> Result<CasOutcome, Error> {
        let mode = match expected {
            None => PutMode::Create,
            Some(Version::Tag { e_tag, version }) => {
                PutMode::Update(UpdateVersion { e_tag: e_tag.clone(), version: version.clone() })
            }
            Some(Version::Content(_)) => return Ok(CasOutcome::Conflict),
        };
        let payload = PutPayload::from_bytes(bytes);
        let path = self.path(path);
        match self.store.put_opts(&path, payload, PutOptions::from(mode)).await {
            Ok(result) => Ok(CasOutcome::Swapped(Version::Tag {
                e_tag: result.e_tag,
                version: result.version,
            })),
            Err(
                Error::AlreadyExists { .. } | Error::Precondition { .. } | Error::NotFound { .. },
            ) => Ok(CasOutcome::Conflict),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn delete(&self, path: &str) -> Result<(), Error> {
        match self.store.delete(&self.path(path)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    pub(crate) async fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>, Error> {
        let full = self.path(prefix);
        let strip = if self.prefix.is_empty() { 0 } else { self.prefix.len() + 1 };
        let mut found: Vec<ObjectInfo> = self
            .store
            .list(Some(&full))
            .map_ok(|meta| ObjectInfo {
                path: meta.location.as_ref()[strip..].to_owned(),
                size: meta.size,
            })
            .try_collect()
            .await?;
        found.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(found)
    }
}
