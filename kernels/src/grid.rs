//! One output shared by tasks that write to disjoint parts of it.
#![allow(unsafe_code)]

use std::{marker::PhantomData, ops::Range};

/// A row-major matrix of which several threads write disjoint parts.
pub(crate) struct Grid<'a, T> {
    base: *mut T,
    rows: usize,
    cols: usize,
    values: PhantomData<&'a mut [T]>,
}

// SAFETY: a part is a `&mut [T]` to one thread; that parts are disjoint is the contract of `part`.
unsafe impl<T: Send> Sync for Grid<'_, T> {}

impl<'a, T> Grid<'a, T> {
    /// `values [rows, cols]`
    pub(crate) fn new(values: &'a mut [T], cols: usize) -> Self {
        let rows = values.len().checked_div(cols).unwrap_or(0);
        assert_eq!(rows * cols, values.len(), "whole rows of {cols} columns");
        Self { base: values.as_mut_ptr(), rows, cols, values: PhantomData }
    }

    /// Columns `cols` of one row.
    ///
    /// # Safety
    /// No two parts that are in use at the same time may overlap.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, row: usize, cols: Range<usize>) -> &mut [T] {
        assert!(row < self.rows && cols.start <= cols.end && cols.end <= self.cols, "part of the matrix");
        // SAFETY: in bounds by the assertion; not aliased by the contract of this function.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(row * self.cols + cols.start), cols.len()) }
    }
}
