//! Links: what one device sends the other one has, and whoever waits for an end that is lost is told so.

use std::{
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use conclave_kernels::{
    Device, Dtype, KernelError, Pool, Reference, activation,
    cuda::{Cuda, Graphs, Shim},
    link::{Link, LinkEnd, Linked, Transfer, Until},
};

use crate::support::{Numbers, buffer};

const HIDDEN: usize = 24;
const ROW: usize = HIDDEN * 2;
/// More than a socket takes at once.
const LARGE: usize = 8 << 20;
const LIMIT: Duration = Duration::from_secs(30);

type Gpu = Cuda<Graphs<Shim>>;
type Memory = <Gpu as Device>::Shared;

fn gpu(seed: u64) -> Gpu {
    Cuda::new(Graphs::new(Shim::new(seed), 16))
}

fn bytes(device: &Gpu, memory: &Memory, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    device.read_shared(memory, &mut bytes).unwrap();
    bytes
}

/// Both ends of a link, each on a thread of its own.
fn between(maker: impl FnOnce(&Gpu, &mut dyn Link<Memory>) + Send, guest: impl FnOnce(&Gpu, &mut dyn Link<Memory>)) {
    let (devices, unbroken) = ([gpu(1), gpu(2)], AtomicBool::new(false));
    let (until, id) = (Until::new(LIMIT, &unbroken), devices[0].link_id().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| maker(&devices[0], &mut *devices[0].link(&id, LinkEnd::Maker, &until).unwrap()));
        guest(&devices[1], &mut *devices[1].link(&id, LinkEnd::Guest, &until).unwrap());
    });
}

#[test]
fn rows_of_the_board_go_one_way_and_memory_the_other() {
    let values = Numbers::new(3).vector(9 * HIDDEN, 1.0);
    let x = activation::encode(Dtype::Bf16, &values);
    let rows = [7u32, 0, 8, 3];
    let sent: Vec<u8> = rows.iter().flat_map(|row| &x[*row as usize * ROW..][..ROW]).copied().collect();
    let unbroken = AtomicBool::new(false);
    let until = Until::new(LIMIT, &unbroken);
    between(
        |device, link| {
            device.keep_board(x.len()).unwrap();
            let x = buffer(device, &values);
            let _published = device.publish(&x).unwrap();
            crate::support::encode(device, &x).unwrap();
            let through = device.keep(5 * ROW).unwrap();
            link.send_rows(&rows, HIDDEN, &through, &until).unwrap();
            let back = device.keep(2 * ROW).unwrap();
            link.receive(&back, 2 * ROW, &until).unwrap();
            assert_eq!(bytes(device, &back, 2 * ROW), sent[..2 * ROW]);
        },
        |device, link| {
            let inbox = device.keep(x.len()).unwrap();
            link.receive(&inbox, sent.len(), &until).unwrap();
            assert_eq!(bytes(device, &inbox, sent.len()), sent);
            link.send(&inbox, 2 * ROW, &until).unwrap();
        },
    );
}

#[test]
fn what_cannot_be_sent_or_received_is_named() {
    let unbroken = AtomicBool::new(false);
    let (until, soon) = (Until::new(LIMIT, &unbroken), Until::new(Duration::from_millis(20), &unbroken));
    let message = |result: Result<(), KernelError>| result.unwrap_err().to_string();
    between(
        |device, link| {
            let memory = device.keep(ROW).unwrap();
            let error = message(link.send_rows(&[0], HIDDEN, &memory, &until));
            assert_eq!(error, "send rows of the board: this device has none");
            device.keep_board(2 * ROW).unwrap();
            let error = message(link.send_rows(&[2], HIDDEN, &memory, &until));
            assert_eq!(error, "use shared memory: asked for 144 bytes, there are 96");
            assert!(message(link.send_rows(&[0, 1], HIDDEN, &memory, &until)).contains("asked for 96 bytes"));
            assert!(message(link.send(&memory, ROW + 1, &until)).contains("asked for 49 bytes, there are 48"));
            link.send(&memory, ROW, &until).unwrap_err();
        },
        |device, link| {
            let memory = device.keep(ROW).unwrap();
            let error = message(link.receive(&memory, ROW - 1, &until));
            assert_eq!(error, "receive over a link: the other end sends 48 bytes, expected 47");
        },
    );
    let device = gpu(1);
    let refused = |id: &[u8], end| device.link(id, end, &soon).err().unwrap().to_string();
    let nonsense = refused(b"nonsense", LinkEnd::Guest);
    assert_eq!(nonsense, "join a link: found an id of 8 bytes, expected shim-link:NAME");
    let id = device.link_id().unwrap();
    for end in [LinkEnd::Guest, LinkEnd::Maker] {
        assert_eq!(refused(&id, end), "join a link: the other end did not take part in time");
    }
    let reference = Reference::new(Pool::new(1).unwrap());
    let none = "device reference-1: has no links to devices of other processes (expected one of kind cuda)";
    assert_eq!(reference.check_links().unwrap_err().to_string(), none);
    assert_eq!(reference.link_id().unwrap_err().to_string(), none);
    assert_eq!(reference.link(&id, LinkEnd::Guest, &until).err().unwrap().to_string(), none);
    assert_eq!(reference.keep_board(1).unwrap_err().to_string(), none);
    assert_eq!(reference.keep(1).unwrap_err().to_string(), none);
}

#[test]
fn a_board_of_this_process_alone_is_not_shared() {
    let device = gpu(1);
    device.keep_board(8).unwrap();
    assert!(device.make_board(8).unwrap_err().to_string().contains("it was made for this process alone"));
    assert!(device.keep_board(9).unwrap_err().to_string().contains("asked for 9 bytes, there are 8"));
    let sharing = gpu(2);
    let handle = sharing.make_board(8).unwrap();
    sharing.keep_board(8).unwrap();
    assert_eq!(sharing.make_board(8).unwrap(), handle, "one board serves both");
}

#[test]
fn a_transfer_ends_when_the_other_end_goes_or_the_link_is_broken_off() {
    let (unbroken, broken) = (AtomicBool::new(false), AtomicBool::new(false));
    let until = Until::new(LIMIT, &unbroken);
    // With an end that has gone, at once.
    between(
        |device, link| {
            let memory = device.keep(LARGE).unwrap();
            let (begun, error) = (Instant::now(), link.send(&memory, LARGE, &until).unwrap_err());
            assert!(begun.elapsed() < LIMIT / 2, "{error}");
            assert!(error.to_string().starts_with("send over a link: "), "{error}");
        },
        |_, _| {},
    );
    // With one that takes no part, when it is broken off from elsewhere.
    let (told, stopped) = mpsc::channel::<()>();
    between(
        |device, link| {
            let memory = device.keep(LARGE).unwrap();
            thread::scope(|scope| {
                let receiving = scope.spawn(|| {
                    thread::sleep(Duration::from_millis(20));
                    broken.store(true, Ordering::Release);
                });
                let error = link.receive(&memory, LARGE, &Until::new(LIMIT, &broken)).unwrap_err();
                assert_eq!(error.to_string(), "receive over a link: it was broken off");
                receiving.join().unwrap();
            });
            drop(told);
        },
        |_, _| assert!(stopped.recv().is_err()),
    );
}

const ID: &str = "CONCLAVE_TEST_LINK";

/// The other process of the next test: it joins, and receives nothing.
#[test]
fn the_other_process() {
    let Ok(id) = std::env::var(ID) else { return };
    let (device, unbroken) = (gpu(2), AtomicBool::new(false));
    let _link = device.link(id.as_bytes(), LinkEnd::Guest, &Until::new(LIMIT, &unbroken)).unwrap();
    thread::sleep(LIMIT);
}

fn other_process(id: &[u8]) -> Child {
    let mut other = Command::new(std::env::current_exe().unwrap());
    other.args(["--exact", "links::the_other_process"]).env(ID, str::from_utf8(id).unwrap()).spawn().unwrap()
}

#[test]
fn a_process_killed_within_a_transfer_is_noticed_at_once() {
    let (device, unbroken) = (gpu(1), AtomicBool::new(false));
    let id = device.link_id().unwrap();
    let mut other = other_process(&id);
    let mut link = device.link(&id, LinkEnd::Maker, &Until::new(LIMIT, &unbroken)).unwrap();
    let memory = device.keep(LARGE).unwrap();
    let killing = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        other.kill().unwrap();
        other.wait().unwrap();
        Instant::now()
    });
    let error = link.send(&memory, LARGE, &Until::new(LIMIT, &unbroken)).unwrap_err();
    let (ended, killed) = (Instant::now(), killing.join().unwrap());
    assert!(ended.saturating_duration_since(killed) < Duration::from_secs(5), "{error}");
}

fn transfer(link: &Linked<Gpu>, transfer: Transfer<Memory>) -> mpsc::Receiver<Result<(), String>> {
    let (told, ended) = mpsc::channel();
    let end = move |result: Result<(), KernelError>| drop(told.send(result.map_err(|error| error.to_string())));
    link.transfer(transfer, Box::new(end));
    ended
}

#[test]
fn a_thread_does_transfers_in_order_and_tells_each_of_the_end() {
    let (one, two) = (Arc::new(gpu(1)), Arc::new(gpu(2)));
    let id = one.link_id().unwrap();
    let memory = |device: &Gpu| Arc::new(device.keep(ROW).unwrap());
    let (here, there) = (memory(&one), memory(&two));
    let first = Linked::start(one, id.clone(), LinkEnd::Maker).unwrap();
    let send = || Transfer::Send { memory: here.clone(), bytes: ROW };
    let receive = || Transfer::Receive { memory: there.clone(), bytes: ROW };
    // Asked for before the other end has joined in.
    let sent = transfer(&first, send());
    assert!(!first.is_open());
    let second = Linked::start(two, id, LinkEnd::Guest).unwrap();
    let received = transfer(&second, receive());
    assert_eq!((sent.recv().unwrap(), received.recv().unwrap()), (Ok(()), Ok(())));
    assert!(first.is_open() && second.is_open());

    // One under way, and one behind it.
    let (under_way, behind) = (transfer(&first, send()), transfer(&first, send()));
    thread::sleep(Duration::from_millis(20));
    first.break_off();
    assert_eq!(under_way.recv().unwrap(), Err("send over a link: it was broken off".to_owned()));
    let ended = "the link has ended: send over a link: it was broken off".to_owned();
    assert_eq!(behind.recv().unwrap(), Err(ended.clone()));
    assert_eq!(transfer(&first, send()).recv().unwrap(), Err(ended));
    assert!(!first.is_open());
    let error = transfer(&second, receive()).recv().unwrap().unwrap_err();
    assert!(error.starts_with("receive over a link: "), "{error}");
    assert!(!second.is_open(), "the other end is lost");

    let alone = Arc::new(gpu(3));
    let never = Linked::start(alone.clone(), alone.link_id().unwrap(), LinkEnd::Maker).unwrap();
    let waiting = transfer(&never, Transfer::Send { memory: memory(&alone), bytes: ROW });
    drop(never);
    let error = waiting.recv().unwrap().unwrap_err();
    assert_eq!(error, "the link has ended: join a link: it was broken off");
}
