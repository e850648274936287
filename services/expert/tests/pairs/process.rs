//! Shards that are processes of their own.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use conclave_cluster::Member;
use conclave_dispatch::pair::Way;
use conclave_model::Checkpoint;

use crate::rig::{Caller, LIMIT, Shard};
use crate::support::{ALL, checkpoint, member};

const DIR: &str = "CONCLAVE_TEST_CHECKPOINT";
const STANDS_STILL: &str = "CONCLAVE_TEST_STANDS_STILL";
const ADDRESS: &str = "address: ";

/// The process of the next test: a shard, whose link stands still after some batches if it is told so.
#[test]
fn the_shard() {
    let Ok(dir) = std::env::var(DIR) else { return };
    let checkpoint = Arc::new(Checkpoint::open(&dir).unwrap());
    let shard = Shard::start("a-process", &checkpoint, &ALL);
    println!("\n{ADDRESS}{}", shard.address);
    let stands_still = std::env::var(STANDS_STILL).is_ok();
    for _ in 0..LIMIT.as_millis() {
        std::thread::sleep(Duration::from_millis(1));
        if stands_still && shard.computed() > 100 {
            shard.gate.stands_still.store(true, Ordering::SeqCst);
        }
    }
}

struct Process(Child);

impl Process {
    /// The process, and where it answers.
    fn start(dir: &std::path::Path, stands_still: bool) -> (Self, String) {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "process::the_shard", "--nocapture"]).env(DIR, dir).stdout(Stdio::piped());
        if stands_still {
            command.env(STANDS_STILL, "1");
        }
        let mut child = Self(command.spawn().unwrap());
        let lines = BufReader::new(child.0.stdout.take().unwrap()).lines();
        let address = lines.map_while(Result::ok).find_map(|line| Some(line.strip_prefix(ADDRESS)?.to_owned()));
        (child, address.expect("a shard that serves"))
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn records(checkpoint: &Checkpoint, address: &str, spare: &Shard) -> Vec<Member> {
    let fingerprint = checkpoint.fingerprint();
    // By name it is the first to be asked.
    vec![member("a-process", address, &ALL, fingerprint), spare.far(fingerprint)]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_killed_while_rows_are_on_their_way_loses_nothing() {
    let (dir, checkpoint) = checkpoint();
    for stands_still in [true, false] {
        let (mut process, address) = Process::start(dir.path(), stands_still);
        let spare = Shard::start("spare", &checkpoint, &ALL);
        let caller = Caller::by(Way::Nccl, &checkpoint, records(&checkpoint, &address, &spare), 1024).await;
        let killing = async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            process.kill();
        };
        let working = async {
            for seed in 0..200 {
                caller.check(seed, 6).await;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::join!(working, killing);
        assert!(caller.batches().0 > 0, "some went over the link");
        caller.by_pairs().await;
        assert!(spare.computed() > 0);
    }
}
