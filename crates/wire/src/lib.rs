//! What crosses the network: codecs only.
