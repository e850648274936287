//! Pairs: rows and sums that go from device to device, past the messages. `stream.proto` has the handshake.
//!
//! There are two ways. Within a host ([`BoardDevice`]) each side reads the other's memory and writes nothing but its own; so
//! whoever comes late spoils nothing:
//!
//! - The caller's device has one *board*, which all shards read: the rows of one layer lie there while its call lasts
//!   ([`Published`](conclave_kernels::Published)). A shard that reads it late finds rows of another layer; it computes with them
//!   what nobody waits for.
//! - Each shard leaves its sums in memory of its own that the caller reads. Memory that was given to a caller is kept until that
//!   has closed its end of the connection, which it does after it has forgotten the memory.
//!
//! From one host to another ([`LinkDevice`]) each side sends what it has into memory of the other's, over a link for every shard,
//! so that a shard that is lost takes no other's link along. A transfer that fails, or takes too long, ends the link.
//!
//! Both ways:
//!
//! - A shard's sums belong to one batch at a time, from when it is sent until its answer has been read ([`Turn`]). Where its
//!   caller gives a batch up, the turn goes on until the answer comes, however late. Meanwhile other batches go in messages.
//! - A turn that ends without an answer, rows that do not arrive or sums that cannot be had close the pair for good; a new
//!   connection makes a new one.
//!
//! Rows go to the host too, so that any batch can go in messages at any time, with the same bits.

mod board;
mod link;

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use board::BoardDevice;
use conclave_kernels::KernelError;
use conclave_proto::v1::{ExpertBatch, ExpertResult, PairGrant, PairOffer};
pub use link::LinkDevice;
use tokio::sync::oneshot;

use crate::input;
use crate::stream::Sender;

/// How rows and sums go past the messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By memory that two processes of a host see.
    Ipc,
    /// By a link of two devices, of one host or two.
    Nccl,
}

impl Way {
    /// Name in flags, metrics and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipc => "ipc",
            Self::Nccl => "nccl",
        }
    }

    /// What is offered.
    pub fn of(offer: &PairOffer) -> Self {
        if offer.link.is_empty() { Self::Ipc } else { Self::Nccl }
    }
}

/// A caller's device, as far as its links have to do with it.
pub trait PairDevice: Send + Sync + 'static {
    /// How rows and sums go.
    fn way(&self) -> Way;
    /// What a shard is told of it, over one connection.
    ///
    /// # Errors
    /// When there is nothing to be told.
    fn offer(&self) -> Result<PairOffer, KernelError>;
    /// The shard that was told has no use for it.
    fn take_back(&self, offer: PairOffer) {
        drop(offer);
    }
    /// Opens what a shard has granted.
    ///
    /// # Errors
    /// When the memory or the link cannot be had here.
    fn open(&self, offer: &PairOffer, grant: &PairGrant) -> Result<Box<dyn PairMemory>, KernelError>;
}

/// Told what a shard left, once.
pub type Fetched = Box<dyn FnOnce(Result<Vec<u8>, KernelError>) + Send>;

/// Where rows and sums of one shard go.
pub trait PairMemory: Send + Sync {
    /// Whether it can be used by now, and still.
    fn is_open(&self) -> bool {
        true
    }
    /// Brings these rows of the layer to the shard, and writes down as which rows that finds them. How that ends, where it takes
    /// time.
    fn give(&self, rows: &mut [u32]) -> Option<oneshot::Receiver<Result<(), KernelError>>> {
        let _ = rows;
        None
    }
    /// Has as many bytes as the shard has left.
    fn fetch(&self, bytes: usize, fetched: Fetched);
    /// It is not used any more.
    fn close(&self) {}
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
    /// The device of this side has no memory to share, or no links.
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
    /// All: there is no link to a shard that grants none.
    Required(Arc<dyn PairDevice>),
}

impl Pairs {
    /// What a shard is offered, over a connection within the host (`near`) or another.
    ///
    /// # Errors
    /// Why nothing is.
    pub(crate) fn offer(&self, near: bool) -> Result<Offered<'_>, NoPair> {
        let device = match self {
            Self::Without(why) => return Err(why.clone()),
            Self::Offered(device) | Self::Required(device) => device,
        };
        if device.way() == Way::Ipc && !near {
            return Err(NoPair::Far);
        }
        let offer = device.offer().map_err(|error| NoPair::NoDevice(error.to_string()))?;
        Ok(Offered { device: &**device, offer })
    }
}

/// An offer over one connection.
pub(crate) struct Offered<'a> {
    device: &'a dyn PairDevice,
    pub(crate) offer: PairOffer,
}

impl Offered<'_> {
    /// What was granted, over the connection that it was granted on.
    ///
    /// # Errors
    /// Why there is no pair.
    pub(crate) fn open(self, grant: Option<&PairGrant>, connection: Option<Sender>) -> Result<Arc<Pair>, NoPair> {
        let grant = grant.ok_or_else(|| NoPair::Refused("it did not answer the offer".to_owned()))?;
        if !grant.refused.is_empty() {
            self.device.take_back(self.offer);
            return Err(NoPair::Refused(grant.refused.clone()));
        }
        let memory = self.device.open(&self.offer, grant).map_err(|error| NoPair::Refused(error.to_string()))?;
        let (busy, closed) = (AtomicBool::new(false), AtomicBool::new(false));
        let (way, bytes) = (self.device.way(), grant.sums_bytes);
        Ok(Arc::new(Pair { memory, way, bytes, busy, closed, _connection: connection }))
    }
}

/// The caller's side of a pair.
pub struct Pair {
    memory: Box<dyn PairMemory>,
    way: Way,
    bytes: u64,
    busy: AtomicBool,
    closed: AtomicBool,
    /// Dropped last: once the connection has ended, the shard takes its memory back.
    _connection: Option<Sender>,
}

impl Pair {
    pub(crate) fn way(&self) -> Way {
        self.way
    }

    /// The right to send one batch by it, if no other has it.
    pub(crate) fn turn(self: &Arc<Self>) -> Option<Turn> {
        let usable = !self.closed.load(Ordering::Acquire) && self.memory.is_open();
        let free = usable && !self.busy.swap(true, Ordering::AcqRel);
        free.then(|| Turn { pair: self.clone(), answered: false })
    }
}

/// Rows on their way to a shard.
pub(crate) struct Giving(Option<oneshot::Receiver<Result<(), KernelError>>>);

impl Giving {
    /// Why they do not arrive. Waits for ever where they do.
    pub(crate) async fn failed(&mut self) -> String {
        let Some(ended) = &mut self.0 else { return pending().await };
        match ended.await {
            Ok(Err(error)) => error.to_string(),
            Ok(Ok(())) | Err(_) => pending().await,
        }
    }
}

/// One batch's turn. Dropped without an answer, it closes the pair: the shard may still be at it.
pub struct Turn {
    pair: Arc<Pair>,
    answered: bool,
}

impl Turn {
    pub(crate) fn way(&self) -> Way {
        self.pair.way
    }

    /// Brings the rows of the batch to the shard, beside the message.
    pub(crate) fn give(&self, batch: &mut ExpertBatch) -> Giving {
        Giving(self.pair.memory.give(&mut batch.board_rows))
    }

    /// Fetches the sums of the answer into it.
    ///
    /// # Errors
    /// A sentence; the pair is closed then.
    pub(crate) async fn collect(mut self, result: &mut ExpertResult) -> Result<(), String> {
        if result.pair_lost {
            return Err("the shard: the rows did not come".to_owned());
        }
        if !result.sums_in_pair {
            self.answered = true;
            return Ok(());
        }
        let act = input::dtype(result.activation).ok_or("answer: activation: found none")?;
        let row_bytes = u64::from(result.hidden) * act.size() as u64;
        let rows: u64 = result.sums.iter().map(|sum| sum.row_index.len() as u64).sum();
        let total = rows.saturating_mul(row_bytes);
        if total > self.pair.bytes {
            return Err(format!("answer: sums: found {total} bytes, expected at most {}", self.pair.bytes));
        }
        let mut bytes = bytes::Bytes::from(self.fetch(total as usize).await?);
        for sum in &mut result.sums {
            sum.sum = bytes.split_to(sum.row_index.len() * row_bytes as usize);
        }
        Ok(())
    }

    /// The turn lasts until they are here, even where nobody waits for them any more.
    async fn fetch(self, bytes: usize) -> Result<Vec<u8>, String> {
        let (told, fetched) = oneshot::channel();
        let (pair, mut turn) = (self.pair.clone(), self);
        pair.memory.fetch(
            bytes,
            Box::new(move |bytes| {
                turn.answered = bytes.is_ok();
                // Whoever is told may want the next turn.
                drop(turn);
                let _ = told.send(bytes);
            }),
        );
        match fetched.await {
            Ok(bytes) => bytes.map_err(|error| error.to_string()),
            Err(_) => Err("the pair was closed".to_owned()),
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.answered {
            self.pair.closed.store(true, Ordering::Release);
            self.pair.memory.close();
        }
        self.pair.busy.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use conclave_proto::v1::{Activation, PartialSum};

    use super::*;

    /// Bytes 0, 1, 2, …; more than 64 cannot be had.
    struct Counting;

    impl PairDevice for Counting {
        fn way(&self) -> Way {
            Way::Ipc
        }

        fn offer(&self) -> Result<PairOffer, KernelError> {
            Ok(PairOffer::default())
        }

        fn open(&self, _: &PairOffer, _: &PairGrant) -> Result<Box<dyn PairMemory>, KernelError> {
            Ok(Box::new(Self))
        }
    }

    impl PairMemory for Counting {
        fn fetch(&self, bytes: usize, fetched: Fetched) {
            fetched(match bytes {
                0..=64 => Ok((0..bytes as u8).collect()),
                _ => Err(KernelError::Failed("64 bytes".to_owned())),
            });
        }
    }

    fn open(grant: Option<&PairGrant>) -> Result<Arc<Pair>, NoPair> {
        Pairs::Offered(Arc::new(Counting)).offer(true).and_then(|offered| offered.open(grant, None))
    }

    fn pair() -> Arc<Pair> {
        open(Some(&PairGrant { sums_bytes: 128, ..PairGrant::default() })).unwrap()
    }

    fn answer(rows: &[usize]) -> ExpertResult {
        let sum = |rows: &usize| PartialSum { row_index: vec![0; *rows], ..PartialSum::default() };
        let sums = rows.iter().map(sum).collect();
        ExpertResult { activation: Activation::Bf16.into(), hidden: 4, sums, sums_in_pair: true, ..Default::default() }
    }

    #[tokio::test]
    async fn one_batch_at_a_time_has_the_turn_and_its_sums_are_read() {
        let pair = pair();
        let turn = pair.turn().unwrap();
        assert!(pair.turn().is_none(), "another one has it");
        let mut result = answer(&[1, 2]);
        turn.collect(&mut result).await.unwrap();
        let found: Vec<Vec<u8>> = result.sums.iter().map(|sum| sum.sum.to_vec()).collect();
        assert_eq!(found, [(0..8).collect::<Vec<u8>>(), (8..24).collect()]);
        let turn = pair.turn().expect("the answer was read");
        turn.collect(&mut ExpertResult { sums_in_pair: false, ..answer(&[1]) }).await.unwrap();
        assert!(pair.turn().is_some());
    }

    #[tokio::test]
    async fn a_turn_without_an_answer_or_with_sums_that_cannot_be_read_is_the_last() {
        let given_up = pair();
        drop(given_up.turn());
        assert!(given_up.turn().is_none());
        let lost = ExpertResult { pair_lost: true, ..answer(&[]) };
        for (mut result, expected) in [
            (answer(&[9]), "64 bytes"),
            (answer(&[17]), "found 136 bytes, expected at most 128"),
            (lost, "the shard: the rows did not come"),
        ] {
            let pair = pair();
            let error = pair.turn().unwrap().collect(&mut result).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
            assert!(pair.turn().is_none());
        }
    }

    #[test]
    fn why_there_is_no_pair_is_told() {
        let refused = |grant: Option<&PairGrant>| open(grant).err().unwrap().to_string();
        assert_eq!(refused(None), "the shard: it did not answer the offer");
        let grant = PairGrant { refused: "no memory".into(), ..PairGrant::default() };
        assert_eq!(refused(Some(&grant)), "the shard: no memory");
        let far = Pairs::Offered(Arc::new(Counting)).offer(false).err();
        assert_eq!(far, Some(NoPair::Far), "memory is not shared from host to host");
    }
}
