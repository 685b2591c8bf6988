//! Says how two pages differ, in terms of fields rather than bytes.

use crate::page::{self, HEADER_SIZE, Line, Page};
use pgstrata_ids::PAGE_SIZE;
use pgstrata_pg_wal::rmgr;
use std::fmt::Write as _;

/// Differences that are listed; the rest is counted.
const LISTED: usize = 8;

const HEADER_FIELDS: [(usize, usize, &str); 7] = [
    (0, 8, "pd_lsn"),
    (8, 2, "pd_checksum"),
    (10, 2, "pd_flags"),
    (12, 2, "pd_lower"),
    (14, 2, "pd_upper"),
    (16, 4, "pd_special or version"),
    (20, 4, "pd_prune_xid"),
];

const TUPLE_FIELDS: [(usize, usize, &str); 7] = [
    (0, 4, "t_xmin"),
    (4, 4, "t_xmax"),
    (8, 4, "t_cid"),
    (12, 6, "t_ctid"),
    (18, 2, "t_infomask2"),
    (20, 2, "t_infomask"),
    (22, 1, "t_hoff"),
];

/// The differences between two pages, or `None` if they are equal. `rmgr` says how to read the tuples.
pub fn compare(rmgr: u8, expected: &Page, found: &Page) -> Option<String> {
    if expected == found {
        return None;
    }
    let mut report = Report::default();
    for (at, length, name) in HEADER_FIELDS {
        report.field("", name, &expected[at..at + length], &found[at..at + length]);
    }
    let lines = page::line_count(expected);
    let same_shape = lines == page::line_count(found);
    let has_lines = expected[16..20] == found[16..20] && usize::from(lines) < 1024;
    if same_shape && has_lines {
        for number in 1..=lines {
            report.line(rmgr, expected, found, number);
        }
    }
    let special = usize::from(page::special(expected)).clamp(HEADER_SIZE, PAGE_SIZE);
    report.field("", "special space", &expected[special..], &found[special..]);
    if report.count == 0 {
        report.bytes(expected, found);
    }
    if report.count > LISTED {
        let _ = write!(report.text, "; and {} more", report.count - LISTED);
    }
    Some(report.text)
}

#[derive(Default)]
struct Report {
    text: String,
    count: usize,
}

impl Report {
    fn add(&mut self, difference: std::fmt::Arguments<'_>) {
        self.count += 1;
        if self.count <= LISTED {
            let separator = if self.count > 1 { "; " } else { "" };
            let _ = write!(self.text, "{separator}{difference}");
        }
    }

    fn field(&mut self, place: &str, name: &str, expected: &[u8], found: &[u8]) {
        if expected != found {
            let hex = |bytes: &[u8]| -> String {
                bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
            };
            let (expected, found) = (hex(expected), hex(found));
            self.add(format_args!("{place}{name} is 0x{found}, expected 0x{expected}"));
        }
    }

    fn line(&mut self, rmgr: u8, expected: &Page, found: &Page, number: u16) {
        let (Ok(a), Ok(b)) = (page::line(expected, number), page::line(found, number)) else {
            return;
        };
        if a != b {
            let text = |line: Line| {
                format!("offset {} flags {} length {}", line.offset, line.flags, line.length)
            };
            self.add(format_args!("line pointer {number} is {}, expected {}", text(b), text(a)));
            return;
        }
        let (Some(a), Some(b)) = (expected.get(a.range()), found.get(b.range())) else {
            return;
        };
        if a == b {
            return;
        }
        let place = format!("line pointer {number}: ");
        let is_heap = matches!(rmgr, rmgr::HEAP | rmgr::HEAP2 | rmgr::SEQUENCE);
        if is_heap && a.len() >= 23 && a[..23] != b[..23] {
            for (at, length, name) in TUPLE_FIELDS {
                self.field(&place, name, &a[at..at + length], &b[at..at + length]);
            }
        } else {
            let first = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(0);
            self.add(format_args!(
                "{place}byte {first} of {} is {:#04x}, expected {:#04x}",
                a.len(),
                b[first],
                a[first]
            ));
        }
    }

    fn bytes(&mut self, expected: &Page, found: &Page) {
        let differs = |at: &usize| expected[*at] != found[*at];
        let first = (0..PAGE_SIZE).find(differs).unwrap_or(0);
        let last = (0..PAGE_SIZE).rfind(differs).unwrap_or(0);
        let count = (0..PAGE_SIZE).filter(differs).count();
        self.add(format_args!(
            "{count} bytes differ from {first} to {last}; byte {first} is {:#04x}, expected {:#04x}",
            found[first], expected[first]
        ));
    }
}
