//! How prompts share the rows of a step.

/// Rows that a prompt gets at least, if it gets any and needs them: fewer would cost about the same time.
pub(super) const QUANTUM: usize = 16;

/// The share of each prompt, in order of arrival, when they want so many rows and there are `rows`.
///
/// The oldest gets half, so that its first token does not wait for those who came later for more than twice the time.
/// The next, as many as find a quantum, share the rest evenly, so that a short prompt does not wait for long ones before
/// it. What they do not need goes to whoever came first. No row is left while somebody wants it.
pub(super) fn share(rows: usize, wanted: &[usize]) -> Vec<usize> {
    let mut shares = vec![0; wanted.len()];
    let Some((oldest, others)) = wanted.split_first() else { return shares };
    shares[0] = rows.div_ceil(2).max(QUANTUM).min(rows).min(*oldest);
    let mut left = rows - shares[0];
    let served = (left / QUANTUM).max(1).min(others.len());
    left -= share_evenly(left, &others[..served], &mut shares[1..=served]);
    for (share, wanted) in shares.iter_mut().zip(wanted) {
        let more = left.min(wanted - *share);
        *share += more;
        left -= more;
    }
    shares
}

/// Gives everybody the same, or what it wants where that is less; how much that is together.
fn share_evenly(rows: usize, wanted: &[usize], shares: &mut [usize]) -> usize {
    let mut by_want: Vec<usize> = (0..wanted.len()).collect();
    by_want.sort_by_key(|index| wanted[*index]);
    let mut left = rows;
    for (done, index) in by_want.into_iter().enumerate() {
        shares[index] = wanted[index].min(left / (wanted.len() - done));
        left -= shares[index];
    }
    rows - left
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_prompt_gets_what_it_wants() {
        assert_eq!(share(100, &[70]), [70]);
        assert_eq!(share(100, &[300]), [100]);
        assert_eq!(share(100, &[]), [0; 0]);
    }

    #[test]
    fn the_oldest_gets_half_and_the_others_share_the_rest() {
        assert_eq!(share(96, &[500, 500, 500, 500]), [48, 16, 16, 16]);
        assert_eq!(share(200, &[500, 500, 500]), [100, 50, 50]);
        assert_eq!(share(200, &[500, 10, 500]), [100, 10, 90], "a short one passes the long one before it");
    }

    #[test]
    fn nobody_gets_less_than_a_quantum_of_few_rows() {
        assert_eq!(share(64, &[500; 5]), [32, 16, 16, 0, 0]);
        assert_eq!(share(20, &[500; 3]), [16, 4, 0], "the last rows are not left");
        assert_eq!(share(10, &[500; 3]), [10, 0, 0]);
    }

    #[test]
    fn what_is_not_needed_goes_to_who_came_first() {
        assert_eq!(share(200, &[500, 10, 20]), [170, 10, 20]);
        assert_eq!(share(64, &[3, 2, 1, 2, 500]), [3, 2, 1, 2, 56]);
    }

    proptest! {
        /// All rows are given that anybody wants, nobody gets more than it wants, the oldest gets half, and of the others
        /// nobody gets less than one that came later, unless it wants no more.
        #[test]
        fn shares_are_complete_and_fair(rows in 1usize..600, wanted in prop::collection::vec(1usize..400, 1..20)) {
            let shares = share(rows, &wanted);
            prop_assert_eq!(shares.iter().sum::<usize>(), rows.min(wanted.iter().sum()));
            prop_assert!(shares.iter().zip(&wanted).all(|(share, wanted)| share <= wanted));
            prop_assert!(shares[0] >= wanted[0].min(rows.div_ceil(2)));
            for later in 2..wanted.len() {
                for earlier in 1..later {
                    let fair = shares[earlier] + 1 >= shares[later] || shares[earlier] == wanted[earlier];
                    prop_assert!(fair, "{shares:?} of {wanted:?}");
                }
            }
        }
    }
}
