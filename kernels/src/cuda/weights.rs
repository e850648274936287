//! Weights on the CUDA device: row-major, in bf16, and what the kernels for sm_90a must know of them.

use std::{
    borrow::Cow,
    sync::{Mutex, PoisonError},
};

use super::{
    CudaError, Driver, Element, EncodedMap,
    kernel::Address,
    sm90::{
        self,
        maps::{self, TILE_ROWS},
    },
};
use crate::{Dtype, Ffn, KernelError, RotaryTable, Weight, activation::to_bf16};

const MAP: usize = size_of::<EncodedMap>();
const ADDRESS: usize = size_of::<Address>();

/// One or more matrices `[rows, cols]` of bf16, one behind the other.
///
/// Which kernels serve them is decided when they are loaded, by the chip and by their shape: where `tiles` is, those for sm_90a.
#[derive(Debug)]
pub struct CudaMatrix<M> {
    memory: M,
    pub(super) address: Address,
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) tiles: Option<Tiles>,
    paired: Mutex<Option<Paired>>,
}

/// Where the kernels for sm_90a find weights: a map, and its address, for each matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    /// The first map.
    pub(super) map: Address,
    /// Addresses `[count]` of the maps.
    pub(super) list: Address,
}

/// The map of a gate with its up. It is made when the two first come together, which is before any launch that reads it is
/// queued; then it stays as it is, for an [`Ffn`] holds both.
#[derive(Debug, Clone, Copy)]
struct Paired {
    up: Address,
    tiles: Tiles,
}

/// Where things lie behind the matrices: maps, their addresses, then the map of a gate with its up and its address. Offsets.
struct Layout {
    maps: usize,
    list: usize,
    pair: usize,
    end: usize,
}

impl Layout {
    fn new(bytes: usize, count: usize) -> Self {
        let maps = bytes.next_multiple_of(MAP);
        let list = maps + count * MAP;
        let pair = (list + count * ADDRESS).next_multiple_of(MAP);
        Self { maps, list, pair, end: pair + MAP + ADDRESS }
    }
}

impl<M> CudaMatrix<M> {
    /// Takes matrices of one shape over.
    pub(super) fn load<D: Driver<Memory = M>>(driver: &D, weights: &[Weight<'_>]) -> Result<Self, KernelError> {
        let (rows, cols) = weights.first().map_or((0, 0), Weight::shape);
        assert!(weights.iter().all(|weight| weight.shape() == (rows, cols)), "matrices of {rows} x {cols}");
        let bytes = rows * cols * Dtype::Bf16.size();
        let fast = driver.chip() == sm90::CHIP && rows > 0 && sm90::fits(cols) && weights.len() <= sm90::GROUPS;
        let layout = Layout::new(bytes * weights.len(), weights.len());
        let memory = driver.allocate(if fast { layout.end } else { bytes * weights.len() })?;
        for (index, weight) in weights.iter().enumerate() {
            weight.check()?;
            driver.upload(&memory, index * bytes, &row_major(weight))?;
        }
        let (address, count, paired) = (driver.address(&memory), weights.len(), Mutex::default());
        let mut matrix = Self { memory, address, count, rows, cols, tiles: None, paired };
        if fast {
            matrix.tiles = Some(matrix.describe(driver, &layout)?);
        }
        Ok(matrix)
    }

    /// Makes the maps.
    fn describe<D: Driver<Memory = M>>(&self, driver: &D, layout: &Layout) -> Result<Tiles, CudaError> {
        let bytes = self.rows * self.cols * Dtype::Bf16.size();
        let tiles = Tiles { map: self.address + layout.maps as u64, list: self.address + layout.list as u64 };
        let mut all = Vec::with_capacity(self.count * (MAP + ADDRESS));
        for index in 0..self.count {
            let at = self.address + (index * bytes) as u64;
            all.extend(maps::rows(driver, at, Element::Bf16, (self.rows, self.cols), TILE_ROWS)?);
        }
        (0..self.count).for_each(|index| all.extend((tiles.map + (index * MAP) as u64).to_le_bytes()));
        driver.upload(&self.memory, layout.maps, &all)?;
        Ok(tiles)
    }

    /// This gate with its up, if the kernels for sm_90a serve them: `map` then is an entry of the list of a gated product.
    fn with_up<D: Driver<Memory = M>>(&self, driver: &D, up: &Self) -> Result<Option<Tiles>, CudaError> {
        assert_eq!((up.rows, up.cols), (self.rows, self.cols), "up of a gate");
        if self.tiles.is_none() || !sm90::fits(self.rows) {
            return Ok(None);
        }
        let mut paired = self.paired.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = paired.filter(|known| known.up == up.address) {
            return Ok(Some(known.tiles));
        }
        let at = Layout::new(self.bytes(), self.count).pair;
        let both = [self.address, up.address];
        let (map, exchanged) = maps::pair(driver, both, Element::Bf16, (self.rows, self.cols))?;
        let place = self.address + at as u64;
        let tiles = Tiles { map: place + u64::from(exchanged), list: place + MAP as u64 };
        driver.upload(&self.memory, at, &[&map[..], &tiles.map.to_le_bytes()].concat())?;
        *paired = Some(Paired { up: up.address, tiles });
        Ok(Some(tiles))
    }

    pub(super) fn bytes(&self) -> usize {
        self.count * self.rows * self.cols * Dtype::Bf16.size()
    }
}

/// Where the kernels for sm_90a find a SwiGLU block: gate with up, and down. None if the plain kernels serve it.
pub(super) fn block<D: Driver>(
    driver: &D,
    ffn: &Ffn<CudaMatrix<D::Memory>>,
) -> Result<Option<(Tiles, Tiles)>, CudaError> {
    Ok(ffn.gate.with_up(driver, &ffn.up)?.zip(ffn.down.tiles))
}

/// The matrix wanted, row by row in bf16.
fn row_major<'a>(weight: &Weight<'a>) -> Cow<'a, [u8]> {
    if weight.dtype == Dtype::Bf16 && !weight.transposed {
        return Cow::Borrowed(weight.data);
    }
    let stored = |index: usize| -> u16 {
        match weight.dtype {
            Dtype::F32 => to_bf16(f32::from_le_bytes(weight.data.as_chunks().0[index])),
            Dtype::Bf16 => u16::from_le_bytes(weight.data.as_chunks().0[index]),
        }
    };
    let (rows, cols) = weight.shape();
    let at = |row: usize, col: usize| if weight.transposed { col * rows + row } else { row * cols + col };
    let elements = (0..rows).flat_map(|row| (0..cols).map(move |col| at(row, col)));
    Cow::Owned(elements.flat_map(|index| stored(index).to_le_bytes()).collect())
}

/// Cosines, then sines.
#[derive(Debug)]
pub struct CudaRotary<M> {
    _memory: M,
    pub(super) cos: Address,
    pub(super) sin: Address,
}

impl<M> CudaRotary<M> {
    pub(super) fn load<D: Driver<Memory = M>>(driver: &D, table: &RotaryTable) -> Result<Self, CudaError> {
        let (cos, sin): (&[u8], &[u8]) = (bytemuck::cast_slice(&table.cos), bytemuck::cast_slice(&table.sin));
        let memory = driver.allocate(cos.len() + sin.len())?;
        driver.upload(&memory, 0, cos)?;
        driver.upload(&memory, cos.len(), sin)?;
        let address = driver.address(&memory);
        Ok(Self { _memory: memory, cos: address, sin: address + cos.len() as u64 })
    }
}
