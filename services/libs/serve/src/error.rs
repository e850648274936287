//! One error for what a caller is told, and the one place where its kind becomes a gRPC or HTTP status.

use std::fmt;

/// Why a call failed, as far as the caller can act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request is wrong and will stay wrong.
    InvalidArgument,
    /// The thing named does not exist.
    NotFound,
    /// No or a wrong API key.
    Unauthenticated,
    /// A part of the API that is not there.
    Unimplemented,
    /// A bound is reached; retry later.
    ResourceExhausted,
    /// The caller's time is over.
    DeadlineExceeded,
    /// Nobody can serve this now; retry later.
    Unavailable,
    /// The two sides do not fit together (other checkpoint, other member).
    FailedPrecondition,
    /// The caller went away.
    Cancelled,
    /// A bug or a broken machine.
    Internal,
}

/// A kind and a message that names the thing, what was found and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What the caller can do about it.
    pub kind: ErrorKind,
    /// For people.
    pub message: String,
    /// The request field at fault, where there is one.
    pub param: Option<String>,
}

impl Error {
    /// An error of a kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None }
    }

    /// A wrong request.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// Names the request field at fault.
    pub fn with_param(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl ErrorKind {
    /// The gRPC code.
    pub fn code(self) -> tonic::Code {
        match self {
            Self::InvalidArgument => tonic::Code::InvalidArgument,
            Self::NotFound => tonic::Code::NotFound,
            Self::Unauthenticated => tonic::Code::Unauthenticated,
            Self::Unimplemented => tonic::Code::Unimplemented,
            Self::ResourceExhausted => tonic::Code::ResourceExhausted,
            Self::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            Self::Unavailable => tonic::Code::Unavailable,
            Self::FailedPrecondition => tonic::Code::FailedPrecondition,
            Self::Cancelled => tonic::Code::Cancelled,
            Self::Internal => tonic::Code::Internal,
        }
    }

    /// The HTTP status.
    pub fn http(self) -> http::StatusCode {
        use http::StatusCode;
        match self {
            Self::InvalidArgument | Self::Unimplemented => StatusCode::BAD_REQUEST,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::FailedPrecondition => StatusCode::PRECONDITION_FAILED,
            Self::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn from_code(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument | tonic::Code::OutOfRange => Self::InvalidArgument,
            tonic::Code::NotFound => Self::NotFound,
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => Self::Unauthenticated,
            tonic::Code::Unimplemented => Self::Unimplemented,
            tonic::Code::ResourceExhausted => Self::ResourceExhausted,
            tonic::Code::DeadlineExceeded => Self::DeadlineExceeded,
            tonic::Code::Unavailable => Self::Unavailable,
            tonic::Code::FailedPrecondition | tonic::Code::Aborted => Self::FailedPrecondition,
            tonic::Code::Cancelled => Self::Cancelled,
            _ => Self::Internal,
        }
    }
}

/// Response metadata: the request field at fault.
const PARAM_HEADER: &str = "conclave-param";

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        let mut status = Self::new(error.kind.code(), error.message);
        // A field name is ASCII; one that is not cannot ride in metadata, and the message names it anyway.
        if let Some(Ok(param)) = error.param.map(|param| param.parse()) {
            status.metadata_mut().insert(PARAM_HEADER, param);
        }
        status
    }
}

impl From<tonic::Status> for Error {
    fn from(status: tonic::Status) -> Self {
        let param = status.metadata().get(PARAM_HEADER).and_then(|param| param.to_str().ok()).map(str::to_owned);
        Self { kind: ErrorKind::from_code(status.code()), message: status.message().to_owned(), param }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [ErrorKind; 10] = [
        ErrorKind::InvalidArgument,
        ErrorKind::NotFound,
        ErrorKind::Unauthenticated,
        ErrorKind::Unimplemented,
        ErrorKind::ResourceExhausted,
        ErrorKind::DeadlineExceeded,
        ErrorKind::Unavailable,
        ErrorKind::FailedPrecondition,
        ErrorKind::Cancelled,
        ErrorKind::Internal,
    ];

    #[test]
    fn an_error_survives_grpc() {
        for kind in KINDS {
            let plain = Error::new(kind, "temperature is -1, expected 0 to 2");
            for error in [plain.clone(), plain.with_param("temperature")] {
                assert_eq!(Error::from(tonic::Status::from(error.clone())), error);
            }
        }
        let strange = Error::invalid("no such field").with_param("température\n");
        assert_eq!(Error::from(tonic::Status::from(strange)).param, None);
    }

    #[test]
    fn every_kind_is_an_http_error() {
        for kind in KINDS {
            assert!(kind.http().is_client_error() || kind.http().is_server_error(), "{kind:?}");
        }
        assert_eq!(ErrorKind::Cancelled.http().as_u16(), 499);
        assert_eq!(ErrorKind::ResourceExhausted.http().as_u16(), 429);
    }
}
