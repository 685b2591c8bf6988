//! Services of a cluster, what they say of themselves, and their zones.

use std::collections::BTreeMap;

use super::finding::{Finding, Severity};
use crate::zones;

const CHECK: &str = "services";
const ZONES: &str = "zones";

/// What a service is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Says where the others are.
    Broker,
    /// Keeps WAL.
    Safekeeper,
    /// Keeps pages.
    Pageserver,
    /// Runs PostgreSQL.
    Compute,
}

/// What is seen of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It does not run.
    Down,
    /// It runs, or should, and does not answer.
    Silent,
    /// It runs where we don't see it, such as in another container.
    Unseen,
    /// It answers.
    Answers,
}

/// A service.
#[derive(Clone, Debug)]
pub struct Service {
    /// Its name.
    pub object: String,
    /// What it is there for.
    pub role: Role,
    /// What is seen of it.
    pub state: State,
    /// What it can't serve.
    pub damage: Option<String>,
    /// What else is wrong with it; of one that does not answer, why it is said not to.
    pub trouble: Option<String>,
}

impl Service {
    /// How it is seen that it is.
    fn says(&self, starts: &str) -> (Severity, String) {
        // Without it no branch is made and no compute starts.
        let away = if self.role == Role::Pageserver { Severity::Danger } else { Severity::Warning };
        let why = self.trouble.as_deref().map(|why| format!(" ({why})")).unwrap_or_default();
        match (self.state, &self.damage, &self.trouble) {
            (State::Down, ..) => (away, format!("it does not run{why}: {starts}")),
            (State::Silent, ..) => (
                away,
                format!("it does not answer{why}: see its log, or end its process, and {starts}"),
            ),
            (State::Unseen, ..) => {
                let text =
                    "not looked at: it runs in another container or process namespace; look there";
                (Severity::Unknown, text.to_owned())
            }
            (State::Answers, Some(damage), _) => {
                let text = format!("{damage}: what it has is not to be counted on");
                (Severity::Danger, text)
            }
            (State::Answers, None, Some(trouble)) => (Severity::Warning, trouble.clone()),
            (State::Answers, None, None) => {
                (Severity::Ok, "it answers, and says of nothing that it failed".to_owned())
            }
        }
    }

    fn is_well(&self) -> bool {
        self.state == State::Answers && self.damage.is_none()
    }
}

/// Services, and whether those that there are can commit. `starts` says what starts one.
pub fn check(services: &[Service], starts: &str) -> Vec<Finding> {
    if services.iter().all(|service| service.state == State::Down) {
        let text = format!("nothing of it runs: {starts}");
        return vec![Finding::new(CHECK, "cluster", Severity::Warning, &text)];
    }
    let finding = |service: &Service| {
        let (severity, text) = service.says(starts);
        Finding::new(CHECK, &service.object, severity, &text)
    };
    services.iter().map(finding).collect()
}

/// Whether branches of a local cluster have a majority of their members, where anything of it runs: of each by its name, and how
/// many members it has and how many of them are well, if that is known. Which process is a member of what differs by branch; where
/// nobody says who the members of any are, all safekeepers are.
pub fn check_majorities(
    services: &[Service],
    branches: &[(String, Option<(usize, usize)>)],
) -> Vec<Finding> {
    let of_all = check_majority(services);
    if of_all.is_none() || branches.iter().all(|(_, counted)| counted.is_none()) {
        return Vec::from_iter(of_all);
    }
    let all = services.iter().filter(|service| service.role == Role::Safekeeper).count();
    let mut alike: BTreeMap<Option<(usize, usize)>, Vec<&str>> = BTreeMap::new();
    for (name, counted) in branches {
        alike.entry(*counted).or_default().push(name);
    }
    let is_one = alike.len() == 1;
    let finding = |(counted, names): (Option<(usize, usize)>, Vec<&str>)| {
        let object = match names.as_slice() {
            [] => return None,
            [name] => format!("branch {name}"),
            [name, rest @ ..] => format!("branch {name} and {} more", rest.len()),
        };
        Some(match counted {
            // What is to be said of each is to be said of the cluster.
            Some((count, well)) if is_one && count == all => majority("safekeepers", count, well),
            Some((count, well)) => majority(&object, count, well),
            None => {
                let text = "not looked at: no safekeeper that answers says who its members are";
                Finding::new(CHECK, &object, Severity::Unknown, text)
            }
        })
    };
    alike.into_iter().filter_map(finding).collect()
}

/// Whether there is a majority of all safekeepers.
fn check_majority(services: &[Service]) -> Option<Finding> {
    let safekeepers: Vec<_> =
        services.iter().filter(|service| service.role == Role::Safekeeper).collect();
    let is_at_rest = services.iter().all(|service| service.state == State::Down);
    // Of those that can't be seen nothing is known.
    let is_unseen = safekeepers.iter().any(|service| service.state == State::Unseen);
    let (count, well) =
        (safekeepers.len(), safekeepers.iter().filter(|service| service.is_well()).count());
    (count > 0 && !is_at_rest && !is_unseen).then(|| majority("safekeepers", count, well))
}

/// Whether so many of a branch's members are a majority.
pub fn majority(object: &str, count: usize, well: usize) -> Finding {
    let said = format!("{well} of {count} safekeepers are well");
    if well > count / 2 {
        let spare = well - (count / 2 + 1);
        let text = format!("{said}: {spare} more may fail");
        // Of one alone no more was promised.
        let severity = if spare == 0 && count > 1 { Severity::Warning } else { Severity::Ok };
        return Finding::new(CHECK, object, severity, &text);
    }
    let text = format!(
        "{said}, which is no majority: nothing can be committed, no compute starts, and what is committed last is out of reach. \
         Bring back those that are away, with their directories"
    );
    Finding::new(CHECK, object, Severity::Danger, &text)
}

/// Zones of safekeepers, by their names.
pub fn check_zones(safekeepers: &[(String, String)]) -> Vec<Finding> {
    // One alone is in no zone with others.
    if safekeepers.len() < 2 {
        return Vec::new();
    }
    let zones = Vec::from_iter(safekeepers.iter().map(|(_, zone)| zone.as_str()));
    let mut found = Vec::new();
    if let Some(warning) = zones::warning_of(&zones) {
        found.push(Finding::new(
            ZONES,
            "safekeepers",
            Severity::Warning,
            &format!("{warning}: put them into more zones"),
        ));
    }
    for (object, _) in safekeepers.iter().filter(|(_, zone)| zone.is_empty()) {
        let text = "it says no zone, so that nobody knows what it fails with: give it one (--zone)";
        found.push(Finding::new(ZONES, object, Severity::Warning, text));
    }
    if found.is_empty() {
        found.push(Finding::new(
            ZONES,
            "safekeepers",
            Severity::Ok,
            "no zone has a majority of them",
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn branches_are_judged_by_their_members() {
        let all = [State::Down, State::Down, State::Answers]
            .map(|state| service(Role::Safekeeper, state));
        let said = |branches: &[(&str, Option<(usize, usize)>)]| {
            let branches: Vec<_> =
                branches.iter().map(|(name, counted)| ((*name).to_owned(), *counted)).collect();
            let found = check_majorities(&all, &branches).into_iter();
            found.map(|one| (one.object, one.severity)).collect::<Vec<_>>()
        };
        let of = |object: &str, severity| (object.to_owned(), severity);
        use Severity::{Danger, Ok, Unknown};
        // One that goes on with the only one that is there is well, whatever else does not run.
        assert_eq!(said(&[("main", Some((1, 1)))]), [of("branch main", Ok)]);
        assert_eq!(said(&[("main", Some((3, 1)))]), [of("safekeepers", Danger)]);
        assert_eq!(said(&[("new", None)]), [of("safekeepers", Danger)]);
        assert_eq!(
            said(&[("a", Some((1, 1))), ("b", Some((3, 1))), ("c", None), ("d", Some((3, 1)))]),
            [of("branch c", Unknown), of("branch a", Ok), of("branch b and 1 more", Danger)]
        );
    }

    fn service(role: Role, state: State) -> Service {
        let object = format!("{role:?}").to_lowercase();
        Service { object, role, state, damage: None, trouble: None }
    }

    fn severity(service: Service) -> Severity {
        check(&[service, self::service(Role::Broker, State::Answers)], "start it")[0].severity
    }

    #[test]
    fn a_service_is_as_it_is_seen() {
        use Severity::{Danger, Ok, Unknown, Warning};
        for (role, state, expected) in [
            (Role::Safekeeper, State::Answers, Ok),
            (Role::Safekeeper, State::Down, Warning),
            (Role::Safekeeper, State::Silent, Warning),
            (Role::Safekeeper, State::Unseen, Unknown),
            (Role::Pageserver, State::Down, Danger),
            (Role::Pageserver, State::Silent, Danger),
            (Role::Compute, State::Silent, Warning),
            (Role::Broker, State::Down, Warning),
        ] {
            assert_eq!(severity(service(role, state)), expected, "{role:?} {state:?}");
        }
        let mut one = service(Role::Safekeeper, State::Answers);
        one.trouble = Some("its archive does not answer".to_owned());
        assert_eq!(severity(one.clone()), Warning);
        one.damage = Some("WAL is damaged".to_owned());
        assert_eq!(severity(one), Danger);
    }

    #[test]
    fn a_cluster_at_rest_is_one_line() {
        let down = [Role::Broker, Role::Safekeeper, Role::Pageserver]
            .map(|role| service(role, State::Down));
        let found = check(&down, "'pgstrata up' starts it");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].severity, Severity::Warning);
        assert_eq!(found[0].text, "nothing of it runs: 'pgstrata up' starts it");
        assert_eq!(check_majorities(&down, &[("main".to_owned(), Some((1, 0)))]), []);
    }

    #[test]
    fn without_a_majority_nothing_is_committed() {
        use State::{Answers, Down, Silent, Unseen};
        for (states, expected) in [
            (&[Answers, Answers, Answers][..], Some(Severity::Ok)),
            (&[Answers, Answers, Down], Some(Severity::Warning)),
            (&[Answers, Down, Silent], Some(Severity::Danger)),
            (&[Answers, Answers, Down, Down], Some(Severity::Danger)),
            (&[Answers], Some(Severity::Ok)),
            (&[Answers, Unseen, Unseen], None),
            (&[], None),
        ] {
            let safekeepers = states.iter().map(|state| service(Role::Safekeeper, *state));
            let all: Vec<_> = safekeepers.chain([service(Role::Broker, Answers)]).collect();
            assert_eq!(check_majority(&all).map(|found| found.severity), expected, "{states:?}");
        }
        // One that is damaged is not counted.
        let mut all = vec![service(Role::Safekeeper, Answers); 3];
        all[0].damage = Some("rot".to_owned());
        let found = check_majority(&all).unwrap();
        assert_eq!(
            (found.severity, found.text.as_str()),
            (Severity::Warning, "2 of 3 safekeepers are well: 0 more may fail")
        );
    }

    #[test]
    fn zones_are_looked_at_where_there_are_several_safekeepers() {
        let check = |zones: &[&str]| {
            let named = zones
                .iter()
                .enumerate()
                .map(|(at, zone)| (format!("safekeeper-{}", at + 1), (*zone).to_owned()));
            let found = check_zones(&Vec::from_iter(named));
            found.into_iter().map(|one| (one.severity, one.object)).collect::<Vec<_>>()
        };
        let all = || "safekeepers".to_owned();
        use Severity::{Ok, Warning};
        assert_eq!(check(&["a", "b", "c"]), [(Ok, all())]);
        assert_eq!(check(&["a", "b", "b"]), [(Warning, all())]);
        assert_eq!(check(&["a", "", "b"]), [(Warning, "safekeeper-2".to_owned())]);
        let each = [(Warning, "safekeeper-1".to_owned()), (Warning, "safekeeper-2".to_owned())];
        assert_eq!(check(&["", ""]), each);
        assert_eq!((check(&[""]), check(&[])), (vec![], vec![]));
    }
}
