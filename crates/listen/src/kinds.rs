//! Kinds of bodies that requests bring and that answers have, and what documents say of each.

use std::future::Future;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use pgstrata_wire::http::Code;
use schemars::JsonSchema;
use serde_json::json;

use crate::answer::{Asked, Placed, Posted};
use crate::api::{Answers, Operation, Takes};

const TEXT: &str = "text/plain";
const METRICS: &str = "text/plain; version=0.0.4";
const OCTETS: &str = "application/octet-stream";
const TAR: &str = "application/x-tar";
const JSON: &str = "application/json";

impl<S> Takes for State<S> {
    fn describe(_: &mut Operation<'_>) {}
}

impl<T: JsonSchema> Takes for Asked<T> {
    fn describe(operation: &mut Operation<'_>) {
        operation.parameters::<T>("query");
        operation.refusal(Code::Invalid);
    }
}

impl<T: JsonSchema> Takes for Placed<T> {
    fn describe(operation: &mut Operation<'_>) {
        operation.parameters::<T>("path");
        operation.refusal(Code::Invalid);
    }
}

impl<T: JsonSchema> Takes for Posted<T> {
    fn describe(operation: &mut Operation<'_>) {
        let schema = operation.schema::<T>();
        operation.body(JSON, &schema);
        operation.refusal(Code::Invalid);
    }
}

/// Bytes that are read as they come.
impl Takes for Body {
    fn describe(operation: &mut Operation<'_>) {
        operation.body(OCTETS, &json!({ "type": "string", "format": "binary" }));
    }
}

impl<A: Answers, E> Answers for Result<A, E> {
    fn describe(operation: &mut Operation<'_>) {
        A::describe(operation);
    }
}

impl<T: JsonSchema> Answers for Json<T> {
    fn describe(operation: &mut Operation<'_>) {
        let schema = operation.schema::<T>();
        operation.answer(200, "It is done, or this is it.", Some((JSON, schema)));
    }
}

/// It is done, and there is nothing to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done;

impl IntoResponse for Done {
    fn into_response(self) -> Response {
        StatusCode::NO_CONTENT.into_response()
    }
}

impl Answers for Done {
    fn describe(operation: &mut Operation<'_>) {
        operation.answer(204, "It is done.", None);
    }
}

/// Metrics in Prometheus's text format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metrics(pub String);

impl IntoResponse for Metrics {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, METRICS)], self.0).into_response()
    }
}

impl Answers for Metrics {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "string" });
        operation.answer(200, "Metrics in Prometheus's text format.", Some((TEXT, schema)));
    }
}

/// Whether a service can do its work, and why it can't.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready(pub Result<(), String>);

impl IntoResponse for Ready {
    fn into_response(self) -> Response {
        match self.0 {
            Ok(()) => "ready\n".into_response(),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why + "\n").into_response(),
        }
    }
}

impl Answers for Ready {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "string" });
        operation.answer(200, "It can do its work.", Some((TEXT, schema.clone())));
        operation.answer(503, "Why it can't.", Some((TEXT, schema)));
    }
}

/// The process answers; what supervisors ask to know whether it hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alive;

impl IntoResponse for Alive {
    fn into_response(self) -> Response {
        "ok\n".into_response()
    }
}

impl Answers for Alive {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "string" });
        operation.answer(200, "The process answers.", Some((TEXT, schema)));
    }
}

/// Handler of `/healthz`.
pub fn alive() -> impl Future<Output = Alive> + Send {
    std::future::ready(Alive)
}

/// Bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Octets(pub Vec<u8>);

impl IntoResponse for Octets {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, OCTETS)], self.0).into_response()
    }
}

impl Answers for Octets {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "string", "format": "binary" });
        operation.answer(200, "The bytes.", Some((OCTETS, schema)));
    }
}

/// A tar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tar(pub Vec<u8>);

impl IntoResponse for Tar {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, TAR)], self.0).into_response()
    }
}

impl Answers for Tar {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "string", "format": "binary" });
        operation.answer(200, "A tar.", Some((TAR, schema)));
    }
}

/// An interface's document, as JSON text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document(pub Bytes);

impl IntoResponse for Document {
    fn into_response(self) -> Response {
        ([(header::CONTENT_TYPE, JSON)], self.0).into_response()
    }
}

impl Answers for Document {
    fn describe(operation: &mut Operation<'_>) {
        let schema = json!({ "type": "object", "required": ["openapi", "info", "paths"] });
        operation.answer(200, "An OpenAPI document.", Some((JSON, schema)));
    }
}
