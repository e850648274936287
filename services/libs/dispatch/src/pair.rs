//! Pairs: rows and sums that go from device to device, past the messages. `stream.proto` has the handshake.
//!
//! The caller's device has one *board*, which all shards read: the rows of one layer lie there while its call lasts
//! ([`Published`](conclave_kernels::Published)). Each shard leaves its sums in memory of its own that the caller reads. So
//! each side writes nothing but its own memory, and whoever comes late spoils nothing:
//!
//! - A shard that reads the board late finds rows of another layer; it computes with them what nobody waits for.
//! - A shard's sums belong to one batch at a time, from when it is sent until its answer has been read ([`Turn`]). Where its
//!   caller gives a batch up, the turn goes on until the answer comes, however late. Meanwhile other batches go in messages.
//! - A turn that ends without an answer, or sums that cannot be read, close the pair for good; a new connection makes a new one.
//! - Memory that was given to a caller is kept until that has closed its end of the connection, which it does after it has
//!   forgotten the memory.
//!
//! Rows go to the host too, so that any batch can go in messages at any time, with the same bits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use conclave_kernels::{Device, KernelError};
use conclave_proto::v1::{ExpertResult, PairGrant, PairOffer};

use crate::input;
use crate::stream::Sender;

/// A caller's device, as far as its links have to do with it.
pub trait PairDevice: Send + Sync + 'static {
    /// What shards are told of it.
    fn offer(&self) -> PairOffer;
    /// Opens what a shard has granted.
    ///
    /// # Errors
    /// When the memory cannot be reached from here.
    fn open(&self, grant: &PairGrant) -> Result<Box<dyn PairSums>, KernelError>;
}

/// Where a shard leaves sums.
pub trait PairSums: Send + Sync {
    /// Reads the beginning of it.
    ///
    /// # Errors
    /// When it cannot be read, or is smaller.
    fn fetch(&self, bytes: &mut [u8]) -> Result<(), KernelError>;
}

/// A device with its board.
pub struct BoardDevice<D> {
    device: Arc<D>,
    board: Vec<u8>,
    bytes: usize,
}

impl<D: Device> BoardDevice<D> {
    /// Makes a board for `rows` rows of `hidden` elements.
    ///
    /// # Errors
    /// When the device shares no memory, or has not as much.
    pub fn new(device: Arc<D>, rows: usize, hidden: usize) -> Result<Self, KernelError> {
        let bytes = rows * hidden * device.activation().size();
        Ok(Self { board: device.make_board(bytes)?, device, bytes })
    }
}

impl<D: Device> PairDevice for BoardDevice<D> {
    fn offer(&self) -> PairOffer {
        PairOffer { board: self.board.clone().into(), board_bytes: self.bytes as u64 }
    }

    fn open(&self, grant: &PairGrant) -> Result<Box<dyn PairSums>, KernelError> {
        let memory = self.device.open_shared(&grant.sums, usize::try_from(grant.sums_bytes).unwrap_or(usize::MAX))?;
        Ok(Box::new(SumsOn { device: self.device.clone(), memory }))
    }
}

struct SumsOn<D: Device> {
    device: Arc<D>,
    memory: D::Shared,
}

impl<D: Device> PairSums for SumsOn<D> {
    fn fetch(&self, bytes: &mut [u8]) -> Result<(), KernelError> {
        self.device.read_shared(&self.memory, bytes)
    }
}

/// Why rows and sums go to a shard in messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoPair {
    /// There is nothing to go past.
    #[error("both sides are in one process")]
    InProcess,
    /// Nothing else is wanted.
    #[error("nothing else is asked for here")]
    Unasked,
    /// The device of this side has no memory to share.
    #[error("this side: {0}")]
    NoDevice(String),
    /// There is no stream between members of one host.
    #[error("the shard is not reached over a socket of this host")]
    Far,
    /// The other side says why, or what it granted cannot be opened.
    #[error("the shard: {0}")]
    Refused(String),
}

impl NoPair {
    /// Name in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::InProcess => "in-process",
            Self::Unasked => "unasked",
            Self::NoDevice(_) => "no-device",
            Self::Far => "far",
            Self::Refused(_) => "refused",
        }
    }
}

/// Whether a caller's links have pairs.
#[derive(Clone)]
pub enum Pairs {
    /// None has.
    Without(NoPair),
    /// Those to shards that grant one.
    Offered(Arc<dyn PairDevice>),
    /// All: there is no link without.
    Required(Arc<dyn PairDevice>),
}

impl Pairs {
    pub(crate) fn device(&self) -> Result<&Arc<dyn PairDevice>, NoPair> {
        match self {
            Self::Without(why) => Err(why.clone()),
            Self::Offered(device) | Self::Required(device) => Ok(device),
        }
    }
}

/// The caller's side of a pair.
pub struct Pair {
    sums: Box<dyn PairSums>,
    bytes: u64,
    busy: AtomicBool,
    closed: AtomicBool,
    /// Dropped last: once the connection has ended, the shard takes its memory back.
    _connection: Option<Sender>,
}

impl Pair {
    /// What was granted, over the connection that it was granted on.
    ///
    /// # Errors
    /// Why there is no pair.
    pub(crate) fn open(
        device: &dyn PairDevice,
        grant: Option<&PairGrant>,
        connection: Option<Sender>,
    ) -> Result<Arc<Self>, NoPair> {
        let grant = grant.ok_or_else(|| NoPair::Refused("it did not answer the offer".to_owned()))?;
        if !grant.refused.is_empty() {
            return Err(NoPair::Refused(grant.refused.clone()));
        }
        let sums = device.open(grant).map_err(|error| NoPair::Refused(error.to_string()))?;
        let (busy, closed) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Arc::new(Self { sums, bytes: grant.sums_bytes, busy, closed, _connection: connection }))
    }

    /// The right to send one batch by it, if no other has it.
    pub(crate) fn turn(self: &Arc<Self>) -> Option<Turn> {
        let free = !self.closed.load(Ordering::Acquire) && !self.busy.swap(true, Ordering::AcqRel);
        free.then(|| Turn { pair: self.clone(), answered: false })
    }
}

/// One batch's turn. Dropped without an answer, it closes the pair: the shard may still be at it.
pub struct Turn {
    pair: Arc<Pair>,
    answered: bool,
}

impl Turn {
    /// The answer to the batch has come.
    pub(crate) fn answered(&mut self) {
        self.answered = true;
    }

    /// Reads the sums of the answer into it.
    ///
    /// # Errors
    /// A sentence; the pair is closed then.
    pub(crate) fn collect(mut self, result: &mut ExpertResult) -> Result<(), String> {
        let read = if result.sums_in_pair { self.read(result) } else { Ok(()) };
        self.answered = read.is_ok();
        read
    }

    fn read(&self, result: &mut ExpertResult) -> Result<(), String> {
        let act = input::dtype(result.activation).ok_or("answer: activation: found none")?;
        let row_bytes = u64::from(result.hidden) * act.size() as u64;
        let rows: u64 = result.sums.iter().map(|sum| sum.row_index.len() as u64).sum();
        let total = rows.saturating_mul(row_bytes);
        if total > self.pair.bytes {
            return Err(format!("answer: sums: found {total} bytes, expected at most {}", self.pair.bytes));
        }
        let mut bytes = vec![0; total as usize];
        self.pair.sums.fetch(&mut bytes).map_err(|error| error.to_string())?;
        let mut bytes = bytes::Bytes::from(bytes);
        for sum in &mut result.sums {
            sum.sum = bytes.split_to(sum.row_index.len() * row_bytes as usize);
        }
        Ok(())
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.answered {
            self.pair.closed.store(true, Ordering::Release);
        }
        self.pair.busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::{Activation, PartialSum};

    use super::*;

    /// Bytes 0, 1, 2, …; more than 64 cannot be read.
    struct Counting;

    impl PairDevice for Counting {
        fn offer(&self) -> PairOffer {
            PairOffer::default()
        }

        fn open(&self, _: &PairGrant) -> Result<Box<dyn PairSums>, KernelError> {
            Ok(Box::new(Self))
        }
    }

    impl PairSums for Counting {
        fn fetch(&self, bytes: &mut [u8]) -> Result<(), KernelError> {
            if bytes.len() > 64 {
                return Err(KernelError::Failed("64 bytes".to_owned()));
            }
            bytes.iter_mut().zip(0..).for_each(|(byte, at)| *byte = at);
            Ok(())
        }
    }

    fn pair() -> Arc<Pair> {
        Pair::open(&Counting, Some(&PairGrant { sums_bytes: 128, ..PairGrant::default() }), None).unwrap()
    }

    fn answer(rows: &[usize]) -> ExpertResult {
        let sum = |rows: &usize| PartialSum { row_index: vec![0; *rows], ..PartialSum::default() };
        let sums = rows.iter().map(sum).collect();
        ExpertResult { activation: Activation::Bf16.into(), hidden: 4, sums, sums_in_pair: true, ..Default::default() }
    }

    #[test]
    fn one_batch_at_a_time_has_the_turn_and_its_sums_are_read() {
        let pair = pair();
        let turn = pair.turn().unwrap();
        assert!(pair.turn().is_none(), "another one has it");
        let mut result = answer(&[1, 2]);
        turn.collect(&mut result).unwrap();
        let found: Vec<Vec<u8>> = result.sums.iter().map(|sum| sum.sum.to_vec()).collect();
        assert_eq!(found, [(0..8).collect::<Vec<u8>>(), (8..24).collect()]);
        let mut turn = pair.turn().expect("the answer was read");
        turn.answered();
        drop(turn);
        assert!(pair.turn().is_some());
    }

    #[test]
    fn a_turn_without_an_answer_or_with_sums_that_cannot_be_read_is_the_last() {
        let given_up = pair();
        drop(given_up.turn());
        assert!(given_up.turn().is_none());
        for (rows, expected) in [(9, "64 bytes"), (17, "found 136 bytes, expected at most 128")] {
            let pair = pair();
            let error = pair.turn().unwrap().collect(&mut answer(&[rows])).unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(pair.turn().is_none());
        }
    }

    #[test]
    fn why_there_is_no_pair_is_told() {
        let refused = |grant: Option<&PairGrant>| Pair::open(&Counting, grant, None).err().unwrap().to_string();
        assert_eq!(refused(None), "the shard: it did not answer the offer");
        let grant = PairGrant { refused: "no memory".into(), ..PairGrant::default() };
        assert_eq!(refused(Some(&grant)), "the shard: no memory");
    }
}
