//! What an HTTP interface answers where it has nothing better to say: every refusal is JSON, a [`Failure`].

use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};
use pgstrata_wire::http::{Code, Failure};
use serde::de::DeserializeOwned;

/// A request that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    status: StatusCode,
    failure: Failure,
}

impl Refusal {
    /// With the status of its code. The text is made one line.
    pub fn new(code: Code, error: &str) -> Refusal {
        let status =
            StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Refusal { status, failure: Failure { code, error: error.trim_end().replace('\n', " ") } }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.failure)).into_response()
    }
}

/// The query of a request. One that can't be read is refused.
#[derive(Clone, Copy, Debug)]
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Asked<T>, Refusal> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(query)) => Ok(Asked(query)),
            Err(rejection) => Err(Refusal::new(Code::Invalid, &rejection.body_text())),
        }
    }
}

/// What stands in the path of a request. What can't be read is refused.
#[derive(Clone, Copy, Debug)]
pub struct Placed<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Placed<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Placed<T>, Refusal> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(placed)) => Ok(Placed(placed)),
            Err(rejection) => Err(Refusal::new(Code::Invalid, &rejection.body_text())),
        }
    }
}

/// The JSON that a request brings. What is none, or is too long, is refused.
#[derive(Clone, Copy, Debug)]
pub struct Posted<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Posted<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Posted<T>, Refusal> {
        match Json::from_request(request, state).await {
            Ok(Json(body)) => Ok(Posted(body)),
            Err(rejection) => Err(Refusal::new(Code::Invalid, &rejection.body_text())),
        }
    }
}

/// The interface, with an answer to what it does not have.
pub fn complete<S: Clone + Send + Sync + 'static>(router: Router<S>) -> Router<S> {
    let nothing = |method: Method, uri: Uri| async move {
        Refusal::new(Code::NotFound, &format!("there is no {method} {}", uri.path()))
    };
    let method = |method: Method, uri: Uri| async move {
        let refusal = Refusal::new(Code::Invalid, &format!("{} takes no {method}", uri.path()));
        Refusal { status: StatusCode::METHOD_NOT_ALLOWED, ..refusal }
    };
    router.fallback(nothing).method_not_allowed_fallback(method)
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::routing::{get, post};
    use serde::{Deserialize, Serialize};
    use tower::ServiceExt;

    use super::*;

    #[derive(Deserialize, Serialize)]
    struct Number {
        number: u32,
    }

    async fn ask(method: &str, uri: &str, body: &str) -> (u16, Failure) {
        let router = Router::new()
            .route(
                "/double",
                get(|Asked(Number { number })| async move { (number * 2).to_string() }),
            )
            .route("/same", post(|Posted(number): Posted<Number>| async move { Json(number) }));
        let request = Request::builder().method(method).uri(uri);
        let request = request.header("content-type", "application/json");
        let request = request.body(Body::from(body.to_owned())).unwrap();
        let answer = complete(router).oneshot(request).await.unwrap();
        let status = answer.status().as_u16();
        let bytes = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
        let failure = serde_json::from_slice(&bytes);
        (status, failure.unwrap_or(Failure { code: Code::Unknown, error: String::new() }))
    }

    #[tokio::test]
    async fn every_refusal_is_json_with_a_code() {
        assert_eq!(ask("GET", "/double?number=4", "").await.0, 200);
        assert_eq!(ask("POST", "/same", r#"{"number":4}"#).await.0, 200);
        let cases = [
            ("GET", "/double", "", 400, Code::Invalid, "number"),
            ("GET", "/double?number=x", "", 400, Code::Invalid, "number"),
            ("POST", "/same", "", 400, Code::Invalid, "EOF"),
            ("POST", "/same", r#"{"number":"x"}"#, 400, Code::Invalid, "number"),
            ("GET", "/nowhere", "", 404, Code::NotFound, "/nowhere"),
            ("DELETE", "/double", "", 405, Code::Invalid, "DELETE"),
        ];
        for (method, uri, body, status, code, words) in cases {
            let (found, failure) = ask(method, uri, body).await;
            assert_eq!((found, failure.code), (status, code), "{method} {uri}: {}", failure.error);
            assert!(failure.error.contains(words), "{method} {uri}: {}", failure.error);
        }
        assert_eq!(Refusal::new(Code::Busy, "two\nlines\n").failure.error, "two lines");
    }
}
