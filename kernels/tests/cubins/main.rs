//! The real CUDA compiler takes every kernel, for every chip, and keeps all its variables in registers.
//!
//! Needs the compiler, not a GPU: `CUDA_HOME` names it. Without it the test prints `SKIP`, or fails under `REQUIRE_NVCC=1`.

#[path = "../../build/nvcc.rs"]
mod nvcc;
#[path = "../../build/sources.rs"]
mod sources;

use std::{
    env,
    io::{self, Write},
    path::{Path, PathBuf},
    sync::Mutex,
};

use nvcc::Cubin;

/// ptxas refuses what it warns about, spilled registers among that, and says what each kernel takes.
const OPTIONS: [&str; 1] = ["-Xptxas=-Werror,-warn-spills,-v"];

fn compiler() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").filter(|home| !home.is_empty());
    let nvcc = home.as_ref().map(|home| nvcc::nvcc(Path::new(home)));
    if let Some(nvcc) = nvcc.filter(|nvcc| nvcc.exists()) {
        return Some(nvcc);
    }
    let why = format!("no CUDA compiler in CUDA_HOME ({home:?}); deploy/install-cuda-compiler.sh installs one");
    assert!(env::var("REQUIRE_NVCC").as_deref() != Ok("1"), "REQUIRE_NVCC=1: {why}");
    // Not by `println`, which the test harness shows of failing tests only.
    let _ = writeln!(io::stderr(), "SKIP cubins: {why}");
    None
}

/// What is wrong with the compilation of one file: empty if nothing.
fn problems(cubin: &Cubin, nvcc: &Path, out: &Path) -> String {
    let name = cubin.file_name();
    let output = cubin.compile(nvcc, out, &OPTIONS).unwrap_or_else(|error| panic!("{}: {error}", nvcc.display()));
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return format!("{name}: {text}\n");
    }
    let spills = text
        .lines()
        .filter(|line| line.contains("spill") && !line.contains("0 bytes spill stores, 0 bytes spill loads"));
    let mut found: String = spills.map(|line| format!("{name}: {line}\n")).collect();
    let kernels = text.lines().filter(|line| line.contains("Compiling entry function")).count();
    if kernels == 0 {
        found += &format!("{name}: no kernels in it\n");
    }
    found
}

#[test]
fn every_kernel_compiles_without_spills() {
    let Some(nvcc) = compiler() else { return };
    let out = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let cubins = nvcc::cubins(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda")));
    assert!(cubins.len() >= 2 * 10, "found {} cubins to build", cubins.len());
    let found = Mutex::new(String::new());
    nvcc::for_each(&cubins, |cubin| {
        let problems = problems(cubin, &nvcc, out);
        found.lock().unwrap().push_str(&problems);
    });
    let found = found.into_inner().unwrap();
    assert!(found.is_empty(), "{found}");
}
