//! The way from one host to another: both sides send what they have over a link.

use std::sync::{Arc, Mutex, PoisonError};

use conclave_kernels::link::{LinkEnd, Linked, Transfer};
use conclave_kernels::{Device, KernelError};
use conclave_proto::v1::{PairGrant, PairOffer};
use tokio::sync::oneshot;

use super::{Fetched, PairDevice, PairMemory, Way};

/// A device with a board, and links to the devices of shards.
pub struct LinkDevice<D> {
    device: Arc<D>,
    /// Of the board, and of the rows of a batch.
    bytes: usize,
    hidden: usize,
    /// An id that nobody has used: some drivers wait for those who join by every id that they have made.
    spare: Mutex<Option<Vec<u8>>>,
}

impl<D: Device> LinkDevice<D> {
    /// Makes a board for `rows` rows of `hidden` elements.
    ///
    /// # Errors
    /// When the device has no links, or lacks what they need here.
    pub fn new(device: Arc<D>, rows: usize, hidden: usize) -> Result<Self, KernelError> {
        let bytes = rows * hidden * device.activation().size();
        let spare = Mutex::new(Some(device.link_id()?));
        device.keep_board(bytes)?;
        Ok(Self { device, bytes, hidden, spare })
    }

    fn spare(&self) -> Option<Vec<u8>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<D: Device> PairDevice for LinkDevice<D> {
    fn way(&self) -> Way {
        Way::Nccl
    }

    fn offer(&self) -> Result<PairOffer, KernelError> {
        let id = self.spare().map_or_else(|| self.device.link_id(), Ok)?;
        Ok(PairOffer { link: id.into(), board_bytes: self.bytes as u64, ..PairOffer::default() })
    }

    fn take_back(&self, offer: PairOffer) {
        *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(offer.link.to_vec());
    }

    fn open(&self, offer: &PairOffer, grant: &PairGrant) -> Result<Box<dyn PairMemory>, KernelError> {
        let sums_bytes = usize::try_from(grant.sums_bytes).unwrap_or(usize::MAX);
        let (rows, sums) = (Arc::new(self.device.keep(self.bytes)?), Arc::new(self.device.keep(sums_bytes)?));
        let link = Linked::start(self.device.clone(), offer.link.to_vec(), LinkEnd::Maker)?;
        Ok(Box::new(LinkMemory { device: self.device.clone(), link, rows, sums, hidden: self.hidden }))
    }
}

struct LinkMemory<D: Device> {
    device: Arc<D>,
    link: Linked<D>,
    /// Rows that are being sent.
    rows: Arc<D::Shared>,
    /// Sums that have come.
    sums: Arc<D::Shared>,
    hidden: usize,
}

impl<D: Device> PairMemory for LinkMemory<D> {
    fn is_open(&self) -> bool {
        self.link.is_open()
    }

    fn give(&self, rows: &mut [u32]) -> Option<oneshot::Receiver<Result<(), KernelError>>> {
        let bytes = rows.len() * self.hidden * self.device.activation().size();
        let (through, hidden) = (self.rows.clone(), self.hidden);
        let of_board = rows.to_vec();
        rows.iter_mut().zip(0..).for_each(|(row, number)| *row = number);
        let (told, ended) = oneshot::channel();
        // Nobody has to wait for it.
        let end = move |result| drop(told.send(result));
        self.link.transfer(Transfer::SendRows { rows: of_board, hidden, through, bytes }, Box::new(end));
        Some(ended)
    }

    fn fetch(&self, bytes: usize, fetched: Fetched) {
        let (device, memory) = (self.device.clone(), self.sums.clone());
        let end = move |result: Result<(), KernelError>| {
            fetched(result.and_then(|()| {
                let mut sums = vec![0; bytes];
                device.read_shared(&memory, &mut sums).map(|()| sums)
            }));
        };
        self.link.transfer(Transfer::Receive { memory: self.sums.clone(), bytes }, Box::new(end));
    }

    fn close(&self) {
        self.link.break_off();
    }
}
