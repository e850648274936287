//! Why the front refuses a request.

use conclave_serve::{Error, ErrorKind};

/// A refusal. The cases that clients tell apart by a code of their own are variants.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrontError {
    /// Another model than the one served here.
    #[error("model {asked:?} is not served here, expected {served:?}")]
    ModelNotFound { asked: String, served: String },
    /// Prompt and output do not fit into the context.
    #[error(
        "this model's maximum context length is {limit} tokens; the request has {prompt} prompt tokens and asks for {asked} more"
    )]
    ContextLength { limit: u64, prompt: u64, asked: u64 },
    /// Anything else.
    #[error(transparent)]
    Other(#[from] Error),
}

impl FrontError {
    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ModelNotFound { .. } => ErrorKind::NotFound,
            Self::ContextLength { .. } => ErrorKind::InvalidArgument,
            Self::Other(error) => error.kind,
        }
    }

    /// The request field at fault.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::ModelNotFound { .. } => Some("model"),
            Self::ContextLength { .. } => Some("max_tokens"),
            Self::Other(error) => error.param.as_deref(),
        }
    }

    /// The code by which clients of the OpenAI API know the case.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::ModelNotFound { .. } => Some("model_not_found"),
            Self::ContextLength { .. } => Some("context_length_exceeded"),
            Self::Other(_) => None,
        }
    }
}

impl From<FrontError> for Error {
    fn from(error: FrontError) -> Self {
        let (kind, param) = (error.kind(), error.param().map(str::to_owned));
        Error { param, ..Error::new(kind, error.to_string()) }
    }
}
