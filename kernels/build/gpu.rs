//! The kernels as code for GPUs, which the library embeds.

use std::{env, fmt::Write, fs, path::Path, path::PathBuf, process};

use crate::nvcc::{Cubin, cubins, for_each, nvcc};

pub(crate) fn build() {
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    println!("cargo::rerun-if-changed=cuda");
    let compiler = compiler();
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("OUT_DIR, which cargo sets"));
    let cubins = cubins(Path::new("cuda"));
    for_each(&cubins, |cubin| compile(cubin, &compiler, &out));
    fs::write(out.join("cubins.rs"), table(&cubins)).expect("write cubins.rs");
}

/// nvcc, or the end of the build.
fn compiler() -> PathBuf {
    let home = env::var_os("CUDA_HOME").map(PathBuf::from);
    let found = home.as_deref().map(nvcc).filter(|path| path.exists());
    found.unwrap_or_else(|| {
        let looked =
            home.map_or("it is not set".to_owned(), |home| format!("there is no bin/nvcc in {}", home.display()));
        fail(&format!(
            "feature cuda: no CUDA compiler in CUDA_HOME: {looked}. `deploy/install-cuda-compiler.sh DIR` installs one \
             into DIR and prints the value"
        ))
    })
}

fn compile(cubin: &Cubin, nvcc: &Path, out: &Path) {
    let name = cubin.source.display();
    let output = cubin.compile(nvcc, out, &[]).unwrap_or_else(|error| fail(&format!("{}: {error}", nvcc.display())));
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        fail(&format!("nvcc refused {name} for {}", cubin.architecture.0));
    }
}

/// `&[(stem, chip, code)]` as Rust.
fn table(cubins: &[Cubin]) -> String {
    let mut text = String::from("&[\n");
    for cubin in cubins {
        let (file, chip) = (cubin.file_name(), cubin.architecture.0);
        writeln!(text, "    ({file:?}, {chip:?}, include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{file}\"))),")
            .expect("text");
    }
    text + "]\n"
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    process::exit(1)
}
