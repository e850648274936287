//! The tile registers of AMX: whether a process may use them, and how they are set up on each thread.
#![allow(unsafe_code)]

use std::{
    arch::{asm, x86_64::*},
    cell::Cell,
    sync::OnceLock,
};

/// Rows of a tile at most.
pub(super) const ROWS: usize = 16;
/// Bytes of a row of a tile.
pub(super) const ROW_BYTES: usize = 64;

/// Whether the processor has tiles of bf16 and the operating system lets this process use them. Asked once: the
/// permission holds for all threads, those to come as well.
pub(super) fn are_granted() -> bool {
    static GRANTED: OnceLock<bool> = OnceLock::new();
    *GRANTED.get_or_init(|| exist() && request())
}

/// Whether the processor has AMX with bf16, and the operating system keeps tiles with the rest of a thread's state.
fn exist() -> bool {
    /// Leaf 7, EDX: AMX-BF16 and AMX-TILE.
    const FEATURES: u32 = 1 << 22 | 1 << 24;
    /// XCR0: the set-up of tiles and their data.
    const STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn state() -> u64 {
        // SAFETY: the caller has found XSAVE, which the operating system has switched on.
        unsafe { _xgetbv(0) }
    }
    // Safe in newer compilers only.
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    let features = unsafe { if __cpuid(0).eax < 7 { 0 } else { __cpuid_count(7, 0).edx } };
    features & FEATURES == FEATURES
        && is_x86_feature_detected!("xsave")
        // SAFETY: found above.
        && unsafe { state() } & STATE == STATE
}

/// Asks for the permission that Linux wants, as tiles make the state of a thread 8 KiB larger.
#[cfg(target_os = "linux")]
fn request() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers, and no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn request() -> bool {
    false
}

thread_local! {
    /// Rows that the registers of this thread are set up for; none at first.
    static SET_UP_FOR: Cell<usize> = const { Cell::new(0) };
}

/// Sets the registers of this thread up, unless they are, for inputs of `rows` rows, at most twice [`ROWS`]:
///
/// | registers | what | rows |
/// |---|---|---|
/// | 0, 1, 2, 3 | sums with four panels | `rows` |
/// | 4; 5 | inputs; not used | `rows` |
/// | 6, 7 | weights | 16 |
///
/// or, where there are more than sixteen rows:
///
/// | registers | what | rows |
/// |---|---|---|
/// | 0, 1; 2, 3 | sums of the first rows, and of the others, with two panels | 16; `rows − 16` |
/// | 4; 5 | inputs: the first rows, and the others | 16; `rows − 16` |
/// | 6, 7 | weights | 16 |
///
/// They stay so for as long as the thread lives: the operating system keeps them for it as all other registers, and
/// gives them up by itself on a core that goes to sleep. Setting them up again for each product would cost more.
///
/// # Safety
/// [`are_granted`] has said so.
pub(super) unsafe fn set_up(rows: usize) {
    if SET_UP_FOR.get() == rows {
        return;
    }
    let few = rows.min(ROWS) as u8;
    let rest = if rows > ROWS { (rows - ROWS) as u8 } else { few };
    let full = ROWS as u8;
    let layout = Layout {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: std::array::from_fn(|register| if register < 8 { ROW_BYTES as u16 } else { 0 }),
        rows: [few, few, rest, rest, few, rest, full, full, 0, 0, 0, 0, 0, 0, 0, 0],
    };
    // SAFETY: the layout is the one that the instruction reads.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const layout, options(nostack, readonly, preserves_flags)) };
    SET_UP_FOR.set(rows);
}

/// What `ldtilecfg` reads.
#[repr(C)]
struct Layout {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}
