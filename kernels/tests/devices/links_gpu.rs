//! A link between GPUs: of two processes with the GPU of this machine, which NCCL takes for those of two hosts, if at all.

use std::{
    process::{Child, Command},
    sync::atomic::AtomicBool,
    time::{Duration, Instant},
};

use conclave_kernels::{
    Device, Dtype, activation,
    cuda::{Cuda, Gpu},
    link::{LinkEnd, Until},
};

use crate::support::{Numbers, buffer, encode};

const HIDDEN: usize = 2048;
/// Rows of a transfer there, as many times, and back.
const TRANSFERS: [(usize, usize); 3] = [(1, 50), (64, 50), (512, 20)];
const MOST: usize = 512;
const LIMIT: Duration = Duration::from_secs(20);
const ID: &str = "CONCLAVE_TEST_GPU_LINK";

fn bytes(rows: usize) -> usize {
    rows * HIDDEN * Dtype::Bf16.size()
}

/// The other process of the next test: it sends back what it receives.
#[test]
fn the_other_gpu() {
    let Ok(id) = std::env::var(ID) else { return };
    let byte = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    let id: Vec<u8> = id.as_bytes().chunks(2).map(byte).collect();
    let (device, unbroken) =
        (Cuda::new(crate::cuda::gpu().expect("the GPU of the first process")), AtomicBool::new(false));
    let mut link = device.link(&id, LinkEnd::Guest, &Until::new(LIMIT, &unbroken)).unwrap();
    let memory = device.keep(bytes(MOST)).unwrap();
    for (rows, times) in TRANSFERS {
        for _ in 0..times {
            link.receive(&memory, bytes(rows), &Until::new(LIMIT, &unbroken)).unwrap();
            link.send(&memory, bytes(rows), &Until::new(LIMIT, &unbroken)).unwrap();
        }
    }
}

struct Other(Child);

impl Other {
    fn start(id: &[u8]) -> Self {
        let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut other = Command::new(std::env::current_exe().unwrap());
        other.args(["--exact", "links_gpu::the_other_gpu"]).env(ID, id).env("NCCL_HOSTID", "another-host");
        Self(other.spawn().unwrap())
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The device, or a word why there are no links.
fn linking() -> Option<(Cuda<Gpu>, Vec<u8>)> {
    let device = Cuda::new(crate::cuda::gpu()?);
    match device.link_id() {
        Ok(id) => Some((device, id)),
        Err(error) => {
            println!("SKIP links of a GPU: {error}");
            None
        }
    }
}

#[test]
fn rows_go_to_another_process_and_back() {
    let Some((device, id)) = linking() else { return };
    let (_other, unbroken) = (Other::start(&id), AtomicBool::new(false));
    let until = || Until::new(LIMIT, &unbroken);
    let mut link = match device.link(&id, LinkEnd::Maker, &until()) {
        Ok(link) => link,
        Err(error) => return println!("SKIP links of a GPU: NCCL refuses two processes with one GPU: {error}"),
    };
    let values = Numbers::new(5).vector(MOST * HIDDEN, 1.0);
    let x = activation::encode(Dtype::Bf16, &values);
    device.keep_board(x.len()).unwrap();
    let on_board = buffer(&device, &values);
    let _published = device.publish(&on_board).unwrap();
    encode(&device, &on_board).unwrap();
    let (through, back) = (device.keep(x.len()).unwrap(), device.keep(x.len()).unwrap());
    for (rows, times) in TRANSFERS {
        let numbers: Vec<u32> = (0..rows as u32).rev().collect();
        let begun = Instant::now();
        for _ in 0..times {
            link.send_rows(&numbers, HIDDEN, &through, &until()).unwrap();
            link.receive(&back, bytes(rows), &until()).unwrap();
        }
        let each = begun.elapsed().as_secs_f64() / times as f64;
        println!("    {rows} rows of {HIDDEN} to another process and back: {:.0} us", each * 1e6);
        let mut found = vec![0; bytes(rows)];
        device.read_shared(&back, &mut found).unwrap();
        let sent: Vec<u8> =
            numbers.iter().flat_map(|row| &x[*row as usize * bytes(1)..][..bytes(1)]).copied().collect();
        assert!(found == sent, "{rows} rows");
    }
}

#[test]
fn a_process_that_is_killed_ends_its_link_in_time() {
    let Some((device, id)) = linking() else { return };
    let (other, unbroken) = (Other::start(&id), AtomicBool::new(false));
    let Ok(mut link) = device.link(&id, LinkEnd::Maker, &Until::new(LIMIT, &unbroken)) else { return };
    drop(other);
    let memory = device.keep(bytes(MOST)).unwrap();
    let begun = Instant::now();
    // What is small enough may be on its way before anybody notices; what comes back is not.
    let _ = link.send(&memory, bytes(MOST), &Until::new(Duration::from_secs(2), &unbroken));
    let error = link.receive(&memory, bytes(MOST), &Until::new(Duration::from_secs(2), &unbroken)).unwrap_err();
    drop(link);
    println!("    a link whose other end was killed: {error}, aborted {:.1} s later", begun.elapsed().as_secs_f64());
    assert!(begun.elapsed() < LIMIT);
    // The device is none the worse for it.
    assert_eq!(encode(&device, &buffer(&device, &[1.0; 8])).unwrap(), activation::encode(Dtype::Bf16, &[1.0; 8]));
}
