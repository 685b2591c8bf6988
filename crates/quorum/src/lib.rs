//! The consensus core and its explorer.
