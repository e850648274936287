//! How results are shown to people: tables, fields, units, colours.

mod fields;
mod style;
mod table;
pub mod units;

pub use fields::{fields, together};
pub use style::{Ink, Style};
pub use table::{Cell, Column, Table};

use std::io::{self, ErrorKind, Write};

/// Columns of a terminal that nobody has made wider.
pub const WIDTH: usize = 80;

/// Writes text to stdout. False where nobody reads it any more, as after `head`: that is no error.
///
/// # Errors
/// When it cannot be written.
pub fn stdout(text: &str) -> io::Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        ended => ended.map(|()| true),
    }
}
