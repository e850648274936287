//! The way within a host: both sides read memory of the other's.

use std::sync::Arc;

use conclave_kernels::{Device, KernelError};
use conclave_proto::v1::{PairGrant, PairOffer};

use super::{Fetched, PairDevice, PairMemory, Way};

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
    fn way(&self) -> Way {
        Way::Ipc
    }

    fn offer(&self) -> Result<PairOffer, KernelError> {
        Ok(PairOffer { board: self.board.clone().into(), board_bytes: self.bytes as u64, ..PairOffer::default() })
    }

    fn open(&self, _: &PairOffer, grant: &PairGrant) -> Result<Box<dyn PairMemory>, KernelError> {
        let memory = self.device.open_shared(&grant.sums, usize::try_from(grant.sums_bytes).unwrap_or(usize::MAX))?;
        Ok(Box::new(SumsOn { device: self.device.clone(), memory }))
    }
}

struct SumsOn<D: Device> {
    device: Arc<D>,
    memory: D::Shared,
}

impl<D: Device> PairMemory for SumsOn<D> {
    fn fetch(&self, bytes: usize, fetched: Fetched) {
        let mut sums = vec![0; bytes];
        fetched(self.device.read_shared(&self.memory, &mut sums).map(|()| sums));
    }
}
