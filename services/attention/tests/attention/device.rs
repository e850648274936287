//! A device that fails.

use std::sync::Arc;
use std::time::Duration;

use crate::common::{Experts, PATIENCE, collect, config, prompt, request};
use conclave_attention::AttentionService;
use conclave_attention::trunk::{MoeRows, Segment, StepRows, Trunk, TrunkShape};
use conclave_kernels::{Dtype, KernelError};
use conclave_serve::ErrorKind;
use prometheus::Registry;

/// Fails in the step of this number.
struct Failing {
    shape: TrunkShape,
    left: usize,
    /// Rows whose routed experts are to be called.
    rows: Option<usize>,
}

fn failure() -> KernelError {
    KernelError::Failed("a bit has flipped".into())
}

impl Trunk for Failing {
    fn shape(&self) -> &TrunkShape {
        &self.shape
    }

    fn begin(&mut self, _: usize, rows: StepRows) {
        self.rows = Some(rows.len());
    }

    fn finish(&mut self, _: usize) -> Result<Segment, KernelError> {
        if let Some(rows) = self.rows.take() {
            let (x, logits) = (vec![0; rows * 8], vec![0.0; rows * 2]);
            return Ok(Segment::Moe(MoeRows { layer: 0, x, logits, published: None }));
        }
        self.left = self.left.checked_sub(1).ok_or_else(failure)?;
        Ok(Segment::End)
    }

    fn shared_experts(&mut self, _: usize) {}

    fn resume(&mut self, _: usize, _: &[u8]) {}

    fn logits(&mut self, rows: &[u32], logits: &mut Vec<f32>) -> Result<(), KernelError> {
        logits.clear();
        logits.resize(rows.len() * self.shape.vocab, 0.0);
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_device_ends_the_engine_and_every_request() {
    let shape = TrunkShape {
        vocab: 500,
        hidden: 2,
        experts: 2,
        activation: Dtype::F32,
        block: 64,
        blocks: 64,
        context_limit: 64,
        numerics: "failing".into(),
    };
    let (trunk, registry) = (Failing { shape, left: 4, rows: None }, Registry::new());
    let service = AttentionService::with_trunk(config(), trunk, "none", Experts::new(), &registry).expect("starts");
    let answer = collect(service.generate(request(prompt(1, 5))).unwrap()).await;
    assert_eq!(answer.tokens.len(), 4, "what came before is given");
    assert_eq!(answer.error.expect("an error").kind, ErrorKind::Unavailable, "elsewhere it may go on");
    tokio::time::timeout(PATIENCE, service.stopped()).await.expect("the engine ends");
    assert_eq!(service.generate(request(prompt(2, 5))).unwrap_err().kind, ErrorKind::Unavailable);
    tokio::time::timeout(Duration::from_secs(1), Arc::clone(&service).drain()).await.expect("nothing to wait for");
}
