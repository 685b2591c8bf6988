//! An S3 server in this process that is slow, refuses, and cuts connections on command.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::Response;
use pgstrata_pageserver::lock::Mutex;
use tokio::runtime::Runtime;

/// What the server holds, and how it misbehaves.
#[derive(Default)]
pub struct Bucket {
    objects: Mutex<BTreeMap<String, (Bytes, String)>>,
    serial: AtomicU64,
    /// Writes of timelines' indexes take so long.
    pub index_delay_ms: AtomicU64,
    /// How many index writes wait now.
    pub delayed: AtomicU64,
    /// Every request is answered with 503.
    pub refusing: AtomicBool,
    /// Every reading of a layer is answered with 503.
    pub refusing_layers: AtomicBool,
    /// Every other request does what it asks for, and ends without an answer.
    pub cutting: AtomicBool,
    /// Requests that were refused or cut.
    pub failed: AtomicU64,
}

/// The server; it ends when this is dropped.
pub struct S3 {
    pub endpoint: String,
    pub bucket: Arc<Bucket>,
    _runtime: Runtime,
}

impl S3 {
    pub fn start() -> S3 {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let bucket = Arc::new(Bucket::default());
        let router = axum::Router::new().fallback(answer).with_state(Arc::clone(&bucket));
        runtime.spawn(async move { axum::serve(listener, router).await });
        S3 { endpoint, bucket, _runtime: runtime }
    }

    /// Names of the objects that contain `text`.
    pub fn names(&self, text: &str) -> Vec<String> {
        self.bucket.objects.lock().keys().filter(|name| name.contains(text)).cloned().collect()
    }
}

fn status(status: StatusCode) -> Response {
    Response::builder().status(status).body(Body::empty()).unwrap()
}

async fn answer(
    State(bucket): State<Arc<Bucket>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let layer = method == Method::GET && uri.path().contains("/layers/");
    if bucket.refusing.load(Ordering::SeqCst)
        || (layer && bucket.refusing_layers.load(Ordering::SeqCst))
    {
        bucket.failed.fetch_add(1, Ordering::SeqCst);
        return status(StatusCode::SERVICE_UNAVAILABLE);
    }
    let index = uri.path().ends_with("/index");
    if method == Method::PUT && index {
        let delay = bucket.index_delay_ms.load(Ordering::SeqCst);
        bucket.delayed.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(delay)).await;
        bucket.delayed.fetch_sub(1, Ordering::SeqCst);
    }
    let answer = bucket.perform(&method, &uri, &headers, body);
    if bucket.cutting.load(Ordering::SeqCst)
        && bucket.serial.fetch_add(1, Ordering::SeqCst) % 2 == 0
    {
        bucket.failed.fetch_add(1, Ordering::SeqCst);
        // Ends the connection's task, and with it the connection, without a word.
        std::panic::resume_unwind(Box::new(()));
    }
    answer
}

impl Bucket {
    fn perform(&self, method: &Method, uri: &Uri, headers: &HeaderMap, body: Bytes) -> Response {
        let path = uri.path().trim_start_matches('/');
        let Some((_, name)) = path.split_once('/').filter(|(_, name)| !name.is_empty()) else {
            return self.list(uri.query().unwrap_or_default(), method, &body);
        };
        let name = name.replace("%3D", "=");
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let mut objects = self.objects.lock();
        let there = objects.get(&name).cloned();
        match *method {
            Method::PUT => {
                let absent = header("if-none-match").is_none() || there.is_none();
                let same = header("if-match")
                    .is_none_or(|tag| there.as_ref().is_some_and(|(_, there)| there == tag));
                if !absent || !same {
                    return status(StatusCode::PRECONDITION_FAILED);
                }
                let tag = format!("\"{}\"", self.serial.fetch_add(1, Ordering::SeqCst));
                objects.insert(name, (body, tag.clone()));
                Response::builder().header("etag", tag).body(Body::empty()).unwrap()
            }
            Method::DELETE => {
                objects.remove(&name);
                status(StatusCode::NO_CONTENT)
            }
            _ => {
                let Some((content, tag)) = there else { return status(StatusCode::NOT_FOUND) };
                let answer = Response::builder()
                    .header("etag", tag)
                    .header("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT");
                let range = header("range").and_then(|range| {
                    let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
                    Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?))
                });
                match range {
                    Some((from, to)) => {
                        let to = (to + 1).min(content.len());
                        let said = format!("bytes {from}-{}/{}", to - 1, content.len());
                        answer
                            .status(StatusCode::PARTIAL_CONTENT)
                            .header("content-range", said)
                            .body(Body::from(content.slice(from..to)))
                            .unwrap()
                    }
                    None => answer.body(Body::from(content)).unwrap(),
                }
            }
        }
    }

    fn list(&self, query: &str, method: &Method, body: &Bytes) -> Response {
        let mut objects = self.objects.lock();
        if *method == Method::POST {
            // DeleteObjects.
            let text = String::from_utf8_lossy(body).into_owned();
            let mut deleted = String::new();
            for part in text.split("<Key>").skip(1) {
                let full = part.split("</Key>").next().unwrap();
                objects.remove(full);
                deleted += &format!("<Deleted><Key>{full}</Key></Deleted>");
            }
            return Response::new(Body::from(format!("<DeleteResult>{deleted}</DeleteResult>")));
        }
        let prefix = query
            .split('&')
            .find_map(|part| part.strip_prefix("prefix="))
            .unwrap_or_default()
            .replace("%2F", "/");
        let mut text = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
        for (name, (content, tag)) in objects.iter().filter(|(name, _)| name.starts_with(&prefix)) {
            let size = content.len();
            text += &format!(
                "<Contents><Key>{name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>\
                 <ETag>{}</ETag><Size>{size}</Size></Contents>",
                tag.trim_matches('"')
            );
        }
        text += "</ListBucketResult>";
        Response::new(Body::from(text))
    }
}
