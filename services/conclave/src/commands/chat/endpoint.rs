//! An OpenAI-compatible endpoint over HTTP.

use std::{fmt, time::Duration};

use anyhow::{Context, Result};
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue},
};
use serde_json::Value;

use super::wire::{ChatRequest, Model, ModelList, error_message};
use crate::commands::cause;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest part of an error page that is shown, in characters.
const SHOWN: usize = 300;

/// Why a request was not answered, or not to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Nobody answers, or the connection broke.
    Lost(String),
    /// The server says no.
    Refused { status: u16, message: String },
    /// The answer makes no sense, or the server ended it with an error.
    Wrong(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(message) | Self::Wrong(message) => f.write_str(message),
            Self::Refused { status: 401 | 403, message } => {
                write!(f, "{message}; --api-key or OPENAI_API_KEY gives a key")
            }
            Self::Refused { message, .. } => f.write_str(message),
        }
    }
}

impl std::error::Error for Failure {}

/// Where to ask.
pub struct Endpoint {
    base: String,
    http: Client,
}

impl Endpoint {
    /// An endpoint at `base`, as [`base_url`] gives it.
    ///
    /// # Errors
    /// When the key cannot stand in a header.
    pub fn new(base: String, key: Option<&str>) -> Result<Self> {
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut value = value.context("--api-key: expected visible ASCII characters")?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let mut builder = Client::builder().connect_timeout(CONNECT_TIMEOUT).default_headers(headers).tcp_nodelay(true);
        // A proxy cannot reach what is on this machine.
        if is_local(&base) {
            builder = builder.no_proxy();
        }
        Ok(Self { base, http: builder.build().context("HTTP client")? })
    }

    /// The base of its addresses.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// The models that it serves.
    ///
    /// # Errors
    /// When nobody answers, or not with a list.
    pub async fn models(&self) -> Result<Vec<Model>, Failure> {
        let url = format!("{}/models", self.base);
        let answer = self.http.get(&url).send().await.map_err(|error| self.unreachable(&error))?;
        let answer = accepted(answer, &url).await?;
        let list: Result<ModelList, _> = answer.json().await;
        list.map(|list| list.data).map_err(|error| Failure::Wrong(format!("{url}: no list of models: {error}")))
    }

    /// Asks for an answer; its head has come.
    ///
    /// # Errors
    /// When nobody answers, or the server refuses.
    pub async fn chat(&self, request: &ChatRequest) -> Result<Response, Failure> {
        let url = format!("{}/chat/completions", self.base);
        let answer = self.http.post(&url).json(request).send().await.map_err(|error| self.unreachable(&error))?;
        accepted(answer, &url).await
    }

    fn unreachable(&self, error: &reqwest::Error) -> Failure {
        Failure::Lost(format!("no answer from {}: {}", self.base, cause(error)))
    }
}

/// An answer that is no error.
async fn accepted(answer: Response, url: &str) -> Result<Response, Failure> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = answer.text().await.unwrap_or_default();
    Err(Failure::Refused { status: status.as_u16(), message: refusal(status, &body, url) })
}

/// What an error answer says.
fn refusal(status: StatusCode, body: &str, url: &str) -> String {
    let json: Option<Value> = serde_json::from_str(body).ok();
    if let Some(message) = json.as_ref().and_then(error_message) {
        return format!("{message} (HTTP {})", status.as_u16());
    }
    if status == StatusCode::NOT_FOUND {
        return format!("there is nothing at {url} (HTTP 404): --url is the API's base, which mostly ends in /v1");
    }
    let page: String = body.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(SHOWN).collect();
    format!("{url} answered HTTP {status}{}{page}", if page.is_empty() { "" } else { ": " })
}

/// The base of an API's addresses: `http://` is added where no scheme is given, `/v1` where no path is, and a slash at
/// the end goes.
///
/// # Errors
/// When the scheme is another one, or there is no host.
pub fn base_url(value: &str) -> Result<String, String> {
    let value = value.trim();
    let full = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
    let url = Url::parse(&full).map_err(|error| format!("{value:?}: {error}, expected http://host:port/v1"))?;
    if url.scheme() != "http" {
        let proxy = "put a proxy that speaks TLS in between";
        return Err(format!(
            "{value:?}: found scheme {:?}, expected http: only plain HTTP is spoken; {proxy}",
            url.scheme()
        ));
    }
    let base = url.as_str().trim_end_matches('/');
    Ok(if url.path() == "/" { format!("{base}/v1") } else { base.to_owned() })
}

fn is_local(base: &str) -> bool {
    let url = Url::parse(base).ok();
    let host = url.as_ref().and_then(Url::host_str).unwrap_or_default();
    let address = host.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_completed() {
        for (given, base) in [
            ("http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1"),
            ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
            ("localhost:8000/", "http://localhost:8000/v1"),
            (" http://gpu/openai/v1/ ", "http://gpu/openai/v1"),
        ] {
            assert_eq!(base_url(given).as_deref(), Ok(base), "{given}");
        }
    }

    #[test]
    fn what_cannot_be_asked_is_refused() {
        let error = base_url("https://api.openai.com/v1").expect_err("refused");
        assert!(error.contains("found scheme \"https\", expected http: only plain HTTP is spoken"), "{error}");
        assert!(base_url("http://").expect_err("refused").contains("expected http://host:port/v1"));
    }

    #[test]
    fn only_this_machine_is_local() {
        assert!(is_local("http://127.0.0.1:1/v1") && is_local("http://[::1]:1/v1") && is_local("http://localhost/v1"));
        assert!(!is_local("http://10.0.0.1/v1") && !is_local("http://localhost.example/v1"));
    }

    #[test]
    fn an_error_answer_says_what_the_server_said() {
        let url = "http://h/v1/models";
        let say = |status: StatusCode, body: &str| refusal(status, body, url);
        let body = r#"{"error":{"message":"model \"x\" is not served here","code":"model_not_found"}}"#;
        assert_eq!(say(StatusCode::NOT_FOUND, body), "model \"x\" is not served here (HTTP 404)");
        assert!(say(StatusCode::NOT_FOUND, "<h1>404</h1>").starts_with("there is nothing at http://h/v1/models"));
        let page = say(StatusCode::BAD_GATEWAY, "<h1>Bad\n  gateway</h1>");
        assert_eq!(page, "http://h/v1/models answered HTTP 502 Bad Gateway: <h1>Bad gateway</h1>");
        let failure = Failure::Refused { status: 401, message: "no key (HTTP 401)".to_owned() };
        assert_eq!(failure.to_string(), "no key (HTTP 401); --api-key or OPENAI_API_KEY gives a key");
    }
}
