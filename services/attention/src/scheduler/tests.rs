use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const LIMITS: Limits = Limits { step_tokens: 100, prefill_chunk: 40, max_running: 4, block: 16 };

fn fresh(target: usize) -> Demand {
    Demand { target, computed: 0, blocks: 0, idle: 0 }
}

fn at(computed: usize, target: usize) -> Demand {
    Demand { target, computed, blocks: computed.div_ceil(LIMITS.block), idle: 0 }
}

/// With as many rows of prompts as a step has.
fn plan(limits: &Limits, running: &[Demand], waiting: &[Demand], free: usize) -> Plan {
    super::plan(limits, limits.step_tokens, Queue { running, waiting, free })
}

#[test]
fn decodes_first_then_chunks_of_the_prompts() {
    let running = [at(40, 200), at(31, 32), at(0, 90)];
    assert_eq!(plan(&LIMITS, &running, &[], 100), Plan { preempt: 0, admit: 0, rows: vec![40, 1, 40] });
}

#[test]
fn prompts_share_what_decoding_leaves() {
    let limits = Limits { step_tokens: 50, ..LIMITS };
    let found = plan(&limits, &[at(0, 200), at(0, 200), at(9, 10)], &[fresh(5)], 100);
    assert_eq!(found, Plan { preempt: 0, admit: 0, rows: vec![25, 24, 1] });
    let found = plan(&limits, &[at(0, 20), at(0, 10), at(9, 10)], &[fresh(25), fresh(5)], 100);
    assert_eq!(found, Plan { preempt: 0, admit: 1, rows: vec![20, 10, 1, 19] });
}

#[test]
fn a_bound_for_prompts_is_none_for_decoding() {
    let running = [at(0, 200), at(9, 10), at(8, 9)];
    let found = super::plan(&LIMITS, 17, Queue { running: &running, waiting: &[fresh(5)], free: 100 });
    assert_eq!(found, Plan { preempt: 0, admit: 1, rows: vec![16, 1, 1, 1] });
}

#[test]
fn the_load_of_a_plan_counts_who_is_left_and_who_is_new() {
    let queue = |running, waiting, free| Queue { running, waiting, free };
    let (running, waiting) = ([at(31, 32), at(10, 100)], [fresh(5)]);
    let found = super::plan(&LIMITS, 45, queue(&running, &waiting, 100));
    assert_eq!(found.rows, [1, 40, 5]);
    let load = found.load(queue(&running, &waiting, 100));
    assert_eq!(load, Load { decode: 1, prefill: 45, pairs: 32 + (11..=50).sum::<usize>() + 15 });
    let tight = [at(16, 17), at(10, 11)];
    let found = super::plan(&LIMITS, 45, queue(&tight, &[], 0));
    assert_eq!((found.preempt, found.load(queue(&tight, &[], 0))), (1, Load { decode: 1, prefill: 0, pairs: 17 }));
}

#[test]
fn admits_in_order_and_never_past_one_that_does_not_fit() {
    let limits = Limits { step_tokens: 200, ..LIMITS };
    let plan_with = |free| plan(&limits, &[at(15, 16)], &[fresh(32), fresh(64), fresh(1)], free);
    assert_eq!(plan_with(100), Plan { preempt: 0, admit: 3, rows: vec![1, 32, 40, 1] });
    assert_eq!(plan_with(5), Plan { preempt: 0, admit: 1, rows: vec![1, 32] });
}

#[test]
fn keeps_the_blocks_that_running_prompts_still_need() {
    let running = [at(16, 96)];
    assert_eq!(plan(&LIMITS, &running, &[fresh(16)], 5).admit, 0, "five are missing");
    assert_eq!(plan(&LIMITS, &running, &[fresh(16)], 6).admit, 1);
}

#[test]
fn a_cached_prefix_takes_only_what_nobody_holds() {
    let cached = |idle| Demand { target: 96, computed: 64, blocks: 4, idle };
    assert_eq!(plan(&LIMITS, &[], &[cached(0)], 2), Plan { preempt: 0, admit: 1, rows: vec![32] });
    assert_eq!(plan(&LIMITS, &[], &[cached(4)], 5).admit, 0, "four of the five are the prefix itself");
    assert_eq!(plan(&LIMITS, &[], &[cached(4)], 6).admit, 1);
}

#[test]
fn preempts_the_youngest_until_the_older_fit() {
    let running = [at(16, 17), at(16, 17), at(10, 11)];
    assert_eq!(plan(&LIMITS, &running, &[fresh(1)], 0), Plan { preempt: 2, admit: 0, rows: vec![1] });
}

#[test]
fn a_preempted_sequence_is_not_admitted_before_its_blocks_are_there() {
    let running = [at(17, 18)];
    assert_eq!(plan(&LIMITS, &running, &[fresh(40)], 2).admit, 0);
    assert_eq!(plan(&LIMITS, &running, &[fresh(40)], 3).admit, 1);
}

/// One sequence of the simulation: prompt, tokens to generate.
#[derive(Debug, Clone)]
struct Job {
    id: usize,
    known: usize,
    end: usize,
    computed: usize,
    blocks: usize,
}

impl Job {
    fn demand(&self) -> Demand {
        Demand { target: self.known, computed: self.computed, blocks: self.blocks, idle: 0 }
    }
}

fn demands<'a>(jobs: impl IntoIterator<Item = &'a Job>) -> Vec<Demand> {
    jobs.into_iter().map(Job::demand).collect()
}

/// Carries a plan out; returns the ids that finished.
fn carry_out(
    plan: &Plan,
    running: &mut Vec<Job>,
    waiting: &mut VecDeque<Job>,
    free: &mut usize,
    block: usize,
) -> Vec<usize> {
    for _ in 0..plan.preempt {
        let mut job = running.pop().expect("a running sequence");
        *free += std::mem::take(&mut job.blocks);
        job.computed = 0;
        waiting.push_front(job);
    }
    running.extend(waiting.drain(..plan.admit));
    for (job, rows) in running.iter_mut().zip(&plan.rows) {
        let blocks = (job.computed + rows).div_ceil(block);
        *free = free.checked_sub(blocks - job.blocks).expect("never more blocks than there are");
        job.blocks = blocks;
        job.computed += rows;
        if job.computed == job.known {
            job.known += 1;
        }
    }
    let (done, rest): (Vec<Job>, Vec<Job>) = running.drain(..).partition(|job| job.known > job.end);
    *running = rest;
    *free += done.iter().map(|job| job.blocks).sum::<usize>();
    done.into_iter().map(|job| job.id).collect()
}

proptest! {
    /// Whatever arrives, every step stays within rows, sequences and blocks, the oldest sequence and the oldest prompt
    /// advance, whoever decodes has its row, and all finish.
    #[test]
    fn stays_within_bounds_and_starves_nobody(
        arrivals in prop::collection::vec((0usize..6, 1usize..60, 1usize..30), 1..20),
        max_running in 1usize..6,
        spare_rows in 0usize..20,
        prefill_chunk in 1usize..30,
        prefill in 1usize..30,
        blocks in 12usize..30,
    ) {
        let limits = Limits { step_tokens: max_running + spare_rows, prefill_chunk, max_running, block: 8 };
        let mut arrivals: VecDeque<_> = arrivals.into_iter().enumerate().collect();
        let (mut running, mut waiting, mut free) = (Vec::new(), VecDeque::new(), blocks);
        let (total, mut finished) = (arrivals.len(), Vec::new());
        for step in 0.. {
            prop_assert!(step < 100_000, "does not end");
            while let Some((id, (pause, prompt, output))) = arrivals.front().copied() {
                if pause > step % 7 && !(running.is_empty() && waiting.is_empty()) {
                    break;
                }
                arrivals.pop_front();
                let end = (prompt + output).min(blocks * limits.block);
                waiting.push_back(Job { id, known: prompt, end, computed: 0, blocks: 0 });
            }
            if running.is_empty() && waiting.is_empty() {
                break;
            }
            let oldest = running.first().or(waiting.front()).map(|job: &Job| (job.id, job.computed));
            let (begun, coming) = (demands(&running), demands(&waiting));
            let queue = Queue { running: &begun, waiting: &coming, free };
            let plan = super::plan(&limits, prefill, queue);
            let load = plan.load(queue);
            prop_assert_eq!(load.rows(), plan.rows.iter().sum::<usize>());
            prop_assert!(load.rows() <= limits.step_tokens && load.prefill <= prefill);
            let kept = begun.iter().zip(&plan.rows);
            prop_assert!(kept.clone().all(|(sequence, rows)| !sequence.decodes() || *rows == 1));
            let oldest_prompt = kept.clone().find(|(sequence, _)| !sequence.decodes());
            prop_assert!(oldest_prompt.is_none_or(|(_, rows)| *rows > 0), "the oldest prompt did not advance");
            prop_assert!(plan.rows.len() <= max_running);
            prop_assert!(plan.rows.iter().all(|rows| *rows <= prefill_chunk));
            let done = carry_out(&plan, &mut running, &mut waiting, &mut free, limits.block);
            let (id, before) = oldest.expect("somebody is there");
            let advanced = running.first().is_some_and(|job| job.id == id && job.computed > before);
            prop_assert!(advanced || done.contains(&id), "the oldest did not advance");
            finished.extend(done);
        }
        prop_assert_eq!(finished.len(), total);
        prop_assert_eq!(free, blocks);
    }
}
