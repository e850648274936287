//! A real cluster: processes that die, join, drain and claim, under a stream that must not notice.

use std::time::Duration;

use conclave_proto::v1::{Cluster as View, GenerateRequest};
use conclave_tests::{
    Answer, Cluster, ClusterSpec, Process, Serve, binary, chat, demo_model, demo_with_other_weights, gather, greedy,
};

const STREAM_TOKENS: u32 = 300;

fn replicated() -> ClusterSpec {
    ClusterSpec {
        experts: ["1/2", "2/2", "1/2", "2/2"].iter().map(|s| format!("--shard={s}")).collect(),
        ..ClusterSpec::default()
    }
}

fn long_request() -> GenerateRequest {
    GenerateRequest { ignore_eos: true, ..greedy(chat("Tell me a story about a little fox."), STREAM_TOKENS) }
}

async fn undisturbed() -> Answer {
    let serve = Serve::start(&[]).await.unwrap();
    serve.client().await.unwrap().generate(long_request()).await.unwrap()
}

/// Reads a few events, does something to the cluster, and reads the rest.
async fn stream_through(cluster: &mut Cluster, act: impl AsyncFnOnce(&mut Cluster)) -> Answer {
    let mut stream = cluster.client().await.unwrap().stream(long_request()).await.unwrap();
    let mut answer = Answer::default();
    while answer.tokens.len() < 20 {
        answer.take(stream.message().await.unwrap().expect("more events"));
    }
    act(cluster).await;
    gather(stream, answer).await.unwrap()
}

fn replicas(view: &View) -> Vec<usize> {
    view.cells.iter().map(|cell| cell.instances.len()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn any_expert_may_be_killed_mid_stream() {
    let expected = undisturbed().await;
    for victim in 0..4 {
        let mut cluster = Cluster::start(replicated()).await.unwrap();
        cluster.wait_members("expert", 4).await.unwrap();
        let view = cluster.client().await.unwrap().cluster().await.unwrap();
        assert_eq!(replicas(&view), vec![2; 8], "{view:#?}");
        let found = stream_through(&mut cluster, async |c| c.experts[victim].kill().unwrap()).await;
        assert_eq!(expected, found, "expert {victim} was killed");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_expert_does_not_hang_a_stream() {
    let expected = undisturbed().await;
    let mut cluster = Cluster::start(replicated()).await.unwrap();
    cluster.wait_members("expert", 4).await.unwrap();
    let found = stream_through(&mut cluster, async |c| c.experts[1].signal("STOP").unwrap()).await;
    cluster.experts[1].signal("CONT").unwrap();
    assert_eq!(expected, found);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attention_replica_may_be_killed_mid_stream() {
    let expected = undisturbed().await;
    let spec = ClusterSpec { attentions: 2, ..ClusterSpec::even(2) };
    let mut cluster = Cluster::start(spec).await.unwrap();
    cluster.wait_members("attention", 2).await.unwrap();
    let found = stream_through(&mut cluster, async |c| kill_busy_attention(c).await).await;
    assert_eq!(expected, found);
}

/// Kills the attention replica that has the sequence.
async fn kill_busy_attention(cluster: &mut Cluster) {
    let before: Vec<Duration> = cluster.attentions.iter().map(|p| p.cpu_time().unwrap()).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let busy = |i: &usize| cluster.attentions[*i].cpu_time().unwrap().saturating_sub(before[*i]);
    let busiest = (0..cluster.attentions.len()).max_by_key(busy).unwrap();
    cluster.attentions[busiest].kill().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_late_expert_joins_and_takes_traffic_and_a_drained_one_leaves() {
    let expected = undisturbed().await;
    let mut cluster = Cluster::start(ClusterSpec::even(2)).await.unwrap();

    cluster.add_expert("--shard=1/2").unwrap();
    cluster.wait_members("expert", 3).await.unwrap();

    // The first holder of cells 0-3 leaves: from now on the late one has them alone.
    let found = stream_through(&mut cluster, async |c| c.experts[0].signal("TERM").unwrap()).await;
    assert_eq!(expected, found);
    let status = cluster.experts[0].wait_exit(Duration::from_secs(10)).unwrap();
    assert!(status.success(), "{status}\n{}", cluster.experts[0].log());

    cluster.wait_members("expert", 2).await.unwrap();
    let again = cluster.client().await.unwrap().generate(long_request()).await.unwrap();
    assert_eq!(expected, again);
    let view = cluster.client().await.unwrap().cluster().await.unwrap();
    let holders: Vec<&str> = view.cells[0].instances.iter().map(String::as_str).collect();
    assert_eq!(holders, ["expert-2"]);
    assert!(view.cells.iter().all(|cell| cell.rows > 0), "every cell took rows: {view:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_router_finishes_its_streams_and_ends() {
    let expected = undisturbed().await;
    let mut cluster = Cluster::start(ClusterSpec::even(2)).await.unwrap();
    let found = stream_through(&mut cluster, async |c| c.router.signal("TERM").unwrap()).await;
    assert_eq!(expected, found);
    let status = cluster.router.wait_exit(Duration::from_secs(5)).unwrap();
    assert!(status.success(), "{status}\n{}", cluster.router.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn four_auto_experts_started_together_cover_all_cells_evenly() {
    let spec = ClusterSpec { experts: vec!["--cells=auto:2".into(); 4], ..ClusterSpec::default() };
    let cluster = Cluster::start(spec).await.unwrap();
    cluster.wait_members("expert", 4).await.unwrap();
    let view = cluster.client().await.unwrap().cluster().await.unwrap();
    assert_eq!(replicas(&view), vec![1; 8], "{view:#?}");

    let spec = ClusterSpec { experts: vec!["--cells=auto:4".into(); 4], ..ClusterSpec::default() };
    let cluster = Cluster::start(spec).await.unwrap();
    cluster.wait_members("expert", 4).await.unwrap();
    let view = cluster.client().await.unwrap().cluster().await.unwrap();
    assert_eq!(replicas(&view), vec![2; 8], "{view:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_go_away_under_load() {
    let expected = undisturbed().await;
    let mut cluster = Cluster::start(ClusterSpec::even(2)).await.unwrap();
    let found = stream_through(&mut cluster, async |c| c.etcd.process().kill().unwrap()).await;
    assert_eq!(expected, found);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let client = cluster.client().await.unwrap();
    assert_eq!(expected, client.generate(long_request()).await.unwrap(), "after the leases ran out");
    assert!(!client.cluster().await.unwrap().coordinator_reachable);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_process_with_the_same_id_is_refused() {
    let cluster = Cluster::start(ClusterSpec::even(1)).await.unwrap();
    let args = expert_args(&cluster.etcd.url, &demo_model().display().to_string(), "expert-0");
    let mut second = Process::spawn(cluster.dir.path(), "second", &binary(), &args).unwrap();
    let status = second.wait_exit(Duration::from_secs(20)).unwrap();
    assert!(!status.success());
    assert!(second.log().contains("expert-0") && second.log().contains("already registered"), "{}", second.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_with_other_weights_takes_no_traffic() {
    let mut cluster = Cluster::start(ClusterSpec::even(1)).await.unwrap();
    let other = demo_with_other_weights();
    let args = expert_args(&cluster.etcd.url, &other.path().display().to_string(), "impostor");
    let process = Process::spawn(cluster.dir.path(), "impostor", &binary(), &args).unwrap();
    cluster.experts.push(process);
    cluster.wait_members("expert", 2).await.unwrap();
    let client = cluster.client().await.unwrap();
    client.generate(long_request()).await.unwrap();
    let view = client.cluster().await.unwrap();
    assert!(view.cells.iter().all(|cell| cell.instances == ["expert-0"]), "{view:#?}");
    assert!(cluster.router.log().contains("impostor"), "the router says whom it refuses\n{}", cluster.router.log());
}

fn expert_args(etcd: &str, model: &str, id: &str) -> Vec<String> {
    ["expert", &format!("--model={model}"), &format!("--etcd={etcd}"), "--grpc=127.0.0.1:0", "--admin=127.0.0.1:0"]
        .iter()
        .map(ToString::to_string)
        .chain([format!("--id={id}"), "--shard=1/1".into(), "--lease-ttl=3".into()])
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_cluster_costs_next_to_nothing() {
    let cluster = Cluster::start(ClusterSpec::even(4)).await.unwrap();
    cluster.client().await.unwrap().generate(long_request()).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = || -> Duration {
        let all = cluster.experts.iter().chain(&cluster.attentions).chain([&cluster.router]);
        all.map(|process| process.cpu_time().unwrap()).sum()
    };
    let (before, window) = (used(), Duration::from_secs(10));
    tokio::time::sleep(window).await;
    let share = (used() - before).as_secs_f64() / window.as_secs_f64();
    println!("six idle processes used {:.2} % of a core", share * 100.0);
    assert!(share < 0.02, "{:.2} % of a core while idle", share * 100.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_view_shows_members_and_their_cells() {
    let cluster = Cluster::start(ClusterSpec::even(4)).await.unwrap();
    let view = cluster.client().await.unwrap().cluster().await.unwrap();
    assert!(view.coordinator_reachable);
    let of = |role: &str| view.members.iter().filter(|m| m.role == role).count();
    assert_eq!((of("router"), of("attention"), of("expert")), (1, 1, 4), "{view:#?}");
    assert!(view.members.iter().filter(|m| m.role == "expert").all(|m| m.cells.len() == 2));

    let output = std::process::Command::new(binary()).args(["inspect", "--cluster", &cluster.grpc]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    for word in ["expert-0", "expert-3", "attention-0", "ready"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
}
