//! A small random checkpoint on disk, and expert services over it.
#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use conclave_cluster::{LocalMembership, Member, MemberState, Membership, Registration, Role};
use conclave_dispatch::{DispatchConfig, Dispatcher, LinkError, ModelShape, ShardConnector, ShardLink};
use conclave_expert::{ExpertConfig, ExpertService};
use conclave_kernels::{Device, Dtype, Pool, Reference, activation};
use conclave_model::names::{self, FfnNames};
use conclave_model::{Checkpoint, ModelConfig};
use conclave_proto::v1::{Activation, ExpertBatch, MoeInput, MoeOutput, WorkId};
use conclave_proto::{CellId, GroupId, InstanceId};
use prometheus::Registry;
use safetensors::tensor::TensorView;

pub(crate) const HIDDEN: usize = 32;
pub(crate) const EXPERTS: usize = 32;
pub(crate) const ALL: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

const CONFIG: &str = r#"{
  "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
  "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 3,
  "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "moe_intermediate_size": 8,
  "n_routed_experts": 32, "n_shared_experts": 1, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
  "moe_layer_freq": 1, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3,
  "scoring_func": "softmax", "norm_topk_prob": false, "routed_scaling_factor": 2.0,
  "q_lora_rank": null, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4,
  "rms_norm_eps": 1e-6, "rope_theta": 10000, "rope_scaling": null, "max_position_embeddings": 64,
  "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": false, "attention_bias": false,
  "hidden_act": "silu", "torch_dtype": "bfloat16"
}"#;

/// Reproducible values in [-1, 1).
pub(crate) fn values(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

fn ffn(names: &FfnNames, width: usize) -> [(String, Vec<usize>); 3] {
    [
        (names.gate_proj(), vec![width, HIDDEN]),
        (names.up_proj(), vec![width, HIDDEN]),
        (names.down_proj(), vec![HIDDEN, width]),
    ]
}

fn tensors(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        (names::embed(), vec![config.vocab, HIDDEN]),
        (names::lm_head(), vec![config.vocab, HIDDEN]),
        (names::final_norm(), vec![HIDDEN]),
    ];
    for index in 0..config.layers {
        let layer = names::layer(index);
        all.extend([
            (layer.input_norm(), vec![HIDDEN]),
            (layer.post_attention_norm(), vec![HIDDEN]),
            (layer.q_proj(), vec![16, HIDDEN]),
            (layer.kv_a_proj(), vec![12, HIDDEN]),
            (layer.kv_a_norm(), vec![8]),
            (layer.kv_b_proj(), vec![16, 8]),
            (layer.o_proj(), vec![HIDDEN, 8]),
        ]);
        if config.is_moe(index) {
            all.push((layer.gate(), vec![EXPERTS, HIDDEN]));
            all.extend(ffn(&layer.shared(), 8));
            (0..EXPERTS).for_each(|e| all.extend(ffn(&layer.expert(e), 8)));
        } else {
            all.extend(ffn(&layer.dense(), 24));
        }
    }
    all
}

/// A checkpoint with random weights; the directory lives as long as the first value.
pub(crate) fn checkpoint() -> (tempfile::TempDir, Arc<Checkpoint>) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let config = ModelConfig::parse(CONFIG.as_bytes()).unwrap();
    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(&config)
        .into_iter()
        .enumerate()
        .map(|(index, (name, shape))| {
            let bytes = activation::encode(Dtype::Bf16, &values(index as u64, shape.iter().product()));
            (name, shape, bytes)
        })
        .collect();
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, &dir.path().join("model.safetensors")).unwrap();
    let checkpoint = Checkpoint::open(dir.path().to_str().unwrap()).unwrap();
    (dir, Arc::new(checkpoint))
}

pub(crate) fn cells(groups: &[u32]) -> Vec<CellId> {
    groups.iter().map(|g| CellId { span: 0, group: GroupId(*g) }).collect()
}

pub(crate) fn reference() -> Arc<Reference> {
    Arc::new(Reference::new(Pool::new(1).unwrap()))
}

pub(crate) fn start<D: Device>(
    config: ExpertConfig,
    device: Arc<D>,
    checkpoint: &Arc<Checkpoint>,
    groups: &[u32],
) -> Arc<ExpertService<D>> {
    ExpertService::start(config, device, checkpoint.clone(), &cells(groups), &Registry::new()).unwrap()
}

pub(crate) fn input(act: Dtype, seed: u64, rows: usize) -> MoeInput {
    let logits: Vec<f32> = values(seed + 1000, rows * EXPERTS).iter().map(|v| v * 4.0).collect();
    MoeInput {
        caller: 7,
        step: seed,
        layer: 1,
        activation: Activation::from(act).into(),
        rows: rows as u32,
        hidden: HIDDEN as u32,
        experts: EXPERTS as u32,
        x: activation::encode(act, &values(seed, rows * HIDDEN)).into(),
        logits: activation::encode(Dtype::F32, &logits).into(),
        ..MoeInput::default()
    }
}

/// A batch of `rows` rows, each for the first expert of `group`.
pub(crate) fn batch(act: Dtype, step: u64, rows: usize, group: u32) -> ExpertBatch {
    ExpertBatch {
        id: Some(WorkId { caller: 1, step, layer: 1, attempt: 0, part: 0 }),
        activation: Activation::from(act).into(),
        rows: rows as u32,
        hidden: HIDDEN as u32,
        x: activation::encode(act, &values(step, rows * HIDDEN)).into(),
        groups: vec![group],
        experts: vec![group * 4],
        counts: vec![rows as u32],
        row_index: (0..rows as u32).collect(),
        weights: vec![1.0; rows],
        ..ExpertBatch::default()
    }
}

pub(crate) fn member(name: &str, address: &str, groups: &[u32], fingerprint: &str) -> Member {
    Member {
        instance: InstanceId(name.into()),
        role: Role::Expert,
        state: MemberState::Ready,
        address: address.into(),
        same_host: None,
        cells: cells(groups),
        fingerprint: fingerprint.into(),
        numerics: "n".into(),
        hosts_dispatch: false,
        since_ms: 1,
    }
}

/// Links to services of this process.
pub(crate) struct InProcess(pub(crate) BTreeMap<String, Arc<dyn ShardLink>>);

#[async_trait]
impl ShardConnector for InProcess {
    async fn connect(&self, member: &Member) -> Result<Arc<dyn ShardLink>, LinkError> {
        Ok(self.0[&member.instance.0].clone())
    }
}

pub(crate) async fn register(membership: &LocalMembership, member: Member) -> Box<dyn Registration> {
    membership.register(Arc::new(move |_| Ok(member.clone()))).await.unwrap()
}

/// One layer over services that hold `placement`, in this process.
pub(crate) async fn dispatch<D: Device>(
    device: &Arc<D>,
    checkpoint: &Arc<Checkpoint>,
    placement: &[Vec<u32>],
    input: MoeInput,
) -> MoeOutput {
    let membership = LocalMembership::new("test");
    let (mut links, mut registrations) = (BTreeMap::new(), Vec::new());
    for (index, groups) in placement.iter().enumerate() {
        let name = format!("s{index}");
        let service = start(ExpertConfig::new(&name), device.clone(), checkpoint, groups);
        links.insert(name.clone(), service as Arc<dyn ShardLink>);
        let member = member(&name, "http://in-process", groups, checkpoint.fingerprint());
        registrations.push(register(&membership, member).await);
    }
    let dispatcher = Dispatcher::new(
        DispatchConfig::new(checkpoint.fingerprint()),
        ModelShape::new(checkpoint).unwrap().unwrap(),
        &membership,
        Arc::new(InProcess(links)),
        &Registry::new(),
    );
    dispatcher.call(input).await.unwrap()
}

/// A row that waits behind batches that take long, at a shard that gives a sign every few milliseconds.
pub(crate) async fn a_queued_batch_gets_signs_of_life(link: Arc<dyn ShardLink>) {
    let ahead: Vec<_> = (0..10)
        .map(|step| {
            // As many experts a row as the model has: more to compute than to send.
            let link = link.clone();
            let large = ExpertBatch {
                groups: vec![0, 1],
                experts: (0..6).collect(),
                counts: vec![4096; 6],
                row_index: (0..6).flat_map(|_| 0..4096).collect(),
                weights: vec![1.0; 6 * 4096],
                ..batch(Dtype::F32, step, 4096, 0)
            };
            tokio::spawn(async move { link.compute(large).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(2)).await;
    let (small, behind) = (batch(Dtype::F32, 100, 1, 0), link.clone());
    let id = small.id.unwrap();
    let behind = tokio::spawn(async move { behind.compute(small).await });
    let mut signs = 0;
    while !behind.is_finished() {
        signs += usize::from(link.last_sign(id).is_some());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(signs > 0, "no sign while it waited");
    assert!(behind.await.unwrap().unwrap().error.is_none());
    assert_eq!(link.last_sign(id), None, "it has been answered");
    for large in ahead {
        assert_eq!(large.await.unwrap().unwrap().sums.len(), 1, "a sign is no answer");
    }
}
