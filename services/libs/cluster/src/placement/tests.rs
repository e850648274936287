use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::member::fixture::{cell, cells, expert, view};
use crate::{LocalMembership, MakeMember, Member, Membership};

const EIGHT: CellShape = CellShape { groups: 8, spans: 1 };

fn pick(choice: &str, members: Vec<Member>) -> Result<Vec<CellId>, String> {
    pick_of(EIGHT, choice, members, usize::MAX)
}

fn pick_of(shape: CellShape, choice: &str, members: Vec<Member>, fits: usize) -> Result<Vec<CellId>, String> {
    let choice = choice.parse().expect("a valid choice");
    choose(&choice, shape, &view(members), &Loads::new(), fits).map_err(|error| error.to_string())
}

#[test]
fn listed_cells_are_taken_as_they_are() {
    assert_eq!(pick("5,0-2,1", vec![expert("a", &[0, 1, 2, 5])]), Ok(cells(&[0, 1, 2, 5])));
    let spans = CellShape { groups: 2, spans: 2 };
    let at = |span, group| CellId { span, group: GroupId(group) };
    assert_eq!(pick_of(spans, "1", vec![], 9), Ok(vec![at(0, 1), at(1, 1)]), "a group means all of its spans");
    assert_eq!(pick_of(spans, "0-1@1", vec![], 9), Ok(vec![at(1, 0), at(1, 1)]));
}

#[test]
fn wrong_cells_are_refused_with_both_numbers() {
    for (choice, fits, message) in [
        ("9", 8, "placement: cell 9: the model has 8 groups, counted from 0"),
        ("0@1", 8, "placement: layer span 1: the model has 1, counted from 0"),
        ("1/9", 8, "placement: shard 1/9: the model has only 8 cells"),
        ("auto:9", 99, "placement: cells auto:9: the model has only 8 cells"),
        ("auto", 0, "placement: cells auto: not one cell fits in memory"),
        ("auto:4", 3, "placement: cells auto:4: 4 cells, but 3 fit in memory"),
        ("0-4", 3, "placement: cells 0-4: 5 cells, but 3 fit in memory"),
    ] {
        assert_eq!(pick_of(EIGHT, choice, vec![], fits), Err(message.to_owned()));
    }
}

#[test]
fn auto_prefers_few_replicas_then_load_then_the_lowest() {
    let members = vec![expert("a", &[0, 1, 2, 3]), expert("b", &[0, 1, 4, 5])];
    assert_eq!(pick("auto:2", members.clone()), Ok(cells(&[6, 7])), "nobody has these");
    assert_eq!(pick("auto:6", members.clone()), Ok(cells(&[2, 3, 4, 5, 6, 7])), "then those with one replica");
    let loads = Loads::from([(cell(5), 2.0), (cell(3), 1.0), (cell(0), 9.0)]);
    let chosen = choose(&CellChoice::Auto(Some(4)), EIGHT, &view(members), &loads, 8).expect("it fits");
    assert_eq!(chosen, cells(&[3, 5, 6, 7]), "load decides among equals, not against replicas");
}

#[test]
fn auto_takes_what_fits_and_counts_no_leaving_replica() {
    assert_eq!(pick_of(EIGHT, "auto", vec![], 3), Ok(cells(&[0, 1, 2])));
    assert_eq!(pick_of(EIGHT, "auto", vec![], 100).map(|all| all.len()), Ok(8));
    let mut leaving = expert("a", &[0, 1]);
    leaving.state = MemberState::Leaving;
    assert_eq!(pick("auto:2", vec![leaving]), Ok(cells(&[0, 1])));
}

proptest! {
    #[test]
    fn shards_partition_the_cells_in_order(groups in 1_u32..70, spans in 1_u32..4, of in 1_u32..70) {
        let shape = CellShape { groups, spans };
        prop_assume!(u64::from(of) <= shape.count());
        let parts: Vec<Vec<CellId>> = (1..=of)
            .map(|index| pick_of(shape, &format!("{index}/{of}"), vec![], usize::MAX).expect("not empty"))
            .collect();
        let smallest = parts.iter().map(Vec::len).min().expect("one part");
        let largest = parts.iter().map(Vec::len).max().expect("one part");
        prop_assert!(smallest >= 1 && largest - smallest <= 1);
        prop_assert_eq!(parts.concat(), shape.cells().collect::<Vec<_>>());
    }

    /// However many processes join, one after another, no cell has two replicas more than another.
    #[test]
    fn auto_stays_even(sizes in proptest::collection::vec(1_u32..9, 1..9)) {
        let mut members = Vec::new();
        for (i, size) in sizes.iter().enumerate() {
            let chosen = pick(&format!("auto:{size}"), members.clone()).expect("it fits");
            prop_assert_eq!(chosen.len(), *size as usize);
            let mut joined = expert(&format!("e{i}"), &[]);
            joined.cells = chosen;
            members.push(joined);
            let counts = replicas(&members);
            prop_assert!(counts.iter().max().expect("8") - counts.iter().min().expect("8") <= 1, "{:?}", counts);
        }
    }
}

fn replicas(members: &[Member]) -> Vec<usize> {
    let mut counts: HashMap<CellId, usize> = HashMap::new();
    members.iter().flat_map(|member| &member.cells).for_each(|cell| *counts.entry(*cell).or_default() += 1);
    EIGHT.cells().map(|cell| counts.get(&cell).copied().unwrap_or(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_processes_at_once_cover_eight_cells() {
    for _ in 0..50 {
        let cluster = LocalMembership::new("test");
        let join = |instance: String| {
            let make: MakeMember = Arc::new(move |view| {
                let cells = choose(&CellChoice::Auto(Some(2)), EIGHT, view, &Loads::new(), 8)?;
                Ok(Member { cells, ..expert(&instance, &[]) })
            });
            let cluster = cluster.clone();
            tokio::spawn(async move { cluster.register(make).await.expect("a free id") })
        };
        let joins: Vec<_> = (0..4).map(|i| join(format!("e{i}"))).collect();
        let registrations = futures::future::join_all(joins).await;
        assert_eq!(replicas(&cluster.watch().borrow().members), [1; 8]);
        drop(registrations);
    }
}
