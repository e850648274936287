//! Asking a router for its cluster, once or again and again.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use conclave_proto::v1::{Cluster, GetClusterRequest, GetModelRequest, Model, inference_client::InferenceClient};
use serde_json::json;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::{InspectArgs, cluster_text, pretty, view::View};
use crate::commands::{
    EXPECTED_GRPC,
    print::{self, Ink, Style},
};

/// Longest time to connect, and for each answer.
const LIMIT: Duration = Duration::from_secs(10);
/// The cursor to the top; what follows overwrites.
const TOP: &str = "\x1b[H";
/// Nothing of the old drawing behind a line, and below the last one.
const CLEAR_LINE: &str = "\x1b[K\n";
const CLEAR_REST: &str = "\x1b[J";
/// The whole screen.
const CLEAR: &str = "\x1b[2J";

/// Shows the cluster of the router at `url`.
pub async fn run(args: &InspectArgs, url: &str) -> Result<()> {
    let style = Style::of_stdout();
    let Some(interval) = args.watch else {
        let view = ask(url, args.api_key.as_deref()).await?;
        let text = if args.json { pretty(&view)? } else { cluster_text::render(&view, args.width, style) };
        print::stdout(&text)?;
        return Ok(());
    };
    tokio::select! {
        ended = watch(args, url, style, interval) => ended,
        ended = tokio::signal::ctrl_c() => Ok(ended?),
    }
}

/// Draws the cluster again and again, until nobody looks; a router that does not answer is waited for.
async fn watch(args: &InspectArgs, url: &str, style: Style, interval: Duration) -> Result<()> {
    let redraws = !args.json && io::stdout().is_terminal();
    if redraws {
        print::stdout(CLEAR)?;
    }
    loop {
        let text = match ask(url, args.api_key.as_deref()).await {
            Ok(view) if args.json => serde_json::to_string(&view)?,
            Err(error) if args.json => json!({ "error": format!("{error:#}") }).to_string(),
            Ok(view) => cluster_text::render(&view, args.width, style),
            Err(error) => format!("{error:#}\n"),
        };
        let frame = if redraws { redrawn(&text, interval, style) } else { format!("{text}\n") };
        if !print::stdout(&frame)? {
            return Ok(());
        }
        tokio::time::sleep(interval).await;
    }
}

/// Text over what was drawn before.
fn redrawn(text: &str, interval: Duration, style: Style) -> String {
    let note = style.paint(Ink::Dim, &format!("every {} s; Ctrl-C ends", interval.as_secs_f64()));
    format!("{TOP}{}{CLEAR_REST}", format!("{text}\n{note}\n").replace('\n', CLEAR_LINE))
}

async fn ask(url: &str, api_key: Option<&str>) -> Result<View> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(LIMIT).timeout(LIMIT);
    let channel = endpoint.connect().await.with_context(|| format!("connect to {url}"))?;
    let mut client = InferenceClient::new(channel).max_decoding_message_size(conclave_proto::MAX_MESSAGE_BYTES);
    let key = api_key.map(authorization).transpose()?;
    let (cluster, model) = answers(&mut client, key).await.map_err(|status| explain(url, &status))?;
    Ok(View::new(url, cluster, model))
}

async fn answers(
    client: &mut InferenceClient<Channel>,
    key: Option<MetadataValue<Ascii>>,
) -> Result<(Cluster, Model), Status> {
    let model = client.get_model(request(GetModelRequest {}, key.as_ref())).await?;
    let cluster = client.get_cluster(request(GetClusterRequest {}, key.as_ref())).await?;
    Ok((cluster.into_inner(), model.into_inner()))
}

fn request<T>(message: T, key: Option<&MetadataValue<Ascii>>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(key) = key {
        request.metadata_mut().insert("authorization", key.clone());
    }
    request
}

fn authorization(key: &str) -> Result<MetadataValue<Ascii>> {
    match format!("Bearer {key}").parse() {
        Ok(value) => Ok(value),
        Err(_) => bail!("--api-key: found characters that cannot stand in a header, expected printable ASCII"),
    }
}

/// What a refusal most likely means.
fn explain(url: &str, status: &Status) -> anyhow::Error {
    match status.code() {
        Code::Unauthenticated => anyhow!("{url}: {} (--api-key)", status.message()),
        Code::Unimplemented | Code::Unknown | Code::Internal => anyhow!("{url}: {}: {EXPECTED_GRPC}", status.message()),
        code => anyhow!("{url}: {code:?}: {}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_must_fit_into_a_header() {
        assert_eq!(authorization("abc").unwrap(), "Bearer abc");
        assert!(authorization("a\nb").unwrap_err().to_string().contains("--api-key"));
    }

    #[test]
    fn a_drawing_clears_what_was_longer() {
        let frame = redrawn("a\n", Duration::from_millis(1500), Style::PLAIN);
        assert_eq!(frame, "\x1b[Ha\x1b[K\n\x1b[K\nevery 1.5 s; Ctrl-C ends\x1b[K\n\x1b[J");
    }

    #[test]
    fn refusals_say_what_to_change() {
        let text = |code| explain("http://h:1", &Status::new(code, "why")).to_string();
        assert_eq!(text(Code::Unauthenticated), "http://h:1: why (--api-key)");
        assert!(text(Code::Unimplemented).contains("why: expected the gRPC address"));
        assert_eq!(text(Code::DeadlineExceeded), "http://h:1: DeadlineExceeded: why");
    }
}
