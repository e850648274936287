//! What products in FP8 read: values in e4m3 with a scale for each row and some columns, and tensor maps of both.

use super::{
    CudaError, Driver, Element, EncodedMap,
    buffers::Growing,
    kernel::Address,
    places::Places,
    plain,
    sm90::{
        self,
        maps::{self, INPUT_ROWS},
    },
};

const MAP_BYTES: usize = size_of::<EncodedMap>();
/// Where the values begin: behind two maps for each view.
const VALUES: usize = Places::<View>::COUNT * 2 * MAP_BYTES;
/// Rows that memory is made for are a multiple of this, so that scales of one block of columns are whole 16 bytes.
const ROWS: usize = 4;

/// Some rows, and the columns that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rows {
    pub(super) count: usize,
    pub(super) inner: usize,
    pub(super) width: usize,
}

/// How kernels see the memory: elements of a row, and columns that share a scale.
type View = (usize, usize);

/// Rows in FP8.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quantised {
    /// e4m3 `[count, inner]`
    pub(super) values: Address,
    /// f32 `[ceil(inner / width), pitch]`
    pub(super) scales: Address,
    pub(super) pitch: usize,
}

/// Memory for rows in FP8. Where things lie in it depends on its size and the view, not on how many rows are in it, so that maps
/// change with the memory alone: see [`Operand`](super::operand::Operand).
#[derive(Debug)]
pub(super) struct Scaled<M> {
    memory: Growing<M>,
    views: Places<View>,
    /// What is in it.
    holds: Option<Rows>,
}

impl<M> Default for Scaled<M> {
    fn default() -> Self {
        Self { memory: Growing::default(), views: Places::default(), holds: None }
    }
}

impl Rows {
    fn view(&self) -> View {
        (self.inner, self.width)
    }

    fn blocks(&self) -> usize {
        self.inner.div_ceil(self.width)
    }

    /// Bytes of a row and its scales.
    fn row_bytes(&self) -> usize {
        self.inner + self.blocks() * size_of::<f32>()
    }

    /// Bytes of memory that has room for them.
    fn bytes(&self) -> usize {
        VALUES + self.count.next_multiple_of(ROWS) * self.row_bytes()
    }

    /// As many rows as memory of so many bytes has room for.
    fn most(&self, bytes: usize) -> usize {
        (bytes - VALUES) / self.row_bytes() / ROWS * ROWS
    }

    /// Where they lie in memory of so many bytes: the values, then the scales.
    fn at(&self, memory: Address, bytes: usize) -> Quantised {
        let (values, pitch) = (memory + VALUES as u64, self.most(bytes));
        // Values are a multiple of four bytes, but tensor maps of scales begin at one of 16.
        let scales = values + (pitch * self.inner) as u64;
        Quantised { values, scales, pitch }
    }
}

impl<M> Scaled<M> {
    /// Other values are to be rounded when they are next asked for.
    pub(super) fn forget(&mut self) {
        self.holds = None;
    }

    /// These rows of `x`, bf16 `[count, inner]`, in FP8.
    pub(super) fn of<D: Driver<Memory = M>>(
        &mut self,
        driver: &D,
        x: Address,
        rows: Rows,
    ) -> Result<Quantised, CudaError> {
        if !self.memory.suffices(rows.bytes()) {
            self.views.clear();
            self.holds = None;
        }
        let memory = driver.address(self.memory.fit(driver, rows.bytes())?);
        let at = rows.at(memory, self.memory.bytes());
        if self.holds != Some(rows) {
            quantize(driver, x, rows, at)?;
            self.holds = Some(rows);
        }
        Ok(at)
    }

    /// Where the maps of the values and of the scales of rows that are in it lie.
    pub(super) fn maps<D: Driver<Memory = M>>(&mut self, driver: &D, rows: Rows) -> Result<[Address; 2], CudaError> {
        let memory = driver.address(self.memory.fit(driver, 0)?);
        let place = match self.views.find(&rows.view()) {
            Some(place) => place,
            None => {
                let at = rows.at(memory, self.memory.bytes());
                let values = maps::rows(driver, at.values, Element::E4m3, (at.pitch, rows.inner), INPUT_ROWS)?;
                let scales = maps::scales(driver, at.scales, (rows.blocks(), at.pitch, at.pitch))?;
                let both = [&values[..], &scales].concat();
                driver.upload(self.memory.fit(driver, 0)?, self.views.next() * 2 * MAP_BYTES, &both)?;
                self.views.put(rows.view())
            }
        };
        let first = memory + (place * 2 * MAP_BYTES) as u64;
        Ok([first, first + MAP_BYTES as u64])
    }
}

/// Queues the rounding; both kernels give the same bits.
fn quantize<D: Driver>(driver: &D, x: Address, of: Rows, at: Quantised) -> Result<(), CudaError> {
    let Quantised { values: out, scales, pitch } = at;
    let (rows, inner, width, pitch) = (of.count as u32, of.inner as u32, of.width as u32, pitch as u32);
    if driver.chip() == sm90::CHIP && of.width == sm90::FP8_BLOCK && sm90::fits(of.inner) {
        return sm90::Quantize { x, out, scales, rows, inner, pitch }.launch(driver);
    }
    plain::Quantize { x, out, scales, rows, inner, width, pitch }.launch(driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_has_room_for_the_rows_that_it_was_made_for() {
        for (count, inner, width) in [(1, 7168, 128), (5, 200, 128), (4, 16, 16), (3, 7, 3), (1001, 1536, 128)] {
            let rows = Rows { count, inner, width };
            let at = rows.at(1024, rows.bytes());
            assert!(at.pitch >= count && at.pitch.is_multiple_of(ROWS));
            let end = at.scales as usize + rows.blocks() * at.pitch * size_of::<f32>() - 1024;
            assert!(end <= rows.bytes(), "{rows:?}: {end} of {} bytes", rows.bytes());
            assert!(at.scales.is_multiple_of(4), "{rows:?}");
            // What the maps for sm_90a need.
            assert!(!inner.is_multiple_of(16) || at.scales.is_multiple_of(16), "{rows:?}");
        }
    }
}
