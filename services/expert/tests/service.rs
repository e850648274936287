//! The service in process: same bits for any placement, bounds, draining, cells that come and go.

mod support;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use conclave_cluster::MemberState;
use conclave_expert::{ExpertConfig, ExpertError, ExpertService};
use conclave_kernels::{Cpu, Dtype, Pool};
use conclave_proto::v1::{ExpertBatch, WorkErrorKind};
use futures::future::join_all;
use prometheus::Registry;
use support::{ALL, batch, cells, checkpoint, dispatch, input, reference, start};

const PLACEMENTS: [&[&[u32]]; 5] = [
    &[&[0, 1, 2, 3], &[4, 5, 6, 7]],
    &[&[0, 1], &[2, 3], &[4, 5], &[6, 7]],
    &[&[0], &[1], &[2], &[3], &[4], &[5], &[6], &[7]],
    &[&[0, 1, 2, 3, 4], &[5], &[6, 7]],
    &[&[1, 3, 5, 7], &[0, 2, 4, 6], &[0, 1, 2, 3, 4, 5, 6, 7]],
];

#[tokio::test]
async fn any_placement_gives_the_same_bits_on_each_device() {
    let (_dir, checkpoint) = checkpoint();
    let cpu = Arc::new(Cpu::new(Pool::new(1).unwrap(), None).unwrap());
    for placement in PLACEMENTS {
        let placement: Vec<Vec<u32>> = placement.iter().map(|groups| groups.to_vec()).collect();
        for (seed, rows) in [(1, 1), (2, 7), (3, 40)] {
            let one = dispatch(&reference(), &checkpoint, &[ALL.to_vec()], input(Dtype::F32, seed, rows)).await;
            let many = dispatch(&reference(), &checkpoint, &placement, input(Dtype::F32, seed, rows)).await;
            assert_eq!(one.routed, many.routed, "reference, {rows} rows on {placement:?}");
            let one = dispatch(&cpu, &checkpoint, &[ALL.to_vec()], input(Dtype::Bf16, seed, rows)).await;
            let many = dispatch(&cpu, &checkpoint, &placement, input(Dtype::Bf16, seed, rows)).await;
            assert_eq!(one.routed, many.routed, "cpu, {rows} rows on {placement:?}");
        }
    }
}

#[tokio::test]
async fn concurrent_callers_get_the_bits_of_being_alone() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &ALL);
    let batches: Vec<ExpertBatch> =
        (0..40).map(|step| batch(Dtype::F32, step, 1 + step as usize % 5, step as u32 % 8)).collect();
    let together = join_all(batches.iter().map(|b| service.run(b.clone()))).await;
    for (batch, together) in batches.iter().zip(together) {
        assert_eq!(together.error, None);
        assert_eq!(together.id, batch.id);
        assert_eq!(service.run(batch.clone()).await.sums, together.sums, "a repetition gives the same");
    }
    let rows: u64 = service.status().cells.iter().map(|cell| cell.rows).sum();
    assert_eq!(rows, 2 * batches.iter().map(|b| u64::from(b.rows)).sum::<u64>());
}

#[tokio::test]
async fn refusals_say_why() {
    let (_dir, checkpoint) = checkpoint();
    let config = ExpertConfig { queue_rows: 10, ..ExpertConfig::new("a") };
    let service = start(config, reference(), &checkpoint, &[0, 1]);
    let error = service.run(batch(Dtype::F32, 1, 2, 5)).await.error.unwrap();
    assert_eq!((error.kind(), &*error.message), (WorkErrorKind::NotHeld, "cell 5: not held here (held: 0, 1)"));
    let error = service.run(batch(Dtype::Bf16, 1, 2, 0)).await.error.unwrap();
    assert_eq!(error.kind(), WorkErrorKind::Invalid);
    let error = service.run(batch(Dtype::F32, 1, 11, 0)).await.error.unwrap();
    assert_eq!(error.kind(), WorkErrorKind::Overloaded);
    assert!(service.run(batch(Dtype::F32, 1, 10, 0)).await.error.is_none());
}

#[tokio::test]
async fn a_spent_budget_is_not_computed() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &ALL);
    let work = (0..200).map(|step| {
        let budget_us = if step == 199 { 1 } else { 0 };
        service.run(ExpertBatch { budget_us, ..batch(Dtype::F32, step, 64, 0) })
    });
    let results = join_all(work).await;
    assert_eq!(results[199].error.as_ref().unwrap().kind(), WorkErrorKind::Expired);
    assert!(results[..199].iter().all(|result| result.error.is_none()));
}

#[tokio::test]
async fn draining_finishes_what_is_there_and_takes_nothing_new() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &ALL);
    let before: Vec<_> = (0..20)
        .map(|step| {
            let service = service.clone();
            tokio::spawn(async move { service.run(batch(Dtype::F32, step, 30, 0)).await })
        })
        .collect();
    tokio::task::yield_now().await;
    service.drain().await;
    assert_eq!(*service.state().borrow(), MemberState::Leaving);
    let error = service.run(batch(Dtype::F32, 99, 1, 0)).await.error.unwrap();
    assert_eq!(error.kind(), WorkErrorKind::Leaving);
    for work in before {
        let error = work.await.unwrap().error;
        assert!(error.is_none_or(|error| error.kind() == WorkErrorKind::Leaving));
    }
    assert_eq!(service.status().queued_rows, 0);
    assert!(matches!(service.load_cells(cells(&[1])).await, Err(ExpertError::Leaving)));
}

#[tokio::test]
async fn cells_come_and_go_while_serving() {
    let (_dir, checkpoint) = checkpoint();
    let service = start(ExpertConfig::new("a"), reference(), &checkpoint, &[2]);
    let mut held = service.held();
    let bytes = service.status().cells[0].bytes;
    let (gate_and_up, down) = (2 * 16 * 32, 32 * 32);
    assert_eq!(
        bytes,
        2 * 4 * (gate_and_up + down) * 2,
        "two layers of four experts, padded to 16 outputs and 32 inputs, as bf16"
    );
    assert_eq!(service.load_cells(cells(&[4, 2])).await.unwrap(), cells(&[2, 4]));
    assert_eq!(*held.borrow_and_update(), cells(&[2, 4]));
    assert!(service.run(batch(Dtype::F32, 1, 3, 4)).await.error.is_none());
    assert_eq!(service.unload_cells(&cells(&[2])).await.unwrap(), cells(&[4]));
    assert_eq!(service.run(batch(Dtype::F32, 1, 3, 2)).await.error.unwrap().kind(), WorkErrorKind::NotHeld);
    let error = service.load_cells(cells(&[8])).await.unwrap_err();
    assert_eq!(error.to_string(), "cell 8: not in this model (expected groups 0 to 7, span 0)");
    assert_eq!(*service.held().borrow(), cells(&[4]));
}

#[tokio::test]
async fn what_nobody_waits_for_is_dropped() {
    let (_dir, checkpoint) = checkpoint();
    let registry = Registry::new();
    let service =
        ExpertService::start(ExpertConfig::new("a"), reference(), checkpoint, &cells(&ALL), &registry).unwrap();
    for step in 0..300 {
        // Queued, then given up: all but the few that the compute thread takes in between are left out.
        let _ = futures::poll!(pin!(service.run(batch(Dtype::F32, step, 50, 0))));
    }
    tokio::time::timeout(Duration::from_secs(20), service.drain()).await.unwrap();
    let dropped = registry.gather().iter().find(|f| f.name() == "conclave_expert_dropped_total").unwrap().clone();
    assert!(dropped.get_metric()[0].get_counter().get_value() > 0.0);
}

#[test]
fn a_service_checks_itself() {
    let (_dir, checkpoint) = checkpoint();
    let cpu = Arc::new(Cpu::new(Pool::new(1).unwrap(), None).unwrap());
    start(ExpertConfig::new("a"), cpu, &checkpoint, &ALL).self_check().unwrap();
    start(ExpertConfig::new("b"), reference(), &checkpoint, &[3]).self_check().unwrap();
}
