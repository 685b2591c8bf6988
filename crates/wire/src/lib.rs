//! What crosses the network: codecs only.
//!
//! Owns byte layouts of messages. Opens no connection and keeps no state; every decoder is bounded
//! and returns an error for any bytes that no encoder makes.

pub mod broker;
pub mod field;
pub mod frame;
mod frame_buffer;
pub mod http;
pub mod pages;
pub mod postgres;
pub mod safekeeper;
pub mod text;
pub mod version;

pub use field::DecodeError;
pub use frame_buffer::FrameBuffer;
