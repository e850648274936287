//! Graphs of launches on a GPU.

use std::{ptr, sync::Arc};

use cudarc::driver::{
    DriverError, result,
    sys::{self, CUDA_KERNEL_NODE_PARAMS, CUgraph, CUgraphExec, CUgraphNode},
};

use super::{
    CudaError, Gpu, GraphDriver, Launch, Launches,
    gpu::{Device, device, failed, pointers},
};

/// A chain of launches, ready to be submitted.
pub struct GpuGraph {
    device: Arc<Device>,
    _template: Template,
    executable: CUgraphExec,
    nodes: Vec<CUgraphNode>,
}

// SAFETY: handles that the CUDA driver lets any thread use, one at a time.
unsafe impl Send for GpuGraph {}

/// What an executable graph is made from; its nodes name those of the executable one.
struct Template(CUgraph);

impl Drop for Template {
    fn drop(&mut self) {
        // SAFETY: not used any more. What cannot be destroyed goes with the context.
        let _ = unsafe { result::graph::destroy(self.0) };
    }
}

impl Template {
    fn new() -> Result<Self, DriverError> {
        let mut graph = ptr::null_mut();
        // SAFETY: writes the handle.
        unsafe { sys::cuGraphCreate(&mut graph, 0) }.result()?;
        Ok(Self(graph))
    }

    /// Appends a launch behind `before`.
    fn append(&self, gpu: &Gpu, launch: &Launch<'_>, before: Option<&CUgraphNode>) -> Result<CUgraphNode, CudaError> {
        let mut node = ptr::null_mut();
        let dependencies = before.map_or(ptr::null(), ptr::from_ref);
        gpu.with_parameters(launch, |parameters| {
            // SAFETY: a graph and a node of it that live; the driver copies the arguments before it returns.
            unsafe {
                sys::cuGraphAddKernelNode_v2(&mut node, self.0, dependencies, usize::from(before.is_some()), parameters)
            }
            .result()
        })?;
        Ok(node)
    }
}

impl Gpu {
    /// Does something with a launch in the form that nodes have.
    fn with_parameters(
        &self,
        launch: &Launch<'_>,
        work: impl FnOnce(&CUDA_KERNEL_NODE_PARAMS) -> Result<(), DriverError>,
    ) -> Result<(), CudaError> {
        let mut arguments = pointers(launch);
        let ([x, y, z], [tx, ty, tz]) = (launch.grid, launch.block);
        let parameters = CUDA_KERNEL_NODE_PARAMS {
            func: self.function(launch)?,
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: tx,
            blockDimY: ty,
            blockDimZ: tz,
            sharedMemBytes: launch.shared,
            kernelParams: arguments.as_mut_ptr(),
            extra: ptr::null_mut(),
            kern: ptr::null_mut(),
            ctx: ptr::null_mut(),
        };
        work(&parameters).map_err(|error| failed(launch.kernel, &error))
    }
}

impl GraphDriver for Gpu {
    type Graph = GpuGraph;

    fn graph(&self, launches: &Launches) -> Result<GpuGraph, CudaError> {
        self.device.bind()?;
        let graph = Template::new().map_err(|error| device("make a graph", &error))?;
        let mut nodes = Vec::with_capacity(launches.len());
        for index in 0..launches.len() {
            nodes.push(launches.with(index, |launch| graph.append(self, launch, nodes.last()))?);
        }
        // SAFETY: a graph that lives.
        let executable = unsafe { result::graph::instantiate(graph.0, sys::CUgraphInstantiate_flags(0)) }
            .map_err(|error| device("make a graph executable", &error))?;
        Ok(GpuGraph { device: self.device.clone(), _template: graph, executable, nodes })
    }

    fn change(&self, graph: &mut GpuGraph, index: usize, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.device.bind()?;
        let (executable, node) = (graph.executable, graph.nodes[index]);
        self.with_parameters(launch, |parameters| {
            // SAFETY: an executable graph and its node; the driver copies the arguments before it returns. Runs of the graph
            // that are queued keep theirs.
            unsafe { sys::cuGraphExecKernelNodeSetParams_v2(executable, node, parameters) }.result()
        })
    }

    fn replay(&self, graph: &GpuGraph) -> Result<(), CudaError> {
        self.device.bind()?;
        // SAFETY: an executable graph and a stream that live.
        unsafe { result::graph::launch(graph.executable, self.device.stream.cu_stream()) }
            .map_err(|error| device("launch a graph", &error))
    }
}

impl Drop for GpuGraph {
    fn drop(&mut self) {
        if self.device.context.bind_to_thread().is_err() || self.device.stream.synchronize().is_err() {
            return;
        }
        // SAFETY: no run of it is left. The template goes next, with the context bound.
        let _ = unsafe { result::graph::exec_destroy(self.executable) };
    }
}
