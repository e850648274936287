//! Memory that two processes see: rows from a board, sums into memory of one's own, the same bits as by way of the host.

use std::process::Command;

use conclave_kernels::{
    Cpu, Device, Dtype, ExpertRows, GroupedSums, KernelError, Pool, Reference, RowsAt, SumsAt, Wanted, activation,
    cell_tree::{self, Levels, Node},
    cuda::{Cuda, Driver, Shim},
};

use crate::support::{Case, Numbers, buffer, encode};

const ROWS: usize = 6;
/// Which rows go to which expert, in slots of their own: a row's experts 0 to 3 are groups 0 to 3.
const TAKEN: [&[u32]; 4] = [&[0, 2, 3], &[1, 2], &[0, 2, 3, 5], &[2, 4]];

/// The slot of each row and group, if the row is taken.
fn slots() -> Vec<[Option<u32>; 4]> {
    let mut next = 0..;
    let mut all = vec![[None; 4]; ROWS];
    for (group, rows) in TAKEN.iter().enumerate() {
        rows.iter().for_each(|row| all[*row as usize][group] = next.next());
    }
    all
}

/// The sums of all rows that are taken, from slots on the host.
fn by_host(hidden: usize, filled: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slots in slots() {
        let part = |(group, slot): (usize, &Option<u32>)| {
            let values = &filled[slot.map(|slot| slot as usize)? * hidden..][..hidden];
            Some((Node { first: group, last: group + 1 }, values))
        };
        let (parts, mut sum) = (slots.iter().enumerate().filter_map(part).collect::<Vec<_>>(), vec![0.0; hidden]);
        if cell_tree::sum_into(Dtype::Bf16, 4, Node::root(4), &parts, &mut sum) {
            activation::encode_into(Dtype::Bf16, &sum, &mut bytes);
        }
    }
    bytes
}

/// The additions and the slots of the sums of all rows that are taken.
fn planned() -> (Levels, Vec<u32>) {
    let mut levels = Levels::new();
    let slot = |slots: [Option<u32>; 4]| {
        let parts: Vec<_> = slots.iter().enumerate().filter_map(|(group, slot)| Some((group, (*slot)?))).collect();
        cell_tree::slot_sum(Node::root(4), &parts, &mut levels)
    };
    let sums = slots().into_iter().filter_map(slot).collect();
    (levels, sums)
}

fn check(case: &Case, shim: fn(u64) -> Shim) {
    let (caller, shard) = (Cuda::new(shim(1)), Cuda::new(shim(2)));
    let (model, hidden) = (case.load(&shard), case.hidden);
    let values = Numbers::new(9).vector(ROWS * hidden, 1.0);
    let x = activation::encode(Dtype::Bf16, &values);
    let mut next = 0..;
    let taken: Vec<Vec<u32>> = TAKEN.iter().map(|rows| next.by_ref().take(rows.len()).collect()).collect();
    let weights = [0.5, 2.0, 1.0, -0.75];
    let rows = |ffn, group: usize, rows| {
        let slots: &[u32] = &taken[group];
        ExpertRows { ffn, rows, weights: &weights[..slots.len()], slots }
    };
    let experts: Vec<_> = model.experts.iter().enumerate().map(|(group, ffn)| rows(ffn, group, TAKEN[group])).collect();
    let count = TAKEN.iter().map(|rows| rows.len()).sum::<usize>();
    let mut filled = vec![0.0; count * hidden];
    shard.grouped_ffn(&[&x], &experts, &mut filled).unwrap();
    let expected = by_host(hidden, &filled);

    // The caller's rows lie in another order, and one more.
    let order = [3usize, 5, 0, 6, 1, 2, 4];
    let mut on_board = vec![9.0; 7 * hidden];
    let of_board: Vec<u32> = (0..ROWS).map(|row| order.iter().position(|at| *at == row).unwrap() as u32).collect();
    for (row, at) in of_board.iter().enumerate() {
        on_board[*at as usize * hidden..][..hidden].copy_from_slice(&values[row * hidden..][..hidden]);
    }
    let bytes = 7 * hidden * 2;
    let handle = caller.make_board(bytes).unwrap();
    let board = shard.open_shared(&handle, bytes).unwrap();
    let _published = caller.publish(&buffer(&caller, &on_board)).expect("it fits");
    let (sums, handle) = shard.share(expected.len()).unwrap();
    let seen = caller.open_shared(&handle, expected.len()).unwrap();
    let (levels, wanted) = planned();
    // Two rows.
    let last = 2 * hidden * 2;
    for parts in [
        vec![RowsAt::Shared(&board, &of_board)],
        vec![RowsAt::Host(&x[..last]), RowsAt::Shared(&board, &of_board[2..4]), RowsAt::Host(&x[2 * last..])],
        vec![
            RowsAt::Shared(&board, &of_board[..2]),
            RowsAt::Host(&x[last..2 * last]),
            RowsAt::Shared(&board, &of_board[4..]),
        ],
    ] {
        let work = GroupedSums { x: &parts, experts: &experts, slots: count, levels: &levels };
        let (first, rest) = wanted.split_at(2);
        let mut on_host = vec![7];
        // Both ways at once: to shared memory, and to the host.
        let to = |slots, to| Wanted { slots, to };
        shard
            .grouped_sums(&work, &mut [to(first, SumsAt::Host(&mut on_host)), to(rest, SumsAt::Shared(&sums))])
            .unwrap();
        let mut found = vec![0; expected.len() - on_host.len()];
        caller.read_shared(&seen, &mut found).unwrap();
        assert_eq!([on_host, found].concat(), expected);
    }
}

#[test]
fn rows_and_sums_in_shared_memory_have_the_bits_of_the_hosts() {
    check(&Case::odd(), Shim::new);
    check(&Case::tiled(), Shim::sm90);
}

#[test]
fn a_board_takes_the_rows_of_one_layer_at_a_time() {
    let (caller, peer) = (Cuda::new(Shim::new(1)), Cuda::new(Shim::new(2)));
    let rows = |value: f32, count: usize| buffer(&caller, &vec![value; count]);
    assert!(caller.publish(&rows(1.0, 4)).is_none(), "there is no board");
    let handle = caller.make_board(16).unwrap();
    assert_eq!(caller.make_board(8).unwrap(), handle, "there is one");
    assert!(caller.make_board(17).unwrap_err().to_string().contains("asked for 17 bytes, there are 16"));
    let seen = peer.open_shared(&handle, 16).unwrap();
    let board = || {
        let mut bytes = vec![0; 16];
        peer.read_shared(&seen, &mut bytes).unwrap();
        bytes
    };
    assert!(caller.publish(&rows(1.0, 9)).is_none(), "too many");
    let first = caller.publish(&rows(1.0, 8)).unwrap();
    let ones = activation::encode(Dtype::Bf16, &[1.0; 8]);
    assert_eq!(board(), ones);
    assert!(caller.publish(&rows(2.0, 8)).is_none(), "the first ones may still be wanted");
    assert_eq!(board(), ones);
    drop(first);
    assert!(caller.publish(&rows(2.0, 8)).is_some());
    assert_eq!(board(), activation::encode(Dtype::Bf16, &[2.0; 8]));
}

#[test]
fn what_cannot_be_shared_is_named() {
    let shim = Cuda::new(Shim::new(1));
    let refused = |error: Option<KernelError>| error.unwrap().to_string();
    assert_eq!(
        refused(shim.open_shared(b"nonsense", 1).err()),
        "open shared memory: found a handle of 8 bytes, expected shim:PATH"
    );
    assert!(refused(shim.open_shared(b"shim:/nowhere", 1).err()).contains("/nowhere: No such file"));
    let (_memory, handle) = shim.share(8).unwrap();
    assert!(refused(shim.open_shared(&handle, 9).err()).contains("asked for 9 bytes, there are 8"));
    let (cpu, reference) = (Cpu::new(Pool::new(1).unwrap(), None).unwrap(), Reference::new(Pool::new(1).unwrap()));
    let expected = "device reference-1: shares no memory with other processes (expected one of kind cuda)";
    assert_eq!(refused(reference.make_board(8).err()), expected);
    assert!(refused(cpu.open_shared(&handle, 8).err()).contains("shares no memory"));
    assert!(cpu.publish(&vec![1.0]).is_none());
}

const HANDLE: &str = "CONCLAVE_TEST_HANDLE";

fn finds_ones<D: Driver>(peer: &Cuda<D>, handle: &[u8]) {
    let mut bytes = vec![0; 16];
    peer.read_shared(&peer.open_shared(handle, 16).unwrap(), &mut bytes).unwrap();
    assert_eq!(bytes, activation::encode(Dtype::Bf16, &[1.0; 8]));
}

/// The other process of the next test: it finds eight ones on a board.
#[test]
fn the_other_process() {
    let Ok(handle) = std::env::var(HANDLE) else { return };
    let bytes = |pair: &[u8]| u8::from_str_radix(str::from_utf8(pair).unwrap(), 16).unwrap();
    let handle: Vec<u8> = handle.as_bytes().chunks(2).map(bytes).collect();
    match handle.starts_with(b"shim:") {
        true => finds_ones(&Cuda::new(Shim::new(2)), &handle),
        #[cfg(feature = "cuda")]
        false => finds_ones(&Cuda::new(crate::cuda::gpu().expect("the GPU of the first process")), &handle),
        #[cfg(not(feature = "cuda"))]
        false => panic!("a handle of a GPU"),
    }
}

fn another_process_sees_the_board_of<D: Driver>(caller: &Cuda<D>) {
    let handle: String = caller.make_board(16).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
    for (value, seen) in [(1.0, true), (2.0, false)] {
        let x = buffer(caller, &[value; 8]);
        let _published = caller.publish(&x).unwrap();
        encode(caller, &x).unwrap();
        let mut other = Command::new(std::env::current_exe().unwrap());
        other.args(["--exact", "shared::the_other_process"]).env(HANDLE, &handle);
        assert_eq!(other.output().unwrap().status.success(), seen, "rows of {value}");
    }
}

#[test]
fn another_process_sees_the_board() {
    another_process_sees_the_board_of(&Cuda::new(Shim::new(1)));
    #[cfg(feature = "cuda")]
    crate::cuda::gpu().into_iter().for_each(|gpu| another_process_sees_the_board_of(&Cuda::new(gpu)));
}
