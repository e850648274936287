//! Columns that stay aligned in a given width.

use super::{Ink, Style};

/// Between two columns.
const GAP: usize = 2;
/// No column is cut to fewer characters.
const LEAST: usize = 8;

/// One value of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cell {
    text: String,
    ink: Ink,
}

impl Cell {
    /// A value in a colour.
    pub fn new(text: impl Into<String>, ink: Ink) -> Self {
        Self { text: text.into(), ink }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, Ink::Plain)
    }
}

/// How the values of a column stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column {
    title: &'static str,
    right: bool,
    shrinks: bool,
}

impl Column {
    /// Text, on the left.
    pub fn text(title: &'static str) -> Self {
        Self { title, right: false, shrinks: false }
    }

    /// Text of which the middle may be left out where the table is too wide.
    pub fn long(title: &'static str) -> Self {
        Self { title, right: false, shrinks: true }
    }

    /// Numbers, on the right.
    pub fn number(title: &'static str) -> Self {
        Self { title, right: true, shrinks: false }
    }
}

#[derive(Debug, Clone)]
enum Line {
    Cells(Vec<Cell>),
    /// Across all columns.
    Heading(Cell),
}

/// Rows under titles.
#[derive(Debug, Clone)]
pub struct Table {
    columns: Vec<Column>,
    lines: Vec<Line>,
}

impl Table {
    /// A table without rows.
    pub fn new(columns: impl Into<Vec<Column>>) -> Self {
        Self { columns: columns.into(), lines: Vec::new() }
    }

    /// Adds a row: one value a column; those left out are empty.
    pub fn row(&mut self, cells: impl Into<Vec<Cell>>) {
        self.lines.push(Line::Cells(cells.into()));
    }

    /// Adds a line that goes across the columns.
    pub fn heading(&mut self, heading: impl Into<Cell>) {
        self.lines.push(Line::Heading(heading.into()));
    }

    /// The lines of the table, cut to `width` where columns can be cut.
    pub fn render(&self, width: usize, style: Style) -> String {
        let widths = self.widths(width);
        let titles: Vec<Cell> = self.columns.iter().map(|column| Cell::new(column.title, Ink::Dim)).collect();
        let mut text = self.line(&titles, &widths, style);
        for line in &self.lines {
            match line {
                Line::Cells(cells) => text.push_str(&self.line(cells, &widths, style)),
                Line::Heading(cell) => {
                    text.push_str(&style.paint(cell.ink, &cell.text));
                    text.push('\n');
                }
            }
        }
        text
    }

    /// The width of each column; the widest that may be cut is, until all fit or nothing can be cut any more.
    fn widths(&self, width: usize) -> Vec<usize> {
        let mut widths: Vec<usize> = self.columns.iter().map(|column| column.title.chars().count()).collect();
        for line in &self.lines {
            let Line::Cells(cells) = line else { continue };
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let gaps = GAP * widths.len().saturating_sub(1);
        while widths.iter().sum::<usize>() + gaps > width {
            let may_shrink = |index: &usize| self.columns[*index].shrinks && widths[*index] > LEAST;
            let Some(widest) = (0..widths.len()).filter(may_shrink).max_by_key(|index| widths[*index]) else { break };
            widths[widest] -= 1;
        }
        widths
    }

    fn line(&self, cells: &[Cell], widths: &[usize], style: Style) -> String {
        let mut text = String::new();
        let mut blanks = 0;
        for ((column, cell), width) in self.columns.iter().zip(cells).zip(widths) {
            let shown = cut(&cell.text, *width);
            let free = width.saturating_sub(shown.chars().count());
            let (before, after) = if column.right { (free, 0) } else { (0, free) };
            if !shown.is_empty() {
                text.push_str(&" ".repeat(blanks + before));
                text.push_str(&style.paint(cell.ink, &shown));
                blanks = after + GAP;
            } else {
                blanks += width + GAP;
            }
        }
        text.push('\n');
        text
    }
}

/// The text in at most `width` characters, its middle left out.
fn cut(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return text.to_owned();
    }
    let kept = width.saturating_sub(1);
    let start: String = text.chars().take(kept.div_ceil(2)).collect();
    let end: String = text.chars().skip(length - kept / 2).collect();
    format!("{start}…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(name: &str) -> Table {
        let mut table = Table::new([Column::long("NAME"), Column::number("N"), Column::text("STATE")]);
        table.heading("all");
        table.row([name.into(), "12,345".into(), "ok".into()]);
        table.row(["b".into(), "1".into(), Cell::new("", Ink::Bad)]);
        table.row(["c".into(), "".into(), "x".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_without_blanks_at_the_end() {
        let expected = "NAME       N  STATE\nall\na     12,345  ok\nb          1\nc             x\n";
        assert_eq!(table("a").render(80, Style::PLAIN), expected);
    }

    #[test]
    fn a_table_that_is_too_wide_loses_the_middle_of_long_columns() {
        let text = table("expert-in-the-second-rack").render(30, Style::PLAIN);
        assert!(text.lines().all(|line| line.chars().count() <= 30), "{text}");
        assert!(text.contains("expert-…nd-rack") || text.contains("expert-i…d-rack"), "{text}");
        let narrow = table("expert-in-the-second-rack").render(5, Style::PLAIN);
        assert!(narrow.contains("12,345  ok"), "numbers stay whole: {narrow}");
    }

    #[test]
    fn cutting_keeps_both_ends() {
        assert_eq!(
            (cut("abcdef", 6), cut("abcdef", 4), cut("äöüß", 3)),
            ("abcdef".into(), "ab…f".into(), "ä…ß".into())
        );
        assert_eq!((cut("ab", 1), cut("ab", 0)), ("…".into(), "…".into()));
    }
}
