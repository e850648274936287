//! What products read: values in bf16, for the kernels for sm_90a tensor maps of them, and for products in FP8 these values
//! rounded once more.

use std::ops::Range;

use super::{
    CudaError, Driver, Element, EncodedMap,
    buffers::Growing,
    kernel::Address,
    places::Places,
    scaled::{Quantised, Rows, Scaled},
    sm90::maps::{self, INPUT_ROWS, TILE_ROWS},
};
use crate::Dtype;

const MAP_BYTES: usize = size_of::<EncodedMap>();
/// Where the values begin.
const VALUES: usize = Places::<View>::COUNT * MAP_BYTES;

/// How a kernel sees the values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// The input of a product: rows of so many elements.
    Rows(usize),
    /// Inputs of products of heads: rows of so many heads, of so many elements each.
    Heads(usize, usize),
    /// Queries of attention: rows of so many elements.
    Queries(usize),
}

impl View {
    /// The map of as many whole rows as there are among `values` elements.
    fn map<D: Driver>(self, driver: &D, address: Address, values: usize) -> Result<EncodedMap, CudaError> {
        let rows = |inner: usize, tile| maps::rows(driver, address, Element::Bf16, (values / inner, inner), tile);
        match self {
            Self::Rows(inner) => rows(inner, INPUT_ROWS),
            Self::Queries(inner) => rows(inner, TILE_ROWS),
            Self::Heads(heads, inner) => maps::heads(driver, address, (values / (heads * inner), heads, inner)),
        }
    }
}

/// Values in bf16 that operations write and read again.
///
/// Maps lie before the values, in the same memory, and are of all of it, however much of it holds values: so they change with
/// the memory alone. (A tile then holds leftovers behind the last row, of which the kernels store nothing.) Replaced memory
/// takes its maps along when it is freed, which waits for the launches that read them. A view more than there are places takes the place of the
/// first: its map is uploaded into the queue, behind all launches that read the one before, which whoever asked for that one
/// has queued before letting go of the operand.
#[derive(Debug)]
pub(super) struct Operand<M> {
    memory: Growing<M>,
    views: Places<View>,
    /// The values in FP8, once a product has asked for them.
    scaled: Scaled<M>,
}

impl<M> Default for Operand<M> {
    fn default() -> Self {
        Self { memory: Growing::default(), views: Places::default(), scaled: Scaled::default() }
    }
}

impl<M> Operand<M> {
    /// Where so many elements are to be written.
    pub(super) fn fit<D: Driver<Memory = M>>(&mut self, driver: &D, elements: usize) -> Result<Address, CudaError> {
        self.scaled.forget();
        self.room(driver, elements)
    }

    /// Has room for so many elements, which may be anything; where they begin.
    fn room<D: Driver<Memory = M>>(&mut self, driver: &D, elements: usize) -> Result<Address, CudaError> {
        let bytes = VALUES + elements * Dtype::Bf16.size();
        if !self.memory.suffices(bytes) {
            self.views.clear();
        }
        Ok(driver.address(self.memory.fit(driver, bytes)?) + VALUES as u64)
    }

    /// Where the elements begin, to be read. There is memory, or it means nothing.
    pub(super) fn address<D: Driver<Memory = M>>(&mut self, driver: &D) -> Result<Address, CudaError> {
        self.room(driver, 0)
    }

    /// The elements that were written last, in FP8: rounded when they are first asked for, and again only if other rows are.
    pub(super) fn scaled<D: Driver<Memory = M>>(&mut self, driver: &D, rows: Rows) -> Result<Quantised, CudaError> {
        let values = self.room(driver, 0)?;
        self.scaled.of(driver, values, rows)
    }

    /// Where the maps of these elements in FP8, and of their scales, lie; they have been asked for.
    pub(super) fn scaled_maps<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        rows: Rows,
    ) -> Result<[Address; 2], CudaError> {
        self.scaled(driver, rows)?;
        self.scaled.maps(driver, rows)
    }

    /// Where the map of a view lies.
    pub(super) fn map<D: Driver<Memory = M>>(&mut self, driver: &D, view: View) -> Result<Address, CudaError> {
        let values = self.room(driver, 0)?;
        let maps = values - VALUES as u64;
        let place = match self.views.find(&view) {
            Some(place) => place,
            None => {
                let elements = (self.memory.bytes() - VALUES) / Dtype::Bf16.size();
                let map = view.map(driver, values, elements)?;
                driver.upload(self.memory.fit(driver, 0)?, self.views.next() * MAP_BYTES, &map)?;
                self.views.put(view)
            }
        };
        Ok(maps + (place * MAP_BYTES) as u64)
    }

    /// Writes from the beginning on.
    pub(super) fn upload<D: Driver<Memory = M>>(&mut self, driver: &D, bytes: &[u8]) -> Result<(), CudaError> {
        self.scaled.forget();
        driver.upload(self.memory.fit(driver, 0)?, VALUES, bytes)
    }

    /// Its memory, and where in it the first elements lie.
    pub(super) fn values<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        elements: usize,
    ) -> Result<(&M, Range<usize>), CudaError> {
        self.room(driver, elements)?;
        Ok((self.memory.fit(driver, 0)?, VALUES..VALUES + elements * Dtype::Bf16.size()))
    }

    /// Waits, then copies from the beginning on.
    pub(super) fn download<D: Driver<Memory = M>>(&mut self, driver: &D, bytes: &mut [u8]) -> Result<(), CudaError> {
        driver.download(self.memory.fit(driver, 0)?, VALUES, bytes)
    }
}
