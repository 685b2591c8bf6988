//! What a document has of routes, and what is served.

use axum::Json;
use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use serde::{Deserialize, Serialize};
use tower::ServiceExt;

use super::*;
use crate::who::Caller;
use crate::{Asked, Done, Peer, Placed, Posted, Ready, Refusal, Security, alive};

#[derive(Deserialize, Serialize, JsonSchema)]
struct Item {
    /// How many.
    count: u8,
    /// Of what.
    label: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
struct Filter {
    /// Not more than so many.
    most: u32,
    /// Of what.
    label: Option<String>,
    #[serde(default)]
    sizes: bool,
}

#[derive(Deserialize, JsonSchema)]
struct Place {
    shelf: u8,
}

async fn find(
    Placed(place): Placed<Place>,
    Asked(filter): Asked<Filter>,
    State(()): State<()>,
) -> Result<Json<Vec<Item>>, Refusal> {
    match place.shelf {
        shelf if shelf > 9 => Err(Refusal::new(Code::NotFound, "there are nine")),
        shelf => {
            let label = filter.label.filter(|_| !filter.sizes);
            Ok(Json(vec![Item { count: shelf.min(filter.most as u8), label }]))
        }
    }
}

async fn put(Posted(item): Posted<Item>) -> Result<Done, Refusal> {
    match item.count {
        0 => Err(Refusal::new(Code::Conflict, "nothing")),
        _ => Ok(Done),
    }
}

fn router() -> Router {
    Api::new("shop", "Things.")
        .get("/v1/shelves/{shelf}", "Finds things", &[Code::NotFound], find)
        .post("/v1/things", "Puts a thing", &[Code::Conflict], put)
        .get("/v1/things", "None", &[], || async { Json(Vec::<Item>::new()) })
        .get("/healthz", "Lives", &[], alive)
        .get("/readyz", "Works", &[], || async { Ready(Err("no".into())) })
        .router()
        .with_state(())
}

async fn ask(method: &str, uri: &str, body: &str) -> (u16, String, String) {
    let request = Request::builder().method(method).uri(uri);
    let caller = Caller { peer: Peer::Local, security: Security::default() };
    let request = request.header("content-type", "application/json").extension(caller);
    let answer =
        router().oneshot(request.body(Body::from(body.to_owned())).unwrap()).await.unwrap();
    let status = answer.status().as_u16();
    let content_type = answer.headers().get("content-type");
    let content_type = content_type.map_or("", |value| value.to_str().unwrap()).to_owned();
    let body = to_bytes(answer.into_body(), 1 << 20).await.unwrap();
    (status, content_type, String::from_utf8(body.into()).unwrap())
}

async fn document() -> Value {
    let (status, content_type, text) = ask("GET", DOCUMENT, "").await;
    assert_eq!((status, content_type.as_str()), (200, "application/json"));
    serde_json::from_str(&text).unwrap()
}

#[tokio::test]
async fn a_route_and_its_document_are_one() {
    let document = document().await;
    assert_eq!(document["openapi"], "3.1.0");
    let paths = document["paths"].as_object().unwrap();
    let described: Vec<_> = paths
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| format!("{method} {path}"))
        })
        .collect();
    let expected = [
        "get /healthz",
        "get /readyz",
        "get /v1/openapi.json",
        "get /v1/shelves/{shelf}",
        "get /v1/things",
        "post /v1/things",
    ];
    let mut sorted = described.clone();
    sorted.sort();
    assert_eq!(sorted, expected);
    for route in described {
        let (method, path) = route.split_once(' ').unwrap();
        let (status, ..) = ask(&method.to_uppercase(), &path.replace("{shelf}", "1"), "").await;
        assert!(![404, 405].contains(&status), "{route} is not served");
    }
}

#[tokio::test]
async fn parameters_bodies_and_answers_are_those_of_the_types() {
    let document = document().await;
    let find = &document["paths"]["/v1/shelves/{shelf}"]["get"];
    let parameters = find["parameters"].as_array().unwrap();
    let brief = |parameter: &Value| {
        let name = parameter["name"].as_str().unwrap().to_owned();
        (name, parameter["in"].clone(), parameter["required"] == true)
    };
    let found: Vec<_> = parameters.iter().map(brief).collect();
    let expected = [
        ("shelf".to_owned(), json!("path"), true),
        ("label".to_owned(), json!("query"), false),
        ("most".to_owned(), json!("query"), true),
        ("sizes".to_owned(), json!("query"), false),
    ];
    for parameter in &expected {
        assert!(found.contains(parameter), "{parameter:?} is not in {found:?}");
    }
    assert_eq!(found.len(), expected.len());
    let of = |name: &str| parameters.iter().find(|parameter| parameter["name"] == name).unwrap();
    assert_eq!(of("label")["schema"], json!({ "type": "string" }));
    assert_eq!(of("label")["description"], "Of what.");
    assert_eq!(of("shelf")["schema"]["maximum"], 255);
    assert_eq!(of("most")["schema"]["maximum"], u32::MAX);

    let statuses = |operation: &Value| {
        let answers = operation["responses"].as_object().unwrap();
        answers.keys().cloned().collect::<Vec<_>>()
    };
    assert_eq!(statuses(find), ["200", "400", "401", "403", "404"]);
    let item = json!({ "$ref": "#/components/schemas/Item" });
    let content = &find["responses"]["200"]["content"]["application/json"];
    assert_eq!(content["schema"]["items"], item);
    let refusal = &find["responses"]["404"]["content"]["application/json"]["schema"]["allOf"];
    assert_eq!(refusal[0], json!({ "$ref": "#/components/schemas/Failure" }));
    assert_eq!(refusal[1]["properties"]["code"]["const"], "not_found");

    let put = &document["paths"]["/v1/things"]["post"];
    assert_eq!(statuses(put), ["204", "400", "401", "403", "409"]);
    assert_eq!(put["operationId"], "post_things");
    assert_eq!(put["requestBody"]["content"]["application/json"]["schema"], item);
    let schemas = &document["components"]["schemas"];
    assert_eq!(schemas["Item"]["properties"]["count"]["maximum"], 255);
    assert!(schemas["Failure"].is_object() && schemas["Code"].is_object());

    let readyz = &document["paths"]["/readyz"]["get"];
    assert_eq!(statuses(readyz), ["200", "401", "403", "503"]);
    assert!(readyz["responses"]["503"]["content"]["text/plain"].is_object());
}

#[tokio::test]
async fn what_is_answered_is_what_is_described() {
    let cases = [
        ("GET", "/v1/shelves/4?most=9&label=a", "", 200, "application/json"),
        ("GET", "/v1/shelves/x?most=9", "", 400, "application/json"),
        ("GET", "/v1/shelves/%FF?most=9", "", 400, "application/json"),
        ("GET", "/v1/shelves/4", "", 400, "application/json"),
        ("GET", "/v1/shelves/10?most=1", "", 404, "application/json"),
        ("POST", "/v1/things", r#"{"count":1}"#, 204, ""),
        ("POST", "/v1/things", r#"{"count":0}"#, 409, "application/json"),
        ("POST", "/v1/things", r#"{"count":256}"#, 400, "application/json"),
        ("GET", "/v1/things", "", 200, "application/json"),
        ("GET", "/healthz", "", 200, "text/plain; charset=utf-8"),
        ("GET", "/readyz", "", 503, "text/plain; charset=utf-8"),
    ];
    for (method, uri, body, status, content_type) in cases {
        let (found, kind, text) = ask(method, uri, body).await;
        assert_eq!((found, kind.as_str()), (status, content_type), "{method} {uri}: {text}");
    }
}
