//! Taking tensors over into a device: read ahead, used, let go, counted.

use conclave_kernels::Weight;

use crate::{Checkpoint, ModelError, Progress};

/// Bytes that are asked of storage ahead of those in use: several large reads are under way while tensors are packed.
const AHEAD: u64 = 256 << 20;

/// Tensors on their way into a device. Their pages become resident while they are used, and no longer.
#[derive(Debug)]
pub struct Loading<'a> {
    checkpoint: &'a Checkpoint,
    progress: &'a Progress,
    /// All of them, in the order in which they are used.
    order: Vec<(String, u64)>,
    /// How many of them storage has been asked for, and their bytes.
    asked: (usize, u64),
    ahead: u64,
    done: u64,
    total: u64,
}

impl<'a> Loading<'a> {
    /// `order`: the tensors that will be used, about in that order. Names that the checkpoint does not have are refused
    /// when they are used.
    pub fn new(checkpoint: &'a Checkpoint, progress: &'a Progress, order: impl IntoIterator<Item = String>) -> Self {
        let sized = |name: String| Some((checkpoint.bytes_of(&name)?, name)).map(|(bytes, name)| (name, bytes));
        let order: Vec<(String, u64)> = order.into_iter().filter_map(sized).collect();
        let total = order.iter().map(|(_, bytes)| bytes).sum();
        Self { checkpoint, progress, order, asked: (0, 0), ahead: AHEAD, done: 0, total }
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &'a Checkpoint {
        self.checkpoint
    }

    /// A tensor to be used; see [`Checkpoint::weight`].
    ///
    /// # Errors
    /// When there is no such tensor or it has other dimensions.
    pub fn weight(&mut self, name: &str) -> Result<Weight<'a>, ModelError> {
        self.read_ahead();
        self.checkpoint.weight(name)
    }

    /// A tensor of one dimension, as f32: at once taken over.
    ///
    /// # Errors
    /// When there is no such tensor or it has other dimensions.
    pub fn vector(&mut self, name: &str) -> Result<Vec<f32>, ModelError> {
        let vector = self.checkpoint.vector(name)?;
        self.taken_over(name);
        Ok(vector)
    }

    /// A tensor has been taken over: its pages go, and it counts as done.
    pub fn taken_over(&mut self, name: &str) {
        self.checkpoint.release(name);
        self.done += self.checkpoint.bytes_of(name).unwrap_or(0);
        self.progress.report(self.done, self.total);
    }

    fn read_ahead(&mut self) {
        let (next, bytes) = &mut self.asked;
        while *bytes < self.done + self.ahead
            && let Some((name, size)) = self.order.get(*next)
        {
            self.checkpoint.will_need(name);
            *next += 1;
            *bytes += size;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::testing::{self, small};

    #[test]
    fn every_tensor_counts_and_is_asked_for_before_it_is_used() {
        let dir = tempfile::tempdir().unwrap();
        testing::write(dir.path(), &small(), &testing::tensors(&small()));
        let checkpoint = Checkpoint::open(dir.path().to_str().unwrap()).unwrap();
        let names: Vec<String> = checkpoint.tensors().map(|tensor| tensor.name.to_owned()).collect();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = seen.clone();
        let progress = Progress::new(move |done, total| sink.lock().unwrap().push((done, total)));

        let order = names.iter().cloned().chain(["no such tensor".to_owned()]);
        let mut loading = Loading { ahead: 100, ..Loading::new(&checkpoint, &progress, order) };
        for (used, name) in names.iter().enumerate() {
            let before = checkpoint.weight(name).unwrap();
            assert_eq!(loading.weight(name).unwrap().data, before.data);
            let (asked, bytes) = loading.asked;
            assert!(asked > used, "{name} was not asked for");
            let last = checkpoint.bytes_of(&names[asked - 1]).unwrap();
            assert!(bytes - last < loading.done + 100, "{name}: asked for {bytes} bytes at {}", loading.done);
            loading.taken_over(name);
        }
        assert!(matches!(loading.weight("no such tensor"), Err(ModelError::NoSuchTensor { .. })));
        let seen = seen.lock().unwrap();
        assert!(seen.is_sorted() && seen.len() == names.len());
        assert_eq!(*seen.last().unwrap(), (checkpoint.total_bytes(), checkpoint.total_bytes()));
    }

    #[test]
    fn a_vector_is_taken_over_at_once() {
        let dir = tempfile::tempdir().unwrap();
        testing::write(dir.path(), &small(), &testing::tensors(&small()));
        let checkpoint = Checkpoint::open(dir.path().to_str().unwrap()).unwrap();
        let (norm, progress) = (crate::names::final_norm(), Progress::default());
        let mut loading = Loading::new(&checkpoint, &progress, [norm.clone()]);
        assert_eq!(loading.vector(&norm).unwrap(), checkpoint.vector(&norm).unwrap());
        assert_eq!((loading.done, loading.total), (16, 16));
    }
}
