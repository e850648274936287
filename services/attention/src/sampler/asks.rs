//! The settings of a request as a device that finds tokens itself takes them.

use std::collections::BTreeMap;

use conclave_kernels::{Drawing, LogitChange};

use super::{Params, Position, random};

impl Params {
    /// What decides the token at a position: on a device, as [`super::sample`] does here.
    pub fn drawing<'a>(&self, at: Position<'a>) -> Drawing<'a> {
        Drawing {
            u: random::draw(self.seed, at.choice, at.position),
            temperature: self.temperature,
            top_k: u32::try_from(self.top_k).unwrap_or(u32::MAX),
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            changes: self.changes(at),
            banned: at.banned,
        }
    }

    /// What penalties and biases change, ascending by id.
    fn changes(&self, at: Position<'_>) -> Vec<LogitChange> {
        let unchanged = |id| LogitChange { id, occurred: false, generated: 0, bias: 0.0 };
        let mut changes: BTreeMap<u32, LogitChange> =
            self.bias.iter().map(|(id, bias)| (*id, LogitChange { bias: *bias, ..unchanged(*id) })).collect();
        if self.penalises() {
            for (id, count) in at.history.iter() {
                let change = changes.entry(id).or_insert_with(|| unchanged(id));
                (change.occurred, change.generated) = (true, count.output);
            }
        }
        changes.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use conclave_proto::v1::Sampling;

    use super::*;
    use crate::sampler::History;

    fn changes(penalty: f32) -> Vec<LogitChange> {
        let sampling = Sampling {
            top_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: penalty,
            logit_bias: HashMap::from([(5, -1.5), (2, 3.0)]),
            ..Sampling::default()
        };
        let history = History::new(&[5, 7, 7, 5], 2);
        let at = Position { position: 4, choice: 0, history: &history, banned: &[] };
        Params::new(&sampling, 10).unwrap().drawing(at).changes
    }

    #[test]
    fn penalties_and_biases_of_one_id_come_together() {
        let change = |id, occurred, generated, bias| LogitChange { id, occurred, generated, bias };
        assert_eq!(changes(0.5), [change(2, false, 0, 3.0), change(5, true, 1, -1.5), change(7, true, 1, 0.0)]);
        assert_eq!(changes(0.0), [change(2, false, 0, 3.0), change(5, false, 0, -1.5)]);
    }
}
