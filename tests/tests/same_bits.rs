//! One checkpoint, one device: the same tokens and logprobs whatever the shape of the system.

use conclave_proto::v1::GenerateRequest;
use conclave_tests::{Answer, Client, Cluster, ClusterSpec, Serve, chat, greedy, sampled, tokens};

const QUESTIONS: [&str; 18] = [
    "What color is a leaf?",
    "What is the capital of France?",
    "Tell me a story about a little fox.",
    "讲一个小猫的故事。",
    "What is 3 + 4?",
    "Who are you?",
    "你好！",
    "What does a cat say?",
    "Tell me a story about a brave bird.",
    "What is the capital of Japan?",
    "天空是什么颜色的？",
    "How many legs does a spider have?",
    "What is 12 + 30?",
    "Where do fish live?",
    "Write a short story about rain.",
    "What is the opposite of hot?",
    "Name a fruit.",
    "Good night!",
];
const TOKENS: u32 = 24;

/// 20 prompts, each greedy and sampled: 18 questions and two prompts longer than a chunk and an attention split.
fn requests() -> Vec<GenerateRequest> {
    let long = |n: u32| tokens(&(0..n).map(|i| 300 + (i * 6007) % 3500).collect::<Vec<_>>());
    let prompts = QUESTIONS.iter().map(|text| chat(text)).chain([long(530), long(1100)]);
    prompts.enumerate().flat_map(|(i, p)| [greedy(p.clone(), TOKENS), sampled(p, TOKENS, 1000 + i as u64)]).collect()
}

async fn batch(client: &Client) -> Vec<Answer> {
    client.generate_all(requests()).await.unwrap()
}

fn assert_same(expected: &[Answer], found: &[Answer], variant: &str) {
    for (i, (e, f)) in expected.iter().zip(found).enumerate() {
        assert_eq!(e, f, "request {i} differs with {variant}");
    }
}

async fn baseline() -> Vec<Answer> {
    let serve = Serve::start(&["--threads=2"]).await.unwrap();
    let answers = batch(&serve.client().await.unwrap()).await;
    assert!(
        answers.iter().all(|a| a.tokens.iter().all(|(_, logprob)| logprob.is_some())),
        "logprobs are there to compare"
    );
    answers
}

#[tokio::test(flavor = "multi_thread")]
async fn alone_in_a_batch_and_in_any_chunks() {
    let expected = baseline().await;

    let serve = Serve::start(&["--threads=1"]).await.unwrap();
    let client = serve.client().await.unwrap();
    let mut alone = Vec::new();
    for request in requests() {
        alone.push(client.generate(request).await.unwrap());
    }
    assert_same(&expected, &alone, "each request alone");

    for chunk in ["--prefill-chunk=16", "--prefill-chunk=512"] {
        let serve = Serve::start(&[chunk]).await.unwrap();
        assert_same(&expected, &batch(&serve.client().await.unwrap()).await, chunk);
    }
    let serve = Serve::start(&["--shards=3"]).await.unwrap();
    assert_same(&expected, &batch(&serve.client().await.unwrap()).await, "three shards in one process");
}

#[tokio::test(flavor = "multi_thread")]
async fn over_processes_placements_and_dispatch_modes() {
    let expected = baseline().await;
    let uneven = |cells: &[&str]| ClusterSpec {
        experts: cells.iter().map(|c| format!("--cells={c}")).collect(),
        ..ClusterSpec::default()
    };
    let specs = [
        ("1 expert process", ClusterSpec::even(1)),
        ("2 expert processes", ClusterSpec::even(2)),
        ("4 expert processes", ClusterSpec::even(4)),
        ("8 expert processes", ClusterSpec::even(8)),
        ("uneven placement", uneven(&["0,3,5-6", "1", "2,4,7"])),
        ("overlapping placement", uneven(&["0-5", "1,2,7", "3-7"])),
        ("embedded dispatch", ClusterSpec { dispatch: "embedded", ..ClusterSpec::even(4) }),
        (
            "two micro-batches",
            ClusterSpec { attention_flags: vec!["--micro-batches=2".into()], ..ClusterSpec::even(2) },
        ),
        (
            "embedded dispatch, chunks of 16",
            ClusterSpec {
                dispatch: "embedded",
                attention_flags: vec!["--prefill-chunk=16".into()],
                ..uneven(&["7,0", "1-6"])
            },
        ),
    ];
    for (variant, spec) in specs {
        let cluster = Cluster::start(spec).await.unwrap();
        let found = batch(&cluster.client().await.unwrap()).await;
        assert_same(&expected, &found, variant);
        if variant == "8 expert processes" {
            assert_bounded_fan_out(&cluster.metrics().await.unwrap());
        }
    }
}

/// At most `topk_group` = 3 groups a token and layer, and no fewer rows than were dispatched.
fn assert_bounded_fan_out(metrics: &str) {
    let value = |name: &str| -> f64 {
        let line =
            metrics.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} in\n{metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let (count, sum) = (value("conclave_dispatch_groups_per_row_count"), value("conclave_dispatch_groups_per_row_sum"));
    let max = value("conclave_dispatch_groups_per_row_max");
    assert!(count > 1000.0, "{count} token-layers were dispatched");
    assert!((1.0..=3.0).contains(&max), "{max} groups a token-layer at most");
    assert!(sum / count > 1.0 && sum / count <= 3.0, "{} groups a token-layer on average", sum / count);
}
