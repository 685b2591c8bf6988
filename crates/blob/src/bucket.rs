//! What `object_store` has no call for: create a bucket. The request is signed and sent by what it makes public.

use http::{Method, StatusCode};
use object_store::ClientOptions;
use object_store::aws::{AwsAuthorizer, AwsCredential};
use object_store::client::{HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector};

use crate::environment::{self, variable};
use crate::error::{BlobError, chain};

/// Longest part of an answer that is shown, in bytes.
const SHOWN: usize = 500;

struct Server {
    url: String,
    region: String,
    credential: AwsCredential,
    options: ClientOptions,
}

fn server(bucket: &str, endpoint: Option<&str>) -> Result<Server, String> {
    environment::check(endpoint)?;
    let needed = |name: &str| variable(name).ok_or_else(|| format!("{name} is not set"));
    let credential = AwsCredential {
        key_id: needed("AWS_ACCESS_KEY_ID")?,
        secret_key: needed("AWS_SECRET_ACCESS_KEY")?,
        token: variable("AWS_SESSION_TOKEN"),
    };
    let region = variable("AWS_REGION")
        .or_else(|| variable("AWS_DEFAULT_REGION"))
        .unwrap_or_else(|| "us-east-1".into());
    // It becomes a part of a name and of a document.
    if !region.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-') {
        return Err(format!("'{region}' is no region (AWS_REGION)"));
    }
    let host = match endpoint {
        Some(endpoint) => endpoint.trim_end_matches('/').to_owned(),
        None => format!("https://s3.{region}.amazonaws.com"),
    };
    let options = ClientOptions::new().with_allow_http(host.starts_with("http://"));
    Ok(Server { url: format!("{host}/{bucket}"), region, credential, options })
}

/// The text of an element of an S3 server's error document.
fn element<'a>(document: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = document.split_once(&format!("<{name}>"))?;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}

/// What an answer that is no success says.
fn refusal(status: StatusCode, document: &str) -> String {
    match (element(document, "Message"), element(document, "Code")) {
        (Some(message), Some(code)) => format!("{message} ({code})"),
        (None, Some(code)) => code.to_owned(),
        _ => format!("{status} {}", document.chars().take(SHOWN).collect::<String>()),
    }
    .replace('\n', " ")
}

async fn create(bucket: &str, endpoint: Option<&str>) -> Result<(), String> {
    let server = server(bucket, endpoint)?;
    // us-east-1 is the one region that must not be named.
    let body = match server.region.as_str() {
        "us-east-1" => String::new(),
        region => format!(
            "<CreateBucketConfiguration xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">\
             <LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
        ),
    };
    let mut request: HttpRequest = http::Request::builder()
        .method(Method::PUT)
        .uri(&server.url)
        .body(HttpRequestBody::from(body))
        .map_err(|error| chain(&error))?;
    AwsAuthorizer::new(&server.credential, "s3", &server.region)
        .try_authorize(&mut request, None)
        .map_err(|error| chain(&error))?;
    // For HTTPS; and the client panics without.
    pgstrata_identity::install_provider();
    let client = ReqwestConnector::default();
    let client = client.connect(&server.options).map_err(|error| chain(&error))?;
    let answer = client.execute(request).await.map_err(|error| chain(&error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let document = answer.into_body().bytes().await.map_err(|error| chain(&error))?;
    let document = String::from_utf8_lossy(&document);
    match element(&document, "Code") {
        Some("BucketAlreadyOwnedByYou") => Ok(()),
        _ => Err(refusal(status, &document)),
    }
}

/// Creates the bucket; success if we own it already.
pub async fn create_bucket(bucket: &str, endpoint: Option<&str>) -> Result<(), BlobError> {
    let unusable = |cause| BlobError::Unusable { store: format!("s3://{bucket}"), cause };
    create(bucket, endpoint).await.map_err(unusable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_server_said() {
        let document = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access\nDenied.</Message></Error>";
        assert_eq!(refusal(StatusCode::FORBIDDEN, document), "Access Denied. (AccessDenied)");
        assert_eq!(refusal(StatusCode::BAD_GATEWAY, "no <Code>"), "502 Bad Gateway no <Code>");
    }
}
