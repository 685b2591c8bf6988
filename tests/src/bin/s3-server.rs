//! An S3 server as a program, for tests in which services run on machines, or in containers, of their own.
//!
//!     s3-server ADDRESS:PORT DIRECTORY      buckets are the directories in it; the key is that of the usual variables

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use pgstrata_tests::other_s3::serve;
use tokio::net::TcpListener;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let (address, directory) = (arguments.next(), arguments.next().map(PathBuf::from));
    let (Some(address), Some(directory)) = (address, directory) else {
        eprintln!("usage: s3-server ADDRESS:PORT DIRECTORY");
        std::process::exit(2);
    };
    let of = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set"));
    let (key, secret) = (of("AWS_ACCESS_KEY_ID"), of("AWS_SECRET_ACCESS_KEY"));
    let listener = TcpListener::bind(address.to_str().unwrap()).await.unwrap();
    serve(listener, &directory, (&key, &secret), None).await;
}
