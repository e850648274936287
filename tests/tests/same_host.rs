//! Members of one host talk over sockets, with the same bits; TCP is what remains where they cannot or are not to.

use std::time::Duration;

use conclave_proto::v1::{ClusterMember, GenerateRequest};
use conclave_tests::{Answer, Cluster, ClusterSpec, Serve, chat, gather, greedy, sampled, tokens};

fn requests() -> Vec<GenerateRequest> {
    let long = tokens(&(0..530).map(|i| 300 + (i * 6007) % 3500).collect::<Vec<_>>());
    vec![greedy(chat("What is the capital of France?"), 24), sampled(chat("Who are you?"), 24, 7), greedy(long, 8)]
}

async fn expected() -> Vec<Answer> {
    let serve = Serve::start(&[]).await.unwrap();
    serve.client().await.unwrap().generate_all(requests()).await.unwrap()
}

fn spec(dispatch: &'static str, same_host: &str) -> ClusterSpec {
    ClusterSpec { dispatch, flags: vec![format!("--same-host={same_host}")], ..ClusterSpec::even(2) }
}

/// How the router's messages go to its shards, by shard.
async fn transports(cluster: &Cluster) -> Vec<(String, String)> {
    let label = |line: &str, name: &str| {
        let from = line.split_once(&format!("{name}=\"")).unwrap().1;
        from.split_once('"').unwrap().0.to_owned()
    };
    let metrics = cluster.metrics().await.unwrap();
    let links = metrics.lines().filter(|line| line.starts_with("conclave_dispatch_links{"));
    let mut links: Vec<_> = links.map(|line| (label(line, "shard"), label(line, "transport"))).collect();
    links.sort();
    links
}

fn all(transport: &str) -> Vec<(String, String)> {
    ["expert-0", "expert-1"].map(|shard| (shard.to_owned(), transport.to_owned())).to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_and_tcp_give_the_same_bits() {
    let expected = expected().await;
    for (flag, transport) in [("auto", "same-host"), ("off", "tcp")] {
        let cluster = Cluster::start(spec("router", flag)).await.unwrap();
        assert_eq!(cluster.client().await.unwrap().generate_all(requests()).await.unwrap(), expected, "{flag}");
        assert_eq!(transports(&cluster).await, all(transport));
        let log = cluster.attentions[0].log();
        assert!(log.contains(&format!("transport=\"{transport}\"")), "how attention reaches the router\n{log}");

        let cluster = Cluster::start(spec("embedded", flag)).await.unwrap();
        assert_eq!(cluster.client().await.unwrap().generate_all(requests()).await.unwrap(), expected, "{flag}");
        let log = cluster.attentions[0].log();
        let links = log.lines().filter(|line| line.contains("shard=expert-") && line.contains(transport)).count();
        assert_eq!(links, 2, "{transport} to each of two shards\n{log}");
    }
}

/// The second expert, once it is as it should be.
async fn expert(cluster: &Cluster, right: impl Fn(&ClusterMember) -> bool) -> ClusterMember {
    let client = cluster.client().await.unwrap();
    for _ in 0..400 {
        let members = client.cluster().await.unwrap().members;
        if let Some(member) = members.into_iter().find(|member| member.instance == "expert-1" && right(member)) {
            return member;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("{:#?}", client.cluster().await.unwrap().members)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_was_killed_comes_back_over_a_new_socket() {
    let expected = expected().await;
    let mut cluster = Cluster::start(spec("router", "auto")).await.unwrap();
    let client = cluster.client().await.unwrap();
    assert_eq!(client.generate_all(requests()).await.unwrap(), expected);
    let old = expert(&cluster, |_| true).await;
    cluster.experts[1].kill().unwrap();
    // Its record goes with its lease; then the name is free.
    expert(&cluster, |member| member.health == "unverified").await;
    cluster.start_expert_again(1).unwrap();
    let new = expert(&cluster, |member| member.state == "ready" && member.socket != old.socket).await;
    assert!(!new.socket.is_empty() && new.host == old.host, "{new:?}");
    assert_eq!(client.generate_all(requests()).await.unwrap(), expected);
    assert_eq!(transports(&cluster).await, all("same-host"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_offers_no_socket_is_reached_over_tcp_beside_others() {
    let expected = expected().await;
    let experts = vec!["--shard=1/2".to_owned(), "--shard=2/2 --same-host=off".to_owned()];
    let cluster = Cluster::start(ClusterSpec { experts, ..ClusterSpec::default() }).await.unwrap();
    assert_eq!(cluster.client().await.unwrap().generate_all(requests()).await.unwrap(), expected);
    let (near, far) = (("expert-0".to_owned(), "same-host".to_owned()), ("expert-1".to_owned(), "tcp".to_owned()));
    assert_eq!(transports(&cluster).await, [near, far]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_killed_mid_stream_is_replaced_over_tcp_too() {
    let request = || GenerateRequest { ignore_eos: true, ..greedy(chat("Tell me a story about a little fox."), 200) };
    let serve = Serve::start(&[]).await.unwrap();
    let expected = serve.client().await.unwrap().generate(request()).await.unwrap();
    for flag in ["auto", "off"] {
        let experts = ["1/2", "2/2", "1/2", "2/2"].iter().map(|shard| format!("--shard={shard}")).collect();
        let mut cluster = Cluster::start(ClusterSpec { experts, ..spec("embedded", flag) }).await.unwrap();
        cluster.wait_members("expert", 4).await.unwrap();
        let client = cluster.client().await.unwrap();
        let mut stream = client.stream(request()).await.unwrap();
        let mut answer = Answer::default();
        while answer.tokens.len() < 20 {
            answer.take(stream.message().await.unwrap().expect("more events"));
        }
        cluster.experts[0].kill().unwrap();
        cluster.experts[3].kill().unwrap();
        assert_eq!(gather(stream, answer).await.unwrap(), expected, "{flag}");
    }
}
