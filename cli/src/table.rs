//! Listings for people.

use anyhow::Result;
use serde_json::Value;

use crate::out;

fn cell(row: &Value, column: &str) -> String {
    match row.get(column) {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

/// Prints the columns of the rows, aligned.
pub fn print(columns: &[&str], rows: &[Value]) -> Result<()> {
    lines(columns, rows).iter().try_for_each(|line| out::line(line))
}

/// A line of titles, and one for each row.
pub fn lines(columns: &[&str], rows: &[Value]) -> Vec<String> {
    let mut lines: Vec<Vec<String>> =
        vec![columns.iter().map(|name| name.to_uppercase()).collect()];
    lines.extend(rows.iter().map(|row| columns.iter().map(|column| cell(row, column)).collect()));
    let width =
        |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or_default();
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let padded = lines.iter().map(|row| {
        let cells: Vec<_> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    });
    padded.collect()
}
