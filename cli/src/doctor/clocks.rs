//! Clocks of services against ours. By times branches are made of the past, and certificates and tokens are good or not.
//!
//! A service's clock is what the heads of its answers say (`Date`), in whole seconds: only what is certain is said.

use jiff::{SignedDuration, Timestamp};

use super::finding::{Finding, Severity};

const CHECK: &str = "clocks";

/// When a service was asked and answered, by our clock, and what its own said in between.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dated {
    /// By our clock.
    pub asked: Timestamp,
    /// By our clock.
    pub answered: Timestamp,
    /// By its own, as it was said.
    pub date: Option<String>,
}

/// By how much its clock is ahead of ours at least; negative if it is behind.
fn skew(asked: Timestamp, answered: Timestamp, second: Timestamp) -> SignedDuration {
    // It was in this second at some moment between the two.
    let least = second.duration_since(answered);
    let most = second.duration_since(asked) + SignedDuration::from_secs(1);
    match () {
        () if least > SignedDuration::ZERO => least,
        () if most < SignedDuration::ZERO => most,
        () => SignedDuration::ZERO,
    }
}

/// A service's clock; the error is why it is not known.
pub fn check(object: &str, dated: Result<&Dated, &str>) -> Finding {
    let finding = |severity, text: &str| Finding::new(CHECK, object, severity, text);
    let dated = match dated {
        Ok(dated) => dated,
        Err(why) => return finding(Severity::Unknown, &format!("not looked at: {why}")),
    };
    let Some(date) = &dated.date else {
        return finding(Severity::Unknown, "not looked at: its answers do not say what time it is");
    };
    // The form is that of e-mail's (RFC 9110, 5.6.7).
    let Ok(second) = jiff::fmt::rfc2822::parse(date) else {
        return finding(Severity::Unknown, "not looked at: its answers say a time that is none");
    };
    let skew = skew(dated.asked, dated.answered, second.timestamp());
    let by = skew.unsigned_abs();
    let side = if skew.is_negative() { "behind" } else { "ahead of" };
    let text = format!(
        "its clock is {:.1} s {side} this machine's, and a branch --at TIME and certificates go by such clocks: see that \
         both are kept right (NTP)",
        by.as_secs_f64()
    );
    match by.as_millis() {
        60_001.. => finding(Severity::Danger, &text),
        1_001.. => finding(Severity::Warning, &text),
        _ => finding(
            Severity::Ok,
            "its clock is not more than a second from this machine's, as far as can be seen",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn dated(asked: &str, answered: &str, date: &str) -> Finding {
        let day = "2026-11-26T12:";
        let dated = Dated {
            asked: at(&format!("{day}{asked}Z")),
            answered: at(&format!("{day}{answered}Z")),
            date: Some(date.to_owned()),
        };
        check("it", Ok(&dated))
    }

    #[test]
    fn clocks_that_differ_are_told_apart_from_slow_answers() {
        use Severity::{Danger, Ok, Unknown, Warning};
        for (asked, answered, date, expected) in [
            ("00:10.5", "00:10.6", "Thu, 26 Nov 2026 12:00:10 GMT", Ok),
            // It was in that second before it was over, or took two seconds to answer.
            ("00:12.0", "00:12.1", "Thu, 26 Nov 2026 12:00:10 GMT", Ok),
            ("00:12.1", "00:12.2", "Thu, 26 Nov 2026 12:00:10 GMT", Warning),
            ("00:10.0", "00:14.0", "Thu, 26 Nov 2026 12:00:10 GMT", Ok),
            ("00:10.0", "00:14.0", "Thu, 26 Nov 2026 12:00:15 GMT", Ok),
            ("00:10.0", "00:10.1", "Thu, 26 Nov 2026 12:00:12 GMT", Warning),
            ("00:10.0", "00:10.0", "Thu, 26 Nov 2026 12:01:10 GMT", Warning),
            ("00:10.0", "00:10.1", "Thu, 26 Nov 2026 12:01:11 GMT", Danger),
            ("02:10.0", "02:10.1", "Thu, 26 Nov 2026 12:01:08 GMT", Danger),
            ("00:10.0", "00:10.1", "yesterday", Unknown),
            ("00:10.0", "00:10.1", "", Unknown),
        ] {
            assert_eq!(
                dated(asked, answered, date).severity,
                expected,
                "{asked} {answered} {date}"
            );
        }
    }

    #[test]
    fn a_clock_is_ahead_or_behind() {
        let text = dated("00:10.0", "00:10.5", "Thu, 26 Nov 2026 12:02:10 GMT").text;
        assert!(text.starts_with("its clock is 119.5 s ahead of this machine's"), "{text}");
        let text = dated("00:10.0", "00:10.5", "Thu, 26 Nov 2026 11:59:10 GMT").text;
        assert!(text.starts_with("its clock is 59.0 s behind this machine's"), "{text}");
        assert_eq!(
            check("it", Err("it does not answer")).text,
            "not looked at: it does not answer"
        );
    }
}
