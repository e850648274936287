//! Memory of devices that two processes see: who made it writes it, the other one only reads it.
//!
//! So whoever wakes up late, or has lost its way, spoils nobody's memory but its own. The *board* of a device holds the rows of
//! one layer ([`Device::publish`](crate::Device::publish)), for all peers to take theirs from; what a peer answers lies in
//! memory of that peer's.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::{ExpertRows, cell_tree::Levels};

/// Shared memory of a device that has none.
pub type NotShared = Infallible;

/// Some rows of a grouped FFN.
#[derive(Debug)]
pub enum RowsAt<'a, S> {
    /// `[R, H]` of the activation type, little-endian.
    Host(&'a [u8]),
    /// These rows of the `[.., H]` in shared memory, in the activation type.
    Shared(&'a S, &'a [u32]),
}

/// A grouped FFN whose rows and sums may lie in shared memory.
#[derive(Debug)]
pub struct GroupedSums<'a, M, S> {
    /// The rows, one part behind the other.
    pub x: &'a [RowsAt<'a, S>],
    /// Which rows go to which expert, and to which slots.
    pub experts: &'a [ExpertRows<'a, M>],
    /// Slots.
    pub slots: usize,
    /// Additions of slots once they are filled and rounded.
    pub levels: &'a Levels,
}

/// Where sums go.
#[derive(Debug)]
pub enum SumsAt<'a, S> {
    /// In place of what is there, in the activation type, little-endian.
    Host(&'a mut Vec<u8>),
    /// To the beginning of shared memory, in the activation type.
    Shared(&'a S),
}

/// Sums that are asked for.
#[derive(Debug)]
pub struct Wanted<'a, S> {
    /// Their slots, in order.
    pub slots: &'a [u32],
    /// Where they go.
    pub to: SumsAt<'a, S>,
}

/// Rows that are on the board: it takes no others until this is dropped.
#[derive(Debug)]
pub struct Published(Arc<AtomicBool>);

impl Published {
    /// Takes the board, unless it is taken.
    pub(crate) fn take(taken: &Arc<AtomicBool>) -> Option<Self> {
        (!taken.swap(true, Ordering::AcqRel)).then(|| Self(taken.clone()))
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}
