//! Clock, randomness, disk and network behind traits.
