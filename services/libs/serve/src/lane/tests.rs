//! Who runs a lane, and when it sleeps.

use tokio::sync::oneshot;
use tokio::time::sleep;

use super::*;

#[test]
fn the_stand_in_is_needed_when_nobody_has_been_there_for_a_while() {
    assert_eq!(needed(false, false, false), Need::Drive);
    assert_eq!(needed(true, false, false), Need::Watch, "it was there a moment ago");
    assert_eq!(needed(true, false, true), Need::Drive, "it was asked to");
    assert_eq!(needed(false, true, false), Need::Sleep);
    assert_eq!(needed(true, true, true), Need::Watch, "the thread came back before");
}

#[test]
fn tasks_go_on_whoever_is_there() {
    let lane = Lane::start("test").unwrap();
    let (answer, answered) = oneshot::channel();
    lane.handle().spawn(async move {
        sleep(Duration::from_millis(1)).await;
        answer.send(1)
    });
    assert_eq!(answered.blocking_recv(), Ok(1), "the stand-in runs it");
    let mut at_once = 0;
    for i in 0..100 {
        let task = lane.spawn_and_turn(async move { i + 1 });
        at_once += usize::from(task.is_finished());
        if i % 10 == 0 {
            thread::sleep(2 * PATIENCE);
        }
        assert_eq!(lane.block_on(task).unwrap(), i + 1);
    }
    // Where the stand-in is just giving the runtime back, the task is run by whoever waits for it.
    assert!(at_once > 50, "one turn runs what is ready: {at_once} of 100");
}

#[test]
fn a_task_goes_on_while_the_thread_computes() {
    let lane = Lane::start("test").unwrap();
    for at_once in [false, true] {
        let task = lane.spawn_and_turn(async { sleep(Duration::from_millis(1)).await });
        if at_once {
            lane.hand_over();
        }
        let started = Instant::now();
        while !task.is_finished() {
            assert!(started.elapsed() < Duration::from_secs(10), "nobody runs the lane");
            thread::sleep(Duration::from_millis(1));
        }
    }
}

#[tokio::test]
async fn a_lane_may_end_within_another_runtime() {
    let lane = Lane::start("test").unwrap();
    let (held, ended) = oneshot::channel::<()>();
    lane.handle().spawn(async move {
        let _held = held;
        std::future::pending::<()>().await;
    });
    drop(lane);
    assert!(ended.await.is_err(), "its tasks end with it");
}

#[test]
fn stirring_ends_by_itself() {
    let lane = Lane::start("test").unwrap();
    lane.stirrer().stir();
    lane.block_on(async { sleep(Duration::from_millis(20)).await });
    let polls = Arc::new(AtomicUsize::new(0));
    let counted = polls.clone();
    lane.block_on(async move {
        let nothing = std::future::poll_fn(|_| {
            counted.fetch_add(1, Ordering::Relaxed);
            std::task::Poll::<()>::Pending
        });
        tokio::select! { () = nothing => {}, () = sleep(Duration::from_millis(50)) => {} }
    });
    assert!(polls.load(Ordering::Relaxed) < 20, "{polls:?} polls of a lane that sleeps");
}
