//! Whose a request is, and whether he may make it.

use std::future::{Future, ready};

use axum::extract::{FromRequestParts, Request};
use axum::http::header::{AUTHORIZATION, HeaderMap, WWW_AUTHENTICATE};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use pgstrata_wire::http::Code;

use crate::api::{Operation, Takes};
use crate::{Deed, Forbidden, Peer, Refusal, Security};

/// Who is at the other end of the connection of a request: each has it from the port.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub peer: Peer,
    pub security: Security,
}

/// What one has to be allowed to make a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// This.
    Deed(Deed),
    /// It depends on what the request is about: the handler takes [`Who`] and asks.
    Asked,
    /// To publish something; what is in the request, which nobody else's is read for.
    Publishing,
}

impl Caller {
    /// Who makes a request with these headers: by the connection's certificate, or else by a token.
    fn who(&self, headers: &HeaderMap) -> Result<Peer, String> {
        if self.peer != Peer::Unknown {
            return Ok(self.peer.clone());
        }
        let Some(header) = headers.get(AUTHORIZATION) else {
            return Err(
                "a token is needed (Authorization: Bearer), or a client's certificate".into()
            );
        };
        let token = header.to_str().ok().and_then(bearer);
        let token = token.ok_or("the header Authorization is not 'Bearer' and a token")?;
        self.security.bearer(token)
    }
}

/// The token in a header's value; the scheme in any case (RFC 9110).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Lets those through who may. A request of no port is nobody's.
pub(crate) async fn guard(need: Need, mut request: Request, next: Next) -> Response {
    let who = match request.extensions().get::<Caller>() {
        Some(caller) => caller.who(request.headers()),
        None => Err("it came by no port".to_owned()),
    };
    let peer = match who {
        Ok(peer) => peer,
        Err(why) => return unauthenticated(&why),
    };
    let deed = match need {
        Need::Deed(deed) => Some(deed),
        Need::Asked => None,
        Need::Publishing => (!peer.is_publisher()).then_some(Deed::PublishPageserver),
    };
    if let Some(deed) = deed
        && let Err(forbidden) = peer.check(deed)
    {
        return Refusal::from(forbidden).into_response();
    }
    request.extensions_mut().insert(peer);
    next.run(request).await
}

fn unauthenticated(why: &str) -> Response {
    let mut answer = Refusal::new(Code::Unauthenticated, why).into_response();
    debug_assert_eq!(answer.status(), StatusCode::UNAUTHORIZED);
    answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

impl From<Forbidden> for Refusal {
    fn from(forbidden: Forbidden) -> Refusal {
        Refusal::new(Code::Forbidden, &forbidden.to_string())
    }
}

/// Whose a request is, for handlers.
#[derive(Clone, Debug)]
pub struct Who(pub Peer);

impl<S: Sync> FromRequestParts<S> for Who {
    type Rejection = Refusal;

    fn from_request_parts(
        parts: &mut Parts,
        _: &S,
    ) -> impl Future<Output = Result<Who, Refusal>> + Send {
        let peer = parts.extensions.get::<Peer>().cloned();
        let nobody = || Refusal::new(Code::Unauthenticated, "it came by no port");
        ready(peer.map(Who).ok_or_else(nobody))
    }
}

impl Takes for Who {
    fn describe(_: &mut Operation<'_>) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_a_token() {
        assert_eq!(bearer("Bearer abc"), Some("abc"));
        assert_eq!(bearer("bearer  abc "), Some("abc"));
        assert_eq!(bearer("Basic abc"), None);
        assert_eq!(bearer("Bearer"), None);
    }
}
