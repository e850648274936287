//! The cells that a shard holds: their experts' weights on the device.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use conclave_dispatch::ModelShape;
use conclave_kernels::{Device, Ffn};
use conclave_model::{Checkpoint, Progress, names};
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

/// Takes cells over from a checkpoint into a device.
pub(crate) struct Loader<'a, D> {
    device: &'a D,
    checkpoint: &'a Checkpoint,
    progress: &'a Progress,
    done: u64,
    total: u64,
}

impl<'a, D: Device> Loader<'a, D> {
    /// `total`: bytes that will be read, for the progress.
    pub(crate) fn new(device: &'a D, checkpoint: &'a Checkpoint, progress: &'a Progress, total: u64) -> Self {
        Self { device, checkpoint, progress, done: 0, total }
    }

    /// Loads one cell: nothing but the tensors of its experts is read.
    pub(crate) fn cell(&mut self, shape: &ModelShape, id: CellId) -> Result<Cell<D::Matrix>, ExpertError> {
        let size = shape.group_size();
        let first = id.group.index() * size;
        let mut layers = Vec::with_capacity(shape.moe.len());
        for (layer, moe) in shape.moe.iter().enumerate() {
            let experts = if *moe { first..first + size } else { 0..0 };
            layers.push(experts.map(|expert| self.expert(id, layer, expert)).collect::<Result<Vec<_>, _>>()?);
        }
        let bytes = layers.iter().flatten().map(|ffn| self.device_bytes(ffn)).sum();
        let (rows, busy_us) = (AtomicU64::new(0), AtomicU64::new(0));
        Ok(Cell { id, first_expert: first as u32, layers, bytes, rows, busy_us })
    }

    /// Loads one expert and lets the file's pages go.
    pub(crate) fn expert(&mut self, cell: CellId, layer: usize, expert: usize) -> Result<Ffn<D::Matrix>, ExpertError> {
        let names = names::layer(layer).expert(expert);
        Ok(Ffn {
            gate: self.matrix(cell, names.gate_proj())?,
            up: self.matrix(cell, names.up_proj())?,
            down: self.matrix(cell, names.down_proj())?,
        })
    }

    fn matrix(&mut self, cell: CellId, tensor: String) -> Result<D::Matrix, ExpertError> {
        let weight = self.checkpoint.weight(&tensor).map_err(|source| ExpertError::Tensor { cell, source })?;
        self.done += weight.data.len() as u64;
        let loaded = self.device.load_matrix(weight);
        self.checkpoint.release(&tensor);
        self.progress.report(self.done, self.total);
        loaded.map_err(|source| ExpertError::Device { cell, tensor, source })
    }

    fn device_bytes(&self, ffn: &Ffn<D::Matrix>) -> u64 {
        [&ffn.gate, &ffn.up, &ffn.down].into_iter().map(|matrix| self.device.matrix_bytes(matrix) as u64).sum()
    }
}
