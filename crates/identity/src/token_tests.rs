use proptest::prelude::*;

use super::*;
use crate::Tokens;

const NOW: i64 = 1_800_000_000;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn key() -> &'static SigningKey {
    static KEY: std::sync::LazyLock<SigningKey> =
        std::sync::LazyLock::new(|| SigningKey::generate().unwrap().0);
    &KEY
}

fn public() -> &'static PublicKey {
    static PUBLIC: std::sync::LazyLock<PublicKey> = std::sync::LazyLock::new(|| {
        let pem = key().public_pem();
        let der =
            rustls::pki_types::SubjectPublicKeyInfoDer::from_pem_slice(pem.as_bytes()).unwrap();
        PublicKey::from_spki(&der).unwrap()
    });
    &PUBLIC
}

fn check_with_key(token: &str, second: i64) -> Result<Scope, TokenError> {
    check(token, at(second), |kid| (kid == key().kid()).then(public))
}

fn signed(header: &str, claims: &str) -> Result<Scope, TokenError> {
    let header = header.replace("KID", key().kid());
    check_with_key(&key().sign_parts(header.as_bytes(), claims.as_bytes()), NOW)
}

fn token(scope: Scope) -> String {
    key().sign(scope, at(NOW), SignedDuration::from_hours(1)).unwrap()
}

const HEADER: &str = r#"{"alg":"EdDSA","kid":"KID"}"#;

#[test]
fn tokens_are_good_for_their_scope_until_they_expire() {
    for scope in [Scope::Admin, Scope::Read, Scope::Tenant(TenantId([7; 16]))] {
        let token = token(scope);
        assert_eq!(check_with_key(&token, NOW), Ok(scope));
        assert_eq!(check_with_key(&token, NOW + 3599), Ok(scope));
        assert_eq!(check_with_key(&token, NOW + 3600), Err(TokenError::Expired(at(NOW + 3600))));
        assert_eq!(scope.to_string().parse(), Ok(scope));
    }
}

#[test]
fn what_a_token_says_of_its_end_is_read_without_a_key() {
    assert_eq!(says_until(&token(Scope::Read)), Some(at(NOW + 3600)));
    let too_long = format!("{}.x", "a".repeat(MAX_TOKEN));
    for bad in ["", "a", "a.b.c", "a.e30.c", too_long.as_str()] {
        assert_eq!(says_until(bad), None, "{bad}");
    }
}

#[test]
fn what_is_refused() {
    let exp = NOW + 100;
    let good = format!(r#"{{"scope":"read","exp":{exp}}}"#);
    assert_eq!(signed(HEADER, &good), Ok(Scope::Read));
    for header in [
        r#"{"alg":"none","kid":"KID"}"#,
        r#"{"alg":"HS256","kid":"KID"}"#,
        r#"{"alg":"eddsa","kid":"KID"}"#,
        r#"{"alg":"","kid":"KID"}"#,
    ] {
        assert_eq!(signed(header, &good), Err(TokenError::WrongAlgorithm), "{header}");
    }
    for header in [
        r#"{"alg":"EdDSA"}"#,
        r#"{"alg":"EdDSA","kid":"../KID"}"#,
        r#"{"alg":"EdDSA","kid":"KID","crit":["exp"]}"#,
        r#"{"alg":"EdDSA","kid":"KID","typ":"JWE"}"#,
        r#"{"alg":"EdDSA","alg":"EdDSA","kid":"KID"}"#,
        r#"{"kid":"KID"}"#,
        r#"["EdDSA"]"#,
        "",
    ] {
        let refused = signed(header, &good);
        assert!(matches!(refused, Err(TokenError::Malformed(_))), "{header}: {refused:?}");
    }
    assert_eq!(
        signed(r#"{"alg":"EdDSA","kid":"other"}"#, &good),
        Err(TokenError::UnknownKey("other".into()))
    );
    assert_eq!(signed(HEADER, &format!(r#"{{"exp":{exp}}}"#)), Err(TokenError::NoScope));
    let later = format!(r#"{{"scope":"read","exp":{exp},"nbf":{}}}"#, NOW + 1);
    assert_eq!(signed(HEADER, &later), Err(TokenError::NotYetValid(at(NOW + 1))));
    for scope in ["", "root", "admin read", "Admin", "tenant:", "tenant:x", "read\\n"] {
        let refused = signed(HEADER, &format!(r#"{{"scope":"{scope}","exp":{exp}}}"#));
        assert!(matches!(refused, Err(TokenError::UnknownScope(_))), "{scope}: {refused:?}");
    }
    for claims in [
        r#"{"scope":"admin"}"#,
        r#"{"scope":"admin","exp":"never"}"#,
        r#"{"scope":"admin","exp":1e300}"#,
        r#"{"scope":"admin","exp":9223372036854775807}"#,
        r#"{"scope":"admin","scope":"read","exp":1900000000}"#,
        "[]",
    ] {
        let refused = signed(HEADER, claims);
        assert!(matches!(refused, Err(TokenError::Malformed(_))), "{claims}: {refused:?}");
    }
    let long = "x".repeat(MAX_TOKEN + 1);
    assert_eq!(check_with_key(&long, NOW), Err(TokenError::TooLong));
    for bad in ["", ".", "..", "...", "a.b.c", "é.é.é"] {
        assert!(matches!(check_with_key(bad, NOW), Err(TokenError::Malformed(_))), "{bad}");
    }
    // Signed by another key with the name of ours.
    let (other, _) = SigningKey::generate().unwrap();
    let header = HEADER.replace("KID", key().kid());
    let forged = other.sign_parts(header.as_bytes(), good.as_bytes());
    assert_eq!(check_with_key(&forged, NOW), Err(TokenError::BadSignature(key().kid().into())));
}

proptest! {
    #[test]
    fn no_other_text_is_this_token(
        at in any::<prop::sample::Index>(),
        with in "[A-Za-z0-9_.=+/ -]|\\PC",
        how in 0..4,
    ) {
        let token = token(Scope::Admin);
        let at = at.index(token.len());
        let mutated = match how {
            0 => format!("{}{with}{}", &token[..at], &token[at + 1..]),
            1 => format!("{}{with}{}", &token[..at], &token[at..]),
            2 => format!("{}{}", &token[..at], &token[at + 1..]),
            _ => token[..at].to_owned(),
        };
        prop_assume!(mutated != token);
        prop_assert!(check_with_key(&mutated, NOW).is_err(), "{}", mutated);
    }

    #[test]
    fn one_bit_is_enough(at in any::<prop::sample::Index>(), bit in 0..7_u8) {
        let mut bytes = token(Scope::Read).into_bytes();
        let at = at.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        prop_assert!(check_with_key(&String::from_utf8(bytes).unwrap(), NOW).is_err());
    }

    #[test]
    fn any_text_is_refused_and_not_repeated(text in "\\PC{0,60}(\\.\\PC{0,60}){0,3}") {
        let error = check_with_key(&text, NOW).unwrap_err();
        if text.len() > 20 {
            prop_assert!(!error.to_string().contains(&text));
        }
    }
}

#[test]
fn keys_come_and_go_while_a_service_runs() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("token-keys");
    let open = || Tokens::looking_every(&path, std::time::Duration::ZERO);
    assert!(open().unwrap_err().to_string().contains("not there"));
    std::fs::create_dir(&path).unwrap();
    let tokens = open().unwrap();
    let token = token(Scope::Admin);
    let kid = key().kid();
    assert_eq!(tokens.check(&token, at(NOW)), Err(TokenError::UnknownKey(kid.into())));
    std::fs::write(path.join(format!("{kid}.pem")), key().public_pem()).unwrap();
    assert_eq!(tokens.check(&token, at(NOW)), Ok(Scope::Admin));
    // Both are valid.
    let (second, _) = SigningKey::generate().unwrap();
    std::fs::write(path.join(format!("{}.pem", second.kid())), second.public_pem()).unwrap();
    let newer = second.sign(Scope::Read, at(NOW), SignedDuration::from_secs(9)).unwrap();
    assert_eq!(tokens.check(&newer, at(NOW)), Ok(Scope::Read));
    assert_eq!(tokens.check(&token, at(NOW)), Ok(Scope::Admin));
    // What is no key leaves the others in use.
    std::fs::write(path.join("README"), "keys").unwrap();
    std::fs::write(path.join(".hidden.pem"), "keys").unwrap();
    assert_eq!(tokens.trouble(), None);
    std::fs::write(path.join("bad.pem"), "no key").unwrap();
    assert!(tokens.trouble().unwrap().contains("bad.pem"));
    assert_eq!(tokens.check(&newer, at(NOW)), Ok(Scope::Read));
    std::fs::remove_file(path.join("bad.pem")).unwrap();
    std::fs::remove_file(path.join(format!("{kid}.pem"))).unwrap();
    assert_eq!(tokens.check(&token, at(NOW)), Err(TokenError::UnknownKey(kid.into())));
    assert_eq!(tokens.check(&newer, at(NOW)), Ok(Scope::Read));
}

#[test]
fn a_key_is_not_shown() {
    let (key, file) = SigningKey::generate().unwrap();
    let again = SigningKey::from_pem(file.as_bytes()).unwrap();
    assert_eq!(key.kid(), again.kid());
    assert_eq!(key.kid().len(), KID_DIGITS);
    let secret = file.lines().nth(1).unwrap();
    assert!(!format!("{key:?}").contains(&secret[20..40]));
    assert!(SigningKey::from_pem(key.public_pem().as_bytes()).is_err());
    assert!(SigningKey::from_pem(b"").is_err());
}
