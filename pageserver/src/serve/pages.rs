//! The page service: one blocking thread a connection, requests answered in order.

use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use pgstrata_identity::Stream;
use pgstrata_listen::{Deed, GREETING, Peer, Security};
use pgstrata_wire::pages::{
    HELLO_SIZE, Hello, PAGES, PagesReply, PagesRequest, Query, REQUEST_SIZE, Status,
};
use pgstrata_wire::version::Version;
use tokio::net::TcpListener;

use crate::metrics::Metrics;
use crate::repository::Repository;
use crate::timeline::Timeline;

/// How long a request waits for its LSN.
const PATIENCE: Duration = Duration::from_secs(60);

/// Connections that are served at once.
const CONNECTIONS: usize = 4096;
/// How long the rest of a request may take, once it began.
const REQUEST: Duration = Duration::from_secs(10);

/// Accepts connections until the process ends.
pub async fn serve(
    listeners: Vec<TcpListener>,
    repository: Arc<Repository>,
    metrics: Arc<Metrics>,
    security: Security,
) {
    let greet = move |tcp| {
        let security = security.clone();
        async move { pgstrata_listen::certified(tcp, HELLO_SIZE, &security).await }
    };
    let serve = move |(stream, peer)| {
        if let Err(error) = connection(stream, &peer, &repository, &metrics) {
            tracing::debug!("page connection: {error:#}");
        }
    };
    pgstrata_listen::threads(listeners, "pages", CONNECTIONS, greet, serve).await;
}

/// Reads the next request. False at the end of the connection. A computing client may be silent for
/// as long as it likes between requests, but not inside of one.
fn read_request(reader: &mut BufReader<Stream>, request: &mut [u8; REQUEST_SIZE]) -> Result<bool> {
    if reader.fill_buf()?.is_empty() {
        return Ok(false);
    }
    let whole = reader.buffer().len() >= REQUEST_SIZE;
    if !whole {
        reader.get_ref().set_read_timeout(Some(REQUEST))?;
    }
    reader.read_exact(request)?;
    if !whole {
        reader.get_ref().set_read_timeout(None)?;
    }
    Ok(true)
}

fn connection(
    stream: Stream,
    peer: &Peer,
    repository: &Repository,
    metrics: &Metrics,
) -> Result<()> {
    stream.set_read_timeout(Some(GREETING))?;
    let mut reader = BufReader::new(stream.clone());
    let mut writer = BufWriter::with_capacity(128 * 1024, stream);
    let mut hello = [0; HELLO_SIZE];
    reader.read_exact(&mut hello)?;
    reader.get_ref().set_read_timeout(None)?;
    let timeline = Hello::decode(&hello).map_err(anyhow::Error::from).and_then(|hello| {
        let version = PAGES.agree("compute", hello.versions)?;
        // Before anything is said of what is there.
        peer.check(Deed::ReadPages(hello.tenant))?;
        let timeline = repository.timeline(hello.timeline)?;
        anyhow::ensure!(
            timeline.info.tenant == hello.tenant,
            "timeline {} is not of tenant {}",
            hello.timeline,
            hello.tenant
        );
        Ok((timeline, version))
    });
    let timeline = match timeline {
        Ok((timeline, version)) => {
            welcome(&mut writer, version)?;
            writer.flush()?;
            timeline
        }
        Err(error) => {
            reply(&mut writer, 0, Status::Error, format!("{error:#}").as_bytes())?;
            return Ok(writer.flush()?);
        }
    };
    timeline.wait(timeline.info.start_lsn, PATIENCE).map_err(anyhow::Error::msg)?;
    let checksums = timeline.control_state(timeline.progress.lsn())?.control.data_checksum_version;
    let mut request = [0; REQUEST_SIZE];
    let mut body = Vec::new();
    loop {
        if !read_request(&mut reader, &mut request)? {
            return Ok(());
        }
        let request = PagesRequest::decode(&request)?;
        body.clear();
        let started = std::time::Instant::now();
        match answer(&timeline, &request, checksums != 0, &mut body) {
            Ok(status) => reply(&mut writer, request.number, status, &body)?,
            Err(error) => {
                let text = format!("{error:#}");
                tracing::warn!(timeline = %timeline.info.id, "{:?}: {text}", request.query);
                reply(&mut writer, request.number, Status::Error, text.as_bytes())?;
            }
        }
        metrics.page_request_seconds.observe(started.elapsed().as_secs_f64());
        metrics.pages_served.inc_by((body.len() / 8192) as u64);
        // Replies to pipelined requests leave together.
        if reader.buffer().is_empty() {
            writer.flush()?;
        }
    }
}

/// Answers a hello: this is the version that is spoken from here on.
fn welcome(writer: &mut impl Write, version: Version) -> std::io::Result<()> {
    let head = PagesReply { status: Status::Done, number: 0, length: 0, version: Some(version) };
    writer.write_all(&head.encode())
}

fn reply(writer: &mut impl Write, number: u32, status: Status, body: &[u8]) -> std::io::Result<()> {
    let head = PagesReply { status, number, length: body.len() as u32, version: None };
    writer.write_all(&head.encode())?;
    writer.write_all(body)
}

fn answer(
    timeline: &Timeline,
    request: &PagesRequest,
    checksums: bool,
    body: &mut Vec<u8>,
) -> Result<Status> {
    let lsn = request.lsn;
    timeline.wait(lsn, PATIENCE).map_err(anyhow::Error::msg)?;
    anyhow::ensure!(
        lsn >= timeline.oldest_lsn(),
        "{lsn} is before the branch's history, which starts at {}",
        timeline.oldest_lsn()
    );
    match request.query {
        Query::Pages { rel, block, count } => {
            let Some(blocks) = timeline.rel_size(rel, lsn)?.blocks else {
                return Ok(Status::NoRelation);
            };
            let mut page = [0; 8192];
            for number in block..block.saturating_add(count).min(blocks) {
                timeline.existing_block(rel, number, lsn, &mut page)?;
                if checksums {
                    pgstrata_pg_redo::set_checksum(&mut page, number);
                }
                body.extend_from_slice(&page);
            }
        }
        Query::Size { rel } => match timeline.rel_size(rel, lsn)?.blocks {
            Some(blocks) => body.extend_from_slice(&blocks.to_le_bytes()),
            None => return Ok(Status::NoRelation),
        },
        Query::Relations { spc, db } => {
            let relations = timeline.relations(spc, db, lsn).context("can't list relations")?;
            for (rel, blocks) in relations {
                body.extend_from_slice(&rel.rel.to_le_bytes());
                body.extend_from_slice(&u32::from(rel.fork as u8).to_le_bytes());
                body.extend_from_slice(&blocks.to_le_bytes());
            }
        }
    }
    Ok(Status::Done)
}
