//! One run, from loading to the report.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Result, bail};
use conclave_cluster::Membership;
use conclave_kernels::Device;
use conclave_model::Checkpoint;
use conclave_proto::v1;
use conclave_router::{Front, FrontConfig, ServedModel};
use conclave_serve::Readiness;
use prometheus::Registry;

use super::{
    BenchArgs,
    hops::{self, Calls},
    limits::Costs,
    machine::{self, Machine, Probe},
    measure::{Bench, Shape},
    mixed,
    profile::{self, Profile, Wanted},
    profiled::Profiled,
    progress::Progress,
    prompts::Prompts,
    recorder::Recorder,
    report::{Figure, Model, Process, Report, Unit},
    target::Target,
};
use crate::process::{
    blocking,
    device::on_device,
    in_process::{InProcess, Settings, Shown},
};

/// Ids that prompts are made of.
const CANDIDATES: usize = 16_384;
/// Calls of a layer in one sample: an empty one, and one of the model.
const EMPTY_CALLS: usize = 200;
const LAYER_CALLS: usize = 40;

/// Runs all measurements.
///
/// # Errors
/// Naming what could not be had, or the request that failed.
pub async fn run(args: &BenchArgs) -> Result<Report> {
    let machine = Machine::read();
    match &args.url {
        Some(url) => remote(args, url, machine).await,
        None => {
            let device = args.device.open()?;
            on_device!(device, device => in_process(args, &device, machine).await)
        }
    }
}

/// Over the parts of `conclave serve`.
async fn in_process<D: Device>(args: &BenchArgs, device: &Arc<D>, machine: Machine) -> Result<Report> {
    let probe = probe(args).await?;
    machine::forget_peak_memory();
    let started = Instant::now();
    let checkpoint = args.model.open().await?;
    checkpoint.check_memory(checkpoint.loaded_bytes(device.fp8_weights()))?;
    let progress = Progress::new();
    progress.begin(&format!("loading {}", checkpoint.name()), 1);
    let recorder = args.profile.then(Arc::<Recorder>::default);
    let (parts, front) = match &recorder {
        None => serve(args, device, &checkpoint).await?,
        Some(recorder) => {
            let profiled = Arc::new(Profiled::new(device.clone(), recorder.clone()));
            serve(args, &profiled, &checkpoint).await?
        }
    };
    let ready = Figure::new("ready", Unit::Seconds, vec![started.elapsed().as_secs_f64()]);

    let costs = Costs::on(&checkpoint, &device.numerics());
    let target = Target::InProcess(front);
    let model = target.model().await?;
    let mut bench = bench(args, target, &model, Some(costs.clone()), (progress, probe)).await?;
    let mut figures = throughput(args, &mut bench).await?;
    bench.progress.begin("layer calls", 1);
    let layer = hops::layer_call("layer call, in process", parts.moe.clone(), &costs, calls(args, LAYER_CALLS));
    figures.extend(layer.await?);
    let peak_bytes = machine::peak_memory(None)?.saturating_sub(bench.probe.bytes());
    bench.progress.begin("hops", 1);
    figures.extend(hops::empty_layer(device, calls(args, EMPTY_CALLS)).await?);
    figures.push(ready);
    let profiles = match &recorder {
        Some(recorder) => profile(args, &mut bench, recorder).await?,
        None => Vec::new(),
    };
    let processes = vec![Process { pid: std::process::id(), peak_bytes }];
    let found = Found { model, figures, processes, profiles, machine };
    report(args, &bench, found).await
}

async fn profile(args: &BenchArgs, bench: &mut Bench, recorder: &Recorder) -> Result<Vec<Profile>> {
    bench.progress.begin("profile", 1);
    let chunk = chunk(args, bench);
    let (streams, context, tokens) = (args.batch.clone(), args.context, args.tokens);
    profile::run(bench, recorder, &Wanted { chunk, streams, context, tokens }).await
}

/// Loads the model, and a front over it.
async fn serve<D: Device>(
    args: &BenchArgs,
    device: &Arc<D>,
    checkpoint: &Arc<Checkpoint>,
) -> Result<(InProcess, Arc<Front>)> {
    let registry = Registry::new();
    let shown = Shown { readiness: Readiness::starting("loading"), registry: registry.clone() };
    let model = ServedModel::of(checkpoint)?;
    let settings = Settings { model: &model, attention: &args.attention, context: None, shards: args.shards };
    let parts = InProcess::on(settings, &shown, device, checkpoint).await?;
    let (view, connector) = (parts.membership.watch(), parts.attention.clone());
    let front = Front::new(FrontConfig::default(), model, view, connector, &registry)?;
    Ok((parts, front))
}

/// Over the public API of a server.
async fn remote(args: &BenchArgs, url: &str, machine: Machine) -> Result<Report> {
    let target = Target::connect(url, args.api_key.as_deref()).await?;
    let model = target.model().await?;
    let checkpoint = checkpoint_of(args, &model).await?;
    let probe = probe(args).await?;
    let costs = checkpoint.as_ref().map(|checkpoint| Costs::on(checkpoint, &model.numerics));
    let mut bench = bench(args, target, &model, costs.clone(), (Progress::new(), probe)).await?;
    let mut figures = throughput(args, &mut bench).await?;
    if let (Some(checkpoint), Some(costs), Some(cluster)) = (&checkpoint, &costs, bench.target.cluster().await?) {
        bench.progress.begin("layer calls", 1);
        figures.extend(hops::cluster_layer_calls(&cluster, checkpoint, costs, calls(args, LAYER_CALLS)).await?);
    }
    let process = |pid: &u32| Ok(Process { pid: *pid, peak_bytes: machine::peak_memory(Some(*pid))? });
    let processes = args.pids.iter().map(process).collect::<Result<_>>()?;
    let found = Found { model, figures, processes, profiles: Vec::new(), machine };
    report(args, &bench, found).await
}

/// The checkpoint of `--model`, which must be the served one.
async fn checkpoint_of(args: &BenchArgs, model: &v1::Model) -> Result<Option<Arc<Checkpoint>>> {
    if args.model.model.is_none() {
        return Ok(None);
    }
    let checkpoint = args.model.open().await?;
    if checkpoint.fingerprint() != model.fingerprint {
        let (found, expected) = (checkpoint.fingerprint(), &model.fingerprint);
        bail!("--model: found fingerprint {found}, expected the served model's, {expected}");
    }
    Ok(Some(checkpoint))
}

async fn bench(
    args: &BenchArgs,
    target: Target,
    model: &v1::Model,
    costs: Option<Costs>,
    (progress, probe): (Progress, Probe),
) -> Result<Bench> {
    let ids = target.with_string(model, Prompts::candidates(model.vocab, CANDIDATES)).await?;
    if ids.is_empty() {
        bail!("{}: no token has a string", model.id);
    }
    Ok(Bench {
        target,
        prompts: Prompts::new(ids, args.seed.unwrap_or_else(seed_of_now)),
        costs,
        context_limit: model.context_limit as usize,
        repeat: args.repeat,
        limit: Duration::from_secs(args.limit),
        progress,
        probe,
    })
}

/// Another one in every run.
fn seed_of_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_nanos() as u64)
}

/// Prefill and decode.
async fn throughput(args: &BenchArgs, bench: &mut Bench) -> Result<Vec<Figure>> {
    let most = args.batch.iter().copied().max().unwrap_or(1);
    let first = args.prefill.iter().copied().min().unwrap_or(1);
    let shape = |streams, prompt| Shape { streams, prompt, tokens: 2 };
    bench.warm_up(&[shape(1, first), shape(most, 16)]).await?;
    let mut figures = Vec::new();
    for prompt in &args.prefill {
        figures.extend(bench.prefill(*prompt).await?);
    }
    for streams in &args.batch {
        figures.extend(bench.decode(*streams, args.context, args.tokens).await?);
    }
    if args.long_context > 0 {
        figures.extend(bench.decode(1, args.long_context, args.tokens).await?);
    }
    if args.mixed.mixed {
        let sizes = mixed::Sizes { chunk: chunk(args, bench), context: args.context, steps: args.tokens };
        figures.extend(mixed::measure(bench, &args.mixed, sizes).await?);
    }
    Ok(figures)
}

/// Tokens of a prefill chunk: within one step, and within the longest context.
fn chunk(args: &BenchArgs, bench: &Bench) -> usize {
    let attention = &args.attention;
    attention.prefill_chunk.min(attention.step_tokens).min(bench.context_limit.saturating_sub(1))
}

fn calls(args: &BenchArgs, calls: usize) -> Calls {
    Calls { repeat: args.repeat, calls, limit: Duration::from_secs(args.limit) }
}

/// To measure the limits of this machine, on the device that computes.
async fn probe(args: &BenchArgs) -> Result<Probe> {
    let device = args.device.clone();
    blocking("measure the limits of this machine", move || Probe::new(device.rates()?)).await
}

/// What a run found.
struct Found {
    model: v1::Model,
    figures: Vec<Figure>,
    processes: Vec<Process>,
    profiles: Vec<Profile>,
    machine: Machine,
}

/// Puts everything together, with the machine's limits.
async fn report(args: &BenchArgs, bench: &Bench, found: Found) -> Result<Report> {
    let Found { model, mut figures, processes, profiles, machine } = found;
    bench.progress.begin("limits of this machine", 1);
    let machine = Machine { load_after: machine::load(), ..machine };
    bench.probe.rates().await?;
    let limits = bench.probe.limits();
    bench.progress.end();
    if !processes.is_empty() {
        let bytes: u64 = processes.iter().map(|process| process.peak_bytes).sum();
        figures.push(Figure::new("peak memory", Unit::Gibibytes, vec![bytes as f64 / (1u64 << 30) as f64]));
    }
    let unlimited = figures.iter_mut().filter(|figure| figure.limits.is_empty());
    unlimited.for_each(|figure| figure.limit_by(vec![limits.best(); figure.samples.len()]));
    let costs = bench.costs.as_ref();
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: env!("CONCLAVE_COMMIT"),
        numerics: model.numerics,
        machine,
        target: args.url.clone().unwrap_or_else(|| format!("in process, {} expert shards", args.shards)),
        model: Model {
            name: model.id,
            fingerprint: model.fingerprint,
            weight_bytes: costs.map(Costs::total_bytes),
            bytes_per_token: costs.map(|costs| costs.decode_step(1, 0.0).bytes),
        },
        profiles,
        limits,
        figures,
        processes,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use conclave_router::{ApiKeys, RouterService};
    use conclave_serve::Lane;
    use futures::FutureExt;

    use super::super::rig::{Server, tiny_model};
    use super::*;
    use crate::process::{device::AnyDevice, host::MemberService};

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        bench: BenchArgs,
    }

    /// Small in everything.
    fn args(more: &[&str]) -> BenchArgs {
        let small = "bench --device cpu --isa portable --threads 1 --prefill 8,4096 --batch 1,2 --context 8 \
                     --long-context 0 --tokens 4 --repeat 2 --limit 60 --mixed --mixed-streams 3 --mixed-prompts 4 \
                     --mixed-lengths 20-200";
        Command::parse_from(small.split_whitespace().chain(more.iter().copied())).bench
    }

    fn samples(report: &Report, name: &str) -> usize {
        let figure = report.figures.iter().find(|figure| figure.name == name);
        figure.unwrap_or_else(|| panic!("{name}: {:#?}", report.figures)).samples.len()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_run_in_process_has_every_figure() {
        let files = tempfile::TempDir::new().unwrap();
        let checkpoint = tiny_model(&files).await.unwrap();
        let report = run(&args(&["--profile", "--model", &checkpoint.dir().display().to_string()])).await.unwrap();
        for name in ["prefill 8", "time to first token, 8", "decode 1 stream, context 8", "layer call, in process"] {
            assert_eq!(samples(&report, name), 2, "{name}");
        }
        for name in ["decode 2 streams, context 8: token p99", "hop, embedded, TCP", "hop, through a router, same host"]
        {
            assert_eq!(samples(&report, name), 2, "{name}");
        }
        for name in ["gap max, in chunks", "time of both alone by time", "time to first token"] {
            assert_eq!(samples(&report, &format!("mixed, 3 streams and 4 prompts: {name}")), 2, "{name}");
        }
        assert_eq!((samples(&report, "ready"), samples(&report, "peak memory")), (1, 1));
        let decode = report.figures.iter().find(|figure| figure.name == "decode 1 stream, context 8").unwrap();
        assert!(decode.of_limit().is_some_and(|(_, share)| share > 0.0), "{decode:?}");
        let long = report.figures.iter().find(|figure| figure.name == "prefill 4096").unwrap();
        assert_eq!(long.note.as_deref(), Some("needs 4097 tokens, the context is 2048"));

        let [chunk, step, _] = &report.profiles[..] else { panic!("{:?}", report.profiles) };
        let calls = |profile: &Profile, operation: &str| {
            profile.lines.iter().find(|line| line.operation == operation).map(|line| line.calls)
        };
        // Three of four layers have routed experts; a shard runs all that a layer's rows have chosen at once.
        assert_eq!((calls(chunk, "grouped_ffn 64x128"), calls(step, "grouped_ffn 64x128")), (Some(3), Some(3)));
        assert_eq!((calls(step, "mla_attention"), calls(step, "embed")), (Some(4), Some(1)));
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_server_is_measured_over_its_api() {
        let files = tempfile::TempDir::new().unwrap();
        let checkpoint = tiny_model(&files).await.unwrap();
        let AnyDevice::Cpu(device) = args(&[]).device.open().unwrap() else { panic!("the cpu device") };
        let (_parts, front) = serve(&args(&[]), &device, &checkpoint).await.unwrap();
        let service = RouterService {
            front,
            load: Arc::new(conclave_router::NoLoad),
            keys: ApiKeys::default(),
            readiness: Readiness::starting("test"),
            registry: Registry::new(),
        };
        let served =
            MemberService { routes: service.grpc().unwrap(), streams: Arc::new(|_, _| std::future::ready(()).boxed()) };
        let server = Server::start("router", Lane::start("test").unwrap(), served).await.unwrap();
        let pid = std::process::id().to_string();
        let report = run(&args(&["--url", &server.address, "--pids", &pid])).await.unwrap();
        assert_eq!((samples(&report, "prefill 8"), samples(&report, "decode 2 streams, context 8")), (2, 2));
        assert_eq!(report.processes.len(), 1);
        assert_eq!(report.numerics, "cpu-portable-3");
        assert!(report.figures.iter().all(|figure| figure.limits.is_empty()), "no checkpoint, no limits");
    }
}
