//! Requests to the services' HTTP interfaces.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use reqwest::{Client, RequestBuilder};
use serde::de::DeserializeOwned;

/// Runs asynchronous work from this synchronous program.
pub fn block_on<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

/// A client that talks to this machine only.
pub fn client(timeout: Duration) -> Result<Client> {
    Ok(Client::builder().no_proxy().timeout(timeout).build()?)
}

/// Sends a request; an error response becomes an error with the service's own words.
pub async fn send_bytes(what: &str, request: RequestBuilder) -> Result<Vec<u8>> {
    let response =
        request.send().await.map_err(|error| error.without_url()).with_context(|| {
            format!("{what} can't be asked; is it up? ('pgstrata status' tells)")
        })?;
    let status = response.status();
    let body = response.bytes().await?;
    if !status.is_success() {
        let text = serde_json::from_slice::<serde_json::Value>(&body)
            .ok()
            .and_then(|value| Some(value.get("error")?.as_str()?.to_owned()))
            .unwrap_or_else(|| format!("{what} answered {status}"));
        bail!("{text}");
    }
    Ok(body.to_vec())
}

/// As [`send_bytes`], for JSON.
pub async fn send<T: DeserializeOwned>(what: &str, request: RequestBuilder) -> Result<T> {
    let body = send_bytes(what, request).await?;
    serde_json::from_slice(&body).with_context(|| format!("{what} answered something unexpected"))
}

/// A GET with a query, for JSON.
pub fn get<T: DeserializeOwned>(
    what: &str,
    address: &str,
    path: &str,
    query: &[(&str, &str)],
) -> Result<T> {
    block_on(async {
        let client = client(Duration::from_secs(90))?;
        send(what, client.get(format!("http://{address}{path}")).query(query)).await
    })
}

/// A GET that may fail quickly, for what is only good to know.
pub fn try_get(address: &str, path: &str) -> Option<serde_json::Value> {
    block_on(async {
        let client = client(Duration::from_secs(2))?;
        send("it", client.get(format!("http://{address}{path}"))).await
    })
    .ok()
}
