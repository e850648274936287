//! The cells that a shard holds: their experts' weights on the device.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use conclave_dispatch::ModelShape;
use conclave_kernels::{Device, Ffn};
use conclave_model::names::{self, FfnNames};
use conclave_model::{Checkpoint, Loading, Progress};
use conclave_proto::CellId;

use crate::error::ExpertError;

/// One cell on the device.
pub(crate) struct Cell<M> {
    pub(crate) id: CellId,
    first_expert: u32,
    /// By absolute layer; the experts of the group, ascending. Empty where the layer is dense.
    layers: Vec<Vec<Ffn<M>>>,
    /// Of the weights on the device.
    pub(crate) bytes: u64,
    pub(crate) rows: AtomicU64,
    pub(crate) busy_us: AtomicU64,
}

impl<M> Cell<M> {
    pub(crate) fn expert(&self, layer: u32, expert: u32) -> Option<&Ffn<M>> {
        self.layers.get(layer as usize)?.get(expert.checked_sub(self.first_expert)? as usize)
    }
}

/// The cells held at one moment, by group.
pub(crate) struct Cells<M> {
    by_group: Vec<Option<Arc<Cell<M>>>>,
}

impl<M> Clone for Cells<M> {
    fn clone(&self) -> Self {
        Self { by_group: self.by_group.clone() }
    }
}

impl<M> Cells<M> {
    pub(crate) fn new(groups: usize) -> Self {
        Self { by_group: (0..groups).map(|_| None).collect() }
    }

    pub(crate) fn get(&self, group: u32) -> Option<&Arc<Cell<M>>> {
        self.by_group.get(group as usize)?.as_ref()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Cell<M>>> {
        self.by_group.iter().flatten()
    }

    pub(crate) fn ids(&self) -> Vec<CellId> {
        self.iter().map(|cell| cell.id).collect()
    }

    pub(crate) fn with(&self, cells: Vec<Cell<M>>) -> Self {
        let mut all = self.clone();
        for cell in cells {
            let group = cell.id.group.index();
            all.by_group[group] = Some(Arc::new(cell));
        }
        all
    }

    pub(crate) fn without(&self, ids: &[CellId]) -> Self {
        let keep = |cell: &Arc<Cell<M>>| !ids.contains(&cell.id);
        Self { by_group: self.by_group.iter().map(|cell| cell.clone().filter(keep)).collect() }
    }
}

/// Checks that the model has these cells.
pub(crate) fn check_ids(shape: &ModelShape, ids: &[CellId]) -> Result<(), ExpertError> {
    let wrong = ids.iter().find(|id| id.span != 0 || id.group.index() >= shape.groups);
    wrong.map_or(Ok(()), |cell| Err(ExpertError::NoSuchCell { cell: *cell, last: shape.groups - 1 }))
}

/// Takes cells over from a checkpoint into a device: nothing but the tensors of their experts is read, layer by layer, as
/// they lie in the files.
///
/// # Errors
/// Names the cell and the tensor that is missing or refused by the device.
pub(crate) fn load<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    progress: &Progress,
    shape: &ModelShape,
    ids: &[CellId],
) -> Result<Vec<Cell<D::Matrix>>, ExpertError> {
    let mut cells: Vec<Cell<D::Matrix>> = ids.iter().map(|id| Cell::empty(*id, shape)).collect();
    let layers: Vec<usize> = (0..shape.moe.len()).filter(|layer| shape.moe[*layer]).collect();
    let experts = layers.iter().flat_map(|layer| cells.iter().flat_map(move |cell| cell.names(*layer, shape)));
    let order: Vec<String> = experts.flat_map(|names| tensors(&names)).collect();
    let mut loader = Loader { device, loading: Loading::new(checkpoint, progress, order) };
    for layer in layers {
        for cell in &mut cells {
            let names = cell.names(layer, shape);
            cell.layers[layer] = names.map(|names| loader.expert(cell.id, &names)).collect::<Result<_, _>>()?;
        }
    }
    for cell in &mut cells {
        cell.bytes = cell.layers.iter().flatten().map(|ffn| bytes(device, ffn)).sum();
    }
    Ok(cells)
}

/// Takes one expert over.
///
/// # Errors
/// As for [`load`].
pub(crate) fn load_expert<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    cell: CellId,
    names: &FfnNames,
) -> Result<Ffn<D::Matrix>, ExpertError> {
    let progress = Progress::default();
    Loader { device, loading: Loading::new(checkpoint, &progress, tensors(names)) }.expert(cell, names)
}

impl<M> Cell<M> {
    fn empty(id: CellId, shape: &ModelShape) -> Self {
        Self {
            id,
            first_expert: (id.group.index() * shape.group_size()) as u32,
            layers: shape.moe.iter().map(|_| Vec::new()).collect(),
            bytes: 0,
            rows: AtomicU64::new(0),
            busy_us: AtomicU64::new(0),
        }
    }

    /// Names of its experts in a layer, ascending.
    fn names(&self, layer: usize, shape: &ModelShape) -> impl Iterator<Item = FfnNames> + use<M> {
        let first = self.first_expert as usize;
        (first..first + shape.group_size()).map(move |expert| names::layer(layer).expert(expert))
    }
}

/// In the order in which they are loaded.
fn tensors(names: &FfnNames) -> [String; 3] {
    [names.gate_proj(), names.up_proj(), names.down_proj()]
}

fn bytes<D: Device>(device: &D, ffn: &Ffn<D::Matrix>) -> u64 {
    [&ffn.gate, &ffn.up, &ffn.down].into_iter().map(|matrix| device.matrix_bytes(matrix) as u64).sum()
}

struct Loader<'a, D> {
    device: &'a D,
    loading: Loading<'a>,
}

impl<D: Device> Loader<'_, D> {
    fn expert(&mut self, cell: CellId, names: &FfnNames) -> Result<Ffn<D::Matrix>, ExpertError> {
        let [gate, up, down] = tensors(names);
        Ok(Ffn { gate: self.matrix(cell, gate)?, up: self.matrix(cell, up)?, down: self.matrix(cell, down)? })
    }

    fn matrix(&mut self, cell: CellId, tensor: String) -> Result<D::Matrix, ExpertError> {
        let weight = self.loading.weight(&tensor).map_err(|source| ExpertError::Tensor { cell, source })?;
        let loaded = self.device.load_matrix(weight);
        self.loading.taken_over(&tensor);
        loaded.map_err(|source| ExpertError::Device { cell, tensor, source })
    }
}
