//! Which replica runs which group of a layer. Pure: demand and what is known of the shards in, one shard per group out.

/// Waits that differ by less than this are not worth leaving the replica of the last time for.
const STICKY_US: f64 = 200.0;
/// What one more message costs beside the work in it.
const MESSAGE_US: f64 = 100.0;
/// Time of a pair where no shard has done anything yet.
const UNKNOWN_US_PER_PAIR: f64 = 20.0;

/// What one layer wants of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// The group.
    pub group: u32,
    /// (row, expert) pairs.
    pub pairs: u32,
}

/// What is known of one shard.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Which groups it holds, by group.
    pub holds: Vec<bool>,
    /// How far it is from being well: 0 well, more is worse.
    pub level: u8,
    /// It has another numerics id than the one preferred.
    pub foreign: bool,
    /// Pairs that wait there already.
    pub waiting: usize,
    /// Time of one more pair; `None` where it has done nothing yet.
    pub us_per_pair: Option<f64>,
    /// Not to be used for this work again.
    pub tried: bool,
}

/// The groups that one shard runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Index into the candidates.
    pub shard: usize,
    /// Ascending.
    pub groups: Vec<u32>,
}

/// Picks one shard for each group in demand; by shard, ascending.
///
/// `candidates` are in order of instance id, which decides between equals. A well shard comes before one that is not,
/// one of the preferred numerics id before another, then counts the predicted wait. `last[group]` is kept unless
/// another is clearly faster.
///
/// # Errors
/// The first group that no candidate can take.
pub fn assign(demand: &[Demand], candidates: &[Candidate], last: &[Option<usize>]) -> Result<Vec<Share>, u32> {
    let mut shares: Vec<Share> = Vec::new();
    let mut planned = vec![0usize; candidates.len()];
    let usual = usual_us_per_pair(candidates);
    for want in demand {
        let cost = |shard: usize| {
            let candidate = &candidates[shard];
            let message = if planned[shard] == 0 { MESSAGE_US } else { 0.0 };
            let pairs = candidate.waiting + planned[shard] + want.pairs as usize;
            message + pairs as f64 * candidate.us_per_pair.unwrap_or(usual)
        };
        let class = |shard: usize| (candidates[shard].level, candidates[shard].foreign);
        let able = |shard: &usize| {
            let candidate = &candidates[*shard];
            !candidate.tried && candidate.holds.get(want.group as usize).copied().unwrap_or(false)
        };
        let best = (0..candidates.len())
            .filter(able)
            .min_by(|a, b| class(*a).cmp(&class(*b)).then(cost(*a).total_cmp(&cost(*b))).then(a.cmp(b)))
            .ok_or(want.group)?;
        let kept = last.get(want.group as usize).copied().flatten().filter(|shard| {
            *shard < candidates.len()
                && able(shard)
                && class(*shard) == class(best)
                && cost(*shard) <= 1.25 * cost(best) + STICKY_US
        });
        let shard = kept.unwrap_or(best);
        planned[shard] += want.pairs.max(1) as usize;
        match shares.iter_mut().find(|share| share.shard == shard) {
            Some(share) => share.groups.push(want.group),
            None => shares.push(Share { shard, groups: vec![want.group] }),
        }
    }
    shares.sort_by_key(|share| share.shard);
    shares.iter_mut().for_each(|share| share.groups.sort_unstable());
    Ok(shares)
}

/// A shard that is not known yet is expected to be like the others: neither avoided nor sought.
fn usual_us_per_pair(candidates: &[Candidate]) -> f64 {
    let known: Vec<f64> = candidates.iter().filter_map(|candidate| candidate.us_per_pair).collect();
    if known.is_empty() { UNKNOWN_US_PER_PAIR } else { known.iter().sum::<f64>() / known.len() as f64 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shard(groups: &[u32]) -> Candidate {
        let holds = (0..8).map(|g| groups.contains(&g)).collect();
        Candidate { holds, level: 0, foreign: false, waiting: 0, us_per_pair: Some(1.0), tried: false }
    }

    fn demand(groups: &[u32]) -> Vec<Demand> {
        groups.iter().map(|&group| Demand { group, pairs: 4 }).collect()
    }

    fn owner(shares: &[Share], group: u32) -> usize {
        shares.iter().find(|s| s.groups.contains(&group)).unwrap().shard
    }

    #[test]
    fn equals_are_decided_by_id_and_small_work_stays_together() {
        let shards = [shard(&[0, 1, 2, 3]), shard(&[0, 1, 2, 3])];
        let shares = assign(&demand(&[0, 1, 3]), &shards, &[]).unwrap();
        assert_eq!(shares, [Share { shard: 0, groups: vec![0, 1, 3] }]);
    }

    #[test]
    fn large_work_is_spread() {
        let mut shards = [shard(&[0, 1]), shard(&[0, 1])];
        shards.iter_mut().for_each(|s| s.us_per_pair = Some(1000.0));
        let shares = assign(&demand(&[0, 1]), &shards, &[]).unwrap();
        assert_ne!(owner(&shares, 0), owner(&shares, 1));
    }

    #[test]
    fn the_last_replica_is_kept_until_another_is_clearly_faster() {
        let mut shards = [shard(&[0]), shard(&[0])];
        shards[1].waiting = 150;
        assert_eq!(owner(&assign(&demand(&[0]), &shards, &[Some(1)]).unwrap(), 0), 1);
        shards[1].waiting = 5000;
        assert_eq!(owner(&assign(&demand(&[0]), &shards, &[Some(1)]).unwrap(), 0), 0);
    }

    #[test]
    fn health_comes_first_then_numerics_then_the_wait() {
        let mut shards = [shard(&[0]), shard(&[0]), shard(&[0])];
        shards[0].level = 1;
        shards[1].foreign = true;
        shards[2].waiting = 10_000;
        assert_eq!(owner(&assign(&demand(&[0]), &shards, &[]).unwrap(), 0), 2);
        shards[2].tried = true;
        assert_eq!(owner(&assign(&demand(&[0]), &shards, &[Some(2)]).unwrap(), 0), 1);
        shards[1].tried = true;
        assert_eq!(owner(&assign(&demand(&[0]), &shards, &[]).unwrap(), 0), 0);
    }

    #[test]
    fn a_shard_that_has_done_nothing_is_taken_for_one_like_the_others() {
        let mut shards = [shard(&[0]), shard(&[0])];
        for us_per_pair in [1.0, 1000.0] {
            (shards[0].us_per_pair, shards[1].us_per_pair) = (Some(us_per_pair), None);
            assert_eq!(owner(&assign(&demand(&[0]), &shards, &[]).unwrap(), 0), 0, "not sought");
            shards[0].waiting = 1000;
            assert_eq!(owner(&assign(&demand(&[0]), &shards, &[]).unwrap(), 0), 1, "not avoided");
            shards[0].waiting = 0;
        }
    }

    #[test]
    fn a_group_that_nobody_holds_is_named() {
        assert_eq!(assign(&demand(&[1, 5]), &[shard(&[0, 1, 2])], &[]), Err(5));
    }

    proptest! {
        #[test]
        fn each_group_has_one_holder(
            held in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 8), 1..6),
            waits in proptest::collection::vec(0usize..1_000_000, 6),
            levels in proptest::collection::vec(0u8..3, 6),
            wanted in proptest::collection::vec(any::<bool>(), 8),
        ) {
            let shards: Vec<Candidate> = held.iter().enumerate().map(|(i, holds)| Candidate {
                holds: holds.clone(), level: levels[i], foreign: i % 2 == 1, waiting: waits[i], us_per_pair: Some(3.0),
                tried: false,
            }).collect();
            let groups: Vec<u32> = (0..8).filter(|g| wanted[*g as usize]).collect();
            match assign(&demand(&groups), &shards, &[]) {
                Err(group) => prop_assert!(shards.iter().all(|s| !s.holds[group as usize])),
                Ok(shares) => {
                    let mut got: Vec<u32> = shares.iter().flat_map(|s| s.groups.clone()).collect();
                    got.sort_unstable();
                    prop_assert_eq!(got, groups);
                    for share in &shares {
                        prop_assert!(share.groups.iter().all(|g| shards[share.shard].holds[*g as usize]));
                    }
                }
            }
        }
    }
}
