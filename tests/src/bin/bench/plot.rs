//! The comparison as bars: each link a column, each work a group, and in it the fastest reaches
//! furthest.

use crate::compare::DRIVE;
use crate::report::{Comparison, Figure, Outcome};
use std::fmt::Write;

const COLUMN: usize = 470;
const LABELS: usize = 105;
const BAR: usize = 230;
const LINE: usize = 17;
const TITLE: usize = 24;
const MARGIN: usize = 14;
const DRIVE_COLOUR: &str = "#0969da";
const OTHERS_COLOUR: &str = "#afb8c1";

/// The picture of these rows.
pub fn svg(rows: &[Comparison]) -> String {
    let mut links: Vec<&str> = rows.iter().map(|row| row.link.as_str()).collect();
    links.dedup();
    let (mut body, mut height) = (String::new(), 0);
    for (column, link) in links.iter().enumerate() {
        let x = MARGIN + column * COLUMN;
        let mut y = MARGIN + TITLE;
        text(
            &mut body,
            (x, y - 8),
            "font-weight='bold' font-size='15'",
            &format!("{link}: longer is faster"),
        );
        for row in rows.iter().filter(|row| row.link == *link) {
            y = group(&mut body, (x, y), row);
        }
        height = height.max(y);
    }
    let (width, height) = (2 * MARGIN + links.len() * COLUMN, height + MARGIN);
    format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' \
        font-family='sans-serif' font-size='12'>\n\
        <rect width='{width}' height='{height}' fill='white'/>\n{body}</svg>\n"
    )
}

/// Gives where the next one begins.
fn group(body: &mut String, (x, mut y): (usize, usize), row: &Comparison) -> usize {
    let title = format!("{}, {}", row.work, row.unit);
    text(body, (x, y + TITLE - 8), "font-weight='bold'", &title);
    y += TITLE;
    let speeds = row.systems.iter().filter_map(|outcome| speed(row, outcome.figure()?));
    let fastest = speeds.fold(f64::MIN_POSITIVE, f64::max);
    for outcome in &row.systems {
        bar(body, (x, y), row, outcome, fastest);
        y += LINE;
    }
    y
}

fn bar(
    body: &mut String,
    (x, y): (usize, usize),
    row: &Comparison,
    outcome: &Outcome,
    fastest: f64,
) {
    let figure = outcome.figure();
    // Also of the slowest there is something to see.
    let length = figure.and_then(|figure| speed(row, figure));
    let length = length.map_or(0.0, |speed| (speed / fastest * BAR as f64).max(1.0));
    let colour = if outcome.system == DRIVE { DRIVE_COLOUR } else { OTHERS_COLOUR };
    let told = figure.map_or("not measured".to_owned(), |figure| figure.short());
    let (left, baseline) = (x + LABELS, y + LINE - 5);
    text(body, (left - 6, baseline), "text-anchor='end'", &outcome.system);
    let height = LINE - 4;
    // Writing to a string does not fail.
    let _ = writeln!(
        body,
        "<rect x='{left}' y='{y}' width='{length:.1}' height='{height}' fill='{colour}'/>"
    );
    text(body, (left + length as usize + 6, baseline), "", &told);
}

/// Of figures where less is better, how often it would be done in one.
fn speed(row: &Comparison, figure: Figure) -> Option<f64> {
    let speed = if row.more_is_better() { figure.value } else { 1.0 / figure.value };
    speed.is_finite().then_some(speed)
}

fn text(body: &mut String, (x, y): (usize, usize), attributes: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let _ = writeln!(body, "<text x='{x}' y='{y}' {attributes}>{words}</text>");
}
