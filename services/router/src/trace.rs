//! One span per request, with the client's trace as its parent.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use conclave_serve::{Error, telemetry};
use futures::stream::{BoxStream, Stream};
use tracing::Span;

use crate::front::{RequestContext, draw_request_id};

/// Longest id that a client may choose for its request, in bytes.
const MAX_REQUEST_ID: usize = 128;

/// Makes a request's span and context. The client's id is kept where it is a plain one.
///
/// # Errors
/// When an id is to be drawn and the operating system has no random numbers.
pub(crate) fn begin(
    endpoint: &str,
    request_id: Option<&str>,
    traceparent: Option<&str>,
) -> Result<(Span, RequestContext), Error> {
    let request_id = match request_id.filter(|id| plain(id)) {
        Some(id) => id.to_owned(),
        None => draw_request_id()?,
    };
    let span = tracing::info_span!("request", endpoint, request_id);
    telemetry::set_parent(&span, traceparent.unwrap_or_default());
    let ours = span.in_scope(telemetry::traceparent);
    // Where spans are not exported, the client's trace is passed on as it is.
    let traceparent = if ours.is_empty() { traceparent.unwrap_or_default().to_owned() } else { ours };
    Ok((span, RequestContext { request_id, traceparent, ..RequestContext::default() }))
}

/// Polls a stream inside the span that is current now.
pub(crate) fn in_current_span<T>(stream: BoxStream<'static, T>) -> InSpan<T> {
    InSpan { span: Span::current(), stream }
}

/// A stream that belongs to a span.
pub(crate) struct InSpan<T> {
    span: Span,
    stream: BoxStream<'static, T>,
}

impl<T> Stream for InSpan<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let this = &mut *self;
        let _entered = this.span.enter();
        this.stream.as_mut().poll_next(cx)
    }
}

fn plain(id: &str) -> bool {
    (1..=MAX_REQUEST_ID).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
}
