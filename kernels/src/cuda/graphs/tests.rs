use super::*;
use crate::cuda::Arg;

/// Notes what is done. Its memories and copies are numbers; kernel "broken" cannot be launched.
#[derive(Default)]
struct Noted {
    log: Mutex<Vec<String>>,
    graphs: Mutex<usize>,
}

impl Noted {
    fn note(&self, line: String) -> Result<(), CudaError> {
        self.log.lock().unwrap().push(line);
        Ok(())
    }
}

fn describe(launch: &Launch<'_>) -> String {
    let arguments: Vec<String> = launch.arguments.iter().map(|argument| format!("{}", argument.bytes()[0])).collect();
    format!("{}({})x{}", launch.kernel, arguments.join(" "), launch.grid[0])
}

impl Driver for &'static Noted {
    type Memory = usize;
    type Mark = ();
    type Copy = ();

    fn name(&self) -> String {
        "noted".to_owned()
    }

    fn chip(&self) -> &'static str {
        "sm_80"
    }

    fn multiprocessors(&self) -> usize {
        1
    }

    fn allocate(&self, bytes: usize) -> Result<usize, CudaError> {
        self.note(format!("allocate {bytes}"))?;
        Ok(bytes)
    }

    fn zero(&self, memory: &usize, _: Range<usize>) -> Result<(), CudaError> {
        self.note(format!("zero {memory}"))
    }

    fn upload_parts(&self, memory: &usize, _: usize, _: &[&[u8]]) -> Result<(), CudaError> {
        self.note(format!("upload {memory}"))
    }

    fn fetch(&self, parts: &[(&usize, Range<usize>)]) -> Result<(), CudaError> {
        self.note(format!("fetch {}", parts[0].0))
    }

    fn take(&self, (): (), _: &mut [&mut [u8]]) -> Result<(), CudaError> {
        self.note("take".to_owned())
    }

    fn address(&self, memory: &usize) -> u64 {
        *memory as u64
    }

    fn tensor_map(&self, _: &TensorMap<'_>) -> Result<EncodedMap, CudaError> {
        Ok([0; size_of::<EncodedMap>()])
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), CudaError> {
        if launch.kernel == "broken" {
            return Err(CudaError::Launch { kernel: "broken".to_owned(), detail: "it is".to_owned() });
        }
        self.note(describe(launch))
    }

    fn mark(&self) -> Result<(), CudaError> {
        self.note("mark".to_owned())
    }

    fn seconds(&self, (): &(), (): &()) -> Result<f64, CudaError> {
        Ok(0.0)
    }
}

impl GraphDriver for &'static Noted {
    type Graph = usize;

    fn graph(&self, launches: &Launches) -> Result<usize, CudaError> {
        let mut graphs = self.graphs.lock().unwrap();
        *graphs += 1;
        let all: Vec<String> = (0..launches.len()).map(|index| launches.with(index, describe)).collect();
        self.note(format!("graph {graphs} = {}", all.join(" ")))?;
        Ok(*graphs)
    }

    fn change(&self, graph: &mut usize, index: usize, launch: &Launch<'_>) -> Result<(), CudaError> {
        self.note(format!("change {graph}.{index} = {}", describe(launch)))
    }

    fn replay(&self, graph: &usize) -> Result<(), CudaError> {
        self.note(format!("replay {graph}"))
    }
}

struct Rig {
    noted: &'static Noted,
    graphs: Graphs<&'static Noted>,
}

impl Rig {
    fn new(most: usize) -> Self {
        let noted: &'static Noted = Box::leak(Box::default());
        Self { noted, graphs: Graphs::new(noted, most) }
    }

    fn launch(&self, kernel: &'static str, argument: u32, blocks: u32) {
        let arguments = &[Arg::U32(argument)];
        self.graphs.launch(&Launch { kernel, grid: [blocks, 1, 1], block: [1, 1, 1], shared: 0, arguments }).unwrap();
    }

    /// What was done since the last time.
    fn log(&self) -> Vec<String> {
        std::mem::take(&mut *self.noted.log.lock().unwrap())
    }
}

#[test]
fn a_piece_becomes_a_graph_when_it_comes_again() {
    let rig = Rig::new(10);
    let piece = |argument, blocks| {
        rig.launch("a", 1, 1);
        rig.launch("b", argument, blocks);
        rig.graphs.submit(7).unwrap();
        rig.log()
    };
    assert_eq!(piece(1, 1), ["a(1)x1", "b(1)x1"]);
    assert_eq!(piece(2, 1), ["graph 1 = a(1)x1 b(2)x1", "replay 1"]);
    assert_eq!(piece(2, 1), ["replay 1"], "nothing has changed");
    assert_eq!(piece(2, 4), ["change 1.1 = b(2)x4", "replay 1"]);
    assert_eq!(piece(3, 4), ["change 1.1 = b(3)x4", "replay 1"]);
    assert_eq!(piece(3, 4), ["replay 1"]);
}

#[test]
fn other_kernels_or_another_name_make_another_piece() {
    let rig = Rig::new(2);
    let piece = |name, kernels: &[&'static str]| {
        kernels.iter().for_each(|kernel| rig.launch(kernel, 1, 1));
        rig.graphs.submit(name).unwrap();
        rig.log()
    };
    for _ in 0..2 {
        piece(1, &["a"]);
        piece(1, &["a", "b"]);
    }
    assert_eq!(piece(1, &["a"]), ["replay 1"]);
    assert_eq!(piece(1, &["a", "b"]), ["replay 2"]);
    for _ in 0..3 {
        assert_eq!(piece(2, &["a"]), ["a(1)x1"], "there are as many graphs as there may be");
    }
    assert!(piece(2, &[]).is_empty());
}

#[test]
fn what_waits_goes_out_before_anything_that_may_need_it() {
    let rig = Rig::new(10);
    let (graphs, memory) = (&rig.graphs, rig.graphs.allocate(8).unwrap());
    rig.log();
    let before = |call: &dyn Fn() -> Result<(), CudaError>| {
        rig.launch("a", 1, 1);
        assert!(rig.log().is_empty(), "it waits");
        call().unwrap();
        rig.log()
    };
    assert_eq!(before(&|| graphs.allocate(16).map(std::mem::forget)), ["a(1)x1", "allocate 16"]);
    assert_eq!(before(&|| graphs.zero(&memory, 0..8)), ["a(1)x1", "zero 8"]);
    assert_eq!(before(&|| graphs.upload(&memory, 0, &[1])), ["a(1)x1", "upload 8"]);
    assert_eq!(before(&|| graphs.fetch(&[(&memory, 0..8)])), ["a(1)x1", "fetch 8"]);
    assert_eq!(before(&|| graphs.mark()), ["a(1)x1", "mark"]);
    rig.launch("a", 1, 1);
    drop(memory);
    assert_eq!(rig.log(), ["a(1)x1"], "before its memory is freed");
    (0..LONGEST).for_each(|_| rig.launch("a", 1, 1));
    assert_eq!(rig.log().len(), LONGEST, "no longer list is kept");
}

#[test]
fn what_went_wrong_while_memory_was_freed_is_said_next() {
    let rig = Rig::new(10);
    let memory = rig.graphs.allocate(8).unwrap();
    rig.launch("broken", 1, 1);
    drop(memory);
    assert!(rig.graphs.mark().unwrap_err().to_string().contains("kernel broken: it is"));
    rig.launch("broken", 1, 1);
    assert!(rig.graphs.submit(1).unwrap_err().to_string().contains("kernel broken: it is"));
    rig.graphs.mark().unwrap();
}
