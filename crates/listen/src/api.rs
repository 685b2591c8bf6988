//! An HTTP interface and its document, an OpenAPI 3.1 one, which it serves itself.
//!
//! A route and what the document says of it are one thing: parameters, bodies and answers are those of the handler's
//! own types. Only what a handler refuses with, and a line for people, is said beside it; an answer whose status was not
//! said is noticed, and logged as an error.

use std::collections::BTreeMap;
use std::future::{Future, ready};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::handler::Handler;
use axum::middleware::{from_fn, map_response};
use axum::response::Response;
use axum::routing::{MethodFilter, on};
use pgstrata_wire::http::{Code, Failure};
use schemars::generate::{SchemaGenerator, SchemaSettings};
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{JsonSchema, Schema};
use serde_json::{Map, Value, json};

use crate::answer::complete;
use crate::kinds::Document;
use crate::who::guard;
use crate::{Deed, Need};

/// Where each service has its document.
const DOCUMENT: &str = "/v1/openapi.json";

/// What a handler takes from a request, as the document has it.
pub trait Takes {
    /// Adds it.
    fn describe(operation: &mut Operation<'_>);
}

/// What a handler answers, as the document has it.
pub trait Answers {
    /// Adds it.
    fn describe(operation: &mut Operation<'_>);
}

/// A handler whose document is made from its types: `I` are those that it takes.
pub trait Documented<I> {
    /// Adds everything.
    fn describe(operation: &mut Operation<'_>);
}

macro_rules! documented {
    ($($taken:ident)*) => {
        impl<F, R, A, $($taken),*> Documented<($($taken,)*)> for F
        where
            F: FnOnce($($taken),*) -> R,
            R: Future<Output = A>,
            A: Answers,
            $($taken: Takes,)*
        {
            fn describe(operation: &mut Operation<'_>) {
                $($taken::describe(operation);)*
                A::describe(operation);
            }
        }
    };
}

documented!();
documented!(A1);
documented!(A1 A2);
documented!(A1 A2 A3);
documented!(A1 A2 A3 A4);

/// One method of one path, while its part of the document is made.
#[derive(Debug)]
pub struct Operation<'a> {
    schemas: &'a mut SchemaGenerator,
    parameters: Vec<Value>,
    body: Option<Value>,
    answers: BTreeMap<u16, Value>,
}

impl Operation<'_> {
    /// Parameters at a `place`, `query` or `path`: the fields of `T`.
    pub fn parameters<T: JsonSchema>(&mut self, place: &str) {
        let mut schema = T::json_schema(self.schemas);
        RecursiveTransform(bound_numbers).transform(&mut schema);
        let required =
            schema.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
        let properties = schema.get("properties").and_then(Value::as_object);
        for (name, property) in properties.into_iter().flatten() {
            let mut property = without_null(property.clone());
            let description =
                property.as_object_mut().and_then(|fields| fields.remove("description"));
            let is_required = place == "path" || required.iter().any(|required| required == name);
            let mut parameter =
                json!({ "name": name, "in": place, "required": is_required, "schema": property });
            if let Some(description) = description {
                parameter["description"] = description;
            }
            self.parameters.push(parameter);
        }
    }

    /// A body of this type of content, which a request must have.
    pub fn body(&mut self, content_type: &str, schema: &Value) {
        let content = json!({ content_type: { "schema": schema } });
        self.body = Some(json!({ "required": true, "content": content }));
    }

    /// An answer, with its content if it has any.
    pub fn answer(&mut self, status: u16, meaning: &str, content: Option<(&str, Value)>) {
        let mut answer = json!({ "description": meaning });
        if let Some((content_type, schema)) = content {
            answer["content"] = json!({ content_type: { "schema": schema } });
        }
        self.answers.insert(status, answer);
    }

    /// A refusal.
    pub fn refusal(&mut self, code: Code) {
        let failure = self.schema::<Failure>();
        let own = json!({ "properties": { "code": { "const": code } } });
        let schema = json!({ "allOf": [failure, own] });
        self.answer(code.status(), code.meaning(), Some(("application/json", schema)));
    }

    /// The schema of a type, or where it is.
    pub fn schema<T: JsonSchema>(&mut self) -> Value {
        self.schemas.subschema_for::<T>().to_value()
    }

    fn finish(self, id: &str, about: &str) -> Value {
        let answers: Map<_, _> =
            self.answers.into_iter().map(|(status, answer)| (status.to_string(), answer)).collect();
        let mut operation = json!({ "operationId": id, "summary": about, "responses": answers });
        if !self.parameters.is_empty() {
            operation["parameters"] = self.parameters.into();
        }
        if let Some(body) = self.body {
            operation["requestBody"] = body;
        }
        operation
    }
}

/// A parameter is absent where a field would be null.
fn without_null(mut schema: Value) -> Value {
    let is_null = |value: &Value| value == "null" || value["type"] == "null";
    let Some(fields) = schema.as_object_mut() else { return schema };
    if fields.get("default").is_some_and(Value::is_null) {
        fields.remove("default");
    }
    if let Some(Value::Array(types)) = fields.get_mut("type") {
        types.retain(|one| !is_null(one));
        if let [one] = types.as_slice() {
            let one = one.clone();
            fields.insert("type".into(), one);
        }
    }
    if let Some(Value::Array(choices)) = fields.get_mut("anyOf") {
        choices.retain(|one| !is_null(one));
        if let [Value::Object(one)] = choices.as_slice() {
            let one = one.clone();
            fields.remove("anyOf");
            fields.extend(one);
        }
    }
    schema
}

/// Numbers have an end, which their formats alone do not tell a program.
fn bound_numbers(schema: &mut Schema) {
    let greatest = match schema.get("format").and_then(Value::as_str) {
        Some("uint64") => u64::MAX,
        Some("uint" | "uint32") => u64::from(u32::MAX),
        Some("uint16") => u64::from(u16::MAX),
        Some("uint8") => u64::from(u8::MAX),
        _ => return,
    };
    schema.insert("maximum".into(), greatest.into());
}

/// See the module.
#[derive(Debug)]
pub struct Api<S> {
    router: Router<S>,
    schemas: SchemaGenerator,
    paths: Map<String, Value>,
    /// Of those that are added next.
    need: Need,
    title: String,
    about: String,
}

impl<S: Clone + Send + Sync + 'static> Api<S> {
    /// The interface of a service, without routes.
    pub fn new(service: &str, about: &str) -> Api<S> {
        let settings = SchemaSettings::draft2020_12()
            .with(|settings| settings.definitions_path = "/components/schemas".into());
        let title = format!("pgstrata {service}");
        let (schemas, about) = (settings.into_generator(), about.to_owned());
        let need = Need::Deed(Deed::SeeService);
        Api { router: Router::new(), schemas, paths: Map::new(), need, title, about }
    }

    /// What one has to be allowed for the paths that follow. For those before, it is to see what the service does.
    pub fn for_who(mut self, need: Need) -> Api<S> {
        self.need = need;
        self
    }

    /// A path that is read. `refusals` are those of the handler; what its parameters are refused with is known.
    pub fn get<H, T, I>(self, path: &str, about: &str, refusals: &[Code], handler: H) -> Api<S>
    where
        H: Handler<T, S> + Documented<I>,
        T: 'static,
    {
        self.add((MethodFilter::GET, "get"), path, about, refusals, handler)
    }

    /// The same of one that is posted to.
    pub fn post<H, T, I>(self, path: &str, about: &str, refusals: &[Code], handler: H) -> Api<S>
    where
        H: Handler<T, S> + Documented<I>,
        T: 'static,
    {
        self.add((MethodFilter::POST, "post"), path, about, refusals, handler)
    }

    /// The same of one that is deleted.
    pub fn delete<H, T, I>(self, path: &str, about: &str, refusals: &[Code], handler: H) -> Api<S>
    where
        H: Handler<T, S> + Documented<I>,
        T: 'static,
    {
        self.add((MethodFilter::DELETE, "delete"), path, about, refusals, handler)
    }

    fn add<H, T, I>(
        mut self,
        (filter, method): (MethodFilter, &str),
        path: &str,
        about: &str,
        refusals: &[Code],
        handler: H,
    ) -> Api<S>
    where
        H: Handler<T, S> + Documented<I>,
        T: 'static,
    {
        let (parameters, answers) = (Vec::new(), BTreeMap::new());
        let mut operation =
            Operation { schemas: &mut self.schemas, parameters, body: None, answers };
        H::describe(&mut operation);
        let unknown = [Code::Unauthenticated, Code::Forbidden];
        refusals.iter().chain(&unknown).for_each(|code| operation.refusal(*code));
        let known: Vec<u16> = operation.answers.keys().copied().collect();
        let words = path.split(['/', '{', '}']).filter(|word| !word.is_empty() && *word != "v1");
        let id = [method].into_iter().chain(words).collect::<Vec<_>>().join("_");
        let operation = operation.finish(&id.replace('.', "_"), about);
        let methods = self.paths.entry(path).or_insert_with(|| json!({}));
        methods[method] = operation;
        let what = format!("{method} {path}");
        let watched = map_response(move |answer: Response| {
            let status = answer.status().as_u16();
            if !known.contains(&status) {
                tracing::error!("{what} answered {status}, {UNSAID}");
            }
            ready(answer)
        });
        let need = self.need;
        let guarded = from_fn(move |request, next| guard(need, request, next));
        let methods = on(filter, handler).route_layer(guarded).route_layer(watched);
        self.router = self.router.route(path, methods);
        self
    }

    /// The routes, and one for the document.
    pub fn router(self) -> Router<S> {
        let text = Arc::new(OnceLock::new());
        let served = Arc::clone(&text);
        let document = move || ready(Document(served.get().cloned().unwrap_or_default()));
        let api = self.for_who(Need::Deed(Deed::SeeHealth));
        let api = api.get(DOCUMENT, "This document", &[], document);
        text.get_or_init(|| api.document().to_string().into());
        complete(api.router)
    }

    fn document(&self) -> Value {
        let mut schemas = Value::Object(self.schemas.definitions().clone());
        for schema in schemas.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if let Ok(schema) = schema.try_into() {
                RecursiveTransform(bound_numbers).transform(schema);
            }
        }
        let about = format!(
            "{} Every refusal is JSON, a Failure, but those of /readyz, which are text. What is not \
             here is refused with 404, and another method than those here with 405.",
            self.about
        );
        json!({
            "openapi": "3.1.0",
            "info": { "title": self.title, "version": env!("CARGO_PKG_VERSION"), "description": about },
            "paths": self.paths,
            "components": { "schemas": schemas },
        })
    }
}

/// The end of what is logged of an answer that the document does not have.
const UNSAID: &str = "which its document does not say";

#[cfg(test)]
mod tests;
