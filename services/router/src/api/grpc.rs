//! The gRPC API: adapters that unwrap, call the front and convert.

use std::sync::Arc;

use async_trait::async_trait;
use conclave_proto::v1::{
    self, GenerateEvent, GenerateRequest, ScoreRequest,
    inference_server::{Inference, InferenceServer},
};
use conclave_serve::Error;
use futures::{StreamExt, stream::BoxStream};
use http::header::AUTHORIZATION;
use tonic::{
    Request, Response, Status,
    service::{Interceptor, interceptor::InterceptedService},
};
use tracing::Instrument;

use super::{ApiKeys, auth::Tenant};
use crate::{
    front::{ClusterLoad, Front, FrontError, RequestContext},
    trace,
};

/// Largest request message in bytes.
const MAX_REQUEST_BYTES: usize = 32 << 20;

/// `conclave.v1.Inference` over a front.
pub struct InferenceApi {
    front: Arc<Front>,
    load: Arc<dyn ClusterLoad>,
}

/// The service with its API keys, ready to be added to a server. `load` is what `GetCluster` shows of experts.
pub fn server(
    front: Arc<Front>,
    load: Arc<dyn ClusterLoad>,
    keys: ApiKeys,
) -> InterceptedService<InferenceServer<InferenceApi>, KeyCheck> {
    let inference = InferenceServer::new(InferenceApi { front, load }).max_decoding_message_size(MAX_REQUEST_BYTES);
    InterceptedService::new(inference, KeyCheck(keys))
}

/// Asks for the API key.
#[derive(Clone)]
pub struct KeyCheck(ApiKeys);

impl Interceptor for KeyCheck {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let key = request.metadata().get(AUTHORIZATION.as_str()).map(|value| value.as_encoded_bytes());
        let tenant = self.0.check(key)?;
        request.extensions_mut().insert(tenant);
        Ok(request)
    }
}

impl InferenceApi {
    /// Runs a call in its span and counts its answer.
    async fn call<M, T, F>(
        &self,
        name: &str,
        request: Request<M>,
        run: impl FnOnce(M, RequestContext) -> F,
    ) -> Result<Response<T>, Status>
    where
        F: Future<Output = Result<T, FrontError>>,
    {
        let header = |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok());
        let (span, mut context) = trace::begin(name, header("x-request-id"), header("traceparent"))?;
        context.cache_salt = request.extensions().get::<Tenant>().map(Tenant::cache_salt).unwrap_or_default();
        let answer = run(request.into_inner(), context).instrument(span).await;
        let status = answer.as_ref().err().map_or(tonic::Code::Ok, |error| error.kind().code());
        self.front.metrics().request(name, &format!("{status:?}"));
        answer.map(Response::new).map_err(|error| Error::from(error).into())
    }
}

#[async_trait]
impl Inference for InferenceApi {
    type GenerateStream = BoxStream<'static, Result<GenerateEvent, Status>>;

    async fn generate(&self, request: Request<GenerateRequest>) -> Result<Response<Self::GenerateStream>, Status> {
        self.call("Generate", request, |message, context| async move {
            let events = self.front.generate(message, context).await?;
            Ok(trace::in_current_span(events.map(|event| event.map_err(Status::from)).boxed()).boxed())
        })
        .await
    }

    async fn score(&self, request: Request<ScoreRequest>) -> Result<Response<v1::ScoreResponse>, Status> {
        self.call("Score", request, |message, context| async move {
            Ok(v1::ScoreResponse { prompts: self.front.score(message, context).await? })
        })
        .await
    }

    async fn tokenize(&self, request: Request<v1::TokenizeRequest>) -> Result<Response<v1::TokenizeResponse>, Status> {
        self.call("Tokenize", request, |message, _| async move {
            let (ids, pieces) = self.front.tokenize(&message.model, message.prompt).await?;
            Ok(v1::TokenizeResponse { ids, pieces })
        })
        .await
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        self.call("Detokenize", request, |message, _| async move {
            Ok(v1::DetokenizeResponse { text: self.front.detokenize(&message.model, &message.ids)? })
        })
        .await
    }

    async fn get_model(&self, request: Request<v1::GetModelRequest>) -> Result<Response<v1::Model>, Status> {
        self.call("GetModel", request, |_, _| async move { Ok(self.front.describe()) }).await
    }

    async fn get_cluster(&self, request: Request<v1::GetClusterRequest>) -> Result<Response<v1::Cluster>, Status> {
        self.call("GetCluster", request, |_, _| async move { Ok(self.front.cluster(&*self.load).await) }).await
    }
}
