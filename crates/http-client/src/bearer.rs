//! A token on its way: `Authorization: Bearer` of each request (RFC 6750).

use pgstrata_identity::MAX_TOKEN;
use ureq::http::header::{AUTHORIZATION, HeaderValue};
use ureq::http::{Request, Response};
use ureq::middleware::{Middleware, MiddlewareNext};
use ureq::{Body, SendBody};

/// What is shown in place of a certificate. It is not printed by `Debug`.
#[derive(Clone, Debug)]
pub struct Bearer(HeaderValue);

impl Bearer {
    /// Of a token's text. Whether it is good is for services to say; here it must be what can be one, so that whatever else
    /// was put in its place goes nowhere. The error is a text without it.
    pub fn new(token: &str) -> Result<Bearer, String> {
        let part = |part: &str| {
            let is_of_base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            !part.is_empty() && part.bytes().all(is_of_base64)
        };
        let is_one = token.split('.').count() == 3 && token.split('.').all(part);
        if !is_one || token.len() > MAX_TOKEN {
            return Err("it is no token, which 'pgstrata auth token' prints in one line".to_owned());
        }
        // Of such letters it is one.
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))
            .map_err(|_| "it can't be sent".to_owned())?;
        value.set_sensitive(true);
        Ok(Bearer(value))
    }
}

impl Middleware for Bearer {
    fn handle(
        &self,
        mut request: Request<SendBody>,
        next: MiddlewareNext,
    ) -> Result<Response<Body>, ureq::Error> {
        request.headers_mut().insert(AUTHORIZATION, self.0.clone());
        next.handle(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Access;

    #[test]
    fn what_is_no_token_is_not_sent() {
        for bad in ["", "a.b", "a..c", "a.b.c.d", "a.b.c\n", "a.b.\u{e9}", "Bearer a.b.c", " a.b.c"]
        {
            let error = Bearer::new(bad).unwrap_err();
            assert!(error.contains("auth token"), "{error}");
        }
        assert!(Bearer::new(&format!("a.b.{}", "c".repeat(MAX_TOKEN))).is_err());
        assert!(Bearer::new("eyJ-_9.eyJ.sig").is_ok());
    }

    #[test]
    fn a_token_is_not_printed() {
        let bearer = Bearer::new("eyJhead.eyJbody.signature").unwrap();
        let access = Access::Token { ca: "ca.pem".into(), bearer: bearer.clone() };
        let shown = format!("{bearer:?} {access:?}");
        assert!(!shown.contains("eyJ") && !shown.contains("signature"), "{shown}");
    }
}
