//! Routed experts that are a fixed function of each row, and that can be made to fail.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use conclave_dispatch::MoeLink;
use conclave_kernels::{Dtype, activation};
use conclave_proto::v1::{Activation, DispatchError, DispatchErrorKind, MoeInput, MoeOutput};
use conclave_serve::{Error, ErrorKind};

/// What the next calls do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Behaviour {
    Answer,
    /// This many calls fail, then they answer.
    Fail(usize, ErrorKind),
    /// All fail, in the message.
    Refuse(DispatchErrorKind),
    /// Never answers.
    Hang,
    /// Each call takes this long.
    Slow(Duration),
    /// Row 0 of the next call is not a number, then they answer.
    BreakFirstRow,
}

/// The fake.
pub(crate) struct Experts {
    behaviour: Mutex<Behaviour>,
    calls: AtomicUsize,
    under_way: AtomicUsize,
    most_at_once: AtomicUsize,
    /// The budget of the last call.
    pub(crate) budget_us: Mutex<u64>,
}

impl Experts {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            behaviour: Mutex::new(Behaviour::Answer),
            calls: AtomicUsize::new(0),
            under_way: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            budget_us: Mutex::new(0),
        })
    }

    pub(crate) fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub(crate) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// Calls that were answered by [`Behaviour::Slow`] at the same time.
    pub(crate) fn most_at_once(&self) -> usize {
        self.most_at_once.load(Ordering::SeqCst)
    }

    /// What this call does; counts down.
    fn next(&self) -> Behaviour {
        let mut behaviour = self.behaviour.lock().unwrap();
        let now = behaviour.clone();
        match &mut *behaviour {
            Behaviour::Fail(0, _) => *behaviour = Behaviour::Answer,
            Behaviour::Fail(left, _) => *left -= 1,
            Behaviour::BreakFirstRow => *behaviour = Behaviour::Answer,
            _ => {}
        }
        now
    }
}

#[async_trait]
impl MoeLink for Experts {
    async fn moe(&self, input: MoeInput) -> Result<MoeOutput, Error> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        *self.budget_us.lock().unwrap() = input.budget_us;
        assert_eq!(input.x.len(), (input.rows * input.hidden) as usize * dtype(&input).size());
        assert_eq!(input.logits.len(), (input.rows * input.experts * 4) as usize);
        match self.next() {
            Behaviour::Answer => Ok(output(&input, routed(&input))),
            Behaviour::Fail(0, _) => Ok(output(&input, routed(&input))),
            Behaviour::Fail(_, kind) => Err(Error::new(kind, "told to fail")),
            Behaviour::Refuse(kind) => {
                let error = DispatchError { kind: kind.into(), message: "told to refuse".into() };
                Ok(MoeOutput { error: Some(error), ..output(&input, Vec::new()) })
            }
            Behaviour::Hang => std::future::pending().await,
            Behaviour::Slow(pause) => {
                let under_way = self.under_way.fetch_add(1, Ordering::SeqCst) + 1;
                self.most_at_once.fetch_max(under_way, Ordering::SeqCst);
                tokio::time::sleep(pause).await;
                self.under_way.fetch_sub(1, Ordering::SeqCst);
                Ok(output(&input, routed(&input)))
            }
            Behaviour::BreakFirstRow => {
                let mut values = routed(&input);
                values[..input.hidden as usize].fill(f32::NAN);
                Ok(output(&input, values))
            }
        }
    }
}

fn dtype(input: &MoeInput) -> Dtype {
    if input.activation() == Activation::F32 { Dtype::F32 } else { Dtype::Bf16 }
}

fn output(input: &MoeInput, routed: Vec<f32>) -> MoeOutput {
    MoeOutput {
        step: input.step,
        layer: input.layer,
        attempt: input.attempt,
        activation: input.activation,
        routed: activation::encode(dtype(input), &routed).into(),
        ..MoeOutput::default()
    }
}

/// Of each row by itself: the row turned by one, bent, and weighted by its gate logits.
fn routed(input: &MoeInput) -> Vec<f32> {
    let (mut x, mut logits) = (Vec::new(), Vec::new());
    activation::decode(dtype(input), &input.x, &mut x);
    activation::decode(Dtype::F32, &input.logits, &mut logits);
    let (hidden, experts) = (input.hidden as usize, input.experts as usize);
    let rows = x.chunks_exact(hidden).zip(logits.chunks_exact(experts));
    rows.flat_map(|(x, logits)| {
        let weight: f32 = logits.iter().sum::<f32>() / experts as f32 + input.layer as f32 / 8.0;
        (0..hidden).map(move |i| weight * x[(i + 1) % hidden] / (1.0 + x[i].abs()))
    })
    .collect()
}
