//! One frame: its layout, and which fields of a message are its payloads. Pure.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use conclave_proto::MAX_MESSAGE_BYTES;
use conclave_proto::v1::{ExpertBatch, ExpertResult, Hello, MoeInput, MoeOutput, Welcome};
use prost::Message;

const HEAD: usize = 8;
/// More sums than an answer can have: two for each level of the tree.
const MOST_PAYLOADS: usize = 1024;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Message,
    Ping,
    Pong,
    Hello,
    Welcome,
}

impl Kind {
    const ALL: [Self; 5] = [Self::Message, Self::Ping, Self::Pong, Self::Hello, Self::Welcome];

    fn of(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }
}

/// A message whose tensors can be taken out and put back.
pub trait Payloads: Message + Default {
    /// The fields that are tensors.
    fn places(&mut self) -> Vec<&mut Bytes>;

    /// What they hold, in the same order; they are left empty.
    fn take(&mut self) -> Vec<Bytes> {
        self.places().into_iter().map(std::mem::take).collect()
    }
}

impl Payloads for ExpertBatch {
    fn places(&mut self) -> Vec<&mut Bytes> {
        vec![&mut self.x]
    }
}

impl Payloads for ExpertResult {
    fn places(&mut self) -> Vec<&mut Bytes> {
        self.sums.iter_mut().map(|sum| &mut sum.sum).collect()
    }
}

impl Payloads for MoeInput {
    fn places(&mut self) -> Vec<&mut Bytes> {
        vec![&mut self.x, &mut self.logits]
    }
}

impl Payloads for MoeOutput {
    fn places(&mut self) -> Vec<&mut Bytes> {
        vec![&mut self.routed]
    }
}

impl Payloads for Hello {
    fn places(&mut self) -> Vec<&mut Bytes> {
        Vec::new()
    }
}

impl Payloads for Welcome {
    fn places(&mut self) -> Vec<&mut Bytes> {
        Vec::new()
    }
}

/// A frame that came.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Frame {
    pub(crate) kind: Kind,
    pub(crate) message: Bytes,
    pub(crate) payloads: Vec<Bytes>,
}

/// The bytes of a frame, to be sent one after another.
pub(crate) fn encode<M: Payloads>(kind: Kind, mut message: M) -> Vec<Bytes> {
    let payloads = message.take();
    let length = message.encoded_len();
    let mut head = BytesMut::with_capacity(HEAD + 4 * payloads.len() + length);
    head.put_u32_le(length as u32);
    head.put_u16_le(payloads.len() as u16);
    head.put_u16_le(kind as u16);
    payloads.iter().for_each(|payload| head.put_u32_le(payload.len() as u32));
    message.encode_raw(&mut head);
    std::iter::once(head.freeze()).chain(payloads).filter(|bytes| !bytes.is_empty()).collect()
}

/// A frame without content.
pub(crate) fn empty(kind: Kind) -> Vec<Bytes> {
    encode(kind, Welcome::default())
}

/// How far a frame has come.
#[derive(Debug, PartialEq)]
pub(crate) enum Parsed {
    /// All of it.
    Frame(Frame),
    /// At least so many bytes are missing.
    Missing(usize),
}

/// Takes the first frame out of what has come.
///
/// # Errors
/// A sentence: the bytes are no frame.
pub(crate) fn parse(buffer: &mut BytesMut) -> Result<Parsed, String> {
    let Some(mut head) = buffer.get(..HEAD) else { return Ok(Parsed::Missing(HEAD - buffer.len())) };
    let (length, count, kind) = (head.get_u32_le() as usize, usize::from(head.get_u16_le()), head.get_u16_le());
    let kind = Kind::of(kind).ok_or_else(|| format!("frame: kind: found {kind}, expected 0 to 4"))?;
    if count > MOST_PAYLOADS {
        return Err(format!("frame: payloads: found {count}, expected at most {MOST_PAYLOADS}"));
    }
    let start = HEAD + 4 * count;
    let Some(mut sizes) = buffer.get(HEAD..start) else { return Ok(Parsed::Missing(start - buffer.len())) };
    let sizes: Vec<usize> = (0..count).map(|_| sizes.get_u32_le() as usize).collect();
    let total = start + length + sizes.iter().sum::<usize>();
    if total > MAX_MESSAGE_BYTES {
        return Err(format!("frame: found {total} bytes, expected at most {MAX_MESSAGE_BYTES}"));
    }
    if buffer.len() < total {
        return Ok(Parsed::Missing(total - buffer.len()));
    }
    let mut bytes = buffer.split_to(total).freeze();
    bytes.advance(start);
    let message = bytes.split_to(length);
    Ok(Parsed::Frame(Frame { kind, message, payloads: sizes.into_iter().map(|size| bytes.split_to(size)).collect() }))
}

/// The message of a frame.
///
/// # Errors
/// A sentence: it is no such message, or has other payloads.
pub fn decode<M: Payloads>(message: Bytes, payloads: Vec<Bytes>) -> Result<M, String> {
    let mut message = M::decode(message).map_err(|error| format!("frame: message: {error}"))?;
    let mut places = message.places();
    if places.len() != payloads.len() {
        return Err(format!("frame: payloads: found {}, expected {}", payloads.len(), places.len()));
    }
    places.iter_mut().zip(payloads).for_each(|(place, payload)| **place = payload);
    drop(places);
    Ok(message)
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::PartialSum;
    use proptest::prelude::*;

    use super::*;

    fn result(sums: &[usize]) -> ExpertResult {
        let sum = |size: &usize| PartialSum { row_index: vec![1, 2], sum: vec![7; *size].into(), ..Default::default() };
        ExpertResult { hidden: 5, sums: sums.iter().map(sum).collect(), ..ExpertResult::default() }
    }

    proptest! {
        #[test]
        fn frames_come_back_however_they_are_cut(
            sums in proptest::collection::vec(proptest::collection::vec(0usize..3000, 0..5), 1..4),
            cut in 1usize..700,
        ) {
            let sent: Vec<ExpertResult> = sums.iter().map(|sums| result(sums)).collect();
            let bytes = sent.iter().flat_map(|m| encode(Kind::Message, m.clone())).collect::<Vec<_>>().concat();
            let (mut buffer, mut found) = (BytesMut::new(), Vec::new());
            for piece in bytes.chunks(cut) {
                buffer.extend_from_slice(piece);
                loop {
                    match parse(&mut buffer).unwrap() {
                        Parsed::Frame(frame) => found.push(decode::<ExpertResult>(frame.message, frame.payloads).unwrap()),
                        Parsed::Missing(some) => {
                            prop_assert!(some > 0);
                            break;
                        }
                    }
                }
            }
            prop_assert_eq!(found, sent);
            prop_assert!(buffer.is_empty());
        }

        #[test]
        fn whatever_comes_is_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut buffer = BytesMut::from(&bytes[..]);
            if let Ok(Parsed::Frame(frame)) = parse(&mut buffer) {
                drop(decode::<ExpertResult>(frame.message, frame.payloads));
            }
        }
    }

    #[test]
    fn what_is_no_frame_is_named() {
        let refused = |bytes: &[u8]| parse(&mut BytesMut::from(bytes)).unwrap_err();
        assert_eq!(refused(&[0, 0, 0, 0, 0, 0, 9, 0]), "frame: kind: found 9, expected 0 to 4");
        assert_eq!(refused(&[0, 0, 0, 0, 0xff, 0xff, 0, 0]), "frame: payloads: found 65535, expected at most 1024");
        let message = format!("frame: found 4294967303 bytes, expected at most {MAX_MESSAGE_BYTES}");
        assert_eq!(refused(&[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]), message);
        let error = decode::<ExpertBatch>(Bytes::new(), Vec::new()).unwrap_err();
        assert_eq!(error, "frame: payloads: found 0, expected 1");
    }

    #[test]
    fn a_tensor_is_not_copied_into_a_frame() {
        let x = Bytes::from(vec![1; 4096]);
        let chunks = encode(Kind::Message, ExpertBatch { x: x.clone(), ..ExpertBatch::default() });
        assert_eq!(chunks.last().unwrap().as_ptr(), x.as_ptr());
    }
}
