//! Tokens found in logits on the CUDA device: one upload of tables, the launches, one download.

use bytemuck::cast_slice;

use super::{
    CudaError, Driver,
    buffers::Growing,
    kernel::Address,
    plain::{
        AdjustLogits, Adjustment, Draw, Likely, MOST_LIKELY, Penalties, RestoreLogits, RowScore, Sample, Score, Scored,
    },
};
use crate::{Drawing, FoundToken, TokenAsk, TokenSource};

/// Of a row that has no token.
const NO_TOKEN: u32 = u32::MAX;

/// What kernels look up, for rows of `vocab` logits.
#[derive(Debug, Default, PartialEq)]
struct Tables {
    vocab: usize,
    draws: Vec<Draw>,
    changes: Vec<Adjustment>,
    scored: Vec<Scored>,
    penalties: Vec<Penalties>,
    /// What may be drawn anywhere; then that of each row in which some of it may not.
    masks: Vec<u64>,
    /// Known ones.
    tokens: Vec<u32>,
}

impl Tables {
    /// A row that asks for more likely tokens than the kernel gives has no token.
    fn new(vocab: usize, mask: &[u64], asks: &[TokenAsk<'_>]) -> Self {
        let mut tables = Self { vocab, masks: mask.to_vec(), ..Self::default() };
        for (row, ask) in (0..).zip(asks) {
            let top = ask.top.map(|top| top.min(vocab));
            let given = top.is_none_or(|top| top <= MOST_LIKELY);
            tables.scored.extend(top.filter(|_| given).map(|top| Scored { row, top: top as u32 }));
            tables.penalties.push(Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 });
            tables.tokens.push(match &ask.token {
                TokenSource::Known(token) if given => *token,
                _ => NO_TOKEN,
            });
            if let TokenSource::Drawn(drawing) = &ask.token
                && given
            {
                tables.draw(row, mask, drawing);
            }
        }
        tables
    }

    fn draw(&mut self, row: u32, mask: &[u64], drawing: &Drawing<'_>) {
        let &Drawing { u, temperature, top_k, top_p, min_p, .. } = drawing;
        let mask = if drawing.banned.is_empty() { 0 } else { self.without(mask, drawing.banned) };
        self.draws.push(Draw { u, row, mask, temperature, top_k, top_p, min_p });
        self.penalties[row as usize] = Penalties {
            repetition: drawing.repetition_penalty,
            presence: drawing.presence_penalty,
            frequency: drawing.frequency_penalty,
        };
        self.changes.extend(drawing.changes.iter().map(|change| Adjustment {
            row,
            id: change.id,
            occurred: change.occurred.into(),
            generated: change.generated,
            bias: change.bias,
            before: 0.0,
        }));
    }

    /// Which mask leaves these out as well.
    fn without(&mut self, mask: &[u64], banned: &[u32]) -> u32 {
        let first = self.masks.len();
        self.masks.extend_from_slice(mask);
        banned.iter().for_each(|id| self.masks[first + *id as usize / 64] &= !(1 << (id % 64)));
        (first / mask.len()) as u32
    }

    fn words(&self) -> usize {
        self.vocab.div_ceil(64)
    }

    /// Most likely tokens that there is room for in each row.
    fn pitch(&self) -> usize {
        self.scored.iter().map(|scored| scored.top as usize).max().unwrap_or(0)
    }

    /// In the order in which they lie on the device. Tokens come last: what is read back begins with them.
    fn parts(&self) -> [&[u8]; 6] {
        [
            cast_slice(&self.draws),
            cast_slice(&self.changes),
            cast_slice(&self.scored),
            cast_slice(&self.masks),
            cast_slice(&self.penalties),
            cast_slice(&self.tokens),
        ]
    }
}

/// Bytes of what is read back: tokens, scores, most likely tokens.
struct Results {
    scores: usize,
    likely: usize,
    end: usize,
}

impl Results {
    /// Where they begin, if tokens begin at `at`: every score at a multiple of 8.
    fn new(tables: &Tables, at: usize) -> Self {
        let scores = (at + size_of_val(&tables.tokens[..])).next_multiple_of(8) - at;
        let likely = scores + tables.scored.len() * size_of::<RowScore>();
        Self { scores, likely, end: likely + tables.scored.len() * tables.pitch() * size_of::<Likely>() }
    }
}

/// Rows of `logits [R, V]` for each of which something is asked; as they were in the end.
pub(super) fn find<D: Driver>(
    driver: &D,
    memory: &mut Growing<D::Memory>,
    (logits, vocab): (Address, usize),
    mask: &[u64],
    asks: &[TokenAsk<'_>],
) -> Result<Vec<Option<FoundToken>>, CudaError> {
    let tables = Tables::new(vocab, mask, asks);
    let parts = tables.parts();
    let at: usize = parts[..5].iter().map(|part| part.len()).sum();
    let results = Results::new(&tables, at);
    let memory = memory.fit(driver, at + results.end)?;
    driver.upload_parts(memory, 0, &parts)?;
    tables.launch(driver, driver.address(memory), logits, &results)?;
    let mut bytes = vec![0; results.end];
    driver.download(memory, at, &mut bytes)?;
    Ok(tables.answers(asks, &results, &bytes))
}

impl Tables {
    fn launch<D: Driver>(
        &self,
        driver: &D,
        mut next: Address,
        logits: Address,
        results: &Results,
    ) -> Result<(), CudaError> {
        let [draws, changes, asked, masks, penalties, tokens] = self.parts().map(|part| {
            let address = next;
            next += part.len() as u64;
            address
        });
        let (vocab, count) = (self.vocab as u32, self.changes.len() as u32);
        let words = 2 * self.words() as u32;
        AdjustLogits { logits, changes, penalties, vocab, count }.launch(driver)?;
        Sample { logits, draws, masks, tokens, vocab, words, draw_count: self.draws.len() as u32 }.launch(driver)?;
        RestoreLogits { logits, changes, vocab, count }.launch(driver)?;
        Score {
            logits,
            asked,
            tokens,
            out: tokens + results.scores as u64,
            likely: tokens + results.likely as u64,
            vocab,
            pitch: self.pitch() as u32,
            rows: self.scored.len() as u32,
        }
        .launch(driver)
    }

    /// What the bytes read back say.
    fn answers(&self, asks: &[TokenAsk<'_>], results: &Results, bytes: &[u8]) -> Vec<Option<FoundToken>> {
        let word = |at: usize| u32::from_le_bytes(bytes.as_chunks().0[at / 4]);
        let mut found: Vec<Option<FoundToken>> = (0..asks.len())
            .map(|row| Some(word(row * 4)).filter(|token| *token != NO_TOKEN))
            .map(|token| token.map(|token| FoundToken { token, logprob: None, top: Vec::new() }))
            .collect();
        for (index, scored) in self.scored.iter().enumerate() {
            let score: RowScore =
                bytemuck::pod_read_unaligned(&bytes[results.scores + index * size_of::<RowScore>()..][..16]);
            let likely = (0..scored.top as usize).map(|place| {
                let at = results.likely + (index * self.pitch() + place) * size_of::<Likely>();
                bytemuck::pod_read_unaligned::<Likely>(&bytes[at..][..size_of::<Likely>()])
            });
            let row = &mut found[scored.row as usize];
            if score.sum == 0.0 {
                *row = None;
            } else if let Some(row) = row {
                row.logprob = Some(logprob(&score, score.logit));
                row.top = likely.map(|token| (token.id, logprob(&score, token.logit))).collect();
            }
        }
        found
    }
}

/// Of a logit in a row; never below the least finite number.
fn logprob(row: &RowScore, logit: f32) -> f32 {
    (f64::from(logit) - f64::from(row.best) - libm::log(row.sum)).max(f64::from(f32::MIN)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogitChange;

    fn drawing(banned: &[u32], changes: Vec<LogitChange>) -> TokenSource<'_> {
        TokenSource::Drawn(Drawing {
            u: 0.5,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.5,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            changes,
            banned,
        })
    }

    #[test]
    fn tables_name_rows_and_share_the_mask() {
        let change = LogitChange { id: 3, occurred: true, generated: 2, bias: 0.5 };
        let asks = [
            TokenAsk { token: drawing(&[], vec![]), top: None },
            TokenAsk { token: TokenSource::Known(7), top: Some(2) },
            TokenAsk { token: drawing(&[1, 64], vec![change]), top: Some(900) },
            TokenAsk { token: TokenSource::Known(7), top: Some(MOST_LIKELY + 1) },
        ];
        let tables = Tables::new(2000, &[u64::MAX; 32], &asks);
        assert_eq!(tables.draws.iter().map(|draw| (draw.row, draw.mask)).collect::<Vec<_>>(), [(0, 0), (2, 1)]);
        assert_eq!((tables.masks[32], tables.masks[33], tables.masks[34]), (!2, !1, u64::MAX));
        assert_eq!(tables.tokens, [NO_TOKEN, 7, NO_TOKEN, NO_TOKEN]);
        assert_eq!(tables.scored, [Scored { row: 1, top: 2 }, Scored { row: 2, top: 900 }]);
        let changed = &tables.changes[0];
        assert_eq!((changed.row, changed.id, changed.occurred, changed.generated), (2, 3, 1, 2));
        assert_eq!((tables.penalties[2].repetition, tables.penalties[1].repetition), (1.5, 1.0));
        assert_eq!(tables.pitch(), 900);
        let ask = TokenAsk { token: drawing(&[1], vec![]), top: Some(900) };
        let few = Tables::new(5, &[31], &[ask]);
        assert_eq!((few.scored[0].top, few.words()), (5, 1), "no more than there are");
    }

    #[test]
    fn scores_lie_at_multiples_of_eight() {
        let ask = TokenAsk { token: TokenSource::Known(0), top: Some(3) };
        let tables = Tables::new(9, &[511], &vec![ask; 3]);
        let at: usize = tables.parts()[..5].iter().map(|part| part.len()).sum();
        let results = Results::new(&tables, at);
        assert_eq!((at + results.scores) % 8, 0);
        assert!(results.scores >= 12 && results.end == results.likely + 3 * 3 * 8);
    }
}
