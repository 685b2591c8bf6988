//! Failure zones of safekeepers: what may fail together.

use anyhow::{Result, ensure};
use pgstrata_ids::check_branch_name;

use crate::cluster::SafekeeperPlace;

/// Longest name, in bytes.
const LONGEST: usize = 63;

/// A zone's name, as an argument.
pub fn parse(text: &str) -> Result<String, String> {
    match check_branch_name(text) {
        Ok(()) if text.len() <= LONGEST && !text.contains('/') => Ok(text.to_owned()),
        _ => Err(format!(
            "'{text}' is no zone's name (use letters, digits, '-', '_' and '.', at most {LONGEST}, a \
             letter or digit first)"
        )),
    }
}

/// Zones of the safekeepers of a new cluster, in their order: one for each, or as they are `asked` for.
pub fn of_new(count: usize, asked: &[String]) -> Result<Vec<String>> {
    if asked.is_empty() {
        // At most 15.
        return Ok((b'a'..).take(count).map(|at| format!("zone-{}", char::from(at))).collect());
    }
    ensure!(
        asked.len() == count,
        "{} zones were named for {count} safekeepers: name one for each, in their order",
        asked.len()
    );
    Ok(asked.to_vec())
}

/// What a cluster's zones do not protect from: without one of them nothing is committed. Where there are no zones, or only
/// one safekeeper, nothing was promised.
pub fn warning(safekeepers: &[SafekeeperPlace]) -> Option<String> {
    warning_of(&Vec::from_iter(safekeepers.iter().map(|place| place.zone.as_str())))
}

/// The same of the zones of each safekeeper.
pub fn warning_of(zones: &[&str]) -> Option<String> {
    let count = zones.len();
    let majority = count / 2 + 1;
    let of = |zone: &str| zones.iter().filter(|other| **other == zone).count();
    let mut crowded = zones.iter().copied().filter(|zone| !zone.is_empty() && of(zone) >= majority);
    let zone = crowded.next().filter(|_| count > 1)?;
    Some(format!(
        "{} of {count} safekeepers are in zone '{zone}': while it is down, nothing can be committed, and what \
         was committed may be lost with it",
        of(zone)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warned(zones: &[&str]) -> bool {
        let place = |zone: &&str| SafekeeperPlace {
            id: 1,
            zone: (*zone).to_owned(),
            wal: 1,
            pg: 2,
            http: 3,
            started: true,
            joins_for: None,
        };
        warning(&zones.iter().map(place).collect::<Vec<_>>()).is_some()
    }

    #[test]
    fn a_majority_in_one_zone_is_warned_of() {
        for (zones, expected) in [
            (&["a", "b", "c"][..], false),
            (&["a", "b", "b"], true),
            (&["a", "a", "a"], true),
            (&["a", "a", "b", "b"], false),
            (&["a", "a", "b", "b", "c"], false),
            (&["a", "a", "a", "b", "c"], true),
            (&["", "a", "a"], true),
            (&["a"], false),
            (&["", "", ""], false),
            (&["", "", "a"], false),
            (&[], false),
        ] {
            assert_eq!(warned(zones), expected, "{zones:?}");
        }
    }

    #[test]
    fn zones_are_named_for_each_safekeeper() {
        assert_eq!(of_new(3, &[]).unwrap(), ["zone-a", "zone-b", "zone-c"]);
        assert_eq!(of_new(15, &[]).unwrap()[14], "zone-o");
        let asked = ["a", "b", "a"].map(str::to_owned);
        assert_eq!(of_new(3, &asked).unwrap(), asked);
        assert!(of_new(5, &asked).unwrap_err().to_string().contains("3 zones were named for 5"));
        assert_eq!(parse("eu-west-1a").unwrap(), "eu-west-1a");
        for bad in ["", "a b", "a/b", "-a", "ä", &"a".repeat(64)] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
