//! What the compiler makes of the kernels for sm_90a: machine code and resources.
//!
//! Needs nvcc, cuobjdump and nvdisasm, in `$CUDA_HOME/bin` or on the path, and no GPU.

use std::{
    collections::BTreeMap,
    env,
    io::{self, Write},
    path::{Path, PathBuf},
    process::Command,
};

/// What a kernel should be made of.
struct Expected {
    kernel: String,
    /// The product instruction, and how many one turn of the inner loop has at least.
    product: String,
    products: usize,
    /// Dimensions of the tile loads.
    loads: &'static [&'static str],
    threads: usize,
    /// Blocks a multiprocessor, and dynamic shared memory of each.
    blocks: usize,
    shared: usize,
    /// Registers of a thread at the launch, at most.
    registers: usize,
}

/// Registers and shared memory of a multiprocessor, and what a block takes of it for itself.
const REGISTERS: usize = 65_536;
const SHARED: usize = 228 * 1024;
const RESERVED: usize = 1024;

/// `sm90_grouped_{linear, gated}[_fp8]_{tokens}`
fn grouped(
    fp8: bool,
    (tokens, threads, blocks, shared, registers): (usize, usize, usize, usize, usize),
) -> [Expected; 2] {
    let (suffix, instruction) = if fp8 { ("_fp8", "QGMMA") } else { ("", "HGMMA") };
    let types = if fp8 { "32.F32.E4M3.E4M3" } else { "16.F32.BF16" };
    ["linear", "gated"].map(|kind| Expected {
        kernel: format!("sm90_grouped_{kind}{suffix}_{tokens}"),
        product: format!("{instruction}.64x{tokens}x{types}"),
        products: 4,
        loads: if kind == "gated" { &["4D", "2D"] } else { &["2D"] },
        threads,
        blocks,
        shared,
        registers,
    })
}

fn expected() -> Vec<Expected> {
    let bf16 =
        [(16, 256, 2, 86_148, 64), (64, 256, 2, 102_500, 96), (128, 384, 1, 200_804, 128), (256, 384, 1, 200_772, 168)];
    let fp8 = [(16, 256, 2, 87_172, 64), (64, 256, 2, 104_036, 128), (128, 384, 1, 203_876, 168)];
    let attention = |product: &str, products| Expected {
        kernel: "sm90_mla_splits".to_owned(),
        product: product.to_owned(),
        products,
        loads: &["2D"],
        threads: 384,
        blocks: 1,
        shared: 229_760,
        registers: 168,
    };
    let rate = Expected {
        kernel: "sm90_rate_products".to_owned(),
        product: "HGMMA.64x256x16.F32.BF16".to_owned(),
        products: 4,
        loads: &[],
        threads: 256,
        blocks: 1,
        shared: 49_152,
        registers: 232,
    };
    let grouped =
        bf16.into_iter().flat_map(|row| grouped(false, row)).chain(fp8.into_iter().flat_map(|row| grouped(true, row)));
    let heads = Expected {
        kernel: "sm90_grouped_heads_128".to_owned(),
        product: "HGMMA.64x128x16.F32.BF16".to_owned(),
        products: 4,
        loads: &["4D", "2D"],
        threads: 384,
        blocks: 1,
        shared: 200_804,
        registers: 128,
    };
    let attention = [attention("HGMMA.64x64x16.F32.BF16", 36), attention("HGMMA.64x256x16.F32.BF16", 8)];
    let expanded = |product: &str, products| Expected {
        kernel: "sm90_mla_expanded".to_owned(),
        product: product.to_owned(),
        products,
        loads: &["2D"],
        threads: 384,
        blocks: 1,
        shared: 213_064,
        registers: 168,
    };
    let expanded = [expanded("HGMMA.64x64x16.F32.BF16", 12), expanded("HGMMA.64x128x16.F32.BF16", 4)];
    grouped.chain([heads]).chain(attention).chain(expanded).chain([rate]).collect()
}

/// The folder of the compiler, if there is one.
fn tools() -> Option<PathBuf> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders = home.into_iter().chain(env::split_paths(&path));
    folders.find(|folder| ["nvcc", "cuobjdump", "nvdisasm"].iter().all(|tool| folder.join(tool).is_file()))
}

/// Runs a tool and gives what it prints.
fn output(tools: &Path, tool: &str, arguments: &[&str]) -> String {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(tools.to_owned()).chain(env::split_paths(&path));
    let mut command = Command::new(tools.join(tool));
    command.args(arguments).env("PATH", env::join_paths(folders).unwrap());
    let output = command.output().unwrap_or_else(|error| panic!("{tool}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{tool} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text.into_owned()
}

/// Instructions of each kernel, without predicates, and registers of each.
#[derive(Default)]
struct Code {
    instructions: BTreeMap<String, Vec<String>>,
    registers: BTreeMap<String, usize>,
}

impl Code {
    fn read(&mut self, sass: &str, resources: &str) {
        let mut kernel = String::new();
        for line in sass.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("Function : ") {
                kernel = name.to_owned();
            } else if let Some((_, text)) = line.strip_prefix("/*").and_then(|line| line.split_once("*/")) {
                let mut words = text.split_whitespace().skip_while(|word| word.starts_with('@'));
                let instruction = words.next().map(str::to_owned);
                self.instructions.entry(kernel.clone()).or_default().extend(instruction);
            }
        }
        for line in resources.lines().map(str::trim) {
            if let Some(name) = line.strip_prefix("Function ") {
                kernel = name.trim_end_matches(':').to_owned();
            } else if let Some((count, _)) = line.strip_prefix("REG:").and_then(|line| line.split_once(' ')) {
                self.registers.insert(kernel.clone(), count.parse().unwrap());
            }
        }
    }
}

/// Compiles all kernels as `build/nvcc.rs` does; spills are errors.
fn compile(tools: &Path) -> Code {
    let mut code = Code::default();
    let names = [
        "sm90_grouped_linear",
        "sm90_grouped_heads",
        "sm90_grouped_linear_fp8",
        "sm90_mla_splits",
        "sm90_mla_expanded",
        "sm90_products_rate",
    ];
    for name in names {
        let source = format!("{}/cuda/sm90/{name}.cu", env!("CARGO_MANIFEST_DIR"));
        let cubin = format!("{}/{name}.cubin", env!("CARGO_TARGET_TMPDIR"));
        let target = "-gencode=arch=compute_90a,code=sm_90a";
        let strict = "-Xptxas=-Werror,-warn-spills";
        output(tools, "nvcc", &["-std=c++17", "-O3", "--fmad=false", target, "-cubin", strict, "-o", &cubin, &source]);
        code.read(
            &output(tools, "cuobjdump", &["-sass", &cubin]),
            &output(tools, "cuobjdump", &["-res-usage", &cubin]),
        );
    }
    code
}

fn check(code: &Code, expected: &Expected) {
    let kernel = &expected.kernel;
    let instructions = code.instructions.get(kernel).unwrap_or_else(|| panic!("{kernel}: no such kernel"));
    let count = |prefix: &str| instructions.iter().filter(|instruction| instruction.starts_with(prefix)).count();
    let products = count(&expected.product);
    assert!(products >= expected.products, "{kernel}: {products} of {}", expected.product);
    for dimensions in expected.loads {
        assert!(count(&format!("UTMALDG.{dimensions}")) > 0, "{kernel}: no tile loads of {dimensions}");
    }
    for local in ["STL", "LDL"] {
        assert_eq!(count(local), 0, "{kernel}: local memory ({local})");
    }
    let registers = code.registers[kernel];
    assert!(
        registers <= expected.registers,
        "{kernel}: {registers} registers, expected at most {}",
        expected.registers
    );
    let taken = registers.next_multiple_of(8) * expected.threads * expected.blocks;
    assert!(taken <= REGISTERS, "{kernel}: {taken} registers for {} blocks", expected.blocks);
    let shared = (expected.shared + RESERVED) * expected.blocks;
    assert!(shared <= SHARED, "{kernel}: {shared} bytes of shared memory for {} blocks", expected.blocks);
    println!("{kernel}: {} instructions, {products} {}, {registers} registers", instructions.len(), expected.product);
}

#[test]
fn kernels_are_made_of_what_they_should_be() {
    let Some(tools) = tools() else {
        let why = "no nvcc, cuobjdump and nvdisasm in $CUDA_HOME/bin or on the path";
        assert!(env::var("REQUIRE_NVCC").as_deref() != Ok("1"), "REQUIRE_NVCC=1: {why}");
        // Not by `println`, which the test harness shows of failing tests only.
        let _ = writeln!(io::stderr(), "SKIP machine code for sm_90a: {why}");
        return;
    };
    let code = compile(&tools);
    expected().iter().for_each(|expected| check(&code, expected));
}
