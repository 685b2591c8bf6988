//! The one implementation of cryptography in the program: `ring`. Why: `docs/adr/0005-across-machines.md`.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, ring};

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    let mut provider = ring::default_provider();
    provider.cipher_suites.retain(|suite| suite.tls13().is_some());
    Arc::new(provider)
});

/// What all of our own connections use: suites of TLS 1.3 alone.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// Makes it the process's default, for libraries that ask for one: `reqwest` panics where there is none when a client is
/// made, of plain HTTP too. To be called before that; repeating it is harmless. With suites of TLS 1.2, which some object
/// stores speak.
pub fn install_provider() {
    // An error means that there is a default already: only this function sets one, and this is the only provider linked.
    let _ = ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_speaks_tls_1_3_alone_and_another_default_is_not_asked() {
        assert!(!provider().cipher_suites.is_empty());
        assert!(provider().cipher_suites.iter().all(|suite| suite.tls13().is_some()));
        install_provider();
        install_provider();
        assert!(CryptoProvider::get_default().is_some());
    }
}
