//! An S3 server of another make than moto: s3s-fs, in this process. It honours conditions on writes,
//! and can be made to ignore them, as some servers do.

use hyper_util::rt::TokioIo;
use std::path::Path;

use s3s::access::S3Access;
use s3s::auth::SimpleAuth;
use s3s::dto::PutObjectInput;
use s3s::service::S3ServiceBuilder;
use s3s::{S3Request, S3Result};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::S3_ENVIRONMENT;

/// A condition of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// `If-None-Match`
    Absent,
    /// `If-Match`
    Unchanged,
}

/// Forgets a condition once the request was found to be signed as it came.
struct Ignoring(Option<Condition>);

#[async_trait::async_trait]
impl S3Access for Ignoring {
    async fn put_object(&self, request: &mut S3Request<PutObjectInput>) -> S3Result<()> {
        match self.0 {
            Some(Condition::Absent) => request.input.if_none_match = None,
            Some(Condition::Unchanged) => request.input.if_match = None,
            None => {}
        }
        Ok(())
    }
}

/// Serves the directories of one as buckets, to whoever has this key and its secret, until the listener ends.
pub async fn serve(
    listener: TcpListener,
    directory: &Path,
    (key, secret): (&str, &str),
    ignored: Option<Condition>,
) {
    let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory).unwrap());
    builder.set_auth(SimpleAuth::from_single(key, secret));
    builder.set_access(Ignoring(ignored));
    let service = builder.build();
    while let Ok((stream, _)) = listener.accept().await {
        let http = hyper::server::conn::http1::Builder::new();
        let connection = http.serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(async move { drop(connection.await) });
    }
}

/// The server; it ends when this is dropped.
pub struct OtherS3 {
    /// Its URL.
    pub endpoint: String,
    _runtime: Runtime,
    directory: TempDir,
}

impl OtherS3 {
    /// Starts one, with the credentials of [`S3_ENVIRONMENT`], that ignores this condition.
    pub fn start(ignored: Option<Condition>) -> OtherS3 {
        let directory = TempDir::with_prefix("pgstrata-s3-").unwrap();
        let [(_, key), (_, secret), _] = S3_ENVIRONMENT;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let path = directory.path().to_owned();
        runtime.spawn(async move { serve(listener, &path, (key, secret), ignored).await });
        OtherS3 { endpoint, _runtime: runtime, directory }
    }

    /// Makes a bucket, unless it is there.
    pub fn make_bucket(&self, name: &str) {
        std::fs::create_dir_all(self.directory.path().join(name)).unwrap();
    }
}
