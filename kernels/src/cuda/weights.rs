//! Weights on the CUDA device: row-major, in bf16 or FP8, and what the kernels for sm_90a must know of them.

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
use crate::{BlockScales, Dtype, Ffn, KernelError, RotaryTable, Weight, activation::to_bf16};

const MAP: usize = size_of::<EncodedMap>();
const ADDRESS: usize = size_of::<Address>();

/// One or more matrices `[rows, cols]` of bf16, one behind the other; or one in FP8 e4m3, and its scales behind it.
///
/// Which kernels serve them is decided when they are loaded, by the chip and by their shape: where `tiles` is, those for sm_90a.
#[derive(Debug)]
pub struct CudaMatrix<M> {
    memory: M,
    pub(super) address: Address,
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Of a matrix in FP8.
    pub(super) scales: Option<Scales>,
    pub(super) tiles: Option<Tiles>,
    paired: Mutex<Option<Paired>>,
}

/// The scales of a matrix in FP8.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales {
    /// f32 `[ceil(rows / block.0), ceil(cols / block.1)]`
    pub(super) address: Address,
    /// The address of the scales, in memory.
    pub(super) list: Address,
    /// Rows and columns of a block.
    pub(super) block: (usize, usize),
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

/// Where things lie behind the matrices: scales, maps, addresses of maps and of scales, then the map of a gate with its up and its
/// address. Offsets.
struct Layout {
    scales: usize,
    maps: usize,
    list: usize,
    scales_list: usize,
    pair: usize,
    end: usize,
}

impl Layout {
    /// Of `count` matrices, so many bytes in all, and of their scales.
    fn new(count: usize, bytes: usize, scale_bytes: usize) -> Self {
        let scales = bytes.next_multiple_of(ADDRESS);
        let maps = (scales + scale_bytes).next_multiple_of(MAP);
        let list = maps + count * MAP;
        let scales_list = list + count * ADDRESS;
        let pair = (scales_list + ADDRESS).next_multiple_of(MAP);
        Self { scales, maps, list, scales_list, pair, end: pair + MAP + ADDRESS }
    }
}

impl<M> CudaMatrix<M> {
    /// Takes matrices of one shape over, in bf16: those in FP8 are widened.
    pub(super) fn load<D: Driver<Memory = M>>(driver: &D, weights: &[Weight<'_>]) -> Result<Self, KernelError> {
        let (rows, cols) = weights.first().map_or((0, 0), Weight::shape);
        assert!(weights.iter().all(|weight| weight.shape() == (rows, cols)), "matrices of {rows} x {cols}");
        let bytes = rows * cols * Dtype::Bf16.size();
        let fast = driver.chip() == sm90::CHIP && rows > 0 && sm90::fits(cols) && weights.len() <= sm90::GROUPS;
        let layout = Layout::new(weights.len(), bytes * weights.len(), 0);
        let memory = driver.allocate(if fast { layout.end } else { bytes * weights.len() })?;
        for (index, weight) in weights.iter().enumerate() {
            let mut wide = Vec::new();
            driver.upload(&memory, index * bytes, &row_major(&weight.widen(&mut wide)?))?;
        }
        let (address, count, paired) = (driver.address(&memory), weights.len(), Mutex::default());
        let mut matrix = Self { memory, address, count, rows, cols, scales: None, tiles: None, paired };
        if fast {
            matrix.tiles = Some(matrix.describe(driver, &layout)?);
        }
        Ok(matrix)
    }

    /// Takes a matrix over as it is: in FP8 where it is so. A transposed one, and one that begins within a block, is widened.
    pub(super) fn load_as_it_is<D: Driver<Memory = M>>(driver: &D, weight: Weight<'_>) -> Result<Self, KernelError> {
        match weight.scales {
            Some(scales) if !weight.transposed && scales.skipped == 0 => Self::load_fp8(driver, &weight, &scales),
            _ => Self::load(driver, &[weight]),
        }
    }

    fn load_fp8<D: Driver<Memory = M>>(
        driver: &D,
        weight: &Weight<'_>,
        scales: &BlockScales<'_>,
    ) -> Result<Self, KernelError> {
        weight.check()?;
        let (rows, cols, block) = (weight.rows, weight.cols, scales.block);
        let layout = Layout::new(1, weight.data.len(), scales.data.len());
        let memory = driver.allocate(layout.end)?;
        let address = driver.address(&memory);
        let place = |offset: usize| address + offset as u64;
        driver.upload(&memory, 0, weight.data)?;
        driver.upload(&memory, layout.scales, scales.data)?;
        driver.upload(&memory, layout.scales_list, &place(layout.scales).to_le_bytes())?;
        let scales = Some(Scales { address: place(layout.scales), list: place(layout.scales_list), block });
        let mut matrix = Self { memory, address, count: 1, rows, cols, scales, tiles: None, paired: Mutex::default() };
        if driver.chip() == sm90::CHIP && rows > 0 && sm90::fits_fp8(cols, block) {
            matrix.tiles = Some(matrix.describe(driver, &layout)?);
        }
        Ok(matrix)
    }

    /// Rows and columns of a block, if the matrix is in FP8. It decides, with `tiles`, which kernels serve it.
    pub(super) fn block(&self) -> Option<(usize, usize)> {
        self.scales.map(|scales| scales.block)
    }

    fn element(&self) -> Element {
        if self.scales.is_some() { Element::E4m3 } else { Element::Bf16 }
    }

    fn matrix_bytes(&self) -> usize {
        self.rows * self.cols * self.element().size()
    }

    fn scale_bytes(&self) -> usize {
        let of = |(rows, cols)| self.rows.div_ceil(rows) * self.cols.div_ceil(cols) * Dtype::F32.size();
        self.block().map_or(0, of)
    }

    /// Makes the maps.
    fn describe<D: Driver<Memory = M>>(&self, driver: &D, layout: &Layout) -> Result<Tiles, CudaError> {
        let tiles = Tiles { map: self.address + layout.maps as u64, list: self.address + layout.list as u64 };
        let mut all = Vec::with_capacity(self.count * (MAP + ADDRESS));
        for index in 0..self.count {
            let at = self.address + (index * self.matrix_bytes()) as u64;
            all.extend(maps::rows(driver, at, self.element(), (self.rows, self.cols), TILE_ROWS)?);
        }
        (0..self.count).for_each(|index| all.extend((tiles.map + (index * MAP) as u64).to_le_bytes()));
        driver.upload(&self.memory, layout.maps, &all)?;
        Ok(tiles)
    }

    /// This gate with its up, if the kernels for sm_90a serve them: `map` then is an entry of the list of a gated product.
    fn with_up<D: Driver<Memory = M>>(&self, driver: &D, up: &Self) -> Result<Option<Tiles>, CudaError> {
        assert_eq!((up.rows, up.cols), (self.rows, self.cols), "up of a gate");
        if self.tiles.is_none() || self.block() != up.block() || !sm90::fits(self.rows) {
            return Ok(None);
        }
        let mut paired = self.paired.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = paired.filter(|known| known.up == up.address) {
            return Ok(Some(known.tiles));
        }
        let at = Layout::new(self.count, self.count * self.matrix_bytes(), self.scale_bytes()).pair;
        let both = [self.address, up.address];
        let (map, exchanged) = maps::pair(driver, both, self.element(), (self.rows, self.cols))?;
        let place = self.address + at as u64;
        let tiles = Tiles { map: place + u64::from(exchanged), list: place + MAP as u64 };
        driver.upload(&self.memory, at, &[&map[..], &tiles.map.to_le_bytes()].concat())?;
        *paired = Some(Paired { up: up.address, tiles });
        Ok(Some(tiles))
    }

    /// Of the weights and their scales.
    pub(super) fn bytes(&self) -> usize {
        self.count * self.matrix_bytes() + self.scale_bytes()
    }
}

/// Where the kernels for sm_90a find a SwiGLU block: gate with up, and down, each in bf16 or FP8. None if the plain kernels serve it.
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
