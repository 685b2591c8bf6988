//! Puts all mutants of a file into it, each behind a number that the environment chooses at run time.
//!
//! An expression becomes a `match` on that number. A mutant's arm is the text that cargo-mutants would make of the
//! largest expression around it without parentheses, because operators bind anew when one of them is replaced.

use crate::Mutant;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// What is called to learn the number.
const ACTIVE: &str = "crate::mutant::active()";

/// Start and end of an expression, in such an order that an outer one is before those in it.
type Place = (usize, std::cmp::Reverse<usize>);
/// Numbers of mutants, and what each makes of the expression.
type Alternatives = Vec<(u32, String)>;

/// Replacements of expressions, and what is put in at a position.
#[derive(Default)]
struct Edits {
    wraps: BTreeMap<Place, Alternatives>,
    inserts: BTreeMap<usize, String>,
}

/// Where each mutant's own text is in the woven file.
pub type Places = Vec<(Range<usize>, u32)>;

/// The woven text. `mutants` are those of this file that are wanted; what is not found stays out of `Places`.
pub fn weave(text: &str, mutants: &[Mutant]) -> Result<(String, Places)> {
    let lines = Lines::new(text);
    let mut finder = Finder {
        text,
        lines: &lines,
        by_start: BTreeMap::new(),
        edits: Edits::default(),
        chain: Vec::new(),
    };
    for mutant in mutants {
        let start = lines.offset(mutant.start.0, mutant.start.1 - 1);
        finder.by_start.entry(start).or_default().push(mutant);
    }
    for mutant in mutants.iter().filter(|mutant| mutant.genre == "FnValue") {
        let start = lines.offset(mutant.start.0, mutant.start.1 - 1);
        let Mutant { id, replacement, .. } = mutant;
        let text = format!("if {ACTIVE} == {id} {{/*<{id}*/ return {replacement}; /*{id}>*/}}\n");
        finder.edits.inserts.entry(start).or_default().push_str(&text);
    }
    let file = syn::parse_file(text).context("the file does not parse")?;
    finder.visit_file(&file);
    let mut woven = String::new();
    let wraps: Vec<_> = finder.edits.wraps.iter().collect();
    emit(text, 0..text.len(), &wraps, &mut finder.edits.inserts, &mut woven);
    // Constant functions cannot ask either, and none of them needs to be one.
    let woven = woven.replace("const fn ", "fn ");
    let places = places(&woven);
    Ok((woven, places))
}

type Wrap<'a> = (&'a Place, &'a Alternatives);

/// Writes a range with its wraps, outermost first, which are in the order of their starts.
fn emit(
    text: &str,
    range: Range<usize>,
    wraps: &[Wrap<'_>],
    inserts: &mut BTreeMap<usize, String>,
    out: &mut String,
) {
    let mut at = range.start;
    let mut rest = wraps;
    while let Some((first, others)) = rest.split_first() {
        let (start, end) = (first.0.0, first.0.1.0);
        plain(text, at..start, inserts, out);
        // Before the expression, not into it.
        out.push_str(&inserts.remove(&start).unwrap_or_default());
        let inner = others.partition_point(|wrap| wrap.0.0 < end);
        let ids: Vec<_> = first.1.iter().map(|(id, _)| format!("chosen__ != {id}")).collect();
        out.push_str(&format!("(match {ACTIVE} {{ chosen__ if {} => ", ids.join(" && ")));
        emit(text, start..end, &others[..inner], inserts, out);
        for (at, (id, alternative)) in first.1.iter().enumerate() {
            let pattern = if at + 1 == first.1.len() { "_".to_owned() } else { id.to_string() };
            out.push_str(&format!(",\n{pattern} => /*<{id}*/ {alternative} /*{id}>*/"));
        }
        out.push_str("})");
        at = end;
        rest = &others[inner..];
    }
    plain(text, at..range.end, inserts, out);
}

fn plain(text: &str, range: Range<usize>, inserts: &BTreeMap<usize, String>, out: &mut String) {
    let mut at = range.start;
    for (&place, insert) in inserts.range(range.clone()) {
        out.push_str(&text[at..place]);
        out.push_str(insert);
        at = place;
    }
    out.push_str(&text[at..range.end]);
}

/// Finds the marks that `weave` left.
fn places(woven: &str) -> Places {
    let mut found = Vec::new();
    for (at, _) in woven.match_indices("/*<") {
        let Some((id, _)) = woven[at + 3..].split_once("*/") else { continue };
        let Ok(id) = id.parse() else { continue };
        if let Some(length) = woven[at..].find(&format!("/*{id}>*/")) {
            found.push((at..at + length, id));
        }
    }
    found
}

struct Lines(Vec<usize>, Vec<String>);

impl Lines {
    fn new(text: &str) -> Lines {
        let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1));
        Lines(starts.collect(), text.split('\n').map(str::to_owned).collect())
    }

    /// Of a line from 1, and a column in characters from 0.
    fn offset(&self, line: usize, column: usize) -> usize {
        let text = &self.1[line - 1];
        let within = text.char_indices().nth(column).map_or(text.len(), |(at, _)| at);
        self.0[line - 1] + within
    }
}

struct Finder<'a> {
    text: &'a str,
    lines: &'a Lines,
    by_start: BTreeMap<usize, Vec<&'a Mutant>>,
    edits: Edits,
    /// Expressions around this one, up to the nearest parentheses.
    chain: Vec<Range<usize>>,
}

impl Finder<'_> {
    fn range(&self, node: &impl Spanned) -> Range<usize> {
        let (start, end) = (node.span().start(), node.span().end());
        self.lines.offset(start.line, start.column)..self.lines.offset(end.line, end.column)
    }

    fn of(&self, start: usize, genre: &str) -> Vec<Mutant> {
        let found = self.by_start.get(&start).into_iter().flatten();
        found.filter(|mutant| mutant.genre == genre).map(|mutant| (*mutant).clone()).collect()
    }

    fn wrap(&mut self, range: Range<usize>, id: u32, text: String) {
        let key = (range.start, std::cmp::Reverse(range.end));
        self.edits.wraps.entry(key).or_default().push((id, text));
    }

    /// Replaces a part of the expression that the chain begins with.
    fn replace(&mut self, part: Range<usize>, genre: &str) {
        let Some(top) = self.chain.first().cloned() else { return };
        for mutant in self.of(part.start, genre) {
            let before = &self.text[top.start..part.start];
            let text = format!("{before}{}{}", mutant.replacement, &self.text[part.end..top.end]);
            self.wrap(top.clone(), mutant.id, text);
        }
    }
}

fn has_let(expr: &syn::Expr) -> bool {
    match expr {
        syn::Expr::Let(_) => true,
        syn::Expr::Binary(binary) => has_let(&binary.left) || has_let(&binary.right),
        _ => false,
    }
}

fn is_link(expr: &syn::Expr) -> bool {
    use syn::Expr;
    matches!(
        expr,
        Expr::Binary(_) | Expr::Unary(_) | Expr::Cast(_) | Expr::Range(_) | Expr::Assign(_)
    ) && !has_let(expr)
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_expr(&mut self, expr: &'ast syn::Expr) {
        if !is_link(expr) {
            let outer = std::mem::take(&mut self.chain);
            visit::visit_expr(self, expr);
            self.chain = outer;
            return;
        }
        self.chain.push(self.range(expr));
        match expr {
            syn::Expr::Binary(binary) => self.replace(self.range(&binary.op), "BinaryOperator"),
            syn::Expr::Unary(unary) => self.replace(self.range(&unary.op), "UnaryOperator"),
            _ => {}
        }
        visit::visit_expr(self, expr);
        self.chain.pop();
    }

    fn visit_arm(&mut self, arm: &'ast syn::Arm) {
        let start = self.range(arm).start;
        let deleted: Vec<_> = self.of(start, "MatchArm");
        let ids: Vec<_> = deleted.iter().map(|m| format!("{ACTIVE} != {}", m.id)).collect();
        let condition = ids.join(" && ");
        if let Some((_, guard)) = &arm.guard {
            let range = self.range(&**guard);
            for mutant in self.of(range.start, "MatchArmGuard") {
                self.wrap(range.clone(), mutant.id, mutant.replacement);
            }
            if !ids.is_empty() {
                let arrow = self.range(&arm.fat_arrow_token).start;
                self.edits.inserts.entry(arrow).or_default().push_str(&format!(" && {condition} "));
            }
        } else if !ids.is_empty() {
            let arrow = self.range(&arm.fat_arrow_token).start;
            self.edits.inserts.entry(arrow).or_default().push_str(&format!("if {condition} "));
        }
        visit::visit_arm(self, arm);
    }

    fn visit_expr_struct(&mut self, expr: &'ast syn::ExprStruct) {
        let whole = self.range(expr);
        for field in &expr.fields {
            let part = self.range(field);
            for mutant in self.of(part.start, "StructField") {
                let rest = &self.text[part.end..whole.end];
                let rest = rest.trim_start().strip_prefix(',').unwrap_or(rest);
                let text = format!("{}{rest}", &self.text[whole.start..part.start]);
                self.wrap(whole.clone(), mutant.id, text);
            }
        }
        visit::visit_expr_struct(self, expr);
    }

    // A constant cannot ask which mutant it is.
    fn visit_item_const(&mut self, _: &'ast syn::ItemConst) {}
    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}
    fn visit_item_static(&mut self, _: &'ast syn::ItemStatic) {}

    // Chains do not go into or out of these.
    fn visit_block(&mut self, block: &'ast syn::Block) {
        let outer = std::mem::take(&mut self.chain);
        visit::visit_block(self, block);
        self.chain = outer;
    }
}
