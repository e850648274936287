//! A driver that gathers launches and submits those between two copies together.
//!
//! A launch takes the processor some microseconds, as long as a small kernel runs: one by one, those of a decode step keep the
//! GPU waiting. A graph of them goes out in one call. What is queued between two dispatch points comes again in the next step,
//! mostly with the same arguments, as buffers stay where they are. So nothing is captured and no shape is told apart: launches
//! are gathered as they come, and compared with those of the same *piece* of the step before. Pieces of the same kernels become
//! a graph the second time they come; from then on the nodes that changed are set anew, and the graph is launched.
//!
//! Launches wait in the list until they are submitted by name ([`Driver::submit`]), or somebody needs their effect or what they
//! use: every other call submits first, one by one, and so does memory when it is freed.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{AnyLink, CudaError, Driver, DriverLink, EncodedMap, Launch, Launches, LibraryProduct, TensorMap};
use crate::link::{LinkEnd, Until};

/// Kinds of a piece that are kept: the same layer with rows for one kernel more or less.
const KINDS: usize = 8;
/// Launches that are gathered at most.
const LONGEST: usize = 1024;

/// A driver that has graphs of launches, each of which waits for the one before.
pub trait GraphDriver: Driver {
    /// Launches that are submitted in one call.
    type Graph: Send + 'static;

    /// A graph of these launches.
    ///
    /// # Errors
    /// When there is no such kernel, or it cannot be launched so.
    fn graph(&self, launches: &Launches) -> Result<Self::Graph, CudaError>;
    /// Puts another launch of the same kernel in the place of one, from the next [`GraphDriver::replay`] on.
    ///
    /// # Errors
    /// When it cannot be launched so.
    fn change(&self, graph: &mut Self::Graph, index: usize, launch: &Launch<'_>) -> Result<(), CudaError>;
    /// Queues a graph.
    ///
    /// # Errors
    /// When the device fails.
    fn replay(&self, graph: &Self::Graph) -> Result<(), CudaError>;
}

/// Gathers the launches of another driver.
pub struct Graphs<D: GraphDriver>(Arc<Shared<D>>);

struct Shared<D: GraphDriver> {
    queue: Mutex<Queue<D::Graph>>,
    driver: D,
}

/// What became of launches so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GraphCounts {
    /// Graphs made.
    pub graphs: usize,
    /// Pieces submitted as a graph.
    pub replays: u64,
    /// Of their launches, those that had changed.
    pub changes: u64,
    /// Launches submitted one by one.
    pub launches: u64,
}

struct Queue<G> {
    gathered: Launches,
    pieces: HashMap<u32, Vec<Known<G>>>,
    /// How many graphs there may be.
    most: usize,
    counts: GraphCounts,
    /// Of launches that were submitted because memory went.
    failure: Option<CudaError>,
}

/// A piece as it came last.
struct Known<G> {
    launches: Launches,
    /// Made when it came the second time.
    graph: Option<G>,
}

/// Memory that nobody frees while launches which use it wait.
pub struct GraphMemory<D: GraphDriver> {
    memory: D::Memory,
    shared: Arc<Shared<D>>,
}

impl<D: GraphDriver> Drop for GraphMemory<D> {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        if let Err(error) = queue.submit(&self.shared.driver, None) {
            queue.failure = Some(error);
        }
    }
}

impl<D: GraphDriver> Graphs<D> {
    /// With at most so many graphs; pieces beyond are launched one by one.
    pub fn new(driver: D, most: usize) -> Self {
        let (gathered, pieces, counts) = (Launches::default(), HashMap::new(), GraphCounts::default());
        let queue = Queue { gathered, pieces, most, counts, failure: None };
        Self(Arc::new(Shared { queue: Mutex::new(queue), driver }))
    }

    /// What became of launches so far.
    pub fn counts(&self) -> GraphCounts {
        self.0.lock().counts
    }

    /// The driver, after all that was gathered.
    fn after(&self) -> Result<&D, CudaError> {
        self.0.submit(None)?;
        Ok(&self.0.driver)
    }
}

impl<D: GraphDriver> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, Queue<D::Graph>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(&self, piece: Option<u32>) -> Result<(), CudaError> {
        let mut queue = self.lock();
        match queue.failure.take() {
            Some(error) => Err(error),
            None => queue.submit(&self.driver, piece),
        }
    }
}

impl<G> Queue<G> {
    fn submit<D: GraphDriver<Graph = G>>(&mut self, driver: &D, piece: Option<u32>) -> Result<(), CudaError> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let mut launches = std::mem::take(&mut self.gathered);
        let submitted = match piece {
            Some(piece) => self.submit_piece(driver, piece, &mut launches),
            None => self.one_by_one(driver, &launches),
        };
        launches.clear();
        self.gathered = launches;
        submitted
    }

    /// Leaves in `launches` what is not needed any more.
    fn submit_piece<D: GraphDriver<Graph = G>>(
        &mut self,
        driver: &D,
        piece: u32,
        launches: &mut Launches,
    ) -> Result<(), CudaError> {
        let kinds = self.pieces.entry(piece).or_default();
        let Some(known) = kinds.iter_mut().find(|known| known.launches.is_alike(launches)) else {
            if kinds.len() < KINDS {
                kinds.push(Known { launches: launches.clone(), graph: None });
            }
            return self.one_by_one(driver, launches);
        };
        let graph = match &mut known.graph {
            Some(graph) => {
                for index in launches.changes(&known.launches) {
                    launches.with(index, |launch| driver.change(graph, index, launch))?;
                    self.counts.changes += 1;
                }
                graph
            }
            None if self.counts.graphs == self.most => return self.one_by_one(driver, launches),
            none => {
                self.counts.graphs += 1;
                none.insert(driver.graph(launches)?)
            }
        };
        std::mem::swap(&mut known.launches, launches);
        self.counts.replays += 1;
        driver.replay(graph)
    }

    fn one_by_one<D: Driver>(&mut self, driver: &D, launches: &Launches) -> Result<(), CudaError> {
        self.counts.launches += launches.len() as u64;
        (0..launches.len()).try_for_each(|index| launches.with(index, |launch| driver.launch(launch)))
    }
}

impl<D: GraphDriver> Driver for Graphs<D> {
    type Memory = GraphMemory<D>;
    type Mark = D::Mark;
    type Copy = D::Copy;

    fn name(&self) -> String {
        self.0.driver.name()
    }

    fn chip(&self) -> &'static str {
        self.0.driver.chip()
    }

    fn multiprocessors(&self) -> usize {
        self.0.driver.multiprocessors()
    }

    fn allocate(&self, bytes: usize) -> Result<GraphMemory<D>, CudaError> {
        Ok(GraphMemory { memory: self.after()?.allocate(bytes)?, shared: self.0.clone() })
    }

    fn zero(&self, memory: &GraphMemory<D>, range: Range<usize>) -> Result<(), CudaError> {
        self.after()?.zero(&memory.memory, range)
    }

    fn upload_parts(&self, memory: &GraphMemory<D>, offset: usize, parts: &[&[u8]]) -> Result<(), CudaError> {
        self.after()?.upload_parts(&memory.memory, offset, parts)
    }

    fn fetch(&self, parts: &[(&GraphMemory<D>, Range<usize>)]) -> Result<D::Copy, CudaError> {
        let parts: Vec<_> = parts.iter().map(|(memory, range)| (&memory.memory, range.clone())).collect();
        self.after()?.fetch(&parts)
    }

    fn take(&self, copy: D::Copy, parts: &mut [&mut [u8]]) -> Result<(), CudaError> {
        self.0.driver.take(copy, parts)
    }

    fn address(&self, memory: &GraphMemory<D>) -> u64 {
        self.0.driver.address(&memory.memory)
    }

    fn tensor_map(&self, map: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        self.0.driver.tensor_map(map)
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        let mut queue = self.0.lock();
        queue.gathered.push(launch);
        if queue.gathered.len() < LONGEST { Ok(()) } else { queue.submit(&self.0.driver, None) }
    }

    fn submit(&self, piece: u32) -> Result<(), CudaError> {
        self.0.submit(Some(piece))
    }

    fn has_library(&self) -> bool {
        self.0.driver.has_library()
    }

    fn library_product(&self, product: &LibraryProduct) -> Result<(), CudaError> {
        self.after()?.library_product(product)
    }

    fn mark(&self) -> Result<D::Mark, CudaError> {
        self.after()?.mark()
    }

    fn seconds(&self, from: &D::Mark, to: &D::Mark) -> Result<f64, CudaError> {
        self.after()?.seconds(from, to)
    }

    fn export(&self, bytes: usize) -> Result<(GraphMemory<D>, Vec<u8>), CudaError> {
        let (memory, handle) = self.after()?.export(bytes)?;
        Ok((GraphMemory { memory, shared: self.0.clone() }, handle))
    }

    fn import(&self, handle: &[u8]) -> Result<(GraphMemory<D>, usize), CudaError> {
        let (memory, bytes) = self.after()?.import(handle)?;
        Ok((GraphMemory { memory, shared: self.0.clone() }, bytes))
    }

    fn download_beside(&self, memory: &GraphMemory<D>, offset: usize, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.0.driver.download_beside(&memory.memory, offset, bytes)
    }

    fn check_links(&self) -> Result<(), CudaError> {
        self.0.driver.check_links()
    }

    fn link_id(&self) -> Result<Vec<u8>, CudaError> {
        self.0.driver.link_id()
    }

    fn link<'d>(&'d self, id: &[u8], end: LinkEnd, until: &Until<'_>) -> Result<AnyLink<'d, Self>, CudaError> {
        Ok(Box::new(Beside::<D>(self.0.driver.link(id, end, until)?)))
    }
}

/// A link of the driver below: it has a queue of its own, and what it is given is there already.
struct Beside<'d, D: GraphDriver>(AnyLink<'d, D>);

impl<D: GraphDriver> DriverLink<GraphMemory<D>> for Beside<'_, D> {
    fn upload(&mut self, memory: &GraphMemory<D>, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        self.0.upload(&memory.memory, offset, bytes)
    }

    fn launch(&mut self, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.0.launch(launch)
    }

    fn send(&mut self, memory: &GraphMemory<D>, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.0.send(&memory.memory, range, until)
    }

    fn receive(&mut self, memory: &GraphMemory<D>, range: Range<usize>, until: &Until<'_>) -> Result<(), CudaError> {
        self.0.receive(&memory.memory, range, until)
    }
}

#[cfg(test)]
mod tests;
