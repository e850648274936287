//! What is measured: the front of this process, or a server over its public gRPC API.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, Result};
use conclave_proto::v1::{
    Cluster, GenerateEvent, GenerateRequest, GetClusterRequest, GetModelRequest, Model, Prompt, TokenIds,
    TokenizeRequest, inference_client::InferenceClient, prompt,
};
use conclave_router::{Front, RequestContext};
use futures::{StreamExt, TryStreamExt, stream::BoxStream};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Answers requests.
#[derive(Clone)]
pub enum Target {
    /// In this process.
    InProcess(Arc<Front>),
    /// Elsewhere.
    Remote(Remote),
}

/// A server.
#[derive(Clone)]
pub struct Remote {
    client: InferenceClient<Channel>,
    authorization: Option<MetadataValue<Ascii>>,
}

/// Events of one request.
pub type Events = BoxStream<'static, Result<GenerateEvent>>;

impl Target {
    /// Connects to a server.
    ///
    /// # Errors
    /// When nobody answers there, or the key cannot be sent.
    pub async fn connect(url: &str, api_key: Option<&str>) -> Result<Self> {
        let authorization = api_key
            .map(|key| format!("Bearer {key}").parse())
            .transpose()
            .context("--api-key: expected visible ASCII characters")?;
        let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true);
        let channel = endpoint.connect().await.with_context(|| format!("--url: connect to {url}"))?;
        Ok(Self::Remote(Remote { client: InferenceClient::new(channel), authorization }))
    }

    /// Starts a request.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn generate(&self, request: GenerateRequest) -> Result<Events> {
        Ok(match self {
            Self::InProcess(front) => {
                front.generate(request, RequestContext::default()).await?.map_err(anyhow::Error::from).boxed()
            }
            Self::Remote(remote) => {
                let events = remote.client.clone().generate(remote.request(request)).await?.into_inner();
                events.map_err(anyhow::Error::from).boxed()
            }
        })
    }

    /// The served model.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn model(&self) -> Result<Model> {
        match self {
            Self::InProcess(front) => Ok(front.describe()),
            Self::Remote(remote) => {
                Ok(remote.client.clone().get_model(remote.request(GetModelRequest {})).await?.into_inner())
            }
        }
    }

    /// Those of some ids that have a string; all of them where there is no tokenizer.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn with_string(&self, model: &Model, ids: Vec<u32>) -> Result<Vec<u32>> {
        if !model.has_tokenizer {
            return Ok(ids);
        }
        let prompt = Some(tokens(ids));
        let (ids, pieces) = match self {
            Self::InProcess(front) => front.tokenize("", prompt).await?,
            Self::Remote(remote) => {
                let request = remote.request(TokenizeRequest { model: String::new(), prompt });
                let answer = remote.client.clone().tokenize(request).await?.into_inner();
                (answer.ids, answer.pieces)
            }
        };
        Ok(ids.into_iter().zip(pieces).filter(|(_, piece)| !piece.is_empty()).map(|(id, _)| id).collect())
    }

    /// The members of the cluster that serves; `None` in this process.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn cluster(&self) -> Result<Option<Cluster>> {
        match self {
            Self::InProcess(_) => Ok(None),
            Self::Remote(remote) => {
                let request = remote.request(GetClusterRequest {});
                Ok(Some(remote.client.clone().get_cluster(request).await?.into_inner()))
            }
        }
    }
}

impl Remote {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            request.metadata_mut().insert("authorization", value.clone());
        }
        request
    }
}

/// A prompt of token ids.
pub fn tokens(ids: Vec<u32>) -> Prompt {
    Prompt { prompt: Some(prompt::Prompt::Tokens(TokenIds { ids })) }
}
