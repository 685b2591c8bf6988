//! What crosses the network: codecs only.

pub mod pages;
