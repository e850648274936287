//! The CUDA compiler: one kernel file to one cubin.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::sources::files;

/// Chips that have code of their own, with what nvcc calls them. The plain kernels are built for all of them.
pub(crate) const ARCHITECTURES: [(&str, &str); 2] = [("sm_80", "compute_80"), ("sm_90a", "compute_90a")];
/// Where the kernels for one architecture alone lie.
const ONLY_SM90: &str = "sm90";

/// What is compiled to what.
#[derive(Debug, Clone)]
pub(crate) struct Cubin {
    /// The `.cu` file.
    pub(crate) source: PathBuf,
    /// The chip's name, and nvcc's for its kind.
    pub(crate) architecture: (&'static str, &'static str),
}

impl Cubin {
    /// `linear.sm_80.cubin`
    pub(crate) fn file_name(&self) -> String {
        let stem = self.source.file_stem().expect("a file of kernels").to_string_lossy();
        format!("{stem}.{}.cubin", self.architecture.0)
    }

    /// Runs nvcc, the results of which go to `out`; `options` come on top.
    ///
    /// Multiplications and additions are fused only where the source says so: the shim then gives the same bits.
    pub(crate) fn compile(&self, nvcc: &Path, out: &Path, options: &[&str]) -> std::io::Result<Output> {
        let (chip, kind) = self.architecture;
        Command::new(nvcc)
            .args(["-std=c++17", "-O3", "--fmad=false", "-cubin", "-I"])
            .arg(self.source.ancestors().find(|path| path.ends_with("cuda")).expect("a file below cuda"))
            .arg(format!("-gencode=arch={kind},code={chip}"))
            .args(options)
            .arg("-o")
            .arg(out.join(self.file_name()))
            .arg(&self.source)
            .output()
    }
}

/// All cubins there are to build of the kernels in `cuda`.
pub(crate) fn cubins(cuda: &Path) -> Vec<Cubin> {
    let of = |source: &PathBuf, architecture| Cubin { source: source.clone(), architecture };
    let plain = files(cuda, "cu");
    let everywhere = plain.iter().flat_map(|source| ARCHITECTURES.map(|architecture| of(source, architecture)));
    let sm90 = files(&cuda.join(ONLY_SM90), "cu");
    everywhere.chain(sm90.iter().map(|source| of(source, ARCHITECTURES[1]))).collect()
}

/// The compiler below `CUDA_HOME`.
pub(crate) fn nvcc(cuda_home: &Path) -> PathBuf {
    cuda_home.join("bin/nvcc")
}

/// Does `work` for each cubin, two at a time.
pub(crate) fn for_each(cubins: &[Cubin], work: impl Fn(&Cubin) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(cubin) = cubins.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    work(cubin);
                }
            });
        }
    });
}
