//! The shard's side of pairs: memory of two devices, or a link of them, that batches of one stream go by.
//! `conclave_dispatch::pair` has the rules.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conclave_dispatch::pair::Way;
use conclave_kernels::link::{Ended, LinkEnd, Linked, Transfer};
use conclave_kernels::{Device, KernelError};
use conclave_proto::v1::{PairGrant, PairOffer};
use prometheus::IntGaugeVec;

/// Pairs at most, those that are kept among them.
const MOST: usize = 64;
/// The largest board.
const LARGEST_BOARD: u64 = 256 << 20;
/// Sums for each row of the board; a batch with more gets them in its answer.
const SUMS_A_ROW: u64 = 2;

/// One caller's pair.
pub(crate) struct ShardPair<D: Device> {
    /// Where rows are found: the caller's, or where they come over the link.
    pub(crate) board: Arc<D::Shared>,
    board_bytes: usize,
    /// This shard's.
    pub(crate) sums: Arc<D::Shared>,
    sums_bytes: usize,
    link: Option<Linked<D>>,
}

impl<D: Device> ShardPair<D> {
    /// Opens the caller's board or joins its link, and makes memory for sums.
    fn open(device: &Arc<D>, offer: &PairOffer) -> Result<(Self, PairGrant), KernelError> {
        let (board_bytes, sums_bytes) = (offer.board_bytes as usize, (SUMS_A_ROW * offer.board_bytes) as usize);
        let (board, sums, handle, link) = match Way::of(offer) {
            Way::Ipc => {
                let board = device.open_shared(&offer.board, board_bytes)?;
                let (sums, handle) = device.share(sums_bytes)?;
                (board, sums, handle, None)
            }
            Way::Nccl => {
                device.check_links()?;
                let (board, sums) = (device.keep(board_bytes)?, device.keep(sums_bytes)?);
                let link = Linked::start(device.clone(), offer.link.to_vec(), LinkEnd::Guest)?;
                (board, sums, Vec::new(), Some(link))
            }
        };
        let grant = PairGrant { refused: String::new(), sums: handle.into(), sums_bytes: sums_bytes as u64 };
        Ok((Self { board: Arc::new(board), board_bytes, sums: Arc::new(sums), sums_bytes, link }, grant))
    }

    /// Tells when as many bytes of rows as a batch has are there. Every batch by the pair has to ask, in order.
    pub(crate) fn receive(&self, bytes: usize, came: Ended) {
        match &self.link {
            None => came(Ok(())),
            Some(link) => link.transfer(Transfer::Receive { memory: self.board.clone(), bytes }, came),
        }
    }

    /// Sends sums of as many bytes to the caller, who is told of them, where it does not read them here.
    pub(crate) fn send(&self, bytes: usize) {
        if let Some(link) = &self.link {
            // A link that has met an error says so, and so does every batch by it from then on.
            link.transfer(Transfer::Send { memory: self.sums.clone(), bytes }, Box::new(drop));
        }
    }

    /// Rows of the board, of so many bytes each.
    pub(crate) fn board_rows(&self, row_bytes: usize) -> usize {
        self.board_bytes / row_bytes
    }

    /// Whether sums of so many bytes find room.
    pub(crate) fn fits(&self, bytes: usize) -> bool {
        bytes <= self.sums_bytes
    }
}

/// The pairs of a shard.
pub(crate) struct ShardPairs<D: Device> {
    state: Mutex<State<D>>,
    gauge: IntGaugeVec,
}

struct State<D: Device> {
    open: usize,
    /// Their callers may still look at them.
    kept: Vec<Arc<ShardPair<D>>>,
}

impl<D: Device> ShardPairs<D> {
    pub(crate) fn new(gauge: IntGaugeVec) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State { open: 0, kept: Vec::new() }), gauge })
    }

    fn lock(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show(&self, state: &State<D>) {
        self.gauge.with_label_values(&["open"]).set(state.open as i64);
        self.gauge.with_label_values(&["kept"]).set(state.kept.len() as i64);
    }

    /// Answers an offer. There is a pair unless the grant says why not.
    pub(crate) fn grant(self: &Arc<Self>, device: &Arc<D>, offer: &PairOffer) -> (PairGrant, Option<OpenPair<D>>) {
        let refused = |refused: String| (PairGrant { refused, ..PairGrant::default() }, None);
        let mut state = self.lock();
        if state.open + state.kept.len() >= MOST {
            let (open, kept) = (state.open, state.kept.len());
            return refused(format!("pairs: {open} are open and {kept} are kept, expected less than {MOST}"));
        }
        if offer.board_bytes == 0 || offer.board_bytes > LARGEST_BOARD {
            return refused(format!("board: found {} bytes, expected 1 to {LARGEST_BOARD}", offer.board_bytes));
        }
        match ShardPair::open(device, offer) {
            Ok((pair, grant)) => {
                state.open += 1;
                self.show(&state);
                (grant, Some(OpenPair { pair: Arc::new(pair), closed: false, of: self.clone() }))
            }
            Err(error) => refused(error.to_string()),
        }
    }
}

/// The pair of a stream, for as long as that lasts. Its memory is kept then, unless the caller has closed the stream: it may
/// still look there.
pub(crate) struct OpenPair<D: Device> {
    pair: Arc<ShardPair<D>>,
    closed: bool,
    of: Arc<ShardPairs<D>>,
}

impl<D: Device> OpenPair<D> {
    /// For a batch.
    pub(crate) fn share(&self) -> Arc<ShardPair<D>> {
        self.pair.clone()
    }

    /// The caller has closed the stream.
    pub(crate) fn closed(mut self) {
        self.closed = true;
    }
}

impl<D: Device> Drop for OpenPair<D> {
    fn drop(&mut self) {
        let mut state = self.of.lock();
        state.open -= 1;
        match &self.pair.link {
            // All its memory is this shard's.
            Some(link) => link.break_off(),
            None if !self.closed => state.kept.push(self.pair.clone()),
            None => {}
        }
        self.of.show(&state);
    }
}
