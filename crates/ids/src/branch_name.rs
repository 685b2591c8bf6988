//! Which names a branch may have.

use std::fmt;

/// Longest name, in bytes.
pub const MAX_BRANCH_NAME: usize = 100;

/// A text that names no branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchNameError(String);

impl fmt::Display for BranchNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "'{}' is no branch name (use letters, digits, '-', '_', '.' and '/', at most \
             {MAX_BRANCH_NAME}, a letter or digit first, and no '..')",
            self.0
        )
    }
}

impl std::error::Error for BranchNameError {}

/// Refuses what can't be a branch's name. Names also become names of directories, with another character for '/': none
/// that is let through is empty, hidden, or means a directory above.
pub fn check_branch_name(name: &str) -> Result<(), BranchNameError> {
    let valid = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    match first && name.len() <= MAX_BRANCH_NAME && name.chars().all(valid) && !name.contains("..")
    {
        true => Ok(()),
        false => Err(BranchNameError(name.chars().take(2 * MAX_BRANCH_NAME).collect())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_names_of_directories() {
        let long = "a".repeat(MAX_BRANCH_NAME);
        for good in ["main", "a/b", "1.2-3_4", &long] {
            assert_eq!(check_branch_name(good), Ok(()), "{good}");
        }
        let longer = "a".repeat(MAX_BRANCH_NAME + 1);
        for bad in ["", ".", "..", "a/..", "../a", ".bin", "/a", "-a", "a b", "a%b", "é", &longer]
        {
            assert!(check_branch_name(bad).is_err(), "{bad}");
        }
    }
}
